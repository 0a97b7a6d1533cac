"""The sweep over model families: ``python -m sweep`` in ``tests``, or ``make sweep``."""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from meprop.reporting import pages
from meprop.training.tracking import commit
from sweep.families import TIMM, TRANSFORMERS, dtypes
from sweep.oracle import Result, examine

FAMILIES = {"transformers": TRANSFORMERS, "timm": TIMM}
HEAD = ("family", "sparse layers", "k = n", "k < n", "k = n, float32", "k < n, float32", "")


def run(library: str, name: str) -> Result:
    """The result of one family. What makes or runs the plain model raises."""
    warnings.simplefilter("ignore")
    model, inputs = FAMILIES[library][name]()
    return examine(model, inputs, dtypes(name, model))


def apart(library: str, name: str) -> Result:
    """The result of one family from a process of its own, which may die."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
        try:
            return process.submit(run, library, name).result()
        except BrokenProcessPool:
            return Result(failures=["the process died"])
        except Exception as problem:
            return Result(failures=[f"cannot be examined: {type(problem).__name__}: {problem}"])


def state(result: Result) -> str:
    """What the table says of a family."""
    if result.failures or result.unseen:
        return "fails" if result.failures else "dense in part"
    return "right" if result.sparse else "all dense"


def cells(name: str, result: Result) -> tuple[str, ...]:
    """A line of the table."""
    errors = [each.get(dtype) for dtype in (torch.float64, torch.float32) for each in (result.whole, result.part)]
    shown = ("" if error is None else f"{error:.0e}" if error else "0" for error in errors)
    return name, f"{result.sparse} of {result.layers}", *shown, state(result)


def text(library: str, results: dict[str, Result]) -> str:
    """The section of the page for one library."""
    failing = {name: result for name, result in results.items() if result.failures}
    unseen = {name: result for name, result in results.items() if result.unseen}
    versions = f"{library} {importlib.import_module(library).__version__}, torch {torch.__version__}"
    lines = [
        f"{len(results)} families: {len(results) - len(failing)} train with the right gradients, {len(failing)} fail. "
        f"{len(unseen)} read weights of layers without calling them. "
        f"{versions}, {pages.short_commit(commit())}.",
        "",
        *(f"- **{name}** fails: {'; '.join(result.failures)}" for name, result in failing.items()),
        *(f"- **{name}** is dense in: {', '.join(result.unseen)}" for name, result in unseen.items()),
        *([""] if failing or unseen else []),
        pages.markdown_table([HEAD, *(cells(*each) for each in results.items())]),
    ]
    return "\n".join(lines)


def main() -> int:
    """Runs the sweep, and says whether a family fails."""
    parser = argparse.ArgumentParser(description="One training step of many model families, dense and sparse.")
    parser.add_argument("--library", choices=FAMILIES, help="only this one")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these families")
    parser.add_argument("--page", type=Path, help="a page in Markdown, whose sections are written anew")
    options = parser.parse_args()
    sections, fails = {}, False
    for library in [options.library] if options.library else FAMILIES:
        importlib.import_module(library)
        results = {}
        for name in FAMILIES[library]:
            if options.only and name not in options.only:
                continue
            results[name] = apart(library, name)
            fails = fails or bool(results[name].failures)
            print(*cells(name, results[name]), *results[name].failures, *results[name].unseen, sep="  ", flush=True)
        sections[f"sweep of {library}"] = text(library, results)
    if options.page and not options.only:
        pages.write_sections(options.page, sections)
    return int(fails)


if __name__ == "__main__":
    sys.exit(main())
