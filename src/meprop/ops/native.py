"""The compiled CPU kernels, `meprop._C`: float32 and bfloat16. What they promise is in csrc/drivers.h and kernels.h."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from meprop.ops.reference import largest, memory_format
from meprop.selection import AwakeRows, ColumnSelection, RowSelection

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
    if not tensor.is_cpu:
        return f"native kernels run on the CPU, not on {tensor.device}"
    if tensor.dtype not in _DTYPE_CODES:
        return f"native kernels take float32 and bfloat16, not {tensor.dtype}"
    if tensor._is_zerotensor():
        return "native kernels read memory, which this tensor of zeros does not have"
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


def extension_file() -> Path | None:
    """Where the extension lies; None without it."""
    return Path(_extension.__file__) if _extension is not None and _extension.__file__ is not None else None


def reason_missing() -> str | None:
    """Why the extension is not loaded, or None if it is."""
    return _reason_missing


def topk_rows(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `reference.topk_rows`."""
    return _topk(_ROWS, grad, k, (grad.shape[0], k))


def topk_columns(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `reference.topk_columns`."""
    return _topk(_COLUMNS, grad, k, (k,))


def _topk(scope: int, grad: Tensor, k: int, indices_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    assert _extension is not None
    grad = _readable(grad, grad.dtype)
    rows, width = grad.shape
    values = torch.empty((rows, k), dtype=grad.dtype)
    indices = torch.empty(indices_shape, dtype=torch.int32)
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


def column_scores(grad: Tensor) -> Tensor:
    """As `reference.column_scores`."""
    assert _extension is not None
    grad = _readable(grad, grad.dtype)
    rows, width = grad.shape
    scores = torch.empty(width, dtype=torch.float64)
    _extension.column_scores(
        _DTYPE_CODES[grad.dtype],
        _COLUMNS,
        grad.data_ptr(),
        grad.stride(0),
        rows,
        width,
        scores.data_ptr(),
        torch.get_num_threads(),
    )
    return scores


def topk_channels(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `reference.topk_channels`."""
    examples, channels, *sizes = grad.shape
    if memory_format(grad) == torch.channels_last:
        values, indices = topk_columns(grad.movedim(1, -1).flatten(0, -2), k)
        return values.view(examples, *sizes, k).movedim(-1, 1), indices
    grad = grad.contiguous()
    scores = column_scores(grad.flatten(1)).view(channels, -1).sum(dim=1)
    indices = largest(scores, k).int()
    return grad.index_select(1, indices), indices


def grad_input(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """As `reference.grad_input`."""
    result, _ = _of_selection(values, indices, weight.shape[0], weight, None)
    assert result is not None
    return result


def grad_weight(values: Tensor, indices: Tensor, x: Tensor, width: int) -> Tensor:
    """As `reference.grad_weight`."""
    _, result = _of_selection(values, indices, width, None, x)
    assert result is not None
    return result


def grad_weight_rows(values: Tensor, x: Tensor) -> Tensor:
    """As `reference.grad_weight_rows`."""
    k = values.shape[1]
    return grad_weight(values, torch.arange(k, dtype=torch.int32), x, k)


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
    grad = _readable(grad, grad.dtype)
    rows, width = grad.shape
    code = _ROWS if scope == "example" else _COLUMNS
    if not rows_only:
        return (*_backward(code, grad, rows, k, width, None, weight, x, needs_bias), None)
    selection = torch.empty((rows, k), dtype=grad.dtype), torch.empty(k, dtype=torch.int32)
    return (*_backward(code, grad, rows, k, width, selection, weight, x, needs_bias, rows_only), selection[1])


def lstm_forward(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    initial: tuple[Tensor | None, Tensor | None],
    batch_sizes: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.lstm_forward`, float32 only."""
    assert _extension is not None
    units, batch = weight_hh.shape[1], int(batch_sizes[0])
    x, weight_ih, weight_hh = (_readable(matrix, torch.float32) for matrix in (x, weight_ih, weight_hh))
    bias = _contiguous(bias)
    h, c = x.new_empty(batch + len(x), units), x.new_empty(batch + len(x), units)
    for states, first in zip((h, c), initial, strict=True):
        states[:batch] = 0 if first is None else first
    gates = x.new_empty(len(x), 4 * units)
    last_h, last_c = x.new_empty(batch, units), x.new_empty(batch, units)
    _extension.lstm_forward(
        len(x),
        len(batch_sizes),
        batch_sizes.data_ptr(),
        reverse,
        units,
        x.shape[1],
        weight_ih.data_ptr(),
        weight_ih.stride(0),
        weight_hh.data_ptr(),
        weight_hh.stride(0),
        x.data_ptr(),
        x.stride(0),
        _address(bias),
        initial[0] is None,
        *map(_address, (h, c, gates, last_h, last_c)),
        torch.get_num_threads(),
    )
    return h, c, gates, last_h, last_c


def topk_lstm_backward(
    trace: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    batch_sizes: Tensor,
    reverse: bool,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    topk: tuple[int, str],
    needs: tuple[bool, ...],
    hits: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """As `reference.lstm_backward`, float32 only, selecting by top-k of the given k and scope."""
    assert _extension is not None
    k, scope = topk
    inputs, units, batch = x.shape[1], weight_hh.shape[1], int(batch_sizes[0])
    x, weight_ih, weight_hh = (_readable(matrix, torch.float32) for matrix in (x, weight_ih, weight_hh))
    gradients_ = [_contiguous(gradient) for gradient in gradients]
    shapes = [(len(x), inputs), (4 * units, inputs), (4 * units, units), (4 * units,), (batch, units), (batch, units)]
    results = [x.new_empty(shape) if needed else None for shape, needed in zip(shapes, needs, strict=True)]
    _extension.lstm_backward(
        len(x),
        len(batch_sizes),
        batch_sizes.data_ptr(),
        reverse,
        _ROWS if scope == "example" else _COLUMNS,
        units,
        inputs,
        k,
        weight_ih.data_ptr(),
        weight_ih.stride(0),
        weight_hh.data_ptr(),
        weight_hh.stride(0),
        x.data_ptr(),
        x.stride(0),
        *map(_address, (*trace, *gradients_, *results, hits)),
        torch.get_num_threads(),
    )
    return tuple(results)


def ascending(indices: Tensor, rows: int) -> bool:
    """As `reference.ascending`."""
    assert _extension is not None
    return _extension.ascending(indices.data_ptr(), len(indices), rows)


def narrow_agrees(weight: Tensor, narrow: Tensor, samples: int) -> bool:
    """As `reference.narrow_agrees`."""
    assert _extension is not None
    return _extension.narrow_agrees(weight.data_ptr(), narrow.data_ptr(), weight.numel(), samples)


def declines_rows(*tensors: Tensor) -> str | None:
    """Why this backend cannot serve an optimizer's step on such tensors (parameter, state, gradient), or None."""
    for tensor in tensors:
        if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.is_neg():
            return f"native optimizers take contiguous float32 tensors, not {tensor.dtype} {list(tensor.stride())}"
        if (reason := declines(tensor)) is not None:
            return reason
    return None


def sgd_rows(
    weight: Tensor,
    buffer: Tensor | None,
    rows: AwakeRows,
    step: float,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """As `reference.sgd_rows`."""
    assert _extension is not None
    common = _rows(weight, rows)
    _extension.sgd_rows(*common, _address(buffer), nesterov, step, lr, momentum, dampening, weight_decay)
    _written(weight, rows.narrow, buffer)


def adam_rows(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: AwakeRows,
    step: float,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """As `reference.adam_rows`, without AMSGrad."""
    assert _extension is not None
    state = exp_avg.data_ptr(), exp_avg_sq.data_ptr()
    _extension.adam_rows(*_rows(weight, rows), *state, decoupled, step, lr, *betas, eps, weight_decay)
    _written(weight, rows.narrow, exp_avg, exp_avg_sq)


def adagrad_rows(
    weight: Tensor, sum_: Tensor, rows: AwakeRows, step: float, *, lr: float, eps: float, weight_decay: float
) -> None:
    """As `reference.adagrad_rows`."""
    assert _extension is not None
    _extension.adagrad_rows(*_rows(weight, rows), sum_.data_ptr(), step, lr, eps, weight_decay)
    _written(weight, rows.narrow, sum_)


def _rows(weight: Tensor, rows: AwakeRows) -> tuple[int, ...]:
    """The arguments that all optimizers have in common."""
    width = weight.numel() // max(1, len(weight))
    return (
        len(weight),
        width,
        len(rows.indices),
        rows.indices.data_ptr(),
        rows.values.data_ptr(),
        weight.data_ptr(),
        _address(rows.narrow),
        rows.every_row,
        _address(rows.row_step),
        torch.get_num_threads(),
    )


def _written(*tensors: Tensor | None) -> None:
    """Tells autograd that native code has changed these tensors."""
    torch.autograd.graph.increment_version([tensor for tensor in tensors if tensor is not None])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.resolve_neg().contiguous()


def _of_selection(
    values: Tensor, indices: Tensor, width: int, weight: Tensor | None, x: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if indices.dim() == 2:
        scope, _ = _ROWS, RowSelection(values, indices, width)  # checks shapes and dtypes
    else:
        scope, _ = _COLUMNS, ColumnSelection(values, indices, width)
    rows, k = values.shape
    selection = values.contiguous(), indices.contiguous()
    return _backward(scope, None, rows, k, width, selection, weight, x)[:2]


def _backward(
    scope: int,
    grad: Tensor | None,
    rows: int,
    k: int,
    width: int,
    selection: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    x: Tensor | None,
    needs_bias: bool = False,
    rows_only: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """One native call. It makes the selection from `grad`, or, where that is None, takes `selection` as given."""
    assert _extension is not None
    tensor = selection[0] if grad is None and selection is not None else grad
    assert tensor is not None
    dtype = tensor.dtype
    inputs = 0
    grad_input = grad_weight = grad_bias = None
    if (weight is not None and weight.shape[0] != width) or (x is not None and x.shape[0] != rows):
        shapes = [None if matrix is None else list(matrix.shape) for matrix in (weight, x)]
        raise ValueError(f"an output gradient [{rows}, {width}] does not go with weight and input of shapes {shapes}")
    if weight is not None:
        weight, inputs = _readable(weight, dtype), weight.shape[1]
        grad_input = torch.empty((rows, inputs), dtype=dtype)
    if x is not None:
        x, inputs = _readable(x, dtype), x.shape[1]
        grad_weight = torch.empty((k if rows_only else width, inputs), dtype=dtype)
    if needs_bias:
        grad_bias = torch.empty(width, dtype=dtype)
    _extension.linear_backward(
        _DTYPE_CODES[dtype],
        scope,
        0 if grad is None else grad.data_ptr(),
        0 if grad is None else grad.stride(0),
        rows,
        width,
        k,
        0 if selection is None else selection[0].data_ptr(),
        0 if selection is None else selection[1].data_ptr(),
        torch.get_num_threads(),
        inputs,
        0 if weight is None else weight.data_ptr(),
        0 if weight is None else weight.stride(0),
        0 if x is None else x.data_ptr(),
        0 if x is None else x.stride(0),
        0 if grad_input is None else grad_input.data_ptr(),
        0 if grad_weight is None else grad_weight.data_ptr(),
        0 if grad_bias is None else grad_bias.data_ptr(),
        grad is not None,
        rows_only,
    )
    return grad_input, grad_weight, grad_bias


def _readable(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix in this dtype, its rows' elements adjacent."""
    if matrix.dtype == dtype and matrix.stride(1) == 1 and not matrix.is_neg():
        return matrix
    return matrix.resolve_neg().to(dtype).contiguous()
