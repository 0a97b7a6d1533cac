"""Who serves a call, and the operations as the rest of the library sees them.

A call goes to the first backend that has the operation and does not decline the tensor; the reference never declines.
Under `torch.compile` it goes through the `torch.library` operation of the same name, which arrives here in turn.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meprop.ops import native, reference
from meprop.selection import AwakeRows, ColumnSelection, RowSelection, Selection

_BACKENDS = (native, reference)

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of input, weight and bias; None where none is wanted."""


def serve(op: str, tensor: Tensor, *args: Any) -> Any:
    """Runs the operation named `op` on the first backend that takes it."""
    for backend in _BACKENDS:
        kernel = getattr(backend, op, None)
        if kernel is not None and backend.declines(tensor) is None:
            return kernel(tensor, *args)
    raise AssertionError("the reference serves every call")


def _traced(tensor: Tensor) -> bool:
    """Whether a call must go through torch's dispatcher: under compile, or for fake or distributed tensors."""
    return torch.compiler.is_compiling() or type(tensor) is not Tensor


def _call(op: str, tensor: Tensor, *args: Any) -> Any:
    return getattr(torch.ops.meprop, op)(tensor, *args) if _traced(tensor) else serve(op, tensor, *args)


def topk_rows(grad: Tensor, k: int) -> RowSelection:
    """The k largest |g| of each row of grad [N, O]; requires 1 <= k <= O."""
    values, indices = _call("topk_rows", grad, k)
    return RowSelection(values, indices, grad.shape[1])


def topk_columns(grad: Tensor, k: int) -> ColumnSelection:
    """The k columns of grad [N, O] with the largest sum of |g|; requires 1 <= k <= O."""
    values, indices = _call("topk_columns", grad, k)
    return ColumnSelection(values, indices, grad.shape[1])


def column_scores(grad: Tensor) -> Tensor:
    """The sum of |g| of each column of grad [N, O], by which `topk_columns` chooses: [O], float64."""
    return serve("column_scores", grad)


