"""An activation with dropout as a module, and a Sequential that finds such pairs among its modules."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook  # pyright: ignore[reportPrivateUsage]

from meprop.functional.activation import (
    activation_dropout,
    check_activation,
    check_probability,
    is_one_pass,
    one_pass,
)
from meprop.nn.base import own_method
from meprop.ops.activation import Activation

_KINDS = (torch.nn.Dropout, torch.nn.ReLU, torch.nn.GELU, torch.nn.Tanh)
_FORWARDS: dict[type[torch.nn.Module], Any] = {kind: own_method(kind, "forward") for kind in _KINDS}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ActivationDropout(torch.nn.Module):
    """An activation with dropout of its results, in one pass over memory each way.

    In training mode it is `meprop.functional.activation_dropout`, in evaluation mode the activation. It has neither
    parameters nor state.

    Args:
        activation: "relu", "gelu", "gelu_tanh", "tanh", or "identity" for dropout alone.
        p: The probability of an entry to be dropped.

    Raises:
        TypeError: p is not a number.
        ValueError: `activation` is unknown, or p is not from 0 to 1.
    """

    def __init__(self, activation: Activation = "relu", p: float = 0.5) -> None:
        check_activation(activation)
        check_probability(p)
        super().__init__()
        self.activation: Activation = activation
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        """The result [*] for an input [*]."""
        return activation_dropout(input, self.activation, self.p, self.training)

    def extra_repr(self) -> str:
        """The activation and the probability."""
        return f"{self.activation!r}, p={self.p}"

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """Torch's modules of the same meaning. `torch.jit.script` takes them in place of this one."""
        plain = {
            "identity": torch.nn.Identity(),
            "relu": torch.nn.ReLU(),
            "gelu": torch.nn.GELU(),
            "gelu_tanh": torch.nn.GELU(approximate="tanh"),
            "tanh": torch.nn.Tanh(),
        }
        return torch.nn.Sequential(plain[self.activation], torch.nn.Dropout(self.p)).train(self.training)


class Sequential(torch.nn.Sequential):
    """`torch.nn.Sequential` that computes a Dropout in one pass with the activation before it.

    In training mode, each `torch.nn.ReLU`, `GELU` or `Tanh` that is followed by a `torch.nn.Dropout` is computed with
    it by `meprop.functional.activation_dropout`. So is a Dropout that follows another module, alone. The modules stay
    what they are. Their options hold, such as `p`, and may be changed at any time. Modules may be added and removed.

    Modules are called one by one where the pass does not serve the input, and where a module of a pair has a hook, or a
    forward pass that somebody put in the place of torch's. A pass writes to new memory, also if a module of the pair is
    made to work in place.
    """

    def forward(self, input: Any) -> Any:
        """The result of the last module. Under torch.compile it is torch's own forward pass."""
        if torch.compiler.is_compiling() or _has_any_global_hook():
            return super().forward(input)
        modules = [*self]
        at = 0
        while at < len(modules):
            pair = _pair_at(modules, at)
            if pair is not None and is_one_pass(input, pair.dropout.p, pair.dropout.training):
                input = one_pass(input, pair.activation, pair.dropout.p)
                at += pair.size
            else:
                input = modules[at](input)
                at += 1
        return input

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """Torch's Sequential of the same modules. `torch.jit.script` takes it in place of this one."""
        plain = torch.nn.Sequential(OrderedDict(self._modules.items()))  # pyright: ignore  (torch has no type for None)
        plain.training = self.training
        return plain


class Pair(NamedTuple):
    """An activation and the Dropout that follows it."""

    activation: Activation
    dropout: torch.nn.Dropout
    size: int
    """The number of modules: 1 for a Dropout alone, else 2."""


def pairs_in(sequential: torch.nn.Sequential) -> list[tuple[str, ...]]:
    """The names of the modules that a Sequential of ours computes in one pass."""
    names, modules = list(vars(sequential)["_modules"]), [*sequential]
    found: list[tuple[str, ...]] = []
    at = 0
    while at < len(modules):
        pair = _pair_at(modules, at)
        if pair is not None:
            found.append(tuple(names[at : at + pair.size]))
        at += 1 if pair is None else pair.size
    return found


def _pair_at(modules: list[torch.nn.Module], at: int) -> Pair | None:
    """The pair that begins at a place, or the Dropout there. None if there is neither."""
    first = modules[at]
    if (dropout := _plain_dropout(first)) is not None:
        return Pair("identity", dropout, 1)
    activation = _activation_of(first)
    if activation is None or at + 1 == len(modules) or (dropout := _plain_dropout(modules[at + 1])) is None:
        return None
    return Pair(activation, dropout, 2)


def _plain_dropout(module: torch.nn.Module) -> torch.nn.Dropout | None:
    return module if type(module) is torch.nn.Dropout and _is_whole(module) else None


def _activation_of(module: torch.nn.Module) -> Activation | None:
    kind = type(module)
    if kind is torch.nn.ReLU:
        name: Activation = "relu"
    elif kind is torch.nn.Tanh:
        name = "tanh"
    elif kind is torch.nn.GELU:
        name = "gelu" if module.approximate == "none" else "gelu_tanh"
    else:
        return None
    return name if _is_whole(module) else None


def _is_whole(module: torch.nn.Module) -> bool:
    """Whether a call of the module is torch's forward pass of its class and nothing else."""
    attributes, kind = vars(module), type(module)
    is_own = "forward" not in attributes and kind.forward is _FORWARDS[kind]
    return is_own and not any(attributes[hooks] for hooks in _HOOKS)
