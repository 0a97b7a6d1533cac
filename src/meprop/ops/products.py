"""Products with a selection of an output gradient.

Shapes: output gradient [N, O], weight [O, I], input x [N, I]. Let S be the selection. Then dx = S W and dW = S^T x.
Products are summed in float32, or in float64 for float64 tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from meprop.ops import native, triton
from meprop.ops.registry import PLAIN, Operator, in_graph, operation
from meprop.selection import ColumnSelection, Entries, FeatureSelection, PlainTopK, RowSelection, Selection, WholeRows

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""The gradients of input, weight and bias. A gradient that is not wanted is None."""

Choice = FeatureSelection | PlainTopK
"""What is kept of an output gradient. It is a selection, or a top-k that has not been made yet."""


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _starts(selection: FeatureSelection) -> Tensor | None:
    return selection.starts if isinstance(selection, RowSelection) else None


def _selection(
    values: Tensor, indices: Tensor, width: int, starts: Tensor | None, shared: Tensor | None
) -> FeatureSelection:
    """The selection that an operator has got in parts. Their shapes are checked."""
    if indices.dim() == 1 and starts is None:
        return ColumnSelection(values, indices, width, shared)
    return RowSelection(values, indices, width, shared, starts)


def _entries(selection: RowSelection) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
    """Rows, values and indices of the first entries of all rows that have one, then of the second ones, and so on."""
    if selection.starts is None:
        for j in range(selection.indices.shape[1]):
            yield slice(None), selection.values[:, j], selection.indices[:, j]
        return
    counts = selection.starts.diff()
    for j in range(int(counts.max()) if len(counts) > 0 else 0):
        rows = (counts > j).nonzero()[:, 0]
        places = selection.starts[rows] + j
        yield rows, selection.values[places], selection.indices[places]


def check_fits(selection: Selection, tensors: dict[str, Tensor | None]) -> None:
    """Raises the errors of `linear_backward` that concern a given selection and what it is to be multiplied with."""
    rows, width = selection.rows, selection.width
    lengths = {"output gradient": rows, "weight": width, "input": rows, "hits": width}
    if any(each is not None and each.shape[0] != lengths[name] for name, each in tensors.items()):
        raise _misfit(rows, width, tensors)
    if isinstance(selection, WholeRows):
        _check_numbers(selection)
    elif selection.indices.is_cpu:  # of a GPU, asking would be a wait for it
        check_order(selection)


def _check_numbers(selection: WholeRows) -> None:
    """Raises an IndexError for numbers of rows on the CPU that no selection has."""
    numbers = selection.numbers
    if in_graph() or not numbers.is_cpu or type(numbers) not in PLAIN:
        return
    if not ((numbers.diff() > 0).all() and (numbers >= 0).all() and (numbers < selection.rows).all()):
        raise IndexError(f"the numbers of whole rows must ascend, and lie within the {selection.rows} rows there are")


def check_order(selection: FeatureSelection) -> None:
    """Raises an IndexError for indices or starts that no selection has."""
    indices, starts = selection.indices, _starts(selection)
    valid = bool(((indices >= 0) & (indices < selection.width)).all())
    if starts is not None:
        entries = len(indices)
        valid = valid and starts[0] == 0 and starts[-1] == entries and bool((starts.diff() >= 0).all())
        # The first entry of a row may be before the last one of the row above.
        ascends = indices.diff() > 0
        ascends[starts[(starts > 0) & (starts < entries)] - 1] = True
        valid = valid and bool(ascends.all())
    else:
        valid = valid and bool((indices.diff() > 0).all())
    if not valid:
        raise IndexError(
            "the indices of a selection must ascend, and lie within the output features, and its starts go from 0 to "
            "the number of its entries without descending"
        )


# ---------------------------------------------------------------- the input's gradient


