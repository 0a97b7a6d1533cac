"""Functions with an exact forward pass and a sparse backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meprop import ops
from meprop.errors import NotSupportedError
from meprop.rules import Rule


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rule: Rule) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.rule = rule
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotSupportedError(
                "create_graph=True: a sparse backward pass has no gradient of its own: what it left out has no graph. "
                "For this pass call meprop.revert(model), or use a rule that keeps everything (k >= out_features)."
            )
        x, weight = ctx.saved_tensors
        (grad_output,) = grad_outputs
        grad_output_NO = grad_output.reshape(-1, grad_output.shape[-1])
        grad_input = grad_weight = grad_bias = None
        if x is not None or weight is not None:
            selection = ctx.rule.select(grad_output_NO)
            if weight is not None:
                grad_input = ops.grad_input(selection, weight).view(*grad_output.shape[:-1], weight.shape[1])
            if x is not None:
                grad_weight = ops.grad_weight(selection, x.reshape(-1, x.shape[-1]))
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output_NO.sum(dim=0)
        return grad_input, grad_weight, grad_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, rule: Rule) -> Tensor:
    """y = x W^T + b, exactly; backwards, only what `rule` keeps of the output gradient g is propagated.

    With S the kept part of g: dx = S W, dW = S^T x (meProp, section 3.1); db is the sum of the whole g. Sums are formed
    in float32 (float64 for float64 tensors), and gradients have the dtype of the tensors. Under autocast, x, weight and
    bias are cast as torch does for its own linear.

    Args:
        x: Input [*, I].
        weight: Weight [O, I].
        bias: Bias [O], or None.
        rule: What to keep, e.g. `meprop.TopK(0.05)`.

    Returns:
        Output [*, O], bit for bit `torch.nn.functional.linear`'s.

    Raises:
        NotSupportedError: In the backward pass, with create_graph=True.
        TypeError: `rule` is not a Rule.
    """
    if not isinstance(rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]  (callers without a type checker)
        raise TypeError(f"rule={rule!r} is of type {type(rule).__name__}; it must be a rule such as meprop.TopK(0.05)")
    needs_rule = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not needs_rule or rule.count(weight.shape[0]) >= weight.shape[0]:
        return F.linear(x, weight, bias)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _Linear.apply(x, weight, bias, rule)  # pyright: ignore[reportReturnType]  (apply is untyped)
