"""Who serves a call, and the operations as the rest of the library sees them.

A call goes to the first backend that has the operation and does not decline the tensor; the reference never declines.
Under `torch.compile` it goes through the `torch.library` operation of the same name, which arrives here in turn.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from meprop.ops import native, reference
from meprop.selection import ColumnSelection, RowSelection, Selection

_BACKENDS = (native, reference)


def serve(op: str, tensor: Tensor, *args: Any) -> Any:
    """Runs the operation named `op` on the first backend that takes it."""
    for backend in _BACKENDS:
        kernel = getattr(backend, op, None)
        if kernel is not None and backend.declines(tensor) is None:
            return kernel(tensor, *args)
    raise AssertionError("the reference serves every call")


def _call(op: str, tensor: Tensor, *args: Any) -> Any:
    if torch.compiler.is_compiling() or type(tensor) is not Tensor:  # subclasses: fake, functional, distributed tensors
        return getattr(torch.ops.meprop, op)(tensor, *args)
    return serve(op, tensor, *args)


def topk_rows(grad: Tensor, k: int) -> RowSelection:
    """The k largest |g| of each row of grad [N, O]; requires 1 <= k <= O."""
    values, indices = _call("topk_rows", grad, k)
    return RowSelection(values, indices, grad.shape[1])


def topk_columns(grad: Tensor, k: int) -> ColumnSelection:
    """The k columns of grad [N, O] with the largest sum of |g|; requires 1 <= k <= O."""
    values, indices = _call("topk_columns", grad, k)
    return ColumnSelection(values, indices, grad.shape[1])


def grad_input(selection: Selection, weight: Tensor) -> Tensor:
    """selection [N, O] times weight [O, I]: the gradient of a linear map's input, [N, I]."""
    op = "rows_grad_input" if isinstance(selection, RowSelection) else "columns_grad_input"
    return _call(op, selection.values, selection.indices, weight)


def grad_weight(selection: Selection, x: Tensor) -> Tensor:
    """selection [N, O] transposed, times x [N, I]: the gradient of a linear map's weight, dense [O, I]."""
    op = "rows_grad_weight" if isinstance(selection, RowSelection) else "columns_grad_weight"
    return _call(op, selection.values, selection.indices, x, selection.width)


def backend_info() -> dict[str, Any]:
    """What serves calls here, and why what does not, does not.

    Returns:
        A dict: "native" (whether the compiled kernels are in use), "isa" (their instruction-set level, or None),
        "levels" (those that run here), "forced" (the value of MEPROP_ISA, or None), "threads", "triton" (False: no GPU
        kernels yet), "reasons" (per backend not in use, why).
    """
    reasons = {"triton": "meprop has no Triton kernels yet: CUDA tensors are served by plain torch operations"}
    missing = native.reason_missing()
    if missing is not None:
        reasons["native"] = missing
    return {
        "native": missing is None,
        "isa": native.level(),
        "levels": native.levels(),
        "forced": os.environ.get("MEPROP_ISA") or None,
        "threads": torch.get_num_threads(),
        "triton": False,
        "reasons": reasons,
    }
