"""Layers: subclasses of torch's layers with the same constructors, parameters and state_dict keys."""

from meprop.nn.activation import ActivationDropout, Sequential
from meprop.nn.attention import MultiheadAttention
from meprop.nn.conv import Conv1d, Conv2d
from meprop.nn.linear import Linear
from meprop.nn.lstm import LSTM

__all__ = ["LSTM", "ActivationDropout", "Conv1d", "Conv2d", "Linear", "MultiheadAttention", "Sequential"]
