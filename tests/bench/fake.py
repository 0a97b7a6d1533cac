"""A timer whose times are given, so that ratios can be computed by hand, and a card that is a CPU."""

from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar

import torch

import meprop
from meprop.bench import cuda
from meprop.bench.measure import Times
from meprop.selection import RowSelection


def fixed(monkeypatch, module, seconds):
    """Lets the timer say that the calls of each side took so many seconds: their 20th percentile, and their median."""

    def interleaved(sides, _budget):
        return {name: Times(0.0, *seconds[name], 9.0, 9) for name in sides}

    monkeypatch.setattr(module, "interleaved", interleaved)


class FakeEvent:
    """An event of a device whose clock moves as `FakeCard.now` says. It is noted when it is recorded."""

    def __init__(self, now):
        self._now, self.time = now, None

    def record(self):
        self.time = self._now()

    def synchronize(self):
        assert self.time is not None

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


_FACTS = cuda.Facts("a card", 80.0, 1.0, "1.2", "13.0")


@dataclass(frozen=True)
class FakeCard(cuda.Card):
    """A CPU in the place of a card. A call that raises an error while `capturing` cannot be captured."""

    facts: cuda.Facts = _FACTS
    l2_bytes: int = 1024
    device: str = "cpu"
    capturing: ClassVar[bool] = False

    @contextmanager
    def session(self):
        yield

    def event(self):
        return FakeEvent(perf_counter)

    def release(self):
        pass

    def capture(self, call):
        FakeCard.capturing = True
        try:
            call()
        except RuntimeError as error:
            raise cuda.CaptureError(str(error)) from error
        finally:
            FakeCard.capturing = False
        return lambda: call()


class FakeRows(meprop.Sampled):
    """A rule that draws a share of the rows, each as likely as another, and scales them up."""

    def __init__(self, share):
        super().__init__(share)

    def count(self, features):
        return None

    def as_entries(self, features, device):
        return None

    def select(self, grad_output_NO):
        rows, width = grad_output_NO.shape
        k = round(self.k * rows)
        kept = torch.randperm(rows)[:k].sort().values
        starts = torch.zeros(rows + 1, dtype=torch.int64)
        starts[kept + 1] = width
        indices = torch.arange(width, dtype=torch.int32).repeat(k)
        values = (grad_output_NO[kept] * (rows / k)).flatten()
        return RowSelection(values, indices, width, starts=starts.cumsum(0))
