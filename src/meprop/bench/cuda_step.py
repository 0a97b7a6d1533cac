"""`meprop bench step --device cuda`: the whole training step of multilayer perceptrons on a GPU, dense and sparse.

All ways start from the same weights: those of a dense model after some steps of training on the card. Each way's loss
and gradients are checked against float64 on the card. Then whole steps are timed in turns, with a learning rate of 0,
as a loop launches them ("eager") and as a replayed CUDA graph of the whole step ("graph").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from meprop.bench import cuda
from meprop.bench.base import Bench, Measure, table_of
from meprop.bench.cases import run_each
from meprop.bench.cuda import Card, CardRecord, Limits, mode_of
from meprop.bench.cuda_ways import BASELINES, CardStepper, CardWay, ways, work_of
from meprop.bench.events import Call
from meprop.bench.measure import Ratio, Times, check_seconds, milliseconds
from meprop.bench.perceptron import Model, Start, start
from meprop.bench.problem import Dtype, forked_random
from meprop.bench.roofline import Roofline
from meprop.bench.ways import Oracle, differs, kept_share, oracle
from meprop.disturbance import DisturbanceMeter
from meprop.reporting import pages

MODELS = ("8192-8192-8192-8192-10@1024", "784-1500-1000-500-10@100", "841-2500-2000-1500-1000-500-10@1000")
"""The models that are measured if no others are asked for."""
SECONDS = 0.3
"""Of each way, if no others are asked for."""


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class WayResult:
    """What was found for one way.

    Attributes:
        way: It.
        wrong: What is wrong with it; None if nothing is. A wrong one has no times.
        times: Of the whole step: "eager", and "graph" where it can be captured.
        uncaptured: Why it cannot.
        ratios: Baseline / this way by the baseline's name, of graphs if both have one, else eager.
        kept: The share of the hidden layers' output gradients that was kept; 1 if dense.
        roofline: The floor under the step.
        share: Of the bound that the step reaches: floor / 20th percentile.
    """

    way: CardWay
    wrong: str | None = None
    times: dict[str, Times] = field(default_factory=dict[str, Times])
    uncaptured: str | None = None
    ratios: dict[str, Ratio] = field(default_factory=dict[str, Ratio])
    kept: float = 1.0
    roofline: Roofline | None = None
    share: float | None = None

    @property
    def name(self) -> str:
        """The way's."""
        return self.way.name


@dataclass(frozen=True)
class CaseResult:
    """All ways of doing the step of one model.

    Attributes:
        model: The model.
        data: What the batch is of.
        ways: The results.
    """

    model: Model
    data: str
    ways: list[WayResult]

    @property
    def name(self) -> str:
        """The model's, the optimizer's and the data's."""
        return f"{self.model.name}, adam, {self.data}"


@dataclass(frozen=True)
class StepOnCard(CardRecord):
    """The content of result.json."""

    limits: Limits
    cases: list[CaseResult]

    @property
    def results(self) -> list[CaseResult]:
        """Return those of the cases."""
        return self.cases

    @property
    def wrong(self) -> list[str]:
        """Return the names of what is wrong."""
        return [f"{case.name}: {result.name}" for case in self.cases for result in case.ways if result.wrong]


# ---------------------------------------------------------------- one case


def run_case(
    model: Model, which: Sequence[CardWay], train_steps: int, seconds: float, limits: Limits, card: Card
) -> CaseResult:
    """Check and time some ways of one model.

    Args:
        model: What to train.
        which: The ways.
        train_steps: Of the dense model, before all.
        seconds: To spend on each way.
        limits: What the card reaches.
        card: It.
    """
    begin = start(model, train_steps, card.device)
    with forked_random(card.device):
        wrong, steppers = _checked(which, begin)
    card.release()
    sides: dict[str, Sequence[Call]] = {name: [stepper.run] for name, stepper in steppers.items()}
    times, uncaptured = card.time_both(sides, seconds * len(sides)) if sides else ({}, {})

    def result(way: CardWay) -> WayResult:
        if way.name in wrong:
            return WayResult(way, wrong[way.name])
        own = {mode: times[f"{way.name} {mode}"] for mode in ("eager", "graph") if f"{way.name} {mode}" in times}
        bound = cuda.roofline(work_of(way, model), _dtype(way), limits, card)
        share = bound.floor / own[mode_of(times, way.name)].p20
        kept = kept_share(steppers[way.name].network)
        return WayResult(way, None, own, uncaptured.get(way.name), _ratios(way, times), kept, bound, share)

    return CaseResult(model, begin.data, [result(way) for way in which])


def _checked(which: Sequence[CardWay], begin: Start) -> tuple[dict[str, str], dict[str, CardStepper]]:
    """What is wrong with ways, and the steppers of the others, by their names.

    A way that raises an error is wrong, so that the others keep their results.
    """
    batch = begin.hardest()
    oracles: dict[Any, Oracle] = {}
    wrong: dict[str, str] = {}
    steppers: dict[str, CardStepper] = {}
    for way in which:
        try:
            if way.oracle_rule not in oracles:
                oracles[way.oracle_rule] = oracle(begin.network, way.oracle_rule, batch)
            stepper = CardStepper(way, begin.network, batch)
            stepper.run()
            found = differs(stepper, batch, oracles[way.oracle_rule])
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        else:
            if found is None:
                steppers[way.name] = stepper
                continue
        wrong[way.name] = found
    return wrong, steppers


