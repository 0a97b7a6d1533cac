"""The outcome of `meprop simplify`: how small and how fast the models got; pictures of widths and activity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table
from torch import Tensor

from meprop.bench.measure import Times, interleaved
from meprop.convert import plain_copy
from meprop.machine import write_atomically
from meprop.reporting.terminal import spread
from meprop.training import tracking
from meprop.training.loop import Trainer
from meprop.training.records import Run

if TYPE_CHECKING:
    from typing_extensions import Self

WIDTHS, ACTIVITY = "widths.png", "activity.png"
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito's


@dataclass(frozen=True)
class ModelRecord:
    """One trained model, as plain torch layers."""

    rule: str
    seed: int
    parameters: int
    """Numbers in its parameters."""
    width: float
    """Units of the layers that back-propagate sparsely in the other runs, on average."""
    first_step: float
    """Seconds of a training step, mean of the first epoch."""
    last_step: float
    """The same of the last epoch."""
    inference: Times
    """Seconds of a forward pass of the first training batch in evaluation mode, models of one seed in turns."""


@dataclass(frozen=True)
class SimplifyResult(tracking.Result):
    """The content of result.json: as a comparison's, and the models."""

    models: list[ModelRecord] = field(default_factory=list[ModelRecord])

    @classmethod
    def of(cls, content: dict[str, Any]) -> Self:
        """Return the record from plain data."""
        models: list[dict[str, Any]] = [{**each, "inference": Times(**each["inference"])} for each in content["models"]]
        return super().of({**content, "models": [ModelRecord(**each) for each in models]})


def describe(trainers: Sequence[Trainer], seconds: float) -> list[ModelRecord]:
    """Return the records of the models of one seed, trained to the end.

    Args:
        trainers: One of them is simplified.
        seconds: To spend on timing inference.
    """
    (simplifier,) = (trainer.simplifier for trainer in trainers if trainer.simplifier is not None)
    hidden = [layer.name for layer in simplifier.report().layers if layer.reason is None]
    models = {trainer.name: plain_copy(trainer.model).eval() for trainer in trainers}
    arguments, options = _inputs(trainers[0], models[trainers[0].name])
    with torch.inference_mode():
        sides = {name: (lambda model=model: model(*arguments, **options)) for name, model in models.items()}
        inference = interleaved(sides, seconds)
    records: list[ModelRecord] = []
    for trainer in trainers:
        model, ends = models[trainer.name], [0.0, *(record.seconds for record in trainer.curve)]
        widths = [_width(model.get_submodule(name)) for name in hidden]
        records.append(
            ModelRecord(
                rule=trainer.name,
                seed=trainer.seed,
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                width=mean(widths) if widths else 0.0,
                first_step=ends[1] / trainer.steps_per_epoch,
                last_step=(ends[-1] - ends[-2]) / trainer.steps_per_epoch,
                inference=inference[trainer.name],
            )
        )
    return records


def _inputs(trainer: Trainer, model: torch.nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what the loss calls the model with, for the first batch."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_model: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        calls.append((arguments, options))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.setup.loss(model, trainer.to_device(next(iter(trainer.setup.batches))))
    hook.remove()
    return calls[0]


def _width(layer: torch.nn.Module) -> int:
    if isinstance(layer, torch.nn.LSTM):
        return layer.hidden_size
    if isinstance(layer, torch.nn.Linear):
        return layer.out_features
    assert isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d)
    return layer.out_channels


def model_table(models: Sequence[ModelRecord]) -> Table:
    """Return a table of one column per kind of run: width, parameters, steps and inference."""
    by_rule = {
        rule: [model for model in models if model.rule == rule] for rule in dict.fromkeys(m.rule for m in models)
    }
    table = Table(
        title="The models",
        caption="Width: mean of the layers that can be pruned. Inference: a batch, 20th percentile.",
        caption_justify="left",
        min_width=60,
    )
    table.add_column("")
    for rule in by_rule:
        table.add_column(rule, justify="right")
    rows: list[tuple[str, Callable[[ModelRecord], float], int]] = [
        ("width", lambda model: model.width, 1),
        ("parameters, thousands", lambda model: model.parameters / 1e3, 1),
        ("step in the first epoch, ms", lambda model: 1e3 * model.first_step, 2),
        ("step in the last epoch, ms", lambda model: 1e3 * model.last_step, 2),
        ("inference, ms", lambda model: 1e3 * model.inference.p20, 3),
    ]
    for label, value, digits in rows:
        table.add_row(label, *(spread([value(model) for model in group], digits) for group in by_rule.values()))
    return table


def draw_widths(runs: Sequence[Run], starts: Mapping[str, int], steps_per_epoch: int, path: Path) -> None:
    """Draw how wide each layer is over the epochs, into a PNG: a thin line per seed.

    Args:
        runs: Simplified ones.
        starts: The width that each set of units began with, by its label.
        steps_per_epoch: Of training.
        path: The file; it is replaced if it exists.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (label, start), color in zip(starts.items(), _COLORS * len(starts), strict=False):
        for run in runs:
            epochs = [0.0, *(check["step"] / steps_per_epoch for check in run.checks), float(run.epochs)]
            widths = [start, *(check["widths"][label] for check in run.checks)]
            axes.step(
                epochs,
                [*widths, widths[-1]],
                where="post",
                color=color,
                linewidth=1.8 if len(runs) == 1 else 1.1,
                label=f"{label}: {start} to {spread([run.checks[-1]['widths'][label] for run in runs], 0)}"
                if run is runs[0]
                else None,
            )
    for check, earlier in zip(runs[0].checks, [None, *runs[0].checks], strict=False):
        if check["prunes"]:
            begin = 0.0 if earlier is None else earlier["step"] / steps_per_epoch
            axes.axvspan(begin, check["step"] / steps_per_epoch, color="#999999", alpha=0.15, linewidth=0)
    axes.set_xlabel("epochs; in the grey ones units are removed")
    axes.set_xlim(0, max(run.epochs for run in runs))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("units")
    axes.set_ylim(0, 1.05 * max(starts.values()))
    axes.grid(alpha=0.3)
    axes.legend(title="layer" if len(runs) == 1 else f"layer, mean of {len(runs)} seeds")
    axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def draw_activity(activity: Mapping[str, Tensor], path: Path) -> None:
    """Draw a heat map of how often each unit of each layer is selected, into a PNG; units in order of that.

    Args:
        activity: `meprop.Simplifier.activity`: shares of the examples, NaN for units that are removed.
        path: The file; it is replaced if it exists.
    """
    figure = Figure(figsize=(9, 1.2 + 0.75 * len(activity)), layout="constrained")
    rows = figure.subplots(len(activity), 1, squeeze=False)[:, 0]
    colors = colormaps["viridis"].with_extremes(bad="#DDDDDD")
    image = None
    for axes, (label, shares) in zip(rows, activity.items(), strict=True):
        ordered = shares.nan_to_num(-1.0).sort(descending=True).values
        image = axes.imshow(
            ordered.where(ordered >= 0, torch.nan)[None].numpy(), aspect="auto", vmin=0, vmax=1, cmap=colors
        )
        removed = int(shares.isnan().sum())
        axes.set_title(f"layer {label}: {len(shares) - removed} of {len(shares)} units", fontsize=9, loc="left")
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if image is not None:
        figure.colorbar(image, ax=list(rows), label="share of examples")
    rows[-1].set_xlabel("units, the most often selected first; grey: removed")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
