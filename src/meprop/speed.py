"""Whether a layer's sparse passes are faster than the dense ones on this machine.

Each kind of layer is measured once. The measurement is remembered on disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from meprop import machine, timing
from meprop.errors import MepropError
from meprop.ops import native
from meprop.ops.registry import in_graph
from meprop.rules import Rule

# A layer turns sparse only for a gain that the next measurement will not take back.
_LEAST_GAIN = 1.05

# The shares of the entries that are timed in place of a share that depends on the gradient. Most layers have about the
# first one after some hundred steps. The second shows how the time grows with what is kept.
_USUAL_SHARE, _LARGER_SHARE = 0.04, 0.25

# Each pass is timed at least _LEAST_REPEATS times, then until _SECONDS are spent or _MOST_REPEATS are reached.
_LEAST_REPEATS, _MOST_REPEATS, _SECONDS = 5, 40, 0.1

# For so many seconds a process waits for another one that writes its measurement.
_LONGEST_WAIT = 5.0

# The shares of nonzero entries in an input with which a forward pass that leaves out its zeros is timed.
_FEW_NONZEROS, _MANY_NONZEROS = 0.1, 0.4

Passes = tuple[Callable[[], object], Callable[[], object]]
"""What is timed on random data, dense and sparse: a forward and backward pass, or a forward pass alone."""

Kept = TypeVar("Kept", contravariant=True)


class Shape(Protocol[Kept]):
    """What the speed of a layer depends on, beside the machine. Its str() is a short unique text.

    What the sparse pass keeps is told by a rule, or by the share of nonzero entries in its input.
    """

    @property
    def rows(self) -> int:
        """N, the number of rows of the pass that decides."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the pass."""
        ...

    @property
    def device(self) -> str:
        """The type of the device, "cpu" or "cuda"."""
        ...

    def passes(self, kept: Kept, /) -> Passes:
        """The passes of such a layer, to be timed."""
        ...


@dataclass(frozen=True)
class Decision:
    """Which backward pass a layer takes from its first one on, and the measurement behind that.

    Attributes:
        sparse: Whether the layer takes the sparse backward pass.
        rows: N, the number of rows of the pass that decided.
        dense_us: The time of a forward and a dense backward pass, in microseconds. It is a lower quartile.
        sparse_us: The time of a forward and a sparse backward pass, in microseconds. It is a lower quartile.
        break_even: The share of the entries from which on dense is faster, if what is kept depends on the gradient. It
            is 1.0 for other rules.
    """

    sparse: bool
    rows: int
    dense_us: float
    sparse_us: float
    break_even: float = 1.0

    def __str__(self) -> str:
        ratio = self.dense_us / self.sparse_us
        verdict = f"{ratio:.1f}x as fast as dense" if self.sparse else f"sparse is not faster ({ratio:.2f}x)"
        limit = f", as fast as dense at {self.break_even:.0%} kept" if self.sparse and self.break_even < 1 else ""
        return f"{verdict} with {self.rows} rows: {self.sparse_us:.0f} us against {self.dense_us:.0f}, measured{limit}"


def can_measure() -> bool:
    """Whether passes take their time here: not while a graph is traced, nor on the tensors of a FakeTensorMode."""
    if in_graph():
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None  # pyright: ignore


def decide(rule: Rule, shape: Shape[Rule]) -> Decision:
    """The faster backward pass for a layer of this shape on this machine. It is measured now if it was not before.

    A rule whose density depends on the gradient is measured by its `typical` rules, because the data are random. The
    break-even is where a line through the two times is as fast as dense.
    """
    usual, larger = rule.typical(_USUAL_SHARE), rule.typical(_LARGER_SHARE)
    dense_us, sparse_us = _times(usual, shape)
    sparse = sparse_us * _LEAST_GAIN < dense_us
    if not sparse or larger == usual:
        return Decision(sparse, shape.rows, dense_us, sparse_us)
    dense_again_us, larger_us = _times(larger, shape)
    break_even = _break_even({_USUAL_SHARE: sparse_us / dense_us, _LARGER_SHARE: larger_us / dense_again_us})
    return Decision(sparse, shape.rows, dense_us, sparse_us, break_even)


def most_nonzeros(shape: Shape[float]) -> float:
    """The largest share of nonzero entries in an input with which a forward pass that leaves out its zeros is faster.

    It is measured now if it was not before.
    """
    return _most_nonzeros(shape, torch.get_num_threads(), native.level())


