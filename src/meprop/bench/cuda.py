"""The CUDA device that a benchmark runs on: what it is, how it is set up, and how calls are captured on it.

Tests have a subclass of `Card` that is a CPU.
"""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from meprop.bench.events import Call, Event, copies, interleaved
from meprop.bench.measure import Times
from meprop.bench.problem import DTYPES, Device, Dtype
from meprop.bench.record import Record
from meprop.bench.roofline import Bound, Roofline, Work
from meprop.errors import MepropError
from meprop.reporting import pages

Mode = Literal["eager", "graph"]

_BUDGET = 8 * 2**30  # bytes of all copies of a case's operands
_SECONDS = 0.3  # for the limits of arithmetic together
_COPY_SECONDS = 0.05  # for each number of bytes
_SQUARE = 8192


class CaptureError(MepropError):
    """A call cannot be captured in a CUDA graph. The message says why."""


@dataclass(frozen=True)
class Facts:
    """What is recorded of a card.

    Attributes:
        name: Of the model.
        memory_gib: Its memory in GiB.
        l2_mib: Its L2 cache in MiB.
        driver: The version of the driver; None if it is unknown.
        cuda: The version of CUDA that torch was built for.
    """

    name: str
    memory_gib: float
    l2_mib: float
    driver: str | None
    cuda: str | None

    def __str__(self) -> str:
        return (
            f"{self.name}, {self.memory_gib:.0f} GiB, {self.l2_mib:.0f} MiB of L2, driver {self.driver or 'unknown'}, "
            f"CUDA {self.cuda}"
        )


@dataclass(frozen=True)
class Card:
    """The current CUDA device.

    Attributes:
        facts: For the record.
        l2_bytes: The size of its L2 cache.
        device: Where tensors go.
    """

    facts: Facts
    l2_bytes: int
    device: Device = "cuda"

    @classmethod
    def find(cls) -> Card:
        """Return the current device.

        Raises:
            MepropError: There is none.
        """
        if not torch.cuda.is_available():
            built = "" if torch.version.cuda else " (built without CUDA)"
            raise MepropError(
                f"--device cuda: torch {torch.__version__}{built} finds no CUDA device; use --device cpu, or a machine "
                "with an NVIDIA card, its driver, and a torch for CUDA"
            )
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts = Facts(
            found.name, round(found.total_memory / 2**30, 1), found.L2_cache_size / 2**20, _driver(), torch.version.cuda
        )
        return cls(facts, found.L2_cache_size)

    @contextmanager
    def session(self) -> Generator[None]:
        """Make all calls on a stream of their own, which can be captured, and let float32 products use TF32.

        Autograd runs a backward pass on the stream of its forward pass. So both have to be within.
        """
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                yield
                torch.cuda.synchronize()
        finally:
            torch.set_float32_matmul_precision(before)

    def event(self) -> Event:
        """Return an event that notes the time."""
        return torch.cuda.Event(enable_timing=True)

    def release(self) -> None:
        """Give back the memory that nothing uses any more."""
        gc.collect()
        torch.cuda.empty_cache()

    def capture(self, call: Call) -> Call:
        """Return the replay of a CUDA graph of a call that has been made before, within `session`.

        Raises:
            CaptureError: The call waits for the device, or does something else that a graph cannot have.
        """
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")  # what waits is found out without a broken capture
        try:
            call()
        except RuntimeError as error:
            raise CaptureError(_first_line(error)) from error
        finally:
            torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin()
            try:
                call()
            finally:
                graph.capture_end()
        except RuntimeError as error:
            _end_failed_capture()
            raise CaptureError(_first_line(error.__context__ or error)) from error  # within the capture, or of its end
        return graph.replay

    def copies(self, operand_bytes: int) -> int:
        """Return how many copies of operands do not fit the cache, within 8 GiB."""
        return copies(operand_bytes, self.l2_bytes, _BUDGET)

    def time(self, sides: Mapping[str, Sequence[Call]], seconds: float) -> dict[str, Times]:
        """Return the times of the sides; see `events.interleaved`."""
        return interleaved(sides, seconds, self.event)

    def time_both(self, sides: Mapping[str, Sequence[Call]], seconds: float) -> tuple[dict[str, Times], dict[str, str]]:
        """Time each side as it is and as a graph, all in turns.

        Args:
            sides: By name, calls on copies of the operands.
            seconds: To spend on all of them together.

        Returns:
            The times, by the names "SIDE eager" and "SIDE graph", and why a side has no graph, by its name.
        """
        modes: dict[str, Sequence[Call]] = {f"{name} eager": calls for name, calls in sides.items()}
        uncaptured: dict[str, str] = {}
        for name, calls in sides.items():
            for call in calls:
                call()
            try:
                modes[f"{name} graph"] = [self.capture(call) for call in calls]
            except CaptureError as error:
                uncaptured[name] = str(error)
        return self.time(modes, seconds), uncaptured


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _end_failed_capture() -> None:
    """Bring the random numbers back, which a failed capture leaves in the state of a capture."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())


# ---------------------------------------------------------------- times and ratios


def mode_of(times: Mapping[str, Times], *sides: str) -> Mode:
    """Return how sides are compared: as graphs if all have one."""
    return "graph" if all(f"{side} graph" in times for side in sides) else "eager"


def without_graph(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each reason why something has no graph.

    Args:
        reasons: (what it is, why) of each.
    """
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons:
        by_reason.setdefault(reason, []).append(name)
    return [f"no graph of {', '.join(names)}: {reason}" for reason, names in by_reason.items()]


