"""The calls of layers that are recorded in training, and backward passes that are run again on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from meprop.training.loop import Trainer

Gradients = dict[str, Tensor]
"""Of inputs and parameters by name."""
Backward = Callable[[], list[Gradients]]
"""A backward pass of several calls."""


@dataclass
class Call:
    """One call of a layer: its arguments, whose tensors are leaves of a graph, and its output's gradients."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grads: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """By place among the tensors of the output."""

    def keep(self, place: int, grad: Tensor) -> None:
        """Keep the gradient of a tensor of the output."""
        self.grads[place] = grad.clone()

    @property
    def inputs(self) -> list[Tensor]:
        """Return the tensors among the arguments."""
        return tensors_of((self.args, self.kwargs))


def rows_of(layer: nn.Module, call: Call) -> int:
    """How many rows of output features a call has: examples or words; positions in the images of a convolution."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return next(iter(call.grads.values())).numel() // layer.out_channels
    return call.inputs[0].shape[:-1].numel()


def recorded_calls(dense: Trainer, names: Sequence[str], batches: Sequence[Any]) -> dict[str, list[Call]]:
    """The calls of layers that get a gradient."""
    model, calls = dense.model.train(), {name: list[Call]() for name in names}

    def hook(name: str) -> Callable[..., None]:
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            call = Call(_leaves(args), _leaves(kwargs))
            calls[name].append(call)
            for place, tensor in enumerate(tensors_of(output)):
                if tensor.requires_grad:
                    tensor.register_hook(partial(call.keep, place))

        return record

    hooks = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names]
    with dense.task.blamed("a training step"):
        for batch in batches:
            dense.setup.loss(model, batch).backward()  # pyright: ignore[reportUnknownMemberType]
    model.zero_grad()
    for handle in hooks:
        handle.remove()
    return {name: [call for call in of if call.grads] for name, of in calls.items()}


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested tuples (a PackedSequence is one) and dicts."""
    if isinstance(value, Tensor):
        return [value]
    parts: Any = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def _leaves(value: Any) -> Any:
    """The same with each tensor detached, that needs a gradient where it did."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: _leaves(part) for key, part in cast("dict[str, Any]", value).items()}
    if isinstance(value, tuple):
        parts = map(_leaves, cast("tuple[Any, ...]", value))
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def backward_of(layer: nn.Module, calls: Sequence[Call]) -> Backward:
    """The backward pass of graphs that are made now, one for each call: gradients of inputs and parameters by name."""
    passes: list[tuple[list[Tensor], dict[str, Tensor], list[Tensor]]] = []
    for call in calls:
        outputs = tensors_of(layer(*call.args, **call.kwargs))
        inputs = [tensor for tensor in call.inputs if tensor.requires_grad]
        leaves = {"input" if place == 0 else f"input {place}": tensor for place, tensor in enumerate(inputs)}
        leaves |= {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
        passes.append(([outputs[place] for place in call.grads], leaves, list(call.grads.values())))

    def run() -> list[Gradients]:
        return [
            dict(
                zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), grads, retain_graph=True), strict=True)
            )
            for outputs, leaves, grads in passes
        ]

    return run
