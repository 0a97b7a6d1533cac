"""Torch's quantization takes a converted model as a plain one.

`torch.ao.quantization` looks layers up by their exact type, so that it would leave converted ones in floating point
without a word. Once there is a layer of meprop, converted layers become plain before torch looks.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from meprop.convert import make_plain
from meprop.nn.base import SparseLayer, layer_descriptor

# What torch's calls ask before they look at types. quantize_dynamic, prepare, prepare_qat and those for graphs ask the
# first one, with the model or its copy. fuse_modules and fuse_modules_qat ask the second one, with the model and a
# layer's name. Torch looks both up in their modules when it calls them, so that all who call them see the change.
_ASKED = {
    "torch.ao.quantization.quantize": "_propagate_qconfig_helper",
    "torch.ao.quantization.fuse_modules": "_get_module",
}


def _makes_plain(asked: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(asked)
    def ask(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        named = model.get_submodule(args[0]) if args and isinstance(args[0], str) else model
        layers = [module for module in named.modules() if isinstance(module, SparseLayer)]
        for layer in layers:
            make_plain(layer, layer_descriptor(layer))
        if layers and model.training:
            warnings.warn(
                f"torch.ao.quantization made {len(layers)} converted layers plain: they are dense from now on",
                UserWarning,
                stacklevel=2,
            )
        return asked(model, *args, **kwargs)

    return ask


@functools.cache
def support() -> None:
    """Lets torch's quantization take converted layers. The first layer of meprop calls it."""
    for module, name in _ASKED.items():
        if hasattr(sys.modules.get(module), name):  # importing torch imports them
            setattr(sys.modules[module], name, _makes_plain(getattr(sys.modules[module], name)))
