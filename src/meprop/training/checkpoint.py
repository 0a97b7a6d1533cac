"""Checkpoints that are either whole or not there, and that only the run they belong to will load."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from meprop.errors import DataError
from meprop.machine import write_atomically
from meprop.training import tracking
from meprop.training.loop import Trainer

_FORMAT = 3
_REMEDY = "start again with --overwrite, or restore the file from a copy"
_SEAL = b"meprop sha256 "
_SEAL_LENGTH = len(_SEAL) + 64


def earlier(path: Path) -> Path:
    """Return where the checkpoint before that of `path` is kept."""
    return path.with_name(f"{path.stem}-before{path.suffix}")


def exists(path: Path) -> bool:
    """Whether there is a checkpoint, or the one before it."""
    return path.exists() or earlier(path).exists()


def delete(path: Path) -> None:
    """Delete a checkpoint and the one before it, if they are there."""
    path.unlink(missing_ok=True)
    earlier(path).unlink(missing_ok=True)


def save(path: Path, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Save `Trainer.state_dict()` with the settings of its run, its seed and its data (plain data by option name).

    The checkpoint that was there is kept as the one before. The file is torch's, with a digest of it at its end.

    Raises:
        OSError: The file cannot be written. The error names it.
    """
    content = io.BytesIO()
    torch.save({"format": _FORMAT, "settings": dict(settings), "state": dict(state)}, content)
    # torch's file is a zip archive without a comment. The length of the comment is its last two bytes.
    body = content.getvalue()[:-2] + _SEAL_LENGTH.to_bytes(2, "little")
    write_atomically(path, lambda file: file.write(body + _seal(body)), earlier=earlier(path))


def load(path: Path, settings: Mapping[str, Any], task: type[Any]) -> dict[str, Any]:
    """Load the state that `save` was given.

    Where the file is damaged, the one before it is loaded, with a warning.

    Args:
        path: The file.
        settings: As `save` would be given them now.
        task: The class of the task's config.

    Raises:
        DataError: The file is damaged or no checkpoint of this version of meprop, and so is the one before it.
        ValueError: It belongs to a run with other settings or other data.
    """
    paths = [each for each in (path, earlier(path)) if each.exists()] or [path]
    try:
        content = _read(paths[0])
    except DataError as error:
        if len(paths) == 1:
            raise
        warnings.warn(f"{error}. Going on from the checkpoint before it, {paths[1]}", stacklevel=2)
        content = _read(paths[1])
    if different := tracking.changes(content["settings"], settings, task):
        raise ValueError(
            f"{path} belongs to a run with other settings ({different}); "
            "give the same options and data, or another --out, or start again with --overwrite"
        )
    return content["state"]


def _read(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    try:
        if _seal(content[:-_SEAL_LENGTH]) != content[-_SEAL_LENGTH:]:
            raise ValueError("its digest is not that of its content")
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if found["format"] != _FORMAT:
            raise ValueError(f"format {found['format']}, expected {_FORMAT}")
        _ = dict(found["settings"]), dict(found["state"])
    except Exception as error:  # torch.load fails in many ways on what is no checkpoint
        raise DataError(f"{path} is damaged or not a checkpoint of meprop ({_line(error)}); {_REMEDY}") from error
    return found


def _seal(body: bytes) -> bytes:
    """Return the comment that a checkpoint ends with: the digest of all the bytes before it."""
    return _SEAL + hashlib.sha256(body).hexdigest().encode()


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
