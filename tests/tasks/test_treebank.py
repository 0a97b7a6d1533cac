"""Any valid CoNLL-U treebank is read, what is wrong with another is named by file and line, and EWT is downloaded."""

import contextlib
import gzip
import hashlib
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from meprop.errors import DataError
from meprop.tasks import treebank
from meprop.tasks.treebank import Sentence, load, locate, read


def line(identity: object, form: str = "word", head: object = 0, upos: str = "NOUN", xpos: str = "NN") -> str:
    return f"{identity}\t{form}\t_\t{upos}\t{xpos}\t_\t{head}\tdep\t_\t_"


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")
    return path


TREE = (line(1, "a", 2), line(2, "b", 0), line(3, "c", 2), "")


def folder_of_three(folder: Path, style: str = "x-{}.conllu") -> Path:
    """Write a training file of 3 sentences, a development file of 2 and a test file of 1."""
    folder.mkdir(parents=True, exist_ok=True)
    for count, split in enumerate(("test", "dev", "train"), start=1):
        write(folder / style.format(split), *TREE * count)
    return folder


# ---------------------------------------------------------------- format


def test_a_sentence_is_its_syntactic_words(tmp_path):
    path = write(
        tmp_path / "a.conllu",
        "# text = dámelo ya, #1",
        "1-3\tdámelo\t_\t_\t_\t_\t_\t_\t_\t_",
        "1\tda\tdar\tVERB\tV\tMood=Imp\t0\troot\t0:root\t_",
        "2\tme\tyo\tPRON\tP\t_\t1\tiobj\t_\t_",
        "3\tlo\tél\tPRON\t_\t_\t1\tobj\t_\t_",
        "3.1\tello\t_\t_\t_\t_\t_\t_\t_\t_",
        "3.2\tello\t_\t_\t_\t_\t_\t_\t_\t_",
        "4\tya  ya\tya\tADV\tR\t_\t1\tadvmod\t_\tSpaceAfter=No",
        "5\t#1\t_\tSYM\t_\t_\t4\tdep\t_\t_",
    )
    assert read(path) == (
        Sentence(
            forms=("da", "me", "lo", "ya  ya", "#1"),
            upos=("VERB", "PRON", "PRON", "ADV", "SYM"),
            xpos=("V", "P", "_", "R", "_"),
            heads=(0, 1, 1, 1, 4),
            deprels=("root", "iobj", "obj", "advmod", "dep"),
        ),
    )


def test_a_sentence_knows_its_file_and_lines_but_is_equal_wherever_it_stands(tmp_path):
    path = write(tmp_path / "a.conllu", *TREE, "", "# text", line("0.1"), line("1-2"), *TREE[:2], line("2.1"), TREE[2])
    first, second = read(path)
    assert first.path == second.path == path
    assert (first.lines, second.lines) == ((1, 2, 3), (9, 10, 12))
    assert (first, hash(first), repr(first)) == (second, hash(second), repr(second))
    assert first == Sentence(first.forms, first.upos, first.xpos, first.heads, first.deprels)


def test_ranges_may_follow_each_other_hold_one_word_and_hold_empty_nodes(tmp_path):
    ranges = (
        line("0.1"),
        line("1-2"),
        line(1),
        line("1.1"),
        line(2, head=1),
        line("2.1"),
        line("3-3"),
        line(3, head=1),
    )
    assert read(write(tmp_path / "a.conllu", *ranges))[0].heads == (0, 1, 1)


def test_an_empty_node_may_precede_the_first_word(tmp_path):
    path = write(tmp_path / "a.conllu", "0.1\tpro\t_\t_\t_\t_\t_\t_\t_\t_", line(1))
    assert [len(sentence.forms) for sentence in read(path)] == [1]


def test_line_ends_blank_lines_byte_order_mark_and_compression_do_not_matter(tmp_path):
    text = "\n".join(["# first", *TREE, "", "# second", *TREE])  # ends without a blank line
    plain = write(tmp_path / "plain.conllu", text)
    expected = read(plain)
    assert len(expected) == 2
    for name, contents in {
        "windows": text.replace("\n", "\r\n").encode(),
        "mark": text.encode("utf-8-sig"),
        "without the last line end": text.rstrip("\n").encode(),
        "gzipped": gzip.compress(text.encode()),
    }.items():
        (tmp_path / name).write_bytes(contents)
        assert read(tmp_path / name) == expected, name


