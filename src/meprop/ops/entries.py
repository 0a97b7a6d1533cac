"""Entries of a whole output gradient [N, O] that are kept, whatever row they are in: the largest ones, or drawn ones.

A magnitude has a key, which is its bits as a float32. The upper half of the key is the magnitude in bfloat16, rounded
towards zero. Thresholds are such magnitudes. Where only the upper half of a magnitude is looked at, it counts as the
middle between this magnitude in bfloat16 and the next one, or as a bound that holds for all between them. All NaN have
one key, which is above infinity's. They are kept whatever else is, as infinity is.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from meprop.errors import NotSupportedError
from meprop.ops import native
from meprop.ops.registry import PLAIN, Operator, in_graph, operation
from meprop.ops.thresholds import (
    GROUP,
    ONE,
    Distribution,
    bits_of,
    cut_for_energy,
    keys_of,
    largest_threshold_of,
    probabilities_of,
    threshold_for_draws,
)
from meprop.ops.topk import largest
from meprop.selection import ColumnSelection, Entries, RowSelection, Selection, everything

_Found = tuple[Tensor, Tensor, Tensor, Tensor]
"""Values [E], indices [E], starts [N + 1], and what all rows share [O], or [0] if they share nothing."""


def _fake_entries(grad: Tensor, *_: object) -> _Found:
    if type(grad) in PLAIN:
        raise NotSupportedError(
            "a choice of entries of a whole gradient on the meta device: how many there are depends on the data, which "
            "it has not; use a rule with k of scope 'example' or 'batch', or a tensor with data"
        )
    entries = torch.library.get_ctx().new_dynamic_size()
    rows, width = grad.shape
    starts = grad.new_empty(rows + 1, dtype=torch.int64)
    return grad.new_empty(entries), grad.new_empty(entries, dtype=torch.int32), starts, grad.new_empty(width)


def _flat(grad: Tensor, entries: Entries) -> tuple[object, ...]:
    return grad, entries.keep, entries.k, entries.share, entries.exact_sum, entries.key


def _whole(
    grad: Tensor, keep: str, k: int, share: float, exact_sum: bool, key: Tensor | None
) -> tuple[Tensor, Entries]:
    return grad, Entries(keep, k, share, exact_sum, key)  # pyright: ignore[reportArgumentType]  (it was one of them)


def _row_selection(found: _Found, grad: Tensor, entries: Entries) -> RowSelection:
    values, indices, starts, shared = found
    return RowSelection(values, indices, grad.shape[1], shared if entries.exact_sum else None, starts)


_operator = Operator(
    "(Tensor grad, str keep, int k, float share, bool exact_sum, Tensor? key) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_entries,
    _flat,
    _whole,
    sizes_follow_data=True,
)


@operation(operator=_operator, result=_row_selection)
def choose_entries(grad: Tensor, entries: Entries, /) -> _Found:
    """The entries of grad [N, O] that are described, in a RowSelection with starts.

    With `keep` "largest" these are the k N largest magnitudes. Of equal ones the lower row is taken, then the lower
    column.

    With "energy" they are the largest ones that hold at least `share` of the sum of all squares. They are all the
    entries that are not below a threshold.

    With "noise" a threshold t is found. An entry g with |g| >= t is kept as it is. A smaller one is drawn with
    probability |g| / t, and becomes t with the sign of g. The mean over all draws is g, and the variance is
    |g| t - g^2. The sum of the variances is at most `share` of the sum of all squares, and k entries of a row or more
    are kept on average. The threshold is the largest one that allows both, or leaves at most 1/32 of a limit unused.

    With "drawn" the threshold is the one for which k N entries are kept on average, and exactly so many are drawn. If
    fewer are not zero, these are kept as they are.

    A threshold of "drawn" is no magnitude in bfloat16. Entries of that dtype become the nearest one, which is off by at
    most 0.4%. No threshold is above the largest number of the dtype, or below 2^-100. More entries are kept where it
    would have to be.

    Probabilities are multiples of 2^-24. Each row is sampled systematically (Madow 1949): with a random number u in
    [0, 1), entry o is drawn if floor(u + p[0] + ... + p[o]) is above floor(u + p[0] + ... + p[o - 1]). The numbers u
    are those of Philox 4x32-10 (Salmon et al., SC 2011) for the key and the number of the row. With "drawn" they are
    mapped so that the numbers of entries add up.

    Args:
        grad: Output gradient [N, O].
        entries: What is kept.

    Returns:
        A RowSelection with starts. With `exact_sum` all rows share the mean over the rows of what is left out, which
        is grad less the entries. An implementation returns values [E], indices [E], starts [N + 1] and the shared part
        [O], which is empty without `exact_sum`.
    """
    native.codes_of(entries)
    rows, width = grad.shape
    if entries.keep == "largest":
        places = largest(grad.abs().flatten(), entries.k * rows)
        values = grad.flatten()[places]
    elif entries.keep == "energy":
        keys = keys_of(grad).flatten()
        places = (keys > cut_for_energy(Distribution.of(grad), entries.share)).nonzero()[:, 0]
        values = grad.flatten()[places]
    else:
        places, values = _draw(grad, entries)
    starts = torch.zeros(rows + 1, dtype=torch.int64, device=grad.device)
    starts[1:] = torch.bincount(places // width, minlength=rows).cumsum(0)
    shared = grad.new_empty(0)
    if entries.exact_sum:
        kept = RowSelection(values, (places % width).int(), width, starts=starts)
        shared = (sums_of_the_rest(kept, grad.double()) / max(1, rows)).to(grad.dtype)
    return values, (places % width).int(), starts, shared


def sums_of_the_rest(kept: RowSelection, grad: Tensor) -> Tensor:
    """The sum of each column [O] of what is left out of grad [N, O], in its dtype, always the same for the same input.

    A GPU adds entries in any order, but whole columns in one.
    """
    values = kept.values.to(grad.dtype)
    if not grad.is_cpu:
        return (grad - replace(kept, values=values, shared=None).to_dense()).sum(dim=0)
    return grad.sum(dim=0).index_add_(0, kept.indices.flatten(), values.flatten(), alpha=-1)


def _native_declines(grad: Tensor, _entries: Entries) -> str | None:
    return native.declines(grad)


@native.backend.implements(choose_entries, _native_declines)
def _native_choose_entries(grad: Tensor, entries: Entries) -> _Found:
    grad = native.readable(grad, grad.dtype)
    (rows, width), dtype = grad.shape, grad.dtype
    starts, states = torch.empty(rows + 1, dtype=torch.int64), torch.empty(rows, dtype=torch.int32)
    groups = torch.empty(rows * -(-width // GROUP) if entries.key is not None else 0, dtype=torch.int32)
    keep, key = native.codes_of(entries)
    arguments = (
        *(native.DTYPE_CODES[dtype], keep, rows, width, grad.data_ptr(), grad.stride(0)),
        *(min(entries.k, width) * rows, key, starts.data_ptr(), states.data_ptr(), groups.data_ptr()),
        torch.get_num_threads(),
    )
    count, cut, threshold = native.extension().plan_entries(*arguments, entries.share)
    values, indices = torch.empty(count, dtype=dtype), torch.empty(count, dtype=torch.int32)
    shared = torch.empty(width if entries.exact_sum else 0, dtype=dtype)
    shared_at = shared.data_ptr() if entries.exact_sum else 0
    native.extension().write_entries(*arguments, cut, values.data_ptr(), indices.data_ptr(), shared_at, threshold)
    return values, indices, starts, shared


def keep_entries(grad: Tensor, entries: Entries) -> Selection:
    """`choose_entries`, or everything if that is more than the ceiling of grad [N, O].

    Under `torch.compile` it is always the former, as a graph cannot look at how many there are.
    """
    kept = choose_entries(grad, entries)
    if entries.ceiling == 1 or in_graph():
        return kept
    return everything(grad) if kept.density > entries.ceiling else kept


# ---------------------------------------------------------------- drawn rows and columns


def draw_rows(grad: Tensor, k: int, key: Tensor) -> RowSelection:
    """k entries of each row of grad [N, O], drawn as those with "drawn" in `choose_entries`, with a threshold a row.

    A row of which fewer entries are not zero keeps these.

    Raises:
        ValueError: k is not from 1 to O.
    """
    rows, width = grad.shape
    if not 1 <= k <= width:
        raise ValueError(f"k={k} of {width} output features; k is from 1 to all of them")
    magnitudes = grad.abs().double()
    # What is not finite stands above all that is, so that it is kept for certain.
    above_all = magnitudes.nan_to_num(0.0, 0.0).sum(dim=1, keepdim=True) + 1
    magnitudes = torch.where(magnitudes.isfinite(), magnitudes, above_all)
    threshold = threshold_of_counts(magnitudes, k).clamp(max=torch.finfo(grad.dtype).max)
    share = (magnitudes / threshold * ONE).nan_to_num(0.0).round().long()
    probabilities = torch.where(magnitudes >= threshold, ONE, share)
    probabilities[magnitudes == 0] = 0
    excess = (probabilities.sum(dim=1) - k * ONE).clamp(-ONE, ONE)  # by rounding, or as there are fewer entries
    starts = uniform(int(key), rows, grad.device) * (ONE - excess.abs()) // ONE - excess.clamp(max=0)
    reached = (starts[:, None] + probabilities.cumsum(dim=1)) >> 24
    drawn = reached.diff(dim=1, prepend=(starts >> 24)[:, None]) > 0
    places = drawn.flatten().nonzero()[:, 0]
    values = grad.flatten()[places]
    at_least = threshold.to(grad.dtype)[places // width, 0].copysign(values)
    values = torch.where(probabilities.flatten()[places] < ONE, at_least, values)
    ends = torch.zeros(rows + 1, dtype=torch.int64, device=grad.device)
    ends[1:] = drawn.sum(dim=1).cumsum(0)
    return RowSelection(values, (places % width).int(), width, starts=ends)


def threshold_of_counts(magnitudes: Tensor, k: int) -> Tensor:
    """The threshold t of each row [N, 1] for which the probabilities of magnitudes [N, O] add up to k.

    A probability is the magnitude over t, and at most 1. Magnitudes are finite and not negative.
    """
    ordered = magnitudes.sort(dim=1, descending=True).values
    below = ordered.flip(1).cumsum(dim=1).flip(1)[:, :k]  # from the smallest on: what is next to nothing counts
    certain = torch.arange(k, device=magnitudes.device)
    thresholds = below / (k - certain)  # if the largest `certain` entries are kept for certain
    fits = (ordered[:, :k] <= thresholds) | (certain == k - 1)
    return thresholds.gather(1, fits.int().argmax(dim=1, keepdim=True))


def draw_columns(grad: Tensor, k: int, key: Tensor) -> ColumnSelection:
    """k columns of grad [N, O], drawn by their norms, and divided by the probabilities."""
    norms = torch.linalg.vector_norm(grad.double(), dim=0)
    kept = draw_rows(norms[None], k, key)
    indices = kept.indices.long()
    factors = (kept.values / norms[indices]).nan_to_num(1.0)  # of a column that is not finite
    most = torch.finfo(grad.dtype).max
    values = grad[:, indices].double() * factors
    values = torch.where(values.isfinite(), values.clamp(-most, most), values).to(grad.dtype)
    return ColumnSelection(values, kept.indices, grad.shape[1])


# ---------------------------------------------------------------- drawing, literally


def _draw(grad: Tensor, entries: Entries) -> tuple[Tensor, Tensor]:
    """The places of the drawn entries in the flattened gradient, ascending, and their values."""
    assert entries.key is not None  # choose_entries has checked it
    rows, width = grad.shape
    keys, count = keys_of(grad), min(entries.k, width) * rows
    threshold = threshold_for_draws(keys, entries.share if entries.keep == "noise" else None, count)
    threshold = min(threshold, largest_threshold_of(grad.dtype))
    if threshold == 0:
        places = (keys > 0).flatten().nonzero()[:, 0]
        return places, grad.flatten()[places]
    probabilities = probabilities_of(keys, threshold)
    starts = uniform(int(entries.key), rows + 1, grad.device)
    starts = starts[:rows] if entries.keep == "noise" else _shared_out(probabilities.sum(dim=1), starts, count)
    reached = (starts[:, None] + probabilities.cumsum(dim=1)) >> 24
    drawn = reached.diff(dim=1, prepend=torch.zeros_like(reached[:, :1])) > 0
    places = drawn.flatten().nonzero()[:, 0]
    values = grad.flatten()[places]
    below = keys.flatten()[places] < bits_of(threshold)
    return places, torch.where(below, torch.full_like(values, threshold).copysign(values), values)


def _shared_out(sums: Tensor, uniform_numbers: Tensor, count: int) -> Tensor:
    """Where the sampling of each row starts, so that the rows draw `count` entries together.

    The rows' numbers of entries are drawn by systematic sampling too. Each is the integer below or above its mean.
    """
    own, of_all = uniform_numbers[:-1], int(uniform_numbers[-1])
    excess = min(max(int(sums.sum()) - count * ONE, -ONE), ONE)  # by rounding
    ends = of_all * (ONE - abs(excess)) // ONE + max(-excess, 0) + sums.cumsum(0)
    more = (ends >> 24) - ((ends - sums) >> 24) > sums >> 24
    least = sums % ONE  # from ONE - least on, a row draws one entry more
    return torch.where(more, ONE - least + own * least // ONE, own * (ONE - least) // ONE)


def uniform(key: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The random numbers below 2^24 of Philox 4x32-10 for a key and the numbers from 0 to count - 1, int64 [count].

    Number n is the upper 24 bits of word n % 4 of counter n // 4.
    """
    counters = torch.arange((count + 3) // 4, device=device)
    words = [counters & 0xFFFFFFFF, counters >> 32, torch.zeros_like(counters), torch.zeros_like(counters)]
    keys = [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        (high_a, low_a), (high_b, low_b) = _product(0xD2511F53, words[0]), _product(0xCD9E8D57, words[2])
        words = [high_b ^ words[1] ^ keys[0], low_b, high_a ^ words[3] ^ keys[1], low_a]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return (torch.stack(words, dim=1).flatten() >> 8)[:count]


def _product(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of the products of 32-bit words."""
    low, high = factor * (words & 0xFFFF), factor * (words >> 16)  # each below 2^48
    low_word = (low + ((high & 0xFFFF) << 16)) & 0xFFFFFFFF
    carry = (low + ((high & 0xFFFF) << 16)) >> 32
    return (high >> 16) + carry, low_word
