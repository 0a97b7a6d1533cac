"""Selecting entries of an output gradient, and multiplying with what was selected."""

from meprop.ops import library as _library  # noqa: F401  # pyright: ignore[reportUnusedImport]  (defines torch.ops.meprop)
from meprop.ops.dispatch import backend_info, grad_input, grad_weight, topk_columns, topk_rows

__all__ = ["backend_info", "grad_input", "grad_weight", "topk_columns", "topk_rows"]
