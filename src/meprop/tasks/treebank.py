"""Treebanks in the CoNLL-U format (https://universaldependencies.org/format.html): by default UD English EWT.

The annotations of UD English EWT are under CC BY-SA 4.0. The paper's Wall Street Journal is licensed and cannot be
downloaded.
"""

import gzip
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import dropwhile, groupby
from pathlib import Path
from reprlib import repr as quote  # cuts what is long

from meprop.errors import DataError
from meprop.tasks import files

NAME = "ud-english-ewt"
SPLITS = ("train", "dev", "test")

# UD English EWT itself. This commit is that of 2025-05-10.
URL = "https://raw.githubusercontent.com/UniversalDependencies/UD_English-EWT/15d613d8447b3478787d4c278730a1e48a945efb/"
MD5 = {
    "en_ewt-ud-train.conllu": "fa9865539033efcf99ea90f8b93d6646",
    "en_ewt-ud-dev.conllu": "cb1da95ff28a449cb9bc286c922e15e1",
    "en_ewt-ud-test.conllu": "01630da0129f8600ef761dbcfd18b9e2",
}

COLUMNS = 10


@dataclass(frozen=True)
class Sentence:
    """The syntactic words of a sentence and their tree; word i, counted from 1, is at index i - 1."""

    forms: tuple[str, ...]
    upos: tuple[str, ...]
    """Universal part-of-speech tags; ``"_"`` where the treebank has none."""
    xpos: tuple[str, ...]
    """The treebank's own part-of-speech tags; ``"_"`` where it has none."""
    heads: tuple[int, ...]
    """The word that each word depends on, from 1; 0 for the root, of which there is one. Empty: there is no tree."""
    deprels: tuple[str, ...]
    """Each word's relation to its head."""
    path: Path | None = field(default=None, compare=False, repr=False)
    """The file that the sentence was read from, if any."""
    lines: tuple[int, ...] = field(default=(), compare=False, repr=False)
    """Each word's line in that file, from 1."""


@dataclass(frozen=True)
class Treebank:
    """The sentences of the three splits."""

    train: tuple[Sentence, ...]
    dev: tuple[Sentence, ...]
    test: tuple[Sentence, ...]

    def __str__(self) -> str:
        splits = (("training", self.train), ("development", self.dev), ("test", self.test))
        sentences = ", ".join(f"{len(split)} {name}" for name, split in splits)
        words = ", ".join(str(sum(len(sentence.forms) for sentence in split)) for _, split in splits)
        return f"{sentences} sentences of {words} words"


def load(data_dir: Path | None, *, trees: bool = True) -> Treebank:
    """Find, or download, the three files and read them.

    Args:
        data_dir: folder with one file for each split, ``*train*.conllu``, ``*dev*.conllu`` and ``*test*.conllu``,
            gzipped (``.conllu.gz``) or not; None looks in ``$MEPROP_DATA``, then in the cache, then downloads.
        trees: whether every sentence must have its tree; see `read`.

    Raises:
        DataError: a file is missing or damaged, or more than one matches.
    """
    folder = files.find_folder(NAME, data_dir, _missing, partial(files.fill_folder, md5=MD5, sources=[_from_github]))
    if lacking := _missing(folder):  # the cache can hold files that are not ours
        raise DataError(f"{folder}: lacks {', '.join(lacking)}. Move what does not belong there away.")
    return Treebank(*(read(path, trees=trees) for split in SPLITS for path in _find_files(folder, split)))


def locate(data_dir: Path | None) -> Path | None:
    """The folder that `load` would read now, or None where it would have to download."""
    folder = files.find_folder(NAME, data_dir, _missing, fill=lambda folder: None)
    return None if _missing(folder) else folder


def _find_files(folder: Path, split: str) -> list[Path]:
    paths = [path for suffix in ("", ".gz") for path in folder.glob(f"*{split}*.conllu{suffix}")]
    return sorted(path for path in paths if path.is_file())


def _missing(folder: Path) -> list[str]:
    """Return what keeps a folder from having exactly one file for each split."""
    found = {split: _find_files(folder, split) for split in SPLITS}
    lacking: list[str] = []
    for split, paths in found.items():
        pattern = f"*{split}*.conllu(.gz)"
        if not paths:
            lacking.append(pattern)
        elif len(paths) > 1:
            lacking.append(f"a single {pattern} (it has {', '.join(path.name for path in paths)})")
        elif sum(paths == others for others in found.values()) > 1:
            lacking.append(f"a {pattern} that is no other split's ({paths[0].name} is)")
    return lacking


