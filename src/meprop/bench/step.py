"""The whole training step of a multilayer perceptron: forward pass, backward pass and optimizer, dense and sparse.

All ways of doing the step of one model with one optimizer are timed in one process, in turns; the two dense ones, fp32
and bf16 autocast with torch's fused optimizer, are the baselines. Batches are random normal data in turns, and the
learning rate is 0: that costs the same, and lets the gradients stay what they are. Before anything is timed, each way's
loss and gradients are checked against float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import cycle, product
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meprop
from meprop import optim
from meprop.bench.base import Bench, Measure, keep_freed_memory, table_of
from meprop.bench.cases import run_each
from meprop.bench.measure import DisturbanceMeter, Ratio, Times, check_seconds, interleaved
from meprop.bench.record import Record
from meprop.reporting import pages
from meprop.rules import Scope

OptimizerName = Literal["sgd", "momentum", "adagrad", "adam", "adamw"]
PHASES = ("forward", "backward", "optimizer")
"""Of a step; what is left of it is Python's and the clock's."""
FIGURE = "performance-step.png"
BASELINES = ("dense fp32", "dense bf16")

_BATCHES = 8
# Of gradients, to their norm. In bfloat16 other entries are kept of nearly equal ones, and, per example, more in each
# layer on the way back: by the first of seven 0.6, while what is unrelated differs by more than 1.
_TOLERANCE, _BF16_TOLERANCE, _BF16_TOLERANCE_PER_EXAMPLE = 0.01, 0.3, 0.8
_OPTIMIZERS: dict[OptimizerName, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "adagrad": ("Adagrad", {}),
    "adam": ("Adam", {}),
    "adamw": ("AdamW", {}),
}


@dataclass(frozen=True)
class Model:
    """A multilayer perceptron with ReLU, and the examples of a step.

    Attributes:
        widths: Of the input, the hidden layers and the output.
        batch: N.

    Raises:
        ValueError: A size is out of range.
    """

    widths: tuple[int, ...]
    batch: int

    def __post_init__(self) -> None:
        if len(self.widths) < 3 or min(*self.widths, self.batch) < 1:
            raise ValueError(f"model {self.name}: three widths or more, and a batch, all at least 1")

    @classmethod
    def parse(cls, name: str) -> Model:
        """Return the model of a name like 784-500-500-10@100.

        Raises:
            ValueError: The name is none.
        """
        widths, at, batch = name.partition("@")
        sizes = [*widths.split("-"), batch]
        if not at or not all(size.isdecimal() for size in sizes):
            raise ValueError(f"--models {name}: a model is named like 784-500-500-10@100, widths and batch")
        *widths_, batch_ = map(int, sizes)
        return cls(tuple(widths_), batch_)

    @property
    def name(self) -> str:
        """Widths and batch, as `parse` takes them."""
        return f"{'-'.join(map(str, self.widths))}@{self.batch}"

    def build(self) -> nn.Sequential:
        """Return a new dense network."""
        layers: list[nn.Module] = []
        for inputs, outputs in zip(self.widths, self.widths[1:], strict=False):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Way:
    """A way of doing the step.

    Attributes:
        name: Of the row.
        scope: What is selected; None: it is dense.
        bf16: Whether products are formed in bfloat16: all by autocast if dense, else the forward ones by compute_dtype.
        sparse_rows: Of `meprop.optim`, where gradients are row-sparse; None: they are dense.
    """

    name: str
    scope: Scope | None = None
    bf16: bool = False
    sparse_rows: optim.SparseRows | None = None


def ways() -> list[Way]:
    """Return the baselines, then the sparse ways, each in fp32 and bf16."""
    found = [Way(name, bf16=name.endswith("bf16")) for name in BASELINES]
    for precision in ("fp32", "bf16"):
        bf16 = precision == "bf16"
        found.append(Way(f"per example {precision}", "example", bf16))
        found += [Way(f"unified {precision} {mode}", "batch", bf16, mode) for mode in get_args(optim.SparseRows)]
    return found


@dataclass(frozen=True)
class WayResult:
    """What was found for one way.

    Attributes:
        way: It.
        wrong: What is wrong with it; None if nothing is. A wrong one has no times.
        step: Of the whole step.
        phases: Of each phase.
        ratios: Baseline / this way, by the baseline's name.
    """

    way: Way
    wrong: str | None = None
    step: Times | None = None
    phases: dict[str, Times] = field(default_factory=dict[str, Times])
    ratios: dict[str, Ratio] = field(default_factory=dict[str, Ratio])

    @property
    def name(self) -> str:
        """The way's."""
        return self.way.name


