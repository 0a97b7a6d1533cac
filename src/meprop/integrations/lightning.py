"""A callback for Lightning that converts the module before the strategy wraps it, and logs how sparse it is."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from meprop.convert import convert, report
from meprop.errors import NotSupportedError
from meprop.rules import Rule

__all__ = ["MePropCallback"]


class MePropCallback(pl.Callback):
    """Converts the module in place when a fit begins, and logs "meprop/density" at the end of each epoch.

    The density is that of `meprop.ConversionReport` on the first rank. It is below 1 if some layer is sparse. With
    ``when="auto"`` layers decide in the first step. The report is printed at the end of the fit. Optimizers,
    checkpoints, precision and strategies see the same Parameters under the same names, and need no change.

    Args:
        rule: What to keep, e.g. `meprop.TopK(0.05)`. None means that the module is converted already, and the callback
            only logs.
        **options: The options of `meprop.convert`.

    Raises:
        NotSupportedError: A fit begins with a module that has a `configure_model`. That method may make or wrap layers
            after callbacks could convert them. Call `meprop.convert` there, and give no rule here. Or an optimizer of
            `meprop.optim` has `in_backward`, and the Trainer clips gradients, of which it would find none.
        ValueError: There are options without a rule.

    Example:
        ``lightning.Trainer(callbacks=[MePropCallback(meprop.TopK(0.05))])``
    """

    def __init__(self, rule: Rule | None = None, **options: Any) -> None:
        if rule is None and options:
            raise ValueError(f"{', '.join(options)} without a rule: a module that is converted already has its options")
        self.rule, self.options = rule, options

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
        """Refuses clipping that would have no effect."""
        if trainer.gradient_clip_val and any(getattr(each, "in_backward", False) for each in trainer.optimizers):
            raise NotSupportedError(
                f"gradient_clip_val={trainer.gradient_clip_val} with in_backward=True, which leaves no gradients to "
                "clip. Leave gradient_clip_val out, or make the optimizer without in_backward"
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the density."""
        pl_module.log("meprop/density", report(pl_module).density, rank_zero_only=True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the report."""
        rank_zero_info(str(report(pl_module)))
