"""Checkpoints that are either whole or not there, and that only the run they belong to will load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from meprop.errors import DataError
from meprop.machine import write_atomically

_FORMAT = 1


def save(path: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Save `Trainer.state_dict()` with the settings of its run (plain data by option name)."""
    content = {"format": _FORMAT, "settings": settings, "state": state}
    write_atomically(path, lambda file: torch.save(content, file))


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Load the state that `save` was given.

    Raises:
        DataError: If the file is damaged or no checkpoint of meprop.
        ValueError: If it belongs to a run with other settings.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}, expected {_FORMAT}")
        saved, state = content["settings"], content["state"]
    except OSError:
        raise
    except Exception as error:  # torch.load fails in many ways on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path} is damaged or not a checkpoint of meprop ({reason}); start again with --overwrite, "
            "or restore the file from a copy"
        ) from error

    different = [
        f"{name} was {saved.get(name)!r}, now {settings.get(name)!r}"
        for name in sorted(saved.keys() | settings.keys())
        if saved.get(name) != settings.get(name)
    ]
    if different:
        raise ValueError(
            f"{path} belongs to a run with other settings ({'; '.join(different)}); "
            "give the same options or another --out, or start again with --overwrite"
        )
    return state