def _ratios(way: CardWay, times: Mapping[str, Times]) -> dict[str, Ratio]:
    found: dict[str, Ratio] = {}
    for base in BASELINES:
        if f"{base} eager" in times:
            mode = mode_of(times, base, way.name)
            found[base] = Ratio.of(times[f"{base} {mode}"], times[f"{way.name} {mode}"])
    return found


def _dtype(way: CardWay) -> Dtype:
    return "fp32" if way.precision == "tf32" else "bf16"


# ---------------------------------------------------------------- the command


@dataclass(frozen=True)
class CudaStep(Bench[CaseResult, StepOnCard]):
    """Time whole training steps of multilayer perceptrons on a CUDA device, dense and sparse, with Adam."""

    name = "step-cuda"
    legend = (
        "Times of whole steps in ms: 20th percentile / median, of CUDA graphs ('graph') and as they are launched "
        "('eager'). Ratios: baseline / this row, of the 20th percentiles (of the medians), of graphs where both can be "
        "captured; above 1 this row is faster. bf16: weights in bfloat16. autocast: weights in float32, products in "
        "bfloat16. tf32: weights in float32, products in TF32. Dense rows and 'rows' have torch's fused Adam. 'Kept': "
        "of the hidden layers' output gradients. 'Reached': the share of the bound, a counted floor over limits "
        "measured in the same run."
    )

    models: tuple[str, ...] = MODELS
    ways: tuple[str, ...] = ("*",)
    train_steps: int = 500
    k: int | float = 0.04
    seconds: float = SECONDS

    def prepare(self) -> Measure[CaseResult, StepOnCard]:
        """Find the card, and read the names of models and ways.

        Raises:
            MepropError: There is no card.
        """
        check_seconds(self.seconds)
        card, models, which = Card.find(), [Model.parse(name) for name in self.models], self.chosen()
        if self.train_steps < 0:
            raise ValueError(f"--train-steps must be 0 or more, got {self.train_steps}")
        if not models:
            raise ValueError("--models: there must be at least one")

        def measure(config: Mapping[str, Any], after: Callable[[CaseResult], None]) -> StepOnCard:
            meter = DisturbanceMeter()
            with card.session():
                limits = cuda.measure_limits(card)

                def run(model: Model) -> CaseResult:
                    result = run_case(model, which, self.train_steps, self.seconds, limits, card)
                    card.release()
                    return result

                results = run_each(models, run, after)
            return StepOnCard.of(f"bench-{self.name}", dict(config), meter, card.facts, limits, results)

        return measure

    def chosen(self) -> list[CardWay]:
        """Return the baselines, and the ways whose names match a pattern.

        Raises:
            ValueError: A pattern matches nothing.
        """
        every = ways(self.k)
        sparse = [way.name for way in every if way.rule is not None]
        for pattern in self.ways:
            if not any(fnmatchcase(name, pattern) for name in sparse):
                raise ValueError(f"--ways {pattern}: no such way on a card; the ways are {', '.join(sparse)}")
        return [way for way in every if way.rule is None or any(fnmatchcase(way.name, each) for each in self.ways)]

    def outcome(self, result: CaseResult) -> str:
        """Return the name, and whether a way is wrong."""
        return f"{result.name}: {'WRONG' if any(each.wrong for each in result.ways) else 'timed'}"

    def table(self, results: Sequence[CaseResult]) -> str:
        """Return a table per case, and below it why some ways have no graph."""
        return "\n\n".join(
            "\n".join([case.name, table_of(_HEAD, case.ways, _cells), *_reasons(case)]) for case in results
        )

    def blocks(self, results: Sequence[CaseResult]) -> list[str]:
        """Return a title, a table and the reasons per case."""
        found: list[str] = []
        for case in results:
            found += [f"**{case.name}**", pages.markdown_table([_HEAD, *map(_cells, case.ways)])]
            found += ["\n".join(f"- {line}" for line in lines)] if (lines := _reasons(case)) else []
        return found

    def about(self, record: StepOnCard) -> str:
        """Return the circumstances, the settings, and the card's limits."""
        settings = f"k = {self.k}, steps of training before = {self.train_steps}"
        return f"{record.circumstances} Limits reached: {record.limits}. Settings: {settings}."


_HEAD = ["", "kept", "graph, ms", "eager, ms", *(f"against {base}" for base in BASELINES), "bound", "reached"]


def _cells(result: WayResult) -> list[str]:
    if result.wrong is not None:
        return [result.name, "", "WRONG", *[""] * (len(_HEAD) - 3)]
    assert result.roofline is not None
    assert result.share is not None
    graph = milliseconds(result.times["graph"]) if "graph" in result.times else "-"
    found = (result.ratios.get(base) for base in BASELINES)  # None: that baseline is wrong
    ratios = ["" if ratio is None else str(ratio) for ratio in found]
    times = [graph, milliseconds(result.times["eager"])]
    return [result.name, f"{result.kept:.1%}", *times, *ratios, result.roofline.bound, f"{result.share:.0%}"]


def _reasons(case: CaseResult) -> list[str]:
    return cuda.without_graph((result.name, result.uncaptured) for result in case.ways if result.uncaptured)
