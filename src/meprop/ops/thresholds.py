"""Thresholds of magnitudes, literally: what the native code of `choose_entries` is compared with.

`meprop.ops.entries` says what a key, its upper half and a threshold are.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ONE = 1 << 24
"""The probability 1, in the units of probabilities."""
LEAST_THRESHOLD = 2.0**-100
"""The inverse of a smaller threshold might overflow."""
_INFINITY = 0x7F80  # the upper half of its key


def keys_of(grad: Tensor) -> Tensor:
    """The keys of the magnitudes, int64."""
    bits = grad.abs().float().view(torch.int32).long()
    return bits.clamp(max=(_INFINITY << 16) + 1)


def _of_bits(bits: int) -> float:
    return struct.unpack("f", struct.pack("I", bits))[0]


def bits_of(value: float) -> int:
    """The bits of the nearest float32."""
    return struct.unpack("I", struct.pack("f", value))[0]


def _edge(upper: int) -> float:
    """The least magnitude of an upper half. That of infinity stands for 2^128, the end of the last finite one."""
    return _of_bits(upper << 16) if upper < _INFINITY else 2.0**128


def _threshold_below(value: float) -> float:
    """The largest threshold that is not above a positive value."""
    if value >= _edge(_INFINITY - 1):
        return _edge(_INFINITY - 1)
    nearest = bits_of(value)
    return _of_bits((nearest - (_of_bits(nearest) > value)) & 0xFFFF0000)


class Distribution(NamedTuple):
    """How many entries have which upper half. Only finite entries that are not zero have one here."""

    uppers: list[int]
    counts: list[int]
    entries: int
    """The number of entries that are not zero, with those that are not finite."""
    width: float
    """The magnitudes of an upper half are between its edge and this part of the way to the next one."""

    @classmethod
    def of(cls, grad: Tensor) -> Distribution:
        """That of the entries of grad [N, O]."""
        counts = torch.bincount((keys_of(grad) >> 16).flatten(), minlength=_INFINITY + 1)
        uppers = counts[1:_INFINITY].nonzero()[:, 0] + 1
        width = 0.0 if grad.dtype == torch.bfloat16 else 1.0
        return cls(uppers.tolist(), counts[uppers].tolist(), int(counts[1:].sum()), width)

    @property
    def error(self) -> float:
        """The middle of an upper half is at most this part of a magnitude away from it."""
        return self.width / 256

    def bound(self, upper: int) -> float:
        """What no magnitude of this upper half is above."""
        return _edge(upper) + self.width * (_edge(upper + 1) - _edge(upper))

    def middle(self, upper: int) -> float:
        """What the magnitudes of this upper half count as."""
        return _edge(upper) + self.width / 2 * (_edge(upper + 1) - _edge(upper))


def _largest_threshold(of: Distribution, limit: Callable[[float, float, int], float]) -> float:
    """The largest threshold that is not above limit(sum, squares, others).

    These are the sum of the magnitudes below the threshold, the sum of their squares, and the number of all other
    entries. The limit falls as the threshold rises.
    """
    total = squares = last = 0.0
    most, others = math.inf, of.entries
    for upper, count in zip(of.uppers, of.counts, strict=True):
        if total > 0:
            most = limit(total, squares, others)
        if most < _edge(upper):
            break
        magnitude = of.middle(upper)
        total += count * magnitude
        squares += count * magnitude * magnitude
        others -= count
        last = _edge(upper)
    if total == 0:
        return 0.0
    if most >= last:
        most = limit(total, squares, others)
    return _threshold_below(max(most, last))


def largest_threshold_of(dtype: torch.dtype) -> float:
    """The largest threshold that entries of this dtype can be set to. A smaller one than wanted keeps more entries."""
    return _threshold_below(torch.finfo(dtype).max)


def _limit_of_count(count: int, total: float, others: int) -> float:
    """The threshold that keeps `count` entries on average."""
    return total / (count - others) if count > others else math.inf


def threshold_for_noise(of: Distribution, noise: float, count: int) -> float:
    """The largest threshold within the budget that keeps `count` entries or more on average. 0 if all are zero."""
    squares = 0.0
    for upper, entries in zip(of.uppers, of.counts, strict=True):
        squares += entries * of.middle(upper) * of.middle(upper)
    budget = noise * squares * (1 - 2 * of.error)

    def limit(total: float, below: float, others: int) -> float:
        return min((budget + below) / (total * (1 + of.error)), _limit_of_count(count, total, others))

    return _largest_threshold(of, limit)


def threshold_for_count(grad: Tensor, of: Distribution, count: int) -> float:
    """The threshold for which the probabilities add up to `count`. 0 if no more entries are not zero."""
    if count >= of.entries:
        return 0.0
    upper = 1 + of.error
    least = _largest_threshold(of, lambda total, _, others: _limit_of_count(count, total * upper, others))
    threshold, kept = _of_bits(min(bits_of(least) + 0x10000, (_INFINITY - 1) << 16)), -1
    while threshold > LEAST_THRESHOLD:  # an entry that comes to be kept for certain leaves the others more
        keys = keys_of(grad)
        certain = int((keys >= bits_of(threshold)).sum())
        below = (int(probabilities_of(keys, threshold).sum()) - certain * ONE) / ONE
        if certain == kept or certain >= count or below <= 0:
            break
        kept, threshold = certain, _of_bits(bits_of(threshold * below / (count - certain)))
    return threshold


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


def probabilities_of(keys: Tensor, threshold: float) -> Tensor:
    """The probabilities of entries with these keys, in units of 2^-24."""
    scale = torch.tensor(float(ONE), dtype=torch.float32, device=keys.device) / threshold
    share = (keys.int().view(torch.float32) * scale).nan_to_num(0.0, 0.0).round().long()
    return torch.where(keys >= bits_of(threshold), ONE, share)
