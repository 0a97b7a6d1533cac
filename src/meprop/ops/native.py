"""The compiled CPU kernels, `meprop._C`, for float32 and bfloat16.

csrc/drivers.h and csrc/kernels.h hold their contracts. This module loads the extension and sets its instruction-set
level. It also checks the tensors that a call passes, and takes their addresses. The calls themselves are beside the
operations that they implement.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from meprop.ops.registry import PLAIN, Backend, register
from meprop.selection import Entries

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
SCOPE_CODES = {"example": 0, "batch": 1}
KEEP_CODES = {"largest": 0, "energy": 1, "noise": 2, "drawn": 3}
FLOAT32, BFLOAT16, INT32, INT64 = ((dtype,) for dtype in (torch.float32, torch.bfloat16, torch.int32, torch.int64))

_INSIDE_A_TRANSFORM = "native kernels read memory, which tensors inside of torch.func transforms do not have"
_transform: Callable[[], object] = torch._C._functorch.peek_interpreter_stack  # pyright: ignore


def _load() -> tuple[ModuleType | None, str | None]:
    """The extension at the instruction-set level that MEPROP_ISA asks for, or why there is none."""
    try:
        from meprop import _C  # torch comes first: the extension shares its OpenMP runtime
    except ImportError as error:
        return None, f"the compiled extension meprop._C is not there ({error}); reinstall meprop with a C++ compiler"
    wanted = os.environ.get("MEPROP_ISA")
    if wanted and wanted not in _C.levels():
        raise ValueError(f"MEPROP_ISA={wanted!r}: this machine and build have {', '.join(_C.levels())}")
    if wanted:
        _C.use_level(wanted)
    return _C, None


_extension, _reason_missing = _load()


def extension() -> ModuleType:
    """The extension. It is loaded whenever this backend serves a call."""
    assert _extension is not None
    return _extension


def reason_missing() -> str | None:
    """Why the extension is not loaded. None if it is."""
    return _reason_missing


def extension_file() -> Path | None:
    """The file of the extension. None without it."""
    return Path(_extension.__file__) if _extension is not None and _extension.__file__ is not None else None


def levels() -> list[str]:
    """The instruction-set levels that run on this machine, slowest first. It is empty without the extension."""
    return _extension.levels() if _extension is not None else []


def level() -> str | None:
    """The instruction-set level in use. None without the extension."""
    return _extension.level() if _extension is not None else None


def use_level(name: str) -> None:
    """Serves later calls with this level. It is for tests and benchmarks.

    Raises:
        ValueError: The level is not one of `levels()`, or the extension is not loaded.
    """
    if _extension is None:
        raise ValueError(_reason_missing)
    _extension.use_level(name)


def _details() -> dict[str, Any]:
    return {
        "isa": level(),
        "levels": levels(),
        "forced": os.environ.get("MEPROP_ISA") or None,
        "threads": torch.get_num_threads(),
    }


backend = Backend("native", _reason_missing, _details)
register(backend)


# ---------------------------------------------------------------- the check


def declines(*tensors: Tensor | None, dtypes: Collection[torch.dtype] = DTYPE_CODES) -> str | None:
    """Why native code cannot read and write such tensors. None if it can. Every tensor of every call is checked.

    Native code can read and write a strided tensor on the CPU of one of these dtypes. It cannot work with other
    subclasses of Tensor than Parameter, nor inside a transform of `torch.func`, because the data may lie elsewhere.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        try:
            if type(tensor) in PLAIN and tensor.dtype in dtypes and tensor.is_cpu and tensor.data_ptr():
                continue
        except RuntimeError:  # a tensor of a sparse layout, or inside a transform, has no pointer
            pass
        reason = _why_not(tensor, dtypes)
        if reason is not None:
            return reason
    return None if _transform() is None else _INSIDE_A_TRANSFORM


def declines_scattered(*tensors: Tensor | None, dtypes: Collection[torch.dtype]) -> str | None:
    """The same as `declines`, for tensors that also have to be contiguous."""
    reason = declines(*tensors, dtypes=dtypes)
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor is not None and (not tensor.is_contiguous() or tensor.is_neg()):
            return f"native kernels take a contiguous tensor here, not one of strides {list(tensor.stride())}"
    return None


def declines_overlap(written: Sequence[Tensor | None], *read: Tensor | None) -> str | None:
    """Why native code cannot write some contiguous tensors. None if none of them shares memory with another tensor."""
    spans = [(each.data_ptr(), each.data_ptr() + each.nbytes) for each in (*written, *read) if each is not None]
    count = sum(each is not None for each in written)
    for number, (begin, end) in enumerate(spans[:count]):
        for other_begin, other_end in spans[number + 1 :]:
            if begin < other_end and other_begin < end:
                return "native kernels write tensors that share no memory with another one"
    return None


def _why_not(tensor: Tensor, dtypes: Collection[torch.dtype]) -> str | None:
    """The reason in words. None for an empty tensor, which needs no memory."""
    if _transform() is not None:
        return _INSIDE_A_TRANSFORM
    if type(tensor) not in PLAIN:
        return f"native kernels read memory, which a {type(tensor).__name__} may not have"
    if not tensor.is_cpu:
        return f"native kernels run on the CPU, not on {tensor.device}"
    if tensor.dtype not in dtypes:
        wanted = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"native kernels take {wanted} here, not {tensor.dtype}"
    if tensor.layout is not torch.strided:
        return f"native kernels read rows and columns, not the layout {tensor.layout}"
    if tensor.numel() > 0:
        return "native kernels read memory, which this tensor does not have"
    return None


# ---------------------------------------------------------------- arguments of a call


def readable(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix in this dtype, with adjacent elements in each row."""
    if matrix.dtype == dtype and matrix.stride(1) == 1 and not matrix.is_neg():
        return matrix
    return matrix.resolve_neg().to(dtype).contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The same values in contiguous memory."""
    return None if tensor is None else tensor.resolve_neg().contiguous()


def address(tensor: Tensor | None) -> int:
    """The address of the tensor's memory. 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def codes_of(entries: Entries) -> tuple[int, int]:
    """The codes of what is kept and of the key, which is 0 if there is none.

    Raises:
        ValueError: `keep` is unknown, k or `share` is negative, or entries that are drawn have no key.
    """
    keep, k, key = entries.keep, entries.k, entries.key
    if not entries.share >= 0:
        raise ValueError(
            f"keep={keep!r} with share={entries.share}; it is a share of the sum of squares, of at least 0"
        )
    if keep not in KEEP_CODES or k < 0:
        raise ValueError(f"keep={keep!r} with k={k}; it is one of {', '.join(KEEP_CODES)}, with a k of at least 0")
    if keep in ("noise", "drawn") and (key is None or key.numel() != 1 or key.dtype != torch.int64):
        raise ValueError(f"keep={keep!r} with key={key!r}; entries are drawn with a key, which is one int64")
    return KEEP_CODES[keep], 0 if key is None else int(key)


def written(*tensors: Tensor | None) -> None:
    """Tells autograd that native code has changed these tensors."""
    torch.autograd.graph.increment_version([tensor for tensor in tensors if tensor is not None])
