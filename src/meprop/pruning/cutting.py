"""Cutting entries out of tensors, in place, with their gradients and the optimizers' states: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meprop.errors import NotSupportedError
from meprop.ops import memory_format
from meprop.ops.gradients import OF_ROWS
from meprop.pruning.handlers import resize

Optimizers = Sequence[torch.optim.Optimizer]
State = dict[str, Any]

_SCALARS = (bool, int, float, complex, str, torch.dtype, torch.device, type(None))
_OF_THE_MACHINE = (MemoryError, torch.OutOfMemoryError)  # no fault of what is cut: these errors stay what they are


@dataclass(frozen=True)
class Cut:
    """What stays of a tensor.

    Attributes:
        name: The tensor's name in the model.
        tensor: A parameter or a buffer.
        indices: For some of its dimensions the entries [n] that stay, int64.
    """

    name: str
    tensor: Tensor
    indices: dict[int, Tensor]


def cut(cuts: Sequence[Cut], modules: Mapping[str, torch.nn.Module], optimizers: Optimizers) -> None:
    """Keeps only these entries of these tensors, of their gradients and of their states in the optimizers.

    Everything is computed first, into new tensors. Then it is put in its place. Whatever fails, even there, leaves all
    as it was.

    Args:
        cuts: What stays.
        modules: The modules of the tensors, by name. Their attributes are set to the new sizes.
        optimizers: The optimizers.

    Raises:
        NotSupportedError: Something cannot be cut. The message names it. Nothing has been changed.
    """
    names = {each.tensor: each.name for each in cuts}
    concerned = [each for each in optimizers if not parameters_of([each]).isdisjoint(names)]
    for optimizer in concerned:
        _check_groups(optimizer)
        for parameter, state in optimizer.state.items():  # all: LBFGS keeps the state of all parameters with the first
            _check_state(state, parameter, names.get(parameter, ""), optimizer)
    tensors = [(each, *_cut_tensor(each)) for each in cuts]
    states = [
        (state, _cut_state(state, each, optimizer)) for each in cuts for optimizer, state in _states(each, concerned)
    ]
    with ExitStack() as undo:
        for each, data, grad in tensors:
            undo.callback(_put, each.tensor, each.tensor.detach(), each.tensor.grad)
            with _refusing(f"{each.name!r} cannot be cut in place", "make it a plain tensor"):
                _put(each.tensor, data, grad)
        for state, of_state in states:
            undo.callback(_refill, state, dict(state))
            state.update(of_state)
        for name, module in modules.items():
            for attributes in (vars(module), *(each for each in vars(module).values() if isinstance(each, dict))):
                undo.callback(_refill, attributes, dict(attributes))
            remedy = "correct the function that meprop.pruning.handles has as resize, or Descriptor.resize"
            with _refusing(f"module {name!r} cannot be resized", remedy):
                resize(module)
        undo.pop_all()


def parameters_of(optimizers: Optimizers) -> set[Tensor]:
    """All parameters of optimizers."""
    return {parameter for each in optimizers for group in each.param_groups for parameter in group["params"]}


@contextmanager
def _refusing(what: str, remedy: str) -> Generator[None]:
    """Turns an error into a refusal that names what cannot be cut."""
    try:
        yield
    except _OF_THE_MACHINE:
        raise
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "")
        text = f"{what}: {type(error).__name__}: {line}. Nothing has been changed; {remedy}"
        raise NotSupportedError(text) from error


# ---- what is known of an optimizer


def _check_groups(optimizer: torch.optim.Optimizer) -> None:
    """Refuses a tensor among a group's options, of which it is not known how it goes with the parameters."""
    for group in optimizer.param_groups:
        for name, value in group.items():
            for each in value if isinstance(value, list | tuple) and name != "params" else [value]:
                if isinstance(each, Tensor) and each.numel() != 1:
                    raise NotSupportedError(
                        f"{type(optimizer).__name__} has a tensor of shape {list(each.shape)} as the option {name!r} "
                        "of a group, and it is not known how it is cut. Nothing has been changed; take another "
                        "optimizer"
                    )


