"""The GPU's backend: Triton kernels (`kernels`), and torch's dense products of what they gather.

This module finds out whether Triton is there, and checks the tensors that a call passes. The calls themselves are
beside the operations that they implement. Nothing that a call does waits for the host.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from meprop.ops.registry import Backend, is_plain, register

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets kernels, on the CPU too. It is for tests."""


def _missing() -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed; torch's builds for CUDA bring it"
    if INTERPRETS or torch.version.cuda is not None or torch.version.hip is not None:
        return None
    return "this build of torch has no CUDA"


def kernels() -> ModuleType:
    """The kernels. Importing Triton takes long, so that the first call does it."""
    from meprop.ops import kernels

    return kernels


backend = Backend("triton", _missing())
register(backend)


def declines(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot read such tensors. None if they can."""
    for tensor in tensors:
        if tensor is None:
            continue
        if not is_plain(tensor):
            return f"kernels read memory, which this {type(tensor).__name__} may not have, or not as it says"
        if not tensor.is_cuda and not INTERPRETS:
            return f"kernels run on a GPU, not on {tensor.device}"
        if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
            return f"kernels run on the current device, not on {tensor.device}; call torch.cuda.set_device before"
        if tensor.dtype not in DTYPES:
            return f"kernels are for float32, bfloat16 and float16, not for {tensor.dtype}"
    return None


def matrix(tensor: Tensor) -> Tensor:
    """The matrix with entries of a row next to one another, as kernels read it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