def test_characters_that_only_look_like_line_ends_are_part_of_a_word(tmp_path):
    forms = ("a\u2028b", "a\x85b", "a\x0cb")
    path = write(tmp_path / "a.conllu", *(line(i, form, 0 if i == 1 else 1) for i, form in enumerate(forms, 1)))
    assert read(path)[0].forms == forms


MALFORMED = {
    "too few columns": ([*TREE, "1\tword\t_"], 5, "has 3 columns"),
    "too many columns": ([line(1) + "\t_"], 1, "has 11 columns"),
    "spaces for tabs": ([line(1).replace("\t", "  ")], 1, "has 1 columns"),
    "spaces for a blank line": ([*TREE, " ", *TREE], 5, "has 1 columns"),
    "empty column": ([line(1, form="")], 1, "has an empty column"),
    "no number as id": ([line("x")], 1, "has the id 'x', but the next word is 1"),
    "id with a sign": ([line("+1")], 1, r"has the id '\+1'"),
    "id of other digits": ([line("\N{FULLWIDTH DIGIT ONE}")], 1, "has the id"),
    "id zero": ([line(0)], 1, "has the id '0'"),
    "id left out": ([line(1), line(3, head=1)], 2, "has the id '3', but the next word is 2"),
    "id twice": ([line(1), line(1, head=1)], 2, "has the id '1', but the next word is 2"),
    "lost blank line": ([line(1), line(1)], 2, "has the id '1', but the next word is 2"),
    "range before its place": ([line("2-3"), line(1)], 1, "has the id '2-3'.* a range must be 1-1 or longer"),
    "range after its first word": ([line(1), line("1-2"), line(2, head=1)], 2, "has the id '1-2'"),
    "range not directly before its first word": ([line("1-2"), line("0.1"), line(1)], 2, r"has the id '0\.1'"),
    "range of no numbers": ([line("1-x"), line(1)], 1, "has the id '1-x'"),
    "range with a zero before": ([line("1-02"), line(1), line(2, head=1)], 1, "has the id '1-02'"),
    "range to its start": ([line(1), line("2-1"), line(2, head=1)], 2, "has the id '2-1'.*must be 2-2 or longer"),
    "range to beyond the sentence": ([line("1-99"), line(1)], 1, "has a range to 99, but the last word is 1"),
    "range to far beyond": ([line("1-" + "9" * 5000), line(1)], 1, "has the id"),
    "range after the last word": ([line(1), line("2-3")], 2, "has a range to 3, but the last word is 1"),
    "range twice": ([line("1-2"), line("1-2"), line(1), line(2, head=1)], 2, "has the id '1-2'"),
    "ranges that overlap": (
        [line("1-2"), line(1), line("2-3"), line(2, head=1), line(3, head=1)],
        3,
        r"has the id '2-3', but the next word is 2, the next empty node 1\.1\.",
    ),
    "misplaced empty node": ([line("1.1"), line(1)], 1, r"has the id '1\.1'"),
    "empty node twice": ([line(1), line("1.1"), line("1.1")], 3, r"has the id '1\.1'.* the next empty node 1\.2"),
    "empty nodes out of order": ([line(1), line("1.2"), line("1.1")], 2, r"has the id '1\.2'"),
    "comment between words": ([line(1), "# text", line(2, head=1)], 2, "is a comment within a sentence"),
    "comment after the words": ([line(1), "# text", "", *TREE], 2, "is a comment within a sentence"),
    "blank tag": ([line(1), line(2, head=1, upos=" ")], 2, "has the UPOS tag ' ', which must be without white space"),
    "tag with a space": ([line(1), line(2, head=1, xpos="N N")], 2, "has the XPOS tag 'N N'"),
    "tag with a no-break space": ([line(1, xpos="N\xa0")], 1, "has the XPOS tag"),
    "relation with a space": ([line(1).replace("dep", "dep x")], 1, "has the relation 'dep x'"),
    "NUL": ([line(1), line(2, head=1, form="a\0b")], 2, "has a NUL"),
    "head missing": ([line(1), line(2, head="_")], 2, "has the head '_', which must be a number from 0 to 2"),
    "head no integer": ([line(1, head="1.0")], 1, r"has the head '1\.0'"),
    "head with a zero before": ([line(1), line(2, head="01")], 2, "has the head '01', which must be a number"),
    "head negative": ([line(1, head=-1)], 1, "has the head '-1'"),
    "head of other digits": ([line(1, head="\N{ARABIC-INDIC DIGIT ZERO}")], 1, "has the head"),
    "head out of range": ([line(1), line(2, head=3)], 2, "has the head '3', which must be a number from 0 to 2"),
    "head astronomical": ([line(1, head="9" * 5000)], 1, "has the head"),
    "own head": ([line(1), line(2, head=2)], 2, "has the head '2', which is the word itself"),
    "two roots": (
        [line(1), line(2, head=1), line(3)],
        3,
        r"has the head 0, but so has line \d+",
    ),
    "cycle": ([line(1), line(2, head=4), line(3, head=1), line(4, head=2)], 2, "is in a cycle"),
    "no root": ([line(1, head=2), line(2, head=1)], 1, "is in a cycle"),
    "words that hang on a cycle": ([line(1), line(2, head=3), line(3, head=4), line(4, head=3)], 3, "is in a cycle"),
    "comments without words": ([*TREE, "# text = lost", "# end", ""], 6, "ends a sentence without words"),
    "an empty node without words": (["# a", line("0.1"), "", *TREE], 2, "ends a sentence without words"),
}


