"""The training loop: one `Trainer` per run, `fit` to train several in turns."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import cos, isfinite, pi
from time import perf_counter
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

import meprop
from meprop import optim
from meprop.errors import MepropError
from meprop.nn.base import SparseLayer
from meprop.speed import Decision

RuleName = Literal["topk", "compensated", "random"]
SparseRule = meprop.TopK | meprop.CompensatedTopK | meprop.RandomK
_RULES: dict[RuleName, type[SparseRule]] = {
    "topk": meprop.TopK,
    "compensated": meprop.CompensatedTopK,
    "random": meprop.RandomK,
}


class DivergedError(MepropError):
    """The training of one run came to numbers that are not finite.

    Args:
        trainer: Of that run.
        what: What became what, and where.
    """

    def __init__(self, trainer: Trainer, what: str) -> None:
        run = f"{trainer.name}, seed {trainer.seed}"
        super().__init__(f"{what} ({run}): try a smaller --lr, or a smaller [training] lr in an experiment's file")
        self.trainer = trainer


class Task(Protocol):
    """What the loop needs to know of a task; `meprop.tasks` holds the tasks."""

    @property
    def name(self) -> str:
        """The task's name on the command line."""
        ...

    @property
    def metric(self) -> str:
        """The quality to compare by: a key of what `evaluate` returns, in percent, the higher the better."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest of the data, wherever they lie: two runs with different ones are not to be compared."""
        ...

    @property
    def example_inputs(self) -> tuple[Any, ...]:
        """Arguments that the model can be called with, of the ranks that it is trained with; on the CPU."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """How many batches `train_batches` yields."""
        ...

    def build_model(self) -> nn.Module:
        """Return a dense model, initialised from torch's global random state."""
        ...

    def train_batches(self, generator: torch.Generator) -> Iterable[Any]:
        """Return one epoch's batches (tensors, or tuples of them), in an order drawn from `generator` alone."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the scalar loss of a batch."""
        ...

    def evaluate(self, model: nn.Module, split: Literal["dev", "test"]) -> dict[str, float]:
        """Return the metrics of a split, without touching the random state."""
        ...


@dataclass(frozen=True)
class TrainingConfig:
    """Settings that every task shares.

    Raises:
        ValueError: If a setting is outside its range; the message names the option.
    """

    epochs: int = 5
    """Passes over the training data."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial weights, the order of the data and dropout; each is a run of its own."""
    k: int | float = 20
    """How many entries of each output gradient are kept: a count (20), or a share of the features (0.05)."""
    scope: Literal["example", "batch"] = "example"
    """Choose the k entries for each example (as in the paper), or once for the whole batch (simple unified top-k)."""
    sparse_rows: Literal["no", "exact", "decay", "lazy"] = "no"
    """Make the gradients of sparse layers' weights row-sparse, with scope batch, and step with meprop.optim: as dense
    (exact), or only the rows with a gradient, whose moments first decay for the steps they slept (decay) or do not
    (lazy)."""
    optimizer: Literal["adam", "adagrad", "sgd"] = "adam"
    """Optimizer, the same for dense and sparse; torch's fused implementation where there is one."""
    lr: float = 1e-3
    """Learning rate at the start."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate over the steps: down to zero along half a cosine, or constant (as in the paper)."""
    when: Literal["always", "auto"] = "always"
    """Where to be sparse: in every layer that can be; auto leaves a layer dense where sparse measures slower here."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Arithmetic: fp32, or bf16 autocast with fp32 weights."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"--epochs must be at least 1, got {self.epochs}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not all(0 <= s < 2**64 for s in self.seeds):
            raise ValueError(f"--seeds must be one or more different integers from 0 to 2**64 - 1, got {[*self.seeds]}")
        if not (self.lr > 0 and isfinite(self.lr)):
            raise ValueError(f"--lr must be a positive number, got {self.lr}")
        if self.sparse_rows != "no" and self.scope != "batch":
            raise ValueError(f"--sparse-rows {self.sparse_rows} needs --scope batch: other choices leave no rows out")
        self.rule()

    def rule(self, name: RuleName = "topk") -> SparseRule:
        """Return the rule of this name, with the k and scope of these settings."""
        return _RULES[name](self.k, scope=self.scope)


@dataclass(frozen=True)
class SimplifyConfig:
    """How runs are simplified (meSimp); the defaults are those of the paper's code.

    Raises:
        ValueError: If a setting is outside its range; the message names the option.
    """

    threshold: float = 0.1
    """Remove the units that a smaller share of the examples selects."""
    checks: int = 8
    """How often an epoch to look for units to remove."""
    cycle: int = 5
    """Epochs in a cycle; one that removes units and one that only trains take turns."""
    warmup: int = 0
    """Epochs before the first cycle, in which nothing is removed."""
    max_removal: float = 1.0
    """The largest share of a layer's units to remove at once, the least active ones."""
    min_units: int = 1
    """Keep at least so many units of each layer."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold must be from 0 to 1, got {self.threshold}")
        if not 0 < self.max_removal <= 1:
            raise ValueError(f"--max-removal must be above 0 and at most 1, got {self.max_removal}")
        for name, least in {"checks": 1, "cycle": 1, "warmup": 0, "min_units": 1}.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")

    def simplifier(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps_per_epoch: int, example_inputs: Sequence[Any]
    ) -> meprop.Simplifier:
        """Return one with these settings."""
        return meprop.Simplifier(
            model,
            self.threshold,
            optimizer=optimizer,
            check_every=max(1, steps_per_epoch // self.checks),
            cycle=self.cycle * steps_per_epoch,
            warmup=self.warmup * steps_per_epoch,
            max_removal=self.max_removal,
            min_units=self.min_units,
            example_inputs=example_inputs,
        )


@dataclass
class Seconds:
    """Seconds of training, summed over the steps; waiting for data and evaluation are in none of them."""

    forward: float = 0.0
    """The model and the loss."""
    backward: float = 0.0
    """All gradients, the selection included."""
    optimizer: float = 0.0
    """The update, clearing the gradients, and simplifying."""
    step: float = 0.0
    """The whole step: the three together."""


@dataclass(frozen=True)
class EpochRecord:
    """What is known at the end of an epoch."""

    epoch: int
    loss: float
    """Mean training loss over the epoch's batches."""
    dev: dict[str, float]
    test: dict[str, float]
    seconds: float
    """Seconds of training steps so far."""
    widths: dict[str, int] = field(default_factory=dict[str, int])
    """Units of each set of the model, if it is simplified."""


