"""Selecting entries of an output gradient, and multiplying with what was selected."""

from meprop.ops import library as _library  # noqa: F401  # pyright: ignore[reportUnusedImport]  (defines the operators)
from meprop.ops.dispatch import (
    Gradients,
    adagrad_rows,
    adam_rows,
    ascending,
    backend_info,
    column_scores,
    grad_input,
    grad_weight,
    lstm_backward,
    lstm_forward,
    narrow_agrees,
    row_sparse_tensor,
    sgd_rows,
    topk_channels,
    topk_columns,
    topk_linear_backward,
    topk_rows,
)
from meprop.ops.dispatch import (
    _linear_backward_temporary as linear_backward,
)
from meprop.ops.reference import memory_format

__all__ = [
    "Gradients",
    "adagrad_rows",
    "adam_rows",
    "ascending",
    "backend_info",
    "column_scores",
    "grad_input",
    "grad_weight",
    "linear_backward",
    "lstm_backward",
    "lstm_forward",
    "memory_format",
    "narrow_agrees",
    "row_sparse_tensor",
    "sgd_rows",
    "topk_channels",
    "topk_columns",
    "topk_linear_backward",
    "topk_rows",
]
