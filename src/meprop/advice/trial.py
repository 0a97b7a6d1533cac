"""A copy of the user's model and optimizer, on which steps are tried; and the user's batches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from copy import copy
from itertools import islice
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meprop.convert import plain_copy, revert
from meprop.copies import copy_or_same, deepcopy, same_random_states
from meprop.errors import NotSupportedError

__all__ = ["Loss", "Phases", "Stream", "Trial", "untouched"]

Loss = Callable[[Any, Any], Tensor]
"""A function of (model, batch) that returns the loss, a scalar tensor."""

_WITHOUT = "of torch.optim.Adam with lr=0.001, as no optimizer was given"


class Phases(NamedTuple):
    """The seconds of the parts of one step."""

    forward: float
    backward: float
    optimizer: float

    @property
    def step(self) -> float:
        """The seconds of the whole step."""
        return self.forward + self.backward + self.optimizer


class Stream:
    """The user's batches. The first few are for measuring, and the others for the steps before that.

    Args:
        batches: Any iterable of batches.
        measured: How many are for measuring.

    Raises:
        TypeError: It is not an iterable of batches.
        ValueError: It has no batch.
    """

    def __init__(self, batches: Iterable[Any], measured: int) -> None:
        if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"batches is of type {type(batches).__name__}; it must be an iterable of batches, such as a DataLoader "
                "or a list"
            )
        self._batches = batches
        self._iterator: Iterator[Any] = iter(batches)
        self.measured = list(islice(self._iterator, measured))
        if not self.measured:
            raise ValueError(
                f"batches is a {type(batches).__name__} without a batch; give at least one, and rather a hundred"
            )
        self.read = len(self.measured)
        self.repeats = False

    def next(self) -> Any:
        """Returns the next batch. After the last one it is the first one again."""
        for batch in self._iterator:
            self.read += not self.repeats
            return batch
        self.repeats = True
        self._iterator = iter(self.measured if self._batches is self._iterator else self._batches)
        return next(self._iterator, self.measured[0])


class Trial:
    """A copy of a model and of its optimizer.

    The copy's layers are torch's own. The user's model and optimizer are not touched.

    Args:
        model: The user's.
        loss: The user's.
        optimizer: The user's, or None.

    Raises:
        TypeError: `loss` or `optimizer` is of another type.
        ValueError: No parameter of the model needs a gradient, or the optimizer has none of them.
        NotSupportedError: The optimizer needs a closure or updates in the backward pass.
    """

    def __init__(self, model: torch.nn.Module, loss: Loss, optimizer: torch.optim.Optimizer | None) -> None:
        if not callable(loss):
            raise TypeError(f"loss is of type {type(loss).__name__}; it must be a function of (model, batch)")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            count = sum(1 for _ in model.parameters())
            raise ValueError(
                f"none of the model's {count} parameters needs a gradient, so that there is no backward pass; "
                "call model.requires_grad_() first"
            )
        _check_optimizer(model, optimizer)
        self._loss = loss
        self.optimizer: torch.optim.Optimizer | None = None
        if optimizer is None:
            self.model = plain_copy(model)
        else:
            memo: dict[int, Any] = {}
            self.model = deepcopy(model, memo)
            self.optimizer = _copied(optimizer, memo)
            revert(self.model)
        self.model.zero_grad()
        device = next(self.model.parameters()).device
        self.synchronize: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.device = device

    def loss_of(self, batch: Any) -> Tensor:
        """The loss of a batch.

        Raises:
            TypeError: It is no tensor.
            ValueError: It is not a scalar, not finite, or has no gradient.
        """
        found: Any = self._loss(self.model, copy(batch) if isinstance(batch, (MutableMapping, list)) else batch)
        if not isinstance(found, Tensor):
            hint = "; return its attribute loss" if isinstance(getattr(found, "loss", None), Tensor) else ""
            raise TypeError(f"loss(model, batch) returned a {type(found).__name__}; it must return a tensor{hint}")
        if found.numel() != 1:
            raise ValueError(
                f"loss(model, batch) returned a tensor of shape {list(found.shape)}; it must return a scalar, such as "
                "its mean()"
            )
        if not found.requires_grad:
            raise ValueError(
                "loss(model, batch) returned a tensor without a graph; it must come from the model that the function "
                "gets, and not from torch.no_grad or detach"
            )
        if not found.isfinite():
            raise ValueError(
                f"loss(model, batch) returned {found.item()}; it must be a finite number. Look at the batch, or give a "
                "smaller learning rate if it came after some steps"
            )
        return found

    def check(self, batch: Any) -> None:
        """Raises the errors of `loss_of`, and a ValueError if the loss is that of another model than the given one."""
        wanted = [each for each in self.model.parameters() if each.requires_grad]
        if all(each is None for each in torch.autograd.grad(self.loss_of(batch), wanted, allow_unused=True)):  # pyright: ignore[reportUnnecessaryComparison]
            raise ValueError(
                "loss(model, batch) gave no parameter of its model a gradient; it must call the model that it gets "
                "(a copy), and not another one"
            )

    def step(self, batch: Any) -> Phases:
        """Does a step, and times its parts."""
        self.synchronize()
        begin = perf_counter()
        loss = self.loss_of(batch)
        self.synchronize()
        forward = perf_counter()
        loss.backward()
        del loss
        self.synchronize()
        backward = perf_counter()
        if self.optimizer is None:
            self.model.zero_grad()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.synchronize()
        return Phases(forward - begin, backward - forward, perf_counter() - backward)

    def warm_up(self, stream: Stream, steps: int | None, seconds: float) -> str:
        """Does steps of the optimizer, and says how many of which one.

        Args:
            stream: The batches.
            steps: How many steps. None: as many as the time allows, up to 200, and none if the optimizer has done some.
            seconds: The time.
        """
        given = self.optimizer
        if steps == 0 or (steps is None and _has_stepped(given)):
            return "at the weights as they were given"
        if given is None:
            wanted = [each for each in self.model.parameters() if each.requires_grad]
            self.optimizer = torch.optim.Adam(wanted, lr=1e-3)
        done, end = 0, perf_counter() + seconds
        while done < (200 if steps is None else steps) and (steps is not None or done < 2 or perf_counter() < end):
            self.step(stream.next())
            done += 1
        self.optimizer = given
        return f"after {done} steps {_WITHOUT if given is None else f'of {type(given).__name__}'}"

    def hold_still(self) -> None:
        """Sets the learning rate to 0. A step costs the same, and lets the gradients stay what they are."""
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            if "lr" in group:
                group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0


@contextmanager
def untouched(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, batches: Any) -> Generator[None]:
    """A context after which all is as before that a loss or a loader may reach past the copies.

    These are the random states, a loader's own generator, and the gradients of the parameters of model and optimizer,
    among which may be those of a loss.
    """
    groups: list[Any] = getattr(optimizer, "param_groups", [])
    parameters = {*model.parameters(), *(each for group in groups for each in group["params"])}
    gradients = {each: each.grad for each in parameters}
    of_loader = getattr(batches, "generator", None)
    drawn = [(each, each.get_state()) for each in (of_loader,) if isinstance(each, torch.Generator)]
    try:
        for each in parameters:
            each.grad = None
        with same_random_states():
            yield
    finally:
        for each, gradient in gradients.items():
            each.grad = gradient
        for generator, state in drawn:
            generator.set_state(state)


def _has_stepped(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether the state of an optimizer says that it has done steps. Adagrad makes its state before the first one."""
    states = () if optimizer is None else optimizer.state.values()
    return any(state and float(state.get("step", 1)) > 0 for state in states)


def _check_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is None:
        return
    kind = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"optimizer is of type {kind}; it must be a torch.optim.Optimizer or None")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise NotSupportedError(f"the step of {kind} takes a closure, which advise does not have; leave optimizer out")
    if getattr(optimizer, "in_backward", False):
        raise NotSupportedError(
            f"{kind} with in_backward=True frees the gradients that advise compares; give the same optimizer without it"
        )
    own = set(model.parameters())
    if not any(each in own for group in optimizer.param_groups for each in group["params"]):
        raise ValueError(f"the optimizer ({kind}) has no parameter of the model; it must be the model's own optimizer")


def _copied(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
    """A copy of an optimizer for the copied parameters in `memo`."""
    copied = deepcopy(optimizer, memo)
    for name, value in vars(optimizer).items():  # torch copies three of them
        if name not in vars(copied) and not callable(value):  # as a scheduler has put a step of its own there
            setattr(copied, name, copy_or_same(value, memo))
    return copied
