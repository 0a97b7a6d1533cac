"""Training in several processes, each with its part of the batch. Only rows that have a gradient are sent.

`SynchronizedTopK` lets all processes keep the same k features. Then the same k rows of a weight have a gradient in
every process. Two functions send only these rows:

- `row_sparse_hook` is for models in `torch.nn.parallel.DistributedDataParallel`.
- `average_gradients` is for models without that wrapper, whose layers have ``sparse_grad=True``.

Neither relies on the rule. A row is sent if its gradient is not zero in some process, so the average is right whatever
was selected.
"""

# This module imports no `annotations` from __future__: DistributedDataParallel checks a hook's annotations as types.

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meprop.errors import NotSupportedError
from meprop.row_sparse import distinct
from meprop.rules.synchronized import SynchronizedTopK, second_group

__all__ = ["RowSparseState", "SynchronizedTopK", "average_gradients", "row_sparse_hook"]


class RowSparseState:
    """The state of `row_sparse_hook` for one model, with its counts. All processes of the group have to make one.

    Args:
        process_group: The group in which DistributedDataParallel averages gradients. None means all processes.

    Attributes:
        bytes_sent: The bytes that the hook has given to collectives so far, in this process, for dense gradients.
        bytes_dense: The bytes that DistributedDataParallel would have given without the hook.

    Raises:
        TypeError: process_group is not a process group.
        ValueError: process_group is None, and there is no process group yet.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        if not isinstance(process_group, dist.ProcessGroup | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"process_group={process_group!r}; it is what torch.distributed.new_group gives, or None")
        group = dist.group.WORLD if process_group is None else process_group
        if group is None:
            raise ValueError("there is no process group yet; call torch.distributed.init_process_group first")
        self.group = group
        self.mask_group = second_group(group)  # processes agree on rows while gradients are on their way
        self.waiting: deque[_Bucket] = deque()  # buckets of this backward pass that have not been sent yet
        self.bytes_sent = self.bytes_dense = 0


@dataclass(frozen=True)
class _Bucket:
    """A bucket of DistributedDataParallel that has not been sent yet.

    Attributes:
        buffer: The whole bucket. The averages are written into it.
        gradients: Views of the buffer, one for each parameter. It is empty if the buffer is sparse.
        row_is_sent: 1 for each row that is not zero in some process, else 0, uint8. The rows are those of all gradients
            that have rows, one gradient after the other.
        agreeing: The collective that forms `row_is_sent` from what each process has. None if there are no rows.
        averaged: The future that DistributedDataParallel waits for.
    """

    buffer: Tensor
    gradients: Sequence[Tensor]
    row_is_sent: Tensor
    agreeing: dist.Work | None
    averaged: torch.futures.Future[Tensor]

    def is_agreed(self) -> bool:
        return self.agreeing is None or self.agreeing.is_completed()


def row_sparse_hook(state: RowSparseState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook for DistributedDataParallel that sends the rows of each gradient that are not all zero.

    The averaged gradients equal those without the hook, up to rounding. In two processes they are the same bits.

    A row is sent if it is not zero in some process. The processes agree on that beforehand, with a byte per row. The
    number of rows depends on the rule:

    - `SynchronizedTopK` sends k rows.
    - ``TopK(k, scope="batch")`` sends up to k rows of each process.
    - A rule with scope "example" sends nearly all rows.
    - With accumulated gradients (`no_sync`) all rows are sent that were chosen in the meantime.

    A gradient without rows, such as that of a bias, is sent as it is.

    ``fp16_compress_wrapper(row_sparse_hook)`` of torch.distributed.algorithms.ddp_comm_hooks.default_hooks halves the
    bytes again. On NCCL ``bf16_compress_wrapper`` does so, too.

    Args:
        state: The state of this model.
        bucket: The bucket that DistributedDataParallel has filled.

    Returns:
        A future of the averaged bucket.

    Example:
        >>> model = torch.nn.parallel.DistributedDataParallel(model)  # doctest: +SKIP
        >>> model.register_comm_hook(RowSparseState(), row_sparse_hook)  # doctest: +SKIP
    """
    buffer = bucket.buffer()
    gradients = [] if buffer.is_sparse else bucket.gradients()  # a sparse gradient of an Embedding has its own bucket
    masks = [grad.flatten(1).abs().amax(dim=1) != 0 for grad in gradients if _has_rows(grad)]
    row_is_sent = torch.cat(masks).to(torch.uint8) if masks else buffer.new_empty(0, dtype=torch.uint8)
    agreeing = dist.all_reduce(row_is_sent, dist.ReduceOp.MAX, state.mask_group, async_op=True) if masks else None
    averaged: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
    if bucket.index() == 0:
        state.waiting.clear()  # they are left from a backward pass that has failed
    state.waiting.append(_Bucket(buffer, gradients, row_is_sent, agreeing, averaged))
    # Another process may still wait in a converted layer for the choice of this process, before it comes here. So this
    # process waits for a bucket only after its last layer has chosen. All processes send buckets in the same order.
    while state.waiting and (bucket.is_last() or state.waiting[0].is_agreed()):
        _average(state, state.waiting.popleft())
    return averaged