@pytest.mark.parametrize(("lines", "number", "reason"), MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("before", [0, 7])
def test_what_is_malformed_is_named_with_its_line(tmp_path, lines, number, reason, before):
    path = write(tmp_path / "bad.conllu", *["# text", *TREE, "", ""][:before], *lines)
    with pytest.raises(
        DataError, match=f"{re.escape(str(path))}: line {number + before} {reason}.*Correct it"
    ) as caught:
        read(path)
    assert all(len(quoted) <= 40 for quoted in re.findall("'[^']*'", str(caught.value).removeprefix(str(path))))


NO_TREE = (line(1, "a", "_"), line(2, "b", "_"), "")


@pytest.mark.parametrize(
    ("lines", "heads"),
    [
        (NO_TREE, [()]),
        ((*NO_TREE, *TREE), [(), (2, 0, 2)]),
        ((line(1, "a", "_"), line(2, "b", 1), ""), [()]),  # some heads
    ],
)
def test_where_no_tree_is_needed_heads_may_be_missing(tmp_path, lines, heads):
    path = write(tmp_path / "a.conllu", *lines)
    assert [sentence.heads for sentence in read(path, trees=False)] == heads
    with pytest.raises(DataError, match="line 1 has the head '_', which must be a number"):
        read(path)


@pytest.mark.parametrize("head", ["3", "1", "x", "-1"])
def test_heads_that_are_there_are_checked_though_no_tree_is_needed(tmp_path, head):
    path = write(tmp_path / "a.conllu", line(1, "a", head), line(2, "b", 0), "")
    with pytest.raises(DataError, match="line 1 has the head"):
        read(path, trees=False)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_mixed_encodings_are_named_with_their_line(tmp_path, mark):
    path = tmp_path / "mixed.conllu"
    path.write_bytes(mark + f"{line(1, 'café')}\n".encode() + f"{line(2, 'café', 1)}\n".encode("latin-1"))
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: line 2 is not UTF-8.*converted"):
        read(path)


@pytest.mark.parametrize("contents", [b"", b"\n\n\n", gzip.compress(b"")], ids=["nothing", "empty lines", "empty gzip"])
def test_a_file_without_sentences(tmp_path, contents):
    path = tmp_path / "empty.conllu"
    path.write_bytes(contents)
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: holds no sentence"):
        read(path)


GZ_DAMAGE = {
    "truncated": lambda data: data[:-7],
    "flipped bit": lambda data: data[:-6] + bytes([data[-6] ^ 1]) + data[-5:],
    "garbage after the header": lambda data: data[:10] + b"garbage" * 100,
}


@pytest.mark.parametrize("damage", GZ_DAMAGE.values(), ids=GZ_DAMAGE)
def test_a_damaged_gz_is_named(tmp_path, damage):
    path = tmp_path / "a.conllu.gz"
    path.write_bytes(damage(gzip.compress("\n".join(TREE).encode())))
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}: cannot be read .*undamaged copy"):
        read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.conllu: cannot be read"):
        read(tmp_path / "nowhere.conllu")


# ---------------------------------------------------------------- folder


