"""A linear map's forward pass that leaves out the zeros of its input.

After a ReLU most entries are zero. Shapes: input x [N, I], weight [O, I].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from meprop.ops import native
from meprop.ops.registry import operation


def _torchs(x: Tensor, weight: Tensor, bias: Tensor | None, most_nonzeros: float, /) -> Tensor:
    del most_nonzeros
    return F.linear(x, weight, bias)


@operation(traced=_torchs)
def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, most_nonzeros: float, /) -> Tensor:
    """y = x W^T + b. An implementation may leave entries of x that are zero out of the sums.

    The result is that of `torch.nn.functional.linear` but for the order of the sums. Those of native code are formed in
    float32, by ascending input. Where a weight is not finite and meets only zeros, the result may be finite, or NaN as
    torch's is.

    Args:
        x: Input [N, I].
        weight: Weight [O, I], of the dtype of x.
        bias: Bias [O], of the dtype of x, or None.
        most_nonzeros: The share of entries of x that are not zero, from 0 to 1, above which the product is torch's own.

    Returns:
        Output [N, O], with the dtype of x.

    Raises:
        RuntimeError: The shapes or the dtypes do not fit.
    """
    return _torchs(x, weight, bias, most_nonzeros)


def _native_declines(x: Tensor, weight: Tensor, bias: Tensor | None, most_nonzeros: float) -> str | None:
    if most_nonzeros <= 0:
        return "the product is torch's own for every input"
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return f"native kernels take one dtype here, not {x.dtype}, {weight.dtype} and {bias and bias.dtype}"
    if x.dim() != 2 or x.shape[1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        return "the shapes do not fit, which torch says best"
    return native.declines(x, weight, bias)


@native.backend.implements(linear_forward, _native_declines)
def _native_linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, most_nonzeros: float) -> Tensor:
    by_output = weight.stride(1) == 1 or weight.stride(0) != 1
    kept_x, kept_bias = native.readable(x, x.dtype), native.contiguous(bias)
    kept_weight = native.readable(weight if by_output else weight.t(), x.dtype)
    out = x.new_empty(len(x), len(weight))
    is_written = native.extension().linear_forward(
        *(native.DTYPE_CODES[x.dtype], *out.shape, x.shape[1], kept_x.data_ptr(), kept_x.stride(0)),
        *(kept_weight.data_ptr(), kept_weight.stride(0), by_output, native.address(kept_bias), out.data_ptr()),
        *(torch.get_num_threads(), most_nonzeros),
    )
    return out if is_written else F.linear(x, weight, bias)
