"""The hidden layers of a task, ours or the user's, sparse against dense, on what they see in training.

A dense model is trained for some steps, then a few batches are run through it and each hidden layer's inputs and output
gradients recorded. Timed is the backward pass of each layer alone on these, for the gradients that training needs, the
selection and autograd's own cost included; graphs are made once, outside the timing, and kept. Linear layers are held
against the oracle first, others are checked for what can be checked without one; a layer that is wrong is not timed.
The whole step is timed as well: forward pass, backward pass and optimizer. All times are per batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import nn

import meprop
from meprop.bench import oracle
from meprop.bench.base import Measure, TableBench, keep_freed_memory
from meprop.bench.measure import Ratio, Times, check_seconds, interleaved, until_stopped
from meprop.bench.record import Record
from meprop.bench.recorded import Backward, Call, Gradients, backward_of, recorded_calls, rows_of, tensors_of
from meprop.disturbance import DisturbanceMeter
from meprop.errors import MepropError
from meprop.report import LayerReport
from meprop.rules import Rule
from meprop.training import tasks
from meprop.training.config import RunConfig, TrainingConfig
from meprop.training.loop import Trainer
from meprop.training.script import ScriptConfig
from meprop.training.task import Task

SEED = 0

TaskConfig = TypeVar("TaskConfig")


@dataclass(frozen=True)
class Comparison:
    """One row of the table: the backward pass of a layer or of all, or the whole step.

    Attributes:
        name: The layer's, or what it is.
        layer: What `meprop.convert` reports of the layer; None of several.
        rows: N, the examples or words in a batch; their mean over the batches.
        wrong: What is wrong with the layer's sparse backward pass; None if nothing is. A wrong one has no times.
        times: Of "dense" and "sparse", per batch.
        ratio: Dense / sparse; None if wrong.
    """

    name: str
    layer: LayerReport | None = None
    rows: float | None = None
    wrong: str | None = None
    times: dict[str, Times] = field(default_factory=dict[str, Times])
    ratio: Ratio | None = None


@dataclass(frozen=True)
class LayersBench(Record):
    """The content of result.json."""

    layers: list[Comparison]
    """The hidden layers; then, if none is wrong, all of several together, and the whole step."""

    @property
    def results(self) -> list[Comparison]:
        """Return those of the layers and, then, of more."""
        return self.layers


def run(
    task: Task,
    training: RunConfig,
    steps: int,
    batches: int,
    seconds: float,
    config: dict[str, Any],
    after: Callable[[Comparison], None] = lambda comparison: None,
) -> LayersBench:
    """Check and time the layers.

    Args:
        task: What to train.
        training: How; on the CPU, and with all layers sparse that can be.
        steps: Of dense training before anything is recorded; at most an epoch.
        batches: To record.
        seconds: To spend on the timing of each row; slow ones take longer, for 9 rounds.
        config: Kept in the record.
        after: Called with each row.

    Raises:
        MepropError: The model has no hidden layer, or none wide enough to be sparse; or none of them gets a gradient.
    """
    meter = DisturbanceMeter()
    dense = Trainer(task, training, None, SEED)
    dense.advance(min(steps, dense.steps_per_epoch))
    rule = training.rule()
    sparse = Trainer(task, training, rule, SEED)
    torch.manual_seed(SEED)  # from which a task of the user's may draw its batches
    with task.blamed("the batches"):
        recorded = list(islice(sparse.setup.batches, batches))
    sparse.load_state_dict(copy.deepcopy(dense.state_dict()))

    of_dense, of_sparse = (dict(trainer.model.named_modules()) for trainer in (dense, sparse))
    found = [layer for layer in sparse.report.layers if layer.status == "sparse" and layer.name in of_dense]
    calls = recorded_calls(dense, [layer.name for layer in found], recorded)
    layers = {layer.name: layer for layer in found if calls[layer.name]}
    if not layers:
        raise MepropError(f"the model has no hidden layer to time that gets a gradient:\n{sparse.report}")
    modules = {name: (of_dense[name], of_sparse[name]) for name in layers}
    rows: list[Comparison] = []

    def add(
        name: str, sides: dict[str, Callable[[], object]], layer: LayerReport | None, examples: float | None
    ) -> None:
        times = {side: _per_batch(spent, len(recorded)) for side, spent in interleaved(sides, seconds).items()}
        if layer is not None:  # a rule whose density follows the gradient has kept something by now
            layer = next(each for each in meprop.report(sparse.model).layers if each.name == name)
        rows.append(Comparison(name, layer, examples, None, times, Ratio.of(times["dense"], times["sparse"])))
        after(rows[-1])

    with until_stopped(rows):
        together: dict[str, list[Backward]] = {"dense": [], "sparse": []}
        for name, layer in layers.items():
            wrong = _wrong(*modules[name], calls[name], rule)
            if wrong is not None:
                rows.append(Comparison(name, layer, wrong=wrong))
                after(rows[-1])
                continue
            passes = {
                side: backward_of(module, calls[name]) for side, module in zip(together, modules[name], strict=True)
            }
            for side, backward in passes.items():
                together[side].append(backward)
            add(name, dict(passes), layer, sum(rows_of(modules[name][0], call) for call in calls[name]) / len(recorded))
        if not any(row.wrong for row in rows):
            if len(layers) > 1:
                add("hidden layers together", {side: _all(passes) for side, passes in together.items()}, None, None)
            add("whole step", {"dense": _steps(dense, recorded), "sparse": _steps(sparse, recorded)}, None, None)
    return LayersBench.of(f"bench-layers-{task.name}", config, meter, rows)


def _per_batch(times: Times, batches: int) -> Times:
    best, p20, p50, p80 = (each / batches for each in (times.best, times.p20, times.p50, times.p80))
    return Times(best, p20, p50, p80, times.calls)


def _steps(trainer: Trainer, batches: Sequence[Any]) -> Callable[[], None]:
    """The whole step on each batch. A learning rate of 0 costs the same, and lets the gradients stay what they are."""
    model, optimizer, loss = trainer.model, trainer.optimizer, trainer.setup.loss
    for group in optimizer.param_groups:
        group["lr"] = 0.0

    def run() -> None:
        for batch in batches:
            loss(model, batch).backward()  # pyright: ignore[reportUnknownMemberType]
            optimizer.step()
            optimizer.zero_grad()

    return run


def _all(passes: Sequence[Backward]) -> Callable[[], object]:
    return lambda: [backward() for backward in reversed(passes)]


# ---------------------------------------------------------------- is it right?


def _wrong(dense: nn.Module, sparse: nn.Module, calls: Sequence[Call], rule: Rule) -> str | None:
    """What is wrong with a sparse layer; None if nothing is."""
    for call in calls:
        outputs = [tensors_of(layer.eval()(*call.args, **call.kwargs)) for layer in (dense, sparse)]
        for layer in (dense, sparse):
            layer.train()
        if not all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in zip(*outputs, strict=True)):
            return "its output differs from the dense layer's"
        graph = backward_of(sparse, [call])

        def backward(graph: Backward = graph) -> Gradients:
            torch.manual_seed(SEED)  # a rule that draws draws the same each time
            return graph()[0]

        gradients = backward()
        if not all(gradient.isfinite().all() for gradient in gradients.values()):
            return "a gradient is not finite"
        found = oracle.varies(backward, gradients)
        if found is None and isinstance(sparse, nn.Linear):
            (grad,), (x,) = call.grads.values(), call.inputs
            grad_NO, x_NI = grad.flatten(0, -2), x.flatten(0, -2)
            torch.manual_seed(SEED)
            selection = oracle.select(rule, grad_NO)
            flat = {name: tensor.flatten(0, -2) if name == "input" else tensor for name, tensor in gradients.items()}
            torch.manual_seed(SEED)
            found = oracle.selection_differs(rule, grad_NO, selection)
            found = found or oracle.gradients_differ(flat, selection, grad_NO, x_NI, sparse.weight)
        if found is not None:
            return found
    return None


# ---------------------------------------------------------------- the command


@dataclass(frozen=True)
class Layers(TableBench[Comparison, LayersBench], Generic[TaskConfig]):
    """Time the hidden layers of a task, sparse against dense, on what they see in training; and the whole step."""

    name = "layers"
    head = ("", "kind", "N x I x O", "kept", "dense, ms", "sparse, ms", "ratio", "of medians")
    legend = (
        "Times in ms per batch: 20th percentile / median / 80th percentile. Ratios: dense / sparse of the 20th "
        "percentiles, above 1 sparse is faster. Layers: their backward pass alone, on inputs and output gradients "
        "recorded in training. Whole step: forward pass, backward pass and optimizer."
    )

    task: TaskConfig
    k: int | float
    """How many entries of each output gradient are kept: a count (20), or a share of the features (0.05)."""
    scope: meprop.rules.Scope
    """The k entries are chosen for each example, once for the whole batch (unified top-k), or of the whole gradient."""
    noise: float | None
    """Draw entries under this budget of added variance, in place of k and scope."""
    fuse: bool = False
    """Compute dropout of the sparse model in one pass with the activation before it. It shows in the whole step."""
    skip_zeros: bool = False
    """Leave zeros out of the sparse model's forward products, where that is faster. It shows in the whole step."""
    steps: int = 200
    """Steps of dense training before gradients are recorded. An epoch is the most."""
    batches: int = 4
    """Batches to record. Times are means over them."""
    seconds: float = 5.0
    """Seconds to spend on the timing of each layer. A slow layer takes longer, for 9 rounds."""
    keep_memory: bool = False
    """Let the C library keep freed memory, as training from the command line does. Dense gains more than sparse."""

    @property
    def section(self) -> str:
        """The name of a page's section: each task has its own."""
        return f"bench {self.name} {tasks.name_of(self.task)}"

    @property
    def folder(self) -> str:
        """The name of a folder for the results: each function of a user's file has its own."""
        if isinstance(self.task, ScriptConfig):
            return f"bench-{self.name}-{self.task.path.stem}-{self.task.function}"
        return super().folder

    def prepare(self) -> Measure[Comparison, LayersBench]:
        """Read the task's data."""
        check_seconds(self.seconds)
        keep_freed_memory(self.keep_memory)
        if self.steps < 0:
            raise ValueError(f"--steps must be 0 or more, got {self.steps}")
        if self.batches < 1:
            raise ValueError(f"--batches must be at least 1, got {self.batches}")
        entry = tasks.entry_of(self.task)
        training, task = replace(entry.training, **self._choices()), entry.build(self.task)
        return lambda config, after: run(task, training, self.steps, self.batches, self.seconds, dict(config), after)

    def _choices(self) -> dict[str, Any]:
        """Return the settings of training that are not the task's own."""
        fixed = {"epochs": 1, "accelerator": "cpu", "when": "always"}
        names = ("k", "scope", "noise", "fuse", "skip_zeros")
        return {**fixed, **{name: getattr(self, name) for name in names}}

    def ratio(self, result: Comparison) -> Ratio:
        """Return the only one."""
        assert result.ratio is not None
        return result.ratio

    def cells(self, result: Comparison) -> list[str]:
        """Return the layer, its times and ratio."""
        layer = result.layer
        sizes = f"{result.rows:.0f} x {layer.in_features} x {layer.out_features}" if layer and result.rows else ""
        about = [result.name, layer.kind if layer else "", sizes, f"{layer.density:.1%}" if layer else ""]
        if result.ratio is None:
            return [*about, "", "", "WRONG", ""]
        times = (result.times[side].milliseconds for side in ("dense", "sparse"))
        return [*about, *times, f"{result.ratio.p20:.2f}x", f"{result.ratio.p50:.2f}x"]

    def about(self, record: LayersBench) -> str:
        """Return the circumstances, and the settings."""
        names = ("k", "scope", "optimizer") if record.config["noise"] is None else ("noise", "optimizer")
        settings = {**record.config["task"], **{name: record.config[name] for name in names if name in record.config}}
        settings |= {name: True for name in ("fuse", "skip_zeros") if record.config.get(name)}
        shown = ", ".join(f"{name} = {value}" for name, value in settings.items() if name != "data_dir")
        return f"{record.circumstances} Settings: {shown}."


@dataclass(frozen=True)
class LayersOfOurs(Layers[TaskConfig]):
    """The same of a task of ours, whose optimizer is an option."""

    optimizer: Literal["adam", "adagrad", "sgd"] = "adam"
    """Optimizer of the whole step. It is torch's fused implementation."""

    def _choices(self) -> dict[str, Any]:
        return {**super()._choices(), "schedule": "constant", "optimizer": self.optimizer}


def of_task(config: Any, training: RunConfig) -> Layers[Any]:
    """Return the benchmark of a task, with what its training has by default."""
    choices = (config, training.k, training.scope, training.noise)
    if isinstance(training, TrainingConfig):
        return LayersOfOurs(*choices, optimizer=training.optimizer)
    return Layers(*choices)
