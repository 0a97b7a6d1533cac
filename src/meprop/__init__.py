"""Cheaper training for PyTorch: only the part of a gradient that matters is back-propagated."""

# First: it answers Ctrl-C while torch is imported, which takes seconds.
from meprop import _startup  # pyright: ignore[reportUnusedImport]  # noqa: F401

# isort: split

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from torch import distributed as _distributed

from meprop import errors, functional, nn
from meprop.convert import convert, revert
from meprop.errors import DataError, MepropError, NoEffectWarning, NotSupportedError
from meprop.ops import backend_info
from meprop.report import ConversionReport, report
from meprop.rules import CompensatedTopK, InBlocks, PerProduct, RandomK, Rule, Sampled, TopK, UnscaledK
from meprop.selection import ColumnSelection, RowSelection, WholeRows

if _TYPE_CHECKING:
    from meprop import distributed as distributed
    from meprop import optim
    from meprop import pruning as pruning
    from meprop.advice import Advice, advise
    from meprop.boosting import Boosted, boost
    from meprop.budgets import share_noise
    from meprop.meter import Meter
    from meprop.pruning import Simplifier
    from meprop.schedule import RuleSchedule, anneal
    from meprop.training.task import Setup

    __version__: str

__all__ = [
    "Advice",
    "Boosted",
    "ColumnSelection",
    "CompensatedTopK",
    "ConversionReport",
    "DataError",
    "InBlocks",
    "MepropError",
    "Meter",
    "NoEffectWarning",
    "NotSupportedError",
    "PerProduct",
    "RandomK",
    "RowSelection",
    "Rule",
    "RuleSchedule",
    "Sampled",
    "Setup",
    "Simplifier",
    "TopK",
    "UnscaledK",
    "WholeRows",
    "advise",
    "anneal",
    "backend_info",
    "boost",
    "convert",
    "errors",
    "functional",
    "nn",
    "optim",
    "report",
    "revert",
    "share_noise",
]


# What only few programs need is imported when they ask for it.
_LATER = {
    "Advice": "meprop.advice",
    "Boosted": "meprop.boosting",
    "Meter": "meprop.meter",
    "RuleSchedule": "meprop.schedule",
    "Setup": "meprop.training.task",
    "Simplifier": "meprop.pruning",
    "advise": "meprop.advice",
    "anneal": "meprop.schedule",
    "boost": "meprop.boosting",
    "share_noise": "meprop.budgets",
}
_MODULES_LATER = ("optim", "pruning", *(("distributed",) if _distributed.is_available() else ()))


def __getattr__(name: str) -> _Any:
    """Imports what only few programs need when they ask for it: a third of the time that `import meprop` took."""
    if name == "__version__":  # it is read from a file of the installation
        from importlib.metadata import version

        return version("meprop")
    if name in _MODULES_LATER:
        return _importlib.import_module(f"meprop.{name}")
    if name in _LATER:
        return getattr(_importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'meprop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, *_MODULES_LATER, "__version__"})
