"""Whether meprop helps a model, and how: measured on the user's own model, batches, loss and optimizer, in a minute."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from math import isnan
from numbers import Real
from time import perf_counter
from typing import Any

import torch

from meprop.advice.decide import decide
from meprop.advice.gradients import Agreement, Noise, agreements
from meprop.advice.layers import groups_of, watched
from meprop.advice.mind import cast_seconds, fresh_memory, note_of_disturbance, notes_of_model, notes_of_trial
from meprop.advice.record import Advice, GroupAdvice, Part, RuleAdvice
from meprop.advice.trial import Loss, Phases, Stream, Trial, untouched
from meprop.advice.ways import DENSE, FREE, Ways, steps_in_turns, typical
from meprop.convert import Filter, check_model
from meprop.rules import Rule, Sampled, TopK

__all__ = ["RULES", "Advice", "GroupAdvice", "Part", "RuleAdvice", "advise"]

RULES = (Sampled(noise=0.25), Sampled(noise=1.0), TopK(0.04, "global"), TopK(0.04), TopK(0.1, "batch"))
"""The rules that are tried if none are given."""

_BATCHES = 4
"""How many batches are measured on."""

_WARM_UP, _GRADIENTS, _LAYERS = 0.2, 0.2, 0.15
"""The shares of the time for the steps before all, for gradients, and for layers alone. Whole steps have the rest."""

_STEPS = 0.3
"""The share of the time that whole steps have in any case, also where layers took long to measure."""


def advise(
    model: torch.nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    rules: Sequence[Rule] | None = None,
    filter: Filter | None = None,
    min_features: int = 128,
    seconds: float = 40.0,
    warm_up_steps: int | None = None,
) -> Advice:
    """Measures whether meprop makes a model's training step faster, what that costs, and which line of code to try.

    Whole steps are timed in turns: dense, with each rule, and with backward products that cost nothing. The last one
    is the bound that no rule can pass. The gradients of each rule are compared with the dense ones on the same batches,
    and their error with the noise that a batch's gradient has anyway. All of it happens on copies. The model, its
    gradients and buffers, the optimizer and the random states are afterwards what they were before.

    Args:
        model: Any module. Its mode, training or eval, stays what it is.
        batches: An iterable of batches, such as a DataLoader or a list. They are of any type, and only passed to
            `loss`. The first four are measured on, the next ones are for the steps before that. An iterator is used up
            so far.
        loss: A function of (model, batch) that returns the loss, a scalar tensor. It calls the model that it gets,
            which is a copy, moves the batch to its device, and may use autocast.
        optimizer: The model's. None: its part of the step is unknown, and the advice says so.
        rules: The rules to try. None: `meprop.advice.RULES`.
        filter: As of `meprop.convert`. None leaves a last layer dense that has more output than input features.
        min_features: As of `meprop.convert`.
        seconds: The time to spend. It takes longer if steps are slow: about 12 steps of each rule in any case.
        warm_up_steps: Steps of the optimizer before anything is measured, because the first gradients of a training are
            not typical of it. None: as many as a fifth of the time allows, up to 200, and none if the optimizer has
            done steps already. Without an optimizer they are those of Adam.

    Returns:
        An advice; `print` it.

    Raises:
        TypeError: An argument, or what `loss` returns, is of the wrong type.
        ValueError: There is no batch, no rule, no parameter that needs a gradient, or the loss is not a scalar, not
            finite or not of the given model; or the optimizer is that of another model.
        NotSupportedError: The model is wrapped, or the optimizer needs a closure or updates in the backward pass.

    Example:
        >>> import meprop
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 256), torch.nn.ReLU(), torch.nn.Linear(256, 2))
        >>> batches = [(torch.randn(16, 8), torch.randint(2, (16,))) for _ in range(8)]
        >>> def loss(model, batch):
        ...     return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> advice = meprop.advise(model, batches, loss, seconds=0.1)
        >>> advice.bound >= 1, "dense step" in str(advice)
        (True, True)
    """
    begin = perf_counter()
    inner: Any = getattr(model, "_orig_mod", None)  # of torch.compile
    is_compiled = isinstance(inner, torch.nn.Module)
    chosen = _checked(rules, seconds, warm_up_steps)
    check_model(inner if is_compiled else model, "call meprop.advise with the model inside it")
    with untouched(model, optimizer, batches):
        trial = Trial(inner if is_compiled else model, loss, optimizer)
        stream = Stream(batches, _BATCHES)
        trial.check(stream.measured[0])
        notes = list(notes_of_model(inner if is_compiled else model, is_compiled))
        state = trial.warm_up(stream, warm_up_steps, _WARM_UP * seconds)
        trial.hold_still()
        ways = Ways(trial.model, chosen, filter, min_features)
        return _measured(trial, ways, stream, state, notes, begin, seconds, min_features)


def _checked(rules: Sequence[Rule] | None, seconds: float, warm_up_steps: int | None) -> Sequence[Rule]:
    chosen = RULES if rules is None else tuple(rules)
    for rule in chosen:
        if not isinstance(rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"rules has {rule!r} of type {type(rule).__name__}; it has rules such as meprop.TopK(0.05)")
    if not chosen:
        raise ValueError("rules is empty; give at least one rule, or None for the usual ones")
    if isinstance(seconds, bool) or not isinstance(seconds, Real) or not seconds > 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"seconds={seconds!r}; it must be a number above 0")
    whole = isinstance(warm_up_steps, int) and not isinstance(warm_up_steps, bool) and warm_up_steps >= 0
    if warm_up_steps is not None and not whole:
        raise ValueError(f"warm_up_steps={warm_up_steps!r}; it must be an int of at least 0, or None")
    return chosen


def _measured(
    trial: Trial,
    ways: Ways,
    stream: Stream,
    state: str,
    notes: list[str],
    begin: float,
    seconds: float,
    min_features: int,
) -> Advice:
    batches = stream.measured
    seen = watched(trial, ways, batches[0])
    reached = seen.seconds.keys() & ways.layers.keys()  # by a gradient
    *fresh, once = fresh_memory(trial, batches[0])
    compared = max(2, int(_GRADIENTS * seconds / once / (1 + len(ways.rules))))
    found, noise = agreements(trial, ways, batches[:compared]) if reached else ({}, None)
    repeats = 3 if once < 0.5 else 1  # a short time may be that of a disturbance
    casts = cast_seconds(trial, batches[0], repeats) if seen.autocast else 0.0
    left = max(_STEPS * seconds, seconds - (perf_counter() - begin) - _LAYERS * seconds)
    timed = max(1, int(left / once / len(ways.names) / 3))  # three rounds of each
    phases = steps_in_turns(trial, ways, batches[:timed], left)
    dense, free = typical(phases[DENSE]), typical(phases[FREE])
    groups = groups_of(trial, ways, seen, batches[0], _LAYERS * seconds)
    parts = _parts(trial, dense, free, casts)
    tried = tuple(
        _rule(ways, name, reached, dense, typical(phases[name]), found.get(name), noise) for name in ways.rules
    )
    passed = (each.speedup for each in tried if each.sparse_layers)  # by noise, or by a faster forward pass
    bound = max(1.0, dense.step / free.step, *passed) if reached else 1.0
    notes += notes_of_trial(trial, ways, seen, stream, dense.optimizer / dense.step, (fresh[0], fresh[1]))
    notes += note_of_disturbance(phases[DENSE], dense)
    line, verdict, predicted = decide(tried, bound, 1e3 * dense.step, ways.chosen, min_features)
    took, threads = perf_counter() - begin, torch.get_num_threads()
    measured = f"on {len(batches)} batches, in {took:.0f} s, with {threads} thread{'s' * (threads > 1)}"
    return Advice(
        line, verdict, predicted, bound, 1e3 * dense.step, parts, tried, noise, groups, tuple(notes), state, measured
    )


def _parts(trial: Trial, dense: Phases, free: Phases, casts: float) -> tuple[Part, ...]:
    def part(name: str, seconds: float, within: bool = False) -> Part:
        return Part(name, 1e3 * seconds, seconds / dense.step, within)

    kind = "zero_grad" if trial.optimizer is None else f"optimizer ({type(trial.optimizer).__name__})"
    parts = [
        part("forward pass", dense.forward),
        part("backward pass", dense.backward),
        part("products a rule can save", max(0.0, dense.backward - free.backward), True),
        part(kind, dense.optimizer),
    ]
    return (*parts, *([part("casts of autocast, in both passes", casts)] if casts else []))


def _rule(
    ways: Ways,
    name: str,
    reached: Set[str],
    dense: Phases,
    sparse: Phases,
    found: tuple[Agreement, Agreement] | None,
    noise: Noise,
) -> RuleAdvice:
    rule = ways.rules[name]
    layers = [each for each in ways.report(name).layers if each.status == "sparse" and each.name in reached]
    sizes = [each.in_features * each.out_features for each in layers]
    known = [(size, each.density) for size, each in zip(sizes, layers, strict=True) if not isnan(each.density)]
    kept = sum(size * density for size, density in known) / sum(size for size, _ in known) if known else None
    weights, first = found if found is not None and layers else (None, None)
    of_noise = weights.error / noise.error if weights is not None and noise is not None and noise.error else None
    speedup = dense.step / sparse.step
    return RuleAdvice(rule, 1e3 * sparse.step, speedup, kept, len(layers), rule.unbiased, weights, first, of_noise)
