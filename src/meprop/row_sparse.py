"""What torch lacks for row-sparse gradients: it cannot clip them, and most of its optimizers fail without the remedy.

A layer with ``sparse_grad=True`` makes sparse gradients. torch's clipping needs norms, bounds and comparisons, which
torch has for dense gradients only. `support` adds these operations to torch's. `torch.nn.utils.clip_grad_norm_`,
`torch.nn.utils.clip_grad_value_`, all trainers that call them, and hooks then treat sparse gradients as dense ones.

An optimizer that takes dense gradients only is refused before its step moves a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map_only

from meprop.errors import NotSupportedError
from meprop.ops import ascending
from meprop.ops.products import is_in_order

_OURS = ("SGD", "Adagrad", "Adam", "AdamW")
# The modules of optimizers that take no sparse gradient, whatever their options. AdamW's step is Adam's.
_DENSE_ONLY = {
    *(f"torch.optim.{name}" for name in ("adadelta", "adam", "adamax", "asgd", "nadam", "radam", "rmsprop", "rprop")),
    *("torch.optim._adafactor", "torch.optim._muon", "transformers.optimization"),
}
# And those that take none with these options.
_DENSE_WITH = {"torch.optim.sgd": ("fused", "weight_decay"), "torch.optim.adagrad": ("fused", "weight_decay")}

# Operations whose answer is dense, also for a sparse gradient: comparisons and reductions.
_ANSWERED = (
    *(f"{name}.{kind}" for name in ("eq", "ne", "lt", "le", "gt", "ge") for kind in ("Tensor", "Scalar")),
    *("all", "all.dim", "any.dim", "amax", "amin", "aminmax", "argmax", "argmin", "max", "min", "max.dim", "min.dim"),
    *("count_nonzero.dim_IntList", "mean.dim", "median", "std.correction", "var.correction"),
)
# Operations that would make a dense gradient of a sparse one.
_REFUSED = ("maximum", "minimum", "view", "where.self")


@cache
def support() -> torch.library.Library:
    """Lets torch clip row-sparse gradients, and refuse them by name where an optimizer takes none.

    Each policy with `sparse_grad` calls it. The process has the operations from then on, for sparse gradients of others
    too. An operation that torch has itself is left alone.

    Returns:
        What the operations are registered with. They exist as long as it does.
    """
    library = torch.library.Library("aten", "IMPL")
    kernels: dict[str, Callable[..., Any]] = {
        "linalg_vector_norm": _norm,
        **dict.fromkeys(("clamp", "clamp.Tensor", "clamp_min", "clamp_min.Tensor"), _clamp),
        **dict.fromkeys(("clamp_", "clamp_.Tensor", "clamp_min_", "clamp_min_.Tensor"), _clamp_),
        **dict.fromkeys(("clamp_max", "clamp_max.Tensor"), _clamp_max),
        **dict.fromkeys(("clamp_max_", "clamp_max_.Tensor"), _clamp_max_),
        **{name: _of_dense(name) for name in _ANSWERED},
        **{name: _refusing(name) for name in _REFUSED},
    }
    for name, kernel in kernels.items():
        for key in ("SparseCPU", "SparseCUDA"):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):  # pyright: ignore[reportPrivateUsage]
                library.impl(name, kernel, key)
    register_optimizer_step_pre_hook(_before_step)
    return library


# ---- clipping


def distinct(grad: Tensor) -> Tensor:
    """The sparse gradient with each entry once, in ascending order. Autograd forgets whether a gradient is coalesced.

    On the CPU the indices are looked at, whatever the gradient says of them. torch's `coalesce` would read and write
    beyond a tensor's end.

    Raises:
        IndexError: An index is not within the gradient's shape.
    """
    if not grad.is_cpu:
        return grad if is_in_order(grad._indices()) else grad.coalesce()
    indices, sizes = grad._indices(), grad._indices().new_tensor(grad.shape[: grad.sparse_dim()])[:, None]
    if grad.sparse_dim() == 1 and ascending(indices[0].contiguous(), len(grad)):
        return grad
    wrong = ((indices < 0) | (indices >= sizes)).any(dim=0).nonzero()
    if len(wrong) > 0:
        raise IndexError(
            f"a sparse gradient of shape {list(grad.shape)} has the index {indices[:, wrong[0, 0]].tolist()}, which is "
            "outside; make it with check_invariants=True to find where"
        )
    values = grad._values()  # of a gradient that need not be in the order that it says
    once = torch.sparse_coo_tensor(
        indices, values, grad.shape, device=grad.device, is_coalesced=False, check_invariants=False
    )
    return once.coalesce()


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
        return torch.linalg.vector_norm(grad.to_dense(), ord, dim, keepdim, dtype=dtype)
    values = distinct(grad)._values()
    return torch.linalg.vector_norm(values if values.numel() else values.new_zeros(1), ord, dtype=dtype)


def _clamp(grad: Tensor, min: Tensor | float | None = None, max: Tensor | float | None = None) -> Tensor:
    """`torch.clamp` of a sparse tensor."""
    return _clamp_(grad.clone(), min, max)


def _clamp_(grad: Tensor, min: Tensor | float | None = None, max: Tensor | float | None = None) -> Tensor:
    """`torch.clamp_` of a sparse tensor."""
    numbers = all(not isinstance(bound, Tensor) or bound.numel() == 1 for bound in (min, max))
    low, high = (None if not numbers or bound is None else float(bound) for bound in (min, max))
    if not numbers or (low is not None and low > 0) or (high is not None and high < 0):
        raise NotSupportedError(
            f"a sparse gradient clamped to min={min}, max={max}; rows without a gradient are zero, which must lie "
            "between them, and each is one number. Clamp grad.to_dense() after backward(), or take sparse_grad=False"
        )
    once = distinct(grad)
    if once is not grad:
        grad.copy_(once)
    grad._values().clamp_(low, high)
    return grad


def _clamp_max(grad: Tensor, max: Tensor | float) -> Tensor:
    return _clamp(grad, None, max)


def _clamp_max_(grad: Tensor, max: Tensor | float) -> Tensor:
    return _clamp_(grad, None, max)


def _of_dense(name: str) -> Callable[..., Any]:
    """The operation of ATen of this name, for tensors some of which are sparse."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return operation(*tree_map_only(Tensor, Tensor.to_dense, args), **kwargs)

    return kernel


