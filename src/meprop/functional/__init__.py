"""Functions with an exact forward pass and a sparse backward pass, and an activation with dropout in one pass."""

from meprop.functional.activation import activation_dropout
from meprop.functional.conv import conv1d, conv2d
from meprop.functional.linear import linear
from meprop.functional.lstm import lstm

__all__ = ["activation_dropout", "conv1d", "conv2d", "linear", "lstm"]
