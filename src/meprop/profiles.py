"""Labels in torch's profiles, for what would else not be told apart there."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch.autograd import profiler

__all__ = ["is_profiled", "labelled"]

P = ParamSpec("P")
R = TypeVar("R")

_is_compiling = torch.compiler.is_compiling


def is_profiled() -> bool:
    """Whether a profiler of torch records what runs. A graph that is traced does not depend on it."""
    return not _is_compiling() and profiler._is_profiler_enabled  # pyright: ignore[reportPrivateUsage]


def labelled(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function whose calls have a name in profiles."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not is_profiled():
                return function(*args, **kwargs)
            with profiler.record_function(name):
                return function(*args, **kwargs)

        return call

    return decorate
