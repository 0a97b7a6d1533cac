"""Unified top-k that all processes choose together.

It needs `torch.distributed`, which not every build of torch has. `meprop.rules` therefore does not import it;
`meprop.distributed` does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from meprop import ops
from meprop.errors import NotSupportedError
from meprop.rules.topk import TopK
from meprop.selection import ColumnSelection, PlainTopK, Scope

_groups_of_rules: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()
"""For the group of all processes, the second group in which rules without a group of their own choose."""


@dataclass(frozen=True, repr=False)
class SynchronizedTopK(TopK):
    """Keeps k features for the batch of all processes: the paper's unified top-k, over many machines.

    ``TopK(k, scope="batch")`` chooses features by their sums of magnitudes. Here these are summed over all processes,
    so that all choose the same. That sends 8 bytes for each output feature, in each backward pass of a layer. In a
    single process, or without a process group, the rule is ``TopK(k, scope="batch")`` bit for bit.

    DistributedDataParallel and FSDP average the processes' losses. The features are those that a single process would
    choose for that average. This also holds if batches differ in size, and if one is empty.

    Every process has to run the same layers in the same order. Otherwise one process waits for the others until the
    time-out of the group. If the layers' widths differ, torch raises an error instead. For the same reason nothing is
    measured, and layers are always sparse, as with ``when="always"``. LSTM layers refuse this rule, because they would
    have to wait at each time step.

    Args:
        k: See `TopK`.
        group: The processes that choose together. Make a group for this purpose only. In the group in which gradients
            are averaged, choices would wait for gradients. None means all processes, in a group that is made for this
            purpose at the first use. A rule with a group cannot be pickled.

    Raises:
        ValueError: k is out of range.
        TypeError: k is not a number, or group is not a process group that this process is in.
        NotSupportedError: A rule with a group is pickled, or several processes compile with fullgraph=True. In the
            second case the error is within one of torch's.

    Example:
        >>> import torch
        >>> SynchronizedTopK(1).select(torch.tensor([[3.0, 1.0], [0.0, 2.5]])).indices.tolist()
        [1]
    """

    name: ClassVar[str] = ""
    scope: Scope = field(default="batch", init=False)
    exact_sum: bool = field(default=False, init=False)
    energy: None = field(default=None, init=False)
    group: dist.ProcessGroup | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group is not None and not isinstance(self.group, dist.ProcessGroup):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"group={self.group!r}; it is a process group that this process is in, or None")

    @property
    def communicates(self) -> bool:
        """True, also in a single process, so that one process and several take the same way."""
        return True

    def as_topk(self, features: int) -> PlainTopK | None:
        """The top-k of `TopK` in a single process. None in several, which communicate between choice and product."""
        return super().as_topk(features) if self._group_of_several() is None else None

    def _columns(self, grad_NO: Tensor, k: int) -> ColumnSelection:
        group = self._group_of_several()
        if group is None:
            return super()._columns(grad_NO, k)
        scores_O = ops.column_scores(grad_NO)
        dist.all_reduce(scores_O, group=group)
        indices = ops.topk_columns(scores_O[None], k).indices
        return ColumnSelection(grad_NO.index_select(1, indices), indices, grad_NO.shape[1])

    def _group_of_several(self) -> dist.ProcessGroup | None:
        """The group to choose in. None if this process chooses alone."""
        if not dist.is_initialized() or dist.get_world_size(self.group) == 1:
            return None
        if torch.compiler.is_compiling():
            raise NotSupportedError(f"{self} of several processes under torch.compile; leave out fullgraph=True")
        if self.group is not None:
            return self.group
        everyone = dist.group.WORLD
        assert everyone is not None  # torch.distributed is initialized
        if everyone not in _groups_of_rules:
            _groups_of_rules[everyone] = second_group(everyone)
        return _groups_of_rules[everyone]

    def __deepcopy__(self, _: Any) -> SynchronizedTopK:
        return self  # a rule cannot change, and a group cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise NotSupportedError(
                "a SynchronizedTopK with a group cannot be pickled, because the group belongs to this process. Save "
                "the model's state_dict, or use group=None."
            )
        return vars(self)


def second_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Another group of the same processes, whose collectives do not wait for those of the first."""
    ranks = dist.get_process_group_ranks(group)
    backend = group._get_backend(group._device_types[0])
    timeout = getattr(getattr(backend, "options", None), "_timeout", None)  # None: torch's default, which is long
    return cast("dist.ProcessGroup", dist.new_group(ranks, timeout, use_local_synchronization=True))
