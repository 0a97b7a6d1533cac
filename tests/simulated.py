"""Runs of a comparison, made up: with chosen outcomes, or with the noise that seeds, epochs and machines have."""

from __future__ import annotations

import math

import numpy as np

from meprop.training.records import Run


def made(gains, ratios=None):
    """Return dense and sparse runs of one epoch; dense scores 98 in 60 seconds.

    Args:
        gains: Points of the sparse run of each seed above dense.
        ratios: Dense's seconds / the sparse run's, of each seed; 1 if not given.
    """
    dense = [_of("dense", seed, [98.0], 60.0) for seed in range(len(gains))]
    ratios = [1.0] * len(gains) if ratios is None else ratios
    pairs = enumerate(zip(gains, ratios, strict=True))
    return dense, [_of("sampled", seed, [98.0 + gain], 60.0 / ratio) for seed, (gain, ratio) in pairs]


def simulated(rng, seeds, *, gain=0.0, spread=0.1, speed=1.0, noise=0.02, epochs=6, spent=None):
    """Return dense and sparse runs of the seeds 0, 1, ...

    Scores rise by epoch, and scatter in each. The epoch that reaches a target is therefore drawn, too.

    Args:
        rng: A numpy generator.
        seeds: How many.
        gain: Mean of the paired differences after the last epoch, in points.
        spread: Their standard deviation.
        speed: Dense's seconds of a step / the rule's.
        noise: The standard deviation of the paired logarithms of times.
        epochs: Of each run. One of dense takes 10 seconds.
        spent: The seconds of each run, which have as many epochs as fit; None: they have `epochs`.
    """

    def run(rule, seed, level, seconds):
        per_epoch = seconds * math.exp(rng.normal(0, noise / math.sqrt(2)))
        count = epochs if spent is None else max(1, round(spent / per_epoch))
        missing = 3 * np.exp(-7.2 * np.arange(1, count + 1) / count)
        scores = level - missing + missing[-1] + rng.normal(0, spread / math.sqrt(2), count)
        return _of(rule, seed, scores.tolist(), count * per_epoch if spent is None else spent)

    levels = (("dense", 98.3, 10.0), ("sampled", 98.3 + gain, 10.0 / speed))
    dense, sparse = ([run(rule, seed, *of_rule) for seed in range(seeds)] for rule, *of_rule in levels)
    return dense, sparse


def _of(rule, seed, scores, seconds):
    metrics = [{"accuracy": score} for score in scores]
    curve = [
        {"epoch": at, "loss": 0.1, "dev": score, "test": score, "seconds": seconds * at / len(scores)}
        for at, score in enumerate(metrics, 1)
    ]
    parts = {"forward": 0.4 * seconds, "backward": 0.4 * seconds, "optimizer": 0.2 * seconds, "step": seconds}
    density = 1.0 if rule == "dense" else None
    return Run(rule, seed, len(scores), metrics[-1], metrics[-1], parts, None, density, curve)
