"""A linear map's backward pass with a selection in place of its output gradient.

Shapes: output gradient [N, O], weight [O, I], input x [N, I].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from meprop.ops import native, triton
from meprop.ops.entries import keep_entries
from meprop.ops.gradients import GradientProduct
from meprop.ops.products import (
    Choice,
    Gradients,
    check_fits,
    count_hits,
    grad_input,
    grad_weight,
    grad_weight_rows,
    native_declines_selection,
    native_products,
    native_products_of_entries,
    refuse_row_sparse,
    row_sparse_tensor,
)
from meprop.ops.registry import Operation, Operator, in_graph, operation
from meprop.ops.rows import whole_rows_backward
from meprop.ops.topk import topk_columns, topk_rows, triton_columns_and_sums
from meprop.selection import (
    ColumnSelection,
    Entries,
    FeatureSelection,
    PlainTopK,
    RowSelection,
    WholeRows,
    columns_with_entries,
    is_everything,
    side_by_side,
)


def _consist_of(
    call: Callable[..., Any],
    choice: Choice,
    grad: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    needs_bias: bool,
    row_sparse: bool,
    hits: Tensor | None = None,
) -> Gradients:
    """The backward pass, composed of other operations. `call` runs one of them with its arguments."""
    selection = _selected(call, choice, grad)
    if x is None:
        weight_gradient = None
    elif row_sparse:
        refuse_row_sparse(selection)
        rows = call(grad_weight_rows, selection.values, x)
        weight_gradient = row_sparse_tensor(selection.indices, rows, selection.width)
    else:
        weight_gradient = call(grad_weight, selection, x)
    if hits is not None:
        hits += count_hits([selection])
    return (
        None if weight is None else call(grad_input, selection, weight),
        weight_gradient,
        grad.sum(dim=0) if needs_bias else None,
    )


def _selected(call: Callable[..., Any], choice: Choice, grad: Tensor) -> FeatureSelection:
    if not isinstance(choice, PlainTopK):
        return choice
    k, scope, blocks = choice
    width = grad.shape[1]
    if blocks < 1 or width % blocks != 0 or not 1 <= k <= width // blocks:
        raise ValueError(
            f"{choice} is out of range: {width} output features are to be {blocks} equal blocks of k or more"
        )
    topk = topk_rows if scope == "example" else topk_columns
    if blocks == 1:
        return call(topk, grad, k)
    return side_by_side([call(topk, block, k) for block in grad.chunk(blocks, dim=1)])


def _call(operation: Operation[..., Any], *args: Any) -> Any:
    return operation(*args)


@operation(traced=partial(_consist_of, _call), tensor_at=1)
def linear_backward(
    choice: Choice,
    grad: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    needs_bias: bool,
    row_sparse: bool,
    hits: Tensor | None = None,
) -> Gradients:
    """A linear map's backward pass with a selection in place of its output gradient.

    Args:
        choice: What is kept of the output gradient. It is a selection, or a PlainTopK that is made here.
        grad: The whole output gradient [N, O].
        weight: Weight [O, I] if the input's gradient is wanted, else None.
        x: Input [N, I] if the weight's gradient is wanted, else None.
        needs_bias: Whether the bias's gradient is wanted. It is the sum of the whole grad.
        row_sparse: Give the weight's gradient as a coalesced sparse COO tensor of the selected rows. It needs a
            selection of columns without a shared part.
        hits: A tensor [O], int64, or None. The number of rows that select each unit is added to it. See `count_hits`.

    Returns:
        The gradients of input [N, I], weight [O, I] and bias [O]. A gradient that is not wanted is None.

    Raises:
        ValueError: The shapes do not fit, `row_sparse` is used with entries of each row or with a shared part, or k or
            blocks is out of range.
        IndexError: The indices of a given selection do not ascend, or are not output features.
    """
    choice = _selected(Operation.literally, choice, grad)
    check_fits(choice, {"output gradient": grad, "weight": weight, "input": x, "hits": hits})
    return _consist_of(Operation.literally, choice, grad, weight, x, needs_bias, row_sparse, hits)


def _native_declines(
    choice: Choice,
    grad: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    needs_bias: bool,
    row_sparse: bool,
    hits: Tensor | None = None,
) -> str | None:
    del needs_bias, row_sparse
    reason = native.declines(grad, weight, x)
    if reason is None and hits is not None:
        reason = native.declines_scattered(hits, dtypes=native.INT64)
    return reason if reason is not None or isinstance(choice, PlainTopK) else native_declines_selection(choice)


native.backend.implements(linear_backward, _native_declines)(native_products)


def _triton_declines(
    choice: Choice, grad: Tensor, weight: Tensor | None, x: Tensor | None, *_: object, **_named: object
) -> str | None:
    values = None if isinstance(choice, PlainTopK) else choice.values
    return triton.declines(grad, weight, x, values)


@triton.backend.implements(linear_backward, _triton_declines)
def _triton_linear_backward(
    choice: Choice,
    grad: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    needs_bias: bool,
    row_sparse: bool,
    hits: Tensor | None = None,
) -> Gradients:
    """The same operations as the reference's, but the bias's gradient comes from the pass that scores columns."""
    sums = None
    if isinstance(choice, PlainTopK) and choice.scope == "batch" and choice.blocks == 1:
        values, indices, sums = triton_columns_and_sums(grad, choice.k, with_sums=needs_bias)
        choice = ColumnSelection(values, indices, grad.shape[1])
    selection = _selected(_call, choice, grad)
    check_fits(selection, {"output gradient": grad, "weight": weight, "input": x, "hits": hits})
    needs_sum = needs_bias and sums is None
    of_input, of_weight, of_bias = _consist_of(_call, selection, grad, weight, x, needs_sum, row_sparse, hits)
    return of_input, of_weight, of_bias if sums is None else sums


# ---------------------------------------------------------------- entries of the whole gradient


def _flat_entries(
    entries: Entries, grad: Tensor, weight: Tensor | None, x: Tensor | None, needs_bias: bool
) -> tuple[object, ...]:
    keep, k, share, exact_sum, key, ceiling = entries
    return grad, weight, x, needs_bias, keep, k, share, exact_sum, key, ceiling


def _whole_entries(
    grad: Tensor, weight: Tensor | None, x: Tensor | None, needs_bias: bool, *entries: Any
) -> tuple[Entries, Tensor, Tensor | None, Tensor | None, bool]:
    return Entries(*entries), grad, weight, x, needs_bias


def _fake_entries_backward(
    grad: Tensor, weight: Tensor | None, x: Tensor | None, needs_bias: bool, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = grad.shape
    return (
        grad.new_empty(0) if weight is None else weight.new_empty(rows, weight.shape[1]),
        grad.new_empty(0) if x is None else x.new_empty(width, x.shape[1]),
        grad.new_empty(width if needs_bias else 0),
        grad.new_empty((), dtype=torch.int64),
    )


def _wanted(
    found: tuple[Tensor, Tensor, Tensor, Tensor],
    _entries: Entries,
    _grad: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    needs_bias: bool,
) -> tuple[Gradients, Tensor]:
    of_input, of_weight, of_bias, kept = found
    wanted = None if weight is None else of_input, None if x is None else of_weight, of_bias if needs_bias else None
    return wanted, kept


@operation(
    operator=Operator(
        "(Tensor grad, Tensor? weight, Tensor? x, bool needs_bias, str keep, int k, float share, bool exact_sum, "
        "Tensor? key, float ceiling) -> (Tensor, Tensor, Tensor, Tensor)",
        _fake_entries_backward,
        _flat_entries,
        _whole_entries,
    ),
    tensor_at=1,
    result=_wanted,
)
def entries_backward(
    entries: Entries, grad: Tensor, weight: Tensor | None, x: Tensor | None, needs_bias: bool, /
) -> tuple[Tensor, ...]:
    """`linear_backward` with `keep_entries`, in one operation whose results have shapes that are known before.

    Args:
        entries: What is kept of the output gradient.
        grad: The whole output gradient [N, O].
        weight: Weight [O, I] if the input's gradient is wanted, else None.
        x: Input [N, I] if the weight's gradient is wanted, else None.
        needs_bias: Whether the bias's gradient is wanted. It is the sum of the whole grad.

    Returns:
        The gradients of `linear_backward`, and how many entries are kept, int64 []. An implementation returns four
        tensors, an empty one for a gradient that is not wanted.
    """
    selection = keep_entries(grad, entries)
    return _all_tensors(backward_with(selection, grad, weight, x, needs_bias), grad, selection.values.numel())


def _all_tensors(gradients: Gradients, grad: Tensor, kept: int | Tensor) -> tuple[Tensor, ...]:
    return *(grad.new_empty(0) if each is None else each for each in gradients), torch.as_tensor(kept)


def _native_declines_entries(
    entries: Entries, grad: Tensor, weight: Tensor | None, x: Tensor | None, needs_bias: bool
) -> str | None:
    del entries, needs_bias
    return native.declines(grad, weight, x)


@native.backend.implements(entries_backward, _native_declines_entries)
def _native_entries_backward(
    entries: Entries, grad: Tensor, weight: Tensor | None, x: Tensor | None, needs_bias: bool
) -> tuple[Tensor, ...]:
    gradients, kept = native_products_of_entries(entries, grad, weight, x, needs_bias)
    if int(kept) / max(1, grad.numel()) > entries.ceiling:  # as native code has it
        gradients, kept = dense_backward(grad, weight, x, needs_bias), grad.numel()
    return _all_tensors(gradients, grad, kept)


def backward_with(
    choice: Choice | WholeRows,
    grad: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    needs_bias: bool = False,
    row_sparse: bool = False,
    hits: Tensor | None = None,
) -> Gradients:
    """`linear_backward`, or `dense_backward` if everything is kept. Under `torch.compile` it is always the former.

    With `row_sparse` and entries by row, the weight's gradient has the rows that got an entry. The products with whole
    rows are dense ones of fewer rows.
    """
    if isinstance(choice, WholeRows):
        check_fits(choice, {"output gradient": grad, "input": x, "hits": hits})
        if row_sparse:
            refuse_row_sparse(choice)
        if hits is not None:
            hits += count_hits([choice])
        return whole_rows_backward(choice, grad, weight, x, needs_bias)
    if row_sparse and isinstance(choice, RowSelection) and x is not None and not is_everything(choice):
        if choice.shared is not None:
            refuse_row_sparse(choice)
        of_input, _, of_bias = linear_backward(choice, grad, weight, None, needs_bias, False, hits)
        return of_input, GradientProduct(choice, x, columns_with_entries(choice)).formed(), of_bias
    if isinstance(choice, PlainTopK) or in_graph() or not is_everything(choice):
        return linear_backward(choice, grad, weight, x, needs_bias, row_sparse, hits)
    if hits is not None:
        hits += count_hits([choice])
    return dense_backward(grad, weight, x, needs_bias)


def dense_backward(grad: Tensor, weight: Tensor | None, x: Tensor | None, needs_bias: bool) -> Gradients:
    """The backward pass with the whole output gradient, by torch."""
    return (
        None if weight is None else grad @ weight,
        None if x is None else grad.t() @ x,
        grad.sum(dim=0) if needs_bias else None,
    )
