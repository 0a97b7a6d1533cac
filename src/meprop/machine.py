"""The machine: what its speed depends on, and where meprop keeps files on it."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch


def describe() -> dict[str, Any]:
    """What speed depends on.

    This is the processor, its instruction set and cores, the memory in GiB, whether freed memory is kept, the threads,
    the GPU, and the operating system.
    """
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
    """
    if chosen := os.environ.get("MEPROP_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "meprop"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file whose content is the whole old or the whole new one at every moment, also after a crash.

    Args:
        path: The file. Its folder has to exist. Several processes may write it at once, and the last one wins.
        write: A function that gets the opened file and writes the content.
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
