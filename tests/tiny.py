"""A task so small that an epoch takes milliseconds; dropout makes the random state matter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from meprop.training.task import DataTask


@dataclass(frozen=True)
class TinyConfig:
    data_dir: Path | None = None
    hidden: tuple[int, ...] = (128,)
    dropout: float = 0.3

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: it must be at least 0 and below 1")


class TinyTask(DataTask):
    name = "tiny"
    metric = "accuracy"
    steps_per_epoch = 8
    fingerprint = "1a2b3c"

    def __init__(self, config: TinyConfig = TinyConfig()):
        self.config = config
        generator = torch.Generator().manual_seed(1)
        self.inputs_NI = torch.randn(80, 6, generator=generator)
        self.classes_N = (self.inputs_NI[:, 0] > 0).long()
        self.seen: list[torch.Tensor] = []

    @property
    def example_inputs(self):
        return (self.inputs_NI[:1],)

    def build_model(self):
        layers: list[nn.Module] = []
        width = 6
        for hidden in self.config.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(self.config.dropout)]
            width = hidden
        return nn.Sequential(*layers, nn.Linear(width, 2))

    def train_batches(self, generator):
        for index in torch.randperm(80, generator=generator).split(10):
            self.seen.append(index)
            yield self.inputs_NI[index], self.classes_N[index]

    def loss(self, model, batch):
        inputs_NI, classes_N = batch
        return F.cross_entropy(model(inputs_NI), classes_N)

    @torch.no_grad()
    def evaluate(self, model, split):
        model.eval()
        half = slice(0, 40) if split == "dev" else slice(40, 80)
        logits = model(self.inputs_NI[half])
        model.train()
        hits = (logits.argmax(1) == self.classes_N[half]).float().mean().item()
        return {"accuracy": 100 * hits, "loss": F.cross_entropy(logits, self.classes_N[half]).item()}
