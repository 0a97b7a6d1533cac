"""One layer of an LSTM in one direction, with an exact forward pass and a backward pass that selects of each gate.

Sequences are packed in the same way as by torch.nn.utils.rnn. batch_sizes [T] holds the number of rows of each time
step. It is int64, on the CPU, and not increasing. N is its sum, and B = batch_sizes[0] is the number of sequences. Row
b of each time step belongs to sequence b. In `reverse` the walk begins with the last time step. H is the number of
units. The gates are in torch's order: input, forget, cell, output. Initial states [B, H] may be None, which means
zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from meprop.ops import native
from meprop.ops.linear import backward_with, linear_backward
from meprop.ops.products import count_hits_of_blocks
from meprop.ops.registry import operation
from meprop.selection import PlainTopK, RowSelection, Selection, one_after_another, shared_or_zeros

Trace = tuple[Tensor, Tensor, Tensor]
"""What a backward pass needs from its forward pass: outputs, cell states and gates."""


def _steps(batch_sizes: Tensor, reverse: bool) -> Iterator[slice]:
    """The rows of each time step, in the order of the walk."""
    starts = batch_sizes.cumsum(0) - batch_sizes
    steps = [slice(start, start + size) for start, size in zip(starts.tolist(), batch_sizes.tolist(), strict=True)]
    return reversed(steps) if reverse else iter(steps)


def _with_new(state: Tensor, new: Tensor) -> Tensor:
    """The state of all sequences, after the first ones have got a new one."""
    return torch.cat([new, state[len(new) :]])


def _earlier(states: Tensor, batch_sizes: Tensor, reverse: bool) -> Tensor:
    """The state before each row [N, H], out of all states [B + N, H].

    It is the state of the same sequence at the step before, or the initial one.
    """
    batch = int(batch_sizes[0])
    state, new = states[:batch], states[batch:]
    earlier = torch.empty_like(new)
    for rows in _steps(batch_sizes, reverse):
        earlier[rows] = state[: rows.stop - rows.start]
        state = _with_new(state, new[rows])
    return earlier


def _or_zeros(state: Tensor | None, batch_sizes: Tensor, weight_hh: Tensor) -> Tensor:
    return weight_hh.new_zeros(int(batch_sizes[0]), weight_hh.shape[1]) if state is None else state


def _native_declines(batch_sizes: Tensor, *tensors: Tensor | None) -> str | None:
    reason = native.declines(*tensors, dtypes=native.FLOAT32)
    return native.declines_scattered(batch_sizes, dtypes=native.INT64) if reason is None else reason


# ---------------------------------------------------------------- forward


@operation()
def lstm_forward(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    initial: tuple[Tensor | None, Tensor | None],
    batch_sizes: Tensor,
    reverse: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer of an LSTM in one direction.

    Args:
        x: Input [N, I].
        weight_ih: Weight of the input [4H, I].
        weight_hh: Weight of the earlier output [4H, H].
        bias: The sum of torch's two biases [4H], or None.
        initial: Initial output and cell state, each [B, H].
        batch_sizes: The number of rows of each time step [T].
        reverse: Whether the walk begins with the last time step.

    Returns:
        Outputs and cell states, each [B + N, H], the gates' activations [N, 4H], and the last output and cell state of
        each sequence, each [B, H]. Outputs and cell states begin with the initial ones, and go on with those of all
        rows.
    """
    projected = x @ weight_ih.t() if bias is None else x @ weight_ih.t() + bias
    output, cells = x.new_empty(len(x), weight_hh.shape[1]), x.new_empty(len(x), weight_hh.shape[1])
    gates = torch.empty_like(projected)
    h0, c0 = h, c = [_or_zeros(state, batch_sizes, weight_hh) for state in initial]
    for rows in _steps(batch_sizes, reverse):
        size = rows.stop - rows.start
        i, f, g, o = (projected[rows] + h[:size] @ weight_hh.t()).chunk(4, dim=1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        cells[rows] = f * c[:size] + i * g
        output[rows] = o * cells[rows].tanh()
        gates[rows] = torch.cat([i, f, g, o], dim=1)
        h, c = _with_new(h, output[rows]), _with_new(c, cells[rows])
    return torch.cat([h0, output]), torch.cat([c0, cells]), gates, h, c


def _native_forward_declines(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    initial: tuple[Tensor | None, Tensor | None],
    batch_sizes: Tensor,
    _reverse: bool,
) -> str | None:
    return _native_declines(batch_sizes, x, weight_ih, weight_hh, bias, *initial)


@native.backend.implements(lstm_forward, _native_forward_declines)
def _native_lstm_forward(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    initial: tuple[Tensor | None, Tensor | None],
    batch_sizes: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    units, batch = weight_hh.shape[1], int(batch_sizes[0])
    x, weight_ih, weight_hh = (native.readable(matrix, torch.float32) for matrix in (x, weight_ih, weight_hh))
    bias = native.contiguous(bias)
    h, c = x.new_empty(batch + len(x), units), x.new_empty(batch + len(x), units)
    for states, first in zip((h, c), initial, strict=True):
        states[:batch] = 0 if first is None else first
    gates = x.new_empty(len(x), 4 * units)
    last_h, last_c = x.new_empty(batch, units), x.new_empty(batch, units)
    native.extension().lstm_forward(
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
        native.address(bias),
        initial[0] is None,
        *map(native.address, (h, c, gates, last_h, last_c)),
        torch.get_num_threads(),
    )
    return h, c, gates, last_h, last_c


# ---------------------------------------------------------------- backward


@operation()
def lstm_backward(
    trace: Trace,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    batch_sizes: Tensor,
    reverse: bool,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    topk: PlainTopK | None,
    select: Callable[[Tensor], Selection],
    needs: tuple[bool, ...],
    hits: Tensor | None = None,
    /,
) -> tuple[Tensor | None, ...]:
    """Back-propagation through time, with a selection of the gates' gradients at each time step.

    The cells' own gradients are exact. Let S be the selections of all gates' gradients before their activations. S is
    [n, 4H] for a time step and [N, 4H] for all rows. Then the earlier output's gradient is S W_hh, dx = S W_ih,
    dW_ih = S^T x, and dW_hh = S^T h, where h are the earlier outputs. A bias's gradient is the sum of the whole gates'
    gradients.

    Args:
        trace: Outputs, cell states and gates that `lstm_forward` returned.
        x: Input [N, I].
        weight_ih: Weight of the input [4H, I].
        weight_hh: Weight of the earlier output [4H, H].
        batch_sizes: The number of rows of each time step [T].
        reverse: The same as in the forward pass.
        gradients: The gradients of output [N, H], last output [B, H] and last cell state [B, H]. None means zeros.
        topk: The top-k of each gate that equals `select`, so that a backend may make it itself. None if there is none.
        select: A function from the gates' gradients at a time step [n, 4H] to what is propagated of them.
        needs: Which of the results are wanted.
        hits: A tensor [H], int64, or None. The number of rows that select each unit is added to it. See `count_hits`.

    Returns:
        The gradients of x, weight_ih, weight_hh, a bias [4H], h0 and c0. A gradient that is not wanted is None.
    """
    outputs, cells, gates = trace
    grad_output, grad_h, grad_c = gradients
    batch = int(batch_sizes[0])
    grad_output = torch.zeros_like(outputs[batch:]) if grad_output is None else grad_output
    grad_h, grad_c = _or_zeros(grad_h, batch_sizes, weight_hh), _or_zeros(grad_c, batch_sizes, weight_hh)
    earlier_cells, cells = _earlier(cells, batch_sizes, reverse), cells[batch:]
    whole, kept = torch.empty_like(gates), torch.empty_like(gates)
    for rows in _steps(batch_sizes, not reverse):
        size = rows.stop - rows.start
        grad = grad_output[rows] + grad_h[:size]
        of_gates, grad_cell = _gate_gradients(gates[rows], cells[rows], earlier_cells[rows], grad, grad_c[:size])
        whole[rows] = torch.cat(of_gates, dim=1)
        selection = select(whole[rows])
        kept[rows] = selection.to_dense()
        if hits is not None:
            hits += count_hits_of_blocks(selection, 4)
        forget = gates[rows].chunk(4, dim=1)[1]
        grad_h, grad_c = _with_new(grad_h, kept[rows] @ weight_hh), _with_new(grad_c, grad_cell * forget)
    return (
        kept @ weight_ih if needs[0] else None,
        kept.t() @ x if needs[1] else None,
        kept.t() @ _earlier(outputs, batch_sizes, reverse) if needs[2] else None,
        whole.sum(dim=0) if needs[3] else None,
        grad_h if needs[4] else None,
        grad_c if needs[5] else None,
    )


def _gate_gradients(
    gates: Tensor, cells: Tensor, earlier_cells: Tensor, grad: Tensor, grad_c: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The gradients of a step's gates before their activations, each [n, H], and of its cell state [n, H]."""
    i, f, g, o = gates.chunk(4, dim=1)
    tanh_c = cells.tanh()
    grad_cell = grad_c + grad * o * (1 - tanh_c**2)
    of_gates = [
        grad_cell * g * i * (1 - i),
        grad_cell * earlier_cells * f * (1 - f),
        grad_cell * i * (1 - g**2),
        grad * tanh_c * o * (1 - o),
    ]
    return of_gates, grad_cell


def _native_backward_declines(
    trace: Trace,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    batch_sizes: Tensor,
    _reverse: bool,
    gradients: tuple[Tensor | None, ...],
    topk: PlainTopK | None,
    _select: Callable[[Tensor], Selection],
    _needs: tuple[bool, ...],
    hits: Tensor | None = None,
) -> str | None:
    if topk is not None and topk.blocks != 1:
        return "native kernels run an LSTM with top-k without blocks within a gate"
    reason = _native_declines(batch_sizes, x, weight_ih, weight_hh, *gradients)
    if reason is None:
        reason = native.declines_scattered(*trace, dtypes=native.FLOAT32)
    if reason is None and hits is not None:
        reason = native.declines_scattered(hits, dtypes=native.INT64)
    return reason


@native.backend.implements(lstm_backward, _native_backward_declines)
def _native_lstm_backward(
    trace: Trace,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    batch_sizes: Tensor,
    reverse: bool,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    topk: PlainTopK | None,
    select: Callable[[Tensor], Selection],
    needs: tuple[bool, ...],
    hits: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    if topk is None:
        return _step_by_step(trace, x, (weight_ih, weight_hh), batch_sizes, reverse, gradients, select, needs, hits)
    inputs, units, batch = x.shape[1], weight_hh.shape[1], int(batch_sizes[0])
    x, weight_ih, weight_hh = (native.readable(matrix, torch.float32) for matrix in (x, weight_ih, weight_hh))
    gradients_ = [native.contiguous(gradient) for gradient in gradients]
    shapes = [(len(x), inputs), (4 * units, inputs), (4 * units, units), (4 * units,), (batch, units), (batch, units)]
    results = [x.new_empty(shape) if needed else None for shape, needed in zip(shapes, needs, strict=True)]
    native.extension().lstm_backward(
        len(x),
        len(batch_sizes),
        batch_sizes.data_ptr(),
        reverse,
        native.SCOPE_CODES[topk.scope],
        units,
        inputs,
        topk.k,
        weight_ih.data_ptr(),
        weight_ih.stride(0),
        weight_hh.data_ptr(),
        weight_hh.stride(0),
        x.data_ptr(),
        x.stride(0),
        *map(native.address, (*trace, *gradients_, *results, hits)),
        torch.get_num_threads(),
    )
    return tuple(results)


def _step_by_step(
    trace: Trace,
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    batch_sizes: Tensor,
    reverse: bool,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    select: Callable[[Tensor], Selection],
    needs: tuple[bool, ...],
    hits: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The backward pass with any selection. Its products are native, the cells' gradients are torch's."""
    (outputs, cells, gates), (grad_output, grad_h, grad_c), (weight_ih, weight_hh) = trace, gradients, weights
    batch = int(batch_sizes[0])
    grad_h, grad_c = _or_zeros(grad_h, batch_sizes, weight_hh), _or_zeros(grad_c, batch_sizes, weight_hh)
    earlier_cells, cells = _earlier(cells, batch_sizes, reverse), cells[batch:]
    whole, kept = torch.empty_like(gates), dict[int, tuple[slice, Selection]]()
    for rows in _steps(batch_sizes, not reverse):
        size = rows.stop - rows.start
        grad = grad_h[:size] if grad_output is None else grad_output[rows] + grad_h[:size]
        of_gates, grad_cell = _gate_gradients(gates[rows], cells[rows], earlier_cells[rows], grad, grad_c[:size])
        torch.cat(of_gates, dim=1, out=whole[rows])
        selection = select(whole[rows])
        kept[rows.start] = rows, selection
        if hits is not None:
            hits += count_hits_of_blocks(selection, 4)
        earlier, *_ = backward_with(selection, whole[rows], weight_hh, None)
        assert earlier is not None
        forget = gates[rows].chunk(4, dim=1)[1]
        grad_h, grad_c = _with_new(grad_h, earlier), _with_new(grad_c, grad_cell * forget)
    steps = [kept[start] for start in sorted(kept)]  # in the order of the rows, whatever that of the walk
    return (
        *_of_all_steps(steps, weight_ih if needs[0] else None, x if needs[1] else None),
        _of_all_steps(steps, None, _earlier(outputs, batch_sizes, reverse))[1] if needs[2] else None,
        whole.sum(dim=0) if needs[3] else None,
        grad_h if needs[4] else None,
        grad_c if needs[5] else None,
    )


def _of_all_steps(
    steps: list[tuple[slice, Selection]], weight: Tensor | None, source: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The products S W and S^T source for the selections of all time steps. What a step's rows share is added last."""
    rows_of = [selection for _, selection in steps if isinstance(selection, RowSelection)]
    if len(rows_of) < len(steps):  # a step keeps columns, such as all of them
        dense = torch.cat([selection.to_dense() for _, selection in steps])
        return None if weight is None else dense @ weight, None if source is None else dense.t() @ source
    kept = one_after_another(rows_of)
    of_input, of_weight, _ = linear_backward(kept, kept.values, weight, source, False, False)
    if any(selection.shared is not None for selection in rows_of):
        shared = torch.stack([shared_or_zeros(selection) for selection in rows_of])
        if of_input is not None and weight is not None:
            for (rows, _), added in zip(steps, shared @ weight, strict=True):
                of_input[rows] += added
        if of_weight is not None and source is not None:
            of_weight.addmm_(shared.t(), torch.stack([source[rows].sum(dim=0) for rows, _ in steps]))
    return of_input, of_weight
