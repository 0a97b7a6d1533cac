"""The time that each layer takes of a real backward pass, by hooks on the nodes of autograd's graph."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["Watch", "tensors_of"]

_TINY = 1e-35
"""Below this a product with a weight may be a denormal number of float32 or bfloat16."""


class Watch:
    """Adds up the time of those nodes of a graph that calls of each layer have made.

    Args:
        synchronize: Waits until the device is idle.

    Attributes:
        seconds: The seconds of each layer's backward pass, by its name. A layer that got no gradient is not there.
        outputs: How many entries an output of each layer has. A layer that was not called is not there.
        again: The layers that the backward pass calls again.
        autocast: Whether a layer was called under autocast.
        tiny: How many entries of output gradients are so small that products with them are denormal.
        entries: How many entries of output gradients there are.
        nonzeros: The share of entries that are not zero in an input of each linear layer on a CPU, by the layer's name.
    """

    def __init__(self, synchronize: Callable[[], object]) -> None:
        self._synchronize = synchronize
        self._begin = 0.0
        self._in_backward = False
        self.seconds: dict[str, float] = {}
        self.outputs: dict[str, int] = {}
        self.again: list[str] = []
        self.autocast = False
        self.tiny = self.entries = 0
        self.nonzeros: dict[str, float] = {}

    @contextmanager
    def on(self, layers: Mapping[str, torch.nn.Module], *, count: bool = False) -> Generator[None]:
        """A context in which the calls of some layers are watched.

        Args:
            layers: The layers by name.
            count: Whether to count tiny entries and those that are not zero, which takes time.
        """
        hooks = [
            handle
            for name, layer in layers.items()
            for handle in (
                layer.register_forward_pre_hook(partial(self._enter, name)),
                layer.register_forward_hook(partial(self._call, name, count), with_kwargs=True),
            )
        ]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def _enter(self, name: str, _module: torch.nn.Module, _inputs: Any) -> None:
        if self._in_backward:
            self.again.append(name)

    def _call(self, name: str, count: bool, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs, outputs = tensors_of((args, kwargs)), tensors_of(output)
        if count and isinstance(module, torch.nn.Linear) and inputs and inputs[0].is_cpu and inputs[0].numel() > 0:
            self.nonzeros[name] = int(inputs[0].count_nonzero()) / inputs[0].numel()
        if inputs and outputs:
            self.outputs.setdefault(name, outputs[0].numel())
            self.autocast = self.autocast or torch.is_autocast_enabled(inputs[0].device.type)
        seen: set[Any] = {each.grad_fn for each in inputs}  # of what comes before
        waiting: list[Any] = [each.grad_fn for each in outputs]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen or node.name().endswith("AccumulateGrad"):
                continue
            seen.add(node)
            node.register_prehook(self._start)
            node.register_hook(partial(self._stop, name))
            waiting += [following for following, _ in node.next_functions]
        for each in outputs:
            if count and each.requires_grad:
                each.register_hook(self._count)

    def _start(self, _grads: Any) -> None:
        self._in_backward = True
        self._synchronize()
        self._begin = perf_counter()

    def _stop(self, name: str, _inputs: Any, _outputs: Any) -> None:
        self._synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - self._begin

    def _count(self, grad: Tensor) -> None:
        self.tiny += int(((grad != 0) & (grad.abs() < _TINY)).sum())
        self.entries += grad.numel()


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested tuples (a PackedSequence is one), lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(cast("dict[Any, Any]", value).values())
    return (
        [each for part in cast("Any", value) for each in tensors_of(part)] if isinstance(value, (tuple, list)) else []
    )
