"""Linear layer with a sparse backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from meprop import functional
from meprop.rules import Rule


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` that back-propagates only what `rule` keeps of its output gradient.

    Parameters, forward pass, state_dict and initialisation are torch's own.

    Args:
        in_features: Size I of each input.
        out_features: Size O of each output.
        bias: Whether there is a bias.
        device: Of the parameters.
        dtype: Of the parameters.
        rule: What to keep, e.g. `meprop.TopK(0.05)`.

    Raises:
        TypeError: `rule` is not a Rule.
    """

    rule: Rule

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rule: Rule,
    ) -> None:
        if not isinstance(rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"rule={rule!r} is of type {type(rule).__name__}; it must be a rule such as meprop.TopK(0.05)"
            )
        super().__init__(in_features, out_features, bias, device, dtype)
        self.rule = rule

    def forward(self, input: Tensor) -> Tensor:
        """Input [*, I] to output [*, O]."""
        return functional.linear(input, self.weight, self.bias, rule=self.rule)

    def extra_repr(self) -> str:
        """As torch's, and the rule."""
        return f"{super().extra_repr()}, rule={self.rule}"
