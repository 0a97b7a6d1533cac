"""Whole rows of an output gradient [N, O], examples or tokens: drawn by their norms, and multiplied with.

The products are torch's own, of fewer rows. They need no kernels, and pay on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meprop.ops import triton
from meprop.ops.entries import threshold_of_counts
from meprop.ops.registry import Operator, operation
from meprop.ops.thresholds import ONE
from meprop.selection import WholeRows

# ---------------------------------------------------------------- the choice


_Found = tuple[Tensor, Tensor, Tensor]
"""Values [k, O] and numbers [k] of the kept rows, and the sums of all columns [O]."""


def _fake_draw(grad: Tensor, k: int, _start: Tensor) -> _Found:
    width = grad.shape[1]
    return grad.new_empty(k, width), grad.new_empty(k, dtype=torch.int32), grad.new_empty(width)


def _whole_rows(found: _Found, grad: Tensor, _k: int, _start: Tensor) -> WholeRows:
    values, numbers, sums = found
    return WholeRows(values, numbers, grad.shape[0], sums)


_operator = Operator("(Tensor grad, SymInt k, Tensor start) -> (Tensor, Tensor, Tensor)", _fake_draw)


@operation(operator=_operator, result=_whole_rows)
def draw_whole_rows(grad: Tensor, k: int, start: Tensor, /) -> _Found:
    """k rows of grad [N, O], drawn by their norms so that the mean over all draws is grad, where 1 <= k <= N.

    A threshold t is found for which k rows are kept on average. A row of norm t or more is kept as it is. A smaller one
    is drawn with a probability p, its norm / t, and divided by p. No other choice of k rows without bias has less
    variance. Rows are sampled systematically (Madow 1949), which keeps exactly k of them. Probabilities are multiples
    of 2^-24. Rows that are not finite are kept for certain, if they are fewer than k. If fewer than k rows have a norm
    above 0, these are kept as they are, and further rows with zeros.

    Nothing waits for the host, and all sizes are known before.

    Args:
        grad: Output gradient [N, O].
        k: How many rows are kept.
        start: Where the sampling starts, a random number from 0 to 2^24 - 1, int64 [].

    Returns:
        WholeRows, with the sums of all columns, which are the bias's gradient. An implementation returns its values
        [k, O], its numbers [k] and the sums [O].

    Raises:
        ValueError: k is out of range.
    """
    check_draw(grad, k)
    norms = torch.linalg.vector_norm(grad.double(), dim=1)
    kept, factors = choose_rows(norms, k, start)
    most = torch.finfo(grad.dtype).max
    values = grad.index_select(0, kept).double() * factors[:, None]
    values = torch.where(values.isfinite(), values.clamp(-most, most), values)
    return torch.where(factors[:, None] == 0, 0.0, values).to(grad.dtype), kept.int(), grad.sum(dim=0)


def _triton_declines_draw(grad: Tensor, _k: int, _start: Tensor) -> str | None:
    return triton.declines(grad)


@triton.backend.implements(draw_whole_rows, _triton_declines_draw)
def _triton_draw_whole_rows(grad: Tensor, k: int, start: Tensor) -> _Found:
    check_draw(grad, k)
    kernels, grad = triton.kernels(), triton.matrix(grad)
    norms, sums = kernels.row_norms(grad)
    found = kernels.choose_rows(norms, k, start)
    if found is None:
        kept, factors = choose_rows(norms, k, start)
        found = kept.int(), factors.float()
    numbers, factors = found
    return kernels.gather_rows(grad, numbers, factors), numbers, sums


def check_draw(grad: Tensor, k: int) -> None:
    """Raises the errors of `draw_whole_rows`."""
    if grad.dim() != 2 or not 1 <= k <= len(grad):
        raise ValueError(f"k={k} rows of an output gradient {list(grad.shape)}; it is [N, O], and 1 <= k <= N")


def choose_rows(norms: Tensor, k: int, start: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of the kept rows [k], int64, ascending, and the factors of the rows [k], float64.

    Args:
        norms: The norms of all rows [N], float64.
        k: How many rows are kept.
        start: A random number as of `draw_whole_rows`.
    """
    finite = norms.isfinite()
    norms = torch.where(finite, norms, norms.nan_to_num(0.0, 0.0).sum() + 1)  # above all others: kept for certain
    threshold = threshold_of_counts(norms[None], k)[0, 0]
    probabilities = torch.where(norms >= threshold, ONE, (norms / threshold * ONE).nan_to_num(0.0).round().long())
    probabilities = torch.where(norms == 0, 0, probabilities)
    excess = (probabilities.sum() - k * ONE).clamp(-ONE, ONE)  # by rounding, or as fewer rows are not zero
    first = start * (ONE - excess.abs()) // ONE - excess.clamp(max=0)
    reached = (first + probabilities.cumsum(0)) >> 24
    drawn = reached.diff(prepend=(first >> 24)[None]) > 0
    kept = drawn.logical_not().sort(stable=True).indices[:k].sort().values  # the drawn ones first, then any
    factors = torch.where(probabilities < ONE, threshold / norms, 1.0)
    factors = torch.where(drawn & finite, factors, drawn.double())
    return kept, factors[kept]


# ---------------------------------------------------------------- the products


def _fake_spread(rows: Tensor, _numbers: Tensor, count: int) -> Tensor:
    return rows.new_empty(count, rows.shape[1])


@operation(operator=Operator("(Tensor rows, Tensor numbers, SymInt count) -> Tensor", _fake_spread))
def spread_rows(rows: Tensor, numbers: Tensor, count: int, /) -> Tensor:
    """Rows [M, C] at these numbers [M], int32, among zeros: [count, C]."""
    return rows.new_zeros(count, rows.shape[1]).index_copy_(0, numbers.long(), rows)


def _triton_declines_spread(rows: Tensor, _numbers: Tensor, _count: int) -> str | None:
    return triton.declines(rows)


@triton.backend.implements(spread_rows, _triton_declines_spread)
def _triton_spread_rows(rows: Tensor, numbers: Tensor, count: int) -> Tensor:
    return triton.kernels().spread_rows(rows.contiguous(), numbers, count)


def whole_rows_backward(
    selection: WholeRows, grad: Tensor, weight: Tensor | None, x: Tensor | None, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A linear map's backward pass with some whole rows in place of its output gradient.

    Products are formed as torch forms dense ones of the dtype.

    Args:
        selection: The rows.
        grad: The whole output gradient [N, O].
        weight: Weight [O, I] if the input's gradient is wanted, else None.
        x: Input [N, I] if the weight's gradient is wanted, else None.
        needs_bias: Whether the bias's gradient is wanted. It is the sum of the whole grad.

    Returns:
        The gradients of input [N, I], weight [O, I] and bias [O]. A gradient that is not wanted is None.
    """
    values, numbers = selection.values, selection.numbers
    return (
        None if weight is None else spread_rows(values @ weight, numbers, selection.rows),
        None if x is None else values.t() @ x.index_select(0, numbers),
        None if not needs_bias else grad.sum(dim=0) if selection.sums is None else selection.sums,
    )
