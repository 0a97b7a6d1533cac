"""The bound that no rule can pass: a step in which the products of some layers' backward passes cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from meprop.advice.watch import tensors_of

__all__ = ["free_backward"]

# The functions by which torch's layers, and Conv1D of transformers, multiply with their weights.
_PRODUCTS = ("linear", "conv1d", "conv2d", "lstm", "addmm")


class _Free(torch.autograd.Function):
    """A function of torch whose gradients are zeros. They are what any backward pass has to write at least."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[], Any], *tensors: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(*tensors)  # as torch's own does
        return run()

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *(torch.zeros_like(tensor) if needed else None for tensor, needed in wanted)


class _FreeProducts(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is F.multi_head_attention_forward:  # no mode sees what is called within
            return _with_free_linear(func, args, options)
        if getattr(func, "__name__", None) not in _PRODUCTS or not torch.is_grad_enabled():
            return func(*args, **options)
        return _freed(func, args, options)


def _freed(func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    unique = {id(each): each for each in tensors_of((args, options)) if each.requires_grad}
    return _Free.apply(lambda: func(*args, **options), *unique.values())


def _with_free_linear(func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    linear = F.linear  # which something else may have replaced before

    def free_linear(*args: Any, **options: Any) -> Any:
        return _freed(linear, args, options)

    F.linear = free_linear
    try:
        return func(*args, **options)
    finally:
        F.linear = linear


def free_backward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward pass of a layer, whose products with weights have a backward pass that computes nothing."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _FreeProducts():
            return forward(*args, **kwargs)

    return run
