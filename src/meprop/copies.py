"""bfloat16 copies of float32 weights, so that a product in bfloat16 need not cast the whole weight each time.

A copy is made when a product first asks for it. It is made anew when its weight has changed since. The version of a
tensor tells that: it is raised by an edit in place, by load_state_dict and by most optimizers. Other memory under the
weight tells it as well. `meprop.optim` writes the copy together with the rows of the weight that it changes, so that
the copy stays up to date. Modules that share a weight share its copy.

Two kinds of change raise no version, and are therefore noticed after each optimizer's step. A step of torch's fused
optimizers outdates the copies of its parameters. A step on the DTensors of ``fully_shard`` outdates all copies, because
``fully_shard`` then gathers the new weights into tensors that keep their version.

An edit through ``weight.data`` or a NumPy view raises no version either. Whenever the copy is asked for, about a
hundred evenly spread entries are compared with the weight. An edit of most of the weight shows there, an edit of a few
entries may not. Edit under `torch.no_grad` instead.

`torch.utils.swap_tensors` refuses a weight that has a copy, as it refuses every tensor with weak references to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from meprop.ops import copy_agrees

_COMPARED_ENTRIES = 128


@dataclass
class _Copy:
    """The copy of a weight, and what the weight was when the copy was last written.

    Attributes:
        tensor: The copy, in bfloat16, of the weight's shape.
        version: The weight's version at that time; -1 if the copy is outdated whatever the weight's version.
        address: The address of the weight's memory at that time.
        written_in_step: Whether the optimizer's step that is in progress has written the copy.
    """

    tensor: Tensor
    version: int
    address: int
    written_in_step: bool = False

    def is_up_to_date(self, weight: Tensor) -> bool:
        """Whether the weight has not changed since the copy was written, as far as version and memory tell."""
        return (
            self.version == weight._version
            and self.address == weight.data_ptr()
            and self.tensor.shape == weight.shape
            and self.tensor.device == weight.device
        )


_copies = WeakTensorKeyDictionary()
"""The copy of each weight that has one. A copy is freed with its weight."""


def _find(weight: Tensor) -> _Copy | None:
    return _copies.get(weight) if _copies else None  # pyright: ignore[reportUnknownMemberType]


def serves(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a copy of this weight in this dtype can be kept: the weight a plain float32 leaf, the dtype bfloat16."""
    return (
        dtype == torch.bfloat16
        and weight.dtype == torch.float32
        and weight.is_leaf
        and type(weight) in (Tensor, torch.nn.Parameter)
        and weight.is_contiguous()
        and not weight.is_inference()  # it has no version
        and not torch._C._functorch.is_functorch_wrapped_tensor(weight)  # nor has this memory  # pyright: ignore
    )


def of(weight: Tensor) -> Tensor:
    """The bfloat16 copy of a weight that `serves` says yes to, up to date. The caller must not write it."""
    copy = _find(weight)
    if copy is not None and copy.is_up_to_date(weight) and copy_agrees(weight, copy.tensor, _COMPARED_ENTRIES):
        return copy.tensor
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be written later
        if copy is not None and (copy.tensor.shape, copy.tensor.device) == (weight.shape, weight.device):
            copy.tensor.copy_(weight)
        else:
            copy = _copies[weight] = _Copy(weight.bfloat16(), 0, 0)
    copy.version, copy.address = weight._version, weight.data_ptr()
    return copy.tensor


def current(weight: Tensor) -> Tensor | None:
    """The copy of a weight, if there is one and it is up to date; else None.

    An optimizer that changes the weight may write it too, and then calls `mark_as_written`.
    """
    copy = _find(weight)
    return copy.tensor if copy is not None and copy.is_up_to_date(weight) else None


def mark_as_written(weight: Tensor) -> None:
    """Says that the `current` copy was written together with its weight, whose version has been raised by that."""
    copy: _Copy = _copies[weight]
    copy.version, copy.written_in_step = weight._version, True


def forget(weight: Tensor) -> None:
    """Frees the copy of a weight, if there is one. The next product that asks for a copy gets a new one."""
    if _find(weight) is not None:
        del _copies[weight]


def _outdate_silent_changes(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Runs after the step of every optimizer, and outdates copies of weights that changed without a new version."""
    for group in optimizer.param_groups if _copies else []:
        for parameter in group["params"]:
            if type(parameter) not in (Tensor, torch.nn.Parameter):  # a DTensor, from which layers get other tensors
                _copies.clear()
                return
            copy = _find(parameter)
            if copy is None:
                continue
            if group.get("fused") and parameter.requires_grad and not copy.written_in_step:
                copy.version = -1
            copy.written_in_step = False


register_optimizer_step_post_hook(_outdate_silent_changes)
