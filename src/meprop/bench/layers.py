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
from functools import partial
from itertools import islice
from typing import Any, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

import meprop
from meprop.bench import oracle
from meprop.bench.base import Measure, TableBench, keep_freed_memory
from meprop.bench.measure import Ratio, Times, check_seconds, interleaved, until_stopped
from meprop.bench.record import Record
from meprop.convert import LayerReport
from meprop.disturbance import DisturbanceMeter
from meprop.errors import MepropError
from meprop.rules import Rule
from meprop.training import tasks
from meprop.training.config import RunConfig, TrainingConfig
from meprop.training.loop import Trainer
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
    calls = _record(dense, [layer.name for layer in found], recorded)
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
        together: dict[str, list[_Backward]] = {"dense": [], "sparse": []}
        for name, layer in layers.items():
            wrong = _wrong(*modules[name], calls[name], rule)
            if wrong is not None:
                rows.append(Comparison(name, layer, wrong=wrong))
                after(rows[-1])
                continue
            passes = {
                side: _backward(module, calls[name]) for side, module in zip(together, modules[name], strict=True)
            }
            for side, backward in passes.items():
                together[side].append(backward)
            add(name, dict(passes), layer, sum(_rows(modules[name][0], call) for call in calls[name]) / len(recorded))
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


# ---------------------------------------------------------------- what a layer sees in training


@dataclass
class _Call:
    """One call of a layer: its arguments, whose tensors are leaves of a graph, and its output's gradients."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grads: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """By place among the tensors of the output."""

    def keep(self, place: int, grad: Tensor) -> None:
        """Keep the gradient of a tensor of the output."""
        self.grads[place] = grad.clone()

    @property
    def inputs(self) -> list[Tensor]:
        return _tensors((self.args, self.kwargs))


def _rows(layer: nn.Module, call: _Call) -> int:
    """How many rows of output features a call has: examples or words; positions in the images of a convolution."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return next(iter(call.grads.values())).numel() // layer.out_channels
    return call.inputs[0].shape[:-1].numel()


def _record(dense: Trainer, names: Sequence[str], batches: Sequence[Any]) -> dict[str, list[_Call]]:
    """The calls of layers that get a gradient."""
    model, calls = dense.model.train(), {name: list[_Call]() for name in names}

    def hook(name: str) -> Callable[..., None]:
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            call = _Call(_leaves(args), _leaves(kwargs))
            calls[name].append(call)
            for place, tensor in enumerate(_tensors(output)):
                if tensor.requires_grad:
                    tensor.register_hook(partial(call.keep, place))

        return record

    hooks = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names]
    with dense.task.blamed("a training step"):
        for batch in batches:
            dense.setup.loss(model, batch).backward()  # pyright: ignore[reportUnknownMemberType]
    model.zero_grad()
    for handle in hooks:
        handle.remove()
    return {name: [call for call in of if call.grads] for name, of in calls.items()}


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples (a PackedSequence is one) and dicts."""
    if isinstance(value, Tensor):
        return [value]
    parts: Any = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _leaves(value: Any) -> Any:
    """The same with each tensor detached, that needs a gradient where it did."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: _leaves(part) for key, part in cast("dict[str, Any]", value).items()}
    if isinstance(value, tuple):
        parts = map(_leaves, cast("tuple[Any, ...]", value))
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


# ---------------------------------------------------------------- the backward pass of a layer

_Gradients = dict[str, Tensor]
_Backward = Callable[[], list[_Gradients]]


def _backward(layer: nn.Module, calls: Sequence[_Call]) -> _Backward:
    """The backward pass of graphs that are made now, one for each call: gradients of inputs and parameters by name."""
    passes: list[tuple[list[Tensor], dict[str, Tensor], list[Tensor]]] = []
    for call in calls:
        outputs = _tensors(layer(*call.args, **call.kwargs))
        inputs = [tensor for tensor in call.inputs if tensor.requires_grad]
        leaves = {"input" if place == 0 else f"input {place}": tensor for place, tensor in enumerate(inputs)}
        leaves |= {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
        passes.append(([outputs[place] for place in call.grads], leaves, list(call.grads.values())))

    def run() -> list[_Gradients]:
        return [
            dict(
                zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), grads, retain_graph=True), strict=True)
            )
            for outputs, leaves, grads in passes
        ]

    return run


def _all(passes: Sequence[_Backward]) -> Callable[[], object]:
    return lambda: [backward() for backward in reversed(passes)]


# ---------------------------------------------------------------- is it right?


def _wrong(dense: nn.Module, sparse: nn.Module, calls: Sequence[_Call], rule: Rule) -> str | None:
    """What is wrong with a sparse layer; None if nothing is."""
    for call in calls:
        outputs = [_tensors(layer.eval()(*call.args, **call.kwargs)) for layer in (dense, sparse)]
        for layer in (dense, sparse):
            layer.train()
        if not all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in zip(*outputs, strict=True)):
            return "its output differs from the dense layer's"
        graph = _backward(sparse, [call])

        def backward(graph: _Backward = graph) -> _Gradients:
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
        return {**fixed, "k": self.k, "scope": self.scope, "noise": self.noise, "fuse": self.fuse}

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
        settings |= {"fuse": True} if record.config.get("fuse") else {}
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
