"""The multilayer perceptrons of `meprop bench step`: what they are, and the weights and batches of the timed steps.

Which entries a rule keeps follows the gradients, and those depend on the weights and the data. So the weights are those
of a dense model that was trained for some steps, and the batches are more of the same data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meprop.bench.problem import Device, forked_random

Batch = tuple[Tensor, Tensor]
"""Inputs [N, I] and classes [N]."""

_BATCHES = 8
_LR = 1e-3  # Adam's in training
_DISTANCE = 5.0  # of two centres, in standard deviations of the points: of ten classes, a few percent overlap


@dataclass(frozen=True)
class Model:
    """A multilayer perceptron with ReLU, and the examples of a step.

    Attributes:
        widths: Of the input, the hidden layers and the output.
        batch: N.
        dropout: The probability to drop a hidden unit, behind each ReLU; 0 puts none there.

    Raises:
        ValueError: A size is out of range.
    """

    widths: tuple[int, ...]
    batch: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if len(self.widths) < 3 or min(*self.widths, self.batch) < 1:
            raise ValueError(f"model {self.name}: three widths or more, and a batch, all at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must be at least 0 and below 1, got {self.dropout}")

    @classmethod
    def parse(cls, name: str, dropout: float = 0.0) -> Model:
        """Return the model of a name like 784-500-500-10@100.

        Raises:
            ValueError: The name is none.
        """
        widths, at, batch = name.partition("@")
        sizes = [*widths.split("-"), batch]
        if not at or not all(size.isdecimal() for size in sizes):
            raise ValueError(f"--models {name}: a model is named like 784-500-500-10@100, widths and batch")
        *widths_, batch_ = map(int, sizes)
        return cls(tuple(widths_), batch_, dropout)

    @property
    def name(self) -> str:
        """Widths and batch, as `parse` takes them."""
        return f"{'-'.join(map(str, self.widths))}@{self.batch}"

    def build(self) -> nn.Sequential:
        """Return a new dense network."""
        layers: list[nn.Module] = []
        for inputs, outputs in zip(self.widths, self.widths[1:], strict=False):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            if self.dropout > 0:
                layers.append(nn.Dropout(self.dropout))
        return nn.Sequential(*layers[: -2 if self.dropout > 0 else -1])


@dataclass(frozen=True)
class Start:
    """What the steps of a model begin with.

    Attributes:
        network: The dense network, trained or not.
        batches: Of the steps, in turns.
        data: What they are of.
    """

    network: nn.Sequential
    batches: list[Batch]
    data: str

    def hardest(self) -> Batch:
        """Return the batch with the largest loss. Where there is next to none, rounding is much of the gradients."""
        with torch.no_grad():
            return max(self.batches, key=lambda batch: float(F.cross_entropy(self.network(batch[0]), batch[1])))


def start(model: Model, train_steps: int, device: Device = "cpu") -> Start:
    """Return weights and batches on a device, the same each time.

    With training they are of MNIST, where it is found and the model has enough inputs and outputs for it. Inputs beyond
    an image's pixels are 0. Otherwise they are of points around centres that are drawn at random. Without training they
    are random normal, with random classes.
    """
    with forked_random(device):
        torch.manual_seed(0)
        network = model.build().to(device)
        if train_steps == 0:
            data, batches = "random data", _noise(model, device)
        elif (digits := _digits(model)) is not None:
            data, batches = "MNIST", digits
        else:
            data, batches = "points around random centres", _points(model, device)
        batches = ((x.to(device), classes.to(device)) for x, classes in batches)  # images are read on a CPU
        _train(network, islice(batches, train_steps))
        return Start(network, list(islice(batches, _BATCHES)), data)


def _train(network: nn.Module, batches: Iterator[Batch]) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=_LR, fused=True)
    for x, classes in batches:
        F.cross_entropy(network(x), classes).backward()  # pyright: ignore[reportUnknownMemberType]
        optimizer.step()
        optimizer.zero_grad()


def _noise(model: Model, device: Device) -> Iterator[Batch]:
    inputs, outputs = model.widths[0], model.widths[-1]
    while True:
        x = torch.randn(model.batch, inputs, device=device)
        yield x, torch.randint(0, outputs, (model.batch,), device=device)


def _digits(model: Model) -> Iterator[Batch] | None:
    """Batches of MNIST's training images; None if it is not found or does not fit. Nothing is downloaded."""
    from meprop.tasks import mnist

    if mnist.locate(None) is None:
        return None
    digits = mnist.load(mnist.MnistConfig(dev_size=1))  # the least
    images, labels = digits.train_images, digits.train_labels
    more = model.widths[0] - images.shape[1]
    if more < 0 or digits.num_classes > model.widths[-1] or model.batch > len(images):
        return None

    def batches() -> Iterator[Batch]:
        while True:
            for rows in torch.randperm(len(images)).split(model.batch):
                if len(rows) == model.batch:
                    yield F.pad(images[rows], (0, more)), labels[rows]

    return batches()


def _points(model: Model, device: Device = "cpu") -> Iterator[Batch]:
    inputs, outputs = model.widths[0], model.widths[-1]
    centres = torch.randn(outputs, inputs, device=device) * _DISTANCE / (2 * inputs) ** 0.5
    while True:
        classes = torch.randint(0, outputs, (model.batch,), device=device)
        yield centres[classes] + torch.randn(model.batch, inputs, device=device), classes
