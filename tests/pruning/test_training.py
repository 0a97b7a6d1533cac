"""What a training loop has beside model and optimizer: it goes on after a cut, or is refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import meprop

SCHEDULERS = {
    "none": lambda optimizer: None,
    "StepLR": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=30),
    "CosineAnnealingLR": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "SWALR": lambda optimizer: torch.optim.swa_utils.SWALR(optimizer, 0.01),
}
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "Adam": torch.optim.Adam,
    "Adam, fused": lambda parameters: torch.optim.Adam(parameters, fused=True),
    "ours": meprop.optim.AdamW,
}


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 4))
    meprop.convert(model, meprop.TopK(8), when="always")
    return model


def backward(model, scale=lambda loss: loss):
    scale(nn.functional.cross_entropy(model(torch.randn(64, 16)), torch.arange(64) % 4)).backward()


def assert_cut(model, optimizer, simplifier):
    assert 1 < simplifier.widths["0"] < 128
    for parameter, state in optimizer.state.items():
        assert all(value.shape == parameter.shape for value in state.values() if value.dim())
    assert len(optimizer.state) == 4
    backward(model)


@pytest.mark.parametrize("accumulated", [1, 4])  # at a check there are gradients of three batches
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_schedulers_clipping_gradient_scaling_and_accumulation_go_on(make_optimizer, scheduler, accumulated):
    model = make()
    optimizer = make_optimizer(model.parameters())
    scheduler, scaler, listed = scheduler(optimizer), torch.amp.GradScaler("cpu"), list(model.parameters())
    simplifier = meprop.Simplifier(model, 0.1, optimizer=optimizer, check_every=3)
    for batch in range(1, 13):
        backward(model, scaler.scale)
        if batch % accumulated == 0:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(listed, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
        simplifier.step()
    assert_cut(model, optimizer, simplifier)


def train(model, optimizer, simplifier, after=lambda: None):
    for _ in range(6):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        after()
        simplifier.step()


def test_a_group_that_is_added_later_is_cut_and_a_parameter_of_an_unknown_optimizer_refused():
    for added in (True, False):
        model = make()
        optimizer = torch.optim.Adam(model[0].parameters())
        model[2].requires_grad_(False)
        simplifier = meprop.Simplifier(model, 0.1, optimizer=optimizer, check_every=3)
        model[2].requires_grad_(True)
        if added:
            optimizer.add_param_group({"params": model[2].parameters()})
            train(model, optimizer, simplifier)
            assert_cut(model, optimizer, simplifier)
        else:
            other = torch.optim.Adam(model[2].parameters())
            with pytest.raises(meprop.NotSupportedError, match=r"'2.weight' can be removed, and it is in none"):
                train(model, optimizer, simplifier, other.step)
            assert simplifier.widths["0"] == 128


def test_an_average_of_the_weights_is_made_anew_after_a_check():
    """The way that docs/simplify.md names; an average from before the check is of another shape, and torch says so."""
    model = make()
    optimizer = torch.optim.Adam(model.parameters())
    simplifier = meprop.Simplifier(model, 0.1, optimizer=optimizer, check_every=3)
    average = torch.optim.swa_utils.AveragedModel(model)
    train(model, optimizer, simplifier)
    with pytest.raises(RuntimeError, match="size of tensor"):
        average.update_parameters(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    small = copy.deepcopy(average.module)
    meprop.revert(small)
    assert small[0].out_features == simplifier.widths["0"] < 128
