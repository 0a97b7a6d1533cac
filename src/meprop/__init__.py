"""Cheaper training for PyTorch: only the part of a gradient that matters is back-propagated."""

from importlib.metadata import version as _version

from torch import distributed as _distributed

from meprop import errors, functional, nn, optim
from meprop.convert import ConversionReport, convert, report, revert
from meprop.errors import DataError, MepropError, NoEffectWarning, NotSupportedError
from meprop.ops import backend_info
from meprop.pruning import Simplifier
from meprop.rules import CompensatedTopK, InBlocks, RandomK, Rule, TopK
from meprop.selection import ColumnSelection, RowSelection

if _distributed.is_available():
    from meprop import distributed as distributed

__version__ = _version("meprop")

__all__ = [
    "ColumnSelection",
    "CompensatedTopK",
    "ConversionReport",
    "DataError",
    "InBlocks",
    "MepropError",
    "NoEffectWarning",
    "NotSupportedError",
    "RandomK",
    "RowSelection",
    "Rule",
    "Simplifier",
    "TopK",
    "backend_info",
    "convert",
    "errors",
    "functional",
    "nn",
    "optim",
    "report",
    "revert",
]
