"""One layer of an LSTM in one direction, with an exact forward pass and a backward pass that selects of each gate.

Sequences are packed in the same way as by torch.nn.utils.rnn. batch_sizes [T] holds the number of rows of each time
step. It is int64, on the CPU, and not increasing. N is its sum, and B = batch_sizes[0] is the number of sequences. Row
b of each time step belongs to sequence b. In `reverse` the walk begins with the last time step. H is the number of
units. The gates are in torch's order: input, forget, cell, output. Initial states [B, H] may be None, which means
zeros. Weights may be bfloat16 beside float32 or float64. They then count as what they are in that dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from meprop.ops import native
from meprop.ops.entries import choose_entries
from meprop.ops.products import count_hits_of_blocks
from meprop.ops.registry import operation
from meprop.ops.steps import (
    earlier_states,
    gate_gradients,
    numbered_steps,
    or_zeros,
    step_by_step,
    time_steps,
    with_new,
)
from meprop.selection import Entries, PlainTopK, Selection, everything, side_by_side

Trace = tuple[Tensor, Tensor, Tensor]
"""What a backward pass needs from its forward pass: outputs, cell states and gates."""


GatesChoice = PlainTopK | Entries | None
"""What is kept of the gates of each time step: a top-k of each gate, or entries of all rows.

