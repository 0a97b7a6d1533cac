"""The machine: what its speed depends on, and where meprop keeps files on it."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import platform
import re
import secrets
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from meprop.errors import MepropError


def describe() -> dict[str, Any]:
    """What speed depends on.

    This is the processor, its instruction set and cores, the memory in GiB, whether freed memory is kept, the threads,
    the GPU, and the operating system.
    """
    import torch

    return {
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "keeps_freed_memory": _keeps,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # from glibc's malloc.h
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_keeps = False


def keep_freed_memory() -> bool:
    """Lets glibc keep up to 2 GiB of freed memory for later allocations, for the rest of the process.

    A training step frees its activations and gradients, and the next step asks for as much memory. glibc returns blocks
    above 32 MiB, and often smaller ones, to the system. The system clears them again page by page, which takes more
    time than many layers do. The call has no effect on another allocator that is loaded in glibc's place.

    Returns:
        Whether glibc keeps freed memory now. It does not if the C library is another one. It does not either if an
        environment variable sets it up already: GLIBC_TUNABLES, or one of malloc's thresholds.
    """
    global _keeps
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or any(name in os.environ for name in _SETTINGS):
        return False
    large = mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_MAX, 0)  # older glibc refuses more than 32 MiB
    _keeps = bool(large and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
    return _keeps


def cache_folder() -> Path:
    """The folder for downloads and measurements.

    It is $MEPROP_CACHE if that is set, else $XDG_CACHE_HOME/meprop if that is set, else ~/.cache/meprop. It need not
    exist yet.

    Raises:
        MepropError: There is no home directory, and it is needed.
    """
    chosen = os.environ.get("MEPROP_CACHE")
    try:
        if chosen:
            return expanded(chosen)
        return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "meprop"
    except ValueError as error:
        raise MepropError(f"there is no folder for the cache ({error}); set MEPROP_CACHE to a folder") from error


def expanded(path: str | Path) -> Path:
    """The path with the home directory in place of a `~` or `~user` at its beginning.

    Raises:
        ValueError: There is no such user, or no home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: there is no such home directory; give the whole path") from error


# The name that a file has while it is written. No two writers share it, in whatever container they run.
_UNFINISHED = re.compile(r".+\.[0-9a-f]{16}\.tmp")


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, earlier: Sequence[Path] = ()) -> None:
    """Writes a file whose content is the whole old or the whole new one at every moment, also after a power loss.

    Args:
        path: The file. Its folder has to exist. Several processes may write it at once, and the last one wins.
        write: A function that gets a file in memory and writes the content.
        earlier: Where old files are moved to before the new one takes its name: that of `path` to the first place, that
            of the first place to the second, and so on. The last one is replaced.

    Raises:
        OSError: The file cannot be written. The error names it.
    """
    content = io.BytesIO()
    write(content)
    unfinished = _unfinished(path)
    try:
        with unfinished.open("xb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        for newer, older in reversed(list(pairwise([path, *earlier]))):
            if newer.exists():
                os.replace(newer, older)
        os.replace(unfinished, path)
        _keep_names(path.parent)
    except OSError as error:
        raise _named(error, path) from error
    finally:
        with contextlib.suppress(OSError):  # such as a folder that has become read-only
            unfinished.unlink(missing_ok=True)


def check_room(path: Path, size: int) -> None:
    """Finds out whether a file of so many bytes can be written, and leaves nothing behind.

    Raises:
        OSError: It cannot. The error names the file.
    """
    unfinished = _unfinished(path)
    try:
        with unfinished.open("xb") as file:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise _named(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def remove_remains(folder: Path) -> None:
    """Removes what killed writers of `write_atomically` left in a folder. The caller holds the folder's lock."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def _keep_names(folder: Path) -> None:
    """Has the names of a folder's files written to the disk, where the file system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _named(error: OSError, path: Path) -> OSError:
    """The error with the name of the file that was to be written."""
    return OSError(f"{path}: {error}") if error.errno is None else OSError(error.errno, error.strerror, str(path))
