"""Temporary: what nn/linear.py, nn/conv.py, nn/lstm.py and nn/attention.py are to say of their layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from meprop import nn
from meprop.nn.base import Descriptor, Layout, descriptors, register


class LinearDescriptor(Descriptor[torch.nn.Linear]):
    """Describes `torch.nn.Linear`."""

    plain, sparse = torch.nn.Linear, nn.Linear

    def features(self, layer: torch.nn.Linear) -> tuple[int, int]:
        """Returns I and O."""
        return layer.in_features, layer.out_features

    def unit_sets(self, layer: torch.nn.Linear) -> Sequence[str]:
        """Returns the one set that it makes."""
        return ("",)

    def layouts(self, layer: torch.nn.Linear, outputs: Layout, inputs: Layout) -> dict[str, dict[int, Layout]]:
        """Lays out weight [O, I] and bias [O]."""
        bias = {} if layer.bias is None else {"bias": {0: outputs}}  # pyright: ignore[reportUnnecessaryComparison]
        return {"weight": {0: outputs, 1: inputs}, **bias}

    def resize(self, layer: torch.nn.Linear) -> None:
        """Takes the sizes of the weight."""
        layer.out_features, layer.in_features = layer.weight.shape


Convolution = torch.nn.Conv1d | torch.nn.Conv2d


class ConvDescriptor(Descriptor[Convolution]):
    """Describes `torch.nn.Conv1d` and `torch.nn.Conv2d`."""

    def __init__(self, plain: type[Any], sparse: type[Any]) -> None:
        self.plain, self.sparse = plain, sparse

    def features(self, layer: Convolution) -> tuple[int, int]:
        """Returns the numbers of channels."""
        return layer.in_channels, layer.out_channels

    def feature_dim(self, layer: Convolution) -> int:
        """Returns the dimension of the channels, which is followed by those of space."""
        return 1 - layer.weight.dim()

    def unit_sets(self, layer: Convolution) -> Sequence[str]:
        """Returns the one set that it makes."""
        return ("",)

    def layouts(self, layer: Convolution, outputs: Layout, inputs: Layout) -> dict[str, dict[int, Layout]]:
        """Lays out weight [O, I, *kernel] and bias [O]."""
        bias = {} if layer.bias is None else {"bias": {0: outputs}}
        return {"weight": {0: outputs, 1: inputs}, **bias}

    def resize(self, layer: Convolution) -> None:
        """Takes the sizes of the weight."""
        layer.out_channels, layer.in_channels = layer.weight.shape[:2]


class LSTMDescriptor(Descriptor[torch.nn.LSTM]):
    """Describes `torch.nn.LSTM`."""

    plain, sparse = torch.nn.LSTM, nn.LSTM
    feature_name = "hidden units"

    def features(self, layer: torch.nn.LSTM) -> tuple[int, int]:
        """Returns I and H."""
        return layer.input_size, layer.hidden_size

    def unit_sets(self, layer: torch.nn.LSTM) -> Sequence[str]:
        """Returns one for each layer and direction, in the order of the states, with the suffixes of the weights."""
        suffixes = ("", "_reverse") if layer.bidirectional else ("",)
        return [f"l{number}{suffix}" for number in range(layer.num_layers) for suffix in suffixes]

    def layouts(self, layer: torch.nn.LSTM, outputs: Layout, inputs: Layout) -> dict[str, dict[int, Layout]]:
        """Lays out weights [4 * H, I or H] and biases [4 * H], whose rows are those of four gates."""
        directions = 2 if layer.bidirectional else 1
        layouts: dict[str, dict[int, Layout]] = {}
        for number, (place, group) in enumerate(zip(self.unit_sets(layer), outputs, strict=True)):
            gates, below = (group,) * 4, number // directions * directions
            layouts[f"weight_ih_{place}"] = {0: gates, 1: outputs[below - directions : below] if below else inputs}
            layouts[f"weight_hh_{place}"] = {0: gates, 1: (group,)}
            if layer.bias:
                layouts |= {f"bias_{part}_{place}": {0: gates} for part in ("ih", "hh")}
        return layouts

    def resize(self, layer: torch.nn.LSTM) -> None:
        """Takes the sizes of the first weights."""
        layer.input_size = layer.get_parameter("weight_ih_l0").shape[1]
        layer.hidden_size = layer.get_parameter("weight_hh_l0").shape[1]
        layer.flatten_parameters()


class AttentionDescriptor(Descriptor[torch.nn.MultiheadAttention]):
    """Describes `torch.nn.MultiheadAttention`, whose units are not pruned."""

    plain, sparse = torch.nn.MultiheadAttention, nn.MultiheadAttention

    def features(self, layer: torch.nn.MultiheadAttention) -> tuple[int, int]:
        """Returns E twice."""
        return layer.embed_dim, layer.embed_dim


for _descriptor in (
    LinearDescriptor(),
    ConvDescriptor(torch.nn.Conv1d, nn.Conv1d),
    ConvDescriptor(torch.nn.Conv2d, nn.Conv2d),
    LSTMDescriptor(),
    AttentionDescriptor(),
):
    if all(_descriptor.plain is not each.plain for each in descriptors()):
        register(_descriptor)