@cache
def _most_nonzeros(shape: Shape[float], _threads: int, _level: str | None) -> float:
    times = {share: _times(share, shape) for share in (_FEW_NONZEROS, _MANY_NONZEROS)}
    ratios = {share: sparse_us / dense_us for share, (dense_us, sparse_us) in times.items()}
    if ratios[_MANY_NONZEROS] <= ratios[_FEW_NONZEROS]:  # which is a disturbance
        return _MANY_NONZEROS if ratios[_MANY_NONZEROS] * _LEAST_GAIN < 1 else 0.0
    return max(0.0, _break_even(ratios))


def _break_even(ratios: Mapping[float, float]) -> float:
    """The share at which a line through two ratios of times, sparse to dense, has the least gain. It is at most 1.

    Args:
        ratios: Of two shares, by share, the lower one first. The first has that gain, or the second is larger.
    """
    (share, ratio), (larger_share, larger_ratio) = ratios.items()
    if larger_ratio <= ratio:
        return 1.0
    slope = (larger_ratio - ratio) / (larger_share - share)
    return min(1.0, share + (1.0 / _LEAST_GAIN - ratio) / slope)


def _times(kept: Any, shape: Shape[Any]) -> tuple[float, float]:
    """The times of `measure`, from the file of what was measured on this machine if they are there."""
    path, key = _memory(), _key(kept, shape)
    # An address in the rule's repr, or in that of what it holds: another process has other ones.
    if path is None or " at 0x" in key:
        return measure(kept, shape)
    try:
        dense_us, sparse_us = (float(value) for value in _read(path)[key])
    except (KeyError, TypeError, ValueError):  # not measured yet, or not by us
        dense_us, sparse_us = measure(kept, shape)
        _remember(path, key, (dense_us, sparse_us))
    return dense_us, sparse_us


def measure(kept: Any, shape: Shape[Any]) -> tuple[float, float]:
    """The times of `Shape.passes`, on random data.

    The two are timed in turn. Both results are lower quartiles in microseconds.
    """
    # This runs within a forward or backward pass. That pass has modes, hooks (of checkpointing) and random numbers.
    # They must not change the measurement, and the measurement must not change them.
    devices = [torch.cuda.current_device()] if shape.device == "cuda" else []
    no_hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with (
        torch.random.fork_rng(devices),
        torch.enable_grad(),
        torch.autocast(shape.device, enabled=False),
        no_hooks,
        _disable_current_modes(),
    ):
        dense, sparse = shape.passes(kept)
        spent = timing.interleaved(
            {"dense": dense, "sparse": sparse},
            _SECONDS,
            least=_LEAST_REPEATS,
            most=_MOST_REPEATS,
            synchronize=torch.cuda.synchronize if shape.device == "cuda" else lambda: None,
        )
    dense_us, sparse_us = (1e6 * sorted(calls)[len(calls) // 5] for calls in spent.values())
    return dense_us, sparse_us


def random_tensors(shape: Shape[Any], *sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """Random normal tensors for `Shape.passes`."""
    generator = torch.Generator(shape.device).manual_seed(0)
    return [torch.randn(size, generator=generator, device=shape.device).to(shape.dtype) for size in sizes]


def _memory() -> Path | None:
    """The file of what was measured on this machine; None where there is no folder for it."""
    try:
        return machine.cache_folder() / "speed" / f"{_fingerprint()}.json"
    except MepropError:
        return None


def _key(kept: Any, shape: Shape[Any]) -> str:
    return f"{kept} {shape.device} {str(shape.dtype).removeprefix('torch.')} {shape}"


def _fingerprint() -> str:
    """What a measurement is valid for: the machine with its threads, the versions, and the build of the kernels."""
    extension = native.extension_file()
    facts = {
        "machine": machine.describe(),
        "isa": native.level(),
        "built": None if extension is None else extension.stat().st_mtime_ns,
        "torch": str(torch.__version__),
        "meprop": version("meprop"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    """What was measured on this machine. It is empty if the file is missing or unreadable."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(path: Path, key: str, microseconds: tuple[float, float]) -> None:
    """Adds a measurement to the file, which other processes may be adding to as well.

    Where the file cannot be written, or another process holds it for long, the next process measures again.
    """
    from filelock import FileLock, Timeout  # torch needs it, so that it is there; importing it takes milliseconds

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent.with_suffix(".lock"), timeout=_LONGEST_WAIT):
            machine.remove_remains(path.parent)
            content = json.dumps({**_read(path), key: microseconds}, indent=1).encode()
            machine.write_atomically(path, lambda file: file.write(content))
    except (OSError, NotImplementedError, Timeout):  # a file system without locks is not implemented
        pass
