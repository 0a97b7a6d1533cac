"""Linear layer with a sparse backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from meprop.functional.linear import linear_with_policy
from meprop.nn.base import Descriptor, Layout, SparseLayer, register, sparse_repr
from meprop.policy import Policy
from meprop.rules import Rule


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
        policy = Policy(rule, sparse_grad, compute_dtype)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.policy = policy.of_layer()

    def forward(self, input: Tensor) -> Tensor:
        """Input [*, I] to output [*, O]."""
        return linear_with_policy(input, self.weight, self.bias, self.policy)

    def extra_repr(self) -> str:
        """What torch's says, and the rule."""
        return super().extra_repr() + sparse_repr(self)


class LinearDescriptor(Descriptor[torch.nn.Linear]):
    """A linear layer: its units are the rows of its weight."""

    plain, sparse = torch.nn.Linear, Linear

    def features(self, layer: torch.nn.Linear) -> tuple[int, int]:
        """I and O."""
        return layer.in_features, layer.out_features

    def unit_sets(self, layer: torch.nn.Linear) -> tuple[str, ...]:
        """One: its output features."""
        return ("",)

    def layouts(self, layer: torch.nn.Linear, outputs: Layout, inputs: Layout) -> dict[str, dict[int, Layout]]:
        """The weight [O, I] and the bias [O]."""
        bias = {} if layer.bias is None else {"bias": {0: outputs}}  # pyright: ignore[reportUnnecessaryComparison]
        return {"weight": {0: outputs, 1: inputs}, **bias}

    def resize(self, layer: torch.nn.Linear) -> None:
        """Takes I and O from the weight."""
        layer.out_features, layer.in_features = layer.weight.shape


register(LinearDescriptor())
