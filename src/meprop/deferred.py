"""Gradients of weights that are not formed in the backward pass of their layer, but where they are used.

The gradient of a linear map's weight is a product. An optimizer that updates in the backward pass can form it in parts,
and use each part while it is in the cache (`meprop.optim`, ``in_backward=True``). It has to wait until autograd has all
gradients of the weight, as a weight may be used several times. So a layer gives autograd an empty sparse gradient, and
keeps the product for the weight. When autograd's hook on the weight runs, the optimizer takes the product. If there are
other gradients of the weight beside it, the product is formed and added to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from meprop import ops
from meprop.ops import Choice, GradientProduct, native
from meprop.selection import PlainTopK, RowSelection, is_everything

_Node = Any  # of autograd's graph

_products: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The products of each weight that takes them, with the backward pass that each one is of."""

_current_pass: Callable[[], int] = torch._C._current_graph_task_id  # pyright: ignore
_is_executed: Callable[[_Node], bool] = torch._C._will_engine_execute_node  # pyright: ignore


def accept(weight: Tensor) -> None:
    """Lets layers keep products for this weight. A hook on it has to `take` them in every backward pass."""
    if weight not in _products:
        _products[weight] = []


def decline(weight: Tensor) -> None:
    """Lets layers form the gradients of this weight."""
    _products.pop(weight, None)


def take(weight: Tensor) -> list[GradientProduct]:
    """The products that this backward pass has kept for a weight, which are kept no longer."""
    kept: list[tuple[int, GradientProduct]] = _products.get(weight, [])
    products = [product for number, product in kept if number == _current_pass()]
    kept.clear()
    return products


def is_placeholder(grad: Tensor) -> bool:
    """Whether a gradient is an empty sparse one, that of a product or of several of them."""
    return grad.layout is torch.sparse_coo and grad._nnz() == 0


class Later:
    """Keeps the product of one pass of a layer for its weight.

    Args:
        weight: The weight.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    @classmethod
    def of(cls, edge: tuple[_Node, int], x_NI: Tensor | None, grad_NO: Tensor) -> Later | None:
        """What keeps the product of a layer's backward pass. None if the layer has to form the gradient.

        Args:
            edge: The edge from the layer's node of the graph to that of its weight.
            x_NI: Input [N, I], or None.
            grad_NO: Output gradient [N, O].
        """
        if not _products or x_NI is None or torch.compiler.is_compiling():
            return None
        weight: Tensor | None = getattr(edge[0], "variable", None)
        if weight is None or weight not in _products or _is_seen(weight):
            return None
        if native.declines(x_NI, grad_NO, weight, dtypes=native.FLOAT32) is not None or x_NI.numel() == 0:
            return None
        try:
            return cls(weight) if _is_executed(edge[0]) else None
        except RuntimeError:  # torch.autograd.grad asks for the gradient of this weight
            return None

    def keeps(self, choice: Choice, grad_NO: Tensor) -> RowSelection | None:
        """The selection whose product is kept. None if the layer has to form the gradient."""
        if isinstance(choice, PlainTopK) and choice.scope == "example" and choice.blocks == 1:
            choice = ops.topk_rows(grad_NO, choice.k)
        return choice if isinstance(choice, RowSelection) and not is_everything(choice) else None

    def keep(self, selection: RowSelection, x_NI: Tensor) -> Tensor:
        """Keeps a product, and returns the gradient that autograd gets in its place."""
        kept: list[tuple[int, GradientProduct]] = _products[self._weight]
        number = _current_pass()
        kept[:] = [each for each in kept if each[0] == number]  # a pass that has failed leaves some
        kept.append((number, GradientProduct(selection, x_NI)))
        width, inputs = self._weight.shape
        return ops.row_sparse_tensor(torch.empty(0, dtype=torch.int64), x_NI.new_empty(0, inputs), width)


def _is_seen(weight: Tensor) -> bool:
    """Whether a hook looks at the weight's gradient, beside the one that takes the products."""
    hooks: Any = weight._post_accumulate_grad_hooks
    return bool(weight._backward_hooks) or hooks is None or len(hooks) != 1
