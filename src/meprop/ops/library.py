"""The operations as `torch.library` operators, `torch.ops.meprop.*`, for `torch.compile` and `torch.export`.

Eager calls do not come this way: a Python operator costs several microseconds, a direct call a fraction of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meprop.ops.dispatch import serve

_SIGNATURES = {
    "topk_rows": "(Tensor grad, int k) -> (Tensor, Tensor)",
    "topk_columns": "(Tensor grad, int k) -> (Tensor, Tensor)",
    "rows_grad_input": "(Tensor values, Tensor indices, Tensor weight) -> Tensor",
    "rows_grad_weight": "(Tensor values, Tensor indices, Tensor x, SymInt width) -> Tensor",
    "columns_grad_input": "(Tensor values, Tensor indices, Tensor weight) -> Tensor",
    "columns_grad_weight": "(Tensor values, Tensor indices, Tensor x, SymInt width) -> Tensor",
}


def _fake_topk_rows(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape[0], k), grad.new_empty(grad.shape[0], k, dtype=torch.int32)


def _fake_topk_columns(grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape[0], k), grad.new_empty(k, dtype=torch.int32)


def _fake_grad_input(values: Tensor, _indices: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(values.shape[0], weight.shape[1])


def _fake_grad_weight(_values: Tensor, _indices: Tensor, x: Tensor, width: int) -> Tensor:
    return x.new_empty(width, x.shape[1])


_FAKES = {
    "topk_rows": _fake_topk_rows,
    "topk_columns": _fake_topk_columns,
    "rows_grad_input": _fake_grad_input,
    "rows_grad_weight": _fake_grad_weight,
    "columns_grad_input": _fake_grad_input,
    "columns_grad_weight": _fake_grad_weight,
}

library = torch.library.Library("meprop", "DEF")


def _define(op: str) -> None:
    def run(tensor: Tensor, *args: object) -> object:
        return serve(op, tensor, *args)

    library.define(op + _SIGNATURES[op])
    library.impl(op, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"meprop::{op}", _FAKES[op], lib=library)


for _op in _SIGNATURES:
    _define(_op)
