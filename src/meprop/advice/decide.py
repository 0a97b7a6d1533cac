"""From what was measured to one line of code, or to leaving a model dense."""

from __future__ import annotations

from collections.abc import Sequence

from meprop.advice.layers import LEAST_GAIN
from meprop.advice.record import RuleAdvice
from meprop.advice.text import code, milliseconds, short

__all__ = ["decide"]

_UNBIASED, _BIASED = 0.7, 0.35
"""How large the error of a rule may be, as a multiple of the noise of a batch. A bias stays, and noise averages out."""

_PREFERENCE = 1.1
"""So much faster a biased rule has to be than an unbiased one."""


def decide(
    tried: Sequence[RuleAdvice], bound: float, step_ms: float, chosen: str, min_features: int
) -> tuple[str, str, float]:
    """The line to try, what is said of it, and dense / sparse of the step that it predicts.

    The line has the fastest rule whose error is small beside the noise of a batch. A biased rule has to be faster than
    an unbiased one by 10%.

    Args:
        tried: What was measured of the rules.
        bound: Dense / free, of the step.
        step_ms: The time of the dense step, in milliseconds.
        chosen: The code of the filter that the layers were converted with. Empty without one.
        min_features: What the layers were converted with.
    """
    at_most = f"at most {bound:.2f}x is possible here"
    working = [each for each in tried if each.sparse_layers]
    if not working and bound < LEAST_GAIN:
        return "", f"Leave it dense: {at_most}.", 1.0
    if not working:
        return "", f"Leave it dense: each layer measured that sparse is not faster, and {at_most}.", 1.0
    fastest = max(working, key=lambda each: each.speedup)
    gains = f"the fastest rule, {short(fastest.rule)}, makes the step {fastest.speedup:.2f}x as fast"
    if bound < LEAST_GAIN:
        return "", f"Leave it dense: {at_most}.", 1.0
    if fastest.speedup < LEAST_GAIN:
        return "", f"Leave it dense: {gains}, and {at_most}.", 1.0
    faithful = [each for each in working if each.speedup >= LEAST_GAIN and _is_faithful(each)]
    if not faithful:
        return "", f"Leave it dense: {gains}, but its gradients are too far from the dense ones; {at_most}.", 1.0
    best = max(faithful, key=lambda each: each.speedup * (_PREFERENCE if each.unbiased else 1.0))
    others = f", filter={chosen}" if chosen else ""
    others += f", min_features={min_features}" if min_features != 128 else ""
    line = f"meprop.convert(model, {code(best.rule)}{others}, when='auto')".replace("'", '"')
    times = f"{milliseconds(best.step_ms)} ms instead of {milliseconds(step_ms)}"
    return (
        line,
        f"predicts a step of {times}: {best.speedup:.2f}x as fast. No rule can pass {bound:.2f}x.",
        best.speedup,
    )


def _is_faithful(each: RuleAdvice) -> bool:
    assert each.weights is not None  # as a layer is sparse
    error = each.weights.error if each.of_noise is None else each.of_noise
    return error <= (_UNBIASED if each.unbiased else _BIASED)
