"""What all rules share. A rule says which entries of an output gradient are worth propagating."""

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

    A new rule is a subclass in a file of its own that defines `select`. Everything else is optional. `count` or
    `density` let reports tell how much is kept. The attributes `name`, `label`, `color` and `marker` let users choose
    the rule by name on the command line and draw it in figures. A rule should be a frozen dataclass, because
    measurements are remembered by its `repr`.

    Attributes:
        name: The name of the rule on the command line and in results, e.g. "topk". It is "" for a rule that they do not
            offer. A rule with a name is made by ``cls(k, scope=scope)``.
        label: The rule's name in tables and legends, e.g. "top-k".
        color: The color of its lines in figures, in a form that matplotlib takes.
        marker: The marker of its points in figures.
        scope: "example" for entries of each row, "batch" for the same columns for all rows (unified top-k). None means
            that the rule does not say. Code that needs a scope then looks at each selection.
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
        """Whether several processes choose together. Then each process has to ask the rule whenever the others do."""
        return False

    @abstractmethod
    def select(self, grad_output_NO: Tensor) -> Selection:
        """The entries of grad_output_NO [N, O] to propagate."""

    def count(self, features: int) -> int | None:
        """How many of `features` output features each row keeps. None means that it depends on the gradient.

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
    """The base of rules that keep k entries. It holds k, the scope, and the checks of both."""

    k: int | float
    scope: Scope = "example"  # pyright: ignore[reportIncompatibleVariableOverride]  (it is narrower, and frozen)

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
        """How many of `features` output features are kept, between 1 and `features`."""
        k = self.k if isinstance(self.k, int) else max(1, round(self.k * features))
        return min(k, features)

    def select(self, grad_output_NO: Tensor) -> Selection:
        """The kept entries of each row, or the kept columns.

        Args:
            grad_output_NO: Output gradient [N, O] of any floating dtype. O is at least 1, and N may be 0.

        Returns:
            A RowSelection with scope "example", a ColumnSelection with scope "batch". The indices ascend.

        Raises:
            ValueError: grad_output_NO is not a matrix with at least one column.
            TypeError: grad_output_NO is not of a floating dtype.
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
