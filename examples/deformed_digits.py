"""Digits that are deformed anew in each step, with different rules side by side: the task of Ciresan et al. (2010).

    python examples/deformed_digits.py --data FOLDER --rules dense rows global noise --steps 2000
    python examples/deformed_digits.py --hidden 2000 1500 1000 500 --rules dense noise --seconds 300 --seeds 0 1 2

FOLDER has the four files of MNIST; without --data it is found or downloaded as `meprop data mnist` does. Each digit is
29 x 29 pixels from -1 (background) to 1. Its deformation is drawn anew for each step: an elastic field, a rotation or a
shear, and a scale for each axis. A run never sees a digit twice. The learning rate falls to zero over the steps, or
over the seconds of training if --seconds is given, to compare at equal time. Deforming is in no run's seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meprop
from meprop.tasks.deform import STRENGTHS, deform
from meprop.tasks.digits import DigitsConfig, load

RULES: dict[str, meprop.Rule | None] = {
    "dense": None,
    "rows": meprop.TopK(0.04),
    "rows-exact": meprop.TopK(0.04, exact_sum=True),
    "global": meprop.TopK(0.04, scope="global"),
    "global-exact": meprop.TopK(0.04, scope="global", exact_sum=True),
    "drawn": meprop.Sampled(0.04),
    "noise": meprop.Sampled(noise=0.25),
    "noise-sum-left": meprop.Sampled(noise=0.25, exact_sum=False),
    "noise-1": meprop.Sampled(noise=1.0),
}
Data = dict[str, tuple[Tensor, Tensor]]


def train(rule: meprop.Rule | None, seed: int, options: argparse.Namespace, data: Data) -> dict[str, float]:
    """Train one net, and return its errors in per cent, its seconds and what was kept."""
    torch.manual_seed(seed)
    widths = [data["train"][0].shape[1], *options.hidden, 10]
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    if rule is not None:
        meprop.convert(model, rule, when=options.when)
    optimizer = torch.optim.Adam(model.parameters(), options.lr, fused=True)
    generator = torch.Generator().manual_seed(seed)
    (digits, labels), seconds, step, backward = data["train"], 0.0, 0, 0.0
    while (done := step / options.steps if options.seconds is None else seconds / options.seconds) < 1:
        chosen = torch.randint(len(digits), (options.batch,), generator=generator)
        images = digits[chosen].view(-1, 29, 29)
        batch = deform(images, labels[chosen], STRENGTHS["paper"], generator).flatten(1)
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = options.lr * (1 + math.cos(math.pi * done)) / 2
        loss = F.cross_entropy(model(batch), labels[chosen])
        middle = time.perf_counter()
        loss.backward()
        backward += time.perf_counter() - middle
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - start
        step += 1
    found = {split: errors(model, *data[split]) for split in ("dev", "test")}
    densities = [layer.density for layer in meprop.report(model).layers if layer.status == "sparse"]
    density = mean(densities) if densities else 1.0
    return {**found, "seed": seed, "steps": step, "seconds": seconds, "backward": backward, "density": density}


@torch.no_grad()
def errors(model: nn.Module, digits: Tensor, labels: Tensor) -> float:
    """Per cent of the digits, not deformed, that are taken for others."""
    right = [model(part).argmax(1) == truth for part, truth in zip(digits.split(1000), labels.split(1000), strict=True)]
    return 100 * (1 - torch.cat(right).float().mean().item())


def line(name: str, runs: list[dict[str, float]]) -> str:
    """A line of the table: means over the runs, and the spread of the errors."""

    def average(key: str, digits: int = 0) -> str:
        values = [run[key] for run in runs]
        spread = f" ± {stdev(values):.{digits}f}" if digits and len(values) > 1 else ""
        return f"{mean(values):.{digits}f}{spread}"

    kept = f"{mean(run['density'] for run in runs):.1%}"
    return (
        f"{name:<15} dev {average('dev', 2)}% test {average('test', 2)}% wrong   kept {kept:>6}   "
        f"{average('steps')} steps in {average('seconds')} s, backward {average('backward')} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of MNIST's four files")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=["dense", "rows", "global", "noise"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[1000, 500])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seconds", type=float, help="train so long instead")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--when", choices=["always", "auto"], default="always")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    splits = load(DigitsConfig(options.data))
    data = {
        "train": (splits.train_images, splits.train_labels),
        "dev": (splits.dev_images, splits.dev_labels),
        "test": (splits.test_images, splits.test_labels),
    }
    runs: dict[str, list[dict[str, float]]] = {}
    for name in options.rules:
        runs[name] = [train(RULES[name], seed, options, data) for seed in options.seeds]
        print(line(name, runs[name]), flush=True)
    if options.out is not None:
        settings = {**vars(options), "data": None, "out": None}
        options.out.write_text(json.dumps({"settings": settings, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
