"""Clipping gradients by their norm, row-sparse ones among them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from meprop import row_sparse
from meprop.optim.in_backward import refuse_clipping


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clips gradients as `torch.nn.utils.clip_grad_norm_` does, and takes sparse gradients as well.

    torch's own takes them too, once there is a layer with ``sparse_grad=True`` (`meprop.row_sparse`).

    Args:
        parameters: The parameters whose gradients are clipped together.
        max_norm: The largest norm that is left, of all gradients as one vector.
        norm_type: p of the norm; inf for the largest magnitude.
        error_if_nonfinite: Whether a norm that is NaN or infinite is an error.
        foreach: Whether torch's for-each implementation is used; None: torch chooses.

    Returns:
        The norm before clipping.

    Raises:
        NotSupportedError: An optimizer with ``in_backward=True`` updates one of the parameters.
        RuntimeError: `error_if_nonfinite` is True, and the norm is not finite.
    """
    row_sparse.support()
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    refuse_clipping(parameters)
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
