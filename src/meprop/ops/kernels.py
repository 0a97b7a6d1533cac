"""Triton kernels, and their launches.

A launch takes tensors that `triton.declines` has let pass. Every result is the same for the same input: sums are formed
in one order, and nothing is added atomically.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_IN_ONE = 1 << 15
"""The largest number of scores or rows from which one program chooses."""

# ---------------------------------------------------------------- sums of columns


@triton.jit
def _column_sums(
    grad, scores, sums, rows, width, stride, share, WITH_SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sums of |g|, and of g, over a share of the rows: one program for some columns of one share."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, rows)
    inside = columns < width
    score = tl.zeros((ROWS, COLUMNS), tl.float64)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, ROWS):
        at = start + tl.arange(0, ROWS)
        mask = (at < last)[:, None] & inside[None, :]
        entries = tl.load(grad + at.to(tl.int64)[:, None] * stride + columns[None, :], mask, 0.0).to(tl.float32)
        score += tl.abs(entries).to(tl.float64)
        if WITH_SUMS:
            total += entries
    to = tl.program_id(1) * width + columns
    tl.store(scores + to, tl.sum(score, axis=0), inside)
    if WITH_SUMS:
        tl.store(sums + to, tl.sum(total, axis=0), inside)


def column_sums(grad: Tensor, with_sums: bool) -> tuple[Tensor, Tensor | None]:
    """The sums of |g| of each column of grad [N, O] in float64, and those of g in float32 or None."""
    rows, width = grad.shape
    columns = triton.cdiv(width, 128)
    shares = max(1, min(triton.cdiv(rows, 32), triton.cdiv(1024, columns)))
    share = triton.cdiv(triton.cdiv(rows, shares), 16) * 16
    shares = max(1, triton.cdiv(rows, share)) if share > 0 else 1
    scores = grad.new_empty((shares, width), dtype=torch.float64)
    sums = grad.new_empty((shares, width) if with_sums else (0,), dtype=torch.float32)
    _column_sums[(columns, shares)](grad, scores, sums, rows, width, grad.stride(0), share, with_sums, 16, 128)
    return scores.sum(dim=0), sums.sum(dim=0) if with_sums else None


# ---------------------------------------------------------------- the largest scores


@triton.jit
def _keys(scores):
    """Integers in the order of scores that are not negative. All NaN have the largest one."""
    bits = scores.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    return tl.where(bits > 0x7FF0000000000000, 0x7FF8000000000000, bits)


@triton.jit
def _rank(scores, ranks, count, OWN: tl.constexpr, OTHERS: tl.constexpr):
    """How many scores are before each one: larger ones, and equal ones of a lower place."""
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    key = _keys(tl.load(scores + own, own < count, 0.0))
    before = tl.zeros((OWN, OTHERS), tl.int32)
    for start in range(0, count, OTHERS):
        others = start + tl.arange(0, OTHERS)
        other = tl.where(others < count, _keys(tl.load(scores + others, others < count, 0.0)), -1)
        is_before = (other[None, :] > key[:, None]) | (
            (other[None, :] == key[:, None]) & (others[None, :] < own[:, None])
        )
        before += is_before.to(tl.int32)
    tl.store(ranks + own, tl.sum(before, axis=1), own < count)


@triton.jit
def _compact(ranks, places, count, k, BLOCK: tl.constexpr):
    """The places of the ranks below k, ascending. One program does it."""
    at = tl.arange(0, BLOCK)
    kept = (at < count) & (tl.load(ranks + at, at < count, 0) < k)
    to = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(places + to, at, kept)


def largest(scores: Tensor, k: int) -> Tensor | None:
    """The places of the k largest of some scores that are not negative, int32, ascending. None for too many scores."""
    count = len(scores)
    if count > _MOST_IN_ONE:
        return None
    ranks = scores.new_empty(count, dtype=torch.int32)
    places = scores.new_empty(k, dtype=torch.int32)
    _rank[(triton.cdiv(count, 32),)](scores, ranks, count, 32, 256)
    _compact[(1,)](ranks, places, count, k, triton.next_power_of_2(count), num_warps=16)
    return places


# ---------------------------------------------------------------- gathers


@triton.jit
def _gather_columns(matrix, indices, to, rows, count, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slots = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns = tl.load(indices + slots, slots < count, 0)
    mask = (at < rows)[:, None] & (slots < count)[None, :]
    entries = tl.load(matrix + at.to(tl.int64)[:, None] * stride + columns[None, :], mask)
    tl.store(to + at.to(tl.int64)[:, None] * count + slots[None, :], entries, mask)


def gather_columns(matrix: Tensor, indices: Tensor) -> Tensor:
    """The columns of a matrix [N, O] at indices [k], int32, as [N, k]."""
    rows, count = len(matrix), len(indices)
    to = matrix.new_empty(rows, count)
    grid = (triton.cdiv(rows, 32), triton.cdiv(count, 64))
    _gather_columns[grid](matrix, indices, to, rows, count, matrix.stride(0), 32, 64)
    return to


@triton.jit
def _gather_rows(matrix, numbers, factors, to, width, stride, most, SCALE: tl.constexpr, COLUMNS: tl.constexpr):
    """One program for one row."""
    slot = tl.program_id(0)
    number = tl.load(numbers + slot).to(tl.int64)
    factor = tl.load(factors + slot) if SCALE else 1.0
    for start in range(0, width, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        entries = tl.load(matrix + number * stride + at, at < width)
        if SCALE:
            if factor == 0.0:
                entries = tl.zeros_like(entries)
            elif factor != 1.0:
                scaled = entries.to(tl.float32) * factor
                entries = tl.minimum(tl.maximum(scaled, -most), most).to(entries.dtype)
        tl.store(to + slot.to(tl.int64) * width + at, entries, at < width)


def gather_rows(matrix: Tensor, numbers: Tensor, factors: Tensor | None = None) -> Tensor:
    """The rows of a matrix [N, C] with these numbers [M], int32, times these factors [M], float32: [M, C].

    A factor of 0 gives zeros. Other factors are of rows that are finite, which they leave finite.
    """
    width = matrix.shape[1]
    to = matrix.new_empty(len(numbers), width)
    most = torch.finfo(matrix.dtype).max
    scale = factors is not None
    arguments: Any = (matrix, numbers, factors if scale else matrix, to, width, matrix.stride(0), most)
    _gather_rows[(len(numbers),)](*arguments, scale, min(4096, triton.next_power_of_2(width)))
    return to


@triton.jit
def _spread_rows(source, places, to, width, COLUMNS: tl.constexpr):
    """One program for one row of the result."""
    row = tl.program_id(0)
    place = tl.load(places + row)
    for start in range(0, width, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        entries = tl.load(source + place.to(tl.int64) * width + at, (at < width) & (place >= 0), 0.0)
        tl.store(to + row.to(tl.int64) * width + at, entries, at < width)


def spread_rows(source: Tensor, numbers: Tensor, count: int) -> Tensor:
    """Rows [M, C] at these numbers [M], int32, among zeros: [count, C]."""
    slots, width = source.shape
    places = torch.full((count,), -1, dtype=torch.int32, device=source.device)
    places.index_copy_(0, numbers.long(), torch.arange(slots, dtype=torch.int32, device=source.device))
    to = source.new_empty(count, width)
    _spread_rows[(count,)](source, places, to, width, min(4096, triton.next_power_of_2(width)))
    return to


# ---------------------------------------------------------------- drawn rows


@triton.jit
def _row_norms(matrix, norms, width, stride, COLUMNS: tl.constexpr):
    """One program for one row."""
    row = tl.program_id(0)
    squares = tl.zeros((COLUMNS,), tl.float64)
    for start in range(0, width, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        entries = tl.load(matrix + row.to(tl.int64) * stride + at, at < width, 0.0).to(tl.float64)
        squares += entries * entries
    tl.store(norms + row, tl.sqrt(tl.sum(squares, axis=0)))


def row_norms(matrix: Tensor) -> Tensor:
    """The Euclidean norms of the rows of a matrix [N, C], float64."""
    norms = matrix.new_empty(len(matrix), dtype=torch.float64)
    columns = min(2048, triton.next_power_of_2(matrix.shape[1]))
    _row_norms[(len(matrix),)](matrix, norms, matrix.shape[1], matrix.stride(0), columns)
    return norms


@triton.jit(do_not_specialize=["k"])
def _choose_rows(norms, start_at, numbers, factors, count, k, BLOCK: tl.constexpr):
    """`meprop.ops.rows.choose_rows` in one program. The threshold is found by raising the number of certain rows."""
    ONE: tl.constexpr = 1 << 24
    at = tl.arange(0, BLOCK)
    inside = at < count
    norm = tl.load(norms + at, inside, 0.0)
    finite = norm < float("inf")  # no NaN is below it
    finite_norm = tl.where(finite, norm, 0.0)
    norm = tl.where(finite, norm, tl.sum(finite_norm, axis=0) + 1)
    certain = 0
    threshold = tl.sum(norm, axis=0) / k
    more = tl.sum((norm > threshold).to(tl.int32), axis=0)
    while (more > certain) & (more < k):
        certain = more
        threshold = tl.sum(tl.where(norm > threshold, 0.0, norm), axis=0) / (k - certain)
        more = tl.sum((norm > threshold).to(tl.int32), axis=0)
    share = (norm / threshold * ONE + 0.5).to(tl.int64)
    probability = tl.where(norm >= threshold, ONE, share)
    probability = tl.where(norm == 0.0, 0, probability)
    excess = tl.minimum(tl.maximum(tl.sum(probability, axis=0) - k.to(tl.int64) * ONE, -ONE), ONE)
    first = tl.load(start_at) * (ONE - tl.abs(excess)) // ONE - tl.minimum(excess, 0)
    reached = first + tl.cumsum(probability, 0)
    drawn = (reached >> 24) > ((reached - probability) >> 24)
    others = inside & (drawn == 0)
    missing = k - tl.sum(drawn.to(tl.int32), axis=0)  # rows with zeros fill up
    kept = drawn | (others & (tl.cumsum(others.to(tl.int32), 0) <= missing))
    to = tl.cumsum(kept.to(tl.int32), 0) - 1
    factor = tl.where(drawn & finite & (probability < ONE), threshold / norm, tl.where(drawn, 1.0, 0.0))
    tl.store(numbers + to, at, kept)
    tl.store(factors + to, factor.to(tl.float32), kept)


def choose_rows(norms: Tensor, k: int, start: Tensor) -> tuple[Tensor, Tensor] | None:
    """The numbers of the kept rows [k], int32, and their factors [k], float32. None for too many rows."""
    count = len(norms)
    if count > _MOST_IN_ONE:
        return None
    numbers = norms.new_empty(k, dtype=torch.int32)
    factors = norms.new_empty(k, dtype=torch.float32)
    block = triton.next_power_of_2(count)
    _choose_rows[(1,)](norms, start, numbers, factors, count, k, block, num_warps=max(4, min(32, block // 512)))
    return numbers, factors
