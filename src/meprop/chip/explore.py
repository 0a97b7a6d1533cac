"""Which words and which k keep accuracy on a data set, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from meprop.chip import cost
from meprop.chip.data import DataName, load
from meprop.chip.design import Settings
from meprop.chip.model import FixedNet, FloatNet, initial_weights
from meprop.chip.training import train


@dataclass(frozen=True)
class Training:
    """How nets are trained.

    Raises:
        ValueError: A field is below 1.
    """

    splits: int = 10
    """Random splits of the data. Each has initial weights and an order of its own."""
    epochs: int = 150
    """Passes over the training patterns, at most."""
    patience: int = 20
    """Stop after so many epochs without a smaller validation error."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}={value}; it must be at least 1")


@dataclass(frozen=True)
class Trial:
    """What came of one design on all splits.

    Attributes:
        word: Bits of a word; None: float64.
        k: Of the design.
        accuracy: On the test patterns of each split, in percent.
        epochs: Of each split.
        cycles: To train on one pattern; None: float64.
    """

    word: int | None
    k: int | float | None
    accuracy: list[float]
    epochs: list[int]
    cycles: int | None

    @property
    def mean_accuracy(self) -> float:
        """Over the splits, in percent."""
        return mean(self.accuracy)


def explore(
    data: DataName,
    settings: Settings,
    points: Sequence[tuple[int | None, int | float | None]],
    training: Training,
    after: Callable[[Trial], None],
) -> list[Trial]:
    """Train a net with several words and k, on the same splits and from the same weights.

    Args:
        data: The name of the data set.
        settings: The rest of the design.
        points: Bits of a word, and k as in `Design`. No bits: float64.
        training: How they are trained.
        after: Called with each trial as soon as it is there.

    Raises:
        ValueError: A word or a k is out of range.
    """
    splits = [load(data, split) for split in range(training.splits)]
    design = settings.of_net(splits[0].training.inputs.shape[1], splits[0].training.targets.shape[1])
    designs = [replace(design, word=word or design.word, k=k) for word, k in points]
    trials: list[Trial] = []
    for (word, k), each in zip(points, designs, strict=True):
        kind = FloatNet if word is None else FixedNet
        outcomes = [
            train(kind(each, initial_weights(each, seed)), split, seed, training.epochs, training.patience)
            for seed, split in enumerate(splits)
        ]
        accuracy, epochs = [outcome.accuracy for outcome in outcomes], [outcome.epochs for outcome in outcomes]
        trials.append(Trial(word, k, accuracy, epochs, None if word is None else cost.train_cycles(each)))
        after(trials[-1])
    return trials
