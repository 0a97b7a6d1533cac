"""What only Adagrad has: state that torch makes before the first step."""

import torch

from meprop import optim
from optimizer_cases import ROWS, WIDTH, needs_late_state, sparse


def test_adagrad_takes_groups_that_are_added_later():
    ours, theirs = ([torch.nn.Parameter(torch.ones(ROWS, WIDTH)) for _ in range(2)] for _ in range(2))
    for params, module in ((ours, optim), (theirs, torch.optim)):
        optimizer = module.Adagrad(params[:1], 0.1, initial_accumulator_value=0.5)
        needs_late_state(optimizer)
        optimizer.add_param_group({"params": params[1:]})
        for _ in range(2):
            params[1].grad = sparse(torch.ones(1, WIDTH), [3])
            optimizer.step()
    torch.testing.assert_close(ours[1], theirs[1])
