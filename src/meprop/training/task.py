"""What is trained: a `Setup` of model, optimizer, batches, loss and evaluation, and what a task is that makes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from meprop import optim
from meprop.nn.base import SparseLayer
from meprop.schedule import anneal
from meprop.training.config import TrainingConfig

Evaluate = Callable[[nn.Module], float | Mapping[str, float]]


@dataclass(frozen=True)
class Setup:
    """What one training consists of: what a task's `make(seed)` returns, such as the one in your own file.

    Args:
        model: A dense model. The run converts it, in place.
        optimizer: Of its parameters, of any class.
        batches: The batches of an epoch, such as a `DataLoader` or a list. It is iterated anew in each epoch. An order
            that is drawn has to be drawn from torch's, Python's or NumPy's global generators, or from the `generator`
            of the loader or its sampler: a run that is resumed then sees the same batches. Workers must end with the
            epoch.
        loss: From the model and a batch to the loss, a tensor of one number.
        evaluate: From the model to its quality on data that it is not trained on: a number, the higher the better, or
            numbers by name. It is called in evaluation mode, without gradients, at the end of each epoch.
        test: The same on data that nothing is chosen by. None: there are none.
        metric: The name of the number that `evaluate` returns, or of the one to compare by if it returns several.
        scheduler: Of the optimizer's learning rate.
        scheduler_interval: When its `step` is called: after each "step" of the optimizer, or after each "epoch". A
            ReduceLROnPlateau is given the metric at the end of an epoch. It needs "epoch", and the mode "max".
        steps_per_epoch: How many batches an epoch has. None: `len(batches)`.
        example_inputs: Arguments that the model can be called with. `meprop simplify` needs them.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: The model is not dense, the optimizer has none of its parameters, the scheduler has another
            optimizer or takes the metric wrongly, workers outlive an epoch, or there are no batches or nobody knows how
            many.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    evaluate: Evaluate
    test: Evaluate | None = None
    metric: str = "score"
    scheduler: lr_scheduler.LRScheduler | None = None
    scheduler_interval: Literal["step", "epoch"] = "step"
    steps_per_epoch: int | None = None
    example_inputs: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        self._check_kinds()
        if any(isinstance(each, SparseLayer) for each in self.model.modules()):
            raise ValueError("Setup(model=...) has sparse layers; give it dense, as each sparse run converts its own")
        theirs = {id(each) for group in self.optimizer.param_groups for each in group["params"]}
        if not any(id(each) in theirs for each in self.model.parameters()):
            raise ValueError("Setup(optimizer=...) has none of the model's parameters; give it model.parameters()")
        if self.scheduler is not None and self.scheduler.optimizer is not self.optimizer:
            raise ValueError("Setup(scheduler=...) is of another optimizer than Setup(optimizer=...)")
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau) and (
            self.scheduler_interval != "epoch" or self.scheduler.mode != "max"
        ):
            raise ValueError(
                "Setup(scheduler=...) is a ReduceLROnPlateau, which is given the metric, the higher the better: make "
                "it with mode='max', and give scheduler_interval='epoch'"
            )
        if getattr(self.batches, "persistent_workers", False):
            raise ValueError(
                "Setup(batches=...) has persistent_workers=True; give False: a run that is resumed has new workers, "
                "whose random numbers differ"
            )
        if self.steps < 1:
            raise ValueError(f"Setup(batches=...) has {self.steps} batches in an epoch; it needs 1 or more")

    def _check_kinds(self) -> None:
        def is_a(kind: Any, value: Any) -> bool:
            return isinstance(value, kind)

        wanted = {
            "model": (is_a(nn.Module, self.model), "a torch.nn.Module"),
            "optimizer": (is_a(torch.optim.Optimizer, self.optimizer), "a torch.optim.Optimizer"),
            "batches": (is_a(Iterable, self.batches), "an iterable of batches, such as a DataLoader"),
            "loss": (callable(self.loss), "a function of the model and a batch"),
            "evaluate": (callable(self.evaluate), "a function of the model"),
            "test": (self.test is None or callable(self.test), "a function of the model, or None"),
            "metric": (is_a(str, self.metric), "a name"),
            "scheduler": (is_a(lr_scheduler.LRScheduler | None, self.scheduler), "a scheduler of torch.optim, or None"),
            "steps_per_epoch": (is_a(int | None, self.steps_per_epoch), "a number of batches, or None"),
            "example_inputs": (is_a(tuple | None, self.example_inputs), "a tuple of the model's arguments, or None"),
        }
        for name, (fits, kind) in wanted.items():
            if not fits:
                raise TypeError(f"Setup({name}=...) is of type {type(getattr(self, name)).__name__}; it is {kind}")
        if isinstance(self.batches, Iterator):
            raise TypeError(
                f"Setup(batches=...) is a {type(self.batches).__name__}, which is used up after one epoch; give what "
                "can be iterated again, such as a list or a DataLoader"
            )
        if self.scheduler_interval not in get_args(Literal["step", "epoch"]):
            raise ValueError(f"Setup(scheduler_interval={self.scheduler_interval!r}); it is 'step' or 'epoch'")

    @property
    def steps(self) -> int:
        """How many batches an epoch has."""
        if self.steps_per_epoch is not None:
            return self.steps_per_epoch
        try:
            if isinstance(self.batches, Sized):
                return len(self.batches)
        except TypeError:  # a DataLoader of a stream
            pass
        raise ValueError("Setup(batches=...) has no length; give Setup(steps_per_epoch=...) as well")


