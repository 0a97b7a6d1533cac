"""The training loop: one `Trainer` per run, `fit` to train several in turns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from math import isfinite
from time import perf_counter
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

import meprop
from meprop.disturbance import DisturbanceSum
from meprop.errors import MepropError
from meprop.rules import Rule
from meprop.training.config import DENSE, RunConfig, SimplifyConfig, TrainingConfig
from meprop.training.density import count_entries, density, records
from meprop.training.generators import Generators, generators_of
from meprop.training.live import Live
from meprop.training.pace import Pace
from meprop.training.records import EpochRecord, Run, Seconds, plain_activity
from meprop.training.task import Evaluate, Task


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
        name: What the run is called; see the attribute.

    Raises:
        ValueError: The warm-up of `simplify` takes all epochs, or dense steps take all steps of a sparse run; or the
            budget is in seconds, and the run is to be simplified or its scheduler has steps that seconds cannot give.
        MepropError: There is no such accelerator.
    """

    def __init__(
        self,
        task: Task,
        config: RunConfig,
        rule: Rule | None,
        seed: int,
        simplify: SimplifyConfig | None = None,
        name: str | None = None,
    ) -> None:
        from lightning_fabric import Fabric  # imported here since it takes seconds, which `meprop --help` need not wait

        if config.accelerator == "cuda" and not torch.cuda.is_available():
            raise MepropError("--accelerator cuda: torch finds no GPU here; give cpu, or auto")
        if simplify is not None and simplify.warmup >= config.epochs:
            raise ValueError(f"--warmup {simplify.warmup} must be below --epochs {config.epochs}, to remove anything")
        if simplify is not None and config.budget_seconds is not None:
            raise ValueError("--budget-seconds: cycles of simplifying are counted in epochs; give --epochs alone")
        self.task, self.config, self.rule, self.seed, self._name = task, config, rule, seed, name
        # Fabric chooses device and precision. Its module wrapper would add a tenth to such short steps, so the loop
        # uses the plain module under `autocast`, which is all that these two precisions ask for.
        self._fabric = Fabric(accelerator=config.accelerator, devices=1, precision=config.precision)
        self.device = self._fabric.device
        self._cuda_devices = [self.device] if self.device.type == "cuda" else []

        self._generators = Generators(self._cuda_devices)
        with self._generators.swapped_in():
            self._generators.seed(seed)
            self.setup = task.make(seed, config.of_dense() if rule is None else config)
            self.model, self.optimizer = self.setup.model.to(self.device), self.setup.optimizer
            if self._cuda_devices:  # with state that it may have already
                self.optimizer.load_state_dict(self.optimizer.state_dict())
            at_start = self._generators.state()
            if rule is not None:
                config.convert(self.model, rule)
        self._generators.of_batches = generators_of(self.setup.batches)
        self._generators.own = {**at_start, "generators": [each.get_state() for each in self._generators.of_batches]}
        self.steps_per_epoch = self.setup.steps
        """How many batches a pass over the data has."""
        self._pace = Pace(config.epochs, self.steps_per_epoch, config.budget_seconds)
        self.simplifier: meprop.Simplifier | None = None
        if simplify is not None:
            if self.setup.example_inputs is None:
                raise ValueError(f"task {task.name}: to simplify needs Setup(example_inputs=...)")
            inputs = self.to_device(self.setup.example_inputs)
            self.simplifier = simplify.simplifier(self.model, self.optimizer, self.steps_per_epoch, inputs)

        self.schedule: meprop.RuleSchedule | None = None
        if rule is not None:
            self.schedule = config.rule_schedule(self.model, self._pace.ticks)

        self._batches: Iterator[Any] | None = None
        self._pass_start = self._generators.own
        self._pass_step = 0  # batches taken of the current pass over the data
        self.step = 0
        """Steps done in the current epoch."""
        self.steps_before = 0
        """Steps done in the epochs before it."""
        self._ticks = 0  # of the schedules
        self.loss_sum = 0.0
        """Sum of the losses of the current epoch's steps."""
        self.seconds = Seconds()
        self._disturbance = DisturbanceSum()
        self.curve: list[EpochRecord] = []
        self._entries = 0, 0  # kept and seen before this epoch, in layers where the gradient decides
        self._live: Live | None = None

    @property
    def name(self) -> str:
        """What it was given, or `"dense"`, the name of the rule, or `"simplified"`."""
        if self._name is not None:
            return self._name
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

    @property
    def share(self) -> float:
        """The share of the training that is done, from 0 to 1."""
        return self._pace.share(self.steps_before + self.step, self.seconds.step)

    def go_live(self) -> None:
        """Read the numbers of `EpochRecord.live` from now on. The energy is measured in the first step of an epoch."""
        self._live = Live(self.model, self.seconds)

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
        with self._disturbance, self._generators.swapped_in():
            for _ in range(steps):
                if stop():
                    break
                with self.task.blamed("the batches"):
                    batch = self._next_batch()
                with self.task.blamed("a training step" if batch is not None else "the end of an epoch"):
                    if batch is None:
                        self._end_epoch()
                        break
                    self._train_step(batch)

    def _next_batch(self) -> Any | None:
        """Return the next batch, or None at the end of an epoch."""
        if self._pace.epoch_is_over(self.epoch, self.seconds.step):
            return None
        if self._batches is None:
            self._batches = self._continue_pass()
        batch = next(self._batches, None)
        if batch is not None:
            self._pass_step += 1
            return batch
        if self._pass_step < self.steps_per_epoch:
            raise ValueError(
                f"Setup(batches=...) ended after {self._pass_step} of {self.steps_per_epoch} batches of an epoch"
            )
        self._batches, self._pass_start, self._pass_step = None, self._generators.state(), 0
        return None if self._pace.seconds is None else self._next_batch()

    def _continue_pass(self) -> Iterator[Any]:
        """Return the batches of the pass that are not yet seen: after a resume some are."""
        if self._pass_step == 0:
            return islice(self.setup.batches, self.steps_per_epoch)
        now = self._generators.state()
        self._generators.set_state(self._pass_start)
        batches = islice(self.setup.batches, self.steps_per_epoch)
        for _ in range(self._pass_step):
            next(batches)
        self._generators.set_state(now)
        return batches

    def _train_step(self, batch: Any) -> None:
        seconds, clock = self.seconds, self._clock
        if self._cuda_devices:
            batch = self.to_device(batch)
        start = clock()
        with self._fabric.autocast():
            loss = self.setup.loss(self.model, batch)
        forward_end = clock()
        with nullcontext() if self._live is None else self._live.step():
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
        backward_end = clock()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.simplifier is not None:
            self.simplifier.step()
        self._tick(seconds.step + clock() - start)
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

    def _tick(self, seconds: float) -> None:
        """Let the schedules that go by steps go where they have to be after this step and these seconds."""
        ticks = self._pace.ticks_after(self.steps_before + self.step + 1, seconds)
        for _ in range(ticks - self._ticks):
            if self.setup.scheduler is not None and self.setup.scheduler_interval == "step":
                self.setup.scheduler.step()
            if self.schedule is not None:
                self.schedule.step()
        self._ticks = ticks

    def _clock(self) -> float:
        if self._cuda_devices:
            torch.cuda.synchronize(self.device)
        return perf_counter()

    def _end_epoch(self) -> None:
        dev = self._evaluate(self.setup.evaluate)
        test = {} if self.setup.test is None else self._evaluate(self.setup.test)
        for split, metrics in (("dev", dev), ("test", test)):
            for metric, value in metrics.items():
                if not isfinite(value):
                    raise DivergedError(self, f"{split} {metric} became {value} in epoch {self.epoch + 1}")
        widths = {} if self.simplifier is None else self.simplifier.widths
        kept, live = self._density_of_epoch(), {} if self._live is None else self._live.read(self.seconds)
        loss = self.loss_sum / self.step if self.step else self.curve[-1].loss
        self.curve.append(EpochRecord(self.epoch + 1, loss, dev, test, self.seconds.step, widths, kept, live))
        self.steps_before, self.step, self.loss_sum = self.steps_before + self.step, 0, 0.0
        if self.setup.scheduler is not None and self.setup.scheduler_interval == "epoch":
            with warnings.catch_warnings():  # resumed at the end of an epoch, this process has done no step
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                if isinstance(self.setup.scheduler, ReduceLROnPlateau):
                    self.setup.scheduler.step(dev[self.setup.metric])
                else:
                    self.setup.scheduler.step()

    def _evaluate(self, evaluate: Evaluate) -> dict[str, float]:
        """Return metrics of the model, which is as it was after that, and so are the random generators."""
        before = self._generators.state()
        self.model.eval()
        try:
            with torch.no_grad(), self._fabric.autocast():
                found = evaluate(self.model)
        finally:
            self.model.train()
            self._generators.set_state(before)
        return dict(found) if isinstance(found, Mapping) else {self.setup.metric: found}

    def _density_of_epoch(self) -> float | None:
        """The share of the entries that was kept since the last call, in layers where the gradient decides."""
        kept, seen = count_entries(self.model)
        (kept_before, seen_before), self._entries = self._entries, (kept, seen)
        return (kept - kept_before) / (seen - seen_before) if seen > seen_before else None

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to continue bit for bit: tensors and plain data only."""
        return {
            "model": self.model.state_dict(),
            "records": {name: record.state_dict() for name, record in records(self.model).items()},
            "optimizer": self.optimizer.state_dict(),
            "simplifier": self.simplifier and self.simplifier.state_dict(),
            "schedule": self.schedule and self.schedule.state_dict(),
            "random": self._generators.own,
            "pass_start": self._pass_start,
            "pass_step": self._pass_step,
            "scheduler": self.setup.scheduler and self.setup.scheduler.state_dict(),
            "step": self.step,
            "steps_before": self.steps_before,
            "ticks": self._ticks,
            "loss_sum": self.loss_sum,
            "seconds": asdict(self.seconds),
            "entries": list(self._entries),
            "disturbance": list(self._disturbance.seconds),
            "curve": [asdict(record) for record in self.curve],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, in a trainer built from the same task, config, rule and seed."""
        if self.simplifier is not None:  # first, as it cuts model and optimizer to their size
            self.simplifier.load_state_dict(state["simplifier"])
        self.model.load_state_dict(state["model"])
        for name, record in state["records"].items():
            layer: Any = self.model.get_submodule(name)
            layer.policy.record.load_state_dict(record)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self._generators.own = state["random"]
        self._batches, self._pass_start, self._pass_step = None, state["pass_start"], state["pass_step"]
        if self.setup.scheduler is not None:
            self.setup.scheduler.load_state_dict(state["scheduler"])
        self.step, self.steps_before, self._ticks = state["step"], state["steps_before"], state["ticks"]
        self.loss_sum = state["loss_sum"]
        self.seconds = Seconds(**state["seconds"])
        self._entries = tuple(state["entries"])
        self._disturbance.seconds = state.get("disturbance", self._disturbance.seconds)  # earlier versions have none
        self.curve = [EpochRecord(**record) for record in state["curve"]]

    def result(self) -> Run:
        """Return the outcome after the last completed epoch."""
        layers = [asdict(layer) for layer in self.report.layers] if self.rule is not None else []
        sparse = [layer for layer in layers if layer["status"] == "sparse"]
        disturbance = self._disturbance.read()
        dense_share = (self.config.dense_warmup_steps + self.config.dense_end_steps) / self._pace.ticks
        return Run(
            rule=self.name,
            seed=self.seed,
            epochs=self.epoch,
            steps=self.steps_before,
            dev=self.curve[-1].dev,
            test=self.curve[-1].test,
            seconds=asdict(self.seconds),
            k=self.k,
            density=density(sparse, self.curve, dense_share, self.config.first_k),
            curve=[asdict(record) for record in self.curve],
            layers=layers,
            checks=[] if self.simplifier is None else [asdict(check) for check in self.simplifier.history],
            activity={} if self.simplifier is None else plain_activity(self.simplifier.activity),
            disturbance=disturbance and asdict(disturbance),
        )


def fit(
    trainers: Sequence[Trainer],
    after_turn: Callable[[Trainer], None],
    turn: int = 100,
    stop: Callable[[], bool] = lambda: False,
) -> list[Run]:
    """Train to the end, in turns of `turn` steps, so that a noisy machine disturbs all runs alike.

    It is the turn of the run of which the least share is done, of equals the first.

    Args:
        trainers: The runs.
        after_turn: Called with the trainer after each of its turns, outside what is timed.
        turn: Steps in a turn.
        stop: Asked before each step whether to end the turn; `after_turn` may then end the training by an error.

    Returns:
        The outcome of each trainer, in the same order.
    """
    while unfinished := [trainer for trainer in trainers if not trainer.finished]:
        trainer = min(unfinished, key=lambda each: each.share)
        trainer.advance(turn, stop)
        after_turn(trainer)
    return [trainer.result() for trainer in trainers]
