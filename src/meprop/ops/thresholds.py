"""Thresholds of magnitudes, literally: what the native code of `choose_entries` is compared with.

`meprop.ops.entries` says what a key, its upper half and a threshold are.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

ONE = 1 << 24
"""The probability 1, in the units of probabilities."""
GROUP = 16
"""A row is summed and drawn from in groups of so many neighbours."""
SLACK = 1 / 32
"""A threshold may leave this part of a limit unused."""
_INFINITY = 0x7F80  # the upper half of its key
_LEAST_UPPER = (127 - 100) << 7  # that of 2^-100; smaller thresholds might have no inverse
_NEWTON_STEPS = 8  # before the interval is halved
_LARGEST_STEP = 1 << 16  # squares vanish below a much larger threshold
_LEAST_STEP = 1 / ONE  # below a threshold where the probabilities vanish, nothing is certain from this part of it on
_MOST_STEPS = 256  # more than it takes to double the least threshold up to the largest
_SAMPLED = 256  # groups in a sample, at most twice as many


def keys_of(grad: Tensor) -> Tensor:
    """The keys of the magnitudes, int64."""
    bits = grad.abs().float().view(torch.int32).long()
    return bits.clamp(max=(_INFINITY << 16) + 1)


def _of_bits(bits: int) -> float:
    return struct.unpack("f", struct.pack("I", bits))[0]


def bits_of(value: float) -> int:
    """The bits of the nearest float32."""
    return struct.unpack("I", struct.pack("f", value))[0]


def _of_upper(upper: int) -> float:
    return _of_bits(upper << 16)


def _upper_of(value: float) -> int:
    return bits_of(value) >> 16


_LARGEST = _of_upper(_INFINITY - 1)


def _edge(upper: int) -> float:
    """The least magnitude of an upper half. That of infinity stands for 2^128, the end of the last finite one."""
    return _of_bits(upper << 16) if upper < _INFINITY else 2.0**128


def largest_threshold_of(dtype: torch.dtype) -> float:
    """The largest threshold that entries of this dtype can be set to. A smaller one than wanted keeps more entries."""
    return min(_LARGEST, _of_bits(bits_of(min(torch.finfo(dtype).max, _LARGEST)) & 0xFFFF0000))


# ---------------------------------------------------------------- what a threshold makes of entries


class DrawSums(NamedTuple):
    """What a threshold makes of some entries. Squares are of magnitudes over the threshold, times 2^48."""

    probabilities: Tensor
    """The sum of each row's probabilities, in units of 2^-24, int64 [N]."""
    certain: int
    """The number of entries of probability 1, from the threshold on."""
    squares_below: float
    """The sum over the entries below the threshold."""
    squares: float
    """The sum over all finite entries."""

    @property
    def below(self) -> float:
        """The sum of the probabilities of the entries below the threshold."""
        return (float(int(self.probabilities.sum())) - self.certain * ONE) / ONE


def sums_of(keys: Tensor, threshold: float) -> DrawSums:
    """The sums over the entries with these keys [N, O], in the order in which native code adds."""
    scaled = keys.int().view(torch.float32) * _scale(threshold, keys.device)
    squares, none = scaled * scaled, torch.zeros((), device=keys.device)
    below = keys < bits_of(threshold)
    return DrawSums(
        probabilities_of(keys, threshold).sum(dim=1),
        int((~below).sum()),
        _sum(torch.where(below, squares, none)),
        _sum(torch.where(keys < _INFINITY << 16, squares, none)),
    )


