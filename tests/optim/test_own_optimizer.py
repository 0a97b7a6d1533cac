"""An optimizer of one's own: what `RowSparseOptimizer` asks for is enough for another of torch's optimizers."""

import pytest
import torch

from meprop.optim.base import RowSparseOptimizer, no_steps
from optimizer_cases import assert_alike, parameters, train


class RMSprop(RowSparseOptimizer, torch.optim.RMSprop):
    """`torch.optim.RMSprop` without momentum, not centered. A gradient of zero changes its state, but no weights."""

    def __init__(self, params, lr, *, sparse_rows="exact", **options):
        super().__init__(params, lr, sparse_rows=sparse_rows, **options)

    def _init_state(self, parameter, group):
        state = self.state[parameter]
        if not state:
            state["step"], state["square_avg"] = no_steps(parameter, group), torch.zeros_like(parameter)

    def _zero_gradient_moves_weights(self, group):
        return False

    def _decays(self, group):
        return {"square_avg": group["alpha"]}

    def _update(self, parameter, rows, step, group):
        square, indices, grad = self.state[parameter]["square_avg"], rows.indices, rows.values
        if rows.every_row:
            indices, grad = torch.arange(len(parameter)), torch.zeros_like(parameter).index_copy(0, indices, grad)
        keep = rows.decay("square_avg", group["alpha"], indices, parameter.dim())
        square[indices] = keep * square[indices] + (1 - group["alpha"]) * grad**2
        parameter[indices] -= group["lr"] * grad / (square[indices].sqrt() + group["eps"])


@pytest.mark.parametrize("mode", ["exact", "decay"])
@pytest.mark.parametrize("maximize", [False, True])
def test_it_is_torchs_optimizer(mode, maximize):
    """Also with ``sparse_rows="decay"``, as a row without a gradient does not move."""
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    optimizer = RMSprop(ours, 0.1, sparse_rows=mode, maximize=maximize)
    expected = torch.optim.RMSprop(theirs, 0.1, maximize=maximize)
    train(optimizer, ours, range(60))
    train(expected, theirs, range(60), dense=True)
    optimizer.wake()
    assert_alike(ours, theirs, torch.float64)
    for one, other in zip(ours, theirs, strict=True):
        assert_alike(optimizer.state[one].values(), expected.state[other].values(), torch.float64)


@pytest.mark.parametrize("left_out", sorted(RowSparseOptimizer.__abstractmethods__))
def test_an_incomplete_one_is_refused_when_it_is_made(left_out):
    missing = getattr(RowSparseOptimizer, left_out)
    incomplete = type("Incomplete", (RMSprop,), {left_out: missing})
    with pytest.raises(TypeError, match=left_out):
        incomplete(parameters(torch.float64), 0.1)
