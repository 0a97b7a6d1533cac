"""Deformed digits on a GPU: dense and sparse training of a deep big perceptron for equal times.

    python benchmarks/digits_gpu.py --ways dense "rows 10%" --seconds 60 --seeds 0 1

A CUDA graph has the whole step: the next images, their deformation, the network in bfloat16 under autocast, and Adam.
The clock runs during steps only. The learning rate falls to zero over the time. The errors are looked at 40 times. The
undeformed training images choose one of these epochs, as in the paper. Each run prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import meprop
from meprop.tasks.deform import STRENGTHS, deform
from meprop.tasks.digits import NETS, DigitsConfig, DigitsTask
from meprop.training import tracking

WAYS: dict[str, meprop.Rule | None] = {
    "dense": None,
    "rows 33%": meprop.Sampled(1 / 3, scope="rows"),
    "rows 10%": meprop.Sampled(0.1, scope="rows"),
    "unified 4%": meprop.TopK(0.04, scope="batch"),
}
HIDDEN = (2504, 2000, 1504, 1000, 504)
"""Widths of the paper's net 4, rounded up to multiples of eight: products of other widths are slow on a GPU."""
LOOKS = 40
"""How often a run looks at its errors."""


def pad(task: DigitsTask) -> None:
    """Puts zeros behind each image, up to a multiple of eight: products of 841 columns are slow on a GPU."""
    missing = -task.data.train_images.shape[1] % 8
    train, test = (F.pad(images, (0, missing)) for images in (task.data.train_images, task.data.test_images))
    task.data = replace(task.data, train_images=train, test_images=test)


class Run:
    """One network in training, all of it on the GPU."""

    def __init__(self, way: str, task: DigitsTask, seed: int, lr: float) -> None:
        torch.manual_seed(seed)
        data = task.data
        self.train, self.labels, self.test, self.test_labels = (
            each.cuda() for each in (data.train_images, data.train_labels, data.test_images, data.test_labels)
        )
        self.shape, self.batch = data.image_shape, task.config.batch_size
        self.strength = STRENGTHS[task.config.deformation]
        self.model = task.build_model().cuda()
        if (rule := WAYS[way]) is not None:
            meprop.convert(self.model, rule, when="always")
        self.first_lr, self.lr = lr, torch.tensor(lr, device="cuda")
        self.optimizer = torch.optim.Adam(self.model.parameters(), self.lr, fused=True, capturable=True)
        self.order = torch.randperm(len(self.train), device="cuda")
        self.place = torch.zeros((), dtype=torch.long, device="cuda")
        self.steps_of_epoch = len(self.train) // self.batch
        self.replay = self._captured()

    def _step(self) -> None:
        chosen = self.order[self.place + torch.arange(self.batch, device="cuda")]
        self.place += self.batch
        images, labels = self.train[chosen], self.labels[chosen]
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        width, pixels = images.shape[1], math.prod(self.shape)
        images = deform(images[:, :pixels].view(-1, *self.shape), labels, self.strength, generator).flatten(1)
        images = F.pad(images, (0, width - pixels))
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = F.cross_entropy(self.model(images).float(), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _captured(self) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(4):
                self._step()
                self.place.zero_()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    def epoch(self, share: float) -> float:
        """The seconds of an epoch, at this share of the whole time."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self.lr.fill_(self.first_lr * (1 + math.cos(math.pi * share)) / 2)
        self.order.copy_(torch.randperm(len(self.train), device="cuda"))
        self.place.zero_()
        for _ in range(self.steps_of_epoch):
            self.replay()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    @torch.no_grad()
    def errors(self) -> tuple[float, float]:
        """Shares in percent of training images, not deformed, and of test images that are wrong."""
        return tuple(
            100 * (self.model(images).argmax(1) != labels).double().mean().item()
            for images, labels in ((self.train, self.labels), (self.test, self.test_labels))
        )


def run(way: str, task: DigitsTask, seed: int, seconds: float, lr: float) -> dict[str, Any]:
    """The record of one run."""
    one = Run(way, task, seed, lr)
    spent, epochs, looks = 0.0, 0, []
    while spent < seconds:
        spent += one.epoch(spent / seconds)
        epochs += 1
        if spent >= seconds * (len(looks) + 1) / LOOKS or spent >= seconds:
            looks.append((round(spent, 2), *one.errors()))
    best = min(looks, key=lambda look: (look[1], -look[0]))
    return {
        "way": way,
        "seed": seed,
        "hidden": task.config.widths,
        "deformation": task.config.deformation,
        "batch_size": task.config.batch_size,
        "seconds": spent,
        "epochs": epochs,
        "step_us": 1e6 * spent / epochs / one.steps_of_epoch,
        "chosen": best,
        "last": looks[-1],
        "looks": looks,
        "lr": lr,
        "activation": task.config.activation,
        "initial": task.config.initial,
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": tracking.commit(),
    }


def main() -> None:
    """Trains each way with each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=["dense", "rows 10%"], choices=WAYS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of steps, for each run")
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--net", type=int, choices=NETS, help="one of the paper's")
    network.add_argument("--hidden", type=int, nargs="+", default=HIDDEN, help="default: the widths of net 4, rounded")
    parser.add_argument("--batch-size", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--activation", default="relu", choices=["relu", "tanh"])
    parser.add_argument("--initial", default="torch", choices=["torch", "uniform"])
    parser.add_argument("--deformation", default="paper", choices=STRENGTHS)
    parser.add_argument("--data", type=Path)
    chosen = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # of the deformations too
    config = DigitsConfig(
        chosen.data,
        hidden=NETS[chosen.net] if chosen.net else tuple(chosen.hidden),
        activation=chosen.activation,
        initial=chosen.initial,
        deformation=chosen.deformation,
        batch_size=chosen.batch_size,
        dev_size=0,
    )
    task = DigitsTask(config)
    if not 1 <= config.batch_size <= len(task.data.train_images):
        parser.error(f"--batch-size {config.batch_size}: give 1 to {len(task.data.train_images)}")
    pad(task)
    for seed in chosen.seeds:
        for way in chosen.ways:
            print(json.dumps(run(way, task, seed, chosen.seconds, chosen.lr)), flush=True)


if __name__ == "__main__":
    main()
