"""Functions with an exact forward pass and a sparse backward pass."""

from meprop.functional.conv import conv1d, conv2d
from meprop.functional.linear import linear
from meprop.functional.lstm import lstm

__all__ = ["conv1d", "conv2d", "linear", "lstm"]
