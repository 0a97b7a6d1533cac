"""The random generators that a training run draws from, and their state."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class Generators:
    """The global generators of torch, Python and NumPy, and those that a run's batches have of their own.

    Args:
        cuda_devices: The GPUs whose generators belong to them.
    """

    def __init__(self, cuda_devices: Sequence[torch.device] = ()) -> None:
        self._cuda_devices = cuda_devices
        self.of_batches: list[torch.Generator] = []
        """None before there are batches."""
        self.own = self.state()
        """The run's own state, while it is not swapped in."""

    @contextmanager
    def swapped_in(self) -> Generator[None]:
        """Swap in the run's own state, so that runs in turns, or a caller's draws, do not disturb one another."""
        before = self.state()
        self.set_state(self.own)
        try:
            yield
            self.own = self.state()
        finally:
            self.set_state(before)

    def seed(self, seed: int) -> None:
        """Give the global generators a seed."""
        import numpy as np

        torch.manual_seed(seed)
        random.seed(seed)
        np.random.set_state({**np.random.MT19937(seed).state})  # noqa: NPY002

    def state(self) -> dict[str, Any]:
        """Return the state of all generators: tensors and plain data."""
        import numpy as np

        return {
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state(device) for device in self._cuda_devices],
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
            "generators": [each.get_state() for each in self.of_batches],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Give all generators the state that `state` returned."""
        import numpy as np

        torch.set_rng_state(state["torch"])
        for device, each in zip(self._cuda_devices, state["cuda"], strict=True):
            torch.cuda.set_rng_state(each, device)
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
        for generator, each in zip(self.of_batches, state["generators"], strict=False):  # none before there are batches
            generator.set_state(each)


def generators_of(batches: Iterable[Any]) -> list[torch.Generator]:
    """Return the generators that batches have of their own, each once: those of a DataLoader and of its samplers."""
    sampler, batch_sampler = getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)
    owners = (batches, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())
