"""Rounding to bfloat16 up or down at random, so that the mean is what is rounded."""

from __future__ import annotations

from types import EllipsisType

import torch
from torch import Tensor

Places = Tensor | EllipsisType
"""The indices of rows, or all rows."""

_LARGEST = torch.finfo(torch.bfloat16).max
_WORD, _LONG = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def key_of(number: int) -> int:
    """The key of a number: one of 63 bits, which looks random. It is the generator SplitMix64 (Steele et al., 2014)."""
    key = (number + 1) * 0x9E3779B97F4A7C15 & _LONG
    key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & _LONG
    key = (key ^ key >> 27) * 0x94D049BB133111EB & _LONG
    return (key ^ key >> 31) >> 1


def stochastic(values: Tensor, shape: torch.Size, at: Places, key: int, *, is_second: bool = False) -> Tensor:
    """Rounds rows of a tensor to one of the two neighbours in bfloat16, up with the probability that keeps the mean.

    Each entry has a random word of 32 bits, a function of the key and of the entry's number in the order of the rows.
    The lower half of the word is added to the bits of the entry. Then the lower half of the sum is cut off.

    Args:
        values: The rows [k, *], float32. NaN stays NaN, and infinity stays infinity. Beyond the largest number of
            bfloat16 they are rounded down, as up is infinity.
        shape: The shape [O, *] of the tensor.
        at: Which of its rows they are.
        key: The key, from 0 to 2^63 - 1, which looks random (`key_of`).
        is_second: Whether the upper half of the word is added instead, so that two states have numbers of their own.

    Returns:
        The rounded rows [k, *], bfloat16.
    """
    word = _mixed(torch.arange(shape.numel(), device=values.device).view(shape)[at], key)
    random = (word >> 16 if is_second else word & 0xFFFF).int()
    random = torch.where(values.abs() < _LARGEST, random, 0)
    rounded = (values.contiguous().view(torch.int32) + random & ~0xFFFF).view(torch.float32)
    return torch.where(values.isnan(), torch.nan, rounded).bfloat16()


def _mixed(entries: Tensor, key: int) -> Tensor:
    """The random words of entries, int64: their numbers, mixed with both words of the key.

    It is the last mixing of MurmurHash3 (Appleby), with the second word of the key added in the middle.
    """
    word = entries & _WORD ^ key & _WORD
    word = (word ^ word >> 16) * 0x85EBCA6B + (key >> 32) & _WORD
    word = (word ^ word >> 13) * 0xC2B2AE35 & _WORD
    return word ^ word >> 16