def _fake_grad_input(
    values: Tensor, _indices: Tensor, weight: Tensor, starts: Tensor | None = None, _shared: Tensor | None = None
) -> Tensor:
    return weight.new_empty(values.shape[0] if starts is None else starts.shape[0] - 1, weight.shape[1])


def _flat_grad_input(selection: FeatureSelection, weight: Tensor) -> tuple[Tensor | None, ...]:
    return selection.values, selection.indices, weight, _starts(selection), selection.shared


def _whole_grad_input(
    values: Tensor, indices: Tensor, weight: Tensor, starts: Tensor | None = None, shared: Tensor | None = None
) -> tuple[FeatureSelection, Tensor]:
    return _selection(values, indices, weight.shape[0], starts, shared), weight


_grad_input_operator = Operator(
    "(Tensor values, Tensor indices, Tensor weight, Tensor? starts=None, Tensor? shared=None) -> Tensor",
    _fake_grad_input,
    _flat_grad_input,
    _whole_grad_input,
)


@operation(operator=_grad_input_operator, tensor_at=1)
def grad_input(selection: FeatureSelection, weight: Tensor, /) -> Tensor:
    """The product of a selection [N, O] and a weight [O, I], which is the input's gradient dx.

    dx[n] is shared W plus the sum of value * weight[o] over the entries of row n.

    Returns:
        The gradient [N, I], in the weight's dtype.
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


def _flat_grad_weight(selection: FeatureSelection, x: Tensor) -> tuple[Tensor | int | None, ...]:
    return selection.values, selection.indices, x, selection.width, _starts(selection), selection.shared


def _whole_grad_weight(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    width: int,
    starts: Tensor | None = None,
    shared: Tensor | None = None,
) -> tuple[FeatureSelection, Tensor]:
    return _selection(values, indices, width, starts, shared), x


_grad_weight_operator = Operator(
    "(Tensor values, Tensor indices, Tensor x, SymInt width, Tensor? starts=None, Tensor? shared=None) -> Tensor",
    _fake_grad_weight,
    _flat_grad_weight,
    _whole_grad_weight,
)


@operation(operator=_grad_weight_operator, tensor_at=1)
def grad_weight(selection: FeatureSelection, x: Tensor, /) -> Tensor:
    """The product of a transposed selection [N, O] and x [N, I], which is the weight's gradient dW.

    dW[o] is the sum of value * x[n] over the entries of feature o. A shared part adds shared[o] times the sum of all
    x[n].

    Returns:
        The gradient [O, I], in the dtype of x.
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
    """The k rows of dW [k, I] for a selection of columns with these values [N, k] and an input x [N, I]."""
    dtype = _accumulation_dtype(x)
    return (values.t().to(dtype) @ x.to(dtype)).to(x.dtype)


def row_sparse_tensor(indices: Tensor, rows: Tensor, width: int) -> Tensor:
    """The coalesced sparse COO tensor [width, *] with these rows [k, *] at these ascending indices [k]."""
    shape, at = (width, *rows.shape[1:]), indices.long()[None]
    if at.is_cuda and not in_graph():
        _note_in_order(at)
    return torch.sparse_coo_tensor(at, rows, shape, is_coalesced=True, check_invariants=False)


_in_order: dict[int, StorageWeakRef] = {}
"""The memory of the ascending indices that sparse tensors of ours have on a GPU, where to look would be to wait."""


def _note_in_order(indices: Tensor) -> None:
    if len(_in_order) > 1000:
        for key in [key for key, memory in list(_in_order.items()) if memory.expired()]:
            _in_order.pop(key, None)  # another thread may have done it
    memory = StorageWeakRef(indices.untyped_storage())
    _in_order[memory.cdata] = memory  # no other memory has this number as long as the reference is there


def is_in_order(indices: Tensor) -> bool:
    """Whether the indices of a sparse tensor are those of a tensor of `row_sparse_tensor` on a GPU.

    Autograd makes another tensor of the same memory, and forgets that it is coalesced.
    """
    memory = _in_order.get(StorageWeakRef(indices.untyped_storage()).cdata)
    return memory is not None and not memory.expired()


