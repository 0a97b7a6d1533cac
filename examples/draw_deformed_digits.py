"""Draw digits beside their deformations: `python examples/draw_deformed_digits.py digits.png --data FOLDER`.

The picture has a column for each class. The first row is the digit as it is. Below it are rows for each strength, in
the order of `meprop.tasks.deform.STRENGTHS`. FOLDER has the four files of MNIST; see `meprop data mnist -h`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib import pyplot as plt

from meprop.tasks.deform import STRENGTHS, deform
from meprop.tasks.digits import DigitsConfig, load


def picture(data: Path | None, rows: int = 3) -> torch.Tensor:
    """One image ``[H, W]`` of all digits, `rows` for each strength."""
    digits = load(DigitsConfig(data))
    labels = torch.arange(digits.num_classes)
    first = [int((digits.train_labels == label).nonzero()[0]) for label in labels]
    images = digits.train_images[first].view(-1, *digits.image_shape)
    generator = torch.Generator().manual_seed(0)
    deformed = [deform(images, labels, each, generator) for each in STRENGTHS.values() for _ in range(rows)]
    return torch.cat([torch.cat([*row], dim=1) for row in [images, *deformed]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument("--data", type=Path, help="the folder of MNIST's four files")
    options = parser.parse_args()
    plt.imsave(options.out, -picture(options.data).repeat_interleave(2, 0).repeat_interleave(2, 1), cmap="gray")


if __name__ == "__main__":
    main()
