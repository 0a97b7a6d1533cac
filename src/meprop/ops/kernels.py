"""Triton kernels, and their launches.

A launch takes tensors that `triton.declines` has let pass. Every result is the same for the same input: sums are formed
in one order, and nothing is added atomically.
"""

# Kernels are written in a language that only looks like Python, and Triton is not installed everywhere.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

from math import log, sqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_IN_ONE = 1 << 15
"""The largest number of scores or rows from which one program chooses."""

# ---------------------------------------------------------------- one pass over a matrix


@triton.jit
def _pass(
    matrix,
    magnitudes,
    sums,
    squares,
    rows,
    width,
    stride,
    share,
    MAGNITUDES: tl.constexpr,
    SUMS: tl.constexpr,
    SQUARES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of |g| and of g over a share of the rows, and of g^2 over some columns. One program for each such part."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, rows)
    inside = columns < width
    if MAGNITUDES:
        magnitude = tl.zeros((ROWS, COLUMNS), tl.float64)
    if SUMS:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, ROWS):
        at = start + tl.arange(0, ROWS)
        mask = (at < last)[:, None] & inside[None, :]
        entries = tl.load(matrix + at.to(tl.int64)[:, None] * stride + columns[None, :], mask, 0.0).to(tl.float32)
        if MAGNITUDES:
            magnitude += tl.abs(entries).to(tl.float64)
        if SUMS:
            total += entries
        if SQUARES:
            exact = entries.to(tl.float64)
            tl.store(squares + tl.program_id(0).to(tl.int64) * rows + at, tl.sum(exact * exact, axis=1), at < last)
    to = tl.program_id(1) * width + columns
    if MAGNITUDES:
        tl.store(magnitudes + to, tl.sum(magnitude, axis=0), inside)
    if SUMS:
        tl.store(sums + to, tl.sum(total, axis=0), inside)


