"""The linear map with an exact forward pass and a sparse backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meprop import ops, speed
from meprop.deferred import Later
from meprop.functional.common import (
    as_matrix,
    cast_operands,
    check_tensors,
    dtypes_of,
    in_dtype,
    in_dtypes,
    no_view,
    product_dtype,
    sparse_backward,
)
from meprop.ops.native import DTYPE_CODES, reason_missing
from meprop.ops.registry import PLAIN
from meprop.policy import (
    Policy,
    is_transformed,
    needs_gradients,
    refuse_dtype,
    refuse_transforms,
    refuse_transforms_of_backward,
)
from meprop.profiles import labelled
from meprop.rules import Rule
from meprop.selection import everything

# With fewer rows a product takes as long as reading the weight, of which zeros of the input spare little. Above the
# second number of rows its time is proportional to them.
_LEAST_ROWS, _MOST_TIMED_ROWS = 32, 256


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rule: Rule,
    sparse_grad: bool = False,
    compute_dtype: torch.dtype | None = None,
    skip_zeros: bool = False,
) -> Tensor:
    """y = x W^T + b with an exact forward pass. The backward pass uses what `rule` keeps of the output gradient.

    Let g be the output gradient and S the kept part of it. Then dx = S W and dW = S^T x (meProp, section 3.1). The
    bias's gradient db is the sum of the whole g. Sums are formed in float32, or in float64 for float64 tensors.
    Gradients have the dtype of the tensors.

    Under autocast, x, weight and bias are cast as for torch's own linear function. The weight is cast in each call, so
    that every edit of it is seen. Only an optimizer with `copy_dtype` spares that (`meprop.optim`).

    Args:
        x: Input [*, I].
        weight: Weight [O, I].
        bias: Bias [O], or None.
        rule: What to keep, e.g. `meprop.TopK(0.05)`.
        sparse_grad: Make weight.grad a sparse tensor of the kept rows, as `torch.nn.Embedding(sparse=True)` does. It
            needs a rule that leaves columns out: one of scope "batch" (unified top-k), or of scope "global" without an
            exact sum.
        compute_dtype: torch.bfloat16 forms the forward product in bfloat16, because that product stays dense. The
            output has the dtype of x. The backward pass is in the dtype of the tensors, because casting gradients would
            cost more than it saves. Float64 stays float64. The option has no effect under autocast. None forms the
            product in the dtype of the tensors.
        skip_zeros: Leave zeros of x out of the sums of the forward product, if so many entries of x are zero that this
            is faster. After a ReLU most are. How many it takes is measured in the first pass, once for each size of the
            weight, dtype and number of threads, and for 32, 64, 128 and 256 rows or more. The option is for passes with
            gradients on a CPU, of 32 rows or more, in float32 or bfloat16, outside of graphs and transforms. Other
            passes are as without it.

    Returns:
        Output [*, O]. It equals that of `torch.nn.functional.linear` of the same dtypes bit for bit. If zeros are left
        out, sums are formed in another order, and a weight that is not finite has no effect where it meets only zeros.

    Raises:
        NotSupportedError: The backward pass is called with create_graph=True, `sparse_grad` is used under torch.compile
            or in DistributedDataParallel, or the weight is a DTensor (tensor parallelism).
        TypeError: `rule` is not a Rule, `sparse_grad` or `skip_zeros` is not a bool, x, weight or bias is not a tensor,
            or weight is not of a floating dtype.
        ValueError: `sparse_grad` is used with a rule of scope "example" or with an exact sum, `compute_dtype` is not
            one of those above, or weight or bias is of another shape.
    """
    policy = Policy(rule, sparse_grad, compute_dtype, skip_zeros=skip_zeros)
    check_tensors(x=x, weight=weight, bias=bias)
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        of_bias = "" if bias is None else f" and bias {list(bias.shape)}"
        raise ValueError(f"weight is {list(weight.shape)}{of_bias}; they are [O, I] and [O]")
    return linear_with_policy(x, weight, bias, policy)


def linear_with_policy(x: Tensor, weight: Tensor, bias: Tensor | None, policy: Policy) -> Tensor:
    """`linear` with the policy of a layer, which may measure first or be dense.

    Args:
        x: Input [*, I].
        weight: Weight [O, I].
        bias: Bias [O], or None.
        policy: The policy of the layer.

    Returns:
        Output [*, O].
    """
    skips = policy.skip_zeros and _may_skip_zeros(x, weight, bias, policy)
    if (policy.is_settled_dense() and not skips) or policy.leave_to_torch(input=x, weight=weight, bias=bias):
        return F.linear(x, weight, bias)
    refuse_dtype(weight)
    needs = needs_gradients(x, weight)
    is_sparse = needs and policy.may_be_sparse(weight.shape[0])
    rests = is_sparse and policy.rests(weight.shape[0])
    if rests and policy.can_be_torchs() and not skips:
        policy.note_rest()
        return F.linear(x, weight, bias)
    autocast, dtype = product_dtype(x, policy)
    if is_sparse or skips or (needs and dtype is not None and not autocast):
        refuse_transforms(x, weight, bias)
        if is_sparse:
            policy.refuse(weight)
        return _Linear.apply(x, weight, bias, policy, rests, dtype, autocast, skips)  # pyright: ignore[reportReturnType]  (apply is untyped)
    if dtype is None or autocast:  # autocast casts by itself
        return F.linear(x, weight, bias)
    return F.linear(*cast_operands(dtype, x, weight, bias)).to(x.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        policy: Policy,
        rests: bool,
        dtype: torch.dtype | None,
        autocast: bool,
        skips: bool,
    ) -> Tensor:
        """The forward product is formed in `dtype`, if it is given. Under autocast all products are.

        With `skips` it may leave out zeros of x.
        """
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.policy, ctx.rests, ctx.dtypes = policy, rests, dtypes_of(x, weight, bias)
        ctx.transposed = policy.when == "auto" and _is_transposed(weight)
        operands = (x, weight, bias) if dtype is None else cast_operands(dtype, x, weight, bias, trains=True)
        output = (_skipping_zeros if skips else F.linear)(*operands)
        if autocast:
            x, weight, _ = operands
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.dtype = weight.dtype
        return no_view(output if autocast or dtype is None else output.to(x.dtype))

    @staticmethod
    @labelled("meprop.linear.backward")
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_transforms_of_backward(*grad_outputs)
        x, weight = ctx.saved_tensors
        grad_output = in_dtype(grad_outputs[0], ctx.dtype)
        if not torch.compiler.is_compiling() and grad_output.layout is not torch.strided:  # gather(sparse_grad=True)
            grad_output = grad_output.to_dense()
        grad_NO, x_NI = as_matrix(grad_output), None if x is None else in_dtype(as_matrix(x), ctx.dtype)
        inputs = x_NI.shape[1] if x_NI is not None else weight.shape[1]
        grad_x, grad_weight, grad_bias = _backward(ctx, grad_NO, weight, x_NI, inputs)
        if grad_x is not None and grad_output.dim() != 2:
            grad_x = grad_x.view(*grad_output.shape[:-1], inputs)
        return *in_dtypes((grad_x, grad_weight, grad_bias), ctx.dtypes), *(None,) * 5


def _may_skip_zeros(x: Tensor, weight: Tensor, bias: Tensor | None, policy: Policy) -> bool:
    """Whether leaving zeros of x out of the forward product may be faster, and native code can do it."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if reason_missing() is not None or not speed.can_measure():
        return False
    if not all(type(each) in PLAIN and each.is_cpu for each in tensors):
        return False
    if not needs_gradients(x, weight) or is_transformed(*tensors):
        return False
    if x.layout is not torch.strided or x.shape[:-1].numel() < _LEAST_ROWS:
        return False
    _, dtype = product_dtype(x, policy)
    are_cast = all(each.is_floating_point() and each.dtype is not torch.float64 for each in tensors)
    return are_cast and (dtype or x.dtype) in DTYPE_CODES


