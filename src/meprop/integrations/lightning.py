"""A callback for Lightning that converts the module before the strategy wraps it, and logs how sparse it is."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from meprop.convert import convert
from meprop.errors import NotSupportedError
from meprop.meter import Meter
from meprop.report import report
from meprop.rules import Rule
from meprop.rules.base import check_flag

__all__ = ["MePropCallback"]


class MePropCallback(pl.Callback):
    """Converts the module in place when a fit begins, and logs what it kept at the end of each epoch.

    It logs the numbers of `meprop.Meter` on the first rank as "meprop/density", "meprop/k" and so on. The density is
    below 1 if some layer is sparse. With ``when="auto"`` layers decide in the first step. The report is printed at the
    end of the fit. Optimizers, checkpoints, precision and strategies see the same Parameters under the same names, and
    need no change.

    Args:
        rule: What to keep, e.g. `meprop.TopK(0.05)`. None means that the module is converted already, and the callback
            only logs.
        energy: Whether to log "meprop/energy" as well. It is measured in the first backward pass of each epoch.
        layers: Whether to log the numbers of each layer as well.
        **options: The options of `meprop.convert`.

    Raises:
        NotSupportedError: A fit begins with a module that has a `configure_model`. That method may make or wrap layers
            after callbacks could convert them. Call `meprop.convert` there, and give no rule here. Or an optimizer of
            `meprop.optim` has `in_backward`, and the Trainer clips gradients, of which it would find none.
        TypeError: `energy` or `layers` is not a bool.
        ValueError: There are options without a rule.

    Example:
        ``lightning.Trainer(callbacks=[MePropCallback(meprop.TopK(0.05))])``
    """

    def __init__(self, rule: Rule | None = None, *, energy: bool = False, layers: bool = False, **options: Any) -> None:
        if rule is None and options:
            raise ValueError(f"{', '.join(options)} without a rule: a module that is converted already has its options")
        check_flag("energy", energy)
        check_flag("layers", layers)
        self.rule, self.energy, self.layers, self.options = rule, energy, layers, options
        self._meter: Meter | None = None
        self._measuring, self._to_measure = ExitStack(), False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Converts before the strategy wraps the module."""
        if stage != "fit" or self.rule is None:
            return
        if is_overridden("configure_model", pl_module):
            raise NotSupportedError(
                f"{type(pl_module).__name__} has a configure_model, which runs after this callback; call "
                "meprop.convert there, before anything is wrapped, and give MePropCallback no rule"
            )
        convert(pl_module, self.rule, **self.options)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses clipping that would have no effect, and begins to count."""
        if trainer.gradient_clip_val and any(getattr(each, "in_backward", False) for each in trainer.optimizers):
            raise NotSupportedError(
                f"gradient_clip_val={trainer.gradient_clip_val} with in_backward=True, which leaves no gradients to "
                "clip. Leave gradient_clip_val out, or make the optimizer without in_backward"
            )
        self._meter = Meter(pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets the next backward pass be measured."""
        self._to_measure = self.energy

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Begins to measure, in the first backward pass of an epoch."""
        if self._to_measure and self._meter is not None:
            self._measuring.enter_context(self._meter.measuring())

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends to measure."""
        self._measuring.close()
        self._to_measure = False

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the numbers of the epoch."""
        assert self._meter is not None  # since the training began
        found = self._meter.read(layers=self.layers)
        pl_module.log_dict({f"meprop/{name}": number for name, number in found.items()}, rank_zero_only=True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the report."""
        rank_zero_info(str(report(pl_module)))
