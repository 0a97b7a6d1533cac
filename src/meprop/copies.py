"""bfloat16 copies of float32 weights, so that a step in bfloat16 need not cast the whole model.

A copy is made when a product first asks for it, and made anew when its weight has changed since: by load_state_dict, by
an edit in place or an optimizer, which raise the tensor's version, or by other memory under it. `meprop.optim` writes
the copy along with the rows that it changes, which keeps it up to date. Modules that share a weight share its copy.
torch's fused optimizers raise no version: after a step of one, copies of its parameters are made anew; nor does
``fully_shard``, when it gathers weights: after a step on its DTensors all copies are.

An edit through ``weight.data`` or a NumPy view raises no version: it is seen only where it concerns one of some hundred
entries that are looked at each time, as one of most of the weight does. Edit under `torch.no_grad` instead.
`torch.utils.swap_tensors` refuses a weight that has a copy, as it refuses all that are weakly referenced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from meprop import ops

_SAMPLES = 128


@dataclass
class _Copy:
    tensor: Tensor
    version: int
    address: int
    written_along: bool = False
    """By the step of an optimizer that is just going on."""

    def is_of(self, weight: Tensor) -> bool:
        """Whether the weight has not changed since this was written, as far as its version tells."""
        return (
            self.version == weight._version
            and self.address == weight.data_ptr()
            and self.tensor.shape == weight.shape
            and self.tensor.device == weight.device
        )


_copies = WeakTensorKeyDictionary()


def _find(weight: Tensor) -> _Copy | None:
    return _copies.get(weight) if _copies else None  # pyright: ignore[reportUnknownMemberType]


def serves(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a copy of this weight in this dtype can be kept: of plain float32 leaves, in bfloat16."""
    return (
        dtype == torch.bfloat16
        and weight.dtype == torch.float32
        and weight.is_leaf
        and type(weight) in (Tensor, torch.nn.Parameter)
        and weight.is_contiguous()
        and not weight.is_inference()  # it has no version
        and not torch._C._functorch.is_functorch_wrapped_tensor(weight)  # nor this one memory  # pyright: ignore
    )


def of(weight: Tensor) -> Tensor:
    """The bfloat16 copy of a weight that `serves` says yes to, up to date. Not to be written."""
    copy = _find(weight)
    if copy is not None and copy.is_of(weight) and ops.copy_agrees(weight, copy.tensor, _SAMPLES):
        return copy.tensor
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be written later
        if copy is not None and (copy.tensor.shape, copy.tensor.device) == (weight.shape, weight.device):
            copy.tensor.copy_(weight)
        else:
            copy = _copies[weight] = _Copy(weight.bfloat16(), 0, 0)
    copy.version, copy.address = weight._version, weight.data_ptr()
    return copy.tensor


def _forget_fused(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups if _copies else []:
        for parameter in group["params"]:
            if type(parameter) not in (Tensor, torch.nn.Parameter):  # a DTensor, from which layers get other tensors
                _copies.clear()
                return
            copy = _find(parameter)
            if copy is None:
                continue
            if group.get("fused") and parameter.requires_grad and not copy.written_along:
                copy.version = -1
            copy.written_along = False


register_optimizer_step_post_hook(_forget_fused)


def current(weight: Tensor) -> Tensor | None:
    """The copy, if one is up to date: whoever writes it along with the weight calls `rewritten` then."""
    copy = _find(weight)
    return copy.tensor if copy is not None and copy.is_of(weight) else None


def rewritten(weight: Tensor) -> None:
    """Says that the `current` copy has been written along with its weight, whose version has been raised since."""
    copy: _Copy = _copies[weight]
    copy.version, copy.written_along = weight._version, True


def forget(weight: Tensor) -> None:
    """Frees the copy, if there is one; whoever asks for it again gets a new one."""
    if _find(weight) is not None:
        del _copies[weight]
