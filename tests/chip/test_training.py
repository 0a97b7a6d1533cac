"""Data sets, training with validation, and trials of several designs."""

from __future__ import annotations

import numpy as np
import pytest

from meprop.chip import cost
from meprop.chip.data import Part, Split, load
from meprop.chip.design import Design, Settings
from meprop.chip.explore import Training, explore
from meprop.chip.model import FixedNet, FloatNet, initial_weights
from meprop.chip.training import train


@pytest.mark.parametrize(
    ("name", "sizes", "inputs"),
    [
        ("iris", (90, 30, 30), 4),
        ("wine", (108, 35, 35), 13),
        ("breast-cancer", (342, 114, 113), 30),
        ("digits", (1079, 359, 359), 64),
    ],
)
def test_data_sets_are_split_by_class_and_scaled_by_the_training_patterns(name, sizes, inputs):
    split = load(name, 0)
    parts = (split.training, split.validation, split.test)
    assert tuple(len(part.inputs) for part in parts) == sizes
    assert all(part.inputs.shape[1] == inputs for part in parts)
    assert split.training.inputs.min() == -1
    assert split.training.inputs.max() == 1
    shares = np.array([part.targets.mean(0) for part in parts])
    assert np.abs(shares - shares[0]).max() < 0.045
    assert (load(name, 0).test.inputs == split.test.inputs).all()
    assert (load(name, 1).test.inputs != split.test.inputs).any()


def test_the_parts_of_a_split_share_no_pattern():
    split = load("digits", 3)
    rows = [{each.tobytes() for each in part.inputs} for part in (split.training, split.validation, split.test)]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match=r"no data set 'wines'; there are iris, wine, .*; did you mean wine\?"):
        load("wines", 0)


class Scripted(FloatNet):
    """Its validation errors are given, one for each epoch; its weight says how many epochs there were."""

    def __init__(self, errors):
        design = Design(inputs=1, neurons=1, outputs=1)
        super().__init__(design, initial_weights(design, 0))
        self.errors, self.weights[0][:] = errors, 0.0

    def learn(self, inputs, target):
        self.weights[0] += 1

    def error(self, inputs, target):
        return self.errors[int(self.weights[0][0, 0]) - 1]


@pytest.mark.parametrize(
    ("errors", "epochs", "best"),
    [([5, 4, 4, 6, 3, 3, 3, 3, 1], 8, 5), ([1, 2, 3, 4, 0], 4, 1), ([4, 3, 2], 3, 3)],
)
def test_the_best_weights_are_kept_and_training_stops(errors, epochs, best):
    one = Part(np.zeros((1, 1)), np.ones((1, 1)))
    net = Scripted(errors)
    outcome = train(net, Split(one, one, one), 0, epochs=len(errors), patience=3)
    assert (outcome.epochs, outcome.best_epoch) == (epochs, best)
    assert net.weights[0][0, 0] == best


@pytest.mark.parametrize("options", [{"epochs": 0}, {"patience": 0}])
def test_no_epochs_are_refused(options):
    one = Part(np.zeros((1, 1)), np.ones((1, 1)))
    with pytest.raises(ValueError, match="both must be at least 1"):
        train(Scripted([1]), Split(one, one, one), 0, **options)
    with pytest.raises(ValueError, match="=0; it must be at least 1"):
        Training(**options)


@pytest.mark.parametrize("k", [None, 0.5])
def test_fixed_point_learns_iris(k):
    design = Design(inputs=4, neurons=12, outputs=3, k=k)
    assert train(FixedNet(design, initial_weights(design, 0)), load("iris", 0), 0, epochs=60).accuracy >= 90


def test_trials_of_several_words_and_ks():
    seen = []
    found = explore(
        "iris",
        Settings(neurons=4),
        [(None, None), (None, 2), (12, None), (12, 2)],
        Training(splits=2, epochs=2),
        seen.append,
    )
    assert found == seen
    assert [(each.word, each.k, len(each.accuracy), each.epochs) for each in found] == [
        (None, None, 2, [2, 2]),
        (None, 2, 2, [2, 2]),
        (12, None, 2, [2, 2]),
        (12, 2, 2, [2, 2]),
    ]
    design = Design(inputs=4, neurons=4, outputs=3, word=12, k=2)
    assert [each.cycles for each in found[2:]] == [
        cost.train_cycles(Settings(neurons=4, word=12).of_net(4, 3)),
        cost.train_cycles(design),
    ]
