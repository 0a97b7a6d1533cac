"""nn.Linear: torch's layer in all but the backward pass."""

import copy
import pickle

import pytest
import torch

import meprop
from meprop.record import Activity
from meprop.speed import Decision

RULE = meprop.TopK(3)


def test_constructor_initialisation_and_forward_are_those_of_torch():
    torch.manual_seed(0)
    ours = meprop.nn.Linear(7, 40, rule=RULE)
    torch.manual_seed(0)
    theirs = torch.nn.Linear(7, 40)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)
    x = torch.randn(5, 7)
    assert torch.equal(ours(x), theirs(x))
    assert isinstance(ours, torch.nn.Linear)
    assert meprop.nn.Linear(7, 40, bias=False, dtype=torch.float64, device="meta", rule=RULE).weight.is_meta


def test_the_rule_is_required_checked_and_shown():
    with pytest.raises(TypeError, match="rule"):
        meprop.nn.Linear(7, 40)
    with pytest.raises(TypeError, match=r"rule=0\.05"):
        meprop.nn.Linear(7, 40, rule=0.05)
    assert "rule=TopK(k=3, scope='example')" in repr(meprop.nn.Linear(7, 40, rule=RULE))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_keep_rule_and_gradient(duplicate):
    layer = meprop.nn.Linear(7, 40, rule=RULE)
    twin = duplicate(layer)
    x = torch.randn(1, 7)
    for module in (layer, twin):
        module(x).square().sum().backward()
    assert twin.rule == RULE
    assert twin.weight is not layer.weight
    assert torch.equal(layer.weight.grad, twin.weight.grad)
    assert int((twin.weight.grad.abs().sum(1) > 0).sum()) == 3


def test_a_changed_rule_takes_effect():
    layer = meprop.nn.Linear(7, 40, rule=RULE)
    layer.rule = meprop.TopK(9)
    layer(torch.randn(1, 7)).square().sum().backward()
    assert int((layer.weight.grad.abs().sum(1) > 0).sum()) == 9


def test_a_changed_rule_leaves_what_was_measured_and_counted():
    layer = meprop.nn.Linear(7, 40, rule=RULE)
    layer.decision, layer.activity = Decision(True, 1, 2.0, 1.0), Activity.of_units(40)
    decision, activity = layer.decision, layer.activity
    layer.rule = meprop.TopK(9)
    assert layer.decision is decision
    assert layer.activity is activity
