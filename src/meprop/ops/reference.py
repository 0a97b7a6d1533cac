"""The operations, as literally as the mathematics: any floating dtype, any device. The oracle of every other backend.

Shapes: grad [N, O], weight [O, I], x [N, I]. A selection is values [N, k] with indices [N, k] (k entries of each row)
or with indices [k] (k columns); indices are int32 and ascending. Products are summed in float32, those of float64
inputs in float64. The paper is meProp (Sun et al., ICML 2017).
"""

import torch
from torch import Tensor


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


def grad_input(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """dx[n] = sum over j of values[n, j] * weight[index of (n, j)]: [N, I]."""
    dtype = _accumulation_dtype(weight)
    values, weight_ = values.to(dtype), weight.to(dtype)
    if indices.dim() == 1:
        return (values @ weight_[indices]).to(weight.dtype)
    result = weight_.new_zeros(values.shape[0], weight.shape[1])
    for j in range(values.shape[1]):
        result += values[:, j, None] * weight_[indices[:, j]]
    return result.to(weight.dtype)


def grad_weight(values: Tensor, indices: Tensor, x: Tensor, width: int) -> Tensor:
    """dW[o] = sum of values[n, j] * x[n] over all (n, j) whose index is o: [width, I]."""
    if indices.dim() == 1:
        return x.new_zeros(width, x.shape[1]).index_copy_(0, indices.long(), grad_weight_rows(values, x))
    dtype = _accumulation_dtype(x)
    values, x_ = values.to(dtype), x.to(dtype)
    result = x_.new_zeros(width, x.shape[1])
    for j in range(values.shape[1]):
        result.index_add_(0, indices[:, j], values[:, j, None] * x_)
    return result.to(x.dtype)


def grad_weight_rows(values: Tensor, x: Tensor) -> Tensor:
    """The k rows of dW that a selection of columns makes: values.T @ x, [k, I]."""
    dtype = _accumulation_dtype(x)
    return (values.t().to(dtype) @ x.to(dtype)).to(x.dtype)


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
