"""The compiled CPU kernels, `meprop._C`: float32 and bfloat16. What they promise is in csrc/drivers.h and kernels.h."""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
_ROWS, _COLUMNS = 0, 1


def _load() -> tuple[ModuleType | None, str | None]:
    """The extension, at the instruction-set level that MEPROP_ISA asks for; or why there is none."""
    try:
        from meprop import _C  # after torch, whose OpenMP runtime it shares
    except ImportError as error:
        return None, f"the compiled extension meprop._C is not there ({error}); reinstall where a C++ compiler is"
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
    return _topk(_ROWS, grad, k, (grad.shape[0], k))


def topk_columns(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `reference.topk_columns`."""
    return _topk(_COLUMNS, grad, k, (k,))


def grad_input(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """As `reference.grad_input`."""
    result, _ = linear_backward(values, indices, weight.shape[0], weight, None)
    assert result is not None
    return result


def grad_weight(values: Tensor, indices: Tensor, x: Tensor, width: int) -> Tensor:
    """As `reference.grad_weight`."""
    _, result = linear_backward(values, indices, width, None, x)
    assert result is not None
    return result


def grad_weight_rows(values: Tensor, x: Tensor) -> Tensor:
    """As `reference.grad_weight_rows`."""
    indices = torch.arange(values.shape[1], dtype=torch.int32)
    return grad_weight(values, indices, x, values.shape[1])


def linear_backward(
    values: Tensor, indices: Tensor, width: int, weight: Tensor | None, x: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of input (if `weight` is given) and weight (if `x` is) of a selection, in one call."""
    values, indices = values.contiguous(), indices.contiguous()
    scope = _ROWS if indices.dim() == 2 else _COLUMNS
    shape = (values.shape[0], width, values.shape[1])
    result = _backward(scope, None, shape, values, indices, weight, x, needs_bias=False, rows_only=False)
    return result[:2]


def topk_linear_backward(
    grad: Tensor, k: int, scope: str, weight: Tensor | None, x: Tensor | None, needs_bias: bool, rows_only: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """A linear map's whole backward pass with top-k in one call: selection, then the gradients that are asked for.

    Args:
        grad: Output gradient [N, O].
        k: How many entries of each row (scope "example") or columns ("batch") are kept.
        scope: "example" or "batch".
        weight: [O, I], where the input's gradient is wanted.
        x: Input [N, I], where the weight's gradient is wanted.
        needs_bias: Whether the bias's gradient is wanted.
        rows_only: With scope "batch", leave the weight's gradient as its k rows.

    Returns:
        The gradients of input [N, I], weight [O, I] (or [k, I]) and bias [O], or None each, and, with `rows_only`, the
        indices [k] of the rows.
    """
    if grad.stride(1) != 1:
        grad = grad.contiguous()
    rows, width = grad.shape
    values = indices = None
    if rows_only:
        values, indices = grad.new_empty(rows, k), torch.empty(k, dtype=torch.int32)
    code = _ROWS if scope == "example" else _COLUMNS
    return (*_backward(code, grad, (rows, width, k), values, indices, weight, x, needs_bias, rows_only), indices)


def _topk(scope: int, grad: Tensor, k: int, indices_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    assert _extension is not None
    if grad.stride(1) != 1:
        grad = grad.contiguous()
    rows, width = grad.shape
    values, indices = grad.new_empty(rows, k), torch.empty(indices_shape, dtype=torch.int32)
    _extension.topk(
        _DTYPE_CODES[grad.dtype],
        scope,
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


def _backward(
    scope: int,
    grad: Tensor | None,
    shape: tuple[int, int, int],
    values: Tensor | None,
    indices: Tensor | None,
    weight: Tensor | None,
    x: Tensor | None,
    needs_bias: bool,
    rows_only: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    assert _extension is not None
    rows, width, k = shape
    like = next(tensor for tensor in (grad, values) if tensor is not None)
    inputs = next((tensor.shape[1] for tensor in (weight, x) if tensor is not None), 0)
    weight, x = _readable(weight, like), _readable(x, like)
    grad_input = None if weight is None else like.new_empty(rows, inputs)
    grad_weight = None if x is None else like.new_empty(k if rows_only else width, inputs)
    grad_bias = like.new_empty(width) if needs_bias else None
    _extension.linear_backward(
        _DTYPE_CODES[like.dtype],
        scope,
        *_address(grad),
        rows,
        width,
        k,
        _address(values)[0],
        _address(indices)[0],
        torch.get_num_threads(),
        inputs,
        *_address(weight),
        *_address(x),
        _address(grad_input)[0],
        _address(grad_weight)[0],
        _address(grad_bias)[0],
        grad is not None,
        rows_only,
    )
    return grad_input, grad_weight, grad_bias


def _readable(matrix: Tensor | None, like: Tensor) -> Tensor | None:
    """The matrix in the dtype of `like`, its rows' elements adjacent."""
    if matrix is None or (matrix.dtype == like.dtype and matrix.stride(1) == 1):
        return matrix
    return matrix.to(like.dtype).contiguous()


def _address(tensor: Tensor | None) -> tuple[int, int]:
    """Address and leading dimension; 0 for a tensor that is not wanted."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))
