"""The linear map: exact forwards; backwards with what a rule keeps of the output gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meprop import copies, ops, speed
from meprop.functional.common import (
    as_matrix,
    cast,
    cast_operands,
    dtypes_of,
    in_dtypes,
    is_autocast,
    product_dtype,
    sparse_backward,
)
from meprop.policy import Policy, everything, refuse_dtype, refuse_second_derivatives
from meprop.rules import Rule


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rule: Rule,
    sparse_grad: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = x W^T + b, exactly; backwards, only what `rule` keeps of the output gradient g is propagated.

    With S the kept part of g: dx = S W, dW = S^T x (meProp, section 3.1); db is the sum of the whole g. Sums are formed
    in float32 (float64 for float64 tensors), and gradients have the dtype of the tensors. Under autocast, x, weight and
    bias are cast as torch does for its own linear, but of a float32 weight one bfloat16 copy is kept from call to call
    and renewed when the weight has changed (`meprop.copies`). A step of `meprop.optim` on a row-sparse gradient renews
    the copy in the same pass.

    Args:
        x: Input [*, I].
        weight: Weight [O, I].
        bias: Bias [O], or None.
        rule: What to keep, e.g. `meprop.TopK(0.05)`.
        sparse_grad: Make weight.grad a sparse tensor of the kept rows, as `torch.nn.Embedding(sparse=True)` does. For
            rules that keep the same columns for the whole batch (unified, scope "batch").
        compute_dtype: torch.bfloat16: form the forward product, the one that stays dense, in bfloat16, and give the
            output in the dtype of x. The backward pass is in the dtype of the tensors, as casting gradients would cost
            more than it saves. Float64 stays float64. Under autocast this has no effect. None: no other dtype.

    Returns:
        Output [*, O], bit for bit `torch.nn.functional.linear`'s of the same dtypes.

    Raises:
        NotSupportedError: In the backward pass, with create_graph=True; under torch.compile, or in
            DistributedDataParallel, with sparse_grad; a weight that is a DTensor (tensor parallelism).
        TypeError: `rule` is not a Rule, or weight is not of a floating dtype.
        ValueError: sparse_grad with a rule whose rows keep entries of their own; another compute_dtype.
    """
    return linear_with_policy(x, weight, bias, Policy(rule, sparse_grad, compute_dtype))


def linear_with_policy(x: Tensor, weight: Tensor, bias: Tensor | None, policy: Policy) -> Tensor:
    """`linear` as a policy says: of a layer, it may be measured first, or be dense.

    Args:
        x: Input [*, I].
        weight: Weight [O, I].
        bias: Bias [O], or None.
        policy: That of the layer.

    Returns:
        Output [*, O].
    """
    if policy.is_settled_dense():
        return F.linear(x, weight, bias)
    refuse_dtype(weight)
    needs_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    is_sparse = needs_gradients and policy.may_be_sparse(weight.shape[0])
    if is_sparse:
        policy.refuse(weight)
    autocast, dtype = is_autocast(x), product_dtype(x, policy)
    copy = None if dtype is None else _copy(weight, dtype, autocast, is_sparse and policy.sparse_grad)
    if autocast and (copy is None or (needs_gradients and not is_sparse)):
        assert dtype is not None
        copy, (x, weight, bias) = None, cast_operands(dtype, x, weight, bias)
    if is_sparse or (needs_gradients and copy is not None):
        return _Linear.apply(x, weight, bias, copy, policy, autocast)  # pyright: ignore[reportReturnType]  (apply is untyped)
    return _product(x, weight, bias, copy, autocast)


