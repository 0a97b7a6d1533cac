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
from meprop.ops.optimizer import takes_whole
from meprop.selection import PlainTopK, RowSelection, WholeRows, columns_with_entries

_Node = Any  # of autograd's graph

# Parts of a product are whole rows, so that memory is read and written in order. The input is then read again for each
# row. That costs less than to write the gradient and to read it, if the examples that have entries stay in the cache
# (bytes of their input) and a row has few entries (on average).
_LARGEST_INPUT, _MOST_ENTRIES = 4 << 20, 8

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
    kept: list[tuple[int, GradientProduct]] = _products.get(weight) or []
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
    def of(cls, node: _Node, place: int, x_NI: Tensor | None, grad_NO: Tensor) -> Later | None:
        """What keeps the product of a layer's backward pass. None if the layer has to form the gradient.

        Args:
            node: The layer's node of autograd's graph, whose backward pass this is.
            place: The place of the weight among the tensors that the node is a function of.
            x_NI: Input [N, I], or None.
            grad_NO: Output gradient [N, O].
        """
        if torch.compiler.is_compiling() or not _products or x_NI is None:
            return None
        of_weight: _Node = node.next_functions[place][0]
        weight: Tensor | None = getattr(of_weight, "variable", None)
        if weight is None or weight not in _products or not takes_whole(weight) or _is_seen(weight):
            return None
        if native.declines(x_NI, grad_NO, dtypes=native.FLOAT32) is not None or x_NI.numel() == 0:
            return None
        try:
            return cls(weight) if _is_executed(of_weight) else None
        except RuntimeError:  # torch.autograd.grad asks for the gradient of this weight
            return None

    def keeps(self, choice: Choice | WholeRows, grad_NO: Tensor, x_NI: Tensor, row_sparse: bool) -> RowSelection | None:
        """The selection whose product is kept. None if the layer has to form the gradient."""
        if isinstance(choice, PlainTopK):
            is_by_row = choice.scope == "example" and choice.blocks == 1
            if not is_by_row or not _pays(choice.k * len(grad_NO), grad_NO.shape[1], x_NI):
                return None
            choice = ops.topk_rows(grad_NO, choice.k)
        elif not isinstance(choice, RowSelection) or not _pays(
            choice.values.numel(), choice.width, x_NI, choice.starts
        ):
            return None
        return None if row_sparse and choice.shared is not None else choice

    def keep(self, selection: RowSelection, x_NI: Tensor, row_sparse: bool) -> Tensor:
        """Keeps a product, and returns the gradient that autograd gets in its place."""
        kept: list[tuple[int, GradientProduct]] = _products[self._weight]
        number = _current_pass()
        kept[:] = [each for each in kept if each[0] == number]  # a pass that has failed leaves some
        rows = columns_with_entries(selection) if row_sparse else None
        kept.append((number, GradientProduct(selection, x_NI, rows)))
        width, inputs = self._weight.shape
        return ops.row_sparse_tensor(torch.empty(0, dtype=torch.int64), x_NI.new_empty(0, inputs), width)


def _pays(entries: int, width: int, x_NI: Tensor, starts: Tensor | None = None) -> bool:
    """Whether it saves time not to form a gradient."""
    if entries > _MOST_ENTRIES * width:
        return False
    examples = len(x_NI) if starts is None else int((starts.diff() > 0).sum())
    return examples * x_NI.shape[1] * 4 <= _LARGEST_INPUT


def _is_seen(weight: Tensor) -> bool:
    """Whether a hook looks at the weight's gradient, beside the one that takes the products."""
    hooks: Any = weight._post_accumulate_grad_hooks  # pyright: ignore[reportPrivateUsage]
    return bool(weight._backward_hooks) or hooks is None or len(hooks) != 1
