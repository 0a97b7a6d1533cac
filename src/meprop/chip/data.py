"""Four small data sets of scikit-learn, split into training, validation and test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from meprop.chip.fixed import Reals
from meprop.errors import did_you_mean

DataName = Literal["iris", "wine", "breast-cancer", "digits"]


@dataclass(frozen=True)
class Part:
    """Patterns of one part of a data set.

    Attributes:
        inputs: [N, inputs], float64, mostly in [-1, 1].
        targets: [N, classes], float64: 1 for the pattern's class and 0 for the others.
    """

    inputs: Reals
    targets: Reals

    @property
    def classes(self) -> NDArray[np.intp]:
        """The class of each pattern, [N]."""
        return self.targets.argmax(1)


@dataclass(frozen=True)
class Split:
    """A data set in three parts.

    Attributes:
        training: Three fifths of the patterns.
        validation: One fifth.
        test: One fifth.
    """

    training: Part
    validation: Part
    test: Part


def load(name: DataName, seed: int) -> Split:
    """Split a data set at random, with the same mix of classes in each part.

    Each input is scaled so that the training patterns fill [-1, 1]. Other patterns may lie outside of it.

    Args:
        name: Of the data set.
        seed: Of the split.

    Raises:
        ValueError: There is no such data set.
    """
    from sklearn import datasets  # pyright: ignore[reportMissingTypeStubs]

    names = get_args(DataName)
    if name not in names:
        raise ValueError(f"no data set {name!r}; there are {', '.join(names)}{did_you_mean(name, names)}")
    inputs, classes = getattr(datasets, f"load_{name.replace('-', '_')}")(return_X_y=True)
    training, validation, test = _parts(classes, np.random.default_rng(seed))
    low, high = inputs[training].min(0), inputs[training].max(0)
    scaled = 2 * (inputs - low) / np.maximum(high - low, 1e-9) - 1
    scaled[:, low == high] = 0.0  # says nothing in training, as pixels at the edge
    targets = np.eye(int(classes.max()) + 1)[classes]
    return Split(*(Part(scaled[part], targets[part]) for part in (training, validation, test)))


def _parts(classes: NDArray[Any], generator: np.random.Generator) -> list[NDArray[np.intp]]:
    """The indices of the three parts. Of each class every fifth pattern is for validation, every fifth for test."""
    order = generator.permutation(len(classes))
    by_class = order[np.argsort(classes[order], kind="stable")]
    place = np.arange(len(classes)) % 5
    return [np.sort(by_class[chosen]) for chosen in (place < 3, place == 3, place == 4)]