def _average(state: RowSparseState, bucket: "_Bucket") -> None:
    """Begins to send the rows that the processes have agreed on."""
    if bucket.agreeing is not None:
        bucket.agreeing.wait()
    masks = iter(bucket.row_is_sent.split([len(grad) for grad in bucket.gradients if _has_rows(grad)]))
    rows_of_each = [next(masks).nonzero().flatten() if _has_rows(grad) else ... for grad in bucket.gradients]
    pieces = [grad[rows] for grad, rows in zip(bucket.gradients, rows_of_each, strict=True)]
    payload = torch.cat([piece.flatten() for piece in pieces]) if pieces else bucket.buffer
    if pieces:
        state.bytes_dense += bucket.buffer.nbytes
        state.bytes_sent += bucket.row_is_sent.nbytes + payload.nbytes
    sending = dist.all_reduce(payload.div_(state.group.size()), group=state.group, async_op=True)
    assert sending is not None  # this process is in the group

    def unpack(future: torch.futures.Future[list[Tensor]]) -> None:
        try:
            total = future.value()[0]
            if not pieces:
                return bucket.averaged.set_result(total)
            parts = total.split([piece.numel() for piece in pieces])
            for grad, rows, part, piece in zip(bucket.gradients, rows_of_each, parts, pieces, strict=True):
                grad[rows] = part.view(piece.shape)
            bucket.averaged.set_result(bucket.buffer)
        except Exception as error:  # without it DistributedDataParallel would wait for ever
            bucket.averaged.set_exception(error)  # pyright: ignore[reportArgumentType]  (it is for exceptions)

    sending.get_future().then(unpack)


def _has_rows(grad: Tensor) -> bool:
    return grad.dim() > 1 and grad.numel() > 0


def _largest(masks: Sequence[Tensor], group: dist.ProcessGroup | None) -> Sequence[Tensor]:
    """The largest value of all processes for each element, as uint8.

    All processes have to pass masks of the same lengths.
    """
    if not masks:
        return masks
    together = torch.cat(list(masks)).to(torch.uint8)
    dist.all_reduce(together, dist.ReduceOp.MAX, group)
    return together.split([len(mask) for mask in masks])


_MISSING, _DENSE, _SPARSE = range(3)


def average_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> int:
    """Averages gradients over processes, and sends only the rows of sparse ones.

    It is for models without a wrapper, because DistributedDataParallel does not take the gradients of layers with
    ``sparse_grad=True``. Call it before the optimizer's step, after `backward` of all batches whose gradients are
    accumulated.

    A row-sparse gradient is sent in the rows that some process has. This also goes for the gradients of
    ``torch.nn.Embedding(sparse=True)``. Dense gradients are sent whole. DistributedDataParallel sends gradients during
    the backward pass. This function sends nothing until the backward pass is over.

    A parameter that has a gradient in some processes has one in all of them afterwards. A missing gradient counts as
    zeros.

    Args:
        parameters: The parameters, the same in all processes and in the same order.
        group: The group of processes. None means all processes.

    Returns:
        The bytes that this process has given to collectives.

    Raises:
        TypeError: parameters is a single tensor, or not an iterable of tensors.
        NotSupportedError: A gradient is sparse in more than its rows, or is a DTensor.
        IndexError: A sparse gradient has a row that the parameter has not.
    """
    if isinstance(parameters, Tensor):  # iterating it would give its rows, which have no gradient
        raise TypeError("parameters is a tensor; it is an iterable of parameters: [tensor]")
    parameters = _with_gradient(parameters)
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


def _with_gradient(parameters: Any) -> list[Tensor]:
    """The parameters that can have a gradient."""
    if not isinstance(parameters, Iterable):
        raise TypeError(f"parameters={parameters!r}; it is an iterable of parameters, such as model.parameters()")
    found: list[Any] = list(parameters)
    for each in found:
        if not isinstance(each, Tensor):
            raise TypeError(f"parameters has {each!r}; it is an iterable of parameters, such as model.parameters()")
    return [each for each in found if each.requires_grad]


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
    """Whether each row has a gradient in this process [O], bool."""
    mask = torch.zeros(len(parameter), dtype=torch.bool, device=parameter.device)
    if parameter.grad is not None:
        mask[distinct(parameter.grad)._indices()[0] if parameter.grad.is_sparse else slice(None)] = True
    return mask


def _gradient_of(parameter: Tensor, rows: Tensor | None) -> Tensor:
    """The whole gradient [O, *], or its ascending `rows` [k, *]. A missing gradient counts as zeros."""
    grad = parameter.grad
    if rows is None:
        return torch.zeros_like(parameter) if grad is None else grad
    if grad is not None and not grad.is_sparse:
        return grad[rows]
    kept = parameter.new_zeros(len(rows), *parameter.shape[1:])
    if grad is not None:
        grad = distinct(grad)
        kept[torch.searchsorted(rows, grad._indices()[0])] = grad._values()
    return kept


def _set_gradient(parameter: Tensor, rows: Tensor | None, grad: Tensor) -> None:
    """Sets the whole gradient [O, *], or its ascending `rows` [k, *], in the form that `_gradient_of` gives."""
    if rows is not None:
        parameter.grad = torch.sparse_coo_tensor(
            rows[None], grad, parameter.shape, is_coalesced=True, check_invariants=False
        )
    elif parameter.grad is None:
        parameter.grad = grad
    else:
        parameter.grad.copy_(grad)
