"""What layers get in training, recorded: inputs and output gradients, from which a backward pass is run on its own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["Backward", "Call", "Gradients", "all_of", "backward_of", "recorded", "tensors_of"]

Gradients = dict[str, Tensor]
Backward = Callable[[], list[Gradients]]


@dataclass
class Call:
    """One call of a layer: its arguments, whose tensors are leaves of a graph, and its output's gradients.

    Attributes:
        args: The arguments.
        kwargs: Those by name.
        autocast: The type of the device, and the dtype of autocast on it. None: there was no autocast.
        grads: The gradients by place among the tensors of the output. It is empty for a call without a backward pass.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[str, torch.dtype] | None = None
    grads: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def keep(self, place: int, grad: Tensor) -> None:
        """Keeps the gradient of a tensor of the output."""
        self.grads[place] = grad.clone()

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return tensors_of((self.args, self.kwargs))

    @property
    def rows(self) -> int:
        """N, of an input [*, I]."""
        return self.inputs[0].shape[:-1].numel()

    def run(self, layer: nn.Module) -> Any:
        """The layer's output for the same arguments, under the same autocast."""
        if self.autocast is None:
            return layer(*self.args, **self.kwargs)
        device, dtype = self.autocast
        with torch.autocast(device, dtype):
            return layer(*self.args, **self.kwargs)


@contextmanager
def recorded(layers: Mapping[str, nn.Module]) -> Generator[dict[str, list[Call]]]:
    """A context in which each call of a layer is recorded, by the name of the layer.

    Args:
        layers: The layers by name.
    """
    calls: dict[str, list[Call]] = {name: [] for name in layers}

    def record(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        known: dict[int, Tensor] = {}
        call = Call(_leaves(args, known), _leaves(kwargs, known))
        if call.inputs and torch.is_autocast_enabled(device := call.inputs[0].device.type):
            call.autocast = device, torch.get_autocast_dtype(device)
        calls[name].append(call)
        for place, tensor in enumerate(tensors_of(output)):
            if tensor.requires_grad:
                tensor.register_hook(partial(call.keep, place))

    hooks = [layer.register_forward_hook(partial(record, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield calls
    finally:
        for handle in hooks:
            handle.remove()


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested tuples (a PackedSequence is one), lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    parts: Any = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def _leaves(value: Any, known: dict[int, Tensor]) -> Any:
    """The same with each tensor detached, that needs a gradient where it did. One tensor stays one."""
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = value.detach().requires_grad_(value.requires_grad)
        return known[id(value)]
    if isinstance(value, dict):
        return {key: _leaves(part, known) for key, part in cast("dict[str, Any]", value).items()}
    if isinstance(value, (tuple, list)):
        parts = [_leaves(part, known) for part in cast("Sequence[Any]", value)]
        if isinstance(value, list):
            return parts
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def backward_of(layer: nn.Module, calls: Sequence[Call]) -> Backward:
    """The backward pass of graphs that are made now, one for each call: gradients of inputs and parameters by name."""
    passes: list[tuple[list[Tensor], dict[str, Tensor], list[Tensor]]] = []
    for call in calls:
        outputs = tensors_of(call.run(layer))
        unique = {id(tensor): tensor for tensor in call.inputs if tensor.requires_grad}
        leaves = {"input" if place == 0 else f"input {place}": each for place, each in enumerate(unique.values())}
        leaves |= {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
        passes.append(([outputs[place] for place in call.grads], leaves, list(call.grads.values())))

    def run() -> list[Gradients]:
        found: list[Gradients] = []
        for outputs, leaves, grads in passes:
            wanted = list(leaves.values())
            gradients = torch.autograd.grad(outputs, wanted, grads, retain_graph=True, allow_unused=True)
            found.append({name: each for name, each in zip(leaves, gradients, strict=True) if each is not None})  # pyright: ignore[reportUnnecessaryComparison]
        return found

    return run


def all_of(passes: Sequence[Backward]) -> Callable[[], object]:
    """One after the other, from the last to the first."""
    return lambda: [backward() for backward in reversed(passes)]