None is for a rule that has to be asked.
"""


def _native_declines(batch_sizes: Tensor, weight_ih: Tensor, weight_hh: Tensor, *tensors: Tensor | None) -> str | None:
    reason = native.declines(*tensors, dtypes=native.FLOAT32)
    if reason is None:
        reason = native.declines(weight_ih, weight_hh)
    if reason is None and weight_ih.dtype != weight_hh.dtype:
        reason = f"native kernels take weights of one dtype, not of {weight_ih.dtype} and {weight_hh.dtype}"
    return native.declines_scattered(batch_sizes, dtypes=native.INT64) if reason is None else reason


def _check(*expected: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """Raises a ValueError for a tensor of another shape, which would be read beyond its end."""
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; it is {list(shape)} beside the others")


def _weights(
    inputs: int, units: int, weight_ih: Tensor, weight_hh: Tensor
) -> list[tuple[str, Tensor, tuple[int, int]]]:
    return [("weight_ih", weight_ih, (4 * units, inputs)), ("weight_hh", weight_hh, (4 * units, units))]


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
    weight_ih, weight_hh = weight_ih.to(x.dtype), weight_hh.to(x.dtype)
    projected = x @ weight_ih.t() if bias is None else x @ weight_ih.t() + bias
    output, cells = x.new_empty(len(x), weight_hh.shape[1]), x.new_empty(len(x), weight_hh.shape[1])
    gates = torch.empty_like(projected)
    h0, c0 = h, c = [or_zeros(state, batch_sizes, weight_hh) for state in initial]
    for rows in time_steps(batch_sizes, reverse):
        size = rows.stop - rows.start
        i, f, g, o = (projected[rows] + h[:size] @ weight_hh.t()).chunk(4, dim=1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        cells[rows] = f * c[:size] + i * g
        output[rows] = o * cells[rows].tanh()
        gates[rows] = torch.cat([i, f, g, o], dim=1)
        h, c = with_new(h, output[rows]), with_new(c, cells[rows])
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
    return _native_declines(batch_sizes, weight_ih, weight_hh, x, bias, *initial)


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
    _check(*_weights(x.shape[1], units, weight_ih, weight_hh), ("bias", bias, (4 * units,)))
    _check(("h0", initial[0], (batch, units)), ("c0", initial[1], (batch, units)))
    x, weight_ih, weight_hh = (native.readable(matrix, matrix.dtype) for matrix in (x, weight_ih, weight_hh))
    bias = native.contiguous(bias)
    h, c = x.new_empty(batch + len(x), units), x.new_empty(batch + len(x), units)
    for states, first in zip((h, c), initial, strict=True):
        states[:batch] = 0 if first is None else first
    gates = x.new_empty(len(x), 4 * units)
    last_h, last_c = x.new_empty(batch, units), x.new_empty(batch, units)
    native.extension().lstm_forward(
        native.DTYPE_CODES[weight_hh.dtype],
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
    choice: GatesChoice,
    select: Callable[[Tensor], Selection],
    needs: tuple[bool, ...],
    hits: Tensor | None = None,
    kept: Tensor | None = None,
    show: Callable[[Tensor, Selection], None] | None = None,
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
        choice: What is kept of the gates' gradients at each time step, if it is known. With a PlainTopK it equals
            `select`, so that a backend may make it itself. Entries without a key are chosen in each gate. Those with a
            key are drawn from all gates together, and time step t has the key plus t. The ceiling is for all gates
            together. With `exact_sum` a time step of one row keeps everything.
        select: A function from the gates' gradients at a time step [n, 4H] to what is propagated of them. It is not
            asked if `choice` is Entries.
        needs: Which of the results are wanted.
        hits: A tensor [H], int64, or None. The number of rows that select each unit is added to it. See `count_hits`.
        kept: A tensor [T], int64, or None. With Entries it gets the number of entries that each time step keeps. Else
            it is left as it is.
        show: A function that is called at each time step with the gates' gradients [n, 4H] and what is propagated of
            them, or None.

    Returns:
        The gradients of x, weight_ih, weight_hh, a bias [4H], h0 and c0. A gradient that is not wanted is None.
    """
    outputs, cells, gates = trace
    grad_output, grad_h, grad_c = gradients
    weight_ih, weight_hh = weight_ih.to(x.dtype), weight_hh.to(x.dtype)
    batch = int(batch_sizes[0])
    grad_output = torch.zeros_like(outputs[batch:]) if grad_output is None else grad_output
    grad_h, grad_c = or_zeros(grad_h, batch_sizes, weight_hh), or_zeros(grad_c, batch_sizes, weight_hh)
    earlier_cells, cells = earlier_states(cells, batch_sizes, reverse), cells[batch:]
    whole, propagated = torch.empty_like(gates), torch.empty_like(gates)
    for time, rows in numbered_steps(batch_sizes, not reverse):
        size = rows.stop - rows.start
        grad = grad_output[rows] + grad_h[:size]
        of_gates, grad_cell = gate_gradients(gates[rows], cells[rows], earlier_cells[rows], grad, grad_c[:size])
        whole[rows] = torch.cat(of_gates, dim=1)
        selection = _select(whole[rows], choice, select, time, kept)
        propagated[rows] = selection.to_dense()
        if show is not None:
            show(whole[rows], selection)
        if hits is not None:
            hits += count_hits_of_blocks(selection, 4)
        forget = gates[rows].chunk(4, dim=1)[1]
        grad_h, grad_c = with_new(grad_h, propagated[rows] @ weight_hh), with_new(grad_c, grad_cell * forget)
    return (
        propagated @ weight_ih if needs[0] else None,
        propagated.t() @ x if needs[1] else None,
        propagated.t() @ earlier_states(outputs, batch_sizes, reverse) if needs[2] else None,
        whole.sum(dim=0) if needs[3] else None,
        grad_h if needs[4] else None,
        grad_c if needs[5] else None,
    )


def _select(
    gates: Tensor, choice: GatesChoice, select: Callable[[Tensor], Selection], time: int, kept: Tensor | None
) -> Selection:
    """What is propagated of the gates' gradients at a time step [n, 4H]."""
    if not isinstance(choice, Entries):
        return select(gates)
    # Tensors without contents have nothing to choose by. What is missing of one row is its mean.
    if gates.is_meta or (choice.exact_sum and len(gates) == 1):
        selection = everything(gates)
    elif choice.key is None:
        selection = side_by_side([choose_entries(gate, choice) for gate in gates.chunk(4, dim=1)])
    else:
        selection = choose_entries(gates, choice._replace(key=choice.key + time))
    if selection.density > choice.ceiling:
        selection = everything(gates)
    if kept is not None:
        kept[time] = round(selection.density * gates.numel())
    return selection


