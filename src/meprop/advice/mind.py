"""What bites: what may go wrong with a model and its training, and what to do about it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meprop import machine
from meprop.advice.text import short
from meprop.advice.trial import Phases, Stream, Trial
from meprop.advice.watch import Watch
from meprop.advice.ways import Ways
from meprop.nn.base import SparseLayer
from meprop.ops.native import reason_missing

__all__ = ["cast_seconds", "fresh_memory", "note_of_disturbance", "notes_of_model", "notes_of_trial"]

_MOST_NONZEROS = 0.25
"""The share of nonzero entries in an input up to which leaving out zeros is mostly faster."""
_MEMORY = 1 << 23
"""The bytes of fresh memory on which its cost is measured."""


def notes_of_model(model: torch.nn.Module, is_compiled: bool) -> Iterator[str]:
    """What is to be said of a model as the user gave it."""
    compiled = "_compiled_call_impl"
    if is_compiled or any(getattr(module, compiled, None) is not None for module in model.modules()):
        yield "The model is compiled. It was measured without torch.compile; call meprop.convert before torch.compile."
    if not model.training:
        yield "The model is in eval mode, and was measured so; call model.train() first to measure training."
    if any(isinstance(module, SparseLayer) for module in model.modules()):
        yield "The model is converted already. It was compared with the same model of torch's own layers."


def notes_of_trial(
    trial: Trial,
    ways: Ways,
    seen: Watch,
    stream: Stream,
    optimizer_share: float,
    fresh: tuple[float, float],
) -> Iterator[str]:
    """What is to be said after measuring.

    Args:
        trial: The model and the optimizer.
        ways: The ways.
        seen: What was seen of a dense step.
        stream: The batches.
        optimizer_share: The optimizer's share of the step.
        fresh: The bytes of fresh memory that a step asks for, and their share of the step.
    """
    yield from _of_installation(trial)
    bytes_, share = fresh
    if share >= 0.05 and not machine.describe()["keeps_freed_memory"]:
        yield (
            f"A step asks the system for {bytes_ / 2**20:.0f} MiB, which the one before freed: about {share:.0%} of "
            "it. Call meprop.machine.keep_freed_memory() once, before training."
        )
    yield from _of_denormals(seen)
    yield from _of_zeros(seen)
    yield from _of_model(trial, ways, seen.again)
    yield from _of_optimizer(trial.optimizer, optimizer_share)
    if stream.repeats and stream.read < 20:
        yield (
            f"There are only {stream.read} batches, which were repeated. The model fits them, and gradients become "
            "smaller than in training; give more batches."
        )


def note_of_disturbance(phases: Sequence[Sequence[Phases]], fastest: Phases) -> Iterator[str]:
    """Says how much the times of dense steps differ, if that is much.

    Args:
        phases: The times of dense steps, by batch.
        fastest: Those of the fastest steps.
    """
    slower = mean(median(each.step for each in of) for of in phases) / fastest.step - 1
    if slower >= 0.2:
        yield (
            f"The machine was busy: a median step took {slower:.0%} longer than the fastest. Ratios may be off by as "
            "much; measure again while nothing else runs, or with more seconds."
        )


def _of_installation(trial: Trial) -> Iterator[str]:
    dtypes = {each.dtype for each in trial.model.parameters() if each.requires_grad}
    if trial.device.type != "cpu":
        yield f"On {trial.device.type} few layers gain (docs/gpu.md)."
    elif (missing := reason_missing()) is not None:
        yield f"{missing}. Without it sparse layers are mostly slower than dense ones."
    elif others := dtypes - {torch.float32, torch.bfloat16}:
        names = ", ".join(sorted(str(each) for each in others))
        yield f"For {names} plain torch operations do the sparse work; native code is for float32 and bfloat16."


def _of_denormals(seen: Watch) -> Iterator[str]:
    share = seen.tiny / max(1, seen.entries)
    is_flushed = float(torch.full((1,), 1e-38) * 0.1) == 0
    if share >= 0.01 and not is_flushed:
        yield (
            f"{share:.0%} of the entries of gradients are so small that products with them are denormal numbers, which "
            "are slow. Call torch.set_flush_denormal(True) before training; dense gains more from it."
        )


def _of_zeros(seen: Watch) -> Iterator[str]:
    found = {name: share for name, share in seen.nonzeros.items() if share <= _MOST_NONZEROS}
    if found and reason_missing() is None:
        names = ", ".join(f"{name!r} {share:.0%}" for name, share in found.items())
        yield (
            f"In the inputs of some linear layers few entries are not zero: {names}. With skip_zeros=True of "
            'meprop.convert their forward products may be faster (docs/performance.md, "Zeros of the input"). That is '
            "not in the figures above."
        )


def _of_model(trial: Trial, ways: Ways, again: Sequence[str]) -> Iterator[str]:
    if ways.output is not None:
        yield (
            f"{ways.output!r} seems to give the model's outputs, and was left dense. If it does not, pass "
            "filter=lambda name, layer: True."
        )
    if again:
        yield (
            f"The backward pass calls layers again ({again[0]!r} for one), as gradient checkpointing does. That is "
            "forward work within the backward pass, which no rule saves."
        )
    biased = [rule for rule in ways.rules.values() if not rule.unbiased and rule.scope == "example"]
    if biased and any(type(each).__name__.endswith(("LayerNorm", "RMSNorm")) for each in trial.model.modules()):
        yield (
            f"The model has layer normalisation. {short(biased[0])} is biased and chooses in each row: sums of layers' "
            "outputs may grow, so that the model hardly learns (docs/transformers.md). Sampled is unbiased."
        )


def _of_optimizer(optimizer: torch.optim.Optimizer | None, share: float) -> Iterator[str]:
    if optimizer is None:
        yield "No optimizer was given. Its part of the step is unknown, and gains of the whole step are smaller."
        return
    kind, is_torch = type(optimizer).__name__, type(optimizer).__module__.startswith("torch.")
    if share < 0.15 or not is_torch:
        return
    fused = all(group.get("fused") for group in optimizer.param_groups)
    if "fused" in optimizer.defaults and not fused:
        yield f"{kind} takes {share:.0%} of the step. With fused=True it is faster, whatever the rule."
    if kind in ("SGD", "Adagrad", "Adam", "AdamW"):
        yield (
            f"No rule makes torch.optim.{kind} cheaper. It cannot take the sparse gradients of sparse_grad=True; "
            f"meprop.optim.{kind} can, with a rule of scope 'batch' (docs/performance.md)."
        )


class _Casts(TorchDispatchMode):
    """Adds up the time of casts from one floating dtype to another."""

    seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        begin = perf_counter()
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.is_floating_point() and result.dtype != args[0].dtype:
            self.seconds += perf_counter() - begin
        return result


def cast_seconds(trial: Trial, batch: Any, steps: int) -> float:
    """The seconds that casts between floating dtypes take in one step, on the CPU: the least of so many steps."""
    found: list[float] = []
    for _ in range(steps):
        with _Casts() as casts:
            trial.step(batch)
        found.append(casts.seconds)
    return min(found)


def fresh_memory(trial: Trial, batch: Any) -> tuple[float, float, float]:
    """The bytes of fresh memory that a step asks the system for, their share of the step, and its seconds."""
    try:
        import resource
    except ImportError:  # not on this system
        return 0.0, 0.0, trial.step(batch).step
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = trial.step(batch).step
    fresh = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()
    return fresh, fresh * _seconds_per_byte() / seconds, seconds


def _seconds_per_byte() -> float:
    """What fresh memory costs more than memory that was used before: the system gives and clears it page by page."""
    buffer = torch.frombuffer(mmap.mmap(-1, _MEMORY), dtype=torch.uint8)
    spent: list[float] = []
    for _ in range(2):
        begin = perf_counter()
        buffer.zero_()
        spent.append(perf_counter() - begin)
    return max(0.0, spent[0] - spent[1]) / _MEMORY
