"""A threshold that no width reaches is warned of; one that is reached is not."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import meprop


def linear():
    return nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 256), nn.Linear(256, 2)

    def forward(self, x):
        return self.out(self.lstm(x)[0])


class Convolution(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv1d(8, 256, 1), nn.ReLU(), nn.Conv1d(256, 2, 1))


MODELS = {
    "linear": (linear, lambda rule: rule),
    "per product": (linear, lambda rule: meprop.PerProduct(input=rule, weight=rule)),
    "LSTM": (Tagger, lambda rule: rule),
    "convolution": (Convolution, lambda rule: rule),
}
SHARES = [(meprop.TopK(0.02), 0.1), (meprop.TopK(0.1), 0.41), (meprop.TopK(0.02, scope="global"), 0.1)]
SHARES += [(meprop.Sampled(0.02), 0.1), (meprop.RandomK(0.02), 0.1), (meprop.CompensatedTopK(0.02), 0.1)]
OF_LINEAR = [(meprop.TopK(0.04), 0.1), (meprop.TopK(0.1), 0.1), (meprop.TopK(0.04, scope="global"), 0.05)]
REACHED = [(meprop.TopK(20), 0.1), (meprop.TopK(5), 0.1), (meprop.TopK(0.2), 0.1)]
REACHED += [(meprop.TopK(0.04), 0.0), (meprop.Sampled(noise=0.25), 0.1), (meprop.TopK(20), None)]


def made(model, rule, threshold, **options):
    build, wrapped = MODELS[model]
    network = build()
    meprop.convert(network, wrapped(rule), when="always")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        meprop.Simplifier(network, threshold, **options)
    return [str(each.message) for each in caught]


TABLE = [(model, *row) for model in ("linear", "per product", "LSTM") for row in SHARES]
TABLE += [(model, *row) for model in ("linear", "per product") for row in OF_LINEAR]


@pytest.mark.parametrize(("model", "rule", "threshold"), TABLE)
def test_a_threshold_that_is_above_a_rules_share_is_warned_of(model, rule, threshold):
    (said,) = made(model, rule, threshold)
    assert said.startswith(f"threshold={threshold} would remove nearly all units of layer ")
    assert f"{rule}" in said
    assert "Give the rule a fixed number of entries, such as" in said


@pytest.mark.parametrize("rule", [rule for rule, _ in SHARES], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_a_share_of_the_mean_with_a_rule_that_keeps_a_share_is_warned_of(model, rule):
    (said,) = made(model, rule, None)
    assert said.startswith("of_mean=0.5 may remove nearly all units of layer ")
    assert f"{rule}" in said
    assert "Give the rule a fixed number of entries, such as" in said
    least = int(said.split()[-3])
    assert made(model, rule, None, min_units=least + 1) == []
    assert made(model, rule, None, of_mean=0) == []


OTHERS = [(model, *row) for model in MODELS for row in REACHED]
OTHERS += [("LSTM", *row) for row in OF_LINEAR]  # four gates hit a unit
OTHERS += [("convolution", *row) for row in SHARES if row[0].scope != "batch"]  # and all positions


@pytest.mark.parametrize(("model", "rule", "threshold"), OTHERS)
def test_other_measures_are_not_warned_of(model, rule, threshold):
    assert made(model, rule, threshold) == []


def test_the_advice_keeps_the_network():
    """The rule with a share collapses under the threshold; with the number of entries that is advised it does not."""
    torch.manual_seed(0)
    x = torch.randn(2000, 16)
    target = (x @ torch.randn(16, 4)).argmax(1)

    def widths(rule, threshold):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 4))
        meprop.convert(model, rule, when="always")
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        simplifier = meprop.Simplifier(model, threshold, optimizer=optimizer, check_every=50, warmup=50)
        for _ in range(400):
            batch = torch.randint(len(x), (32,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), target[batch]).backward()
            optimizer.step()
            simplifier.step()
        return simplifier.widths["0"]

    with pytest.warns(UserWarning, match="such as 10,"):
        collapsed = widths(meprop.TopK(0.04), 0.1)
    assert collapsed < 15
    assert widths(meprop.TopK(10), 0.1) > 2 * collapsed
