"""Torch's quantization takes a converted model as a plain one.

`torch.ao.quantization` looks layers up by their exact type, so that it would leave converted ones in floating point
without a word. Once this module is imported, converted layers become plain before torch looks. `import meprop` imports
it.
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

# What each call of torch's asks before it looks at types: quantize_dynamic, prepare and prepare_qat the first one, with
# the model or its copy; fuse_modules and fuse_modules_qat the second one, with the model and a layer's name.
_ASKED = {
    "torch.ao.quantization.quantize": "propagate_qconfig_",
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


for _module, _name in _ASKED.items():
    if hasattr(sys.modules.get(_module), _name):  # importing torch imports them
        setattr(sys.modules[_module], _name, _makes_plain(getattr(sys.modules[_module], _name)))
