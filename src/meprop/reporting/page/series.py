"""Runs of one kind over their seeds, and what they show beside dense runs of the same settings and seeds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from meprop.reporting.page.sources import Source
from meprop.training.config import DENSE
from meprop.training.records import Run
from meprop.training.verdict import Verdict, judge

OF_RULE = frozenset(
    {
        *("rule", "rules", "k", "k_start", "k_ratio", "scope", "noise", "noise_of", "noise_start", "exact_sum"),
        *("sparse_rows", "when", "dense_warmup_steps", "dense_end_steps", "fuse", "skip_zeros", "simplify"),
    }
)
"""The settings that tell sparse runs apart, and leave dense ones as they are."""

OWN_COLORS = {
    DENSE: "#64748B",  # calm beside the rules
    "simplified": "#8B6FD6",  # black is none on dark ground
    "topk": "#D55E00",
    "random": "#009E73",
    "compensated": "#CC79A7",
    "unscaled": "#0072B2",
    "sampled": "#56B4E9",
}
"""Of runs by rule. Rules have those of figures; to ask the rules themselves would take the import of torch."""
COLORS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#0072B2", "#8B6FD6", "#7A8B2A", "#56B4E9")
"""Of runs without a colour of their own, or one that is taken."""


@dataclass(frozen=True)
class Series:
    """The runs of one rule with the same settings."""

    source: Source
    """The first of its results."""
    rule: str
    label: str
    """What it is called on the page."""
    color: str
    runs: list[Run]
    """By ascending seed."""
    running: list[Run]


def _shared(source: Source, rule: str) -> str:
    """Return what runs of one series share. A result of several runs is a comparison of its own.

    Of dense runs these are the settings that sparse runs beside them have, too.
    """
    if not source.is_single:
        return str(source.path)
    unused = OF_RULE if rule == DENSE else ()
    return json.dumps(
        [source.task, {name: value for name, value in source.settings.items() if name not in unused}], sort_keys=True
    )


def series_of(sources: Sequence[Source]) -> list[Series]:
    """Return the series of results, dense ones first."""
    found: dict[tuple[str, str], list[tuple[Source, Run, bool]]] = {}
    for source in sources:
        for runs, finished in ((source.runs, True), (source.running, False)):
            for run in runs:
                found.setdefault((run.rule, _shared(source, run.rule)), []).append((source, run, finished))
    ordered = sorted(found.items(), key=lambda item: item[0][0] != DENSE)
    often = Counter(rule for rule, _ in found)
    made: list[Series] = []
    for (rule, _), members in ordered:
        source = members[0][0]
        label = _label(source, rule, often[rule] > 1, [each.label for each in made])
        runs, running = (
            sorted((run for _, run, finished in members if finished == wanted), key=lambda run: run.seed)
            for wanted in (True, False)
        )
        made.append(Series(source, rule, label, _color(rule, [each.color for each in made]), runs, running))
    return made


def _label(source: Source, rule: str, is_ambiguous: bool, taken: Sequence[str]) -> str:
    """Return what a series is called: the rule, and where others have the same rule, the result's name too."""
    short = source.name if source.is_single else f"{rule}, {source.name}"
    choices = (short if is_ambiguous else rule, f"{short}, {source.folder}", f"{rule}, {source.path}")
    return next((label for label in choices if label not in taken), choices[-1])


def _color(rule: str, taken: Sequence[str]) -> str:
    """Return the colour of the rule, or the least used one if it has none or another series has it."""
    own, uses = OWN_COLORS.get(rule.partition(":")[0]), Counter(taken)
    return own if own is not None and own not in uses else min(COLORS, key=lambda color: uses[color])


@dataclass(frozen=True)
class Judged:
    """A series beside dense."""

    series: Series
    dense: Series
    verdict: Verdict


def judged(series: Sequence[Series]) -> list[Judged]:
    """Return the verdict on each series that has dense runs of the same settings, on the seeds that both have."""
    dense = {_shared(each.source, DENSE): each for each in series if each.rule == DENSE}
    pairs = [(each, dense.get(_shared(each.source, DENSE))) for each in series if each.rule != DENSE]
    verdicts = ((each, beside, _verdict(beside, each)) for each, beside in pairs if beside is not None)
    return [Judged(each, beside, verdict) for each, beside, verdict in verdicts if verdict is not None]


def _verdict(dense: Series, sparse: Series) -> Verdict | None:
    of_dense, of_sparse = ({run.seed: run for run in each.runs} for each in (dense, sparse))
    common = of_dense.keys() & of_sparse.keys()
    if not common:
        return None
    source = sparse.source
    first, second = ([run for seed, run in runs.items() if seed in common] for runs in (of_dense, of_sparse))
    return judge(first, second, source.metric, source.margin, source.budget)
