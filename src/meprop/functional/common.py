"""What the functions share: the handling of autocast, and the backward pass of a linear map."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from meprop import casts, ops
from meprop.deferred import Later
from meprop.ops.registry import PLAIN, in_graph
from meprop.policy import Policy
from meprop.record import Activity
from meprop.rules import Rule
from meprop.selection import PlainTopK, WholeRows, everything


def check_tensors(**tensors: Tensor | None) -> None:
    """Raises a TypeError for an argument that is not a tensor. A bias may be None."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name.startswith("bias")):
            raise TypeError(f"{name} is of type {type(tensor).__name__}; it is a torch.Tensor")


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device. Autocast does not know some devices, such as "meta"."""
    if not torch._C._is_any_autocast_enabled():  # pyright: ignore[reportPrivateUsage]  (the usual case, at once)
        return False
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def product_dtype(x: Tensor, policy: Policy) -> tuple[bool, torch.dtype | None]:
    """Whether autocast is on, and the dtype of the forward product. None for the dtype of the tensors."""
    if is_autocast(x):
        return True, torch.get_autocast_dtype(x.device.type)
    return False, policy.compute_dtype


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`, if autocast casts such tensors. Other tensors stay as they are.

    Torch then refuses a product with them.
    """
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def cast_operands(
    dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None, *, trains: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias, each after `cast`. A pass that trains takes the weight from `casts`."""
    cast_weight = casts.cast if trains and weight.dtype is torch.float32 else cast
    return cast(x, dtype), cast_weight(weight, dtype), None if bias is None else cast(bias, dtype)


Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype | None]
"""The dtypes of the gradients of input, weight and bias."""


def dtypes_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Dtypes:
    """The dtypes of the gradients of input, weight and bias, which are those of the tensors."""
    return x.dtype, weight.dtype, None if bias is None else bias.dtype


AnyTensor = TypeVar("AnyTensor", Tensor, Tensor | None)


def in_dtype(tensor: AnyTensor, dtype: torch.dtype | None) -> AnyTensor:
    """The tensor, if there is one, in `dtype`. A cast that changes nothing would take a microsecond."""
    if tensor is None or tensor.dtype == dtype:
        return tensor
    if tensor.layout is torch.sparse_coo:  # torch's own cast copies the indices, which are then not known to ascend
        return ops.row_sparse_tensor(tensor._indices()[0], tensor._values().to(dtype), len(tensor))
    return tensor.to(dtype)


def in_dtypes(gradients: ops.Gradients, dtypes: Dtypes) -> ops.Gradients:
    """Gradients of input, weight and bias, cast to `dtypes`."""
    (grad_x, grad_weight, grad_bias), (of_x, of_weight, of_bias) = gradients, dtypes
    return in_dtype(grad_x, of_x), in_dtype(grad_weight, of_weight), in_dtype(grad_bias, of_bias)


def no_view(output: Tensor) -> Tensor:
    """The output of a function of ours as a tensor that is no view, so that operations in place may follow.

    Torch lets no operation in place follow where a function returns a view. Nothing else holds the tensor that this
    output may be a view of.

    It is the last operation of a forward pass. Where that is a cast that changes nothing, graphs of torch.compile have
    zeros for all gradients in torch 2.11.
    """
    if torch.compiler.is_compiling() or output._is_view():
        return torch.ops.aten._unsafe_view.default(output, output.shape)
    return output


def as_matrix(tensor: Tensor) -> Tensor:
    """The tensor [*, C] as a matrix [N, C]."""
    return tensor.flatten(0, -2) if tensor.dim() > 2 else tensor if tensor.dim() == 2 else tensor[None]


def sparse_backward(
    grad_NO: Tensor,
    weight: Tensor | None,
    x_NI: Tensor | None,
    needs_bias: bool,
    policy: Policy,
    positions: int = 1,
    later: Later | None = None,
) -> ops.Gradients:
    """The backward pass of a linear map with what the rule keeps of its output gradient.

    Args:
        grad_NO: Output gradient [N, O].
        weight: Weight [O, I] if the input's gradient is wanted, else None.
        x_NI: Input [N, I] if the weight's gradient is wanted, else None.
        needs_bias: Whether the bias's gradient is wanted.
        policy: The policy, with the rule and with the activity to count into, if there is one.
        positions: The number of adjacent rows that are one example. An example counts once.
        later: What keeps the product for the weight's gradient, or None.
    """
    if not policy.rule.differs:
        return _backward_by(policy.rule, grad_NO, weight, x_NI, needs_bias, policy, policy.activity, positions, later)
    of_input, of_weight = policy.rule.products()
    grad_x, *_ = _backward_by(of_input, grad_NO, weight, None, False, policy, None, positions)
    _, grad_weight, grad_bias = _backward_by(
        of_weight, grad_NO, None, x_NI, needs_bias, policy, policy.activity, positions, later
    )
    return grad_x, grad_weight, grad_bias


def needs_known_shapes(tensor: Tensor) -> bool:
    """Whether the shapes of all results have to be known before: in a graph, and for tensors without contents."""
    return in_graph() or tensor.is_meta or type(tensor) not in PLAIN


def _backward_by(
    rule: Rule | None,
    grad_NO: Tensor,
    weight: Tensor | None,
    x_NI: Tensor | None,
    needs_bias: bool,
    policy: Policy,
    activity: Activity | None,
    positions: int,
    later: Later | None = None,
) -> ops.Gradients:
    """The backward pass with what this rule keeps. None keeps everything."""
    energy = policy.energy_of(grad_NO)
    if rule is None or (weight is None and x_NI is None):
        if activity is not None:
            activity.count(everything(grad_NO) if rule is None else rule.select(grad_NO), positions)
        if rule is None and (weight is not None or x_NI is not None):
            policy.note(everything(grad_NO))
            if energy is not None:
                energy.add(grad_NO, everything(grad_NO))
        return ops.dense_backward(grad_NO, weight, x_NI, needs_bias)
    width, hits = grad_NO.shape[1], None
    in_graph = needs_known_shapes(grad_NO)
    needs_no_selection = in_graph or (activity is None and not policy.sparse_grad)
    if needs_no_selection and (entries := rule.as_entries(width, grad_NO.device)) is not None:
        if energy is not None:
            energy.add(grad_NO, ops.keep_entries(grad_NO, entries))
        if later is not None:
            choice = ops.keep_entries(grad_NO, entries)
            policy.note(choice)
            return _products(choice, grad_NO, weight, x_NI, needs_bias, False, None, later)
        gradients, kept = ops.entries_backward(entries, grad_NO, weight, x_NI, needs_bias)
        if not in_graph:
            policy.note_kept(int(kept), grad_NO)
        return gradients
    choice = rule.as_topk(width)
    if choice is None or (activity is not None and positions > 1):  # counting an example once needs a selection
        choice = policy.select(rule, grad_NO)  # of a rule for each product, each of the two counts
    elif policy.rule.differs:
        policy.note_topk(choice, grad_NO)
    if energy is not None:
        energy.add(grad_NO, rule.select(grad_NO) if isinstance(choice, PlainTopK) else choice)
    if activity is not None and positions > 1:
        assert not isinstance(choice, PlainTopK)  # it was selected above
        activity.count(choice, positions)
    elif activity is not None:
        hits = activity.hits
        activity.examples += len(grad_NO)
    row_sparse = policy.sparse_grad and x_NI is not None
    return _products(choice, grad_NO, weight, x_NI, needs_bias, row_sparse, hits, later)


def _products(
    choice: ops.Choice | WholeRows,
    grad_NO: Tensor,
    weight: Tensor | None,
    x_NI: Tensor | None,
    needs_bias: bool,
    row_sparse: bool,
    hits: Tensor | None,
    later: Later | None,
) -> ops.Gradients:
    """The products with what is kept, but the one for the weight's gradient if it is kept for later."""
    selection = None if later is None or x_NI is None else later.keeps(choice, grad_NO, x_NI, row_sparse)
    if selection is None:
        return ops.backward_with(choice, grad_NO, weight, x_NI, needs_bias, row_sparse, hits)
    assert later is not None
    assert x_NI is not None
    grad_x, _, grad_bias = ops.backward_with(selection, grad_NO, weight, None, needs_bias, False, hits)
    return grad_x, later.keep(selection, x_NI, row_sparse), grad_bias
