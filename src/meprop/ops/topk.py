"""Top-k: the largest entries of each row of an output gradient [N, O], its largest columns, or its largest channels.

Magnitudes are compared. Among equal ones the lower index is taken. NaN is the largest. Indices are int32 and ascending.
The paper is meProp (Sun et al., ICML 2017).
"""

from __future__ import annotations

import torch
from torch import Tensor

from meprop.ops import native, triton
from meprop.ops.registry import Operator, operation
from meprop.selection import ColumnSelection, RowSelection


def _check(grad: Tensor, k: int) -> None:
    if grad.dim() < 2 or not 1 <= k <= grad.shape[1]:
        raise ValueError(f"k={k} of an output gradient {list(grad.shape)}; it is [N, O] or [N, O, *S], and 1 <= k <= O")


def _native_declines(grad: Tensor, _k: int | None = None) -> str | None:
    return native.declines(grad)


# ---------------------------------------------------------------- the largest entries of each row


def _fake_topk_rows(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape[0], k), grad.new_empty(grad.shape[0], k, dtype=torch.int32)


def _row_selection(found: tuple[Tensor, Tensor], grad: Tensor, _k: int) -> RowSelection:
    return RowSelection(*found, grad.shape[1])


@operation(operator=Operator("(Tensor grad, int k) -> (Tensor, Tensor)", _fake_topk_rows), result=_row_selection)
def topk_rows(grad: Tensor, k: int, /) -> tuple[Tensor, Tensor]:
    """The k largest |g| of each row of grad [N, O], where 1 <= k <= O. This is the paper's top-k.

    A call returns a RowSelection. An implementation returns its values [N, k] and its indices [N, k].
    """
    _check(grad, k)
    by_magnitude = grad.abs().sort(dim=1, descending=True, stable=True).indices
    indices = by_magnitude[:, :k].sort(dim=1).values
    return grad.gather(1, indices), indices.int()


@native.backend.implements(topk_rows, _native_declines)
def _native_topk_rows(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _native_topk("example", grad, k, (grad.shape[0], k))


# ---------------------------------------------------------------- the largest columns


@operation()
def column_scores(grad: Tensor, /) -> Tensor:
    """The sum of |g| of each column of grad [N, O], as [O] in float64. `topk_columns` chooses by these sums."""
    return grad.abs().double().sum(dim=0)


@native.backend.implements(column_scores, _native_declines)
def _native_column_scores(grad: Tensor) -> Tensor:
    grad = native.readable(grad, grad.dtype)
    rows, width = grad.shape
    scores = torch.empty(width, dtype=torch.float64)
    native.extension().column_scores(
        native.DTYPE_CODES[grad.dtype],
        native.SCOPE_CODES["batch"],
        grad.data_ptr(),
        grad.stride(0),
        rows,
        width,
        scores.data_ptr(),
        torch.get_num_threads(),
    )
    return scores


@triton.backend.implements(column_scores, triton.declines)
def _triton_column_scores(grad: Tensor) -> Tensor:
    scores, _ = triton.kernels().column_sums(triton.matrix(grad), with_sums=False)
    return scores


def _fake_topk_columns(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape[0], k), grad.new_empty(k, dtype=torch.int32)


def _column_selection(found: tuple[Tensor, Tensor], grad: Tensor, _k: int) -> ColumnSelection:
    return ColumnSelection(*found, grad.shape[1])


@operation(operator=Operator("(Tensor grad, int k) -> (Tensor, Tensor)", _fake_topk_columns), result=_column_selection)
def topk_columns(grad: Tensor, k: int, /) -> tuple[Tensor, Tensor]:
    """The k columns of grad [N, O] with the largest `column_scores`, where 1 <= k <= O.

    This is the paper's unified top-k. A call returns a ColumnSelection. An implementation returns its values [N, k] and
    its indices [k].
    """
    _check(grad, k)
    indices = largest(column_scores.reference(grad), k)
    return grad[:, indices], indices.int()


@native.backend.implements(topk_columns, _native_declines)
def _native_topk_columns(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _native_topk("batch", grad, k, (k,))


def _triton_declines(grad: Tensor, _k: int) -> str | None:
    return triton.declines(grad)


@triton.backend.implements(topk_columns, _triton_declines)
def _triton_topk_columns(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices, _ = triton_columns_and_sums(grad, k, with_sums=False)
    return values.contiguous(), indices  # as a graph of torch.compile expects it


def triton_columns_and_sums(grad: Tensor, k: int, *, with_sums: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values and indices of `topk_columns`, and of the same pass the sums of all columns [O] or None."""
    _check(grad, k)
    kernels, grad = triton.kernels(), triton.matrix(grad)
    scores, sums = kernels.column_sums(grad, with_sums)
    indices = kernels.largest(scores, k)
    indices = largest(scores, k).int() if indices is None else indices
    return kernels.gather_columns(grad, indices), indices, sums


def largest(scores: Tensor, k: int) -> Tensor:
    """The places of the k largest scores, ascending.

    Among equal scores the lower place is taken. NaN is the largest.
    """
    return scores.sort(descending=True, stable=True).indices[:k].sort().values


def _native_topk(scope: str, grad: Tensor, k: int, indices_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    _check(grad, k)
    grad = native.readable(grad, grad.dtype)
    rows, width = grad.shape
    values = torch.empty((rows, k), dtype=grad.dtype)
    indices = torch.empty(indices_shape, dtype=torch.int32)
    native.extension().topk(
        native.DTYPE_CODES[grad.dtype],
        native.SCOPE_CODES[scope],
        grad.data_ptr(),
        grad.stride(0),
        rows,
        width,
        k,
        values.data_ptr(),
        indices.data_ptr(),
        torch.get_num_threads(),
    )
    return values, indices


# ---------------------------------------------------------------- the largest channels


def _fake_topk_channels(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (grad.shape[0], k, *grad.shape[2:])
    channels = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format(grad))
    return channels, grad.new_empty(k, dtype=torch.int32)


@operation(operator=Operator("(Tensor grad, int k) -> (Tensor, Tensor)", _fake_topk_channels))
def topk_channels(grad: Tensor, k: int, /) -> tuple[Tensor, Tensor]:
    """The k channels of grad [N, O, *S] with the largest sums of |g| over batch and positions, where 1 <= k <= O.

    The sums are formed in float64.

    Returns:
        The channels [N, k, *S], in the `memory_format` of grad, and their indices [k].
    """
    _check(grad, k)
    indices = largest(grad.abs().double().sum(dim=[0, *range(2, grad.dim())]), k)
    return grad[:, indices].contiguous(memory_format=memory_format(grad)), indices.int()


@native.backend.implements(topk_channels, _native_declines)
def _native_topk_channels(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _check(grad, k)
    examples, channels, *sizes = grad.shape
    if memory_format(grad) == torch.channels_last:
        values, indices = _native_topk_columns(grad.movedim(1, -1).flatten(0, -2), k)
        return values.view(examples, *sizes, k).movedim(-1, 1), indices
    grad = grad.contiguous()
    scores = _native_column_scores(grad.flatten(1)).view(channels, -1).sum(dim=1)
    indices = largest(scores, k).int()
    return grad.index_select(1, indices), indices


def memory_format(tensor: Tensor) -> torch.memory_format:
    """torch.channels_last for a tensor that is only contiguous in that format, else torch.contiguous_format."""
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last and not tensor.is_contiguous() else torch.contiguous_format
