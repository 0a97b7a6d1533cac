"""What a layer has beside torch's, and the one gate that every backward pass goes through.

A `Policy` is the rule, the options, and the record of what was measured and counted. Its `is_sparse` decides each
backward pass: dense, sparse, or first to be measured. What a pass is refused for, is refused here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from meprop import speed
from meprop.errors import NotSupportedError
from meprop.rules import InBlocks, Rule
from meprop.selection import ColumnSelection, Selection

__all__ = ["Activity", "Policy", "Record", "When"]


When = Literal["auto", "always"]
"""Whether a layer is always sparse, or first measured ("auto")."""


@dataclass(eq=False)
class Activity:
    """How often each unit (output feature) of a layer is selected: the evidence of meSimp (Sun et al., TKDE 2018).

    Attributes:
        hits: Examples (rows of the output gradient) in which a unit has a selected entry that is not zero [O], int64. A
            selected zero is no hit, NaN is one. Of an LSTM a unit [H] is hit where any of its four gates is, and a row
            is one time step of one sequence. Of a convolution an example hits a channel where any of its positions
            does.
        examples: How many rows there were.
    """

    hits: Tensor
    examples: int = 0

    @classmethod
    def of_units(cls, units: int, device: torch.device | str | None = None) -> Activity:
        """Nothing so far, of so many units."""
        return cls(torch.zeros(units, dtype=torch.int64, device=device))

    def count(self, selection: Selection, positions: int = 1) -> None:
        """Adds a selection [N, O], whose rows are so many positions of each example, one after the other.

        What it shares among all rows is not selected.
        """
        self.examples += selection.rows // positions
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
        """Begins again."""
        self.hits.zero_()
        self.examples = 0


@dataclass(eq=False)
class Record:
    """What was measured and counted of a layer: the part of its policy that changes.

    Attributes:
        decision: With ``when="auto"``, whether it is sparse; None before the first pass that decides.
        activities: What a `meprop.Simplifier` counts: one for each of the layer's sets of units; none without one.
    """

    decision: speed.Decision | None = None
    activities: tuple[Activity, ...] = ()


@dataclass(frozen=True)
class Policy:
    """What a layer has beside torch's.

    Attributes:
        rule: What its backward pass keeps.
        sparse_grad: Whether the weight's gradient is a sparse tensor of the kept rows.
        compute_dtype: torch.bfloat16: the forward product is formed in it; None: in the dtype of the tensors.
        when: "always" sparse, or "auto": only if measured to be faster. Row-sparse gradients and rules by which several
            processes choose together leave nothing to measure: with them it is "always", as an optimizer counts on the
            one, and processes on each other.
        record: What was measured and counted; None for a call without a layer, of which nothing is.

    Raises:
        TypeError: `rule` is not a Rule.
        ValueError: `sparse_grad` with a rule whose rows keep entries of their own; an unknown `compute_dtype`
            or `when`.
    """

    rule: Rule
    sparse_grad: bool = False
    compute_dtype: torch.dtype | None = None
    when: When = "always"
    record: Record | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.when not in get_args(When):
            raise ValueError(f"when={self.when!r}; it is 'auto' or 'always'")
        if self.compute_dtype not in (None, torch.bfloat16):
            raise ValueError(f"compute_dtype={self.compute_dtype!r}; it is torch.bfloat16 or None")
        if not isinstance(self.rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]  (callers without a type checker)
            kind = type(self.rule).__name__
            raise TypeError(f"rule={self.rule!r} is of type {kind}; it must be a rule such as meprop.TopK(0.05)")
        if self.sparse_grad and self.rule.scope not in (None, "batch"):
            raise ValueError(
                f"sparse_grad=True with {self.rule}: rows are kept or left as a whole only by scope='batch'"
            )
        if self.sparse_grad or self.rule.communicates:
            object.__setattr__(self, "when", "always")

    def of_layer(self) -> Policy:
        """The same for a layer, with a record of its own."""
        return replace(self, record=Record())

    @property
    def activities(self) -> tuple[Activity, ...]:
        """What counts the units of each of the layer's sets of them; none without a `meprop.Simplifier`."""
        return () if self.record is None else self.record.activities

    @property
    def activity(self) -> Activity | None:
        """What counts the units of a layer with one set of them; None without a `meprop.Simplifier`."""
        return self.activities[0] if self.activities else None

    @property
    def decision(self) -> speed.Decision | None:
        """What was measured of the layer; None before that."""
        return None if self.record is None else self.record.decision

    def in_blocks(self, blocks: int) -> Policy:
        """The same for a product whose output features are several equal blocks; it shares the record."""
        return self if blocks == 1 else replace(self, rule=InBlocks(self.rule, blocks))

    # ---- the gate

    def may_be_sparse(self, features: int) -> bool:
        """Whether a backward pass of so many output features has something to select, or to count."""
        return bool(self.activities) or not self.rule.keeps_all(features)

    def is_settled_dense(self) -> bool:
        """Whether a call is torch's own: it was measured to be dense, and has no other product to form.

        Not while a forward pass is recorded to be run again (torch.utils.checkpoint), or its tensors are to be moved:
        both passes must then save the same tensors, whatever is decided between them.
        """
        decision = self.decision
        if decision is None or decision.sparse or self.compute_dtype is not None:
            return False
        return torch.compiler.is_compiling() or not _saved_tensors_are_hooked()

    def is_sparse(self, features: int, rows: int, shape: Callable[[], speed.Shape]) -> bool:
        """Whether this backward pass is sparse: the gate of them all.

        Args:
            features: O, among which the rule chooses.
            rows: N, of the output gradient.
            shape: What is to be timed, if that is what decides.
        """
        if self.rule.keeps_all(features):
            return False
        if self.when == "always" or self.record is None or rows == 0:  # no rows tell nothing about batches to come
            return True
        if self.record.decision is None:  # else an earlier product of this layer has decided
            if not speed.can_measure() or (timed := shape()).device == "meta":
                return True
            self.record.decision = speed.decide(self.rule, timed)
        return self.record.decision.sparse

    # ---- refusals

    def refuse(self, weight: Tensor) -> None:
        """Refuses a forward pass whose backward pass would go wrong.

        Raises:
            NotSupportedError: Under torch.compile, row-sparse gradients or a Simplifier's counts; within transforms of
                torch.func; a weight that is a DTensor; row-sparse gradients in DistributedDataParallel.
        """
        if not torch.compiler.is_compiling():
            if torch._C._are_functorch_transforms_active():
                raise NotSupportedError(
                    "a transform of torch.func (grad, vmap, jvp and so on), which a sparse backward pass has no rules "
                    "for; transform a plain copy of the model, made by copy.deepcopy and meprop.revert"
                )
            return self._refuse_distributed(weight)
        if self.sparse_grad:
            raise NotSupportedError(
                "sparse_grad=True: torch.compile has no sparse gradients; use sparse_grad=False with it"
            )
        if self.activities:
            raise NotSupportedError(
                "a layer that a meprop.Simplifier watches counts in its backward pass, which torch.compile cannot "
                "trace; compile without fullgraph=True, or what Simplifier.compact() returns"
            )
        return None

    def _refuse_distributed(self, weight: Tensor) -> None:
        if type(weight) not in (Tensor, torch.nn.Parameter) and hasattr(weight, "device_mesh"):
            raise NotSupportedError(
                "the weight is a DTensor, of tensor parallelism, or of fully_shard outside of the module's forward "
                "pass; sparse back-propagation takes whole weights: keep such a layer torch's own"
            )
        if self.sparse_grad and DistributedDataParallel._get_active_ddp_module() is not None:  # pyright: ignore[reportPrivateUsage]
            raise NotSupportedError(
                "sparse_grad=True in DistributedDataParallel, which takes dense gradients only; use sparse_grad=False "
                "with meprop.distributed.row_sparse_hook, or leave the model unwrapped and call "
                "meprop.distributed.average_gradients after backward()"
            )


def refuse_dtype(weight: Tensor) -> None:
    """Raises a TypeError for a weight that is not of a floating dtype."""
    if not weight.is_floating_point():
        raise TypeError(
            f"weight is of dtype {weight.dtype}; sparse back-propagation is for floating dtypes, not complex"
        )


def refuse_second_derivatives() -> None:
    """Raises a NotSupportedError in a backward pass that is itself to be differentiated."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotSupportedError(
            "create_graph=True: a sparse backward pass has no gradient of its own: what it left out has no graph. "
            "For this pass call meprop.revert(model), or use torch's own function."
        )


def everything(grad_NO: Tensor) -> ColumnSelection:
    """All of an output gradient, as a selection."""
    outputs = grad_NO.shape[1]
    return ColumnSelection(grad_NO, torch.arange(outputs, dtype=torch.int32, device=grad_NO.device), outputs)


def _saved_tensors_are_hooked() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # pyright: ignore
