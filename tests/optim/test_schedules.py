"""``sparse_rows="decay"`` under schedules: a row's state is that of the dense optimizer."""

import copy
from math import cos

import pytest
import torch

from grids import covering
from optimizer_cases import KINDS, ROWS, TOLERANCE, WIDTH, make, make_torch, parameters, sparse

STEPS = 60


def cycle(optimizer):
    steps = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.05, total_steps=STEPS + 1, cycle_momentum="lr_decay" not in optimizer.defaults
    )
    return lambda step: steps.step()


def each_step(**options):
    """Sets options of the groups that have them: numbers, and functions of the step."""

    def start(optimizer):
        def set_options(step):
            for group in optimizer.param_groups:
                group.update({name: value(step) for name, value in options.items() if name in group})

        set_options(0)
        return set_options

    return start


SCHEDULES = {
    "none": each_step(),
    "one cycle": cycle,
    "lr": each_step(lr=lambda step: 0.05 * (1 + cos(step))),
    "momentum and betas": each_step(
        momentum=lambda step: 0.7 + 0.2 * cos(step),
        betas=lambda step: (0.7 + 0.2 * cos(step), 0.9 + 0.09 * cos(3 * step)),
    ),
    "momentum and betas of zero at times": each_step(
        nesterov=lambda step: False,
        momentum=lambda step: 0.9 * (step % 5 > 0),
        betas=lambda step: (0.9 * (step % 4 > 0), 0.99 * (step % 6 > 0)),
    ),
    "dampening": each_step(dampening=lambda step: 0.3 + 0.3 * cos(step), nesterov=lambda step: False),
    "weight decay": each_step(weight_decay=lambda step: 0.2 * (step % 3)),
    "lr and weight decay": each_step(
        lr=lambda step: 0.05 * (1 + cos(step)), weight_decay=lambda step: 0.3 + 0.3 * cos(5 * step)
    ),
}


def hold_missing(optimizer, weight, without):
    """Does the dense step, without moving the rows whose gradient is zero. AdamW's weight decay does move them."""
    group = optimizer.param_groups[0]
    held = weight.detach().clone()
    if group.get("decoupled_weight_decay"):
        held *= 1 - group["lr"] * group["weight_decay"]
    optimizer.step()
    with torch.no_grad():
        weight[without] = held[without]


def follow(optimizer, leader):
    """Takes over the options of the leader's group."""
    of_leader = leader.param_groups[0]
    optimizer.param_groups[0].update({name: of_leader[name] for name in of_leader if name != "params"})


def is_made_up_for(kind, schedule, *_):
    """The largest second moment of missed steps is not."""
    return not (kind == "amsgrad" and "weight decay" in schedule)


@pytest.mark.parametrize(
    ("kind", "schedule", "dtype", "resumed"),
    covering(KINDS, SCHEDULES, [torch.float32, torch.float64], [False, True], when=is_made_up_for),
)
def test_decay_gives_a_row_the_state_of_the_dense_optimizer(kind, schedule, dtype, resumed):
    """Also before and after a step with a dense gradient, and in a run that is saved and loaded in between.

    The dense optimizer leaves the weight where it is in the steps that the row misses.
    """
    ours, theirs = parameters(dtype)[:1], parameters(dtype)[:1]
    optimizer, expected = make(kind, ours, sparse_rows="decay"), make_torch(kind, theirs)
    set_options = SCHEDULES[schedule](expected)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        count = ROWS if step in (0, 30) else step % 4
        with_gradient = torch.randperm(ROWS, generator=generator)[:count].sort().values
        without = torch.ones(ROWS, dtype=torch.bool).index_fill_(0, with_gradient, False)
        grad = torch.randn((ROWS, WIDTH), generator=generator, dtype=dtype)
        grad[without] = 0
        ours[0].grad = grad if count == ROWS else sparse(grad[with_gradient], with_gradient.tolist())
        theirs[0].grad = grad.clone()
        before = ours[0].detach().clone()
        follow(optimizer, expected)
        optimizer.step()
        assert torch.equal(ours[0][without], before[without])
        hold_missing(expected, theirs[0], without)
        set_options(step + 1)
        if resumed and step in (17, 41):
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = make(kind, ours, sparse_rows="decay")
            optimizer.load_state_dict(saved)
    optimizer.wake()
    torch.testing.assert_close(ours[0], theirs[0], **TOLERANCE[dtype])
    for name in expected.state[theirs[0]].keys() - {"step"}:
        torch.testing.assert_close(optimizer.state[ours[0]][name], expected.state[theirs[0]][name], **TOLERANCE[dtype])
    assert not any("_row_" in name for name in optimizer.state[ours[0]])


def test_a_cycle_of_our_own_optimizer_is_torchs():
    ours, theirs = parameters(torch.float64)[:1], parameters(torch.float64)[:1]
    optimizers = [make("momentum", ours, sparse_rows="decay"), make_torch("momentum", theirs)]
    cycles = [torch.optim.lr_scheduler.OneCycleLR(each, 0.05, total_steps=30) for each in optimizers]
    for step in range(25):
        for params, optimizer, each in zip((ours, theirs), optimizers, cycles, strict=True):
            params[0].grad = sparse(torch.ones(1, WIDTH, dtype=torch.float64), [4 if step in (0, 24) else 7])
            params[0].grad = params[0].grad if params is ours else params[0].grad.to_dense()
            optimizer.step()
            each.step()
    found, expected = (each.state[p[0]]["momentum_buffer"] for each, p in zip(optimizers, (ours, theirs), strict=True))
    torch.testing.assert_close(found[4], expected[4], **TOLERANCE[torch.float64])
    optimizers[0].wake()
    torch.testing.assert_close(found, expected, **TOLERANCE[torch.float64])
