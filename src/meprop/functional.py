"""Functions with an exact forward pass and a sparse backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meprop import ops
from meprop.errors import NotSupportedError
from meprop.rules import Rule

Decide = Callable[[Tensor, int, tuple[bool, bool, bool]], bool]
"""From output gradient [N, O], I, and whether input, weight and bias need gradients: is this pass to be sparse?"""


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rule: Rule,
        sparse_grad: bool,
        decide: Decide | None,
    ) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.rule, ctx.sparse_grad, ctx.decide = rule, sparse_grad, decide
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotSupportedError(
                "create_graph=True: a sparse backward pass has no gradient of its own: what it left out has no graph. "
                "For this pass call meprop.revert(model), or use a rule that keeps everything (k >= out_features)."
            )
        x, weight = ctx.saved_tensors
        (grad_output,) = grad_outputs
        grad_NO, x_NI = _matrix(grad_output), None if x is None else _matrix(x)
        needs = ctx.needs_input_grad[:3]
        inputs = x_NI.shape[1] if x_NI is not None else weight.shape[1]
        if ctx.decide is None or ctx.decide(grad_NO, inputs, needs):
            gradients = _sparse_backward(grad_NO, weight, x_NI, ctx.rule, needs[2], ctx.sparse_grad)
        else:
            gradients = _dense_backward(grad_NO, weight, x_NI, needs[2])
        grad_x, grad_weight, grad_bias = gradients
        if grad_x is not None and grad_output.dim() != 2:
            grad_x = grad_x.view(*grad_output.shape[:-1], inputs)
        return grad_x, grad_weight, grad_bias, None, None, None


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2) if tensor.dim() > 2 else tensor if tensor.dim() == 2 else tensor[None]


def _sparse_backward(
    grad_NO: Tensor, weight: Tensor | None, x_NI: Tensor | None, rule: Rule, needs_bias: bool, row_sparse: bool
) -> ops.Gradients:
    topk = rule.as_topk(grad_NO.shape[1])
    if topk is not None:
        return ops.topk_linear_backward(grad_NO, *topk, weight, x_NI, needs_bias=needs_bias, row_sparse=row_sparse)
    selection = rule.select(grad_NO)
    return ops.linear_backward(selection, grad_NO, weight, x_NI, needs_bias=needs_bias, row_sparse=row_sparse)


def _dense_backward(grad_NO: Tensor, weight: Tensor | None, x_NI: Tensor | None, needs_bias: bool) -> ops.Gradients:
    return (
        None if weight is None else grad_NO @ weight,
        None if x_NI is None else grad_NO.t() @ x_NI,
        grad_NO.sum(dim=0) if needs_bias else None,
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, rule: Rule, sparse_grad: bool = False) -> Tensor:
    """y = x W^T + b, exactly; backwards, only what `rule` keeps of the output gradient g is propagated.

    With S the kept part of g: dx = S W, dW = S^T x (meProp, section 3.1); db is the sum of the whole g. Sums are formed
    in float32 (float64 for float64 tensors), and gradients have the dtype of the tensors. Under autocast, x, weight and
    bias are cast as torch does for its own linear.

    Args:
        x: Input [*, I].
        weight: Weight [O, I].
        bias: Bias [O], or None.
        rule: What to keep, e.g. `meprop.TopK(0.05)`.
        sparse_grad: Make weight.grad a sparse tensor of the kept rows, as `torch.nn.Embedding(sparse=True)` does. For
            rules that keep the same columns for the whole batch (scope "batch").

    Returns:
        Output [*, O], bit for bit `torch.nn.functional.linear`'s.

    Raises:
        NotSupportedError: In the backward pass, with create_graph=True; under torch.compile, with sparse_grad.
        TypeError: `rule` is not a Rule, or weight is not of a floating dtype.
        ValueError: sparse_grad with a rule whose rows keep entries of their own.
    """
    check_rule(rule, sparse_grad)
    return apply_linear(x, weight, bias, rule, sparse_grad, None)


def apply_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, rule: Rule, sparse_grad: bool, decide: Decide | None
) -> Tensor:
    """`linear` with checked arguments; `decide`, where given, is asked in the backward pass whether to be sparse."""
    if not weight.is_floating_point():
        raise TypeError(
            f"weight is of dtype {weight.dtype}; sparse back-propagation is for floating dtypes, not complex"
        )
    needs_rule = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not needs_rule or rule.count(weight.shape[0]) >= weight.shape[0]:
        return F.linear(x, weight, bias)
    if sparse_grad and torch.compiler.is_compiling():
        raise NotSupportedError(
            "sparse_grad=True: torch.compile has no sparse gradients; use sparse_grad=False with it"
        )
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, weight, bias = _autocast(x), _autocast(weight), None if bias is None else _autocast(bias)
    return _Linear.apply(x, weight, bias, rule, sparse_grad, decide)  # pyright: ignore[reportReturnType]  (apply is untyped)


def _autocast(tensor: Tensor) -> Tensor:
    """As torch casts the operands of its own linear."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(tensor.device.type))


def check_rule(rule: Rule, sparse_grad: bool = False) -> None:
    """Raises the errors of `linear` that concern the rule."""
    if not isinstance(rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]  (callers without a type checker)
        raise TypeError(f"rule={rule!r} is of type {type(rule).__name__}; it must be a rule such as meprop.TopK(0.05)")
    if sparse_grad:
        topk = rule.as_topk(1)
        if topk is not None and topk[1] != "batch":
            raise ValueError(f"sparse_grad=True with {rule}: rows are kept or left as a whole only by scope='batch'")
