"""Copies of models that keep something between calls: tensors of a graph are copied without their history."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

T = TypeVar("T")


class _Detached(TorchFunctionMode):
    """Lets `copy.deepcopy` take a tensor that is no leaf of a graph, which torch refuses."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        memo[id(tensor)] = copied = tensor.detach().clone()
        return copied


def deepcopy(value: T, memo: dict[int, Any] | None = None) -> T:
    """`copy.deepcopy`, for which a tensor that has a history is the same values without one."""
    with _Detached():
        return copy.deepcopy(value, memo)


@contextmanager
def same_random_states() -> Generator[None]:
    """A context after which the random states of torch, of `random` and of NumPy are as they were before."""
    numpy: Any = sys.modules.get("numpy")
    drawn, of_numpy = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(drawn)
        if numpy:
            numpy.random.set_state(of_numpy)


@contextmanager
def unchanged(model: torch.nn.Module) -> Generator[None]:
    """A context in which a model works on copies of all that its modules hold. Afterwards it is as it was before.

    The modules stay the same objects. What cannot be copied, such as an open file, is not. The random states of torch,
    of `random` and of NumPy are restored, too.

    Args:
        model: The model.
    """
    before = {module: vars(module) for module in model.modules()}
    memo: dict[int, Any] = {id(module): module for module in before}
    with same_random_states():
        try:
            for module, attributes in before.items():
                copies = {name: copy_or_same(value, memo) for name, value in attributes.items()}
                object.__setattr__(module, "__dict__", copies)
            yield
        finally:
            for module, attributes in before.items():
                object.__setattr__(module, "__dict__", attributes)


def copy_or_same(value: Any, memo: dict[int, Any]) -> Any:
    """A copy, or the same object if it cannot be copied, such as an open file."""
    try:
        return deepcopy(value, memo)
    except Exception:  # copying runs code of the value's class, which may fail in any way
        return value
