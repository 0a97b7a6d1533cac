"""The update of large parameters in the backward pass, as soon as their gradients are complete.

A hook on each of them runs when autograd has accumulated the parameter's whole gradient. It does this parameter's
step of the optimizer, and frees the gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from meprop import deferred
from meprop.errors import NotSupportedError
from meprop.ops import GradientProduct
from meprop.ops.optimizer import is_large

if TYPE_CHECKING:
    from meprop.optim.base import RowSparseOptimizer

_all: weakref.WeakSet[InBackward] = weakref.WeakSet()


class InBackward:
    """Updates the parameters of one optimizer in the backward pass.

    Args:
        optimizer: The optimizer, which holds this object. Without the optimizer nothing is updated.

    Raises:
        ValueError: A group is differentiable.
    """

    def __init__(self, optimizer: RowSparseOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._groups: dict[Tensor, dict[str, Any]] = {}
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._updated: set[Tensor] = set()
        eager = torch.compiler.disable(_update)  # torch.compile would compile it anew for each parameter
        self._hook = partial(eager, weakref.ref(self))
        weakref.finalize(self, _remove, self._hooks).atexit = False
        _all.add(self)
        self.attach()

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._hooks

    def attach(self) -> None:
        """Gives each large parameter of the optimizer a hook, and takes those of others away.

        A parameter that is frozen gets its hook later: `step` does its first step after it has been thawed.
        """
        optimizer = self._optimizer()
        assert optimizer is not None  # it calls this
        if any(group.get("differentiable") for group in optimizer.param_groups):
            raise ValueError(
                "in_backward=True with differentiable=True; the backward pass keeps no graph of its updates: leave one "
                "of the two out"
            )
        self._groups = _groups_of(optimizer)
        for parameter in [each for each in self._hooks if each not in self._groups]:
            self._hooks.pop(parameter).remove()
            deferred.decline(parameter)
        for parameter in self._groups:
            if (
                parameter not in self._hooks
                and parameter.requires_grad
                and parameter.is_leaf
                and is_large(parameter.numel())
            ):
                self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(self._hook)
                deferred.accept(parameter)

    def update(self, parameter: Tensor) -> None:
        """Does the step of a parameter that autograd has just given its gradient."""
        optimizer, products = self._optimizer(), deferred.take(parameter)
        if not parameter.requires_grad:  # frozen since the forward pass: autograd has given it nothing
            return
        if optimizer is not None and not self._updated:  # a step begins, and a group may have been edited
            self._groups = _groups_of(optimizer)
        if optimizer is None or parameter not in self._groups:
            _form(parameter, products)
            return
        try:
            self._refuse(parameter)
        except NotSupportedError:
            _form(parameter, products)
            raise
        group, grad = self._groups[parameter], parameter.grad
        with torch.no_grad():
            is_whole = len(products) == 1 and grad is not None and deferred.is_placeholder(grad)
            if not is_whole or not optimizer._step_of_product(parameter, products[0], group):  # pyright: ignore[reportPrivateUsage]
                _form(parameter, products)
                optimizer._step_alone(parameter, group)  # pyright: ignore[reportPrivateUsage]
        parameter.grad = None
        self._updated.add(parameter)

    def end_step(self) -> None:
        """Does the step of all parameters that have a gradient left: small ones, and those given one by hand."""
        optimizer = self._optimizer()
        assert optimizer is not None  # it calls this
        self.attach()  # a group may have been edited, or a parameter thawed
        left = [each for each in self._groups if each.grad is not None]
        for parameter in left:
            if parameter in self._updated:
                _refuse_accumulation(parameter)
        optimizer._step()  # pyright: ignore[reportPrivateUsage]
        for parameter in left:
            if parameter in self._hooks:
                parameter.grad = None
        self._updated.clear()

    def _refuse(self, parameter: Tensor) -> None:
        """Refuses an update that would go wrong, before it changes anything."""
        if parameter.grad is None:
            raise NotSupportedError(
                f"a parameter of shape {list(parameter.shape)} has lost its gradient before in_backward=True could "
                "update it: another hook has taken it, as that of another optimizer with in_backward=True. Give a "
                "parameter to one optimizer only"
            )
        if parameter in self._updated:
            _refuse_accumulation(parameter)
        if parameter.grad.requires_grad:
            raise NotSupportedError(
                "create_graph=True with in_backward=True: the update would change the weights that the graph is made "
                "of. Make the optimizer without in_backward"
            )
        if _processes() > 1:
            raise NotSupportedError(
                "in_backward=True in several processes: the update would come before the processes have averaged their "
                "gradients. Make the optimizer without in_backward"
            )


def _update(updates: weakref.ref[InBackward], parameter: Tensor) -> None:
    """The hook of a parameter. It keeps neither the optimizer alive nor does it outlive it."""
    alive = updates()
    if alive is not None:
        alive.update(parameter)


def _groups_of(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Any]]:
    """The group of each parameter."""
    return {each: group for group in optimizer.param_groups for each in group["params"]}


def _form(parameter: Tensor, products: list[GradientProduct]) -> None:
    """Adds products to the parameter's gradient, as autograd would have done."""
    grad = parameter.grad
    for product in products:
        formed = product.formed()
        others = None if grad is None or deferred.is_placeholder(grad) else grad
        if others is not None:  # torch adds a sparse gradient to a dense one in this order only
            formed = formed + others if formed.layout is torch.strided else others + formed
        grad = formed
    parameter.grad = grad


def _remove(hooks: dict[Tensor, RemovableHandle]) -> None:
    for parameter, hook in hooks.items():
        hook.remove()
        deferred.decline(parameter)
    hooks.clear()


def _processes() -> int:
    """How many processes train together. 0 without a process group."""
    group = torch.distributed
    return group.get_world_size() if group.is_available() and group.is_initialized() else 0


def _refuse_accumulation(parameter: Tensor) -> NoReturn:
    wrapped = " DistributedDataParallel sets each gradient twice, and one process does without." if _processes() else ""
    raise NotSupportedError(
        f"a parameter of shape {list(parameter.shape)} has got a second gradient before step(), and in_backward=True "
        f"has updated it with the first.{wrapped} Call step() after each backward pass, and zero_grad() before going "
        "on. To accumulate gradients, make the optimizer without in_backward"
    )


def refuse_scaler() -> NoReturn:
    """Raises the NotSupportedError for a GradScaler."""
    raise NotSupportedError(
        "GradScaler with in_backward=True: the backward pass has updated the parameters with gradients that were still "
        "scaled. Start again with an optimizer without in_backward, or with bfloat16 and without a GradScaler"
    )


def refuse_clipping(parameters: Iterable[Tensor]) -> None:
    """Raises a NotSupportedError if the backward pass updates a parameter whose gradient is to be clipped."""
    for parameter in parameters:
        if any(parameter in each for each in _all):
            raise NotSupportedError(
                "clipping by the norm of all gradients with in_backward=True, which updates each parameter before the "
                "norm is known. Make the optimizer without in_backward, or clip each gradient by a hook: "
                "parameter.register_hook(lambda grad: grad.clamp(-1, 1))"
            )
