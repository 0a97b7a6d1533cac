"""The compiled CPU kernels, `meprop._C`: float32 and bfloat16. What each kernel promises is in csrc/kernels.h."""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def _load() -> tuple[ModuleType | None, str | None]:
    """The extension, at the instruction-set level that MEPROP_ISA asks for; or why there is none."""
    try:
        from meprop import _C  # after torch, whose OpenMP runtime it shares
    except ImportError as error:
        return (
            None,
            f"the compiled extension meprop._C is not there ({error}); reinstall meprop where a C++ compiler is",
        )
    wanted = os.environ.get("MEPROP_ISA")
    if wanted and wanted not in _C.levels():
        raise ValueError(f"MEPROP_ISA={wanted!r}: this machine and build have {', '.join(_C.levels())}")
    if wanted:
        _C.use_level(wanted)
    return _C, None


_extension, _reason_missing = _load()


def declines(tensor: Tensor) -> str | None:
    """Why this backend cannot serve a call on such a tensor, or None if it can."""
    if _reason_missing is not None:
        return _reason_missing
    if tensor.device.type != "cpu":
        return f"native kernels run on the CPU, not on {tensor.device}"
    if tensor.dtype not in _DTYPE_CODES:
        return f"native kernels take float32 and bfloat16, not {tensor.dtype}"
    return None


def levels() -> list[str]:
    """The instruction-set levels that run here, slowest first; empty without the extension."""
    return _extension.levels() if _extension is not None else []


def level() -> str | None:
    """The instruction-set level in use."""
    return _extension.level() if _extension is not None else None


def use_level(name: str) -> None:
    """Serves later calls with that level, for tests and benchmarks; ValueError if it is not one of `levels()`."""
    if _extension is None:
        raise ValueError(_reason_missing)
    _extension.use_level(name)


def reason_missing() -> str | None:
    """Why the extension is not loaded, or None if it is."""
    return _reason_missing


def topk_rows(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `reference.topk_rows`."""
    assert _extension is not None
    if grad.stride(1) != 1:
        grad = grad.contiguous()
    rows, width = grad.shape
    values = grad.new_empty(rows, k)
    indices = torch.empty(rows, k, dtype=torch.int32)
    _extension.topk_rows(
        _DTYPE_CODES[grad.dtype],
        grad.data_ptr(),
        grad.stride(0),
        rows,
        width,
        k,
        values.data_ptr(),
        indices.data_ptr(),
        torch.get_num_threads(),
    )
    return values, indices
