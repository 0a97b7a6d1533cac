"""The training loop: one `Trainer` per run, `fit` to train several in turns."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from itertools import islice
from math import isfinite
from time import perf_counter
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

import meprop
from meprop.errors import MepropError
from meprop.nn.base import SparseLayer
from meprop.rules import Rule
from meprop.speed import Decision
from meprop.training.config import DENSE, RunConfig, SimplifyConfig, TrainingConfig
from meprop.training.records import EpochRecord, Run, Seconds
from meprop.training.task import Evaluate, Task, generators_of


class DivergedError(MepropError):
    """The training of one run came to numbers that are not finite.

    Args:
        trainer: Of that run.
        what: What became what, and where.
    """

    def __init__(self, trainer: Trainer, what: str) -> None:
        run = f"{trainer.name}, seed {trainer.seed}"
        ours = "--lr, or a smaller [training] lr in an experiment's file"
        smaller = ours if isinstance(trainer.config, TrainingConfig) else "learning rate"
        super().__init__(f"{what} ({run}): try a smaller {smaller}")
        self.trainer = trainer


class Trainer:
    """One training run, which can be advanced in parts, saved and continued bit for bit.

    Runs with the same seed start from the same weights and see the same batches and dropout, whatever the rule; only
    random-k draws from the numbers that dropout draws from.

    Args:
        task: What to train.
        config: How; `config.seeds` and `config.k` are not looked at, the next two arguments say which run this is.
        rule: The sparse rule, or None for a dense run.
        seed: Seed of the initial weights, the order of the data and dropout.
        simplify: How to simplify the model of a sparse run; None: not at all.

    Raises:
        ValueError: The warm-up of `simplify` takes all epochs, or dense steps take all steps of a sparse run.
        MepropError: There is no such accelerator.
    """

    def __init__(
        self,
        task: Task,
        config: RunConfig,
        rule: Rule | None,
        seed: int,
        simplify: SimplifyConfig | None = None,
    ) -> None:
        import numpy as np
        from lightning_fabric import Fabric  # imported here since it takes seconds, which `meprop --help` need not wait

        if config.accelerator == "cuda" and not torch.cuda.is_available():
            raise MepropError("--accelerator cuda: torch finds no GPU here; give cpu, or auto")
        if simplify is not None and simplify.warmup >= config.epochs:
            raise ValueError(f"--warmup {simplify.warmup} must be below --epochs {config.epochs}, to remove anything")
        self.task, self.config, self.rule, self.seed = task, config, rule, seed
        # Fabric chooses device and precision. Its module wrapper would add a tenth to such short steps, so the loop
        # uses the plain module under `autocast`, which is all that these two precisions ask for.
        self._fabric = Fabric(accelerator=config.accelerator, devices=1, precision=config.precision)
        self.device = self._fabric.device
        self._cuda_devices = [self.device] if self.device.type == "cuda" else []

        self._orders: list[torch.Generator] = []
        self._random = self._random_state()
        with self._own_random_state():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.set_state({**np.random.MT19937(seed).state})  # noqa: NPY002
            self.setup = task.make(seed, config.of_dense() if rule is None else config)
            self.model, self.optimizer = self.setup.model.to(self.device), self.setup.optimizer
            if self._cuda_devices:  # with state that it may have already
                self.optimizer.load_state_dict(self.optimizer.state_dict())
            at_start = self._random_state()
            if rule is not None:
                config.convert(self.model, rule)
        self._orders = generators_of(self.setup.batches)
        self._random = {**at_start, "generators": [each.get_state() for each in self._orders]}
        self.steps_per_epoch = self.setup.steps
        self.simplifier: meprop.Simplifier | None = None
        if simplify is not None:
            if self.setup.example_inputs is None:
                raise ValueError(f"task {task.name}: to simplify needs Setup(example_inputs=...)")
            inputs = self.to_device(self.setup.example_inputs)
            self.simplifier = simplify.simplifier(self.model, self.optimizer, self.steps_per_epoch, inputs)

        self.schedule: meprop.RuleSchedule | None = None
        if rule is not None:
            self.schedule = config.rule_schedule(self.model, config.epochs * self.steps_per_epoch)

        self._epoch_start = self._random
        self._batches: Iterator[Any] | None = None
        self.step = 0
        """Steps done in the current epoch."""
        self.loss_sum = 0.0
        """Sum of their losses."""
        self.seconds = Seconds()
        self.curve: list[EpochRecord] = []
        self._entries = 0, 0  # kept and seen before this epoch, in layers where the gradient decides

    @property
    def name(self) -> str:
        """`"dense"`, the name of the rule, or `"simplified"`."""
        if self.simplifier is not None:
            return "simplified"
        return DENSE if self.rule is None else self.rule.name or type(self.rule).__name__

    @property
    def k(self) -> int | float | None:
        """The rule's, or, where it has none, the one that it was made with. None if dense or left to the gradient."""
        return None if self.rule is None else getattr(self.rule, "k", self.config.k)

    @property
    def report(self) -> meprop.ConversionReport:
        """What each layer does, and why. With a schedule, what it does by the rule that the schedule starts from."""
        with nullcontext() if self.schedule is None else self.schedule.paused():
            return meprop.report(self.model)

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return len(self.curve)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch == self.config.epochs

    def to_device(self, value: Any) -> Any:
        """Return tensors, also those within tuples, lists and dicts, on the device of this run."""
        return self._fabric.to_device(value)

    def advance(self, steps: int, stop: Callable[[], bool] = lambda: False) -> None:
        """Train up to `steps` batches; stop early at the end of an epoch, and then evaluate dev and test.

        Args:
            steps: How many.
            stop: Asked before each step whether to stop early.
        """
        self.model.train()
        with self._own_random_state():
            for _ in range(steps):
                if stop():
                    break
                with self.task.blamed("the batches"):
                    if self._batches is None:
                        self._batches = self._begin_epoch()
                    batch = next(self._batches, None)
                with self.task.blamed("a training step" if batch is not None else "the end of an epoch"):
                    if batch is None:
                        self._end_epoch()
                        break
                    self._train_step(batch)

    def _begin_epoch(self) -> Iterator[Any]:
        """Return the batches of the epoch that are not yet seen: after a resume some are."""
        if self.step == 0:
            return islice(self.setup.batches, self.steps_per_epoch)
        now = self._random_state()
        self._set_random_state(self._epoch_start)
        batches = islice(self.setup.batches, self.steps_per_epoch)
        for _ in range(self.step):
            next(batches)
        self._set_random_state(now)
        return batches

    def _train_step(self, batch: Any) -> None:
        seconds, clock = self.seconds, self._clock
        if self._cuda_devices:
            batch = self.to_device(batch)
        start = clock()
        with self._fabric.autocast():
            loss = self.setup.loss(self.model, batch)
        forward_end = clock()
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        backward_end = clock()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.setup.scheduler is not None and self.setup.scheduler_interval == "step":
            self.setup.scheduler.step()
        if self.simplifier is not None:
            self.simplifier.step()
        if self.schedule is not None:
            self.schedule.step()
        end = clock()

        seconds.forward += forward_end - start
        seconds.backward += backward_end - forward_end
        seconds.optimizer += end - backward_end
        seconds.step += end - start
        self.step += 1
        value = loss.item()
        if not isfinite(value):
            raise DivergedError(self, f"the loss became {value} in epoch {self.epoch + 1}, step {self.step}")
        self.loss_sum += value

    def _clock(self) -> float:
        if self._cuda_devices:
            torch.cuda.synchronize(self.device)
        return perf_counter()

    def _end_epoch(self) -> None:
        if self.step < self.steps_per_epoch:
            raise ValueError(
                f"Setup(batches=...) ended after {self.step} of {self.steps_per_epoch} batches of an epoch"
            )
        dev = self._evaluate(self.setup.evaluate)
        test = {} if self.setup.test is None else self._evaluate(self.setup.test)
        for split, metrics in (("dev", dev), ("test", test)):
            for metric, value in metrics.items():
                if not isfinite(value):
                    raise DivergedError(self, f"{split} {metric} became {value} in epoch {self.epoch + 1}")
        widths = {} if self.simplifier is None else self.simplifier.widths
        density = self._density_of_epoch()
        self.curve.append(
            EpochRecord(self.epoch + 1, self.loss_sum / self.step, dev, test, self.seconds.step, widths, density)
        )
        self.step, self.loss_sum, self._batches = 0, 0.0, None
        if self.setup.scheduler is not None and self.setup.scheduler_interval == "epoch":
            with warnings.catch_warnings():  # resumed at the end of an epoch, this process has done no step
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                if isinstance(self.setup.scheduler, ReduceLROnPlateau):
                    self.setup.scheduler.step(dev[self.setup.metric])
                else:
                    self.setup.scheduler.step()
        self._epoch_start = self._random_state()

    def _evaluate(self, evaluate: Evaluate) -> dict[str, float]:
        """Return metrics of the model, which is as it was after that, and so are the random generators."""
        before = self._random_state()
        self.model.eval()
        try:
            with torch.no_grad(), self._fabric.autocast():
                found = evaluate(self.model)
        finally:
            self.model.train()
            self._set_random_state(before)
        return dict(found) if isinstance(found, Mapping) else {self.setup.metric: found}

    def _density_of_epoch(self) -> float | None:
        """The share of the entries that was kept since the last call, in layers where the gradient decides."""
        records = [layer.policy.record for layer in self.model.modules() if isinstance(layer, SparseLayer)]
        kept = sum(record.kept for record in records if record is not None)
        seen = sum(record.seen for record in records if record is not None)
        (kept_before, seen_before), self._entries = self._entries, (kept, seen)
        return (kept - kept_before) / (seen - seen_before) if seen > seen_before else None

    def _density(self, layers: Sequence[dict[str, Any]]) -> float | None:
        """The share of the entries that sparse layers propagate, from their reports or from the epochs.

        None if neither the rule nor the epochs say.
        """
        if not layers:
            return 1.0
        if any(layer["k"] is None for layer in layers):
            densities = [record.density for record in self.curve if record.density is not None]
            if not densities:
                return None
            found = sum(densities) / len(densities)
        else:
            found = sum(layer["k"] for layer in layers) / sum(layer["out_features"] for layer in layers)
        dense_steps = self.config.dense_warmup_steps + self.config.dense_end_steps
        dense = dense_steps / (self.config.epochs * self.steps_per_epoch)
        return dense + (1 - dense) * found

    def _random_state(self) -> dict[str, Any]:
        """Return the state of the global generators and of the batches' own, which runs may share as well."""
        import numpy as np

        return {
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state(device) for device in self._cuda_devices],
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
            "generators": [each.get_state() for each in self._orders],
        }

    def _set_random_state(self, state: dict[str, Any]) -> None:
        import numpy as np

        torch.set_rng_state(state["torch"])
        for device, each in zip(self._cuda_devices, state["cuda"], strict=True):
            torch.cuda.set_rng_state(each, device)
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
        for generator, each in zip(self._orders, state["generators"], strict=False):  # none before there are batches
            generator.set_state(each)

    @contextmanager
    def _own_random_state(self) -> Generator[None]:
        """Swap in this run's random state, so that runs in turns, or a caller's draws, do not disturb one another."""
        before = self._random_state()
        self._set_random_state(self._random)
        try:
            yield
            self._random = self._random_state()
        finally:
            self._set_random_state(before)

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to continue bit for bit: tensors and plain data only."""
        return {
            "model": self.model.state_dict(),
            "decisions": {
                name: asdict(decision)
                for name, layer in self.model.named_modules()
                if isinstance(decision := getattr(layer, "decision", None), Decision)
            },
            "optimizer": self.optimizer.state_dict(),
            "simplifier": self.simplifier and self.simplifier.state_dict(),
            "schedule": self.schedule and self.schedule.state_dict(),
            "random": self._random,
            "epoch_start": self._epoch_start,
            "scheduler": self.setup.scheduler and self.setup.scheduler.state_dict(),
            "step": self.step,
            "loss_sum": self.loss_sum,
            "seconds": asdict(self.seconds),
            "curve": [asdict(record) for record in self.curve],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, in a trainer built from the same task, config, rule and seed."""
        if self.simplifier is not None:  # first, as it cuts model and optimizer to their size
            self.simplifier.load_state_dict(state["simplifier"])
        self.model.load_state_dict(state["model"])
        for name, decision in state["decisions"].items():
            layer: Any = self.model.get_submodule(name)
            layer.decision = Decision(**decision)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self._random = state["random"]
        self._epoch_start, self._batches = state["epoch_start"], None
        if self.setup.scheduler is not None:
            self.setup.scheduler.load_state_dict(state["scheduler"])
        self.step, self.loss_sum = state["step"], state["loss_sum"]
        self.seconds = Seconds(**state["seconds"])
        self.curve = [EpochRecord(**record) for record in state["curve"]]

    def result(self) -> Run:
        """Return the outcome after the last completed epoch."""
        layers = [asdict(layer) for layer in self.report.layers] if self.rule is not None else []
        return Run(
            rule=self.name,
            seed=self.seed,
            epochs=self.epoch,
            dev=self.curve[-1].dev,
            test=self.curve[-1].test,
            seconds=asdict(self.seconds),
            k=self.k,
            density=self._density([layer for layer in layers if layer["status"] == "sparse"]),
            curve=[asdict(record) for record in self.curve],
            layers=layers,
            checks=[] if self.simplifier is None else [asdict(check) for check in self.simplifier.history],
        )


def fit(
    trainers: Sequence[Trainer],
    after_turn: Callable[[Trainer], None],
    turn: int = 100,
    stop: Callable[[], bool] = lambda: False,
) -> list[Run]:
    """Train to the end, in turns of `turn` steps, so that a noisy machine disturbs all runs alike.

    Args:
        trainers: The runs.
        after_turn: Called with the trainer after each of its turns, outside what is timed.
        turn: Steps in a turn.
        stop: Asked before each step whether to end the turn; `after_turn` may then end the training by an error.

    Returns:
        The outcome of each trainer, in the same order.
    """
    while unfinished := [trainer for trainer in trainers if not trainer.finished]:
        for trainer in unfinished:
            trainer.advance(turn, stop)
            after_turn(trainer)
    return [trainer.result() for trainer in trainers]
