"""How far a training is: in passes over its batches, or in seconds of its steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """When an epoch of a training ends, and how far its schedules are.

    With a budget in seconds an epoch is an equal share of them, and not a pass over the batches. The schedules of
    learning rate and rule then go over the same course in those seconds, with as many ticks as they had in passes.

    Args:
        epochs: How many there are.
        steps_per_epoch: How many batches a pass has.
        seconds: The budget of training steps; None: an epoch is a pass.
    """

    epochs: int
    steps_per_epoch: int
    seconds: float | None = None

    @property
    def ticks(self) -> int:
        """How often schedules tick in the whole training."""
        return self.epochs * self.steps_per_epoch

    def share(self, steps: int, seconds: float) -> float:
        """Return the share of the training that is done, from 0 to 1.

        Args:
            steps: Those that are done.
            seconds: What they took.
        """
        return min(1.0, steps / self.ticks if self.seconds is None else seconds / self.seconds)

    def ticks_after(self, steps: int, seconds: float) -> int:
        """Return how often schedules have ticked after these steps and seconds; see `share`."""
        return steps if self.seconds is None else int(self.ticks * self.share(steps, seconds))

    def epoch_is_over(self, epochs_before: int, seconds: float) -> bool:
        """Whether an epoch has had its share of the seconds. One that is a pass ends with the batches instead.

        Args:
            epochs_before: Those that are complete.
            seconds: What the steps took so far.
        """
        return self.seconds is not None and seconds >= self.seconds * (epochs_before + 1) / self.epochs