def _sum(squares: Tensor) -> float:
    """In float32 for each place in a group of a row, then of halves of the places; in float64 over rows and blocks."""
    rows, width = squares.shape
    places = torch.zeros(rows, GROUP, device=squares.device)
    for group in pad(squares, (0, -width % GROUP)).split(GROUP, dim=1):
        places = places + group
    while places.shape[1] > 1:
        places = places[:, : places.shape[1] // 2] + places[:, places.shape[1] // 2 :]
    block = max(8, -(-rows // 32))
    of_rows = places[:, 0].double().tolist()
    return _in_order(_in_order(of_rows[begin : begin + block]) for begin in range(0, rows, block))


def _in_order(numbers: Iterable[float]) -> float:
    return reduce(add, numbers, 0.0)  # what `sum` does depends on the version of Python


def _scale(threshold: float, device: torch.device) -> Tensor:
    return torch.tensor(float(ONE), dtype=torch.float32, device=device) / threshold


def probabilities_of(keys: Tensor, threshold: float) -> Tensor:
    """The probabilities of entries with these keys, in units of 2^-24."""
    share = (keys.int().view(torch.float32) * _scale(threshold, keys.device)).nan_to_num(0.0, 0.0).round().long()
    return torch.where(keys >= bits_of(threshold), ONE, share)


# ---------------------------------------------------------------- the search for a threshold


class ThresholdSearch:
    """The search for the largest threshold that a budget of noise and a least number of entries allow.

    Thresholds are magnitudes in bfloat16, which the class counts by their upper halves. The noise and the number of
    certain entries are known for the thresholds that were tried. The next one is that of Newton's method. The noise is
    a convex function of the threshold, so that the steps come closer from above.

    Args:
        noise: So many times the sum of squares is the budget.
        count: So many entries have to be kept on average.
    """

    def __init__(self, noise: float, count: float) -> None:
        self.noise, self.count = noise, count
        self.allowed, self.forbidden, self.steps = _LEAST_UPPER - 1, _INFINITY, 0

    def next(self, threshold: float, sums: DrawSums) -> float:
        """The threshold to try after this one, or this one if it is found.

        It is found if it uses up one of the limits but for SLACK of it, or if no larger one is allowed. 0 says that no
        threshold is allowed. A threshold so large that squares vanish is not allowed.
        """
        below, kept = sums.below, sums.certain + sums.below
        added, budget = below - sums.squares_below / 2.0**48, self.noise * (sums.squares / 2.0**48)
        allowed = budget > 0 and added <= budget and kept >= self.count
        if allowed:
            self.allowed = _upper_of(threshold)
        else:
            self.forbidden = _upper_of(threshold)
        if allowed and (added >= budget * (1 - SLACK) or kept <= self.count * (1 + SLACK)):
            return threshold
        if self.forbidden - self.allowed > 1:
            upper = self._guess(threshold, sums.certain, below, added, budget)
            return _of_upper(min(max(upper, self.allowed + 1), self.forbidden - 1))
        return 0.0 if self.allowed < _LEAST_UPPER else _of_upper(self.allowed)

    def _guess(self, threshold: float, certain: int, below: float, added: float, budget: float) -> int:
        """Where the tangent meets the middle of what is accepted, or the middle of what is left to search."""
        self.steps += 1
        if self.steps > _NEWTON_STEPS or not budget > 0:
            return (self.allowed + self.forbidden) // 2
        middle = 1 - SLACK / 2
        least = self.count / middle - certain
        by_noise = threshold * (1 + (budget * middle - added) / below) if below > 0 else math.inf
        by_count = threshold * max(below / least, _LEAST_STEP) if least > 0 else math.inf
        found = min(by_noise, by_count, _LARGEST_STEP * threshold)
        return _upper_of(max(found, 0.0)) if found < _LARGEST else _INFINITY - 1


def _next_for_count(threshold: float, sums: DrawSums, count: int, last_certain: int) -> float:
    """The threshold to try after this one, for which the probabilities shall add up to `count`.

    The last one had so many certain entries. If fewer than `count`, this threshold is not too small but by rounding. It
    is found then if no entry has become certain or uncertain, or if `count` entries are certain. From above, the steps
    come closer.
    """
    below, certain = sums.below, sums.certain
    not_too_small = 0 <= last_certain < count
    if (not_too_small and (certain == last_certain or certain >= count)) or (certain == count and below == 0):
        return threshold
    if certain >= count:
        return min(2.0 * threshold, _LARGEST)
    if below == 0:
        return threshold * _LEAST_STEP
    return _of_bits(bits_of(min(threshold * (below / (count - certain)), _LARGEST)))


def _sample(keys: Tensor) -> tuple[Tensor, float]:
    """Groups of neighbours in rows of keys [N, O], one after the other [1, *], and their share of all entries.

    A matrix of few groups is copied whole.
    """
    rows, width = keys.shape
    in_row = -(-width // GROUP)
    groups = pad(keys, (0, -width % GROUP)).reshape(rows * in_row, GROUP)
    step = rows * in_row // _SAMPLED | 1
    sizes = [min(GROUP, width - number % in_row * GROUP) for number in range(0, rows * in_row, step)]
    return groups[::step].reshape(1, -1), sum(sizes) / max(rows * width, 1)


def _first_threshold(keys: Tensor, noise: float, count: int) -> float:
    """The threshold that is right for a sample of the keys [N, O]. 0 if all keys are those of zeros."""
    sample, share = _sample(keys)
    finite = sample[(sample > 0) & (sample < _INFINITY << 16)]
    if len(finite) == 0:
        most = int(keys.max()) >> 16 if len(keys) > 0 else 0
        return _of_upper(min(max(most, _LEAST_UPPER), _INFINITY - 1)) if (keys > 0).any() else 0.0
    search = ThresholdSearch(noise, count * share)
    most = threshold = _of_upper(max(int(finite.max()) >> 16, _LEAST_UPPER))
    while True:
        following = search.next(threshold, sums_of(sample, threshold))
        if following == 0:
            return most
        if following == threshold:
            return threshold
        threshold = following


def threshold_for_draws(keys: Tensor, noise: float | None, count: int) -> float:
    """The threshold for draws of entries with keys [N, O]. 0 if every entry that is not zero is kept.

    With `noise` it is the largest one within the budget that keeps `count` entries or more on average. Otherwise it is
    the one for which the probabilities add up to `count`.
    """
    threshold = _first_threshold(keys, math.inf if noise is None else noise, count)
    search, certain = ThresholdSearch(0.0 if noise is None else noise, count), -1
    for step in range(_MOST_STEPS + 1):
        if threshold == 0:
            break
        sums = sums_of(keys, threshold)
        following = _next_for_count(threshold, sums, count, certain) if noise is None else search.next(threshold, sums)
        if following == threshold or step == _MOST_STEPS:
            break
        threshold, certain = following, sums.certain if sums.below > 0 else -1
        if _upper_of(threshold) < _LEAST_UPPER:
            return 0.0
    return threshold


# ---------------------------------------------------------------- the largest entries that hold a share of the energy


class Distribution(NamedTuple):
    """How many entries have which upper half. Only finite entries that are not zero have one here."""

    uppers: list[int]
    counts: list[int]
    width: float
    """The magnitudes of an upper half are between its edge and this part of the way to the next one."""

    @classmethod
    def of(cls, grad: Tensor) -> Distribution:
        """That of the entries of grad [N, O]."""
        counts = torch.bincount((keys_of(grad) >> 16).flatten(), minlength=_INFINITY + 1)
        uppers = counts[1:_INFINITY].nonzero()[:, 0] + 1
        return cls(uppers.tolist(), counts[uppers].tolist(), 0.0 if grad.dtype == torch.bfloat16 else 1.0)

    def bound(self, upper: int) -> float:
        """What no magnitude of this upper half is above."""
        return _edge(upper) + self.width * (_edge(upper + 1) - _edge(upper))


def cut_for_energy(of: Distribution, share: float) -> int:
    """The largest key that is left out."""
    kept = left_out = 0.0
    for upper, count in zip(of.uppers, of.counts, strict=True):
        left_out += count * of.bound(upper) * of.bound(upper)
    for upper, count in zip(reversed(of.uppers), reversed(of.counts), strict=True):
        kept += count * _edge(upper) * _edge(upper)
        left_out -= count * of.bound(upper) * of.bound(upper)
        if kept >= share * (kept + max(left_out, 0.0)):
            return (upper << 16) - 1
    return 0
