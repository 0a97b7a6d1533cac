"""The whole training step of multilayer perceptrons: the forward pass, the backward pass and the optimizer, each timed.

All ways of doing the step start from the same weights, and run in one process, in turns, in new random orders. Dense
fp32 and dense bf16 autocast with torch's fused optimizer are the baselines, and the compiled model, if that is asked
for. Weights are those of a dense model after some steps of training, and batches are more of the same data. The
learning rate of the timed steps is 0: that costs the same, and lets the gradients stay what they are. Before anything
is timed, each way's loss and gradients are checked against float64.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from meprop.bench.base import Bench, Measure, keep_freed_memory, table_of
from meprop.bench.cases import run_each
from meprop.bench.measure import Ratio, Times, check_seconds, interleaved
from meprop.bench.perceptron import Model, start
from meprop.bench.problem import Device
from meprop.bench.record import Record
from meprop.bench.roofline import copy_seconds
from meprop.bench.ways import BASELINES, PHASES, OptimizerName, Stepper, Way, oracle, ways, what_is_wrong
from meprop.disturbance import DisturbanceMeter
from meprop.errors import MepropError
from meprop.reporting import pages
from meprop.rules.sampled import NOISE

FIGURE = "performance-step.png"

_MODELS = ("841-2500-2000-1500-1000-500-10@100", "784-500-500-10@100", "784-500-500-10@10")
_SECONDS = 3.0  # for each way


@dataclass(frozen=True)
class WayResult:
    """What was found for one way.

    Attributes:
        way: It.
        wrong: What is wrong with it; None if nothing is. A wrong one has no times.
        step: Of the whole step.
        phases: Of each phase.
        ratios: Baseline / this way, by the baseline's name.
        kept: The share of the hidden layers' output gradients that was kept; 1 if dense.
        least_bytes: What each phase has to move at least.
        shares: Of each phase's time: what copying as many bytes takes. A phase that moves nothing is left out.
    """

    way: Way
    wrong: str | None = None
    step: Times | None = None
    phases: dict[str, Times] = field(default_factory=dict[str, Times])
    ratios: dict[str, Ratio] = field(default_factory=dict[str, Ratio])
    kept: float = 1.0
    least_bytes: dict[str, int] = field(default_factory=dict[str, int])
    shares: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def name(self) -> str:
        """The way's."""
        return self.way.name


@dataclass(frozen=True)
class CaseResult:
    """All ways of doing the step of one model with one optimizer.

    Attributes:
        model: The model.
        optimizer: The optimizer.
        data: What the batches are of.
        ways: The results.
    """

    model: Model
    optimizer: OptimizerName
    data: str
    ways: list[WayResult]

    @property
    def name(self) -> str:
        """The model's, the optimizer's and the data's."""
        dropout = f"dropout {self.model.dropout:g}, " if self.model.dropout > 0 else ""
        return f"{self.model.name}, {dropout}{self.optimizer}, {self.data}"


@dataclass(frozen=True)
class StepBench(Record):
    """The content of result.json."""

    cases: list[CaseResult]

    @property
    def results(self) -> list[CaseResult]:
        """Return those of the cases."""
        return self.cases

    @property
    def wrong(self) -> list[str]:
        """Return the names of what is wrong."""
        return [f"{case.name}: {result.name}" for case in self.cases for result in case.ways if result.wrong]


def run_case(
    model: Model, optimizer: OptimizerName, which: Sequence[Way], train_steps: int, seconds: float
) -> CaseResult:
    """Check and time some ways of one case.

    Args:
        model: What to train.
        optimizer: With what.
        which: The ways.
        train_steps: Of the dense model, before all.
        seconds: To spend on each way; slow ones take longer, for 9 rounds.
    """
    if any(way.compiled for way in which):
        torch.compiler.reset()  # models of earlier cases count towards the number after which nothing is compiled
    begin = start(model, train_steps)
    with torch.random.fork_rng(devices=[]):
        batch = begin.hardest()
        oracles = {rule: oracle(begin.network, rule, batch) for rule in {way.oracle_rule for way in which}}
        wrong = {
            way.name: what_is_wrong(way, begin.network, optimizer, batch, oracles[way.oracle_rule]) for way in which
        }
        del oracles
        right = [Stepper(way, begin.network, optimizer, begin.batches) for way in which if wrong[way.name] is None]
        spent = interleaved({each.way.name: each.run for each in right}, seconds * len(right))
    copying = cache(copy_seconds)
    timed = {each.way: _timed(each, spent, copying) for each in right}
    results = [timed.get(way) or WayResult(way, wrong[way.name]) for way in which]
    return CaseResult(model, optimizer, begin.data, results)