def _check_state(state: Any, parameter: Any, name: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuses a state of which it is not known how it goes with its parameter."""
    shape = parameter.shape if isinstance(parameter, Tensor) else torch.Size([])
    for key, value in (state if isinstance(state, dict) else {str(parameter): state}).items():
        expected = shape[:1] if key.endswith(OF_ROWS) else shape
        if isinstance(value, Tensor):
            found, fits = f"of shape {list(value.shape)}", value.shape == expected or value.numel() == 1
        else:
            found, fits = f"of type {type(value).__name__}", isinstance(value, _SCALARS)
        if not fits:
            raise NotSupportedError(
                f"{type(optimizer).__name__} has a state {key!r} {found} for {name or 'a parameter'} of shape "
                f"{list(shape)}, and it is not known how it is cut. Nothing has been changed; take an optimizer whose "
                "states have their parameter's shape"
            )


def _states(each: Cut, optimizers: Optimizers) -> list[tuple[torch.optim.Optimizer, State]]:
    """What the optimizers have of a parameter."""
    found = [(optimizer, optimizer.state.get(each.tensor)) for optimizer in optimizers]
    return [(optimizer, state) for optimizer, state in found if isinstance(state, dict)]


# ---- computing


def _cut_tensor(each: Cut) -> tuple[Tensor, Tensor | None]:
    """What stays of a tensor, and of its gradient."""
    data, grad = each.tensor.detach(), each.tensor.grad
    if type(data) is not Tensor:
        raise NotSupportedError(
            f"{each.name!r} is a {type(data).__name__}, and only plain tensors are cut. Nothing has been changed; make "
            "it one before the Simplifier is made"
        )
    kept = _kept(data, each.indices, repr(each.name), "keep it in another layout or on another device")
    if grad is None:
        return kept, None
    return kept, _kept(grad, each.indices, f"the gradient of {each.name!r}", "call optimizer.zero_grad() before step()")


def _cut_state(state: State, each: Cut, optimizer: torch.optim.Optimizer) -> State:
    """What stays of the states of a tensor that is cut, as far as they are cut."""
    stays: State = {}
    for key, value in state.items():
        what = f"the state {key!r} of {each.name!r} in {type(optimizer).__name__}"
        remedy = "take an optimizer with plain tensors as its states"
        if key.endswith(OF_ROWS):
            if 0 in each.indices:
                stays[key] = _kept(value, {0: each.indices[0]}, what, remedy)
        elif isinstance(value, Tensor) and value.shape == each.tensor.shape:
            stays[key] = _kept(value, each.indices, what, remedy)
    return stays


def _kept(tensor: Tensor, indices: dict[int, Tensor], what: str, remedy: str) -> Tensor:
    """A copy of the entries that stay, in the tensor's memory format."""
    whole = tensor.detach()
    with _refusing(f"{what} ({type(tensor).__name__}) cannot be cut", remedy):
        form = None if tensor.layout != torch.strided else memory_format(whole)
        kept = whole
        for dim, index in indices.items():
            kept = kept.index_select(dim, index.to(tensor.device))
        kept = kept if form is None else kept.contiguous(memory_format=form)
    shape = [len(indices[dim]) if dim in indices else size for dim, size in enumerate(whole.shape)]
    found = (type(kept).__name__, list(kept.shape), kept.dtype, kept.layout)
    expected = (type(whole).__name__, shape, whole.dtype, whole.layout)
    if found != expected:
        raise NotSupportedError(
            f"{what} cannot be cut: {found} instead of {expected} is left of it. Nothing has been changed; {remedy}"
        )
    return kept


# ---- putting it in its place


def _put(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    tensor.grad = None
    # Autograd remembers a parameter's shape while an older graph is alive, and forgets it with another dtype.
    tensor.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float16 else torch.float16)
    tensor.data = data
    tensor.grad = grad


def _refill(attributes: State, before: State) -> None:
    attributes.clear()
    attributes.update(before)