@pytest.mark.parametrize("style", ["{}.conllu", "en_x-ud-{}.conllu", "my{}2.conllu"])
@pytest.mark.parametrize("subfolder", ["", "ud-english-ewt"])
def test_any_three_files_named_after_their_splits_are_taken(tmp_path, style, subfolder):
    folder = folder_of_three(tmp_path / subfolder, style)
    (folder / "README.train.md").touch()
    train = folder / style.format("train")
    train.with_name(f"{train.name}.gz").write_bytes(gzip.compress(train.read_bytes()))
    train.unlink()
    bank = load(tmp_path)
    assert [len(split) for split in (bank.train, bank.dev, bank.test)] == [3, 2, 1]
    assert str(bank) == "3 training, 2 development, 1 test sentences of 9, 6, 3 words"
    assert locate(tmp_path) == folder


def test_a_missing_split_is_named(tmp_path):
    (folder_of_three(tmp_path) / "x-dev.conllu").unlink()
    with pytest.raises(DataError, match=r"lacks \*dev\*\.conllu\(\.gz\)\. Put the ud-english-ewt files there"):
        load(tmp_path)


def test_of_several_files_for_a_split_none_is_chosen(tmp_path):
    write(folder_of_three(tmp_path) / "y-train.conllu.gz", *TREE)
    with pytest.raises(
        DataError, match=r"a single \*train\*\.conllu\(\.gz\) \(it has x-train\.conllu, y-train\.conllu\.gz\)"
    ):
        load(tmp_path)


def test_no_file_serves_as_two_splits(tmp_path):
    (folder_of_three(tmp_path) / "x-test.conllu").unlink()
    (tmp_path / "x-train.conllu").rename(tmp_path / "latest-train.conllu")
    with pytest.raises(DataError, match=r"lacks .*\*test\*.*no other split's \(latest-train\.conllu is\)"):
        load(tmp_path)


# ---------------------------------------------------------------- download


@pytest.fixture
def github(monkeypatch, tmp_path):
    """A server of three files in the place of GitHub, an empty cache and no MEPROP_DATA; yields the server's folder."""
    folder = folder_of_three(tmp_path / "github", "en_ewt-ud-{}.conllu")
    monkeypatch.setattr(treebank, "MD5", {name: md5((folder / name).read_bytes()) for name in treebank.MD5})
    monkeypatch.delenv("MEPROP_DATA", raising=False)
    monkeypatch.setenv("MEPROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, contextlib.ExitStack() as stack:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        stack.callback(server.shutdown)
        monkeypatch.setattr(treebank, "URL", f"http://127.0.0.1:{server.server_port}/")
        yield folder


def md5(contents: bytes) -> str:
    return hashlib.md5(contents).hexdigest()


def test_ewt_is_downloaded_once_and_mended(github, tmp_path):
    assert locate(None) is None
    bank = load(None)
    assert bank == load(github)
    cache = tmp_path / "cache" / "ud-english-ewt"
    assert locate(None) == cache
    assert {path.name for path in cache.glob("*.conllu*")} == set(treebank.MD5)

    (github / "en_ewt-ud-train.conllu").unlink()  # is not asked for again
    (cache / "en_ewt-ud-dev.conllu").write_text("damaged")
    assert load(None) == bank


def test_other_contents_than_ewts_are_refused(github, tmp_path):
    write(github / "en_ewt-ud-dev.conllu", *TREE)
    with pytest.raises(DataError, match=r"(?s)could not be downloaded.*en_ewt-ud-dev\.conllu.*hash.*--data-dir"):
        load(None)
    assert not (tmp_path / "cache" / "ud-english-ewt" / "en_ewt-ud-dev.conllu").exists()


def test_a_file_in_the_cache_that_is_not_ewts_is_an_error(github, tmp_path):
    load(None)
    write(tmp_path / "cache" / "ud-english-ewt" / "own-train.conllu", *TREE)
    assert locate(None) is None
    with pytest.raises(DataError, match=r"ud-english-ewt: lacks a single .*own-train\.conllu.*away"):
        load(None)


def test_real_ewt_comes_by_the_loaders_own_way(real_treebank):
    bank = load(None)
    assert str(bank) == "12544 training, 2001 development, 2077 test sentences of 204577, 25147, 25094 words"
    words = [word for sentence in bank.train for word in zip(sentence.upos, sentence.deprels, strict=True)]
    assert (len({upos for upos, _ in words}), len({deprel for _, deprel in words})) == (17, 51)
