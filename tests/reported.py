"""Results on disk as the commands leave them, and what a page of `meprop report` says of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from meprop.reporting.page import write_report
from meprop.tasks.mnist import MnistConfig
from meprop.training import tracking
from meprop.training.config import TrainingConfig
from simulated import simulated

MNIST, TRAINING = MnistConfig(), TrainingConfig(epochs=6, noise=0.25)
MACHINE = {"cpu": "AMD EPYC", "threads": 1, "gpu": None, "keeps_freed_memory": True}
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "meprop": "0.1.0"}
LAYERS = [
    {
        "name": f"layers.{at}.mlp.up",
        "kind": "Linear",
        "in_features": 512,
        "out_features": 512,
        "status": "sparse",
        "k": None,
        "density": 0.02 + 0.01 * at,
        "rule": {"noise": 0.25, "scope": "global", "k": None},
        "reason": "always",
    }
    for at in range(3)
]
HEAD = {
    "name": "head",
    "kind": "Linear",
    "in_features": 512,
    "out_features": 10,
    "status": "dense",
    "k": None,
    "density": 1.0,
    "rule": None,
    "reason": "narrow: 10 output features",
}


@dataclass(frozen=True)
class Written(tracking.Result):
    verdicts: list = field(default_factory=list)
    running: list = field(default_factory=list)
    models: list = field(default_factory=list)


def runs(seeds=3, rules=("sampled",), **options):
    """Dense runs and those of rules; the layers of a transformer in each sparse one."""
    dense, sparse = simulated(np.random.default_rng(0), seeds, **options)
    shrinking = [{**record, "density": 0.1 / record["epoch"]} for record in sparse[0].curve]
    sparse = [replace(run, layers=[*LAYERS, HEAD], curve=shrinking if run.seed == 0 else run.curve) for run in sparse]
    return [*dense, *(replace(run, rule=rule) for rule in rules for run in sparse)]


def config(task=MNIST, training=TRAINING, **others):
    plain = {"task": tracking.plain(task), "training": tracking.plain(training)}
    return {**plain, "rule": "sampled", "margin": 0.2, "data": "1a2b3c", "out": "runs/compare", **others}


def write(folder, found, name="result.json", *, task="mnist", settings=None, machine=MACHINE, **others):
    """Write a result, and return its file."""
    folder.mkdir(parents=True, exist_ok=True)
    result = Written(task, settings or config(), machine, VERSIONS, "850a10ae92ce76ac", found, **others)
    tracking.write_result(folder / name, result)
    return folder / name


class Page(HTMLParser):
    """The parts of a page: its elements, the texts of each kind of element, and the rows of each table."""

    def __init__(self, *paths: Path) -> None:
        super().__init__()
        self.html = write_report(paths, paths[0].parent / "page.html", overwrite=True).read_text()
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        self.elements[tag] += 1
        self.attributes.append((tag, dict(attrs)))
        if tag in ("meta", "br"):
            return
        self._open.append(tag)
        self.texts.setdefault(tag, []).append("")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, f"{tag} is not closed in its place"
        if tag in ("dt", "dd"):
            self.handle_data(" ")

    def handle_data(self, data):
        for tag in set(self._open):
            self.texts[tag][-1] += data
        if self._open and {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data

    def table(self, head):
        """The rows of the table whose first row has such a cell, stripped."""
        found = [[[cell.strip() for cell in row] for row in table] for table in self.tables]
        return next(table[1:] for table in found if head in table[0])

    def has(self, text):
        """Whether it says so, whatever the line breaks."""
        said = " ".join(" ".join(self.texts[tag]) for tag in ("header", "main"))
        return " ".join(text.split()) in " ".join(said.split())
