"""Triton kernels, and their launches.

A launch takes tensors that `triton.declines` has let pass. Every result is the same for the same input: sums are formed
in one order, and only counts are added atomically.
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


def _ceil_div(number: int, by: int) -> int:
    """As `triton.cdiv`, which takes several microseconds of the host."""
    return -(-number // by)


def _power_of_two(least: int) -> int:
    """The smallest one that is at least this, and 1 for 0."""
    return 1 << max(0, least - 1).bit_length()


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
    STAGES: tl.constexpr,
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
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
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
def _finish_one(parts, to, count, length, ROOT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((PARTS, BLOCK), parts.dtype.element_ty)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < count)[:, None] & (at < length)[None, :]
        sums += tl.load(parts + part[:, None] * length + at[None, :], mask, 0.0)
    total = tl.sum(sums, axis=0)
    tl.store(to + at, (tl.sqrt(total) if ROOT else total).to(to.dtype.element_ty), at < length)


@triton.jit
def _finish(
    parts,
    to,
    count,
    length,
    other_parts,
    other_to,
    other_count,
    other_length,
    ROOT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of parts [count, length], or their square roots, and the sums of other parts."""
    if tl.program_id(1) == 0:
        _finish_one(parts, to, count, length, ROOT, PARTS, BLOCK)
    else:
        _finish_one(other_parts, other_to, other_count, other_length, False, PARTS, BLOCK)


def _finished(parts: Tensor, others: Tensor, dtype: torch.dtype, *, root: bool) -> tuple[Tensor, Tensor]:
    """The sums of parts in float64, or their square roots, and those of other parts, if any, in this dtype."""
    to, others_to = parts.new_empty(parts.shape[1]), others.new_empty(others.shape[1], dtype=dtype)
    grid = _ceil_div(max(to.shape[0], others_to.shape[0]), 64), 2 if others.shape[0] else 1
    _finish[grid](parts, to, *parts.shape, others, others_to, *others.shape, root, 16, 64)
    return to, others_to


_PROGRAMS = 1024
"""How many programs a pass has at least, if there are so many rows."""


def _parts(matrix: Tensor, magnitudes: bool, sums: bool, squares: bool) -> tuple[Tensor, Tensor, Tensor]:
    (rows, width), (tile_rows, tile_columns, warps, stages) = matrix.shape, (32, 64, 4, 3) if squares else (8, 64, 2, 5)
    blocks = _ceil_div(width, tile_columns)
    share = max(1, _ceil_div(rows * blocks, _PROGRAMS))
    share = _ceil_div(share, tile_rows) * tile_rows
    shares = max(1, _ceil_div(rows, share))
    wanted = (magnitudes, shares, width, torch.float64), (sums, shares, width, torch.float32)
    wanted = *wanted, (squares, blocks, rows, torch.float64)
    parts = [matrix.new_empty((one, other) if is_wanted else (0, 0), dtype=d) for is_wanted, one, other, d in wanted]
    flags = magnitudes, sums, squares
    arguments: Any = (matrix, *parts, rows, width, matrix.stride(0), share, *flags, tile_rows, tile_columns, stages)
    _pass[(blocks, shares)](*arguments, num_warps=warps)
    return parts[0], parts[1], parts[2]


def column_sums(grad: Tensor, with_sums: bool) -> tuple[Tensor, Tensor | None]:
    """The sums of |g| of each column of grad [N, O] in float64, and those of g in its dtype or None, in one pass."""
    magnitudes, sums, _ = _parts(grad, True, with_sums, False)
    scores, sums = _finished(magnitudes, sums, grad.dtype, root=False)
    return scores, sums if with_sums else None