def _native_backward_declines(
    trace: Trace,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    batch_sizes: Tensor,
    _reverse: bool,
    gradients: tuple[Tensor | None, ...],
    choice: GatesChoice,
    _select: Callable[[Tensor], Selection],
    _needs: tuple[bool, ...],
    hits: Tensor | None = None,
    kept: Tensor | None = None,
    show: Callable[[Tensor, Selection], None] | None = None,
) -> str | None:
    if show is not None:
        return "native kernels show nobody what they choose"
    if isinstance(choice, PlainTopK) and choice.blocks != 1:
        return "native kernels run an LSTM with top-k without blocks within a gate"
    reason = _native_declines(batch_sizes, weight_ih, weight_hh, x, *gradients)
    if reason is None:
        reason = native.declines_scattered(*trace, dtypes=native.FLOAT32)
    return native.declines_scattered(hits, kept, dtypes=native.INT64) if reason is None else reason


@native.backend.implements(lstm_backward, _native_backward_declines)
def _native_lstm_backward(
    trace: Trace,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    batch_sizes: Tensor,
    reverse: bool,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    choice: GatesChoice,
    select: Callable[[Tensor], Selection],
    needs: tuple[bool, ...],
    hits: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    if choice is None:
        weights = weight_ih.to(x.dtype), weight_hh.to(x.dtype)
        return step_by_step(trace, x, weights, batch_sizes, reverse, gradients, select, needs, hits)
    inputs, units, batch = x.shape[1], weight_hh.shape[1], int(batch_sizes[0])
    states, last = (batch + len(x), units), (batch, units)
    _check(*_weights(inputs, units, weight_ih, weight_hh), ("outputs", trace[0], states), ("cells", trace[1], states))
    _check(("gates", trace[2], (len(x), 4 * units)), ("hits", hits, (units,)), ("kept", kept, (len(batch_sizes),)))
    wrt = zip(("grad_output", "grad_h", "grad_c"), gradients, ((len(x), units), last, last), strict=True)
    _check(*wrt)
    x, weight_ih, weight_hh = (native.readable(matrix, matrix.dtype) for matrix in (x, weight_ih, weight_hh))
    gradients_ = [native.contiguous(gradient) for gradient in gradients]
    shapes = [(len(x), inputs), (4 * units, inputs), (4 * units, units), (4 * units,), (batch, units), (batch, units)]
    results = [x.new_empty(shape) if needed else None for shape, needed in zip(shapes, needs, strict=True)]
    scope = native.SCOPE_CODES[choice.scope] if isinstance(choice, PlainTopK) else 0
    kept = batch_sizes.new_empty(len(batch_sizes)) if kept is None else kept
    native.extension().lstm_backward(
        native.DTYPE_CODES[weight_hh.dtype],
        len(x),
        len(batch_sizes),
        batch_sizes.data_ptr(),
        reverse,
        scope,
        units,
        inputs,
        choice.k,
        weight_ih.data_ptr(),
        weight_ih.stride(0),
        weight_hh.data_ptr(),
        weight_hh.stride(0),
        x.data_ptr(),
        x.stride(0),
        *map(native.address, (*trace, *gradients_, *results, hits)),
        torch.get_num_threads(),
        *_native_entries(choice, kept),
    )
    return tuple(results)


def _native_entries(choice: PlainTopK | Entries, kept: Tensor) -> tuple[int | float, ...]:
    """The arguments of the native call that are for Entries."""
    if isinstance(choice, PlainTopK):
        return 0, 0, 0, 0, 0, 0.0, 1.0
    keep, key = native.codes_of(choice)
    return (
        choice.key is None,
        keep,
        key,
        choice.exact_sum,
        kept.data_ptr(),
        choice.share,
        choice.ceiling,
    )