@dataclass(frozen=True)
class CaseResult:
    """All ways of doing the step of one model with one optimizer."""

    model: Model
    optimizer: OptimizerName
    ways: list[WayResult]

    @property
    def name(self) -> str:
        """The model's and the optimizer's."""
        return f"{self.model.name}, {self.optimizer}"


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


def run(
    models: Sequence[Model],
    optimizers: Sequence[OptimizerName],
    k: float,
    seconds: float,
    config: dict[str, Any],
    after: Callable[[CaseResult], None] = lambda result: None,
) -> StepBench:
    """Check and time every model with every optimizer.

    Args:
        models: What to train.
        optimizers: With what.
        k: The count, or share, of each hidden layer's output gradient that is kept.
        seconds: To spend on each way; slow ones take longer, for 9 rounds.
        config: Kept in the record.
        after: Called with each result.
    """
    meter = DisturbanceMeter()
    cases = run_each(product(models, optimizers), lambda case: run_case(*case, k, seconds), after)
    return StepBench.of("bench-step", config, meter, cases)


def run_case(model: Model, optimizer: OptimizerName, k: float, seconds: float) -> CaseResult:
    """Check and time all ways of one case."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = model.build()
        batches = [
            (torch.randn(model.batch, model.widths[0]), torch.randint(0, model.widths[-1], (model.batch,)))
            for _ in range(_BATCHES)
        ]
    steps = {way.name: _Step(way, model, plain.state_dict(), optimizer, k, batches) for way in ways()}
    oracles = {scope: _oracle(plain, scope, k, batches[0]) for scope in (None, *get_args(Scope))}
    wrong = {name: step.what_is_wrong(oracles[step.way.scope]) for name, step in steps.items()}
    right = {name: step for name, step in steps.items() if wrong[name] is None}
    spent = interleaved({name: step.run for name, step in right.items()}, seconds * len(right))
    results: list[WayResult] = []
    for name, step in steps.items():
        if name not in right:
            results.append(WayResult(step.way, wrong[name]))
            continue
        phases = {
            phase: Times.of(column[1:]) for phase, column in zip(PHASES, zip(*step.phases, strict=True), strict=True)
        }
        ratios = {base: Ratio.of(spent[base], spent[name]) for base in BASELINES if base in spent}
        results.append(WayResult(step.way, None, spent[name], phases, ratios))
    return CaseResult(model, optimizer, results)


class _Step:
    """One way of doing the step, again and again."""

    def __init__(
        self,
        way: Way,
        model: Model,
        state: dict[str, Tensor],
        optimizer: OptimizerName,
        k: float,
        batches: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        self.way = way
        self.model = model.build()
        self.model.load_state_dict(state)
        self.phases: list[tuple[float, ...]] = []
        self._batches = cycle(batches)
        name, options = _OPTIMIZERS[optimizer]
        if way.scope is None:
            self._optimizer = getattr(torch.optim, name)(self.model.parameters(), lr=0.0, fused=True, **options)
            return
        meprop.convert(
            self.model,
            meprop.TopK(k, scope=way.scope),
            sparse_grad=way.sparse_rows is not None,
            compute_dtype=torch.bfloat16 if way.bf16 else None,
            when="always",
        )
        sparse_rows = way.sparse_rows or "exact"
        self._optimizer = getattr(optim, name)(self.model.parameters(), lr=0.0, sparse_rows=sparse_rows, **options)

    def loss(self, x: Tensor, classes: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.way.bf16 and self.way.scope is None):
            return F.cross_entropy(self.model(x), classes)

    def run(self) -> None:
        x, classes = next(self._batches)
        start = perf_counter()
        loss = self.loss(x, classes)
        forward = perf_counter()
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        backward = perf_counter()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.phases.append((forward - start, backward - forward, perf_counter() - backward))

    def what_is_wrong(self, oracle: tuple[Tensor, list[Tensor]]) -> str | None:
        """How loss and gradients of the first batch differ from the oracle's; None if they do not."""
        exact, gradients = oracle
        loss = self.loss(*next(self._batches))
        if not torch.allclose(loss.double(), exact, rtol=0.02 if self.way.bf16 else 1e-5):
            return "its loss differs from the oracle's"
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        tolerance = _TOLERANCE
        if self.way.bf16:
            tolerance = _BF16_TOLERANCE_PER_EXAMPLE if self.way.scope == "example" else _BF16_TOLERANCE
        for (name, parameter), expected in zip(self.model.named_parameters(), gradients, strict=True):
            grad = torch.full_like(expected, torch.nan) if parameter.grad is None else parameter.grad.to_dense()
            if not (grad - expected).norm() <= tolerance * expected.norm():
                return f"the gradient of {name} differs from the oracle's"
        self._optimizer.zero_grad()
        return None


