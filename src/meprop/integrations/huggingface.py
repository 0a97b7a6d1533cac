"""A callback for Hugging Face's Trainer that converts the model before it is wrapped, and logs how sparse it is."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from meprop.convert import convert, report
from meprop.errors import NotSupportedError
from meprop.rules import Rule

__all__ = ["MePropCallback"]


class MePropCallback(TrainerCallback):
    """Converts the model in place when the Trainer is made, and adds "meprop_density" to whatever is logged.

    The density is that of `meprop.ConversionReport`. It is below 1 if some layer is sparse. With ``when="auto"`` layers
    decide in the first step. The density is in `trainer.state.log_history` and in what is printed. Trackers
    (`report_to`) do not get it, because they are called before. The report is printed at the end of training.

    Args:
        rule: What to keep, e.g. `meprop.TopK(0.05, scope="batch")`. None means that the model is converted already, and
            the callback only logs.
        **options: The options of `meprop.convert`.

    Raises:
        NotSupportedError: Training begins with another model than the one that was converted, because `model_init` has
            made a new one. Call `meprop.convert` in `model_init`, and give no rule here. Or an optimizer of
            `meprop.optim` has `in_backward`, and the Trainer clips gradients, of which it would find none.
        ValueError: There are options without a rule.

    Example:
        ``Trainer(model, arguments, callbacks=[MePropCallback(meprop.TopK(0.05, scope="batch"))], ...)``
    """

    def __init__(self, rule: Rule | None = None, **options: Any) -> None:
        if rule is None and options:
            raise ValueError(f"{', '.join(options)} without a rule: a model that is converted already has its options")
        self.rule, self.options = rule, options
        self._converted: torch.nn.Module | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Converts the model."""
        if self.rule is not None:
            self._converted = kwargs["model"]
            convert(kwargs["model"], self.rule, **self.options)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses a model that has not been converted, and clipping that would have no effect."""
        if self.rule is not None and kwargs["model"] is not self._converted:
            raise NotSupportedError(
                "the Trainer trains another model than the one that was converted, because model_init has made a new "
                "one. Call meprop.convert in model_init, and give MePropCallback no rule."
            )
        optimizer: Any = kwargs.get("optimizer")
        if getattr(getattr(optimizer, "optimizer", optimizer), "in_backward", False) and args.max_grad_norm:
            raise NotSupportedError(
                f"max_grad_norm={args.max_grad_norm} with in_backward=True, which leaves no gradients to clip. Give "
                "TrainingArguments max_grad_norm=0, or make the optimizer without in_backward"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the density to what has been logged."""
        density = report(kwargs["model"]).density
        state.log_history[-1]["meprop_density"] = density
        if logs is not None:
            logs["meprop_density"] = density

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prints the report."""
        if state.is_world_process_zero:
            print(report(kwargs["model"]))
