"""Cutting entries out of parameters and buffers, in place, with their gradients and the optimizer's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meprop.errors import NotSupportedError
from meprop.ops import memory_format
from meprop.ops.optimizer import ROW_DECAY

Cut = tuple[Tensor, dict[int, Tensor]]
"""A tensor, and for some of its dimensions the entries [n] that stay, int64."""


def cut(cuts: Sequence[Cut], optimizer: torch.optim.Optimizer | None) -> None:
    """Keeps only these entries of these tensors, of their gradients and of their state in the optimizer.

    Raises:
        NotSupportedError: The optimizer has a state that is not of its parameter's shape. Nothing has been changed
            then.
    """
    if cuts and optimizer is not None:
        for group in optimizer.param_groups:  # all parameters: LBFGS keeps the state of all with the first one
            for parameter in group["params"]:
                _check_state(parameter, optimizer)
    for tensor, indices in cuts:
        _cut_tensor(tensor, indices, {} if optimizer is None else optimizer.state.get(tensor, {}))


def _check_state(parameter: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Refuses a state of which it is not known how it goes with its parameter."""
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    for name, value in state.items():
        fits = not isinstance(value, list | tuple | dict)
        if isinstance(value, Tensor):
            shape = parameter.shape[:1] if name.endswith(ROW_DECAY) else parameter.shape
            fits = value.shape == shape or value.numel() == 1
        if not fits:
            raise NotSupportedError(
                f"{type(optimizer).__name__} has a state {name!r} that is not of its parameter's shape "
                f"{list(parameter.shape)}, and cannot be cut with it; take another optimizer"
            )


def _cut_tensor(tensor: Tensor, indices: dict[int, Tensor], state: dict[str, Any]) -> None:
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == tensor.shape:
            state[name] = _kept(value, indices)
        elif name.endswith(ROW_DECAY) and 0 in indices:
            state[name] = value[indices[0].to(value.device)]
    grad, tensor.grad = tensor.grad, None
    data = _kept(tensor.detach(), indices)
    # Autograd remembers a parameter's shape while an older graph is alive, and forgets it with another dtype.
    tensor.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float16 else torch.float16)
    tensor.data = data
    tensor.grad = None if grad is None else _kept(grad, indices)


def _kept(tensor: Tensor, indices: dict[int, Tensor]) -> Tensor:
    """A copy of the entries that stay, in the tensor's memory format."""
    form = None if tensor.is_sparse else memory_format(tensor)
    for dim, index in indices.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor if form is None else tensor.contiguous(memory_format=form)