def _refusing(name: str) -> Callable[..., Any]:
    def kernel(*_args: Any, **_kwargs: Any) -> Any:
        raise NotSupportedError(
            f"torch.{name.partition('.')[0]} of a sparse gradient, which would make it dense. Take grad.to_dense() "
            "after backward(), or sparse_grad=False"
        )

    return kernel


# ---- optimizers


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Runs before the step of every optimizer, and has row-sparse gradients refused that the step would fail with.

    torch's steps collect the gradients of each group by `_init_group`, after all hooks and the closure. They are looked
    at before the first group's are collected. Another step is refused here, unless a hook may make its gradients dense.
    """
    step = type(optimizer).step
    collect: Any = getattr(type(optimizer), "_init_group", step)
    module: str = collect.__module__
    if torch.compiler.is_compiling() or not (module in _DENSE_ONLY or module in _DENSE_WITH):
        return
    if collect is step:
        if not optimizer._optimizer_step_pre_hooks:  # pyright: ignore[reportPrivateUsage]
            _refuse(optimizer, module)
        return

    def refuse_and_collect(*args: Any, **kwargs: Any) -> Any:
        vars(optimizer).pop("_init_group", None)
        _refuse(optimizer, module)
        return collect(optimizer, *args, **kwargs)

    vars(optimizer)["_init_group"] = refuse_and_collect


def _refuse(optimizer: torch.optim.Optimizer, module: str) -> None:
    options = _DENSE_WITH.get(module)
    for group in optimizer.param_groups:
        chosen = [f"{name}={group[name]}" for name in options or () if group[name]]
        if options is not None and not chosen:
            continue
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.grad.layout == torch.sparse_coo:
                classes = [each.__name__ for each in type(optimizer).__mro__]
                ours = next((name for name in classes if name in _OURS), "Adam, AdamW, SGD or Adagrad")
                raise NotSupportedError(
                    f"{classes[0]}{' with ' * bool(chosen)}{', '.join(chosen)} takes no row-sparse gradients, and that "
                    f"of a parameter of shape {list(parameter.shape)} is one: a layer with sparse_grad=True makes it. "
                    f"No parameter has been changed. Take meprop.optim.{ours} in its place, or sparse_grad=False"
                )
