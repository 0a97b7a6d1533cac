"""Checkpoints that are either whole or not there, and that only the run they belong to will load.

A checkpoint is a zip archive of two files: the tensors in the format of safetensors, and all else as JSON. Nothing in
it is pickled. The archive's comment is a digest of all the bytes before it.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from meprop.errors import DataError
from meprop.machine import write_atomically
from meprop.training import tracking
from meprop.training.loop import Trainer

KEPT = 2
"""How many checkpoints of a run are kept: the newest, and those before it."""
_FORMAT = 7
_REMEDY = "start again with --overwrite, or restore the file from a copy"
_SEAL = b"meprop sha256 "
_SEAL_LENGTH = len(_SEAL) + 64
_STATE, _TENSORS = "meprop/data/state.json", "meprop/data/tensors.safetensors"


class _DamagedError(DataError):
    """The bytes of a checkpoint are not those that were written."""


def earlier(path: Path) -> list[Path]:
    """Return where the checkpoints before that of `path` are kept, the newest first."""
    return [path.with_name(f"{path.stem}{'-before' * age}{path.suffix}") for age in range(1, KEPT)]


def exists(path: Path) -> bool:
    """Whether there is a checkpoint, or one before it."""
    return any(each.exists() for each in (path, *earlier(path)))


def delete(path: Path) -> None:
    """Delete a checkpoint, if it is there, and then those before it."""
    path.unlink(missing_ok=True)
    delete_earlier(path)


def delete_earlier(path: Path) -> None:
    """Delete the checkpoints before that of `path`, if they are there."""
    for each in earlier(path):
        each.unlink(missing_ok=True)


def save(path: Path, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Save `Trainer.state_dict()` with the settings of its run, its seed and its data (plain data by option name).

    The checkpoint that was there is kept as the one before.

    Raises:
        OSError: The file cannot be written. The error names it.
        TypeError: The state has something that a checkpoint does not hold: see `encoding.flatten`.
    """
    encoding, safetensors = _import_extras()
    tensors: dict[str, Tensor] = {}
    content = {"settings": dict(settings), "state": dict(state)}
    plain = {"format": _FORMAT, "content": encoding.flatten(content, tensors)}
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        archive.writestr(_STATE, json.dumps(plain))
        archive.writestr(_TENSORS, safetensors.save(tensors))
        archive.comment = bytes(_SEAL_LENGTH)
    body.seek(-_SEAL_LENGTH, io.SEEK_END)
    body.write(_seal(body.getbuffer()[:-_SEAL_LENGTH]))
    write_atomically(path, lambda file: file.write(body.getbuffer()), earlier=earlier(path))


def load(path: Path, settings: Mapping[str, Any], task: type[Any]) -> dict[str, Any]:
    """Load the state that `save` was given.

    Where the file is damaged, the one before it is loaded, with a warning. The damaged one is then deleted, so that the
    next checkpoint does not take the place of the good one.

    Args:
        path: The file.
        settings: As `save` would be given them now.
        task: The class of the task's config.

    Raises:
        DataError: The file is damaged or no checkpoint of this version of meprop, and so is the one before it.
        ValueError: It belongs to a run with other settings or other data.
    """
    paths = [each for each in (path, *earlier(path)) if each.exists()] or [path]
    damaged: list[Path] = []
    while True:
        try:
            content = read(paths[0])
            break
        except _DamagedError as error:
            if len(paths) == 1:
                raise
            damaged.append(paths.pop(0))
            warnings.warn(f"{error}. Going on from the checkpoint before it, {paths[0]}", stacklevel=2)
    if different := tracking.changes(content["settings"], settings, task):
        raise ValueError(
            f"{paths[0]} belongs to a run with other settings ({different}); "
            "give the same options and data, or another --out, or start again with --overwrite"
        )
    for each in damaged:
        each.unlink()
    return content["state"]


def read(path: Path) -> dict[str, Any]:
    """Return the ``settings`` and the ``state`` that `save` was given. Nothing on disk changes.

    Raises:
        DataError: The file is damaged or no checkpoint of this version of meprop.
        OSError: It cannot be read.
    """
    encoding, safetensors = _import_extras()
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if _STATE not in archive.namelist():
                raise DataError(f"{path} is {_kind(archive)}; {_REMEDY}")
            if _seal(content[:-_SEAL_LENGTH]) != content[-_SEAL_LENGTH:]:
                raise ValueError("its digest is not that of its content")
            members = [archive.getinfo(name) for name in (_STATE, _TENSORS)]
            if any(each.file_size > len(content) for each in members):  # as of a few bytes that unpack to gigabytes
                raise ValueError("it is compressed, which no checkpoint is")
            plain = json.loads(archive.read(_STATE))
            if plain["format"] != _FORMAT:
                raise DataError(
                    f"{path} was made by another version of meprop: it is of format {plain['format']}, and this "
                    f"version reads format {_FORMAT}; continue it with that version, or start again with --overwrite"
                )
            found = encoding.restore(plain["content"], safetensors.load(archive.read(_TENSORS)))
        _ = dict(found["settings"]), dict(found["state"])
    except DataError:
        raise
    except Exception as error:  # zipfile, JSON and safetensors fail in many ways on what is no checkpoint
        raise _DamagedError(f"{path} is damaged or not a checkpoint of meprop ({_line(error)}); {_REMEDY}") from error
    return found


def _import_extras() -> tuple[ModuleType, ModuleType]:
    """The modules that need an extra. `meprop --version` and `meprop doctor` do without."""
    import safetensors.torch

    from meprop.training import encoding

    return encoding, safetensors.torch


def _kind(archive: zipfile.ZipFile) -> str:
    """Return in words what an archive is that is no checkpoint of this format. No pickle in it is run.

    Raises:
        ValueError: It is damaged.
    """
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if (broken := archive.testzip()) is not None:
        raise ValueError(f"the content of {broken} is not what was written")
    if len(pickles) == 1:  # torch's
        steps = pickletools.genops(archive.read(pickles[0]))
        said = [value for step, value, _ in steps if step.name in ("BINUNICODE", "BININT", "BININT1")]
        if len(said) > 1 and said[0] == "format":
            return f"a checkpoint of an older meprop, of format {said[1]}, and this version reads format {_FORMAT}"
    return "an archive, and not a checkpoint of meprop"


def _seal(body: bytes | memoryview) -> bytes:
    """Return the comment that a checkpoint ends with: the digest of all the bytes before it."""
    return _SEAL + hashlib.sha256(body).hexdigest().encode()


def resume(path: Path, trainer: Trainer, settings: Mapping[str, Any], task: type[Any]) -> dict[str, Any]:
    """Let a new trainer go on where a state was saved; return the state. Arguments and errors are those of `load`."""
    state = load(path, settings, task)
    try:
        trainer.load_state_dict(state)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{path} does not fit this version of meprop ({reason}); {_REMEDY}") from error
    return state


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