def topk_channels(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`reference.topk_channels`; requires 1 <= k <= O."""
    return _call("topk_channels", grad, k)


def grad_input(selection: Selection, weight: Tensor) -> Tensor:
    """The selection [N, O] times weight [O, I]: the gradient of a linear map's input, [N, I]."""
    result = _call("grad_input", selection.values, selection.indices, weight)
    shared = _shared(selection)
    return result if shared is None else result.add_(shared @ weight)


def grad_weight(selection: Selection, x: Tensor, *, row_sparse: bool = False) -> Tensor:
    """The selection [N, O] transposed, times x [N, I]: the gradient of a linear map's weight, [O, I].

    Args:
        selection: Of the output gradient.
        x: The map's input.
        row_sparse: Give a sparse COO tensor of the selected rows only, coalesced; for a ColumnSelection.
    """
    if row_sparse and isinstance(selection, RowSelection):
        raise ValueError("a RowSelection keeps entries of any row of the weight: its gradient is not row-sparse")
    if not row_sparse:
        result = _call("grad_weight", selection.values, selection.indices, x, selection.width)
        shared = _shared(selection)
        return result if shared is None else result.addr_(shared, x.sum(dim=0))
    rows = _call("grad_weight_rows", selection.values, x)
    return row_sparse_tensor(selection.indices, rows, selection.width)


def _shared(selection: Selection) -> Tensor | None:
    """What every row gets in addition: it adds a matrix of rank one to each product."""
    return selection.shared if isinstance(selection, RowSelection) else None


def topk_linear_backward(
    grad: Tensor, k: int, scope: str, weight: Tensor | None, x: Tensor | None, *, needs_bias: bool, row_sparse: bool
) -> Gradients:
    """A linear map's backward pass with top-k: selection and gradients in one call, where a backend has it as one.

    Args:
        grad: Output gradient [N, O].
        k: How many entries are kept, 1 <= k <= O.
        scope: "example" (k of each row) or "batch" (k columns).
        weight: [O, I], where the input's gradient is wanted.
        x: Input [N, I], where the weight's gradient is wanted.
        needs_bias: Whether the bias's gradient is wanted.
        row_sparse: As in `grad_weight`.
    """
    if _traced(grad) or native.declines(grad) is not None:
        selection = topk_rows(grad, k) if scope == "example" else topk_columns(grad, k)
        return linear_backward(selection, grad, weight, x, needs_bias=needs_bias, row_sparse=row_sparse)
    rows_only = row_sparse and x is not None
    results = native.topk_linear_backward(grad, k, scope, weight, x, needs_bias, rows_only)
    input_gradient, weight_gradient, bias_gradient, indices = results
    if weight_gradient is not None and indices is not None:
        weight_gradient = row_sparse_tensor(indices, weight_gradient, grad.shape[1])
    return input_gradient, weight_gradient, bias_gradient


def linear_backward(
    selection: Selection,
    grad: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    *,
    needs_bias: bool,
    row_sparse: bool,
) -> Gradients:
    """A linear map's backward pass with a selection of its output gradient; arguments as `topk_linear_backward`."""
    return (
        None if weight is None else grad_input(selection, weight),
        None if x is None else grad_weight(selection, x, row_sparse=row_sparse),
        grad.sum(dim=0) if needs_bias else None,
    )


def lstm_forward(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    initial: tuple[Tensor | None, Tensor | None],
    batch_sizes: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.lstm_forward`."""
    backend = native if _native_lstm(x) else reference
    return backend.lstm_forward(x, weight_ih, weight_hh, bias, initial, batch_sizes, reverse)


def lstm_backward(
    trace: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    batch_sizes: Tensor,
    reverse: bool,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    topk: tuple[int, str] | None,
    select: Callable[[Tensor], Selection],
    needs: tuple[bool, ...],
    hits: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """`reference.lstm_backward`; `topk` is k and scope, where `select` is nothing but top-k."""
    arguments = (trace, x, weight_ih, weight_hh, batch_sizes, reverse, gradients)
    if topk is not None and topk[2:] in ((), (1,)) and _native_lstm(x):
        return native.topk_lstm_backward(*arguments, topk[:2], needs, hits)
    return reference.lstm_backward(*arguments, select, needs, hits)


def _native_lstm(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype == torch.float32
        and native.declines(tensor) is None
    )


def sgd_rows(weight: Tensor, buffer: Tensor | None, rows: AwakeRows, step: float, **options: Any) -> None:
    """`reference.sgd_rows`."""
    _rows_backend(weight, rows, buffer).sgd_rows(weight, buffer, rows, step, **options)


def adam_rows(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    rows: AwakeRows,
    step: float,
    **options: Any,
) -> None:
    """`reference.adam_rows`."""
    if max_exp_avg_sq is None and _rows_backend(weight, rows, exp_avg, exp_avg_sq) is native:
        native.adam_rows(weight, exp_avg, exp_avg_sq, rows, step, **options)
    else:
        reference.adam_rows(weight, exp_avg, exp_avg_sq, max_exp_avg_sq, rows, step, **options)


def adagrad_rows(weight: Tensor, sum_: Tensor, rows: AwakeRows, step: float, **options: Any) -> None:
    """`reference.adagrad_rows`."""
    _rows_backend(weight, rows, sum_).adagrad_rows(weight, sum_, rows, step, **options)


def ascending(indices: Tensor, rows: int) -> bool:
    """`reference.ascending`, of contiguous int64."""
    backend = native if indices.is_cpu and native.reason_missing() is None else reference
    return backend.ascending(indices, rows)


def narrow_agrees(weight: Tensor, narrow: Tensor, samples: int) -> bool:
    """`reference.narrow_agrees`, of contiguous float32 and bfloat16."""
    backend = native if weight.is_cpu and native.reason_missing() is None else reference
    return backend.narrow_agrees(weight, narrow, samples)


def _rows_backend(weight: Tensor, rows: AwakeRows, *state: Tensor | None) -> Any:
    """Who serves a step on a parameter and the state that it has, all [O, *]."""
    tensors = [tensor for tensor in (rows.values, *state, rows.row_step) if tensor is not None]
    fits = rows.values.shape == (len(rows.indices), *weight.shape[1:])
    fits = fits and (rows.row_step is None or rows.row_step.shape == weight.shape[:1])
    if not fits or any(each is not None and each.shape != weight.shape for each in state):
        found = [list(tensor.shape) for tensor in tensors]
        raise ValueError(
            f"gradient and state {found} do not go with a parameter {list(weight.shape)}; give it a new optimizer"
        )
    plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in (weight, *tensors))
    return native if plain and native.declines_rows(weight, *tensors) is None else reference


def row_sparse_tensor(indices: Tensor, rows: Tensor, width: int) -> Tensor:
    """A sparse COO tensor [width, *] with these rows [k, *] at these ascending indices [k], coalesced."""
    shape = (width, *rows.shape[1:])
    return torch.sparse_coo_tensor(indices.long()[None], rows, shape, is_coalesced=True, check_invariants=False)


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


def _linear_backward_temporary(choice, grad, weight, x, *, needs_bias, row_sparse, hits=None):
    from meprop.selection import PlainTopK, side_by_side

    if isinstance(choice, PlainTopK):
        if choice.blocks == 1 and hits is None:
            return topk_linear_backward(
                grad, choice.k, choice.scope, weight, x, needs_bias=needs_bias, row_sparse=row_sparse
            )
        select = topk_rows if choice.scope == "example" else topk_columns
        choice = side_by_side([select(block, choice.k) for block in grad.split(grad.shape[1] // choice.blocks, dim=1)])
    if hits is not None:
        from meprop.policy import Activity

        activity = Activity(hits)
        activity.count(choice)
    return linear_backward(choice, grad, weight, x, needs_bias=needs_bias, row_sparse=row_sparse)
