"""What bounds a case: counted work against limits that are measured in the same process.

The limits are proxies, the best that torch itself reaches with the threads in use, not data-sheet numbers:
multiply-adds by a large square matrix product; cache by summing a tensor that lies in one core's L2; memory by copying
as many bytes as the case moves, so that a case that fits a cache is held against that cache. A case may therefore beat
its bound somewhat: by lines that it reuses in L1, or because a limit was disturbed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from meprop.bench.measure import interleaved

Bound = Literal["arithmetic", "cache", "memory"]

_SECONDS = 0.5  # for each limit
_COPY_SECONDS = 0.1  # for each number of bytes
_SQUARE = 2048
_SMALL_KIB, _LARGE_KIB = 128, 512  # beyond L1, within L2


@dataclass(frozen=True)
class Work:
    """What a case cannot avoid doing.

    Attributes:
        multiply_adds: Of the products.
        cache_bytes: Bytes from L2 to L1: of gathered lines, each used once when it arrives.
        memory_bytes: Bytes of operands read and results written, each once.
    """

    multiply_adds: int
    cache_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class Limits:
    """What this machine reaches, per second: multiply-adds by dtype ("fp32", "bf16"), and bytes from L2 to L1."""

    multiply_adds: dict[str, float]
    cache_bytes: float


@dataclass(frozen=True)
class Roofline:
    """The floor under a case's time.

    Attributes:
        work: What was counted.
        seconds: What each part of the work takes at least.
        bound: The part that takes longest.
    """

    work: Work
    seconds: dict[Bound, float]
    bound: Bound

    @property
    def floor(self) -> float:
        """Seconds below which the case cannot get while these limits hold."""
        return self.seconds[self.bound]


def measure_limits() -> Limits:
    """Measure the limits that do not depend on the case, with torch's current number of threads."""
    small = _multiply_adds_per_second(["fp32", "bf16"], _SQUARE // 8)
    # A large product takes minutes on a CPU without instructions for bf16.
    dtypes = ["fp32", "bf16"] if small["bf16"] > small["fp32"] / 4 else ["fp32"]
    rates = _multiply_adds_per_second(dtypes, _SQUARE)
    # bf16 numbers can be multiplied as fp32 ones: where torch's own bf16 product is the slower one, it is no limit.
    rates["bf16"] = max(rates.values())
    return Limits(rates, _cache_bytes_per_second())


def _multiply_adds_per_second(dtypes: list[str], size: int) -> dict[str, float]:
    squares = {"fp32": torch.randn(size, size), "bf16": torch.randn(size, size).bfloat16()}
    times = interleaved({dtype: lambda square=squares[dtype]: square @ square for dtype in dtypes}, _SECONDS)
    return {dtype: size**3 / times[dtype].best for dtype in dtypes}


def _cache_bytes_per_second() -> float:
    """Of all threads together. The difference of two sizes is free of what a call costs beside the reading."""
    threads = torch.get_num_threads()
    small, large = (torch.randn(kib * 1024 // 4) for kib in (_SMALL_KIB, _LARGE_KIB))
    torch.set_num_threads(1)
    try:
        times = interleaved({"small": small.sum, "large": large.sum}, _SECONDS)
    finally:
        torch.set_num_threads(threads)
    more, whole = times["large"].best - times["small"].best, times["large"].best
    if more <= 0:  # disturbed: be content with a call's whole time
        return threads * _LARGE_KIB * 1024 / whole
    return threads * (_LARGE_KIB - _SMALL_KIB) * 1024 / more


def roofline(work: Work, dtype: str, limits: Limits) -> Roofline:
    """Return the floor of a case of this dtype ("fp32" or "bf16")."""
    seconds: dict[Bound, float] = {
        "arithmetic": work.multiply_adds / limits.multiply_adds[dtype],
        "cache": work.cache_bytes / limits.cache_bytes,
        "memory": copy_seconds(work.memory_bytes),
    }
    return Roofline(work, seconds, max(seconds, key=lambda part: seconds[part]))


def copy_seconds(count: int) -> float:
    """Return the seconds to read half of so many bytes and write the other half."""
    source = torch.ones(max(1, count // 8))  # float32
    target = torch.zeros_like(source)
    return interleaved({"copy": lambda: target.copy_(source)}, _COPY_SECONDS)["copy"].best