def _skipping_zeros(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The forward product, without zeros of x if few enough of its entries are not zero."""
    x_NI = as_matrix(x)
    rows = min(1 << len(x_NI).bit_length() - 1, _MOST_TIMED_ROWS)  # so that few numbers of rows are timed
    shape = ForwardShape(rows, x_NI.shape[1], len(weight), x.dtype, _is_transposed(weight))
    output_NO = ops.linear_forward(x_NI, weight, bias, speed.most_nonzeros(shape))
    return output_NO.view(*x.shape[:-1], len(weight))


def _is_transposed(weight: Tensor) -> bool:
    """Whether the weight [O, I] lies in memory as [I, O]."""
    return not weight.is_contiguous() and weight.t().is_contiguous()


def _backward(ctx: Any, grad_NO: Tensor, weight: Tensor | None, x_NI: Tensor | None, inputs: int) -> ops.Gradients:
    """The gradients, sparse or dense as the policy decides."""
    policy: Policy = ctx.policy
    (rows, outputs), needs_bias = grad_NO.shape, ctx.needs_input_grad[2]
    if ctx.rests:
        policy.note_rest()
    elif policy.is_sparse(outputs, rows, partial(_shape, ctx, grad_NO, inputs)):
        policy.note_sparse_pass()
        later = Later.of(ctx, 1, x_NI, grad_NO)
        return sparse_backward(grad_NO, weight, x_NI, needs_bias, policy, later=later)
    if policy.activity is not None:
        policy.activity.count(everything(grad_NO))
    return ops.dense_backward(grad_NO, weight, x_NI, needs_bias)


def _shape(ctx: Any, grad_NO: Tensor, inputs: int) -> LinearShape:
    rows, outputs = grad_NO.shape
    device, needs = grad_NO.device.type, ctx.needs_input_grad[:3]
    return LinearShape(rows, inputs, outputs, grad_NO.dtype, device, needs, ctx.transposed)


@dataclass(frozen=True)
class LinearShape:
    """What the speed of a linear layer's backward pass depends on, beside the machine.

    Attributes:
        rows: N, the product of the leading dimensions of the input.
        inputs: I, the number of input features.
        outputs: O, the number of output features.
        dtype: The dtype of the output gradient.
        device: The type of the device, "cpu" or "cuda".
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


@dataclass(frozen=True)
class ForwardShape:
    """What the speed of a forward product depends on, beside the machine and the share of zeros in its input.

    Attributes:
        rows: N, the product of the leading dimensions of the input.
        inputs: I, the number of input features.
        outputs: O, the number of output features.
        dtype: The dtype of input and weight.
        transposed: Whether the weight lies in memory as [I, O].
    """

    rows: int
    inputs: int
    outputs: int
    dtype: torch.dtype
    transposed: bool = False

    @property
    def device(self) -> str:
        """The only type of device with such products."""
        return "cpu"

    def __str__(self) -> str:
        return f"forward {self.rows}x{self.inputs}x{self.outputs}{' transposed' if self.transposed else ''}"

    def passes(self, kept: float) -> speed.Passes:
        """The products of an input of which this share is not zero: dense, and without the zeros."""
        x, weight = speed.random_tensors(self, (self.rows, self.inputs), (self.outputs, self.inputs))
        x *= torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < kept
        if self.transposed:
            weight = weight.t().contiguous().t()
        return partial(F.linear, x, weight), partial(ops.linear_forward, x, weight, None, 1.0)
