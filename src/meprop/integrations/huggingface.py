"""A callback for Hugging Face's Trainer that converts the model before it is wrapped, and logs how sparse it is.

The Trainer calls trackers (`report_to`) before any callback of the user's, with the dict that they log. So the numbers
have to be in that dict before the Trainer calls any callback: see `_with_numbers`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from meprop.convert import convert
from meprop.errors import NotSupportedError
from meprop.meter import Meter
from meprop.report import report
from meprop.rules import Rule
from meprop.rules.base import check_flag

__all__ = ["MePropCallback"]


class MePropCallback(TrainerCallback):
    """Converts the model in place when the Trainer is made, and adds what it kept to each log of training steps.

    It adds the numbers of `meprop.Meter` as "meprop_density", "meprop_k" and so on: to `trainer.state.log_history`, to
    what is printed, and to what trackers (`report_to`) get. The density is below 1 if some layer is sparse. With
    ``when="auto"`` layers decide in the first step. The report is printed at the end of training.

    Args:
        rule: What to keep, e.g. `meprop.TopK(0.05, scope="batch")`. None means that the model is converted already, and
            the callback only logs.
        energy: Whether to add "meprop_energy" as well. It is measured in the first step after each log.
        layers: Whether to add the numbers of each layer as well.
        **options: The options of `meprop.convert`.

    Raises:
        NotSupportedError: Training begins with another model than the one that was converted, because `model_init` has
            made a new one. Call `meprop.convert` in `model_init`, and give no rule here. Or an optimizer of
            `meprop.optim` has `in_backward`, and the Trainer clips gradients, of which it would find none.
        TypeError: `energy` or `layers` is not a bool.
        ValueError: There are options without a rule.

    Example:
        ``Trainer(model, arguments, callbacks=[MePropCallback(meprop.TopK(0.05, scope="batch"))], ...)``
    """

    def __init__(self, rule: Rule | None = None, *, energy: bool = False, layers: bool = False, **options: Any) -> None:
        if rule is None and options:
            raise ValueError(f"{', '.join(options)} without a rule: a model that is converted already has its options")
        check_flag("energy", energy)
        check_flag("layers", layers)
        self.rule, self.energy, self.layers, self.options = rule, energy, layers, options
        self._meter: Meter | None = None
        self._measuring, self._to_measure = ExitStack(), False
        self._converted: torch.nn.Module | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Converts the model."""
        if self.rule is not None:
            self._converted = kwargs["model"]
            convert(kwargs["model"], self.rule, **self.options)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses a model that has not been converted, and clipping that would have no effect. It begins to count."""
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
        self._meter, self._to_measure = Meter(kwargs["model"]), self.energy

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins to measure, in the first step after a log."""
        if self._to_measure and self._meter is not None:
            self._measuring.enter_context(self._meter.measuring())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends to measure."""
        self._measuring.close()
        self._to_measure = False

    def add_numbers(self, logs: dict[str, float]) -> None:
        """Adds the numbers since the last log of training steps to this one."""
        if self._meter is not None:
            found = self._meter.read(layers=self.layers)
            logs |= {f"meprop_{name}": number for name, number in found.items()}
            self._to_measure = self.energy

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prints the report."""
        if state.is_world_process_zero:
            print(report(kwargs["model"]))


def _with_numbers(on_log: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps what calls the callbacks with a log, so that callbacks of ours add to it before others see it."""

    @wraps(on_log)
    def call(
        handler: CallbackHandler,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> Any:
        ours = [callback for callback in handler.callbacks if isinstance(callback, MePropCallback)]
        if "loss" in logs and ours:  # it is one of training steps
            for callback in ours:
                callback.add_numbers(logs)
            state.log_history[-1] |= logs
        return on_log(handler, args, state, control, logs, **kwargs)

    return call


CallbackHandler.on_log = _with_numbers(CallbackHandler.on_log)
