"""Holding a linear layer's backward pass against the oracle, before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from meprop import ops
from meprop.ops import reference
from meprop.rules import Rule
from meprop.selection import ColumnSelection, FeatureSelection, RowSelection, Selection, WholeRows, everything

Gradients = Mapping[str, Tensor]
"""By name: "input", "weight", "bias"; what is not there needs none."""

_CHECKED_COLUMNS = 64  # of each product, all its rows: enough to meet every panel of it by chance, and quick
_REPEATS = 4
_TF32 = 2.0**-10  # its epsilon
_ROUNDINGS = 4


def select(rule: Rule, grad_NO: Tensor) -> FeatureSelection:
    """Return what the rule is to keep of an output gradient. Random numbers are torch's next ones."""
    width = grad_NO.shape[1]
    if (entries := rule.as_entries(width, grad_NO.device)) is not None:
        kept = ops.choose_entries.literally(grad_NO, entries)
        return everything(grad_NO) if kept.density > entries.ceiling else kept
    k = rule.count(width)
    assert k is not None  # of a rule that chooses rows or columns
    if rule.scope == "batch":
        values, indices = reference.topk_columns(grad_NO, k)
        return ColumnSelection(values, indices, width)
    values, indices = reference.topk_rows(grad_NO, k)
    return RowSelection(values, indices, width)


def selection_differs(rule: Rule, grad_NO: Tensor, expected: FeatureSelection) -> str | None:
    """Return in words how the rule's answer differs from the oracle's; None if it does not.

    Both draw the same random numbers if torch's generator is where it was for the oracle.
    """
    selection = rule.select(grad_NO)
    if isinstance(selection, WholeRows) or not torch.equal(selection.indices, expected.indices):
        return "the selection's indices differ from the oracle's"
    if not torch.equal(selection.values, expected.values):
        return "the selection's values differ from the oracle's"
    return None


def gradients_differ(
    gradients: Gradients, expected: Selection, grad_NO: Tensor, x_NI: Tensor, weight: Tensor, *, on_card: bool = False
) -> str | None:
    """Compare with the exact products of what the oracle selected, on columns that are drawn at random.

    Args:
        gradients: Of the layer.
        expected: What the oracle selected.
        grad_NO: The whole output gradient.
        x_NI: The layer's input.
        weight: Its weight [O, I].
        on_card: Whether products may be those of a GPU, whose partial sums are rounded to the dtype, and whose factors
            of float32 are rounded to TF32.

    Returns:
        In words how they differ; None if they do not.
    """
    x, weight, selected_NO = x_NI.detach(), weight.detach(), expected.to_dense()
    columns = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))[:_CHECKED_COLUMNS]
    products = {"input": (selected_NO, weight[:, columns]), "weight": (selected_NO.t(), x[:, columns])}
    is_within = _within_bound_of_a_card if on_card else _within_bound
    for name, gradient in gradients.items():
        dense = gradient.to_dense()
        if name == "bias":
            right = is_within(dense[None], grad_NO.new_ones(1, len(grad_NO)), grad_NO)
        else:
            right = bool(dense.isfinite().all()) and is_within(dense[:, columns], *products[name])
        if not right:
            return f"the gradient of the {name} differs from the oracle's"
    return None


def varies(backward: Callable[[], Gradients], gradients: Gradients) -> str | None:
    """The same inputs give the same bits: if not, threads are in each other's way, which a single check may miss."""
    for _ in range(_REPEATS):
        again = backward()
        if not all(torch.equal(gradient.to_dense(), again[name].to_dense()) for name, gradient in gradients.items()):
            return "the same pass gave other gradients when repeated"
    return None


def _within_bound(result: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether result can be left @ right, summed in float32 in any order and rounded to its dtype.

    A sum of m terms errs by at most m float32 roundings of the sum of their magnitudes; then comes one of the dtype.
    """
    left, right = left.double(), right.double()
    exact = left @ right
    terms = (left != 0).sum(dim=1, keepdim=True) + 1
    bound = terms * torch.finfo(torch.float32).eps * (left.abs() @ right.abs())
    return bool(((result.double() - exact).abs() <= bound + torch.finfo(result.dtype).eps * exact.abs()).all())


def _within_bound_of_a_card(result: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether result can be left @ right of tensor cores.

    The roundings of factors and of partial sums are independent. Together they are as a few roundings of the root of
    the sum of the squared terms, which is the size of a typical sum. Then comes one of the result.
    """
    left, right = left.double(), right.double()
    exact, typical = left @ right, (left.square() @ right.square()).sqrt()
    unit = max(torch.finfo(result.dtype).eps, _TF32)
    return bool(((result.double() - exact).abs() <= unit * (exact.abs() + _ROUNDINGS * typical)).all())