def _from_github(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        files.download(URL + name, f"md5:{MD5[name]}", folder)


def grouped(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return the numbers of sentences in groups that, padded to their longest sentence, have at most so many words.

    That is one group, in the order given, where all fit. Else it is several by length. A sentence that is longer than
    the budget is a group of its own.

    Args:
        lengths: words in each sentence, of one or more.
        budget: of words in a group, padding included.
    """
    if len(lengths) * max(lengths) <= budget:
        return [[*range(len(lengths))]]
    groups: list[list[int]] = [[]]
    for sentence in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups[-1] and (len(groups[-1]) + 1) * lengths[sentence] > budget:
            groups.append([])
        groups[-1].append(sentence)
    return groups


# ---------------------------------------------------------------- format


def read(path: Path, *, trees: bool = True) -> tuple[Sentence, ...]:
    """Read a CoNLL-U file, gzipped or not.

    Multiword tokens (ids such as 3-4) and empty nodes (ids such as 8.1) are left out: only syntactic words have a
    place in the tree. As in Universal Dependencies, each sentence is a tree with exactly one root.

    Args:
        path: the file.
        trees: whether every sentence must have its tree. If not, a sentence may have heads that are ``"_"``; the others
            are checked all the same.

    Raises:
        DataError: the file cannot be read or is no such file; the message names the line.
    """
    # Not with the conllu library: it takes two spaces for a tab and lines with too few or too many columns for good
    # ones, knows of no line numbers, and does not look at the tree.
    numbered = enumerate(_read_text(path).replace("\r\n", "\n").split("\n"), start=1)
    blocks = groupby(numbered, key=lambda line: line[1] != "")
    sentences = tuple(_read_sentence(path, list(lines), trees) for has_words, lines in blocks if has_words)
    if not sentences:
        raise DataError(f"{path}: holds no sentence. Use a file with some.")
    return sentences


def _read_text(path: Path) -> str:
    remedy = "Replace it with an undamaged copy."
    try:
        contents = path.read_bytes()
        if contents[:2] == b"\x1f\x8b":  # what the file is, whatever it is called
            contents = gzip.decompress(contents)
    except (OSError, EOFError, zlib.error) as error:  # OSError: unreadable, and gzip's checksum
        raise DataError(f"{path}: cannot be read ({error}). {remedy}") from error
    try:
        text = contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise _malformed(path, line, f"is not UTF-8 ({error.reason}); other encodings must be converted") from error
    if (position := text.find("\0")) >= 0:
        raise _malformed(path, 1 + text.count("\n", 0, position), "has a NUL, which no text has")
    return text


def _read_sentence(path: Path, lines: Sequence[tuple[int, str]], trees: bool) -> Sentence:
    numbers, words = _read_words(path, lines)
    _, forms, _, upos, xpos, _, heads, deprels, _, _ = zip(*words, strict=True)
    for kind, labels in (("UPOS tag", upos), ("XPOS tag", xpos), ("relation", deprels)):
        for number, label in zip(numbers, labels, strict=True):
            if label.split() != [label]:
                raise _malformed(path, number, f"has the {kind} {quote(label)}, which must be without white space")
    tree = () if "_" in heads and not trees else _read_heads(path, numbers, heads)
    return Sentence(forms, upos, xpos, tree, deprels, path, numbers)


def _read_words(path: Path, lines: Sequence[tuple[int, str]]) -> tuple[tuple[int, ...], list[list[str]]]:
    """Return the lines' numbers and the columns of a sentence's words; all ids are in order."""
    numbers: list[int] = []
    words: list[list[str]] = []
    empty = 1  # of the next empty node; 0 after a range, which stands directly before its first word
    range_end = range_number = 0  # the last range's last word, and its line
    for number, line in dropwhile(lambda numbered: numbered[1].startswith("#"), lines):
        if line.startswith("#"):
            raise _malformed(path, number, "is a comment within a sentence; comments stand before it")
        columns = line.split("\t")
        if len(columns) != COLUMNS or "" in columns:
            found = f"{len(columns)} columns" if len(columns) != COLUMNS else "an empty column"
            raise _malformed(path, number, f"has {found}, but must have {COLUMNS}, separated by tabs and none empty")
        identity, word = columns[0], len(words) + 1
        if identity == str(word):
            numbers.append(number)
            words.append(columns)
            empty = 1
        elif empty and identity == f"{word - 1}.{empty}":
            empty += 1
        elif (
            range_end < word
            and (span := re.fullmatch(rf"{word}-([1-9][0-9]{{0,8}})", identity))
            and int(span[1]) >= word
        ):
            empty, range_end, range_number = 0, int(span[1]), number
        else:
            allowed = f"the next word is {word}"
            allowed += f", the next empty node {word - 1}.{empty}" if empty else ""
            allowed += f", and a range must be {word}-{word} or longer" if range_end < word else ""
            raise _malformed(path, number, f"has the id {quote(identity)}, but {allowed}")
    if not words:
        raise _malformed(path, lines[-1][0], "ends a sentence without words")
    if range_end > len(words):
        raise _malformed(path, range_number, f"has a range to {range_end}, but the last word is {len(words)}")
    return tuple(numbers), words


def _read_heads(path: Path, numbers: Sequence[int], texts: Sequence[str]) -> tuple[int, ...]:
    """Return the heads of a sentence, which make it a tree; ``numbers`` are the lines that they stand in."""
    allowed = {str(head): head for head in range(len(texts) + 1)}
    heads: list[int] = []
    for word, (number, text) in enumerate(zip(numbers, texts, strict=True), start=1):
        if text not in allowed:
            raise _malformed(path, number, f"has the head {quote(text)}, which must be a number from 0 to {len(texts)}")
        if allowed[text] == word:
            raise _malformed(path, number, f"has the head {text!r}, which is the word itself")
        heads.append(allowed[text])
    roots = [number for number, head in zip(numbers, heads, strict=True) if head == 0]
    if len(roots) > 1:  # no tree of Universal Dependencies, and the sign of a blank line lost between two sentences
        raise _malformed(path, roots[1], f"has the head 0, but so has line {roots[0]}: a sentence has one root")
    rooted = {0}
    for word in range(1, len(heads) + 1):
        ancestors: set[int] = set()
        while word not in rooted:
            if word in ancestors:
                raise _malformed(path, numbers[word - 1], "is in a cycle of heads: no way leads from it to a root")
            ancestors.add(word)
            word = heads[word - 1]
        rooted |= ancestors
    return tuple(heads)


def _malformed(path: Path, line: int, reason: str) -> DataError:
    return DataError(f"{path}: line {line} {reason}. Correct it, or use a valid CoNLL-U file.")
