"""States in bfloat16: what they are for, how they are kept, and what is refused with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext

from meprop.errors import NotSupportedError
from meprop.ops.gradients import OF_ROWS
from meprop.ops.registry import PLAIN
from meprop.ops.rounding import key_of

ROUNDING = "rounding"
"""The name of a state that is a whole number: that of the parameter's next rounding."""

_OF_A_PARAMETER = 1 << 40  # the numbers of its roundings
_OPTIONS = ("foreach", "fused", "capturable", "differentiable", "amsgrad")


def checked(name: str, dtype: Any) -> torch.dtype | None:
    """The argument of this name, with its errors: a narrow dtype, or None."""
    if dtype is None or dtype is torch.bfloat16:
        return dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}={dtype!r} is of type {type(dtype).__name__}; it is torch.bfloat16 or None")
    raise ValueError(f"{name}={dtype}; it is torch.bfloat16 or None")


def refuse(kind: str, group: dict[str, Any], parameters: Iterable[Tensor]) -> None:
    """Raises a NotSupportedError for what there is no step with states in bfloat16 for.

    Args:
        kind: The name of the optimizer.
        group: The options of the parameters.
        parameters: The parameters.
    """
    what = f"{kind} with state_dtype=torch.bfloat16"
    for name in _OPTIONS:
        if group.get(name):
            raise NotSupportedError(f"{what} and {name}=True; leave one of the two out")
    if TracingContext.try_get() is not None:  # torch.compiler.is_compiling() is False here
        raise NotSupportedError(f"{what} under torch.compile; call step() outside, or leave state_dtype out")
    for parameter in parameters:
        if type(parameter) not in PLAIN:
            raise NotSupportedError(f"{what} and a parameter of type {type(parameter).__name__}; leave state_dtype out")
        if parameter.dtype is not torch.float32:
            raise NotSupportedError(
                f"{what} and a parameter of {parameter.dtype}; it is for float32: leave state_dtype out, and states "
                "have the dtype of their parameter"
            )


def narrow(state: dict[str, Any], dtype: torch.dtype) -> None:
    """Makes all states of a parameter that have its shape of this dtype, as after loading those in float32."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dtype is not dtype and name != "step" and not name.endswith(OF_ROWS):
            state[name] = value.to(dtype)


def next_key(state: dict[str, Any], parameter: Tensor, groups: list[dict[str, Any]]) -> int:
    """The key of the next rounding of a parameter's states.

    It depends on the place of the parameter among those of the optimizer, and on the number of roundings before. It
    does not depend on random states: those of several processes differ, and their copies of a parameter must not.
    """
    if ROUNDING not in state:
        parameters = (each for group in groups for each in group["params"])
        place = next(place for place, each in enumerate(parameters) if each is parameter)
        state[ROUNDING] = place * _OF_A_PARAMETER
    number = state[ROUNDING]
    state[ROUNDING] = number + 1
    return key_of(number)
