"""Rules: which entries of an output gradient are worth propagating."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from torch import Tensor

from meprop.selection import ColumnSelection, PlainTopK, RowSelection, Scope, Selection


class Rule(ABC):
    """Answers one question for every linear map: which entries of its output gradient are propagated?

    A new rule is a subclass in a file of its own that answers `select`. What else it can say is optional: `count` or
    `density`, so that reports can tell how much is kept; `scope`; and, to be chosen by name on the command line and
    drawn in figures, the four class attributes. Best it is a frozen dataclass: its `repr` is how measurements of it are
    remembered.

    Attributes:
        name: By which the command line and results know the rule, e.g. "topk"; "" for a rule that they do not offer.
            One with a name is made by ``cls(k, scope=scope)``.
        label: What tables and legends call it, e.g. "top-k".
        color: Of its lines in figures, as matplotlib takes it.
        marker: Of its points in figures.
        scope: "example": entries of each row; "batch": unified, the same columns for all rows. None: the rule does not
            say, and what needs one of them looks at each answer.
    """

    name: ClassVar[str] = ""
    label: ClassVar[str] = ""
    color: ClassVar[str] = ""
    marker: ClassVar[str] = "o"
    scope: Scope | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name := vars(cls).get("name"):
            other = _named.setdefault(name, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"rule name {name!r} of {cls.__qualname__} is already that of {other.__qualname__}")
            _named[name] = cls

    @property
    def communicates(self) -> bool:
        """Whether several processes choose together, so that each has to ask whenever the others do."""
        return False

    @abstractmethod
    def select(self, grad_output_NO: Tensor) -> Selection:
        """The entries of grad_output_NO [N, O] to propagate."""

    def count(self, features: int) -> int | None:
        """How many of `features` output features each row keeps; None: it depends on the gradient.

        `features` itself means the plain dense product.

        Raises:
            ValueError: The rule does not fit so many features.
        """
        del features
        return None

    def density(self, features: int) -> float | None:
        """The share of the entries that is kept of `features` output features; None: it depends on the gradient."""
        count = self.count(features)
        return None if count is None else count / features

    def keeps_all(self, features: int) -> bool:
        """Whether nothing of `features` output features is left out: then the layer is torch's own."""
        count = self.count(features)
        return count is not None and count >= features

    def as_topk(self, features: int) -> PlainTopK | None:
        """What `select` does, if that is nothing but the top-k of `ops`: then one call selects and multiplies."""
        del features
        return None


_named: dict[str, type[Rule]] = {}


def named() -> dict[str, type[Rule]]:
    """The rules that have a name, by it, in the order in which they were defined."""
    return dict(_named)


def unregister(rule: type[Rule]) -> None:
    """Takes a rule out of `named`: for tests and notebooks, whose rules are not to stay.

    Raises:
        KeyError: There is no such named rule.
    """
    if _named.get(rule.name) is not rule:
        raise KeyError(f"{rule.__qualname__} is no named rule; they are {', '.join(_named)}")
    del _named[rule.name]


@dataclass(frozen=True)
class KeepK(Rule):
    """What the rules that keep k entries share: k, the scope, and the checks of both."""

    k: int | float
    scope: Scope = "example"  # pyright: ignore[reportIncompatibleVariableOverride]  (narrower, and frozen)

    def __post_init__(self) -> None:
        allowed = "an int of at least 1 (a count) or a float above 0 and at most 1 (a share of the output features)"
        if isinstance(self.k, bool):
            raise ValueError(f"k={self.k!r} is a bool; k is {allowed}")
        if isinstance(self.k, numbers.Integral):
            if self.k < 1:
                raise ValueError(f"k={self.k!r} keeps nothing; k is {allowed}")
            object.__setattr__(self, "k", int(self.k))
        elif isinstance(self.k, numbers.Real):
            if math.isnan(self.k) or not 0 < self.k <= 1:
                raise ValueError(f"k={self.k!r} is out of range; k is {allowed}")
            object.__setattr__(self, "k", float(self.k))
        else:
            raise TypeError(f"k={self.k!r} is of type {type(self.k).__name__}; k is {allowed}")
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope={self.scope!r}; the scope is 'example' or 'batch'")

    def count(self, features: int) -> int:
        """How many of `features` output features are kept: between 1 and `features`."""
        k = self.k if isinstance(self.k, int) else max(1, round(self.k * features))
        return min(k, features)

    def select(self, grad_output_NO: Tensor) -> Selection:
        """The kept entries of each row, or the kept columns.

        Args:
            grad_output_NO: Output gradient [N, O] of any floating dtype, O >= 1; N may be 0.

        Returns:
            A RowSelection (scope "example") or a ColumnSelection ("batch"), indices ascending.

        Raises:
            ValueError: grad_output_NO is not a matrix with at least one column.
            TypeError: it is not of a floating dtype.
        """
        if grad_output_NO.dim() != 2 or grad_output_NO.shape[1] == 0:
            raise ValueError(
                f"an output gradient is [N, O] with O >= 1, not {list(grad_output_NO.shape)}; flatten it first"
            )
        if not grad_output_NO.is_floating_point():
            raise TypeError(f"an output gradient is of a floating dtype, not {grad_output_NO.dtype}")
        k = self.count(grad_output_NO.shape[1])
        return self._rows(grad_output_NO, k) if self.scope == "example" else self._columns(grad_output_NO, k)

    @abstractmethod
    def _rows(self, grad_NO: Tensor, k: int) -> RowSelection: ...

    @abstractmethod
    def _columns(self, grad_NO: Tensor, k: int) -> ColumnSelection: ...
