"""What all rules share. A rule says which entries of an output gradient are worth propagating."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from meprop import ops
from meprop.selection import ColumnSelection, Entries, PlainTopK, RowSelection, Scope, Selection


class Rule(ABC):
    """Answers one question for every linear map: which entries of its output gradient are propagated?

    A new rule is a subclass in a file of its own that defines `select`. Everything else is optional. `count` or
    `density` let reports tell how much is kept. The attributes `name`, `label`, `color` and `marker` let users choose
    the rule by name on the command line and draw it in figures. A rule should be a frozen dataclass, because
    measurements are remembered by its `repr`.

    Attributes:
        name: The name of the rule on the command line and in results, e.g. "topk". It is "" for a rule that they do not
            offer. A rule with a name is made by `of_settings`.
        label: The rule's name in tables and legends, e.g. "top-k".
        color: The color of its lines in figures, in a form that matplotlib takes.
        marker: The marker of its points in figures.
        scope: "example" for entries of each row, "batch" for the same columns for all rows (unified top-k), "global"
            for entries of the whole gradient, "rows" for whole rows. None means that the rule does not say. Code that
            needs a scope then looks at each selection.
        exact_sum: Whether each row also gets the batch's mean of what is left out. None means that the layer decides.
    """

    name: ClassVar[str] = ""
    label: ClassVar[str] = ""
    color: ClassVar[str] = ""
    marker: ClassVar[str] = "o"
    scope: Scope | None = None
    exact_sum: bool | None = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name := vars(cls).get("name"):
            other = _named.setdefault(name, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"rule name {name!r} of {cls.__qualname__} is already that of {other.__qualname__}")
            _named[name] = cls

    @classmethod
    def of_settings(
        cls, k: int | float, scope: Scope, *, noise: float | None = None, exact_sum: bool | None = None
    ) -> Rule:
        """The rule with the settings of the command line and of experiments: ``cls(k, scope=scope)``.

        Raises:
            ValueError: The rule does not have the setting `noise` or `exact_sum`, or a setting is out of range.
        """
        if noise is not None:
            raise ValueError(f"noise={noise!r} is no setting of the rule {cls.name!r}; give it k, and None as noise")
        options = {} if exact_sum is None else {"exact_sum": exact_sum}
        try:
            return cls(k, scope=scope, **options)  # pyright: ignore[reportCallIssue]  (a rule with a name takes these)
        except TypeError as error:
            if exact_sum is None:
                raise
            raise ValueError(f"exact_sum={exact_sum!r} is no setting of the rule {cls.name!r}") from error

    @property
    def communicates(self) -> bool:
        """Whether several processes choose together. Then each process has to ask the rule whenever the others do."""
        return False

    @property
    def unbiased(self) -> bool:
        """Whether the mean of all selections of a gradient is the gradient, so that nothing is added but noise."""
        return False

    @property
    def row_sparse(self) -> bool:
        """Whether the gradient of a weight may be a sparse tensor, as some of its rows get no entry.

        Rows of the weight are output features. Those of a whole gradient, or of kept columns, may have no entry. With
        k entries of each row, hardly any has none.
        """
        return self.scope in (None, "batch") or (self.scope == "global" and self.exact_sum is False)

    @abstractmethod
    def select(self, grad_output_NO: Tensor) -> Selection:
        """The entries of grad_output_NO [N, O] to propagate."""

    def count(self, features: int) -> int | None:
        """How many of `features` output features each row keeps, on average. None: it depends on the gradient.

        A count of `features` means the plain dense product.

        Raises:
            ValueError: The rule does not fit so many features.
        """
        del features
        return None

    def density(self, features: int) -> float | None:
        """The share of `features` output features that is kept. None: it depends on the gradient."""
        count = self.count(features)
        return None if count is None else count / features

    def keeps_all(self, features: int) -> bool:
        """Whether all of `features` output features are kept. Then the layer computes what torch's own does."""
        count = self.count(features)
        return count is not None and count >= features

    def products(self) -> tuple[Rule | None, Rule | None]:
        """The rules for the gradients of input and weight: this one, unless it is a `meprop.PerProduct`."""
        return self, self

    @property
    def differs(self) -> bool:
        """Whether each of the two products has a selection of its own."""
        return False

    def as_entries(self, features: int, device: torch.device) -> Entries | None:
        """The entries of a whole gradient that equal `select`, so that one call of `ops` chooses and multiplies.

        None if there are none, as with rules that choose rows or columns. Random numbers are drawn on the device.
        """
        del features, device
        return None

    def typical(self, share: float) -> Rule:
        """The rule that is timed in place of this one, where random numbers stand for the gradient.

        A rule whose density depends on the gradient returns one that keeps this share of the entries, in (0, 1].
        """
        del share
        return self

    def in_steps(self) -> Rule:
        """The rule of each time step of an LSTM."""
        return self

    def as_topk(self, features: int) -> PlainTopK | None:
        """The top-k that equals `select`, so that one call of `ops` selects and multiplies. None if there is none."""
        del features
        return None


