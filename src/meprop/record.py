"""What was measured and counted of a layer: the part of a policy that changes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from meprop.energy import Energy
from meprop.selection import ColumnSelection, Selection, WholeRows
from meprop.speed import Decision

__all__ = ["Activity", "Record"]


@dataclass(eq=False)
class Activity:
    """How often each unit (output feature) of a layer is selected: the evidence of meSimp (Sun et al., TKDE 2018).

    Attributes:
        hits: How many rows of the output gradient hit each unit [O], int64. A row hits a unit if a selected entry of
            that unit is not zero. NaN counts as not zero. In an LSTM a row is one time step of one sequence,
            and it hits a unit [H] if it hits any of the unit's gates. In a convolution whole examples are counted: an
            example hits a channel if any of its positions does, or if its map is kept and not zero.
        examples: How many rows, or examples of a convolution, were counted.
    """

    hits: Tensor
    examples: int = 0

    @classmethod
    def of_units(cls, units: int, device: torch.device | str | None = None) -> Activity:
        """An activity of `units` units that has counted nothing yet."""
        return cls(torch.zeros(units, dtype=torch.int64, device=device))

    def count(self, selection: Selection, positions: int = 1) -> None:
        """Adds a selection [N, O]. Each example has `positions` adjacent rows.

        The part that all rows share counts as not selected.
        """
        self.examples += selection.rows // positions
        if isinstance(selection, WholeRows):
            hit_NO = (selection.to_dense() != 0).unflatten(0, (-1, positions))
            self.hits += hit_NO.any(dim=1).sum(dim=0)
            return
        hit = selection.values != 0
        if isinstance(selection, ColumnSelection):
            hit = hit.unflatten(0, (-1, positions)).any(dim=1)
            self.hits.index_add_(0, selection.indices, hit.sum(dim=0))
            return
        units = selection.indices[hit].long()
        if positions > 1:
            example = selection.row_numbers()[hit] // positions
            units = (example * selection.width + units).unique() % selection.width
        self.hits += units.bincount(minlength=selection.width)

    def reset(self) -> None:
        """Sets all counts to zero."""
        self.hits.zero_()
        self.examples = 0


# A layer whose rule kept too much in so many passes asks it every so many passes only. The second number is prime, so
# that each of several products of a layer is asked in its turn.
_COSTLY_STREAK, _ASKED_EVERY = 32, 17

# What of a record is saved, beside the decision.
_COUNTS = (
    *("passes", "dense_passes", "kept", "seen", "sparse_passes"),
    *("costly_streak", "rested", "last_passes", "last_seen"),
)


@dataclass(eq=False)
class Record:
    """What was measured and counted of a layer. It is the part of a policy that changes.

    Attributes:
        decision: With ``when="auto"``, whether the layer is sparse. None before the first pass that decides.
        activities: What a `meprop.Simplifier` counts, one for each set of units of the layer. It is empty without a
            Simplifier.
        passes: How many backward passes a rule has selected for by `Rule.select`, or as entries of all rows, or that
            were dense in place of that. In an LSTM each time step is one. With a rule for each product, each product is
            one.
        dense_passes: How many of these kept everything.
        kept: How many entries they kept, or maps of a convolution.
        seen: How many entries or maps their output gradients had.
        costly_streak: How many of the last backward passes kept so much that dense is faster. All time steps of an
            LSTM are one.
        rested: How many passes there were since the rule was asked last, if it is asked now and then only.
        last_passes: How many passes the last backward pass was. It stands for those in which the rule is not asked.
        last_seen: How many entries or maps its output gradient had.
        sparse_passes: How many backward passes the layer had that were not torch's own. Those of a compiled graph are
            not counted.
        compiled: Whether torch.compile has traced a forward pass whose backward pass is sparse.
        had_gradient: Whether a parameter had a gradient already when the layer was converted.
        got_gradient: Whether a parameter got a gradient since the layer was converted, from wherever it came.
        left_to_torch: Why the last forward pass with gradients that was torch's own, for its tensors, was. None if none
            was.
        energy: What counts the energy that is kept, while a `meprop.Meter` asks for it. None otherwise.
    """

    decision: Decision | None = None
    activities: tuple[Activity, ...] = ()
    passes: int = 0
    dense_passes: int = 0
    kept: int = 0
    seen: int = 0
    costly_streak: int = 0
    rested: int = 0
    last_passes: int = 0
    last_seen: int = 0
    sparse_passes: int = 0
    compiled: bool = False
    had_gradient: bool = False
    got_gradient: bool = False
    left_to_torch: str | None = None
    energy: Energy | None = None

    @property
    def seen_sparse(self) -> bool:
        """Whether the layer had a sparse backward pass, as far as is known of compiled graphs."""
        return self.sparse_passes > 0 or self.compiled

    @property
    def seen_training(self) -> bool:
        """Whether the layer was called for training: it had a sparse backward pass, or has measured."""
        return self.seen_sparse or self.decision is not None

    def note(self, kept: int, seen: int, passes: int, dense_passes: int) -> None:
        """Adds passes, of which so many kept everything."""
        self.passes += passes
        self.dense_passes += dense_passes
        self.kept += kept
        self.seen += seen
        if seen == 0:  # an empty batch tells nothing about later ones
            return
        self.last_passes, self.last_seen = passes, seen
        break_even = 1.0 if self.decision is None else self.decision.break_even
        self.costly_streak = self.costly_streak + 1 if kept >= break_even * seen else 0

    @property
    def keeps_too_much(self) -> bool:
        """Whether the rule has kept so much for long that dense is faster."""
        return self.costly_streak >= _COSTLY_STREAK

    def rests(self) -> bool:
        """Whether this pass is dense without asking the rule, which `keeps_too_much`.

        It is asked now and then, as gradients change in training.
        """
        if not self.keeps_too_much:
            return False
        self.rested = (self.rested + 1) % _ASKED_EVERY
        return self.rested > 0

    def note_rest(self) -> None:
        """Adds a pass that `rests`."""
        self.passes += self.last_passes
        self.dense_passes += self.last_passes
        self.kept += self.last_seen
        self.seen += self.last_seen

    def ask_again(self) -> None:
        """Lets the rule be asked in every pass again."""
        self.costly_streak = 0

    @property
    def density(self) -> float | None:
        """The share of the entries that was kept. None before the first one."""
        return self.kept / self.seen if self.seen else None

    def state_dict(self) -> dict[str, Any]:
        """The decision and all counts, so that a training that is continued goes on bit for bit. It is plain data."""
        decision = None if self.decision is None else asdict(self.decision)
        return {"decision": decision, **{name: getattr(self, name) for name in _COUNTS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` returned."""
        self.decision = None if state["decision"] is None else Decision(**state["decision"])
        for name in _COUNTS:
            setattr(self, name, state[name])