def count_hits(selections: Sequence[Selection]) -> Tensor:
    """The number of rows that hit each unit [O], int64.

    A row hits a unit if any of the selections [N, O] has an entry of that unit in that row that is not zero. NaN counts
    as not zero. The part that all rows share counts as not selected.
    """
    return torch.stack([_hit(selection) for selection in selections]).any(dim=0).sum(dim=0)


def count_hits_of_blocks(selection: Selection, blocks: int) -> Tensor:
    """`count_hits` of the equal blocks of a selection's features, each of which has the same units."""
    return _hit(selection).unflatten(1, (blocks, -1)).any(dim=1).sum(dim=0)


def _hit(selection: Selection) -> Tensor:
    """Which units each row hits [N, O]."""
    if isinstance(selection, WholeRows):
        return selection.to_dense() != 0
    hit_NO = torch.zeros(selection.rows, selection.width, dtype=torch.bool, device=selection.values.device)
    if isinstance(selection, RowSelection):
        hit_NO[selection.row_numbers(), selection.indices.long()] = selection.values != 0
    else:
        hit_NO[:, selection.indices.long()] = selection.values != 0
    return hit_NO


# ---------------------------------------------------------------- the native call of all of them


def native_declines_selection(selection: FeatureSelection) -> str | None:
    """Why native code cannot read this selection. None if it can."""
    reason = native.declines(selection.values, selection.shared)
    if reason is None:
        reason = native.declines(selection.indices, dtypes=native.INT32)
    starts = _starts(selection)
    return native.declines(starts, dtypes=native.INT64) if reason is None and starts is not None else reason


def _native_declines(selection: FeatureSelection, other: Tensor) -> str | None:
    return native.declines(other) or native_declines_selection(selection)


@native.backend.implements(grad_input, _native_declines)
def _native_grad_input(selection: FeatureSelection, weight: Tensor) -> Tensor:
    result, *_ = native_products(selection, None, weight, None)
    assert result is not None
    return result


@native.backend.implements(grad_weight, _native_declines)
def _native_grad_weight(selection: FeatureSelection, x: Tensor) -> Tensor:
    _, result, _ = native_products(selection, None, None, x)
    assert result is not None
    return result


@native.backend.implements(grad_weight_rows, native.declines)
def _native_grad_weight_rows(values: Tensor, x: Tensor) -> Tensor:
    k = values.shape[1]
    return _native_grad_weight(ColumnSelection(values, torch.arange(k, dtype=torch.int32), k), x)


# ---------------------------------------------------------------- those of a GPU


def _triton_declines(selection: FeatureSelection, other: Tensor) -> str | None:
    return triton.declines(selection.values, selection.shared, other)


@triton.backend.implements(grad_input, _triton_declines)
def _triton_grad_input(selection: FeatureSelection, weight: Tensor) -> Tensor:
    """Of columns, the dense product of what is gathered. Of entries by row, that of the gradient with zeros."""
    values, shared = selection.values.to(weight.dtype), selection.shared
    if isinstance(selection, ColumnSelection):
        by_row, indices = weight.stride(-1) == 1, selection.indices
        rows = triton.kernels().gather_rows(weight, indices) if by_row else weight.index_select(0, indices)
        result = values @ rows
    else:
        result = _masked(selection, weight.dtype) @ weight
    return result if shared is None else result.add_(shared.to(weight.dtype) @ weight)


@triton.backend.implements(grad_weight, _triton_declines)
def _triton_grad_weight(selection: FeatureSelection, x: Tensor) -> Tensor:
    shared = selection.shared
    if isinstance(selection, ColumnSelection):
        rows = selection.values.to(x.dtype).t() @ x
        result = x.new_zeros(selection.width, x.shape[1]).index_copy_(0, selection.indices.long(), rows)
    else:
        result = _masked(selection, x.dtype).t() @ x
    return result if shared is None else result.addr_(shared.to(x.dtype), x.sum(dim=0))