_named: dict[str, type[Rule]] = {}


def named() -> dict[str, type[Rule]]:
    """The rules that have a name, by their names, in the order in which they were defined."""
    return dict(_named)


def unregister(rule: type[Rule]) -> None:
    """Takes a rule out of `named`. It is for tests and notebooks, whose rules are not to stay.

    Raises:
        KeyError: There is no such named rule.
    """
    if _named.get(rule.name) is not rule:
        raise KeyError(f"{rule.__qualname__} is no named rule; they are {', '.join(_named)}")
    del _named[rule.name]


@dataclass(frozen=True)
class KeepK(Rule):
    """The base of rules that keep k entries. It holds k, the scope and `exact_sum`, and their checks."""

    k: int | float
    scope: Scope = "example"  # pyright: ignore[reportIncompatibleVariableOverride]  (it is narrower, and frozen)
    exact_sum: bool = field(default=False, kw_only=True)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", checked_k(self.k))
        if self.scope not in ("example", "batch", "global"):
            raise ValueError(f"scope={self.scope!r}; the scope is 'example', 'batch' or 'global'")
        check_flag("exact_sum", self.exact_sum)
        if self.exact_sum and self.scope == "batch":
            raise ValueError(
                f"exact_sum=True with scope={self.scope!r}: columns that are left out would then be filled up in all "
                "rows; use scope 'example' or 'global'"
            )

    def __repr__(self) -> str:
        exact = ", exact_sum=True" if self.exact_sum else ""
        return f"{type(self).__name__}(k={self.k!r}, scope={self.scope!r}{exact})"

    def count(self, features: int) -> int:
        """How many of `features` output features each row keeps, on average. It is between 1 and `features`."""
        k = self.k if isinstance(self.k, int) else max(1, round(self.k * features))
        return min(k, features)

    def select(self, grad_output_NO: Tensor) -> Selection:
        """The kept entries of each row or of the whole gradient, or the kept columns.

        Args:
            grad_output_NO: Output gradient [N, O] of any floating dtype. O is at least 1, and N may be 0.

        Returns:
            A RowSelection with scope "example" or "global", a ColumnSelection with scope "batch". The indices ascend.

        Raises:
            ValueError: grad_output_NO is not a matrix with at least one column.
            TypeError: grad_output_NO is not a strided tensor of a floating dtype.
        """
        check_output_gradient(grad_output_NO)
        k = self.count(grad_output_NO.shape[1])
        if self.scope == "batch":
            return self._columns(grad_output_NO, k)
        if self.scope == "global":
            return self._entries(grad_output_NO, k)
        kept = self._rows(grad_output_NO, k)
        return with_exact_sum(kept, grad_output_NO) if self.exact_sum else kept

    @abstractmethod
    def _rows(self, grad_NO: Tensor, k: int) -> RowSelection: ...

    @abstractmethod
    def _columns(self, grad_NO: Tensor, k: int) -> ColumnSelection: ...

    @abstractmethod
    def _entries(self, grad_NO: Tensor, k: int) -> RowSelection: ...


