"""The operations, as literally as the mathematics: any floating dtype, any device. The oracle of every other backend.

Shapes: grad [N, O], weight [O, I], x [N, I]; of a convolution grad [N, O, *S], with S its sizes in space. A selection
is values [N, k] with indices [N, k] (k entries of each row) or with indices [k] (k columns); indices are int32 and
ascending. Products are summed in float32, those of float64 inputs in float64. The paper is meProp (Sun et al., ICML
2017).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import sqrt

import torch
from torch import Tensor

from meprop.selection import AwakeRows, Selection


def declines(_: Tensor) -> str | None:
    """Why this backend cannot serve a call on such a tensor: never."""
    return None


def topk_rows(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest |g| of each row; of equals the lower index; NaN is the largest (the paper's top_k)."""
    by_magnitude = grad.abs().sort(dim=1, descending=True, stable=True).indices
    indices = by_magnitude[:, :k].sort(dim=1).values
    return grad.gather(1, indices), indices.int()


def column_scores(grad: Tensor) -> Tensor:
    """The sum of |g| of each column over the batch, in float64: what simple unified top-k chooses by."""
    return grad.abs().double().sum(dim=0)


def topk_columns(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k columns with the largest sum of |g| over the batch, summed in float64: simple unified top-k."""
    indices = largest(column_scores(grad), k)
    return grad[:, indices], indices.int()


def topk_channels(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k channels of grad [N, O, *S] with the largest sum of |g| over batch and positions, summed in float64.

    The channels [N, k, *S] come in the memory format of grad: see `memory_format`.
    """
    indices = largest(grad.abs().double().sum(dim=[0, *range(2, grad.dim())]), k)
    return grad[:, indices].contiguous(memory_format=memory_format(grad)), indices.int()


def memory_format(tensor: Tensor) -> torch.memory_format:
    """torch.channels_last, of a tensor that is nothing but that; else torch.contiguous_format."""
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last and not tensor.is_contiguous() else torch.contiguous_format


def largest(scores: Tensor, k: int) -> Tensor:
    """The places of the k largest scores, ascending; of equals the lower place; NaN is the largest."""
    return scores.sort(descending=True, stable=True).indices[:k].sort().values


def grad_input(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """dx[n] = sum over j of values[n, j] * weight[index of (n, j)]: [N, I]."""
    dtype = _accumulation_dtype(weight)
    values, weight_ = values.to(dtype), weight.to(dtype)
    if indices.dim() == 1:
        return (values @ weight_[indices]).to(weight.dtype)
    result = weight_.new_zeros(values.shape[0], weight.shape[1])
    for j in range(values.shape[1]):
        result += values[:, j, None] * weight_[indices[:, j]]
    return result.to(weight.dtype)


def grad_weight(values: Tensor, indices: Tensor, x: Tensor, width: int) -> Tensor:
    """dW[o] = sum of values[n, j] * x[n] over all (n, j) whose index is o: [width, I]."""
    if indices.dim() == 1:
        return x.new_zeros(width, x.shape[1]).index_copy_(0, indices.long(), grad_weight_rows(values, x))
    dtype = _accumulation_dtype(x)
    values, x_ = values.to(dtype), x.to(dtype)
    result = x_.new_zeros(width, x.shape[1])
    for j in range(values.shape[1]):
        result.index_add_(0, indices[:, j], values[:, j, None] * x_)
    return result.to(x.dtype)


def grad_weight_rows(values: Tensor, x: Tensor) -> Tensor:
    """The k rows of dW that a selection of columns makes: values.T @ x, [k, I]."""
    dtype = _accumulation_dtype(x)
    return (values.t().to(dtype) @ x.to(dtype)).to(x.dtype)


def count_hits(selections: Sequence[Selection]) -> Tensor:
    """In how many rows each of the units is selected, by any of the selections [N, O], with what is not zero: [O]."""
    hit = torch.zeros(
        len(selections[0].values), selections[0].width, dtype=torch.bool, device=selections[0].values.device
    )
    for selection in selections:
        indices = selection.indices.long().expand(selection.values.shape)
        hit |= torch.zeros_like(hit).scatter(1, indices, selection.values != 0)
    return hit.sum(dim=0)


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


# ---------------------------------------------------------------- LSTM: one layer, one direction
#
# Sequences are packed as by torch.nn.utils.rnn: batch_sizes [T] (int64, on the CPU, not increasing) rows for each time
# step, N in all, row b of a time step belonging to sequence b of B = batch_sizes[0]. In `reverse` the walk begins with
# the last time step. H units; gates in torch's order: input, forget, cell, output. Initial states [B, H] may be None:
# zeros.


def _steps(batch_sizes: Tensor, reverse: bool) -> Iterator[slice]:
    """The rows of each time step, in the order of the walk."""
    starts = batch_sizes.cumsum(0) - batch_sizes
    steps = [slice(start, start + size) for start, size in zip(starts.tolist(), batch_sizes.tolist(), strict=True)]
    return reversed(steps) if reverse else iter(steps)


def _with_new(state: Tensor, new: Tensor) -> Tensor:
    """The state of all sequences, when the first ones have a new one."""
    return torch.cat([new, state[len(new) :]])


def _earlier(states: Tensor, batch_sizes: Tensor, reverse: bool) -> Tensor:
    """For each row the state before it, [N, H] of [B + N, H]: its sequence's at the step before, or the initial one."""
    batch = int(batch_sizes[0])
    state, new = states[:batch], states[batch:]
    earlier = torch.empty_like(new)
    for rows in _steps(batch_sizes, reverse):
        earlier[rows] = state[: rows.stop - rows.start]
        state = _with_new(state, new[rows])
    return earlier


def _or_zeros(state: Tensor | None, batch_sizes: Tensor, weight_hh: Tensor) -> Tensor:
    return weight_hh.new_zeros(int(batch_sizes[0]), weight_hh.shape[1]) if state is None else state


def lstm_forward(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    initial: tuple[Tensor | None, Tensor | None],
    batch_sizes: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer of an LSTM in one direction.

    Args:
        x: Input [N, I].
        weight_ih: [4H, I].
        weight_hh: [4H, H].
        bias: The sum of torch's two [4H], or None.
        initial: h0 and c0 [B, H].
        batch_sizes: [T].
        reverse: Whether the walk begins with the last time step.

    Returns:
        Outputs and cell states, each [B + N, H]: the initial ones, then those of all rows; the gates' activations
        [N, 4H]; and of each sequence the last output and cell state [B, H].
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


def lstm_backward(
    trace: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    batch_sizes: Tensor,
    reverse: bool,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    select: Callable[[Tensor], Selection],
    needs: tuple[bool, ...],
    hits: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Back-propagation through time, with a selection of each gate's gradient at each time step.

    The cells' own gradients are exact. With S the selections of all four gates' gradients (before the activations), for
    a time step [n, 4H], for all rows [N, 4H]: the earlier output's gradient is S W_hh, dx = S W_ih, dW_ih = S^T x,
    dW_hh = S^T (the earlier outputs). A bias's gradient is the sum of the whole gates' gradients.

    Args:
        trace: Outputs, cell states and gates as `lstm_forward` gave them.
        x: Input [N, I].
        weight_ih: [4H, I].
        weight_hh: [4H, H].
        batch_sizes: [T].
        reverse: As in the forward pass.
        gradients: Of output [N, H], last output [B, H] and last cell state [B, H]; None for zeros.
        select: From a gate's gradient at a time step [n, H] to what is propagated of it.
        needs: Which of the six results are wanted.
        hits: Gets added in how many rows each unit is selected [H], int64: see `count_hits`.

    Returns:
        The gradients of x, weight_ih, weight_hh, a bias [4H], h0 and c0; None where it is not wanted.
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
        i, f, g, o = gates[rows].chunk(4, dim=1)
        tanh_c = cells[rows].tanh()
        grad = grad_output[rows] + grad_h[:size]
        grad_cell = grad_c[:size] + grad * o * (1 - tanh_c**2)
        of_gates = [
            grad_cell * g * i * (1 - i),
            grad_cell * earlier_cells[rows] * f * (1 - f),
            grad_cell * i * (1 - g**2),
            grad * tanh_c * o * (1 - o),
        ]
        whole[rows] = torch.cat(of_gates, dim=1)
        selections = [select(gate) for gate in of_gates]
        kept[rows] = torch.cat([selection.to_dense() for selection in selections], dim=1)
        if hits is not None:
            hits += count_hits(selections)
        grad_h, grad_c = _with_new(grad_h, kept[rows] @ weight_hh), _with_new(grad_c, grad_cell * f)
    return (
        kept @ weight_ih if needs[0] else None,
        kept.t() @ x if needs[1] else None,
        kept.t() @ _earlier(outputs, batch_sizes, reverse) if needs[2] else None,
        whole.sum(dim=0) if needs[3] else None,
        grad_h if needs[4] else None,
        grad_c if needs[5] else None,
    )


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
    """`torch.optim.SGD` on the rows that move, in place; `buffer` is the momentum's, None without momentum."""
    at, grad, slept = _moving(weight, rows, step)
    w = weight[at]
    grad = grad + weight_decay * w
    if buffer is not None:
        buffer[at] = buffer[at] * momentum ** (slept + 1) + (1 - dampening) * grad
        grad = grad + momentum * buffer[at] if nesterov else buffer[at]
    weight[at] = w - lr * grad
    _narrow(weight, at, rows)


def adam_rows(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    rows: AwakeRows,
    step: float,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """`torch.optim.Adam` on the rows that move, in place, or AdamW, with decoupled weight decay.

    With AMSGrad, `max_exp_avg_sq` is the largest second moment so far.
    """
    at, grad, slept = _moving(weight, rows, step)
    w = weight[at]
    if decoupled:
        w = w * (1 - lr * weight_decay) ** (slept + 1)
    else:
        grad = grad + weight_decay * w
    exp_avg[at] = exp_avg[at] * betas[0] ** (slept + 1) + (1 - betas[0]) * grad
    exp_avg_sq[at] = exp_avg_sq[at] * betas[1] ** (slept + 1) + (1 - betas[1]) * grad * grad
    second = exp_avg_sq[at]
    if max_exp_avg_sq is not None:
        max_exp_avg_sq[at] = second = torch.maximum(max_exp_avg_sq[at], second)
    root = second.sqrt() / sqrt(1 - betas[1] ** step) + eps
    weight[at] = w - lr / (1 - betas[0] ** step) * exp_avg[at] / root
    _narrow(weight, at, rows)


def adagrad_rows(
    weight: Tensor, sum_: Tensor, rows: AwakeRows, step: float, *, lr: float, eps: float, weight_decay: float
) -> None:
    """`torch.optim.Adagrad` on the rows that move, in place; `lr` is that of this step."""
    at, grad, _ = _moving(weight, rows, step)
    grad = grad + weight_decay * weight[at]
    sum_[at] = sum_[at] + grad * grad
    weight[at] = weight[at] - lr * grad / (sum_[at].sqrt() + eps)
    _narrow(weight, at, rows)


def _narrow(weight: Tensor, at: Tensor, rows: AwakeRows) -> None:
    if rows.narrow is not None:
        rows.narrow[at] = weight[at].to(rows.narrow.dtype)


def ascending(indices: Tensor, rows: int) -> bool:
    """Whether indices ascend, within the rows."""
    return len(indices) == 0 or bool((indices.diff() > 0).all() and indices[0] >= 0 and indices[-1] < rows)


def narrow_agrees(weight: Tensor, narrow: Tensor, samples: int) -> bool:
    """Whether `narrow` has what becomes of a contiguous weight in its dtype, at about so many entries evenly spread."""
    flat = weight.detach().view(-1)
    stride = max(1, len(flat) // samples) | 1  # odd, so that the samples lie in different columns
    found, expected = narrow.view(-1)[::stride], flat[::stride].to(narrow.dtype)
    return torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)


def _moving(weight: Tensor, rows: AwakeRows, step: float) -> tuple[Tensor, Tensor, Tensor | float]:
    """Which rows move, their gradients, and how many steps each has slept: as a column, or 0 of all."""
    at, grad = rows.indices, rows.values
    if rows.every_row:
        at, grad = torch.arange(len(weight), device=weight.device), torch.zeros_like(weight).index_copy_(0, at, grad)
    if rows.row_step is None:
        return at, grad, 0.0
    slept = step - 1 - rows.row_step[at]
    rows.row_step[at] = step
    return at, grad, slept.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))