@triton.backend.implements(grad_weight_rows, triton.declines)
def _triton_grad_weight_rows(values: Tensor, x: Tensor) -> Tensor:
    return values.t() @ x


def _masked(selection: RowSelection, dtype: torch.dtype) -> Tensor:
    """The kept entries among zeros [N, O], without what all rows share."""
    return replace(selection, shared=None).to_dense().to(dtype)


# ---------------------------------------------------------------- both together


def refuse_row_sparse(choice: Choice | WholeRows) -> None:
    """Raises a ValueError for a choice whose weight gradient has more than the selected rows."""
    if isinstance(choice, WholeRows):
        raise ValueError(
            "whole rows are of every row of the weight, whose gradient is not row-sparse then: select columns, or "
            "leave out sparse_grad"
        )
    if not isinstance(choice, PlainTopK) and choice.shared is not None:
        raise ValueError(
            "what all rows share gives each row of the weight a gradient, which is not row-sparse then: share nothing, "
            "or leave out sparse_grad"
        )
    if isinstance(choice, RowSelection) or (isinstance(choice, PlainTopK) and choice.scope == "example"):
        raise ValueError(
            "entries by row are of any row of the weight, whose gradient is not row-sparse then: select columns, or "
            "leave out sparse_grad"
        )


def native_products(
    choice: Choice,
    grad: Tensor | None,
    weight: Tensor | None,
    x: Tensor | None,
    needs_bias: bool = False,
    row_sparse: bool = False,
    hits: Tensor | None = None,
) -> Gradients:
    """One native call that makes the selection, if it has not been made, and the gradients that are wanted."""
    row_sparse = row_sparse and x is not None
    if row_sparse:
        refuse_row_sparse(choice)
    if isinstance(choice, PlainTopK):
        assert grad is not None
        rows, width, dtype, arguments, tensors = _of_topk(choice, grad, row_sparse)
    else:
        rows, width, dtype, arguments, tensors = described(choice)
        grad = grad if needs_bias else None
    if hits is not None and hits.shape != (width,):  # it would be written beyond its end
        raise _misfit(rows, width, {"hits": hits})
    addresses, gradients, _alive = _operands(
        rows, width, dtype, grad, weight, x, needs_bias, len(tensors[1]) if row_sparse else width
    )
    native.extension().linear_backward(
        *(native.DTYPE_CODES[dtype], *arguments, *addresses, row_sparse, native.address(hits)),
        torch.get_num_threads(),
    )
    of_input, of_weight, of_bias = gradients
    if row_sparse and of_weight is not None:
        of_weight = row_sparse_tensor(tensors[1], of_weight, width)
    return of_input, of_weight, of_bias


def native_products_of_entries(
    entries: Entries, grad: Tensor, weight: Tensor | None, x: Tensor | None, needs_bias: bool
) -> tuple[Gradients, Tensor]:
    """One native call that chooses the entries, and makes the gradients that are wanted.

    Returns:
        The gradients, and the number of entries, int64 []. The gradients are not computed if this is more than the
        ceiling allows.
    """
    (rows, width), dtype = grad.shape, grad.dtype
    addresses, gradients, _alive = _operands(rows, width, dtype, grad, weight, x, needs_bias, width)
    kept = torch.empty((), dtype=torch.int64)
    keep, key = native.codes_of(entries)
    native.extension().entries_backward(
        *(native.DTYPE_CODES[dtype], keep, min(entries.k, width) * rows, key),
        *(entries.exact_sum, *addresses, kept.data_ptr(), torch.get_num_threads(), entries.share, entries.ceiling),
    )
    return gradients, kept


