"""Commands that are killed or run out of disk, again and again, and what they come to in the end.

Each trial disturbs a command several times in one folder, and goes on after each. Its end has to be that of an
undisturbed run, bit for bit, but for the seconds and what other work took. The faults:

    moment   kill -9 after a random time
    call     kill -9 before the nth call that changes the folder: open, fsync, rename, remove
    tear     kill -9 within a write, after a random number of bytes
    full     the nth such call fails, as on a full disk

Each run is a forked child, so that it costs no imports. `make torture` runs many.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from interrupted import write_mnist
from meprop import cli
from meprop.training import checkpoint

FAULTS = ("moment", "call", "tear", "full")
SMALL = ["--hidden", "128", "--dev-size", "20", "--k", "5", "--accelerator", "cpu", "--resume", "--data-dir", "data"]
COMMANDS = {
    "train": ["train", "mnist", "--epochs", "4", "--checkpoint-every", "3", *SMALL],
    "compare": ["compare", "mnist", "--epochs", "2", "--seeds", "0", "1", *SMALL],
    "simplify": ["simplify", "mnist", "--epochs", "2", "--cycle", "1", "--seconds", "0.01", *SMALL],
    "reproduce": ["reproduce", "small.toml", "--data-dir", "data"],
}
EXPERIMENT = """
title = "A small one"
seeds = [0, 1]
task = { name = "mnist", hidden = [128], dev_size = 20 }
training = { epochs = 2, accelerator = "cpu" }
variants.dense.rule = "dense"
variants.topk = { rule = "topk", k = 5 }
variants.random = { rule = "random", k = 5 }
"""


def without_seconds(value: Any) -> Any:
    """Data without what is measured, and without the digest that depends on it."""
    if isinstance(value, dict):
        left_out = ("seconds", "disturbance", "sha256", "models", "verdicts", "out", "data_dir")
        return {name: without_seconds(each) for name, each in value.items() if name not in left_out}
    if isinstance(value, torch.Tensor | np.ndarray):
        bits = torch.as_tensor(value).contiguous().view(-1).view(torch.uint8)
        return str(value.dtype), tuple(value.shape), bits.tolist()
    return [without_seconds(each) for each in value] if isinstance(value, list | tuple) else value


def end(folder: Path) -> dict[str, Any]:
    """What a command has left, by the name of the file."""
    readers: dict[str, Callable[[Path], Any]] = {
        ".json": lambda path: json.loads(path.read_bytes()),
        ".pt": lambda path: (
            torch.load(path, weights_only=False).state_dict()
            if path.name.startswith("compact")
            else checkpoint.read(path)
        ),
    }
    return {
        str(path.relative_to(folder)): without_seconds(readers.get(path.suffix, lambda path: None)(path))
        for path in sorted(folder.rglob("*"))
    }


def break_at(fault: str | None, nth: int, out: Path, draw: random.Random) -> list[int]:
    """Let this process come to the fault at its nth call that changes a folder. Return the count of such calls."""
    count = [0]

    def call() -> None:
        count[0] += 1
        if count[0] == nth:
            if fault == "call":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # what ends a process that writes beyond the limit
            resource.setrlimit(resource.RLIMIT_FSIZE, (draw.choice((0, 1, 100, 5_000, 100_000)),) * 2)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wxa"
        if (writes or event in ("os.rename", "os.remove")) and str(arguments[0]).startswith(str(out)):
            call()

    fsync = os.fsync

    def counted(descriptor: int) -> None:
        call()
        fsync(descriptor)

    os.fsync = counted
    sys.addaudithook(hook)
    return count


def run(command: str, out: Path, fault: str | None, draw: random.Random, moment: float, calls: int) -> int | None:
    """Run a command in a child, disturbed within so many seconds or calls.

    Return its exit code; None if it was killed. The number of its calls is left in the file "calls" beside its folder.
    """
    child = os.fork()
    if child == 0:
        code = 99
        try:
            log = os.open(out.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            nth = 0 if fault in (None, "moment") else draw.randint(1, calls)
            count = break_at(fault, nth, out, draw)
            code = cli.main([*COMMANDS[command], "--out", str(out)])
            sys.stdout.flush()
            (out.parent / "calls").write_text(str(count[0]))
        finally:
            os._exit(code)
    if fault == "moment":
        time.sleep(draw.uniform(0, moment))
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if code < 0 else code


def torture(seconds: float, seed: int, commands: tuple[str, ...], disturbances: int = 4) -> Counter[str]:
    """Run trials for so long; return how many, and how many faults of each kind.

    Raises:
        AssertionError: The end of a trial is another one. The folder is kept, and named.
    """
    draw, found = random.Random(seed), Counter[str]()
    work = Path(tempfile.mkdtemp(prefix="torture-"))
    os.chdir(work)
    (work / "data").mkdir()
    write_mnist(work / "data", 120, packed=False)
    (work / "small.toml").write_text(EXPERIMENT)
    expected: dict[str, Any] = {}
    lasts: dict[str, float] = {}
    calls: dict[str, int] = {}
    # Drawing takes longer than all else, and what is drawn is not looked at.
    Figure.savefig = lambda figure, file, **options: file.write(b"a picture")
    torch.set_num_threads(1)  # threads do not outlive a fork
    for command in commands:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert cli.main([*COMMANDS[command], "--out", "first"]) == 0  # imports what it needs, for all children
        shutil.rmtree("first")
        start = time.monotonic()
        assert run(command, work / command, None, draw, 0, 0) == 0, f"{work}/log"
        lasts[command], calls[command] = time.monotonic() - start, int((work / "calls").read_text())
        expected[command] = end(work / command)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        command, out = draw.choice(commands), work / "trial"
        shutil.rmtree(out, ignore_errors=True)
        (work / "log").unlink(missing_ok=True)
        history: list[tuple[str, int | None]] = []
        for _ in range(disturbances):
            fault = draw.choice(FAULTS)
            code = run(command, out, fault, draw, lasts[command], calls[command])
            history.append((fault, code))
            assert code in ((0, 1) if fault == "full" else (None, 0)), (command, history, f"{work}/log")
            if code == 0:
                break
            found[fault] += 1
        code = run(command, out, None, draw, 0, 0)
        assert code == 0, (command, history, f"{work}/log")
        assert end(out) == expected[command], (command, history, work)
        found["trials"] += 1
    os.chdir("/")
    shutil.rmtree(work)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=[*COMMANDS])
    options = parser.parse_args()
    found = torture(options.seconds, options.seed, tuple(options.commands))
    kills = sum(found[fault] for fault in FAULTS if fault != "full")
    print(
        f"{found['trials']} trials, {kills} kills, {found['full']} full disks, all ended as undisturbed: {dict(found)}"
    )


if __name__ == "__main__":
    main()
