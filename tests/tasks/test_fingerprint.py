"""The digest of a task's data: that of what is in the files, wherever they lie."""

from __future__ import annotations

import gzip
import struct

import pytest

pytest.importorskip("pooch")

from meprop.tasks.mnist import MnistConfig, MnistTask
from meprop.tasks.parsing import ParsingConfig, ParsingTask
from meprop.tasks.tagging import TaggingConfig, TaggingTask


def write_digits(folder, *, last=0):
    folder.mkdir()
    for prefix in ("train", "t10k"):
        pixels, labels = bytes([1, 2, 3, 4, 5, last]), bytes([0, 1, 2])
        images = struct.pack(">4I", 0x803, 3, 1, 2) + pixels
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 3) + labels)
    return MnistTask(MnistConfig(folder, dev_size=1))


def write_treebank(folder, task, *, last="2"):
    folder.mkdir()
    for split in ("train", "dev", "test"):
        heads = ("2", "0", last if split == "test" else "2")
        rows = [
            (str(i), word, "_", "X" if head == "0" else "Y", word, "_", head, "x", "_", "_")
            for i, (word, head) in enumerate(zip("abc", heads, strict=True), start=1)
        ]
        (folder / f"{split}.conllu").write_text("".join("\t".join(row) + "\n" for row in rows) + "\n")
    return task(folder)


@pytest.mark.parametrize(
    "write",
    [
        write_digits,
        lambda folder, **other: write_treebank(folder, lambda data: ParsingTask(ParsingConfig(data)), **other),
        lambda folder, **other: write_treebank(folder, lambda data: TaggingTask(TaggingConfig(data)), **other),
    ],
    ids=["mnist", "parsing", "tagging"],
)
def test_it_is_that_of_the_content_to_the_last_number(tmp_path, write):
    first, copy = write(tmp_path / "a"), write(tmp_path / "b")
    assert first.fingerprint == copy.fingerprint
    other = write(tmp_path / "c", last=7 if write is write_digits else "1")
    assert other.fingerprint != first.fingerprint
