"""Products with a selection of an output gradient.

Shapes: output gradient [N, O], weight [O, I], input x [N, I]. With S the selection, dx = S W and dW = S^T x. Products
are summed in float32, those of float64 tensors in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from meprop.ops import native
from meprop.ops.registry import Operator, operation
from meprop.selection import ColumnSelection, PlainTopK, RowSelection, Selection

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of input, weight and bias; None where none is wanted."""

Choice = Selection | PlainTopK
"""What is kept of an output gradient: a selection of it, or the top-k that is yet to be made."""


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _starts(selection: Selection) -> Tensor | None:
    return selection.starts if isinstance(selection, RowSelection) else None


def _selection(values: Tensor, indices: Tensor, width: int, starts: Tensor | None, shared: Tensor | None) -> Selection:
    """The selection that an operator has been handed in parts; checks their shapes."""
    if indices.dim() == 1 and starts is None:
        return ColumnSelection(values, indices, width, shared)
    return RowSelection(values, indices, width, shared, starts)


def _entries(selection: RowSelection) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
    """The first entries of all rows that have one, then the second ones, and so on: rows, values and indices."""
    if selection.starts is None:
        for j in range(selection.indices.shape[1]):
            yield slice(None), selection.values[:, j], selection.indices[:, j]
        return
    counts = selection.starts.diff()
    for j in range(int(counts.max()) if len(counts) > 0 else 0):
        rows = (counts > j).nonzero()[:, 0]
        places = selection.starts[rows] + j
        yield rows, selection.values[places], selection.indices[places]


# ---------------------------------------------------------------- the input's gradient


def _fake_grad_input(
    values: Tensor, _indices: Tensor, weight: Tensor, starts: Tensor | None = None, _shared: Tensor | None = None
) -> Tensor:
    return weight.new_empty(values.shape[0] if starts is None else starts.shape[0] - 1, weight.shape[1])


def _flat_grad_input(selection: Selection, weight: Tensor) -> tuple[Tensor | None, ...]:
    return selection.values, selection.indices, weight, _starts(selection), selection.shared


def _whole_grad_input(
    values: Tensor, indices: Tensor, weight: Tensor, starts: Tensor | None = None, shared: Tensor | None = None
) -> tuple[Selection, Tensor]:
    return _selection(values, indices, weight.shape[0], starts, shared), weight


_grad_input_operator = Operator(
    "(Tensor values, Tensor indices, Tensor weight, Tensor? starts=None, Tensor? shared=None) -> Tensor",
    _fake_grad_input,
    _flat_grad_input,
    _whole_grad_input,
)


@operation(operator=_grad_input_operator, tensor_at=1)
def grad_input(selection: Selection, weight: Tensor, /) -> Tensor:
    """The selection [N, O] times weight [O, I]: dx[n] = shared W + the sum of value * weight[o] over row n's entries.

    Returns:
        [N, I], in the weight's dtype.
    """
    dtype = _accumulation_dtype(weight)
    weight_OI = weight.to(dtype)
    if isinstance(selection, ColumnSelection):
        result_NI = selection.values.to(dtype) @ weight_OI[selection.indices]
    else:
        result_NI = weight_OI.new_zeros(selection.rows, weight.shape[1])
        for rows, values, indices in _entries(selection):
            result_NI[rows] += values.to(dtype)[:, None] * weight_OI[indices]
    if selection.shared is not None:
        result_NI += selection.shared.to(dtype) @ weight_OI
    return result_NI.to(weight.dtype)


# ---------------------------------------------------------------- the weight's gradient


def _fake_grad_weight(
    _values: Tensor,
    _indices: Tensor,
    x: Tensor,
    width: int,
    _starts: Tensor | None = None,
    _shared: Tensor | None = None,
) -> Tensor:
    return x.new_empty(width, x.shape[1])


def _flat_grad_weight(selection: Selection, x: Tensor) -> tuple[Tensor | int | None, ...]:
    return selection.values, selection.indices, x, selection.width, _starts(selection), selection.shared


def _whole_grad_weight(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    width: int,
    starts: Tensor | None = None,
    shared: Tensor | None = None,
) -> tuple[Selection, Tensor]:
    return _selection(values, indices, width, starts, shared), x


_grad_weight_operator = Operator(
    "(Tensor values, Tensor indices, Tensor x, SymInt width, Tensor? starts=None, Tensor? shared=None) -> Tensor",
    _fake_grad_weight,
    _flat_grad_weight,
    _whole_grad_weight,
)