def _timed(stepper: Stepper, spent: Mapping[str, Times], copying: Callable[[int], float]) -> WayResult:
    name, least = stepper.way.name, stepper.least_bytes
    columns = zip(*stepper.phases, strict=True)
    phases = {phase: Times.of(column[1:]) for phase, column in zip(PHASES, columns, strict=True)}
    ratios = {base: Ratio.of(spent[base], spent[name]) for base in BASELINES if base in spent}
    shares = {phase: copying(least[phase]) / phases[phase].p20 for phase in PHASES if least[phase] > 0}
    return WayResult(stepper.way, None, spent[name], phases, ratios, stepper.kept, least, shares)


# ---------------------------------------------------------------- the command


@dataclass(frozen=True)
class Step(Bench[CaseResult, StepBench]):
    """Time whole training steps of multilayer perceptrons, dense and sparse: forward pass, backward pass, optimizer."""

    name = "step"
    legend = (
        "Times in ms. Step: 20th percentile / median / 80th percentile; its parts: 20th percentiles. Ratios: baseline "
        "/ this row, of the 20th percentiles (of the medians), above 1 this row is faster. 'Kept': of the hidden "
        "layers' output gradients. 'Least MB': what forward pass / backward pass / optimizer have to move, if nothing "
        "stays in the cache between them: weights, gradients and moments read or written, each once, and the "
        "activations once in each pass. 'Of memory bound': the time of copying as many bytes in the same process, as a "
        "share of the part's time. It may be above 100%: what fits the cache is copied there, and a copy also reads "
        "what it overwrites."
    )
    figure = FIGURE
    figure_title = "Parts of the step"

    models: tuple[str, ...] | None = None
    """The models: widths and batch of each, such as 784-500-500-10@100. None: three, which depend on the device."""
    dropout: float = 0.0
    """The probability to drop a hidden unit, behind each ReLU. Above 0 there are more ways, with convert(fuse=True)."""
    optimizers: tuple[OptimizerName, ...] = ("adam",)
    """The optimizers. Each model is timed with each of them. Plain sgd is without momentum."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the optimizers of sparse ways keep their moments in. Those of dense ones are torch's, and have no choice."""
    ways: tuple[str, ...] = ("*",)
    """Patterns of the sparse ways to time beside the dense ones, such as 'sampled*' or 'unified bf16 decay'."""
    compiled: bool = False
    """Time the dense fp32 model under torch.compile too. It needs a C++ compiler. Compiling takes long."""
    train_steps: int = 500
    """Steps of dense Adam before all, on MNIST where it is found, else on points around random centres. Gradients, and
    what rules keep of them, change most in the first few hundred steps. 0: untrained weights and random data."""
    k: int | float = 0.04
    """How many entries of each hidden layer's output gradient top-k keeps: a count (20), or a share of the features."""
    noise: float = NOISE
    """The budget of noise of the ways that draw entries (meprop.Sampled)."""
    seconds: float | None = None
    """Seconds to spend on each way of doing the step. A slow one takes longer, for 9 rounds. None: 3, or 0.3 on a CUDA
    device."""
    keep_memory: bool = False
    """Let the C library keep freed memory, as training from the command line does. Dense gains more than sparse."""
    device: Device = "cpu"
    """Where to measure. A CUDA device has models, ways and a table of its own (docs/gpu.md). They are with Adam, and
    without dropout."""

    def on_device(self) -> Bench[Any, Any]:
        """Return itself, or the benchmark of the same steps on a CUDA device.

        Raises:
            ValueError: An option is for a CPU only.
        """
        from meprop.bench.cuda_step import MODELS, SECONDS, CudaStep

        if self.device == "cpu":
            return self
        for name in ("dropout", "optimizers", "state_dtype", "compiled", "noise", "keep_memory"):
            if getattr(self, name) != getattr(Step, name):
                raise ValueError(f"--{name.replace('_', '-')}: it is for a CPU; leave it out with --device cuda")
        models = MODELS if self.models is None else self.models
        return CudaStep(models, self.ways, self.train_steps, self.k, SECONDS if self.seconds is None else self.seconds)

    def prepare(self) -> Measure[CaseResult, StepBench]:
        """Read the names of models and ways."""
        seconds = _SECONDS if self.seconds is None else self.seconds
        check_seconds(seconds)
        keep_freed_memory(self.keep_memory)
        if self.train_steps < 0:
            raise ValueError(f"--train-steps must be 0 or more, got {self.train_steps}")
        compiler = os.environ.get("CXX", "g++")
        if self.compiled and shutil.which(compiler) is None:
            raise MepropError(
                f"--compiled: torch.compile needs a C++ compiler, and {compiler} is not there; install it, name "
                "another one in CXX, or leave --compiled out"
            )
        models = [Model.parse(name, self.dropout) for name in (_MODELS if self.models is None else self.models)]
        if not models or not self.optimizers:
            raise ValueError("--models and --optimizers: there must be at least one of each")
        if self.state_dtype != "float32" and "sgd" in self.optimizers:
            raise ValueError(
                f"--state-dtype {self.state_dtype} with --optimizers sgd, which keeps nothing; leave one out"
            )
        which = self.chosen()

        def measure(config: Mapping[str, Any], after: Callable[[CaseResult], None]) -> StepBench:
            meter = DisturbanceMeter()
            cases = run_each(
                product(models, self.optimizers),
                lambda case: run_case(*case, which, self.train_steps, seconds),
                after,
            )
            return StepBench.of("bench-step", dict(config), meter, cases)

        return measure

    def chosen(self) -> list[Way]:
        """Return the baselines, and the ways whose names match a pattern.

        Raises:
            ValueError: A pattern matches nothing.
        """
        every = ways(
            self.k,
            self.noise,
            dropout=self.dropout > 0,
            compiled=self.compiled,
            state_dtype=torch.bfloat16 if self.state_dtype == "bfloat16" else None,
        )
        sparse = [way.name for way in every if way.rule is not None]
        for pattern in self.ways:
            if not any(fnmatchcase(name, pattern) for name in sparse):
                raise ValueError(f"--ways {pattern}: no such way; the ways are {', '.join(sparse)}")
        return [way for way in every if way.rule is None or any(fnmatchcase(way.name, each) for each in self.ways)]

    def outcome(self, result: CaseResult) -> str:
        """Return the name, and whether a way is wrong."""
        return f"{result.name}: {'WRONG' if any(each.wrong for each in result.ways) else 'timed'}"

    def table(self, results: Sequence[CaseResult]) -> str:
        """Return a table per case."""
        return "\n\n".join(f"{case.name}\n{table_of(*_table(case))}" for case in results)

    def blocks(self, results: Sequence[CaseResult]) -> list[str]:
        """Return a title and a table per case."""
        found: list[str] = []
        for case in results:
            head, rows, cells = _table(case)
            found += [f"**{case.name}**", pages.markdown_table([head, *map(cells, rows)])]
        return found

    def about(self, record: StepBench) -> str:
        """Return the circumstances, and the settings."""
        settings = {"k": "k", "noise": "noise", "train_steps": "steps of training before"}
        shown = ", ".join(f"{name} = {record.config[option]}" for option, name in settings.items())
        return f"{record.circumstances} Settings: {shown}."

    def draw(self, record: StepBench, path: Path) -> bool:
        """Draw the parts of each step as stacked bars."""
        from meprop.reporting.bench_step import draw

        draw(record, path)
        return True

    def figure_beside(self, page: Path) -> Path:
        """Return the path of a page's figure, which has the same name on all pages."""
        return page.with_name(FIGURE)


def _table(case: CaseResult) -> tuple[list[str], list[WayResult], Callable[[WayResult], list[str]]]:
    """The head of a case's table, its rows, and what gives the cells of one."""
    bases = [result.name for result in case.ways if result.way.rule is None]
    head = ["", "kept", *PHASES, "step", *(f"against {base}" for base in bases), "least MB", "of memory bound"]

    def cells(result: WayResult) -> list[str]:
        if result.step is None:
            return [result.name, "", *[""] * len(PHASES), "WRONG", *[""] * (len(bases) + 2)]
        parts = [f"{1e3 * result.phases[phase].p20:.3g}" for phase in PHASES]
        found = (result.ratios.get(base) for base in bases)  # None: that baseline is wrong
        ratios = ["" if ratio is None else str(ratio) for ratio in found]
        least = " / ".join(f"{result.least_bytes[phase] / 1e6:.3g}" for phase in PHASES)
        shares = " / ".join(f"{result.shares[phase]:.0%}" if phase in result.shares else "-" for phase in PHASES)
        return [result.name, f"{result.kept:.1%}", *parts, result.step.milliseconds, *ratios, least, shares]

    return head, case.ways, cells
