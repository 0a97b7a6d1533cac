"""Weights in bfloat16, which an optimizer's step writes beside them, for the forward passes that come after it.

A layer that forms its forward product in bfloat16 asks for its weight by `cast`. From then on a step with
``copy_dtype=torch.bfloat16`` keeps a copy of the weight by `kept` and `written`. `cast` returns that copy while it is
known to be the weight's. After any other change of the weight it makes a cast, as without such an optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from meprop.ops.optimizer import is_large
from meprop.ops.registry import PLAIN, in_graph

_PLACES = 64
"""How many entries of a weight are compared with its copy before each use. They are others after each step."""


@dataclass
class _Copy:
    dtype: torch.dtype
    """What the layer has asked for."""
    values: Tensor | None = None
    """None as long as no step has kept it."""
    version: int = 0
    """Torch's count of the weight's changes, as of when the copy was made or written."""
    address: int = 0
    """That of the weight's memory, which ``weight.data = other`` exchanges without counting."""
    in_step: bool = False
    """Whether a step has asked for the values, and has not yet written them."""
    used: bool = True
    """Whether a layer has asked for the weight since the last step."""

    def of(self, weight: Tensor) -> Tensor | None:
        """The values, if they are those of the weight."""
        if self.values is None:
            return None
        if (weight._version, weight.data_ptr(), weight.shape) != (self.version, self.address, self.values.shape):
            return None
        if not weight.is_contiguous():
            return None
        step = max(1, weight.numel() // _PLACES)
        places = slice(self.version % step, None, step)
        of_weight, of_copy = (each.detach().view(-1)[places] for each in (weight, self.values))
        return self.values if torch.equal(of_weight.to(self.dtype), of_copy) else None


_copies = WeakIdKeyDictionary()
"""What is kept for each large weight that a layer has asked for."""


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`: its copy, if an optimizer keeps one that is the weight's, else a cast.

    It is always a cast within a graph, for subclasses of torch's tensor, and on other devices than the CPU.

    Args:
        weight: The weight.
        dtype: Of the forward product.
    """
    narrows = weight.dtype is torch.float32 and dtype is torch.bfloat16
    if not narrows or in_graph() or type(weight) not in PLAIN or not weight.is_cpu or not is_large(weight.numel()):
        return weight.to(dtype)
    copy: _Copy | None = _copies.get(weight)
    values = None if copy is None or copy.dtype is not dtype else copy.of(weight)
    if copy is not None and values is not None:
        copy.used = True
        return values
    _copies[weight] = _Copy(dtype)  # asked for, and nothing is kept that would be wrong
    return weight.to(dtype)


def kept(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The copy for a step to write to, with the values that the weight has before.

    It is None if no layer has asked for one since the last step, such as after `meprop.revert`.

    Args:
        weight: The weight.
        dtype: Of the copy.
    """
    copy: _Copy | None = _copies.get(weight)
    if copy is None or copy.dtype is not dtype or not weight.is_contiguous():
        return None
    if not copy.used:
        del _copies[weight]
        return None
    if copy.of(weight) is None:
        copy.values = weight.detach().to(dtype, copy=True)
    copy.in_step = True
    return copy.values


def written(weight: Tensor) -> None:
    """Notes that a step has changed the weight, and alike what `kept` has returned, if it has asked for that."""
    copy: _Copy | None = _copies.get(weight)
    if copy is not None and copy.in_step:
        copy.version, copy.address = weight._version, weight.data_ptr()
        copy.in_step = copy.used = False