def _copy(weight: Tensor, dtype: torch.dtype, autocast: bool, row_sparse: bool) -> Tensor | None:
    """What stands for the weight in a product of this dtype; None where the weight itself, or a cast of it, does."""
    if not torch.compiler.is_compiling() and copies.serves(weight, dtype):
        return copies.of(weight)
    # Under autocast a cast would not take a sparse gradient back.
    if weight.dtype != torch.float64 and (not autocast or row_sparse):
        return weight.detach().to(dtype)
    return None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, copy: Tensor | None, autocast: bool) -> Tensor:
    """The forward product, with the copy of the weight if there is one; autocast leaves the output in its dtype."""
    if copy is None:
        return F.linear(x, weight, bias)
    output = F.linear(cast(x, copy.dtype), copy, None if bias is None else cast(bias, copy.dtype))
    return output if autocast else output.to(x.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, copy: Tensor | None, policy: Policy, autocast: bool
    ) -> Tensor:
        """A copy of the weight stands for it in the forward product; in the backward ones as well under autocast."""
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.policy, ctx.dtypes = policy, dtypes_of(x, weight, bias)
        ctx.transposed = weight.t().is_contiguous() and not weight.is_contiguous()
        output = _product(x, weight, bias, copy, autocast)
        if copy is not None and autocast:
            x, weight = cast(x, copy.dtype), copy
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.dtype = weight.dtype
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        x, weight = ctx.saved_tensors
        grad_output = grad_outputs[0].to(ctx.dtype)
        grad_NO, x_NI = as_matrix(grad_output), None if x is None else as_matrix(x).to(ctx.dtype)
        inputs = x_NI.shape[1] if x_NI is not None else weight.shape[1]
        grad_x, grad_weight, grad_bias = _backward(ctx, grad_NO, weight, x_NI, inputs)
        if grad_x is not None and grad_output.dim() != 2:
            grad_x = grad_x.view(*grad_output.shape[:-1], inputs)
        return *in_dtypes((grad_x, grad_weight, grad_bias), ctx.dtypes), None, None, None


def _backward(ctx: Any, grad_NO: Tensor, weight: Tensor | None, x_NI: Tensor | None, inputs: int) -> ops.Gradients:
    """Sparse or dense, as the gate of the policy says."""
    policy: Policy = ctx.policy
    (rows, outputs), needs = grad_NO.shape, ctx.needs_input_grad[:3]

    def shape() -> LinearShape:
        return LinearShape(rows, inputs, outputs, grad_NO.dtype, grad_NO.device.type, needs, ctx.transposed)

    if policy.is_sparse(outputs, rows, shape):
        return sparse_backward(grad_NO, weight, x_NI, needs[2], policy)
    if policy.activity is not None:
        policy.activity.count(everything(grad_NO))
    return (
        None if weight is None else grad_NO @ weight,
        None if x_NI is None else grad_NO.t() @ x_NI,
        grad_NO.sum(dim=0) if needs[2] else None,
    )


@dataclass(frozen=True)
class LinearShape:
    """What the speed of a linear layer's backward pass depends on, beside the machine.

    Attributes:
        rows: N, the product of the leading dimensions of its input.
        inputs: I.
        outputs: O.
        dtype: Of the output gradient.
        device: Its type, "cpu" or "cuda".
        needs: Whether gradients of input, weight and bias are wanted.
        transposed: Whether the weight lies in memory as [I, O].
    """

    rows: int
    inputs: int
    outputs: int
    dtype: torch.dtype
    device: str
    needs: tuple[bool, bool, bool]
    transposed: bool = False

    def __str__(self) -> str:
        needs = "".join(name for name, needed in zip("xwb", self.needs, strict=True) if needed)
        return f"{self.rows}x{self.inputs}x{self.outputs} {needs}{' transposed' if self.transposed else ''}"

    def passes(self, rule: Rule) -> speed.Passes:
        """The passes of such a layer."""
        sizes = ((self.rows, self.inputs), (self.outputs, self.inputs), (self.outputs,), (self.rows, self.outputs))
        x, weight, bias, grad_output = speed.random_tensors(self, *sizes)
        if self.transposed:
            weight = weight.t().contiguous().t()
        wanted = [tensor.requires_grad_() for tensor, needs in zip((x, weight, bias), self.needs, strict=True) if needs]
        return (
            lambda: torch.autograd.grad(F.linear(x, weight, bias), wanted, grad_output),
            lambda: torch.autograd.grad(linear(x, weight, bias, rule=rule), wanted, grad_output),
        )