def _oracle(
    plain: nn.Module, scope: Scope | None, k: float, batch: tuple[Tensor, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a batch in float64, where the reference serves."""
    model = deepcopy(plain).double()
    if scope is not None:
        meprop.convert(model, meprop.TopK(k, scope=scope), when="always")
    x, classes = batch
    loss = F.cross_entropy(model(x.double()), classes)
    loss.backward()  # pyright: ignore[reportUnknownMemberType]
    return loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


# ---------------------------------------------------------------- the command


@dataclass(frozen=True)
class Step(Bench[CaseResult, StepBench]):
    """Time whole training steps of multilayer perceptrons, dense and sparse: forward pass, backward pass, optimizer."""

    name = "step"
    legend = (
        "Times in ms. Step: 20th percentile / median / 80th percentile; its parts: 20th percentiles. Ratios: baseline "
        "/ this row, of the 20th percentiles (of the medians), above 1 this row is faster."
    )
    figure = FIGURE
    figure_title = "Parts of the step"

    models: tuple[str, ...] = ("841-2500-2000-1500-1000-500-10@100", "784-500-500-10@100", "784-500-500-10@10")
    """The models: widths and batch of each."""
    optimizers: tuple[OptimizerName, ...] = ("adam",)
    """The optimizers. Each model is timed with each of them. Plain sgd is without momentum."""
    k: int | float = 0.04
    """How many entries of each hidden layer's output gradient are kept: a count (20), or a share of the features."""
    seconds: float = 3.0
    """Seconds to spend on each way of doing the step. A slow one takes longer, for 9 rounds."""
    keep_memory: bool = False
    """Let the C library keep freed memory, as training from the command line does. Dense gains more than sparse."""

    def prepare(self) -> Measure[CaseResult, StepBench]:
        """Read the names of the models."""
        check_seconds(self.seconds)
        keep_freed_memory(self.keep_memory)
        meprop.TopK(self.k)
        models = [Model.parse(name) for name in self.models]
        if not models or not self.optimizers:
            raise ValueError("--models and --optimizers: there must be at least one of each")
        return lambda config, after: run(models, self.optimizers, self.k, self.seconds, dict(config), after)

    def outcome(self, result: CaseResult) -> str:
        """Return the name, and whether a way is wrong."""
        return f"{result.name}: {'WRONG' if any(each.wrong for each in result.ways) else 'timed'}"

    def table(self, results: Sequence[CaseResult]) -> str:
        """Return a table per case."""
        return "\n\n".join(f"{result.name}\n{table_of(_HEAD, result.ways, _cells)}" for result in results)

    def blocks(self, results: Sequence[CaseResult]) -> list[str]:
        """Return a title and a table per case."""
        return [
            block
            for result in results
            for block in (f"**{result.name}**", pages.markdown_table([_HEAD, *map(_cells, result.ways)]))
        ]

    def about(self, record: StepBench) -> str:
        """Return the circumstances, and k."""
        return f"{record.circumstances} k = {record.config['k']}."

    def draw(self, record: StepBench, path: Path) -> bool:
        """Draw the parts of each step as stacked bars."""
        from meprop.reporting.bench_step import draw

        draw(record, path)
        return True

    def figure_beside(self, page: Path) -> Path:
        """Return the path of a page's figure, which has the same name on all pages."""
        return page.with_name(FIGURE)


_HEAD = ("", *PHASES, "step", *(f"against {base}" for base in BASELINES))


def _cells(result: WayResult) -> list[str]:
    if result.step is None:
        return [result.name, *[""] * len(PHASES), "WRONG", *[""] * len(BASELINES)]
    parts = [f"{1e3 * result.phases[phase].p20:.3g}" for phase in PHASES]
    found = (result.ratios.get(base) for base in BASELINES)  # None: that baseline is wrong
    return [result.name, *parts, result.step.milliseconds, *("" if ratio is None else str(ratio) for ratio in found)]
