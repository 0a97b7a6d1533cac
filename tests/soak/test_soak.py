"""Small converted models train for long: memory stays flat, and a second training gives the same bits.

`MEPROP_SOAK` is the number of steps of each of the two trainings.
"""

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import meprop
from cases import bits

STEPS = int(os.environ.get("MEPROP_SOAK", "1000"))


class Tagger(torch.nn.Module):
    """An LSTM, a linear layer, and a head that stays dense."""

    def __init__(self, linear: meprop.Rule, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.lstm = torch.nn.LSTM(12, 16, batch_first=True)
        self.linear, self.head = torch.nn.Linear(16, 128), torch.nn.Linear(128, 5)
        meprop.convert(self, meprop.TopK(4), filter=lambda name, _: name == "lstm", min_features=1, when="always")
        meprop.convert(self, linear, filter=lambda name, _: name == "linear", when="always")

    def forward(self, x):
        return self.head(self.linear(self.lstm(x)[0]).relu())


def train(model, batches, changes_threads=False):
    optimizer = meprop.optim.Adam(model.parameters(), lr=1e-3)
    for step, (x, tags) in enumerate(batches):
        if changes_threads:
            torch.set_num_threads(3 if step % 50 == 0 else 1)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x).flatten(0, 1), tags.flatten()).backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def with_workers_and_other_numbers_of_threads(data):
    """Half of the steps, in epochs of 250 batches that two workers load."""
    model = Tagger(meprop.Sampled(noise=0.25), seed=1)
    loader = DataLoader(data, batch_size=8, shuffle=True, num_workers=2, generator=torch.Generator().manual_seed(2))
    for _ in range(max(1, STEPS // 2 // len(loader))):
        train(model, loader, changes_threads=True)
    return list(model.parameters())


def in_a_thread(data, model):
    """A sixth of the steps. Draws would come from the generator that all Python threads share, so that none is made."""
    batches = DataLoader(data, batch_size=8)
    for _ in range(max(1, STEPS // 6 // len(batches))):
        train(model, batches)
    return list(model.parameters())


def everything():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(2000, 5, 12), torch.randint(0, 5, (2000, 5)))
    parameters = with_workers_and_other_numbers_of_threads(data)
    models = [Tagger(meprop.TopK(0.05), seed) for seed in range(3)]  # made here, as they are drawn from one generator
    with ThreadPoolExecutor(len(models)) as pool:
        found = list(pool.map(lambda model: in_a_thread(data, model), models))
    return [bits(parameter.detach()) for each in (parameters, *found) for parameter in each]


def in_use():
    """The resident memory in MiB, the number of objects of Python, and the number of open files."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(gc.get_objects()), len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
def test_a_long_training_keeps_nothing_and_repeats_its_bits(threads):
    first = everything()
    before = in_use()
    second = everything()
    after = in_use()
    print(f"\n{STEPS} steps: MiB, objects and files were {before}, and are {after}")
    assert len(first) == len(second)
    assert all(map(torch.equal, first, second))
    assert after[0] - before[0] < 4
    assert after[1] - before[1] < 100 + len(second)
    assert after[2] <= before[2]
