"""Models to be pruned, the places of their units, and a step of training."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import meprop

RULE = meprop.TopK(5)


WIDTH = 24


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scaled, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        y = torch.tanh(self.block(h)) * 0.5
        y += h
        return self.head(y + self.scaled(y).sigmoid())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, WIDTH), nn.Linear(6, 30), nn.Linear(WIDTH + 30, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x).relu(), F.gelu(self.right(x))], dim=-1))


class Packed(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, WIDTH, **options)
        self.head = nn.Linear(WIDTH * (2 if self.lstm.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.tensor([4, 4, 2]))
        output, _ = self.lstm(packed)
        return self.head(pad_packed_sequence(output)[0])


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.below, self.lstm, self.head = nn.Linear(6, WIDTH), nn.LSTM(WIDTH, WIDTH, 2), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.lstm(F.elu(self.below(x)))
        return self.head(h[-1])


class ConvResidual(nn.Module):
    """Two convolutions added, and a third one; pooled, concatenated, flattened, and read by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.third, self.norm = nn.Conv2d(WIDTH, 30, 2, bias=False), nn.BatchNorm2d(30)
        self.head = nn.Linear((WIDTH + 30) * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout2d(F.max_pool2d(self.first(x).relu(), 2), 0.0)
        h = h + self.second(h)
        deep = F.adaptive_avg_pool2d(self.norm(self.third(h)), 2)
        return self.head(torch.flatten(torch.cat([F.avg_pool2d(h, 2), deep], dim=1), 1))


Places = list[tuple[str, int, list[int], int]]


@dataclass(frozen=True)
class Case:
    """A model, and for each set of units where they are.

    That is: tensor, dimension, the places of the first unit's first entry, and how many adjacent entries each unit has.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    places: dict[str, Places]
    rule: meprop.Rule = RULE
    # Batch normalisation takes the bias before it out again: Adam would blow up what rounding leaves of its gradient.
    optimizer: str = "adam"


def rows(*tensors: str) -> Places:
    return [(tensor, 0, [0], 1) for tensor in tensors]


def of_linear(name: str) -> Places:
    return rows(f"{name}.weight", f"{name}.bias")


def of_norm(name: str) -> Places:
    return [*of_linear(name), *rows(f"{name}.running_mean", f"{name}.running_var")]


def of_lstm(place: str) -> Places:
    gates = [gate * WIDTH for gate in range(4)]
    tensors = [f"lstm.{tensor}_{place}" for tensor in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    return [*((tensor, 0, gates, 1) for tensor in tensors), (f"lstm.weight_hh_{place}", 1, [0], 1)]


def reads(tensor: str, start: int = 0, positions: int = 1) -> tuple[str, int, list[int], int]:
    return (tensor, 1, [start], positions)


CASES = {
    "stack": Case(
        lambda: nn.Sequential(
            *(nn.Linear(6, WIDTH), nn.ReLU(), nn.Dropout(0.0)),
            *(nn.Linear(WIDTH, 30), nn.Sigmoid(), nn.Linear(30, 3)),
        ),
        (8, 6),
        {"0": [*of_linear("0"), reads("3.weight")], "3": [*of_linear("3"), reads("5.weight")]},
    ),
    "batch norm": Case(
        lambda: nn.Sequential(nn.Linear(6, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)),
        (8, 6),
        {
            "0": [*of_linear("0"), *of_norm("1"), reads("3.weight")],
        },
        optimizer="momentum",
    ),
    "convolutions": Case(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, WIDTH, 3, stride=2), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Dropout2d(0.0)),
            *(nn.Conv2d(WIDTH, 30, (2, 1)), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(30 * 4, 3)),
        ),
        (8, 3, 11, 9),
        {
            "0": [*of_linear("0"), *of_norm("1"), reads("4.weight")],
            "4": [*of_linear("4"), reads("8.weight", positions=4)],
        },
        meprop.TopK(5, scope="batch"),
        "momentum",
    ),
    "convolutions in one dimension": Case(
        lambda: nn.Sequential(
            *(nn.Conv1d(3, WIDTH, 3), nn.BatchNorm1d(WIDTH), nn.GELU(), nn.AvgPool1d(2)),
            *(nn.Conv1d(WIDTH, WIDTH, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(1), nn.Linear(WIDTH, 3)),
        ),
        (8, 3, 14),
        {
            "0": [*of_linear("0"), *of_norm("1"), reads("4.weight")],
            "4": [*of_linear("4"), reads("7.weight")],
        },
        meprop.TopK(5, scope="batch"),
        "momentum",
    ),
    "convolutions in a sum": Case(
        ConvResidual,
        (8, 3, 8, 8),
        {
            "first": [
                *(*of_linear("first"), *of_linear("second"), reads("second.weight"), reads("third.weight")),
                reads("head.weight", positions=4),
            ],
            "third": [*rows("third.weight"), *of_norm("norm"), reads("head.weight", WIDTH * 4, positions=4)],
        },
        meprop.TopK(5, scope="batch"),
    ),
    "residual": Case(
        Residual,
        (8, 6),
        {
            "first": [
                *(*of_linear("first"), *of_linear("block"), *of_linear("scaled")),
                *(reads("block.weight"), reads("scaled.weight"), reads("head.weight")),
            ]
        },
    ),
    "branches": Case(
        Branches,
        (8, 6),
        {
            "left": [*of_linear("left"), reads("head.weight")],
            "right": [*of_linear("right"), reads("head.weight", WIDTH)],
        },
    ),
    "lstm": Case(Packed, (4, 3, 6), {"lstm": [*of_lstm("l0"), reads("head.weight")]}),
    "stacked, bidirectional lstm": Case(
        lambda: Packed(num_layers=2, bidirectional=True),
        (4, 3, 6),
        {
            "lstm.l0": [*of_lstm("l0"), reads("lstm.weight_ih_l1"), reads("lstm.weight_ih_l1_reverse")],
            "lstm.l0_reverse": [
                *of_lstm("l0_reverse"),
                *(reads("lstm.weight_ih_l1", WIDTH), reads("lstm.weight_ih_l1_reverse", WIDTH)),
            ],
            "lstm.l1": [*of_lstm("l1"), reads("head.weight")],
            "lstm.l1_reverse": [*of_lstm("l1_reverse"), reads("head.weight", WIDTH)],
        },
    ),
    "last state": Case(
        LastState,
        (4, 3, 6),
        {
            "below": [*of_linear("below"), reads("lstm.weight_ih_l0")],
            "lstm.l0": [*of_lstm("l0"), reads("lstm.weight_ih_l1")],
            "lstm.l1": [*of_lstm("l1"), reads("head.weight")],
        },
    ),
}


def make(
    case: Case, dtype: torch.dtype = torch.float64, rule: meprop.Rule | None = None, **options
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = case.make().to(dtype)
    meprop.convert(model, rule or case.rule, min_features=10, when="always", **options)
    return model, torch.randn(case.shape, dtype=dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """A step; the gradients stay. The loss is returned, and keeps its graph alive, as it does in many loops."""
    optimizer.zero_grad()
    loss = (model(x) - 1).square().sum()
    loss.backward()
    optimizer.step()
    return loss


def alive_units(simplifier: meprop.Simplifier) -> dict[str, Tensor]:
    return {label: (~share.isnan()).nonzero().flatten() for label, share in simplifier.activity.items()}


class Calls(nn.Module):
    """Two layers and a head, with a forward pass of one's choice."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        for name, module in modules.items():
            self.add_module(name, module)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def quietly(model: nn.Module, **options) -> meprop.Simplifier:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", meprop.NoEffectWarning)
        return meprop.Simplifier(model, 1.0, **options)