# ---------------------------------------------------------------- what bounds a case


@dataclass(frozen=True)
class Limits:
    """What the card reaches: multiply-adds per second by dtype, those of "fp32" in TF32."""

    multiply_adds: dict[str, float]

    def __str__(self) -> str:
        rates = ", ".join(f"{rate / 1e12:.0f} ({dtype})" for dtype, rate in self.multiply_adds.items())
        return f"{rates} T multiply-adds/s"


def measure_limits(card: Card) -> Limits:
    """Return the rates of a large square product in each dtype, which are those of the tensor cores."""
    squares = {dtype: torch.randn(_SQUARE, _SQUARE, device=card.device).to(DTYPES[dtype]) for dtype in DTYPES}
    sides: dict[str, Sequence[Call]] = {
        dtype: [lambda square=square: square @ square] for dtype, square in squares.items()
    }
    times = card.time(sides, _SECONDS)
    return Limits({dtype: _SQUARE**3 / each.p20 for dtype, each in times.items()})


def roofline(work: Work, dtype: Dtype, limits: Limits, card: Card) -> Roofline:
    """Return the floor of a case: its products at the measured rate, or a copy of as many bytes beyond the cache."""
    seconds: dict[Bound, float] = {
        "arithmetic": work.multiply_adds / limits.multiply_adds[dtype],
        "memory": copy_seconds(work.memory_bytes, card),
    }
    return Roofline(work, seconds, max(seconds, key=lambda part: seconds[part]))


def copy_seconds(count: int, card: Card) -> float:
    """Return the seconds to read half of so many bytes and write the other half, from and to memory."""
    half = (count // 512 + 1) * 256  # whole lines
    pairs = [torch.ones(2, half, dtype=torch.uint8, device=card.device) for _ in range(card.copies(2 * half))]
    calls = [lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs]
    return card.time({"copy": calls}, _COPY_SECONDS)["copy"].p20


# ---------------------------------------------------------------- the record


@dataclass(frozen=True)
class CardRecord(Record):
    """What is recorded beside the results of a benchmark on a card."""

    card: Facts

    @property
    def circumstances(self) -> str:
        """Where and by what it was made, in words."""
        versions = self.versions
        return (
            f"{self.card}; torch {versions['torch']}, meprop {versions['meprop']}, {pages.short_commit(self.commit)}. "
            f"Host: {self.machine['cpu']}. Products of float32 are in TF32."
        )
