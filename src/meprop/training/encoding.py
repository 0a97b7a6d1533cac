"""Nested state as JSON and tensors, and back: what a checkpoint holds, without pickle."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, str)


def flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return nested state as data for JSON.

    What JSON has no form for is an object of one member: a dict, a tuple, a tensor or an array of numpy.

    Args:
        value: None, booleans, numbers, strings, tensors and arrays of any shape, and lists, tuples and dicts of these.
        tensors: Gets the tensors and arrays, by the name that stands for them.

    Raises:
        TypeError: There is something else in it.
    """
    if isinstance(value, Tensor | np.ndarray):
        kind, tensor = ("tensor", value) if isinstance(value, Tensor) else ("array", torch.from_numpy(value))
        strided = tensor.layout is torch.strided and not tensor.is_quantized
        if not strided or tensor.dtype in (torch.complex32, torch.complex128):  # safetensors has no form for them
            raise TypeError(f"a checkpoint holds no tensor of layout {tensor.layout} and type {tensor.dtype}")
        name = str(len(tensors))
        tensors[name] = tensor.detach().cpu().contiguous().clone()  # a copy: safetensors takes no shared memory
        return {kind: name}
    if type(value) in _PLAIN:
        return value
    if type(value) is list:
        return [flatten(each, tensors) for each in value]
    if type(value) is tuple:
        return {"tuple": [flatten(each, tensors) for each in value]}
    if type(value) in (dict, OrderedDict):
        return {"dict": [[flatten(key, tensors), flatten(each, tensors)] for key, each in value.items()]}
    raise TypeError(f"a checkpoint holds tensors, lists, tuples, dicts, numbers and text, no {type(value).__name__}")


def restore(data: Any, tensors: dict[str, Tensor]) -> Any:
    """Return what `flatten` was given.

    Raises:
        ValueError: The data are not of `flatten`.
        LookupError: They name a tensor that is not there.
    """
    if isinstance(data, list):
        return [restore(each, tensors) for each in data]
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "array":
            return tensors[content].numpy()
        case "tuple":
            return tuple(restore(each, tensors) for each in content)
        case "dict":
            return {restore(key, tensors): restore(each, tensors) for key, each in content}
        case _:
            raise ValueError(f"{kind!r} is unknown")
