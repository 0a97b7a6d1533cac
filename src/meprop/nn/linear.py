"""Linear layer with a sparse backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from meprop import functional, speed
from meprop.rules import Rule

When = Literal["auto", "always"]


class SparseLayer:
    """What each layer of `meprop.nn` has beside a plain one."""

    rule: Rule
    sparse_grad: bool
    compute_dtype: torch.dtype | None
    when: When
    decision: speed.Decision | None
    activity: Any


class Linear(SparseLayer, torch.nn.Linear):
    """`torch.nn.Linear` that back-propagates only what `rule` keeps of its output gradient.

    Parameters, forward pass, state_dict and initialisation are torch's own. A layer made by hand is always sparse; one
    that `meprop.convert` made decides at its first backward pass whether that is faster here, and stays with it.

    Args:
        in_features: Size I of each input.
        out_features: Size O of each output.
        bias: Whether there is a bias.
        device: Of the parameters.
        dtype: Of the parameters.
        rule: What to keep, e.g. `meprop.TopK(0.05)`.
        sparse_grad: Make weight.grad a sparse tensor of the kept rows; see `meprop.functional.linear`.
        compute_dtype: torch.bfloat16: form the forward product in bfloat16; see there.

    Attributes:
        when: "always" sparse, or "auto": only if measured to be faster.
        decision: With "auto", what was decided; None before the first backward pass.
        activity: What a `meprop.Simplifier` counts; None without one.

    Raises:
        TypeError: `rule` is not a Rule.
        ValueError: `sparse_grad` with a rule whose rows keep entries of their own; another compute_dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rule: Rule,
        sparse_grad: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        functional.check_rule(rule, sparse_grad, compute_dtype)
        super().__init__(in_features, out_features, bias, device, dtype)
        vars(self).update(sparse_state(rule, sparse_grad, compute_dtype, "always"))

    def forward(self, input: Tensor) -> Tensor:
        """Input [*, I] to output [*, O]."""
        return sparse_linear(self, input, self.weight, self.bias, self.rule)

    def extra_repr(self) -> str:
        """As torch's, and the rule."""
        return super().extra_repr() + sparse_repr(self)


SPARSE_STATE = ("rule", "sparse_grad", "compute_dtype", "when", "decision", "activity")


def sparse_state(rule: Rule, sparse_grad: bool, compute_dtype: torch.dtype | None, when: When) -> dict[str, Any]:
    """What a layer has beside a plain one: the attributes that `meprop.convert` gives it, and revert takes."""
    # The optimizer of row-sparse gradients counts on their layout, and processes that choose together on each other, so
    # there is nothing to decide.
    when = "always" if sparse_grad or rule.communicates else when
    return dict(zip(SPARSE_STATE, (rule, sparse_grad, compute_dtype, when, None, None), strict=True))


def standing(layer: SparseLayer) -> tuple[bool, bool]:
    """Whether a call of a layer is to be torch's own, and if not, whether its backward pass asks if to be sparse."""
    compiling = torch.compiler.is_compiling()
    dense = layer.decision is not None and not layer.decision.sparse
    own = dense and layer.compute_dtype is None and (compiling or not _saved_tensors_are_hooked())
    return own, layer.when == "auto" and not compiling and (dense or layer.decision is None)


def sparse_linear(layer: SparseLayer, x: Tensor, weight: Tensor, bias: Tensor | None, rule: Rule) -> Tensor:
    """A product of a layer, x [*, I] to [*, O]: sparse or dense as the layer has decided, or decides in this call."""
    own, asks = standing(layer)
    if own:
        return F.linear(x, weight, bias)
    decide = partial(_decide, layer, rule, weight.t().is_contiguous() and not weight.is_contiguous()) if asks else None
    return functional.apply_linear(
        x, weight, bias, rule, layer.sparse_grad, decide, layer.compute_dtype, layer.activity
    )


def _decide(
    layer: SparseLayer, rule: Rule, transposed: bool, grad_NO: Tensor, inputs: int, needs: tuple[bool, bool, bool]
) -> bool:
    rows, outputs = grad_NO.shape
    if rows == 0:  # says nothing about the batches to come
        return True
    if layer.decision is None:  # else an earlier product of this layer in the same step has decided
        shape = speed.LayerShape(rows, inputs, outputs, grad_NO.dtype, grad_NO.device.type, needs, transposed)
        layer.decision = speed.decide(rule, shape)
    return layer.decision.sparse


def sparse_repr(layer: SparseLayer) -> str:
    """What `extra_repr` says beside torch's."""
    sparse_grad = ", sparse_grad=True" if layer.sparse_grad else ""
    compute_dtype = f", compute_dtype={layer.compute_dtype}" if layer.compute_dtype is not None else ""
    return f", rule={layer.rule}{sparse_grad}{compute_dtype}"


def _saved_tensors_are_hooked() -> bool:
    """Whether a forward pass is being recorded to be run again (torch.utils.checkpoint), or its tensors to be moved.

    Both passes must then save the same tensors, whatever is decided between them.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # pyright: ignore
