"""This machine: what its speed depends on, and where meprop keeps files on it."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch


def describe() -> dict[str, Any]:
    """What speed depends on: processor, instruction set, cores, memory in GiB and whether it is kept, threads, GPU."""
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


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_keeps = False


def keep_freed_memory() -> bool:
    """Lets glibc keep freed memory for what is allocated next, up to 2 GiB, for the rest of the process.

    A training step frees its activations and gradients, and the next one asks for as much. glibc returns blocks above
    32 MiB, and often smaller ones, to the system, which clears them again page by page: more time than many a layer.
    Another allocator that is loaded in its place takes no notice.

    Returns:
        Whether glibc does so now: not with another C library, or where an environment variable already says what it is
        to do (those of malloc's thresholds, GLIBC_TUNABLES).
    """
    global _keeps
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or any(name in os.environ for name in _SETTINGS):
        return False
    large = mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_MAX, 0)  # older glibc takes none above 32 MiB
    _keeps = bool(large and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
    return _keeps


def cache_folder() -> Path:
    """The folder for downloads and measurements: $MEPROP_CACHE, else $XDG_CACHE_HOME/meprop, else ~/.cache/meprop.

    It need not exist yet.
    """
    if chosen := os.environ.get("MEPROP_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "meprop"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that at every moment, a crash included, `path` is the whole old or the whole new content.

    Args:
        path: The file; its folder exists. Several processes may write it at once: the last one wins.
        write: Gets the opened file and writes the content.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