@dataclass(frozen=True)
class Run:
    """The outcome of one run: an element of `runs` in result.json. Metrics are those after the last epoch."""

    rule: str
    """`"dense"`, the name of the rule, or `"simplified"`."""
    seed: int
    epochs: int
    dev: dict[str, float]
    test: dict[str, float]
    seconds: dict[str, float]
    k: int | float | None
    """As configured; None if dense."""
    density: float
    """Share of the entries that are propagated, over the output gradients of the sparse layers; 1 if there is none."""
    curve: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """`EpochRecord` of each epoch."""
    layers: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """The conversion report's records; empty if dense."""
    checks: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """`meprop.simplify.Check` of each check, with the widths; empty if not simplified."""

    def selected(self, metric: str) -> EpochRecord:
        """Return the epoch with the best dev score, the first of equals: what the paper reports.

        Of a simplified run, among those in which the model had its last widths: an earlier one is not what it became.
        """
        records = [EpochRecord(**record) for record in self.curve]
        return max((each for each in records if each.widths == records[-1].widths), key=lambda each: each.dev[metric])


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
        ValueError: The warm-up of `simplify` takes all epochs.
        MepropError: There is no such accelerator.
    """

    def __init__(
        self,
        task: Task,
        config: TrainingConfig,
        rule: SparseRule | None,
        seed: int,
        simplify: SimplifyConfig | None = None,
    ) -> None:
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

        with torch.random.fork_rng(devices=self._cuda_devices):
            torch.manual_seed(seed)
            self.model = task.build_model().to(self.device)
            self._random = self._random_state()
            if rule is not None:
                meprop.convert(self.model, rule, sparse_grad=config.sparse_rows != "no", when=config.when)
        self.optimizer = _build_optimizer(self.model, config, self.device, sparse=rule is not None)
        self.simplifier: meprop.Simplifier | None = None
        if simplify is not None:
            inputs = self._fabric.to_device(task.example_inputs)
            self.simplifier = simplify.simplifier(self.model, self.optimizer, task.steps_per_epoch, inputs)

        self._order = torch.Generator().manual_seed(seed)
        self._epoch_order = self._order.get_state()  # as it was when the current epoch began
        self._batches: Iterator[Any] | None = None
        self.step = 0
        """Steps done in the current epoch."""
        self.loss_sum = 0.0
        """Sum of their losses."""
        self.seconds = Seconds()
        self.curve: list[EpochRecord] = []

    @property
    def name(self) -> str:
        """`"dense"`, the name of the rule, or `"simplified"`."""
        if self.simplifier is not None:
            return "simplified"
        return "dense" if self.rule is None else next(name for name, rule in _RULES.items() if type(self.rule) is rule)

    @property
    def report(self) -> meprop.ConversionReport:
        """What each layer does, and why."""
        return meprop.report(self.model)

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return len(self.curve)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch == self.config.epochs

    def advance(self, steps: int) -> None:
        """Train up to `steps` batches; stop early at the end of an epoch, and then evaluate dev and test."""
        self.model.train()
        with self._own_random_state():
            if self._batches is None:
                self._batches = iter(self.task.train_batches(self._order))
                for _ in range(self.step):  # after a resume: the batches that were already seen
                    next(self._batches)
            for _ in range(steps):
                batch = next(self._batches, None)
                if batch is None:
                    self._end_epoch()
                    break
                self._train_step(batch)

    def _train_step(self, batch: Any) -> None:
        seconds, clock = self.seconds, self._clock
        if self._cuda_devices:
            batch = self._fabric.to_device(batch)
        start = clock()
        with self._fabric.autocast():
            loss = self.task.loss(self.model, batch)
        forward_end = clock()
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        backward_end = clock()
        self._set_lr()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.simplifier is not None:
            self.simplifier.step()
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

    def _set_lr(self) -> None:
        if self.config.schedule == "constant":
            return
        done = (self.epoch + self.step / self.task.steps_per_epoch) / self.config.epochs
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * (1 + cos(pi * done)) / 2

    def _clock(self) -> float:
        if self._cuda_devices:
            torch.cuda.synchronize(self.device)
        return perf_counter()

    def _end_epoch(self) -> None:
        if self.step == 0:
            raise MepropError(f"task {self.task.name} has no training batches")
        with self._fabric.autocast():
            dev, test = self.task.evaluate(self.model, "dev"), self.task.evaluate(self.model, "test")
        for split, metrics in (("dev", dev), ("test", test)):
            for metric, value in metrics.items():
                if not isfinite(value):
                    raise DivergedError(self, f"{split} {metric} became {value} in epoch {self.epoch + 1}")
        widths = {} if self.simplifier is None else self.simplifier.widths
        self.curve.append(EpochRecord(self.epoch + 1, self.loss_sum / self.step, dev, test, self.seconds.step, widths))
        self.step, self.loss_sum, self._batches = 0, 0.0, None
        self._epoch_order = self._order.get_state()

    def _random_state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._cuda_devices)]

    @contextmanager
    def _own_random_state(self) -> Generator[None]:
        """Swap in this run's random state, so that runs in turns, or a caller's draws, do not disturb one another."""
        with torch.random.fork_rng(devices=self._cuda_devices):
            torch.set_rng_state(self._random[0])
            for device, state in zip(self._cuda_devices, self._random[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
            self._random = self._random_state()

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to continue bit for bit: tensors and plain data only."""
        return {
            "model": self.model.state_dict(),
            "decisions": {
                name: asdict(layer.decision)
                for name, layer in self.model.named_modules()
                if isinstance(layer, SparseLayer) and layer.decision is not None
            },
            "optimizer": self.optimizer.state_dict(),
            "simplifier": self.simplifier and self.simplifier.state_dict(),
            "random": self._random,
            "epoch_order": self._epoch_order,
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
            vars(self.model.get_submodule(name))["decision"] = Decision(**decision)
        self.optimizer.load_state_dict(state["optimizer"])
        self._random = state["random"]
        self._epoch_order = state["epoch_order"]
        self._order.set_state(self._epoch_order)
        self._batches = None
        self.step, self.loss_sum = state["step"], state["loss_sum"]
        self.seconds = Seconds(**state["seconds"])
        self.curve = [EpochRecord(**record) for record in state["curve"]]

    def result(self) -> Run:
        """Return the outcome after the last completed epoch."""
        layers = [asdict(layer) for layer in self.report.layers] if self.rule is not None else []
        sparse = [layer for layer in layers if layer["status"] == "sparse"]
        kept, width = sum(layer["k"] for layer in sparse), sum(layer["out_features"] for layer in sparse)
        return Run(
            rule=self.name,
            seed=self.seed,
            epochs=self.epoch,
            dev=self.curve[-1].dev,
            test=self.curve[-1].test,
            seconds=asdict(self.seconds),
            k=None if self.rule is None else self.rule.k,
            density=kept / width if sparse else 1.0,
            curve=[asdict(record) for record in self.curve],
            layers=layers,
            checks=[] if self.simplifier is None else [asdict(check) for check in self.simplifier.history],
        )


def fit(trainers: Sequence[Trainer], after_turn: Callable[[Trainer], None], turn: int = 100) -> list[Run]:
    """Train to the end, in turns of `turn` steps, so that a noisy machine disturbs all runs alike.

    Args:
        trainers: The runs.
        after_turn: Called with the trainer after each of its turns, outside what is timed.
        turn: Steps in a turn.

    Returns:
        The outcome of each trainer, in the same order.
    """
    while unfinished := [trainer for trainer in trainers if not trainer.finished]:
        for trainer in unfinished:
            trainer.advance(turn)
            after_turn(trainer)
    return [trainer.result() for trainer in trainers]


def _build_optimizer(
    model: nn.Module, config: TrainingConfig, device: torch.device, *, sparse: bool
) -> torch.optim.Optimizer:
    parameters = model.parameters()
    if sparse and config.sparse_rows != "no":
        ours = {"adam": optim.Adam, "adagrad": optim.Adagrad, "sgd": optim.SGD}[config.optimizer]
        return ours(parameters, config.lr, sparse_rows=config.sparse_rows)
    match config.optimizer:
        case "adam":
            return torch.optim.Adam(parameters, config.lr, fused=True)
        case "adagrad":  # torch has no fused Adagrad for GPUs
            return torch.optim.Adagrad(parameters, config.lr, fused=device.type == "cpu")
        case "sgd":
            return torch.optim.SGD(parameters, config.lr, fused=True)