def _operands(
    rows: int,
    width: int,
    dtype: torch.dtype,
    grad: Tensor | None,
    weight: Tensor | None,
    x: Tensor | None,
    needs_bias: bool,
    weight_rows: int,
) -> tuple[tuple[int, ...], Gradients, tuple[Tensor | None, ...]]:
    """The arguments of a native call from `rows` to `grad_bias`, the gradients, and tensors that have to live as long.

    Raises:
        ValueError: The shapes do not fit. A tensor would be read or written beyond its end.
    """
    fits, of_input, of_weight = True, None, None
    inputs = grad_at = grad_ld = weight_at = weight_ld = x_at = x_ld = of_input_at = of_weight_at = 0
    if grad is not None:
        grad = native.readable(grad, dtype)
        grad_at, grad_ld = grad.data_ptr(), grad.stride(0)
        fits = grad.shape == (rows, width)
    if weight is not None:
        weight = native.readable(weight, dtype)
        outputs, inputs = weight.shape
        of_input = weight.new_empty(rows, inputs)
        weight_at, weight_ld, of_input_at = weight.data_ptr(), weight.stride(0), of_input.data_ptr()
        fits = fits and outputs == width
    if x is not None:
        x = native.readable(x, dtype)
        examples, columns = x.shape
        of_weight = x.new_empty(weight_rows, columns)
        x_at, x_ld, of_weight_at = x.data_ptr(), x.stride(0), of_weight.data_ptr()
        fits = fits and examples == rows and (weight is None or columns == inputs)
        inputs = columns
    of_bias = torch.empty(width, dtype=dtype) if needs_bias else None
    if not fits:
        raise _misfit(rows, width, {"output gradient": grad, "weight": weight, "input": x})
    addresses = (rows, width, grad_at, grad_ld, inputs, weight_at, weight_ld, x_at, x_ld, of_input_at, of_weight_at)
    return (*addresses, native.address(of_bias)), (of_input, of_weight, of_bias), (grad, weight, x)


def _misfit(rows: int, width: int, tensors: dict[str, Tensor | None]) -> ValueError:
    shapes = ", ".join(f"{name} {list(each.shape)}" for name, each in tensors.items() if each is not None)
    return ValueError(f"a selection of an output gradient [{rows}, {width}] does not go with {shapes}")


_Described = tuple[int, int, torch.dtype, tuple[int, ...], tuple[Tensor, ...]]
"""N, O, the dtype, the arguments of the native call for a selection, and the tensors that have to live as long."""


def _of_topk(topk: PlainTopK, grad: Tensor, needs_indices: bool) -> _Described:
    """Describes a selection that the call makes. With `needs_indices` it writes values and indices into the tensors."""
    (k, scope, blocks), (rows, width), dtype = topk, grad.shape, grad.dtype
    if not needs_indices:
        return rows, width, dtype, (native.SCOPE_CODES[scope], k, blocks, 1, 0, 0, 0, 0, 0), ()
    values, indices = torch.empty((rows, k * blocks), dtype=dtype), torch.empty(k * blocks, dtype=torch.int32)
    addresses = values.data_ptr(), indices.data_ptr(), 0, 0, 0
    return rows, width, dtype, (native.SCOPE_CODES[scope], k, blocks, 1, *addresses), (values, indices)


def described(selection: FeatureSelection) -> _Described:
    """Describes a given selection."""
    values, indices = selection.values.resolve_neg().contiguous(), selection.indices.contiguous()
    shared, starts = selection.shared, _starts(selection)
    shared = None if shared is None else native.contiguous(shared.to(values.dtype))
    starts = None if starts is None else starts.contiguous()
    scope = native.SCOPE_CODES["batch" if isinstance(selection, ColumnSelection) else "example"]
    k, entries = (indices.shape[-1], 0) if starts is None else (0, len(indices))
    addresses = values.data_ptr(), indices.data_ptr(), native.address(starts), entries, native.address(shared)
    kept = [values, indices, *(each for each in (starts, shared) if each is not None)]
    return selection.rows, selection.width, values.dtype, (scope, k, 1, 0, *addresses), tuple(kept)
