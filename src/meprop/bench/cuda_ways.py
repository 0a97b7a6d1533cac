"""The ways of doing a training step that `meprop bench step --device cuda` times, all with Adam.

Here is what they are, how one does a step, and what it cannot avoid.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meprop
from meprop import optim
from meprop.bench.perceptron import Batch, Model
from meprop.bench.problem import rule_of_rows
from meprop.bench.roofline import Work
from meprop.bench.ways import Way

Precision = Literal["bf16", "autocast", "tf32"]
"""Weights in bfloat16; float32 weights under autocast to bfloat16; float32 weights with products in TF32."""

BASELINES = ("dense bf16", "dense autocast", "dense tf32")

SHARE_OF_ROWS = 1 / 3
_MOMENTS = 2  # Adam's
_BYTES: dict[Precision, tuple[int, int]] = {"bf16": (2, 2), "autocast": (4, 2), "tf32": (4, 4)}  # a weight, a factor
_LEAST_FEATURES = 128  # of a layer that `meprop.convert` converts


@dataclass(frozen=True)
class CardWay(Way):
    """A way of doing the step on a card.

    Attributes:
        precision: Of weights and products.
    """

    precision: Precision = "tf32"

    @property
    def is_narrow(self) -> bool:
        """Whether products have fewer bits than those of float32: all on a card, with TF32 too."""
        return True

    @property
    def chooses_otherwise(self) -> bool:
        """Whether other columns than the oracle's may be chosen: output gradients are in bfloat16 too."""
        return self.sparse_rows is not None


def ways(k: int | float) -> list[CardWay]:
    """Return the baselines, then the sparse ways, with weights in bfloat16 and under autocast.

    Entries by row are left out. Plain torch operations serve them on a card, which is slower than dense.

    Args:
        k: The count, or share, of the columns that unified top-k keeps.
    """
    precisions: tuple[Precision, ...] = ("bf16", "autocast", "tf32")
    found = [CardWay(f"dense {each}", None, each != "tf32", precision=each) for each in precisions]
    modes: tuple[optim.SparseRows, ...] = ("exact", "decay", "lazy")
    for each in precisions[:2]:
        unified = meprop.TopK(k, scope="batch")
        found += [CardWay(f"unified {each} {mode}", unified, True, mode, precision=each) for mode in modes]
        found.append(CardWay(f"rows {each}", rule_of_rows(SHARE_OF_ROWS), True, precision=each))
    return found


class CardStepper:
    """One way of doing the step, with one batch again and again.

    Args:
        way: It.
        network: A dense network of float32 on the device; the steps are those of a copy.
        batch: On the device.
    """

    def __init__(self, way: CardWay, network: nn.Module, batch: Batch) -> None:
        self.way = way
        self.network = deepcopy(network)
        self._batch = batch
        if way.precision == "bf16":
            self.network.bfloat16()
        if way.rule is not None:
            meprop.convert(self.network, way.rule, sparse_grad=way.sparse_rows is not None, when="always")
        self.optimizer: torch.optim.Optimizer
        parameters, mode = list(self.network.parameters()), way.sparse_rows
        capturable = parameters[0].is_cuda
        if mode is None:
            self.optimizer = torch.optim.Adam(parameters, lr=0.0, capturable=capturable, fused=True)
        else:
            self.optimizer = optim.Adam(parameters, lr=0.0, capturable=capturable, sparse_rows=mode)

    def loss(self, x: Tensor, classes: Tensor) -> Tensor:
        """Return the loss of a batch, whose inputs are float32."""
        x = x.to(next(self.network.parameters()).dtype)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.way.precision == "autocast"):
            return F.cross_entropy(self.network(x).float(), classes)

    def run(self) -> None:
        """Do one step."""
        self.loss(*self._batch).backward()  # pyright: ignore[reportUnknownMemberType]
        self.optimizer.step()
        self.optimizer.zero_grad()


def work_of(way: CardWay, model: Model) -> Work:
    """Count the multiply-adds of a step, and the bytes that it cannot avoid to move if no cache keeps anything.

    Both passes read the weights, the backward pass those that the gradients of inputs need. Activations are touched
    once in each pass. Gradients are written and read. Weights and moments that are updated are read and written. Layers
    of less than 128 features are dense (`meprop.convert`).
    """
    weight, factor = _BYTES[way.precision]
    examples = model.batch
    multiply_adds = moved = 0
    for place, (inputs, outputs) in enumerate(zip(model.widths, model.widths[1:], strict=False)):
        rows, share = outputs, 1.0
        if way.rule is not None and outputs >= _LEAST_FEATURES:
            if way.sparse_rows is None:
                share = SHARE_OF_ROWS
            else:
                rows = way.rule.count(outputs) or outputs
        products = 1 if place == 0 else 2
        multiply_adds += examples * inputs * outputs + round(share * examples) * inputs * rows * products
        gradients = weight * (rows * inputs + outputs)
        updated = weight * (inputs + 1) * outputs if way.sparse_rows in (None, "exact") else gradients
        moved += weight * (inputs + 1) * outputs + factor * rows * inputs * (products - 1)
        moved += 2 * gradients + 2 * (1 + _MOMENTS) * updated
    return Work(multiply_adds, 0, moved + 2 * factor * examples * sum(model.widths))
