"""Files that are changed at random: each is read, or refused by an error of ours. `make fuzz` reads many."""

from __future__ import annotations

import gzip
import os
import tracemalloc
import warnings

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("tyro")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interrupted import write_mnist
from meprop import experiments
from meprop.cli import faults
from meprop.errors import DataError
from meprop.experiments import records
from meprop.tasks import mnist, treebank
from meprop.training import checkpoint, tracking
from meprop.training.records import EpochRecord, Run, Seconds
from tiny import TinyConfig

MULTIPLE, BASE = 200, 2**20
"""Reading a file allocates at most so many times its size, and this many bytes. What a gzipped one holds counts."""

FUZZ = settings(
    max_examples=int(os.environ.get("MEPROP_FUZZ_EXAMPLES", "60")),
    deadline=5_000,  # milliseconds, within which a file of some kilobytes is read
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TOML = """
title = "A small one"
seeds = [0, 1]
task = { name = "tiny", hidden = [128] }
training = { epochs = 2, accelerator = "cpu", lr = 0.001 }
variants.dense = { rule = "dense", published = { test = 97.82 } }
variants.topk = { rule = "topk", k = 5, training.scope = "batch", simplify.of_mean = 0.5 }
"""
CONLLU = """# text = a b
1-2\tab\t_\t_\t_\t_\t_\t_\t_\t_
1\ta\ta\tDET\tDT\t_\t2\tdet\t_\t_
2\tb\tb\tNOUN\tNN\t_\t0\troot\t_\t_
2.1\tc\t_\t_\t_\t_\t_\t_\t_\t_

1\tgo\t_\tVERB\tVB\t_\t0\troot\t_\t_
"""


def result():
    metrics = {"accuracy": 90.0}
    run = Run(
        "topk", 0, 1, metrics, metrics, vars(Seconds()), 5, 0.04, [vars(EpochRecord(1, 0.1, metrics, metrics, 1))]
    )
    described = tracking.describe("tiny", {"settings": {"k": 5}, "metric": "accuracy", "beside": []}, [run])
    return tracking.plain(described)


def write_state(path):
    state = {"model": {"weight": torch.arange(12.0).reshape(3, 4)}, "random": (3, (1, 2), None), "loss": float("nan")}
    checkpoint.save(path, state, {"k": 5})


def write_result(path, *, digest):
    tracking.write_result(path, tracking.Result.of(result()))
    if not digest:  # so that what is behind it is reached
        content = tracking.read_content(path)
        path.write_text(tracking.json.dumps(content))


def sealed(content):
    """A checkpoint with the digest of its content, so that what is behind it is reached."""
    body = content[: -checkpoint._SEAL_LENGTH]
    return body + checkpoint._seal(body)


def read_checkpoint(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.load(path, {"k": 5}, TinyConfig)


def same(content):
    return content


def write_images(path):
    (write_mnist(path.parent, 5, packed=False) / "train-images-idx3-ubyte").replace(path)


def read_result(path):
    tracking.read_result(path, tracking.Result)


FORMATS = {
    "idx": (write_images, mnist.read_idx, same),
    "idx.gz": (write_images, mnist.read_idx, gzip.compress),
    "conllu": (lambda path: path.write_text(CONLLU), treebank.read, same),
    "conllu-tags": (lambda path: path.write_text(CONLLU), lambda path: treebank.read(path, trees=False), same),
    "toml": (lambda path: path.write_text(TOML), lambda path: experiments.load(str(path), {"tiny": TinyConfig}), same),
    "result": (lambda path: write_result(path, digest=True), read_result, same),
    "old-result": (lambda path: write_result(path, digest=False), read_result, same),
    "record": (lambda path: write_result(path, digest=False), records._read, same),
    "checkpoint": (write_state, read_checkpoint, same),
    "sealed": (write_state, read_checkpoint, sealed),
    "torch": (lambda path: torch.save({"format": 3}, path), read_checkpoint, same),
}  # fmt: skip
PIECES = [
    b"", b"\n", b"\n\n", b"\t", b"\t_", b"_", b"0", b"9" * 5_000, b"-1", b"1e999", b"NaN", b"null", b"true", b"[]",
    b"{}", b"[" * 3_000, b'{"a":' * 3_000, b'"', b"=", b"\xff", b"\x00", b"\xff" * 4, b"\x1f\x8b", b"1-2", b"2.1", b"#",
    "\u0661\u2028\U0001f600".encode(),
]  # fmt: skip
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 30), st.sampled_from(PIECES) | st.binary(max_size=8)),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", FORMATS)
@FUZZ
@given(edits=EDITS, cut=st.none() | st.binary(max_size=64))
def test_a_changed_file_is_read_or_refused(tmp_path, name, edits, cut):
    write, read, finish = FORMATS[name]
    path = tmp_path / f"file{'.toml' if name == 'toml' else ''}"
    write(path)
    content = path.read_bytes()
    for place, length, piece in edits:
        at = round(place * len(content))
        content = content[:at] + piece + content[at + length :]
    content = content if cut is None else cut
    path.write_bytes(finish(content))
    refused = None
    tracemalloc.start()
    try:
        read(path)
    except (DataError, ValueError) as error:
        refused = error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert refused is None or str(path) in str(refused)
    assert refused is None or isinstance(refused, DataError) or faults.is_refusal(refused)
    assert peak <= MULTIPLE * len(content) + BASE
