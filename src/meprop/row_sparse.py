"""What torch lacks for row-sparse gradients: it cannot clip them, and most of its optimizers fail without the remedy.

A layer with ``sparse_grad=True`` makes sparse gradients. torch's clipping needs a norm and bounds of them, which it has
for dense gradients only. `support` adds these operations to torch's, so that `torch.nn.utils.clip_grad_norm_`,
`torch.nn.utils.clip_grad_value_`, and all trainers that call them, clip sparse gradients as they clip dense ones.

An optimizer that takes dense gradients only is refused before its step, in which other parameters would move first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from meprop.errors import NotSupportedError
from meprop.ops import ascending

_OURS = ("SGD", "Adagrad", "Adam", "AdamW")
# The modules of optimizers that take no sparse gradient, whatever their options. AdamW's step is Adam's.
_DENSE_ONLY = {
    *(f"torch.optim.{name}" for name in ("adadelta", "adam", "adamax", "asgd", "nadam", "radam", "rmsprop", "rprop")),
    *("torch.optim._adafactor", "torch.optim._muon", "transformers.optimization"),
}
# And those that take none with these options.
_DENSE_WITH = {"torch.optim.sgd": ("fused", "weight_decay"), "torch.optim.adagrad": ("fused", "weight_decay")}


@cache
def support() -> torch.library.Library:
    """Lets torch clip row-sparse gradients, and refuse them by name where an optimizer takes none.

    Each policy with `sparse_grad` calls it. The process has the operations from then on, for sparse gradients of others
    too. An operation that torch has itself is left alone.

    Returns:
        What the operations are registered with. They exist as long as it does.
    """
    library = torch.library.Library("aten", "IMPL")
    kernels = {"linalg_vector_norm": _norm, "clamp_": _clamp_, "clamp_min_": _clamp_, "clamp_max_": _clamp_max_}
    for name, kernel in kernels.items():
        for key in ("SparseCPU", "SparseCUDA"):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):  # pyright: ignore[reportPrivateUsage]
                library.impl(name, kernel, key)
    register_optimizer_step_pre_hook(_before_step)
    return library


# ---- clipping


def _is_distinct(grad: Tensor) -> bool:
    """Whether a sparse gradient has each entry once. Autograd forgets whether a gradient is coalesced."""
    return grad.is_coalesced() or (grad.sparse_dim() == 1 and ascending(grad._indices()[0].contiguous(), len(grad)))


def _norm(
    grad: Tensor,
    ord: float = 2,
    dim: list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.linalg.vector_norm` of a sparse tensor."""
    if dim is not None or keepdim or ord <= 0:
        raise NotSupportedError(
            f"the norm of a sparse gradient with ord={ord}, dim={dim}, keepdim={keepdim}; it is that of all entries, "
            "with ord above 0. Take the norm of grad.to_dense()"
        )
    values = (grad if _is_distinct(grad) else grad.coalesce())._values()
    return torch.linalg.vector_norm(values if values.numel() else values.new_zeros(1), ord, dtype=dtype)


def _clamp_(grad: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    """`torch.clamp_` of a sparse tensor."""
    if (min is not None and min > 0) or (max is not None and max < 0):
        raise NotSupportedError(
            f"a sparse gradient clamped to min={min}, max={max}; rows without a gradient are zero, which must lie "
            "between them. Clamp grad.to_dense()"
        )
    if not _is_distinct(grad):
        grad.copy_(grad.coalesce())
    grad._values().clamp_(min, max)
    return grad


def _clamp_max_(grad: Tensor, max: float) -> Tensor:
    return _clamp_(grad, None, max)


# ---- optimizers


def _before_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Runs before the step of every optimizer, and refuses row-sparse gradients that the step would fail with.

    A closure makes the gradients within the step. They are looked at when it returns.
    """
    # A hook of the optimizer may make them dense, and runs later than this one.
    if torch.compiler.is_compiling() or optimizer._optimizer_step_pre_hooks or not _may_refuse(optimizer):  # pyright: ignore
        return None
    _refuse(optimizer)
    closure: Callable[[], Any] | None = kwargs.get("closure") or next(iter(args[1:]), None)
    if closure is None:
        return None

    def checked() -> Any:
        result = closure()
        _refuse(optimizer)
        return result

    others = {name: value for name, value in kwargs.items() if name != "closure"}
    return (optimizer, checked, *args[2:]), others


def _may_refuse(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step is that of an optimizer which is known not to take every sparse gradient.

    A subclass with a step, or a collection of gradients, of its own may take them.
    """
    step = type(optimizer).step
    collect = getattr(type(optimizer), "_init_group", step)
    known = step.__module__ in _DENSE_ONLY or step.__module__ in _DENSE_WITH
    return known and collect.__module__ == step.__module__


def _refuse(optimizer: torch.optim.Optimizer) -> None:
    options = _DENSE_WITH.get(type(optimizer).step.__module__)
    for group in optimizer.param_groups:
        chosen = [f"{name}={group[name]}" for name in options or () if group[name]]
        if options is not None and not chosen:
            continue
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.grad.layout == torch.sparse_coo:
                name = type(optimizer).__name__
                remedy = f"meprop.optim.{name}" if name in _OURS else "meprop.optim.Adam, AdamW, SGD or Adagrad"
                raise NotSupportedError(
                    f"{name}{' with ' * bool(chosen)}{', '.join(chosen)} takes no row-sparse gradients, and that of a "
                    f"parameter of shape {list(parameter.shape)} is one: a layer with sparse_grad=True makes them. No "
                    f"parameter has been changed. Take {remedy} in its place, or sparse_grad=False"
                )
