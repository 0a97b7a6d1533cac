"""Handwritten digits that are deformed anew in each epoch, and deep big multilayer perceptrons that tell them apart.

The task is that of Ciresan, Meier, Gambardella and Schmidhuber (2010, https://arxiv.org/abs/1003.0358). No image comes
twice, so a net of millions of weights cannot learn the images by heart. The nets, the activation, the initial weights
and the deformations are the paper's. The loss is ours, and so are the sizes of batches, the optimizer and its rates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meprop.tasks import mnist
from meprop.tasks.deform import STRENGTHS, deform
from meprop.tasks.images import Digits, ImageTask, made_ahead
from meprop.tasks.widths import normalize_widths

NETS = {
    1: (1000, 500),
    2: (1500, 1000, 500),
    3: (2000, 1500, 1000, 500),
    4: (2500, 2000, 1500, 1000, 500),
    5: (1000,) * 9,
}
"""Widths of the hidden layers of the paper's nets."""
INITIAL = 0.05
"""The paper's initial weights are uniform from minus this to this."""


@dataclass(frozen=True)
class DigitsConfig:
    """What to train on, how it is deformed, and the network.

    Raises:
        ValueError: A setting is out of range; the message says what was got and what is allowed.
    """

    data_dir: Path | None = None
    """Folder of the four idx files, MNIST's or your own. Default: $MEPROP_DATA, then the cache, then a download."""
    net: Literal[1, 2, 3, 4, 5] | None = None
    """Which of the paper's nets. None: net 2, or that of --hidden.
    1: 1000-500.
    2: 1500-1000-500.
    3: 2000-1500-1000-500.
    4: 2500-2000-1500-1000-500.
    5: 9 layers of 1000."""
    hidden: tuple[int, ...] = ()
    """Widths of the hidden layers, instead of those of a net of the paper."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Of the hidden layers: the paper's 1.7159 tanh(0.6666 a), or ReLU."""
    dropout: float = 0.0
    """Probability of dropping a hidden unit, after each hidden layer. The paper has none."""
    initial: Literal["uniform", "torch"] = "uniform"
    """Initial weights and biases: the paper's, uniform from -0.05 to 0.05, or those of torch's layers."""
    deformation: Literal["off", "weak", "paper", "strong"] = "paper"
    """How strongly the training images are deformed: not at all, half as strongly as in the paper, as there, or as at
    the strongest end of the paper's ranges."""
    digit_width: int | None = None
    """Width in pixels that each digit is stretched or squeezed to, before it is deformed. None: digits stay as they
    are. Members of a committee can have different ones."""
    batch_size: int = 100
    """Images per training step. The paper has 1."""
    dev_size: int = 5000
    """How many of the training images, the first ones, are kept apart as the development set. With 0 it is the training
    images themselves, not deformed, as in the paper."""
    ahead: int = 0
    """How many batches are deformed ahead on a second thread.
    0: Batches are deformed between the steps. Only the steps are timed.
    1 or more: Where no processor is free, the thread takes time from the steps."""

    def __post_init__(self) -> None:
        if self.hidden and self.net is not None:
            raise ValueError(f"net is {self.net} and hidden is {self.hidden}: each says what the layers are; give one")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden is {self.hidden}: each width must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}: it must be at least 0 and below 1")
        for name, least in (("batch_size", 1), ("dev_size", 0), ("ahead", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} is {value}: it must be at least {least}")
        if self.digit_width is not None and self.digit_width < 1:
            raise ValueError(f"digit_width is {self.digit_width}: it must be at least 1")

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the hidden layers."""
        return self.hidden or NETS[self.net or 2]


def load(config: DigitsConfig) -> Digits:
    """Find, or download, the files, and read images from -1, the background, to 1, with a pixel more on each axis.

    MNIST's digits then have 29 x 29 pixels, as in the paper: a row is added below, and a column on the right.

    Raises:
        DataError: A file is missing or damaged, or the files do not belong together.
        ValueError: ``config.dev_size`` leaves no image to train on, or ``config.digit_width`` is wider than the images.
    """
    digits = mnist.read(config.data_dir, config.dev_size)
    height, width = digits.image_shape

    def prepared(images: Tensor) -> Tensor:
        images = images.view(-1, height, width)
        if config.digit_width is not None:
            images = normalize_widths(images, config.digit_width)
        return F.pad(images * 2 - 1, (0, 1, 0, 1), value=-1.0).flatten(1)

    train = prepared(digits.train_images)
    kept_apart = config.dev_size > 0
    return replace(
        digits,
        train_images=train,
        dev_images=prepared(digits.dev_images) if kept_apart else train,
        dev_labels=digits.dev_labels if kept_apart else digits.train_labels,
        test_images=prepared(digits.test_images),
        image_shape=(height + 1, width + 1),
    )


class ScaledTanh(nn.Module):
    """The paper's activation, 1.7159 tanh(0.6666 a), of a tensor of any shape."""

    def forward(self, a: Tensor) -> Tensor:
        """Return the activation of each number."""
        return 1.7159 * torch.tanh(0.6666 * a)


class DigitsTask(ImageTask):
    """Data, model and metric, for the training loop.

    Args:
        config: What to train on, how it is deformed, and the network.

    Raises:
        DataError: See `load`.
        ValueError: See `load`.
    """

    name = "digits"

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__(load(config), config.batch_size)
        self.config = config

    def build_model(self) -> nn.Sequential:
        """Return a new perceptron ``[N, H * W] -> [N, num_classes]``."""
        layers: list[nn.Module] = []
        for width, following in pairwise((self.data.train_images.shape[1], *self.config.widths)):
            layers += [nn.Linear(width, following), nn.ReLU() if self.config.activation == "relu" else ScaledTanh()]
            if self.config.dropout > 0:
                layers.append(nn.Dropout(self.config.dropout))
        model = nn.Sequential(*layers, nn.Linear(self.config.widths[-1], self.data.num_classes))
        if self.config.initial == "uniform":
            for parameter in model.parameters():
                nn.init.uniform_(parameter, -INITIAL, INITIAL)
        return model

    def train_batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch of batches, images ``[B, H * W]`` and labels ``[B]``, in an order drawn from a generator.

        One number is drawn from it, at the first batch, and all else from a generator with that seed. So its state does
        not depend on how many batches are made ahead, and a run that is resumed sees the same batches.

        Args:
            generator: On the CPU.
        """
        seed = int(torch.randint(2**62, (), generator=generator))
        batches = self._deformed(torch.Generator().manual_seed(seed))
        yield from made_ahead(batches, self.config.ahead) if self.config.ahead else batches

    def _deformed(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in super().train_batches(generator):
            if self.config.deformation != "off":
                strength = STRENGTHS[self.config.deformation]
                images = deform(images.view(-1, *self.data.image_shape), labels, strength, generator).flatten(1)
            yield images, labels
