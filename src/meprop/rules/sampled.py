"""Entries that are drawn by magnitude without bias, under a budget of noise or a count. This rule is ours."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil
from typing import ClassVar, get_args

import torch
from torch import Tensor

from meprop import ops
from meprop.rules.base import Rule, check_flag, check_output_gradient, checked_k, checked_share, with_exact_sum
from meprop.selection import Entries, Scope, Selection, everything

NOISE = 0.25
"""The budget of a rule without arguments."""
CEILING = 0.3
"""The density above which a step is dense, unless another is given."""


@dataclass(frozen=True, repr=False)
class Sampled(Rule):
    """Draws entries by magnitude, so that the mean over all draws is the whole gradient.

    One threshold t serves the whole gradient. An entry g with |g| >= t is kept as it is. A smaller one is kept with
    probability |g| / t, and becomes t with the sign of g. So nothing is added to the gradient but noise, of variance
    |g| t - g^2 for such an entry. No other choice of as many entries without bias has less (Horvitz and Thompson 1952).

    With `noise` the variances add up to at most `noise` times the sum of g^2. The threshold is the largest for that,
    within 1/32 of the budget. The density then follows the gradient. It falls in training as more and more rows have
    next to no gradient. The noise of a batch that is smaller by 1 / (1 + noise) is as large. A step whose density would
    be above `ceiling` is dense. With `k` the density is fixed, and the noise follows.

    Random numbers are those of a counter-based generator. Its key comes from torch's global generator of the gradient's
    device, so that `torch.manual_seed` repeats them, for any number of threads. This rule is ours, not the paper's.

    Args:
        k: An int is a count, a float is a share of the output features, as with `TopK`. Exactly k N entries of N rows
            are drawn, or all that are not zero. None: `noise` decides.
        scope: "global" draws from the whole gradient. "rows" draws whole rows by their norms, where k is a share of the
            rows. Its products are dense ones of fewer rows, which need no kernels: this is the scope for GPUs.
            "example" draws k entries of each row, "batch" k columns by their norms. These two are for comparison, and
            slower. All but "global" need k.
        noise: The budget r of added variance, above 0. It is 0.25 if neither k nor noise is given.
        exact_sum: Give each row in addition the batch's mean of what is missing, so that the batch's sum is exact. None
            does so in all layers but LSTMs. The batch of an LSTM is the sequences of a time step, where the exact sum
            costs much (docs/entries.md). With scope "batch" it has no place.
        floor: The least density on average, with `noise`. It is rounded up to whole entries of a row.
        ceiling: The density above which a step is dense, with `noise`. It should be that at which the kernels are as
            fast as dense. `torch.compile` does not look at it.

    Raises:
        ValueError: k, scope, noise, floor or ceiling is out of range, k and noise are given together, a scope needs k,
            `exact_sum` is used with scope "batch" or "rows", or k is a count with scope "rows".
        TypeError: One of them is not a number.

    Example:
        >>> import torch
        >>> kept = Sampled(2, exact_sum=False).select(torch.tensor([[8.0, -1.0, 1.0, 2.0]])).to_dense()
        >>> kept[0, 0].item(), kept.count_nonzero().item(), kept.abs().sum().item()
        (8.0, 2, 12.0)
    """

    name: ClassVar[str] = "sampled"
    label: ClassVar[str] = "sampled"
    color: ClassVar[str] = "#56B4E9"
    marker: ClassVar[str] = "^"

    k: int | float | None = None
    scope: Scope = "global"  # pyright: ignore[reportIncompatibleVariableOverride]  (it is narrower, and frozen)
    noise: float | None = field(default=None, kw_only=True)
    exact_sum: bool | None = field(default=None, kw_only=True)
    floor: float = field(default=0.0, kw_only=True)
    ceiling: float = field(default=CEILING, kw_only=True)

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope={self.scope!r}; the scope is 'example', 'batch', 'global' or 'rows'")
        if self.k is not None:
            if self.noise is not None or self.floor != 0 or self.ceiling != CEILING:
                others = f"noise={self.noise!r}, floor={self.floor!r}, ceiling={self.ceiling!r}"
                raise ValueError(f"k={self.k!r} with {others}; k fixes the density")
            object.__setattr__(self, "k", checked_k(self.k))
            if self.scope == "rows" and isinstance(self.k, int):
                raise ValueError(f"k={self.k!r} with scope='rows'; it is a share of the rows there, such as 0.25")
        elif self.scope != "global":
            raise ValueError(f"scope={self.scope!r} needs k; noise is for scope 'global'")
        else:
            noise = NOISE if self.noise is None else checked_share("noise", self.noise, below_one=False)
            object.__setattr__(self, "noise", noise)
            if self.floor != 0:
                object.__setattr__(self, "floor", checked_share("floor", self.floor))
        if self.ceiling is True or self.ceiling != 1:
            object.__setattr__(self, "ceiling", checked_share("ceiling", self.ceiling))
        if not self.floor < self.ceiling:
            raise ValueError(f"floor={self.floor!r} is not below ceiling={self.ceiling!r}")
        check_flag("exact_sum", self.exact_sum)
        if self.exact_sum and self.scope in ("batch", "rows"):
            raise ValueError(f"exact_sum=True with scope={self.scope!r}: it would fill up what is left out")

    def __repr__(self) -> str:
        parts = [f"noise={self.noise!r}" if self.k is None else f"k={self.k!r}"]
        parts += [f"scope={self.scope!r}"] * (self.scope != "global")
        parts += [f"exact_sum={self.exact_sum!r}"] * (self.exact_sum is not None)
        parts += [f"floor={self.floor!r}"] * (self.floor != 0) + [f"ceiling={self.ceiling!r}"] * (
            self.ceiling != CEILING
        )
        return f"Sampled({', '.join(parts)})"

    @classmethod
    def of_settings(
        cls, k: int | float, scope: Scope, *, noise: float | None = None, exact_sum: bool | None = None
    ) -> Rule:
        """The rule with `noise`, or else with k and scope."""
        return cls(k, scope, exact_sum=exact_sum) if noise is None else cls(noise=noise, exact_sum=exact_sum)

    @property
    def unbiased(self) -> bool:
        """True: an entry is drawn with a probability, and divided by it."""
        return True

    def count(self, features: int) -> int | None:
        """How many of `features` output features each row keeps, on average. None with `noise`, and of whole rows."""
        if self.k is None or self.scope == "rows":
            return features if self.k == 1.0 else None
        k = self.k if isinstance(self.k, int) else max(1, round(self.k * features))
        return min(k, features)

    def density(self, features: int) -> float | None:
        """The share that is kept. None with `noise`."""
        return self.k if self.scope == "rows" and isinstance(self.k, float) else super().density(features)

    def typical(self, share: float) -> Rule:
        """Itself with a k, and a share that is drawn in place of a noise."""
        return self if self.k is not None else Sampled(share, exact_sum=self.exact_sum)

    def as_entries(self, features: int, device: torch.device) -> Entries | None:
        """With scope "global", k N entries or those of the budget, with a new key."""
        if self.scope != "global":
            return None
        least = ceil(self.floor * features)
        keep, k = ("noise", least) if self.noise is not None else ("drawn", self.count(features) or 0)
        ceiling = 1.0 if self.noise is None else self.ceiling
        return Entries(keep, k, self.noise or 0.0, self.exact_sum is not False, new_key(device), ceiling)

    def in_steps(self) -> Rule:
        """Itself, without the exact sum unless that is asked for."""
        return replace(self, exact_sum=False) if self.exact_sum is None else self

    def select(self, grad_output_NO: Tensor) -> Selection:
        """What is drawn of grad_output_NO [N, O], or everything if that is more than `ceiling` of it.

        Of a tensor without contents (device "meta") it is everything.

        Raises:
            ValueError: grad_output_NO is not a matrix with at least one column.
            TypeError: grad_output_NO is not of a floating dtype.
        """
        check_output_gradient(grad_output_NO)
        features, device = grad_output_NO.shape[1], grad_output_NO.device
        if self.keeps_all(features) or grad_output_NO.is_meta:  # which has nothing to draw by
            return everything(grad_output_NO)
        entries = self.as_entries(features, device)
        if entries is not None:
            return ops.keep_entries(grad_output_NO, entries)
        if self.scope == "rows":
            return self._draw_rows(grad_output_NO)
        k = self.count(features)
        assert k is not None  # because of the scope
        if self.scope == "batch":
            return ops.draw_columns(grad_output_NO, k, new_key(device))
        kept = ops.draw_rows(grad_output_NO, k, new_key(device))
        return kept if self.exact_sum is False else with_exact_sum(kept, grad_output_NO)

    def _draw_rows(self, grad_NO: Tensor) -> Selection:
        rows, device = grad_NO.shape[0], grad_NO.device
        assert self.k is not None  # because of the scope
        if rows == 0:
            return everything(grad_NO)
        start = torch.randint(0, 1 << 24, (), dtype=torch.int64, device=device)
        return ops.draw_whole_rows(grad_NO, max(1, round(self.k * rows)), start)


def new_key(device: torch.device) -> Tensor:
    """A key of random numbers, from torch's global generator of the device."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
