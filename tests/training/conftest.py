"""A task so small that an epoch takes milliseconds; dropout makes the random state matter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F


class TinyTask:
    name = "tiny"
    metric = "accuracy"
    steps_per_epoch = 8

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.inputs_NI = torch.randn(80, 6, generator=generator)
        self.classes_N = (self.inputs_NI[:, 0] > 0).long()
        self.seen: list[torch.Tensor] = []

    def build_model(self):
        return nn.Sequential(nn.Linear(6, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 2))

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


@pytest.fixture
def task():
    return TinyTask()
