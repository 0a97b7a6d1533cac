"""The time steps of an LSTM's sequences, and its backward pass with a rule that has to be asked at each of them.

`meprop.ops.lstm` says how sequences are packed, and what the sizes are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from meprop.ops.linear import backward_with, linear_backward
from meprop.ops.products import count_hits_of_blocks
from meprop.selection import RowSelection, Selection, one_after_another, shared_or_zeros


def time_steps(batch_sizes: Tensor, reverse: bool) -> Iterator[slice]:
    """The rows of each time step, in the order of the walk."""
    starts = batch_sizes.cumsum(0) - batch_sizes
    steps = [slice(start, start + size) for start, size in zip(starts.tolist(), batch_sizes.tolist(), strict=True)]
    return reversed(steps) if reverse else iter(steps)


def numbered_steps(batch_sizes: Tensor, reverse: bool) -> Iterator[tuple[int, slice]]:
    """The same, each with the number of its time step."""
    steps = list(enumerate(time_steps(batch_sizes, False)))
    return reversed(steps) if reverse else iter(steps)


def with_new(state: Tensor, new: Tensor) -> Tensor:
    """The state of all sequences, after the first ones have got a new one."""
    return torch.cat([new, state[len(new) :]])


def earlier_states(states: Tensor, batch_sizes: Tensor, reverse: bool) -> Tensor:
    """The state before each row [N, H], out of all states [B + N, H].

    It is the state of the same sequence at the step before, or the initial one.
    """
    batch = int(batch_sizes[0])
    state, new = states[:batch], states[batch:]
    earlier = torch.empty_like(new)
    for rows in time_steps(batch_sizes, reverse):
        earlier[rows] = state[: rows.stop - rows.start]
        state = with_new(state, new[rows])
    return earlier


def or_zeros(state: Tensor | None, batch_sizes: Tensor, weight_hh: Tensor) -> Tensor:
    """The state [B, H], or zeros."""
    return weight_hh.new_zeros(int(batch_sizes[0]), weight_hh.shape[1]) if state is None else state


def gate_gradients(
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


def step_by_step(
    trace: tuple[Tensor, Tensor, Tensor],
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
    grad_h, grad_c = or_zeros(grad_h, batch_sizes, weight_hh), or_zeros(grad_c, batch_sizes, weight_hh)
    earlier_cells, cells = earlier_states(cells, batch_sizes, reverse), cells[batch:]
    whole, kept = torch.empty_like(gates), dict[int, tuple[slice, Selection]]()
    for rows in time_steps(batch_sizes, not reverse):
        size = rows.stop - rows.start
        grad = grad_h[:size] if grad_output is None else grad_output[rows] + grad_h[:size]
        of_gates, grad_cell = gate_gradients(gates[rows], cells[rows], earlier_cells[rows], grad, grad_c[:size])
        torch.cat(of_gates, dim=1, out=whole[rows])
        selection = select(whole[rows])
        kept[rows.start] = rows, selection
        if hits is not None:
            hits += count_hits_of_blocks(selection, 4)
        earlier, *_ = backward_with(selection, whole[rows], weight_hh, None)
        assert earlier is not None
        forget = gates[rows].chunk(4, dim=1)[1]
        grad_h, grad_c = with_new(grad_h, earlier), with_new(grad_c, grad_cell * forget)
    steps = [kept[start] for start in sorted(kept)]  # in the order of the rows, whatever that of the walk
    return (
        *_of_all_steps(steps, weight_ih if needs[0] else None, x if needs[1] else None),
        _of_all_steps(steps, None, earlier_states(outputs, batch_sizes, reverse))[1] if needs[2] else None,
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
