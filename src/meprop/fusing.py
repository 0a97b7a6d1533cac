"""Dropouts of a model that are computed in one pass with the activation before them."""

from __future__ import annotations

import torch

from meprop.nn.activation import Sequential, pairs_in
from meprop.nn.base import become


def fuse(model: torch.nn.Module) -> None:
    """Makes a `meprop.nn.Sequential` of each `torch.nn.Sequential` with a Dropout to fuse, in place."""
    for module in model.modules():
        if type(module) is torch.nn.Sequential and "forward" not in vars(module) and pairs_in(module):
            become(module, Sequential)


def unfuse(model: torch.nn.Module) -> None:
    """Takes `fuse` back."""
    for module in model.modules():
        if type(module) is Sequential:
            become(module, torch.nn.Sequential)


def fused_in(model: torch.nn.Module) -> tuple[str, ...]:
    """What is fused: the names of each Dropout and of the activation before it, if there is one."""
    return tuple(
        " + ".join(f"{prefix}.{name}" if prefix else name for name in pair)
        for prefix, module in model.named_modules()
        if isinstance(module, Sequential)
        for pair in pairs_in(module)
    )
