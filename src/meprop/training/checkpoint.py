"""Checkpoints that are either whole or not there, and that only the run they belong to will load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from meprop.errors import DataError
from meprop.machine import write_atomically
from meprop.training import tracking
from meprop.training.loop import Trainer

_FORMAT = 2
_REMEDY = "start again with --overwrite, or restore the file from a copy"


def save(path: Path, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Save `Trainer.state_dict()` with the settings of its run, its seed and its data (plain data by option name)."""
    content = {"format": _FORMAT, "settings": dict(settings), "state": dict(state)}
    write_atomically(path, lambda file: torch.save(content, file))


def load(path: Path, settings: Mapping[str, Any], task: type[Any]) -> dict[str, Any]:
    """Load the state that `save` was given.

    Args:
        path: The file.
        settings: As `save` would be given them now.
        task: The class of the task's config.

    Raises:
        DataError: The file is damaged or no checkpoint of this version of meprop.
        ValueError: It belongs to a run with other settings or other data.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}, expected {_FORMAT}")
        different, state = tracking.changes(content["settings"], settings, task), content["state"]
    except OSError:
        raise
    except Exception as error:  # torch.load fails in many ways on a damaged file
        raise DataError(f"{path} is damaged or not a checkpoint of meprop ({_line(error)}); {_REMEDY}") from error
    if different:
        raise ValueError(
            f"{path} belongs to a run with other settings ({different}); "
            "give the same options and data, or another --out, or start again with --overwrite"
        )
    return state


def resume(path: Path, trainer: Trainer, settings: Mapping[str, Any], task: type[Any]) -> dict[str, Any]:
    """Let a new trainer go on where a state was saved; return the state. Arguments and errors are those of `load`."""
    state = load(path, settings, task)
    try:
        trainer.load_state_dict(state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{path} does not fit this version of meprop ({_line(error)}); {_REMEDY}") from error
    return state


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