@triton.jit
def _finish(parts, to, count, length, ROOT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of parts [count, length], or their square roots."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((PARTS, BLOCK), parts.dtype.element_ty)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < count)[:, None] & (at < length)[None, :]
        sums += tl.load(parts + part[:, None] * length + at[None, :], mask, 0.0)
    total = tl.sum(sums, axis=0)
    tl.store(to + at, (tl.sqrt(total) if ROOT else total).to(to.dtype.element_ty), at < length)


def _finished(parts: Tensor, dtype: torch.dtype, *, root: bool = False) -> Tensor:
    count, length = parts.shape
    to = parts.new_empty(length, dtype=dtype)
    _finish[(triton.cdiv(length, 64),)](parts, to, count, length, root, 16, 64)
    return to


_PROGRAMS = 1024
"""How many programs a pass has at least, if there are so many rows."""


def _parts(matrix: Tensor, magnitudes: bool, sums: bool, squares: bool) -> tuple[Tensor, Tensor, Tensor]:
    (rows, width), (tile_rows, tile_columns) = matrix.shape, (32 if squares else 16, 64)
    blocks = triton.cdiv(width, tile_columns)
    share = max(1, triton.cdiv(rows * blocks, _PROGRAMS))
    share = triton.cdiv(share, tile_rows) * tile_rows
    shares = max(1, triton.cdiv(rows, share))
    wanted = (magnitudes, shares, width, torch.float64), (sums, shares, width, torch.float32)
    wanted = *wanted, (squares, blocks, rows, torch.float64)
    parts = [matrix.new_empty((one, other) if is_wanted else (0, 0), dtype=d) for is_wanted, one, other, d in wanted]
    flags = magnitudes, sums, squares
    arguments: Any = (matrix, *parts, rows, width, matrix.stride(0), share, *flags, tile_rows, tile_columns)
    _pass[(blocks, shares)](*arguments)
    return parts[0], parts[1], parts[2]


def column_sums(grad: Tensor, with_sums: bool) -> tuple[Tensor, Tensor | None]:
    """The sums of |g| of each column of grad [N, O] in float64, and those of g in its dtype or None, in one pass."""
    magnitudes, sums, _ = _parts(grad, True, with_sums, False)
    return _finished(magnitudes, torch.float64), _finished(sums, grad.dtype) if with_sums else None


def row_norms(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The Euclidean norms of the rows of a matrix [N, C] in float64, and its columns' sums in its dtype. One pass."""
    _, sums, squares = _parts(matrix, False, True, True)
    return _finished(squares, torch.float64, root=True), _finished(sums, matrix.dtype)


# ---------------------------------------------------------------- the largest scores


@triton.jit
def _score(scores, at, count):
    """Scores, in whose order NaN is above infinity, and infinity above all others. None is negative."""
    score = tl.abs(tl.load(scores + at, at < count, 0.0))
    finite = tl.where(score == float("inf"), 1.7976931348623157e308, score)
    return tl.where(score != score, float("inf"), tl.where(at < count, finite, -1.0))


@triton.jit
def _rank(scores, ranks, count, OWN: tl.constexpr, OTHERS: tl.constexpr):
    """How many scores are before each one: larger ones, and equal ones of a lower place."""
    first = tl.program_id(0) * OWN
    own = first + tl.arange(0, OWN)
    score = _score(scores, own, count)[:, None]
    before = tl.zeros((OWN, OTHERS), tl.int32)
    for start in range(0, count, OTHERS):
        others = start + tl.arange(0, OTHERS)
        other = _score(scores, others, count)[None, :]
        if start + OTHERS <= first:  # of a lower place, all of them
            before += (other >= score).to(tl.int32)
        elif start >= first + OWN:
            before += (other > score).to(tl.int32)
        else:
            before += ((other > score) | ((other == score) & (others[None, :] < own[:, None]))).to(tl.int32)
    tl.store(ranks + own, tl.sum(before, axis=1), own < count)


@triton.jit
def _compact(ranks, places, count, k, BLOCK: tl.constexpr):
    """The places of the ranks below k, ascending. One program does it."""
    at = tl.arange(0, BLOCK)
    kept = (at < count) & (tl.load(ranks + at, at < count, 0) < k)
    tl.store(places + tl.cumsum(kept.to(tl.int32), 0) - 1, at, kept)


def largest(scores: Tensor, k: int) -> Tensor | None:
    """The places of the k largest of some scores that are not negative, int32, ascending. None for too many scores."""
    count = len(scores)
    if count > _MOST_IN_ONE:
        return None
    ranks, places = scores.new_empty(count, dtype=torch.int32), scores.new_empty(k, dtype=torch.int32)
    _rank[(triton.cdiv(count, 16),)](scores, ranks, count, 16, 1024, num_warps=8)
    _compact[(1,)](ranks, places, count, k, triton.next_power_of_2(count), num_warps=_warps(count))
    return places


def _warps(count: int) -> int:
    """Of one program that holds so many numbers."""
    return max(4, min(32, triton.next_power_of_2(count) // 512))


# ---------------------------------------------------------------- gathers


@triton.jit
def _gather_columns(matrix, indices, to, rows, count, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slots = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns = tl.load(indices + slots, slots < count, 0)
    mask = (at < rows)[:, None] & (slots < count)[None, :]
    entries = tl.load(matrix + at.to(tl.int64)[:, None] * stride + columns[None, :], mask)
    tl.store(to + slots.to(tl.int64)[None, :] * rows + at[:, None], entries, mask)


def gather_columns(matrix: Tensor, indices: Tensor) -> Tensor:
    """The columns of a matrix [N, O] at indices [k], int32, as [N, k]. The entries of a column are side by side.

    Products with the transposed result are faster by a fifth in this order.
    """
    rows, count = len(matrix), len(indices)
    to = matrix.new_empty(count, rows)
    grid = (triton.cdiv(rows, 32), triton.cdiv(count, 32))
    _gather_columns[grid](matrix, indices, to, rows, count, matrix.stride(0), 32, 32)
    return to.t()


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


@triton.jit
def _places(numbers, places, slots, count, BLOCK: tl.constexpr):
    """Writes the slot of each number to its row."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(numbers + slot, slot < slots, -1)
    tl.store(places + row, slot, (row >= 0) & (row < count))


def spread_rows(source: Tensor, numbers: Tensor, count: int) -> Tensor:
    """Rows [M, C] at these numbers [M], int32, among zeros: [count, C]."""
    slots, width = source.shape
    places, to = numbers.new_full((count,), -1), source.new_empty(count, width)
    _places[(triton.cdiv(slots, 128),)](numbers, places, slots, count, 128)
    _spread_rows[(count,)](source, places, to, width, min(4096, triton.next_power_of_2(width)))
    return to


# ---------------------------------------------------------------- drawn rows


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
    _choose_rows[(1,)](norms, start, numbers, factors, count, k, block, num_warps=_warps(count))
    return numbers, factors


# ---------------------------------------------------------------- Adam


@triton.jit
def _adam_rows(
    weight,
    first,
    second,
    rows,
    grads,
    decays_first,
    decays_second,
    decays_weight,
    width,
    beta1,
    beta2,
    keep_weight,
    weight_decay,
    rate,
    root_scale,
    eps,
    step,
    log_beta1,
    log_beta2,
    COUNTED: tl.constexpr,
    OWN_FIRST: tl.constexpr,
    OWN_SECOND: tl.constexpr,
    OWN_WEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program for some columns of one row. With COUNTED the number of the step is on the GPU."""
    slot = tl.program_id(0)
    row = tl.load(rows + slot)
    if COUNTED:
        steps = tl.load(step).to(tl.float64)
        rate = (rate / (1 - tl.exp(steps * log_beta1))).to(tl.float32)
        root_scale = (1 / tl.sqrt(1 - tl.exp(steps * log_beta2))).to(tl.float32)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < width
    place = row * width + at
    w = tl.load(weight + place, inside, 0.0).to(tl.float32)
    m = tl.load(first + place, inside, 0.0).to(tl.float32)
    v = tl.load(second + place, inside, 0.0).to(tl.float32)
    g = tl.load(grads + slot.to(tl.int64) * width + at, inside, 0.0).to(tl.float32)
    w *= tl.load(decays_weight + row).to(tl.float32) if OWN_WEIGHT else keep_weight
    g += weight_decay * w
    m = m * (tl.load(decays_first + row).to(tl.float32) if OWN_FIRST else beta1) + (1 - beta1) * g
    v = v * (tl.load(decays_second + row).to(tl.float32) if OWN_SECOND else beta2) + (1 - beta2) * g * g
    m, v = m.to(first.dtype.element_ty), v.to(second.dtype.element_ty)
    tl.store(first + place, m, inside)
    tl.store(second + place, v, inside)
    root = tl.sqrt_rn(v.to(tl.float32)) * root_scale + eps
    tl.store(weight + place, (w - rate * (m.to(tl.float32) / root)).to(weight.dtype.element_ty), inside)


def adam_rows(
    weight: Tensor,
    first: Tensor,
    second: Tensor,
    rows: Tensor,
    grads: Tensor,
    decays: tuple[Tensor | None, Tensor | None, Tensor | None],
    step: float | Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    keep_weight: float,
    weight_decay: float,
) -> None:
    """Adam's step for some rows [k], int64, of a parameter [O, *] and its moments, in place.

    Args:
        weight: The parameter.
        first: The first moment.
        second: The second moment.
        rows: Which rows.
        grads: Their gradients [k, *].
        decays: By what each row of the moments and of the parameter is multiplied [O], or None.
        step: The number of the step, or a tensor [] with it on the GPU, which a captured graph reads each time.
        lr: The learning rate.
        betas: By what the moments are multiplied without `decays`.
        eps: What is added to the root.
        keep_weight: By what the parameter is multiplied without `decays`.
        weight_decay: The share of the parameter that is added to its gradient.
    """
    width = weight.numel() // max(1, len(weight))
    columns = min(1024, triton.next_power_of_2(width))
    counted = isinstance(step, Tensor)
    rate, root = (lr, 1.0) if counted else (lr / (1 - betas[0] ** step), 1 / sqrt(1 - betas[1] ** step))
    tensors = [weight if decay is None else decay for decay in decays]
    logarithms = [log(max(beta, 1e-300)) for beta in betas]
    numbers = *betas, keep_weight, weight_decay, rate, root, eps, step if counted else weight, *logarithms
    own = [decay is not None for decay in decays]
    arguments: Any = (weight, first, second, rows, grads, *tensors, width, *numbers, counted, *own, columns)
    _adam_rows[(len(rows), triton.cdiv(width, columns))](*arguments)