class Task(Protocol):
    """What the commands need to know of a task: `meprop.tasks` holds ours, and `script.ScriptTask` is the user's."""

    @property
    def name(self) -> str:
        """The task's name on the command line."""
        ...

    @property
    def metric(self) -> str:
        """The quality to compare by: a key of what `evaluate` returns, the higher the better."""
        ...

    @property
    def unit(self) -> str:
        """What follows the name of the quality where it is shown, such as ", %"."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest of the data, wherever they lie: two runs with different ones are not to be compared."""
        ...

    def blamed(self, what: str) -> AbstractContextManager[None]:
        """Say of an error within, if it is of the task's own code and not of ours, where it was raised.

        Args:
            what: What is done within, such as "a training step".
        """
        ...

    def make(self, seed: int, config: Any) -> Setup:
        """Return what one run trains. The global random generators have been given the seed.

        Args:
            seed: Of the run.
            config: The settings of the run, of the class that the task's entry has.
        """
        ...


class DataTask(ABC):
    """A task that reads its data once and takes optimizer and learning rates from `TrainingConfig`."""

    name: str
    metric: str
    unit = ", %"

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """See `Task`."""

    @property
    @abstractmethod
    def example_inputs(self) -> tuple[Any, ...]:
        """Arguments that the model can be called with, of the ranks that it is trained with; on the CPU."""

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """How many batches `train_batches` yields."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Return a dense model, initialised from torch's global random state."""

    @abstractmethod
    def train_batches(self, generator: torch.Generator) -> Iterable[Any]:
        """Return one epoch's batches (tensors, or tuples of them), in an order drawn from `generator` alone."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the scalar loss of a batch."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: Literal["dev", "test"]) -> dict[str, float]:
        """Return the metrics of a split, in percent where they can be."""

    def blamed(self, what: str) -> AbstractContextManager[None]:
        """See `Task`: all code is ours."""
        return nullcontext()

    def make(self, seed: int, config: TrainingConfig) -> Setup:
        """Return what one run trains."""
        if self.steps_per_epoch == 0:
            raise ValueError(f"task {self.name} has no training batches")
        model = self.build_model()
        optimizer = _optimizer(model, config)
        return Setup(
            model,
            optimizer,
            _Epochs(self, seed),
            self.loss,
            partial(self.evaluate, split="dev"),
            test=partial(self.evaluate, split="test"),
            metric=self.metric,
            scheduler=_scheduler(optimizer, config, self.steps_per_epoch),
            example_inputs=self.example_inputs,
        )


class _Epochs:
    """The batches of a task, in an order of its own in each epoch."""

    def __init__(self, task: DataTask, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self._task = task

    def __iter__(self) -> Iterator[Any]:
        return iter(self._task.train_batches(self.generator))

    def __len__(self) -> int:
        return self._task.steps_per_epoch


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    parameters = model.parameters()
    on_cpu = config.accelerator == "cpu" or not torch.cuda.is_available()
    state_dtype = torch.bfloat16 if config.state_dtype == "bfloat16" else None
    # Ours writes copies of weights on a CPU only. On a GPU torch's fused one is there.
    writes_copies = config.compute_dtype == "bfloat16" and on_cpu
    if config.sparse_rows != "no" or config.in_backward or state_dtype is not None or writes_copies:
        adam = optim.AdamW if config.weight_decay > 0 else optim.Adam
        ours = {"adam": adam, "adagrad": optim.Adagrad, "sgd": optim.SGD}[config.optimizer]
        forward_is_narrow = config.compute_dtype == "bfloat16" or config.precision == "bf16-mixed"
        return ours(
            parameters,
            config.lr,
            weight_decay=config.weight_decay,
            sparse_rows="exact" if config.sparse_rows == "no" else config.sparse_rows,
            in_backward=config.in_backward,
            state_dtype=state_dtype,
            copy_dtype=torch.bfloat16 if forward_is_narrow else None,
        )
    match config.optimizer:
        case "adam":
            adam = torch.optim.AdamW if config.weight_decay > 0 else torch.optim.Adam
            return adam(parameters, config.lr, weight_decay=config.weight_decay, fused=True)
        case "adagrad":  # torch has no fused Adagrad for GPUs
            return torch.optim.Adagrad(parameters, config.lr, weight_decay=config.weight_decay, fused=on_cpu)
        case "sgd":
            return torch.optim.SGD(parameters, config.lr, weight_decay=config.weight_decay, fused=True)


def _scheduler(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, steps_per_epoch: int
) -> lr_scheduler.LRScheduler | None:
    if config.schedule == "constant":
        return None

    def factor(step: int) -> float:
        epochs = step // steps_per_epoch + step % steps_per_epoch / steps_per_epoch
        if config.schedule == "cosine":
            return (1 + cos(pi * epochs / config.epochs)) / 2
        return anneal(1.0, 1e-3 if config.lr_end is None else config.lr_end / config.lr, epochs / config.epochs)

    return lr_scheduler.LambdaLR(optimizer, factor)
