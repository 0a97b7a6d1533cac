"""Different rules for the two products of a backward pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from meprop.errors import NotSupportedError
from meprop.rules.base import Rule
from meprop.selection import Scope, Selection


@dataclass(frozen=True)
class PerProduct(Rule):
    """Different rules for the gradient of the input and for that of the weight.

    What is left out of the input's gradient, or noise in it, passes through all layers below. What is left out of the
    weight's gradient ends there. So the first may deserve a larger share or a smaller budget of noise.

    The rule is for layers that are one linear map: Linear, pointwise convolutions and the projections of attention.
    LSTMs and other convolutions refuse it.

    Args:
        input: What is kept for the input's gradient. None keeps everything.
        weight: What is kept for the weight's gradient. None keeps everything. A `meprop.Simplifier` counts this part.

    Raises:
        TypeError: One of them is no Rule.
        ValueError: Both are None.

    Example:
        >>> rule = PerProduct(input=Sampled(noise=0.1), weight=Sampled(noise=1.0))
    """

    input: Rule | None = field(kw_only=True)
    weight: Rule | None = field(kw_only=True)

    def __post_init__(self) -> None:
        for name, rule in (("input", self.input), ("weight", self.weight)):
            if rule is not None and (not isinstance(rule, Rule) or isinstance(rule, PerProduct)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    f"{name}={rule!r} is of type {type(rule).__name__}; it is a rule of one product, or None"
                )
        if self.input is None and self.weight is None:
            raise ValueError("input=None and weight=None keep everything; leave the layer torch's own")

    @property
    def scope(self) -> Scope | None:  # pyright: ignore[reportIncompatibleVariableOverride]  (it is computed here)
        """The scope for the weight's gradient, which decides whether that can be row-sparse."""
        return "example" if self.weight is None else self.weight.scope

    @property
    def communicates(self) -> bool:
        """Whether one of the two lets several processes choose together."""
        return any(rule is not None and rule.communicates for rule in (self.input, self.weight))

    def products(self) -> tuple[Rule | None, Rule | None]:
        """The rule for the input's gradient and that for the weight's."""
        return self.input, self.weight

    @property
    def unbiased(self) -> bool:
        """Whether both rules are."""
        return all(rule is None or rule.unbiased for rule in (self.input, self.weight))

    @property
    def row_sparse(self) -> bool:
        """Whether the rule for the weight leaves out rows."""
        return self.weight is not None and self.weight.row_sparse

    @property
    def differs(self) -> bool:
        """True, also if both rules are equal."""
        return True

    def count(self, features: int) -> int | None:
        """How many of `features` output features are kept for both. None if that differs, or depends on the gradient.

        Raises:
            ValueError: One of the rules does not fit so many features.
        """
        first, second = (features if rule is None else rule.count(features) for rule in self.products())
        return first if first == second else None

    def keeps_all(self, features: int) -> bool:
        """Whether both keep all of `features` output features."""
        return all(rule is None or rule.keeps_all(features) for rule in (self.input, self.weight))

    def density(self, features: int) -> float | None:
        """The mean of the two densities. None if one of them depends on the gradient."""
        densities = [1.0 if rule is None else rule.density(features) for rule in (self.input, self.weight)]
        known = [density for density in densities if density is not None]
        return sum(known) / 2 if len(known) == 2 else None

    def typical(self, share: float) -> Rule:
        """The same of the typical rules."""
        first, second = (None if rule is None else rule.typical(share) for rule in (self.input, self.weight))
        return PerProduct(input=first, weight=second)

    def select(self, grad_output_NO: Tensor) -> Selection:
        """Refused: there is one selection for each product.

        Raises:
            NotSupportedError: Always.
        """
        raise NotSupportedError(
            f"{self} in a layer that is not one linear map, such as an LSTM; use one rule for both products"
        )