@operation(operator=_grad_weight_operator, tensor_at=1)
def grad_weight(selection: Selection, x: Tensor, /) -> Tensor:
    """The selection [N, O] transposed, times x [N, I]: dW[o] = the sum of value * x[n] over feature o's entries.

    What is shared adds shared[o] times the sum of all x[n].

    Returns:
        [O, I], in the dtype of x.
    """
    dtype = _accumulation_dtype(x)
    x_NI = x.to(dtype)
    result_OI = x_NI.new_zeros(selection.width, x.shape[1])
    if isinstance(selection, ColumnSelection):
        result_OI.index_copy_(0, selection.indices.long(), selection.values.t().to(dtype) @ x_NI)
    else:
        for rows, values, indices in _entries(selection):
            result_OI.index_add_(0, indices, values.to(dtype)[:, None] * x_NI[rows])
    if selection.shared is not None:
        result_OI += selection.shared.to(dtype)[:, None] * x_NI.sum(dim=0)
    return result_OI.to(x.dtype)


def _fake_grad_weight_rows(values: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(values.shape[1], x.shape[1])


@operation(operator=Operator("(Tensor values, Tensor x) -> Tensor", _fake_grad_weight_rows))
def grad_weight_rows(values: Tensor, x: Tensor, /) -> Tensor:
    """The k rows of dW that a selection of columns with these values [N, k] makes, of x [N, I]: [k, I]."""
    dtype = _accumulation_dtype(x)
    return (values.t().to(dtype) @ x.to(dtype)).to(x.dtype)


def row_sparse_tensor(indices: Tensor, rows: Tensor, width: int) -> Tensor:
    """A sparse COO tensor [width, *] with these rows [k, *] at these ascending indices [k], coalesced."""
    shape = (width, *rows.shape[1:])
    return torch.sparse_coo_tensor(indices.long()[None], rows, shape, is_coalesced=True, check_invariants=False)


def count_hits(selections: Sequence[Selection]) -> Tensor:
    """In how many rows each unit is selected, by any of the selections [N, O], with what is not zero: [O], int64.

    NaN is not zero. What a selection shares among all rows is not selected.
    """
    first = selections[0]
    hit_NO = torch.zeros(first.rows, first.width, dtype=torch.bool, device=first.values.device)
    for selection in selections:
        chosen = torch.zeros_like(hit_NO)
        if isinstance(selection, RowSelection):
            chosen[selection.row_numbers(), selection.indices.long()] = selection.values != 0
        else:
            chosen[:, selection.indices.long()] = selection.values != 0
        hit_NO |= chosen
    return hit_NO.sum(dim=0)


# ---------------------------------------------------------------- the native call of all of them


def native_declines(choice: Choice, *tensors: Tensor | None, hits: Tensor | None = None) -> str | None:
    """Why native code cannot multiply with this choice and these tensors; None if it can."""
    reason = native.declines(*tensors)
    if reason is None and hits is not None:
        reason = native.declines_scattered(hits, dtypes=native.INT64)
    if reason is not None or isinstance(choice, PlainTopK):
        return reason
    reason = native.declines(choice.values, choice.shared) or native.declines(choice.indices, dtypes=native.INT32)
    starts = _starts(choice)
    return native.declines(starts, dtypes=native.INT64) if reason is None and starts is not None else reason


@native.backend.implements(grad_input, native_declines)
def _native_grad_input(selection: Selection, weight: Tensor) -> Tensor:
    result, *_ = native_products(native_choice(selection), None, weight, None)
    assert result is not None
    return result


@native.backend.implements(grad_weight, native_declines)
def _native_grad_weight(selection: Selection, x: Tensor) -> Tensor:
    _, result, _ = native_products(native_choice(selection), None, None, x)
    assert result is not None
    return result


@native.backend.implements(grad_weight_rows, native.declines)
def _native_grad_weight_rows(values: Tensor, x: Tensor) -> Tensor:
    k = values.shape[1]
    return _native_grad_weight(ColumnSelection(values, torch.arange(k, dtype=torch.int32), k), x)


class NativeChoice(NamedTuple):
    """What is kept, as the native call takes it: see LinearBackward in csrc/drivers.h."""

    scope: int
    rows: int
    width: int
    k: int
    blocks: int
    dtype: torch.dtype
    select: bool
    values: Tensor | None = None
    indices: Tensor | None = None
    shared: Tensor | None = None
    starts: Tensor | None = None


def native_choice(choice: Choice, grad: Tensor | None = None, needs_indices: bool = False) -> NativeChoice:
    """A choice for the native call; with `needs_indices`, one that is yet to be made is left there."""
    if isinstance(choice, PlainTopK):
        assert grad is not None
        (rows, width), dtype = grad.shape, grad.dtype
        code, values, indices = native.SCOPE_CODES[choice.scope], None, None
        if needs_indices:
            kept = choice.k * choice.blocks
            values, indices = torch.empty((rows, kept), dtype=dtype), torch.empty(kept, dtype=torch.int32)
        return NativeChoice(code, rows, width, choice.k, choice.blocks, dtype, True, values, indices)
    values, indices, dtype = choice.values.resolve_neg().contiguous(), choice.indices.contiguous(), choice.values.dtype
    shared = None if choice.shared is None else native.contiguous(choice.shared.to(dtype))
    starts = _starts(choice)
    if starts is not None:
        starts = starts.contiguous()
    code = native.SCOPE_CODES["batch" if isinstance(choice, ColumnSelection) else "example"]
    k = 0 if starts is not None else indices.shape[-1]
    return NativeChoice(code, choice.rows, choice.width, k, 1, dtype, False, values, indices, shared, starts)


def native_products(
    chosen: NativeChoice,
    grad: Tensor | None,
    weight: Tensor | None,
    x: Tensor | None,
    needs_bias: bool = False,
    rows_only: bool = False,
    hits: Tensor | None = None,
) -> Gradients:
    """One native call: the selection, if it is yet to be made, and the gradients that are asked for."""
    scope, rows, width, k, blocks, dtype, select, values, indices, shared, starts = chosen
    _check_shapes(rows, width, grad, weight, x, hits)
    inputs = 0
    of_input = of_weight = of_bias = None
    if not (select or needs_bias):
        grad = None
    elif grad is not None:
        grad = native.readable(grad, dtype)
    if weight is not None:
        weight, inputs = native.readable(weight, dtype), weight.shape[1]
        of_input = torch.empty((rows, inputs), dtype=dtype)
    if x is not None:
        x, inputs = native.readable(x, dtype), x.shape[1]
        of_weight = torch.empty((k * blocks if rows_only else width, inputs), dtype=dtype)
    if needs_bias:
        of_bias = torch.empty(width, dtype=dtype)
    native.extension().linear_backward(
        native.DTYPE_CODES[dtype],
        scope,
        0 if grad is None else grad.data_ptr(),
        0 if grad is None else grad.stride(0),
        rows,
        width,
        k,
        0 if values is None else values.data_ptr(),
        0 if indices is None else indices.data_ptr(),
        torch.get_num_threads(),
        inputs,
        0 if weight is None else weight.data_ptr(),
        0 if weight is None else weight.stride(0),
        0 if x is None else x.data_ptr(),
        0 if x is None else x.stride(0),
        0 if of_input is None else of_input.data_ptr(),
        0 if of_weight is None else of_weight.data_ptr(),
        0 if of_bias is None else of_bias.data_ptr(),
        select,
        rows_only,
        blocks,
        0 if starts is None else starts.data_ptr(),
        0 if starts is None or values is None else len(values),
        0 if shared is None else shared.data_ptr(),
        0 if hits is None else hits.data_ptr(),
    )
    return of_input, of_weight, of_bias


def _check_shapes(
    rows: int, width: int, grad: Tensor | None, weight: Tensor | None, x: Tensor | None, hits: Tensor | None
) -> None:
    """Raises a ValueError for what would be read or written beyond its end."""
    fits = (weight is None or weight.shape[0] == width) and (x is None or x.shape[0] == rows)
    fits = fits and (grad is None or grad.shape == (rows, width)) and (hits is None or hits.shape == (width,))
    fits = fits and (weight is None or x is None or weight.shape[1] == x.shape[1])
    if not fits:
        names = {"output gradient": grad, "weight": weight, "input": x, "hits": hits}
        shapes = ", ".join(f"{name} {list(each.shape)}" for name, each in names.items() if each is not None)
        raise ValueError(f"a selection of an output gradient [{rows}, {width}] does not go with {shapes}")
