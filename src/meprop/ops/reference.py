"""The operations, as literally as the mathematics: any floating dtype, any device. The oracle of every other backend.

Shapes: grad [N, O], weight [O, I], x [N, I]; a row selection is values [N, k] and indices [N, k], a column selection
values [N, k] and indices [k]. Indices are int32 and ascending. Products are summed in float32, those of float64 inputs
in float64. The paper is meProp (Sun et al., ICML 2017).
"""

import torch
from torch import Tensor

from meprop.selection import accumulation_dtype


def declines(_: Tensor) -> str | None:
    """Why this backend cannot serve a call on such a tensor: never."""
    return None


def topk_rows(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest |g| of each row; of equals the lower index; NaN is the largest (the paper's top_k)."""
    by_magnitude = grad.abs().sort(dim=1, descending=True, stable=True).indices
    indices = by_magnitude[:, :k].sort(dim=1).values
    return grad.gather(1, indices), indices.int()


def topk_columns(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k columns with the largest sum of |g| over the batch, summed in float64: simple unified top-k."""
    by_score = grad.abs().double().sum(dim=0).sort(descending=True, stable=True).indices
    indices = by_score[:k].sort().values
    return grad[:, indices], indices.int()


def rows_grad_input(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """dx[n] = sum over j of values[n, j] * weight[indices[n, j]]: [N, I]."""
    dtype = accumulation_dtype(weight.dtype)
    grad_input = torch.zeros(values.shape[0], weight.shape[1], dtype=dtype, device=weight.device)
    for j in range(values.shape[1]):
        grad_input += values[:, j, None].to(dtype) * weight[indices[:, j]].to(dtype)
    return grad_input.to(weight.dtype)


def rows_grad_weight(values: Tensor, indices: Tensor, x: Tensor, width: int) -> Tensor:
    """dW[o] = sum of values[n, j] * x[n] over all (n, j) with indices[n, j] = o: [width, I]."""
    dtype = accumulation_dtype(x.dtype)
    grad_weight = torch.zeros(width, x.shape[1], dtype=dtype, device=x.device)
    for j in range(values.shape[1]):
        grad_weight.index_add_(0, indices[:, j], values[:, j, None].to(dtype) * x.to(dtype))
    return grad_weight.to(x.dtype)


def columns_grad_input(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """dx = values @ weight[indices]: [N, I]."""
    dtype = accumulation_dtype(weight.dtype)
    return (values.to(dtype) @ weight[indices].to(dtype)).to(weight.dtype)


def columns_grad_weight(values: Tensor, indices: Tensor, x: Tensor, width: int) -> Tensor:
    """dW[indices] = values.T @ x, zero elsewhere: [width, I]."""
    dtype = accumulation_dtype(x.dtype)
    rows = (values.t().to(dtype) @ x.to(dtype)).to(x.dtype)
    return x.new_zeros(width, x.shape[1]).index_copy_(0, indices.long(), rows)
