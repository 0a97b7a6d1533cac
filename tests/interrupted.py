"""Small files of MNIST's format, and an interruption at a checkpoint."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import torch

from meprop.training import checkpoint


def write_mnist(folder: Path, count: int, *, packed: bool) -> Path:
    """`count` and 30 images of 4 x 4 pixels in 3 classes, told apart by a bright row."""
    generator = torch.Generator().manual_seed(0)
    for prefix, number in (("train", count), ("t10k", 30)):
        classes = torch.arange(number) % 3
        images = torch.randint(0, 100, (number, 4, 4), generator=generator)
        images[torch.arange(number), classes] += 150
        contents = {
            "images-idx3": struct.pack(">4I", 0x803, number, 4, 4) + bytes(images.flatten().tolist()),
            "labels-idx1": struct.pack(">2I", 0x801, number) + bytes(classes.tolist()),
        }
        for kind, content in contents.items():
            path = folder / f"{prefix}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return folder


class Stop:
    """Ctrl-C after so many saved checkpoints. A group of runs saves one for each of them."""

    def __init__(self, monkeypatch, saves):
        self._save, self._left = checkpoint.save, saves
        monkeypatch.setattr(checkpoint, "save", self)

    def __call__(self, *arguments):
        self._save(*arguments)
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt
