"""Many processes, each with its part of the batch: one selection for all of them, and only its rows are sent.

`SynchronizedTopK` lets all processes keep the same k features, so that k rows of a weight have a gradient anywhere.
What then sends no other rows is `row_sparse_hook` with `torch.nn.parallel.DistributedDataParallel`, and without it, for
layers with ``sparse_grad=True``, `average_gradients`. Neither relies on the rule: of any gradient the rows that are
not zero in some process are sent, and the average is right whatever was selected.
"""

# Not `from __future__ import annotations`: DistributedDataParallel looks at those of a hook.

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from meprop import ops
from meprop.errors import NotSupportedError
from meprop.rules import Scope, TopK
from meprop.selection import ColumnSelection, PlainTopK

# The whole group -> another one of the same processes, made by the first `SynchronizedTopK` that has none of its own.
_groups_of_rules: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


@dataclass(frozen=True)
class SynchronizedTopK(TopK):
    """Keeps k features for the batch of all processes: the paper's simple unified top-k, over many machines.

    As ``TopK(k, scope="batch")``, but the sums of magnitudes by which features are chosen are summed over all processes
    (8 bytes for each output feature, in each backward pass of a layer), so that all choose the same. In a single
    process, or without a process group, it is that rule bit for bit.

    DistributedDataParallel and FSDP average the processes' losses. The features are those that a single process would
    choose for that average, also where batches differ in size, and where one is empty.

    Every process has to run the same layers in the same order: else one waits for the others until the group's
    time-out, or, where widths differ, torch ends it. For the same reason nothing is measured: layers are always sparse,
    as with ``when="always"``. An LSTM, which would choose, and wait, at each time step, is refused.

    Args:
        k: As of `TopK`.
        group: The processes that choose together. Make one for that: in the group in which gradients are averaged
            meanwhile, choices would wait for those. None: all processes, in a group of their own that is made at the
            first use. A rule with a group cannot be pickled.

    Raises:
        ValueError: k is out of range.
        TypeError: k is not a number, or group not a process group that this process is in.
        NotSupportedError: When it is pickled, with a group; and, within an error of torch's, where several processes
            compile with fullgraph=True.

    Example:
        >>> import torch
        >>> SynchronizedTopK(1).select(torch.tensor([[3.0, 1.0], [0.0, 2.5]])).indices.tolist()
        [1]
    """

    name: ClassVar[str] = ""
    scope: Scope = field(default="batch", init=False)
    group: dist.ProcessGroup | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group is not None and not isinstance(self.group, dist.ProcessGroup):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"group={self.group!r}; it is a process group that this process is in, or None")

    @property
    def communicates(self) -> bool:
        """True: also a single process then asks whenever it would have to among others."""
        return True

    def as_topk(self, features: int) -> PlainTopK | None:
        """As that of `TopK` in a single process; None of several, as they have to meet in between."""
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
        if not dist.is_initialized() or dist.get_world_size(self.group) == 1:
            return None
        if torch.compiler.is_compiling():
            raise NotSupportedError(f"{self} of several processes under torch.compile; leave out fullgraph=True")
        if self.group is not None:
            return self.group
        everyone = dist.group.WORLD
        assert everyone is not None  # as it is initialized
        if everyone not in _groups_of_rules:
            _groups_of_rules[everyone] = _twin(everyone)
        return _groups_of_rules[everyone]

    def __deepcopy__(self, _: Any) -> "SynchronizedTopK":
        return self  # which cannot change; and a group cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise NotSupportedError(
                "a SynchronizedTopK with a group cannot be pickled, as the group is of this process; save the model's "
                "state_dict, or use group=None"
            )
        return vars(self)


