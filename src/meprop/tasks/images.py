"""What tasks that tell images apart have in common: the splits of the data, batches, loss and accuracy."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meprop.training.task import DataTask

T = TypeVar("T")


@dataclass(frozen=True)
class Digits:
    """Images ``[N, H * W]``, float32, and labels ``[N]``, int64, of the three splits."""

    train_images: Tensor
    train_labels: Tensor
    dev_images: Tensor
    dev_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    """The largest label of any split, plus one."""
    image_shape: tuple[int, int]
    """Height and width."""
    test_digest: str
    """Of the test images and labels, as their files have them."""

    def __str__(self) -> str:
        height, width = self.image_shape
        return (
            f"{len(self.train_images)} training, {len(self.dev_images)} development, {len(self.test_images)} test "
            f"images of {height} x {width} pixels in {self.num_classes} classes"
        )


class ImageTask(DataTask):
    """A task without its model.

    Args:
        data: The splits.
        batch_size: Images per training step.
    """

    metric = "accuracy"

    def __init__(self, data: Digits, batch_size: int) -> None:
        self.data = data
        self.batch_size = batch_size

    @property
    def fingerprint(self) -> str:
        """A digest of the images and labels."""
        return digest_of(str(self.data), *(part for part in vars(self.data).values() if isinstance(part, Tensor)))

    @property
    def example_inputs(self) -> tuple[Tensor]:
        """The first image ``[1, H * W]``."""
        return (self.data.train_images[:1],)

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch, a smaller last one included."""
        return math.ceil(len(self.data.train_images) / self.batch_size)

    def train_batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch of batches, images ``[B, H * W]`` and labels ``[B]``, in an order drawn from a generator.

        Args:
            generator: on the CPU.
        """
        order = torch.randperm(len(self.data.train_images), generator=generator)
        for start in range(0, len(order), self.batch_size):
            index = order[start : start + self.batch_size]
            yield self.data.train_images[index], self.data.train_labels[index]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy of a batch that is on the model's device."""
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Literal["dev", "test"]) -> dict[str, float]:
        """Return ``accuracy`` in percent and ``loss``, the mean cross-entropy, of a split; in evaluation mode."""
        count, correct, loss = 0, 0.0, 0.0
        for logits, labels in self.outputs(model, split):
            count += len(labels)
            correct += (logits.argmax(1) == labels).sum().item()
            loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
        return {"accuracy": 100 * correct / count, "loss": loss / count}

    @torch.no_grad()
    def outputs(self, model: nn.Module, split: Literal["dev", "test"]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a model's outputs ``[B, C]`` and the labels ``[B]`` of a split, in its order, on the model's device.

        The model is in evaluation mode until the last of them.
        """
        if split == "dev":
            images, labels = self.data.dev_images, self.data.dev_labels
        else:
            images, labels = self.data.test_images, self.data.test_labels
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        try:
            for part, target in zip(images.split(1000), labels.split(1000), strict=True):
                yield model(part.to(device)), target.to(device)
        finally:
            model.train(training)


def digest_of(text: str, *tensors: Tensor) -> str:
    """Return a digest of a text and of the numbers of tensors."""
    digest = hashlib.blake2b(text.encode(), digest_size=6)
    for each in tensors:
        digest.update(each.contiguous().numpy().data)
    return digest.hexdigest()


def made_ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """Yield the same items, in the same order, of which up to `count` are made ahead on a second thread.

    Args:
        items: Made on that thread alone, so they may not draw from a generator that others draw from. None of
            them is None, which stands for the end.
        count: How many, 1 or more.
    """
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, None) for _ in range(count))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, items, None))
            yield item
