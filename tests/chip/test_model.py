"""The nets of the chip: fixed point beside literal integers, float64 beside torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chip_literal as literal
from meprop.chip.design import Design
from meprop.chip.model import FixedNet, FloatNet, initial_weights, largest

DESIGNS = st.builds(
    Design,
    inputs=st.integers(1, 6),
    neurons=st.integers(1, 7),
    outputs=st.integers(1, 4),
    layers=st.integers(1, 3),
    word=st.integers(8, 24),
    weight_fraction=st.none() | st.integers(2, 8),
    k=st.none() | st.integers(1, 8) | st.floats(0.05, 1.0),
    rate=st.sampled_from([2.0**-12, 0.125, 0.5, 8.0]),
)


def patterns(design, count, seed=0):
    generator = np.random.default_rng(seed)
    inputs = generator.uniform(-2.5, 2.5, (count, design.inputs))
    return inputs, generator.integers(0, 2, (count, design.outputs)).astype(np.float64)


def as_lists(weights):
    return [each.tolist() for each in weights]


@settings(max_examples=60, deadline=None)
@given(design=DESIGNS, seed=st.integers(0, 99), scale=st.sampled_from([1.0, 30.0]))
def test_fixed_point_is_the_literal_net(design, seed, scale):
    net = FixedNet(design, [scale * each for each in initial_weights(design, seed)])
    other = literal.LiteralNet(
        design.word, net.design.weight.fraction, design.kept, design.rate_shift, as_lists(net.weights)
    )
    for inputs, target in zip(*patterns(design, 6, seed), strict=True):
        assert as_lists(net.activations(inputs)) == other.forward(inputs)
        assert int(net.learn(inputs, target)) == other.learn(inputs, target)
        assert as_lists(net.weights) == other.weights


@pytest.mark.parametrize("kind", [FixedNet, FloatNet])
@pytest.mark.parametrize("k", [7, 1.0, 999])
def test_keeping_all_is_dense_bit_for_bit(kind, k):
    dense = Design(inputs=3, neurons=7, outputs=2, layers=2)
    nets = [kind(design, initial_weights(dense, 0)) for design in (dense, replace(dense, k=k))]
    for inputs, target in zip(*patterns(dense, 20), strict=True):
        for net in nets:
            net.learn(inputs, target)
    assert as_lists(nets[0].weights) == as_lists(nets[1].weights)


def test_of_equal_magnitudes_the_lower_index_is_kept():
    assert largest(np.array([1, -3, 3, 2, -3]), 2).tolist() == [1, 2]
    assert largest(np.array([0, 0, 0]), 2).tolist() == [0, 1]
    assert largest(np.array([-(2**23), 2**23 - 1]), 1).tolist() == [0]


def test_only_rows_of_kept_deltas_change():
    design = Design(inputs=4, neurons=20, outputs=6, k=0.25)
    net = FixedNet(design, initial_weights(design, 0))
    before = [each.copy() for each in net.weights]
    net.learn(*(each[0] for each in patterns(design, 1)))
    changed = [int((now != then).any(1).sum()) for now, then in zip(net.weights, before, strict=True)]
    assert changed == [5, 2]


@pytest.mark.parametrize("layers", [1, 3])
def test_float64_is_a_step_of_torch(layers):
    design = Design(inputs=5, neurons=6, outputs=3, layers=layers, rate=0.5)
    net = FloatNet(design, initial_weights(design, 1))
    weights = [torch.tensor(each, requires_grad=True) for each in net.weights]
    inputs, target = (each[0] for each in patterns(design, 1))
    y = torch.tensor(inputs)
    for weight in weights:
        y = torch.sigmoid(weight[:, :-1] @ y + weight[:, -1])
    error = (y - torch.tensor(target)).square().sum()
    (error / 2).backward()
    assert net.learn(inputs, target) == pytest.approx(error.item(), rel=1e-12)
    for found, weight in zip(net.weights, weights, strict=True):
        np.testing.assert_allclose(found, (weight - 0.5 * weight.grad).detach().numpy(), rtol=1e-12)


def test_fixed_point_comes_near_float64_with_more_bits():
    def distance(word):
        design = Design(inputs=4, neurons=9, outputs=3, word=word)
        fixed, real = (kind(design, initial_weights(design, 2)) for kind in (FixedNet, FloatNet))
        for inputs, target in zip(*patterns(design, 50), strict=True):
            fixed.learn(np.clip(inputs, -1, 1), target)
            real.learn(np.clip(inputs, -1, 1), target)
        pairs = zip(fixed.weights, real.weights, strict=True)
        return max(np.abs(design.weight.to_reals(one) - other).max() for one, other in pairs)

    assert distance(24) < 1e-4 < distance(16) < 2e-2 < distance(8)


def test_weights_of_other_shapes_are_refused():
    design = Design(inputs=2, neurons=3, outputs=1)
    with pytest.raises(ValueError, match=r"the weights have the shapes \[\(3, 3\)\]; this net takes \[\(3, 3\), "):
        FixedNet(design, initial_weights(design, 0)[:1])
