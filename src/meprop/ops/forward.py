"""A linear map's forward pass that leaves out the zeros of its input.

After a ReLU most entries are zero. Shapes: input x [N, I], weight [O, I].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from meprop.ops import native
from meprop.ops.registry import operation


def _torchs(x: Tensor, weight: Tensor, bias: Tensor | None, most: float, /) -> Tensor:
    del most
    return F.linear(x, weight, bias)


@operation(traced=_torchs)
def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, most: float, /) -> Tensor:
    """y = x W^T + b. An implementation may leave entries of x that are zero out of the sums.

    The result is that of `torch.nn.functional.linear` but for the order of the sums, which are formed in float32 or in
    the dtype. Where a weight is not finite and meets only zeros, the result may be finite, or NaN as torch's is.

    Args:
        x: Input [N, I].
        weight: Weight [O, I], of the dtype of x.
        bias: Bias [O], of the dtype of x, or None.
        most: Zeros are left out if at most this share of the entries of x is not zero, from 0 to 1.

    Returns:
        Output [N, O], with the dtype of x.

    Raises:
        RuntimeError: The shapes or the dtypes do not fit.
    """
    return _torchs(x, weight, bias, most)


def _native_declines(x: Tensor, weight: Tensor, bias: Tensor | None, most: float) -> str | None:
    del most
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return f"native kernels take one dtype here, not {x.dtype}, {weight.dtype} and {bias and bias.dtype}"
    if x.dim() != 2 or x.shape[1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        return "the shapes do not fit, which torch says best"
    return native.declines(x, weight, bias)


def skips_zeros(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a `linear_forward` of such tensors can leave out zeros."""
    return native.backend.missing is None and _native_declines(x, weight, bias, 1.0) is None


@native.backend.implements(linear_forward, _native_declines)
def _native_linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, most: float) -> Tensor:
    (rows, inputs), outputs = x.shape, len(weight)
    transposed = weight.stride(1) == 1 or weight.stride(0) != 1
    kept_x = native.readable(x, x.dtype)
    kept_weight = native.readable(weight if transposed else weight.t(), x.dtype)
    kept_bias, out = native.contiguous(bias), x.new_empty(rows, outputs)
    nonzeros = native.extension().linear_forward(
        *(native.DTYPE_CODES[x.dtype], rows, outputs, inputs, kept_x.data_ptr(), kept_x.stride(0)),
        *(kept_weight.data_ptr(), kept_weight.stride(0), transposed, native.address(kept_bias)),
        *(out.data_ptr(), torch.get_num_threads(), most),
    )
    return out if nonzeros <= most * x.numel() else F.linear(x, weight, bias)
