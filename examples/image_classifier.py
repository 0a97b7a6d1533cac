"""A convolutional network that tells digits apart, dense and sparse side by side: plain PyTorch, one line of meprop.

    python examples/image_classifier.py --k 0.1 --epochs 2

The images are MNIST, which is downloaded if need be, or those of another folder in its file format (--data). Every
layer but the last keeps k of its channels, or features, for the whole batch. Needs meprop[tasks].
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import meprop
from meprop.tasks.mnist import Digits, MnistConfig, load


def network(digits: Digits) -> nn.Sequential:
    height, width = digits.image_shape
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128 * (height // 4) * (width // 4), 256),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(256, digits.num_classes),
    )


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Percent of the test images."""
    model.eval()
    images_NCHW = digits.test_images.view(-1, 1, *digits.image_shape)
    parts = zip(images_NCHW.split(500), digits.test_labels.split(500), strict=True)
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in parts)
    model.train()
    return 100 * right / len(digits.test_labels)


def train(name: str, digits: Digits, options: argparse.Namespace) -> str:
    torch.manual_seed(options.seed)
    model = network(digits).to(memory_format=torch.channels_last)
    if name == "sparse":
        print(meprop.convert(model, meprop.TopK(options.k, scope="batch"), when=options.when))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    images_NCHW, count = digits.train_images.view(-1, 1, *digits.image_shape), len(digits.train_labels)
    steps = options.steps or options.epochs * -(-count // options.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    losses: list[float] = []
    seconds: list[float] = []
    order: list[Tensor] = []
    for _ in range(steps):
        order = order or list(torch.randperm(count).split(options.batch))
        index = order.pop()
        x, y = images_NCHW[index], digits.train_labels[index]
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        schedule.step()
        losses.append(loss.item())
    last = losses[-100:]
    found = f"loss {sum(last) / len(last):.4f}   {1000 * median(seconds):.1f} ms a step"
    return f"{name:8} {found}   {accuracy(model, digits):.2f}% of the test images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of four files in MNIST's format")
    parser.add_argument("--k", type=float, default=0.1, help="a share of the channels")
    parser.add_argument("--when", choices=["always", "auto"], default="always")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, help="train so many instead")
    parser.add_argument("--batch", type=int, default=50, help="images")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    digits = load(MnistConfig(data_dir=options.data, dev_size=1))  # as nothing is chosen by a development set
    print("\n".join([train(name, digits, options) for name in ("dense", "sparse")]))


if __name__ == "__main__":
    main()