def row_norms(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The Euclidean norms of the rows of a matrix [N, C] in float64, and its columns' sums in its dtype. One pass."""
    _, sums, squares = _parts(matrix, False, True, True)
    return _finished(squares, sums, matrix.dtype, root=True)


# ---------------------------------------------------------------- the largest scores


@triton.jit(do_not_specialize=["k"])
def _choose(scores, places, count, k, BLOCK: tl.constexpr, DIGIT: tl.constexpr):
    """The places of the k largest of some scores that are not negative, ascending, by one program.

    Bits of float64 are in the order of numbers, as integers are. The bits of the k-th score are found by their digits,
    the highest one first. The first digit begins where the scores differ, which spares most of the digits.
    """
    at = tl.arange(0, BLOCK)
    score = tl.load(scores + at, at < count, 0.0)
    bits = score.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF  # -0 is 0
    bits = tl.where(score != score, 0x7FF8000000000000, bits)  # NaN is above infinity
    largest = tl.max(bits, axis=0)
    least = tl.min(tl.where(bits == 0, largest, bits), axis=0)  # zeros are put below all others, right beside them
    offset = tl.where(at < count, tl.maximum(bits - least + 1, 0), -1)
    exponent = (((largest - least + 1).to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1023).to(tl.int32)
    shift = tl.maximum(exponent - DIGIT + 1, 0)
    prefix, below, missing = tl.full((), 0, tl.int64), shift + DIGIT, k
    more = tl.full((), 1, tl.int32)
    while more > 0:
        candidate = (offset >> below) == prefix
        prefix = prefix << (below - shift)
        digit = tl.where(candidate, (offset >> shift) - prefix, 0).to(tl.int32)
        counts = tl.histogram(digit, 1 << DIGIT, mask=candidate)
        reached = tl.sum(counts, axis=0) - tl.cumsum(counts, 0) + counts  # in this bin and those above
        larger = tl.max(tl.where(reached < missing, reached, 0), axis=0)
        with_own = tl.min(tl.where(reached >= missing, reached, BLOCK), axis=0)
        prefix += tl.sum((reached >= missing).to(tl.int64), axis=0) - 1
        more = ((with_own > missing) & (shift > 0)).to(tl.int32)
        missing -= larger
        below = shift
        shift = tl.maximum(shift - DIGIT, 0)
    above, equal = (offset >> below) > prefix, (offset >> below) == prefix
    both = tl.cumsum((above.to(tl.int32) << 16) + equal.to(tl.int32), 0)  # fewer than 2^15 are above, as one is equal
    equals = both & 0xFFFF
    kept = above | (equal & (equals <= missing))
    tl.store(places + (both >> 16) + tl.minimum(equals, missing) - 1, at, kept)


_DIGIT = 6
"""Bits of a digit. Each round looks at one. More bits are fewer rounds, of more instructions for each score."""


def largest(scores: Tensor, k: int) -> Tensor | None:
    """The places of the k largest of some scores that are not negative, int32, ascending. None for too many scores."""
    count = scores.shape[0]
    if count > _MOST_IN_ONE:
        return None
    places = scores.new_empty(k, dtype=torch.int32)
    _choose[(1,)](scores, places, count, k, _power_of_two(count), _DIGIT, num_warps=_warps(count))
    return places


def _warps(count: int) -> int:
    """Of one program that holds so many numbers."""
    return max(4, min(32, _power_of_two(count) // 512))


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
    rows, count, indices = matrix.shape[0], indices.shape[0], indices.contiguous()
    to = matrix.new_empty(count, rows)
    grid = (_ceil_div(rows, 32), _ceil_div(count, 32))
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
    width, numbers = matrix.shape[1], numbers.contiguous()
    to = matrix.new_empty(numbers.shape[0], width)
    most = torch.finfo(matrix.dtype).max
    scale = factors is not None
    arguments: Any = (matrix, numbers, factors if scale else matrix, to, width, matrix.stride(0), most)
    _gather_rows[(numbers.shape[0],)](*arguments, scale, _row_block(width))
    return to


def _row_block(width: int) -> int:
    """How many entries of a row a program takes at a time."""
    return min(4096, _power_of_two(width))


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
    _places[(_ceil_div(slots, 128),)](numbers, places, slots, count, 128)
    _spread_rows[(count,)](source, places, to, width, _row_block(width))
    return to


# ---------------------------------------------------------------- drawn rows


@triton.jit(do_not_specialize=["k"])
def _choose_rows(norms, start_at, numbers, factors, count, k, BLOCK: tl.constexpr):
    """`meprop.ops.rows.choose_rows` in one program. The threshold is found by raising the number of certain rows.

    No norm is denormal in float64, as those of float32 are not.
    """
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
    total = tl.sum(probability, axis=0)
    excess = tl.minimum(tl.maximum(total - k.to(tl.int64) * ONE, -ONE), ONE)
    first = tl.load(start_at) * (ONE - tl.abs(excess)) // ONE - tl.minimum(excess, 0)
    reached = first + tl.cumsum(probability, 0)
    drawn = (reached >> 24) > ((reached - probability) >> 24)
    missing = k - (((first + total) >> 24) - (first >> 24)).to(tl.int32)  # rows with zeros fill up
    others = (at + 1 - ((reached >> 24) - (first >> 24))).to(tl.int32)  # rows up to here that are not drawn
    kept = drawn | (inside & (drawn == 0) & (others <= missing))
    to = at - tl.maximum(others - missing, 0)
    factor = tl.where(drawn & finite & (probability < ONE), threshold / norm, tl.where(drawn, 1.0, 0.0))
    tl.store(numbers + to, at, kept)
    tl.store(factors + to, factor.to(tl.float32), kept)


def choose_rows(norms: Tensor, k: int, start: Tensor) -> tuple[Tensor, Tensor] | None:
    """The numbers of the kept rows [k], int32, and their factors [k], float32. None for too many rows."""
    count = norms.shape[0]
    if count > _MOST_IN_ONE:
        return None
    numbers = norms.new_empty(k, dtype=torch.int32)
    factors = norms.new_empty(k, dtype=torch.float32)
    block = _power_of_two(count)
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
    width = weight.numel() // max(1, weight.shape[0])
    columns = min(1024, _power_of_two(width))
    counted = isinstance(step, Tensor)
    rate, root = (lr, 1.0) if counted else (lr / (1 - betas[0] ** step), 1 / sqrt(1 - betas[1] ** step))
    tensors = [weight if decay is None else decay for decay in decays]
    logarithms = [log(max(beta, 1e-300)) for beta in betas]
    numbers = *betas, keep_weight, weight_decay, rate, root, eps, step if counted else weight, *logarithms
    own = [decay is not None for decay in decays]
    arguments: Any = (weight, first, second, rows, grads, *tensors, width, *numbers, counted, *own, columns)
    _adam_rows[(rows.shape[0], _ceil_div(width, columns))](*arguments)
