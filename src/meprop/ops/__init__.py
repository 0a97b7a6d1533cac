"""Operations that select entries of an output gradient, and that multiply with the selection.

Each file holds one family of operations. Every operation has a contract, a literal reference and a native call.
`registry` finds the backend that serves a call.
"""

from meprop.ops import native as native  # isort: skip  (backends register in this order)
from meprop.ops import triton as triton
from meprop.ops.activation import activation_dropout, activation_dropout_gradient
from meprop.ops.entries import choose_entries, draw_columns, draw_rows, keep_entries, sums_of_the_rest
from meprop.ops.forward import linear_forward
from meprop.ops.gradients import Gradient, GradientProduct, GradientRows
from meprop.ops.linear import backward_with, dense_backward, entries_backward, linear_backward
from meprop.ops.lstm import lstm_backward, lstm_forward
from meprop.ops.maps import Maps, entries_of_maps_backward, kept_maps, map_norms, maps_backward
from meprop.ops.optimizer import adagrad_rows, adam_rows, ascending, sgd_rows
from meprop.ops.products import (
    Choice,
    Gradients,
    count_hits,
    grad_input,
    grad_weight,
    grad_weight_rows,
    row_sparse_tensor,
)
from meprop.ops.registry import Backend, backend, backend_info, reference, register, remove
from meprop.ops.rows import draw_whole_rows, spread_rows, whole_rows_backward
from meprop.ops.topk import column_scores, memory_format, topk_channels, topk_columns, topk_rows

__all__ = [
    "Backend",
    "Choice",
    "Gradient",
    "GradientProduct",
    "GradientRows",
    "Gradients",
    "Maps",
    "activation_dropout",
    "activation_dropout_gradient",
    "adagrad_rows",
    "adam_rows",
    "ascending",
    "backend",
    "backend_info",
    "backward_with",
    "choose_entries",
    "column_scores",
    "count_hits",
    "dense_backward",
    "draw_columns",
    "draw_rows",
    "draw_whole_rows",
    "entries_backward",
    "entries_of_maps_backward",
    "grad_input",
    "grad_weight",
    "grad_weight_rows",
    "keep_entries",
    "kept_maps",
    "linear_backward",
    "linear_forward",
    "lstm_backward",
    "lstm_forward",
    "map_norms",
    "maps_backward",
    "memory_format",
    "reference",
    "register",
    "remove",
    "row_sparse_tensor",
    "sgd_rows",
    "spread_rows",
    "sums_of_the_rest",
    "topk_channels",
    "topk_columns",
    "topk_rows",
    "whole_rows_backward",
]
