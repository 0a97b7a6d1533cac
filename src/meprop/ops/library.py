"""The operations as `torch.library` operators, `torch.ops.meprop.*`, for `torch.compile` and `torch.export`.

Eager calls do not come this way: a Python operator costs several microseconds, a direct call a fraction of one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from meprop.ops.dispatch import serve
from meprop.ops.reference import memory_format

library = torch.library.Library("meprop", "DEF")


def _define(schema: str, fake: Callable[..., object]) -> None:
    """Defines an operator that is served as in eager mode, and whose results' shapes `fake` tells."""
    op = schema.partition("(")[0]

    def run(tensor: Tensor, *args: object) -> object:
        return serve(op, tensor, *args)

    library.define(schema)
    library.impl(op, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"meprop::{op}", fake, lib=library)


def _fake_topk_rows(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape[0], k), grad.new_empty(grad.shape[0], k, dtype=torch.int32)


def _fake_topk_columns(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape[0], k), grad.new_empty(k, dtype=torch.int32)


def _fake_topk_channels(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (grad.shape[0], k, *grad.shape[2:])
    channels = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format(grad))
    return channels, grad.new_empty(k, dtype=torch.int32)


def _fake_grad_input(values: Tensor, _indices: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(values.shape[0], weight.shape[1])


def _fake_grad_weight(_values: Tensor, _indices: Tensor, x: Tensor, width: int) -> Tensor:
    return x.new_empty(width, x.shape[1])


def _fake_grad_weight_rows(values: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(values.shape[1], x.shape[1])


_define("topk_rows(Tensor grad, int k) -> (Tensor, Tensor)", _fake_topk_rows)
_define("topk_columns(Tensor grad, int k) -> (Tensor, Tensor)", _fake_topk_columns)
_define("topk_channels(Tensor grad, int k) -> (Tensor, Tensor)", _fake_topk_channels)
_define("grad_input(Tensor values, Tensor indices, Tensor weight) -> Tensor", _fake_grad_input)
_define("grad_weight(Tensor values, Tensor indices, Tensor x, SymInt width) -> Tensor", _fake_grad_weight)
_define("grad_weight_rows(Tensor values, Tensor x) -> Tensor", _fake_grad_weight_rows)