def _twin(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Another group of the same processes, whose collectives do not wait for those of the first."""
    ranks = dist.get_process_group_ranks(group)
    backend = group._get_backend(group._device_types[0])
    timeout = getattr(getattr(backend, "options", None), "_timeout", None)  # else torch's default, which is long
    return cast("dist.ProcessGroup", dist.new_group(ranks, timeout, use_local_synchronization=True))


class RowSparseState:
    """What `row_sparse_hook` needs, and counts. To be made in all processes of the group.

    Args:
        process_group: In which gradients are averaged, DistributedDataParallel's; None: all processes.

    Attributes:
        bytes_sent: What the hook has given to collectives so far, in this process, of dense gradients.
        bytes_dense: What DistributedDataParallel would have given without it.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        group = dist.group.WORLD if process_group is None else process_group
        if group is None:
            raise ValueError("there is no process group yet; call torch.distributed.init_process_group first")
        self.group = group
        self.mask_group = _twin(group)  # as which rows to send is agreed on while gradients are on their way
        self.waiting: deque[_Bucket] = deque()  # in the backward pass that is going on
        self.bytes_sent = self.bytes_dense = 0


@dataclass(frozen=True)
class _Bucket:
    """One of DistributedDataParallel's that has not been sent yet.

    Attributes:
        buffer: All of it, in which the result is put.
        gradients: Views of it; none of a sparse one.
        marks: Whether any process has something in it, for each row of those gradients that have rows, uint8.
        agreeing: What makes the marks those of all processes; None if there are none.
        averaged: What DistributedDataParallel waits for.
    """

    buffer: Tensor
    gradients: Sequence[Tensor]
    marks: Tensor
    agreeing: dist.Work | None
    averaged: torch.futures.Future[Tensor]

    def is_agreed(self) -> bool:
        return self.agreeing is None or self.agreeing.is_completed()


def row_sparse_hook(state: RowSparseState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook for DistributedDataParallel that sends those rows of each gradient that are not all zero.

    The gradients are those without the hook, but for rounding; of two processes bit for bit. A row is sent where any
    process has something in it, which a byte per row tells beforehand: with `SynchronizedTopK` these are k rows, with
    ``TopK(k, scope="batch")`` up to k of each process, with choices per example nearly all, and with accumulated
    gradients (`no_sync`) all that were chosen meanwhile. What has no rows, such as biases, is sent as it is.

    ``fp16_compress_wrapper(row_sparse_hook)`` of torch.distributed.algorithms.ddp_comm_hooks.default_hooks, or on NCCL
    ``bf16_compress_wrapper``, halves the bytes again.

    Args:
        state: Of this model.
        bucket: From DistributedDataParallel.

    Returns:
        A future of the averaged bucket.

    Example:
        >>> model = torch.nn.parallel.DistributedDataParallel(model)  # doctest: +SKIP
        >>> model.register_comm_hook(RowSparseState(), row_sparse_hook)  # doctest: +SKIP
    """
    buffer = bucket.buffer()
    gradients = [] if buffer.is_sparse else bucket.gradients()  # sparse: an Embedding's, in a bucket of its own
    masks = [grad.flatten(1).abs().amax(dim=1) != 0 for grad in gradients if _has_rows(grad)]
    marks = torch.cat(masks).to(torch.uint8) if masks else buffer.new_empty(0, dtype=torch.uint8)
    agreeing = dist.all_reduce(marks, dist.ReduceOp.MAX, state.mask_group, async_op=True) if masks else None
    averaged: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
    if bucket.index() == 0:
        state.waiting.clear()  # of a backward pass that has failed
    state.waiting.append(_Bucket(buffer, gradients, marks, agreeing, averaged))
    # Another process may come here only later, and before that wait, in a converted layer, for what this one chooses
    # there. So buckets are waited for when all layers have chosen, and sent in their order, the same everywhere.
    while state.waiting and (bucket.is_last() or state.waiting[0].is_agreed()):
        _average(state, state.waiting.popleft())
    return averaged


def _average(state: RowSparseState, bucket: "_Bucket") -> None:
    """Begins to send what was agreed on."""
    if bucket.agreeing is not None:
        bucket.agreeing.wait()
    masks = iter(bucket.marks.split([len(grad) for grad in bucket.gradients if _has_rows(grad)]))
    at = [next(masks).nonzero().flatten() if _has_rows(grad) else ... for grad in bucket.gradients]
    pieces = [grad[rows] for grad, rows in zip(bucket.gradients, at, strict=True)]
    payload = torch.cat([piece.flatten() for piece in pieces]) if pieces else bucket.buffer
    if pieces:
        state.bytes_dense += bucket.buffer.nbytes
        state.bytes_sent += bucket.marks.nbytes + payload.nbytes
    sending = dist.all_reduce(payload.div_(state.group.size()), group=state.group, async_op=True)
    assert sending is not None  # as this process is in the group

    def unpack(future: torch.futures.Future[list[Tensor]]) -> None:
        try:
            total = future.value()[0]
            if not pieces:
                return bucket.averaged.set_result(total)
            parts = total.split([piece.numel() for piece in pieces])
            for grad, rows, part, piece in zip(bucket.gradients, at, parts, pieces, strict=True):
                grad[rows] = part.view(piece.shape)
            bucket.averaged.set_result(bucket.buffer)
        except Exception as error:  # else DistributedDataParallel would wait for ever
            bucket.averaged.set_exception(error)  # pyright: ignore[reportArgumentType]  (it is for exceptions)

    sending.get_future().then(unpack)


def _has_rows(grad: Tensor) -> bool:
    return grad.dim() > 1 and grad.numel() > 0


def _largest(masks: Sequence[Tensor], group: dist.ProcessGroup | None) -> Sequence[Tensor]:
    """Element by element the largest that any process has, as uint8; each has masks of the same lengths."""
    if not masks:
        return masks
    together = torch.cat(list(masks)).to(torch.uint8)
    dist.all_reduce(together, dist.ReduceOp.MAX, group)
    return together.split([len(mask) for mask in masks])


_MISSING, _DENSE, _SPARSE = range(3)


def average_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> int:
    """Averages gradients over processes, as DistributedDataParallel does, but afterwards; of sparse ones only the rows.

    For models that are not wrapped: to be called between `backward` (of all batches that are accumulated) and the
    optimizer's step. DistributedDataParallel does not take the gradients of layers with ``sparse_grad=True``; here, of
    row-sparse gradients, also those of ``torch.nn.Embedding(sparse=True)``, the rows that any process has are sent.
    Dense ones are sent whole. Nothing is sent while the backward pass is going on.

    A parameter that has a gradient in some processes has one in all afterwards: what is missing counts as zeros.

    Args:
        parameters: The same in all processes, in the same order.
        group: The processes; None: all.

    Returns:
        The bytes that this process has given to collectives.

    Raises:
        TypeError: parameters is a single tensor.
        NotSupportedError: A gradient is sparse in more than its rows, or a DTensor.
    """
    if isinstance(parameters, Tensor):  # whose rows are tensors without a gradient
        raise TypeError("parameters is a tensor; it is an iterable of parameters: [tensor]")
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if not parameters:
        return 0
    kinds = torch.tensor([_kind(each) for each in parameters], device=parameters[0].device)
    kinds = _largest([kinds], group)[0].tolist()
    used = [(each, kind) for each, kind in zip(parameters, kinds, strict=True) if kind != _MISSING]
    masks = _largest([_rows_with_gradient(each) for each, kind in used if kind == _SPARSE], group)
    sent = len(kinds) + sum(map(len, masks))
    masks = iter(masks)
    places = [(each, next(masks).nonzero().flatten() if kind == _SPARSE else None) for each, kind in used]
    for dtype in dict.fromkeys(each.dtype for each, _ in used):
        of_dtype = [place for place in places if place[0].dtype == dtype]
        pieces = [_gradient_of(each, rows) for each, rows in of_dtype]
        payload = torch.cat([piece.flatten() for piece in pieces]).div_(dist.get_world_size(group))
        dist.all_reduce(payload, group=group)
        sent += payload.nbytes
        parts = payload.split([piece.numel() for piece in pieces])
        for (each, rows), piece, part in zip(of_dtype, pieces, parts, strict=True):
            _set_gradient(each, rows, part.view(piece.shape))
    return sent


def _kind(parameter: Tensor) -> int:
    grad = parameter.grad
    if grad is None:
        return _MISSING
    if type(grad) is not Tensor or (grad.layout != torch.strided and (not grad.is_sparse or grad.sparse_dim() != 1)):
        raise NotSupportedError(
            f"a gradient of type {type(grad).__name__} and layout {grad.layout}; average_gradients takes dense ones "
            "and those that are sparse in their rows alone. fully_shard averages its own"
        )
    return _SPARSE if grad.is_sparse else _DENSE


def _rows_with_gradient(parameter: Tensor) -> Tensor:
    """A mask [O]."""
    mask = torch.zeros(len(parameter), dtype=torch.bool, device=parameter.device)
    if parameter.grad is not None:
        mask[parameter.grad._indices()[0] if parameter.grad.is_sparse else slice(None)] = True
    return mask


def _gradient_of(parameter: Tensor, rows: Tensor | None) -> Tensor:
    """The whole gradient, or that of ascending rows [k, *]; zeros where there is none."""
    grad = parameter.grad
    if rows is None:
        return torch.zeros_like(parameter) if grad is None else grad
    if grad is not None and not grad.is_sparse:
        return grad[rows]
    kept = parameter.new_zeros(len(rows), *parameter.shape[1:])
    if grad is not None:
        grad = grad.coalesce()
        kept[torch.searchsorted(rows, grad._indices()[0])] = grad._values()
    return kept


def _set_gradient(parameter: Tensor, rows: Tensor | None, grad: Tensor) -> None:
    if rows is not None:
        parameter.grad = torch.sparse_coo_tensor(
            rows[None], grad, parameter.shape, is_coalesced=True, check_invariants=False
        )
    elif parameter.grad is None:
        parameter.grad = grad
    else:
        parameter.grad.copy_(grad)