def checked_k(k: int | float | None) -> int | float:
    """k as an int or a float, if it is a count of at least 1 or a share above 0 and at most 1.

    Raises:
        ValueError: It is out of range, or a bool.
        TypeError: It is not a number.
    """
    allowed = "an int of at least 1 (a count) or a float above 0 and at most 1 (a share of the output features)"
    if isinstance(k, bool):
        raise ValueError(f"k={k!r} is a bool; k is {allowed}")
    if isinstance(k, numbers.Integral):
        if k < 1:
            raise ValueError(f"k={k!r} keeps nothing; k is {allowed}")
        return int(k)
    if isinstance(k, numbers.Real):
        if math.isnan(k) or not 0 < k <= 1:
            raise ValueError(f"k={k!r} is out of range; k is {allowed}")
        return float(k)
    raise TypeError(f"k={k!r} is of type {type(k).__name__}; k is {allowed}")


def checked_share(name: str, share: float, *, below_one: bool = True) -> float:
    """A share as a float, if it is above 0 and, unless it may be any number, below 1.

    Raises:
        ValueError: It is out of range, or a bool.
        TypeError: It is not a number.
    """
    allowed = "a number above 0 and below 1" if below_one else "a finite number above 0"
    if isinstance(share, bool):
        raise ValueError(f"{name}={share!r} is a bool; {name} is {allowed}")
    if not isinstance(share, numbers.Real):
        raise TypeError(f"{name}={share!r} is of type {type(share).__name__}; {name} is {allowed}")
    if not 0 < share < (1 if below_one else math.inf):
        raise ValueError(f"{name}={share!r} is out of range; {name} is {allowed}")
    return float(share)


def check_flag(name: str, flag: bool | None) -> None:
    """Raises a TypeError for what is neither a bool nor None, which would silently count as True."""
    if flag is not None and not isinstance(flag, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{name}={flag!r} is of type {type(flag).__name__}; it is True or False")


def check_output_gradient(grad_output_NO: Tensor) -> None:
    """Raises the errors of a rule's `select` for what is no output gradient."""
    if not isinstance(grad_output_NO, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"an output gradient is a torch.Tensor, not of type {type(grad_output_NO).__name__}")
    if not torch.compiler.is_compiling() and grad_output_NO.layout is not torch.strided:  # compiled graphs cannot ask
        raise TypeError(f"an output gradient is strided, not of layout {grad_output_NO.layout}; call to_dense() first")
    if grad_output_NO.dim() != 2 or grad_output_NO.shape[1] == 0:
        raise ValueError(
            f"an output gradient is [N, O] with O >= 1, not {list(grad_output_NO.shape)}; flatten it first"
        )
    if not grad_output_NO.is_floating_point() or grad_output_NO.element_size() == 1:
        raise TypeError(f"an output gradient is of a floating dtype of 16 bits or more, not {grad_output_NO.dtype}")


def with_own_values(chosen: RowSelection, grad_NO: Tensor) -> RowSelection:
    """The entries of grad_NO [N, O] at the chosen places."""
    values = grad_NO[chosen.row_numbers(), chosen.indices.long()]
    return RowSelection(values, chosen.indices, chosen.width, starts=chosen.starts)


def with_exact_sum(kept: RowSelection, grad_NO: Tensor) -> RowSelection:
    """The same entries, and for all rows the mean over the rows of what is left out of grad_NO [N, O]."""
    left_out = ops.sums_of_the_rest(kept, grad_NO.to(torch.promote_types(grad_NO.dtype, torch.float32)))
    shared = (left_out / max(1, kept.rows)).to(grad_NO.dtype)
    return RowSelection(kept.values, kept.indices, kept.width, shared, kept.starts)
