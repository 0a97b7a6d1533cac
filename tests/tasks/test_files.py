"""Downloads that break off, lie or race never leave a wrong file, and say what happened."""

import contextlib
import gzip
import hashlib
import multiprocessing
import os
import signal
import socket
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from meprop.errors import DataError
from meprop.tasks import files

CONTENTS = bytes(range(256)) * 1024  # 256 KiB: several chunks
FORK = multiprocessing.get_context("fork")


def md5(contents: bytes) -> str:
    return hashlib.md5(contents).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `contents` under every name; can break off or hang after some bytes, and know nothing of ranges."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.contents = CONTENTS
        self.ranges = True
        self.break_after: int | None = None
        self.hang = False
        self.asked: list[tuple[str, str | None]] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append((self.path[1:], asked))
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        body = self.server.contents[start:]
        if start and not body:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.break_after])
        self.wfile.flush()
        if self.server.hang:
            time.sleep(30)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield running
        running.shutdown()


def fetch(server: Server, folder: Path, name: str = "data.bin") -> Path:
    return files.download(server.url(name), f"md5:{md5(CONTENTS)}", folder)


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_download_leaves_the_file_and_nothing_else(server, tmp_path):
    assert fetch(server, tmp_path) == tmp_path / "data.bin"
    assert contents_of(tmp_path) == {"data.bin": CONTENTS}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on_where_it_stopped(server, tmp_path, ranges):
    server.ranges = ranges
    server.break_after = 200_000
    with pytest.raises(DataError, match=r"data\.bin"):
        fetch(server, tmp_path)
    left = contents_of(tmp_path)
    assert list(left) == ["data.bin.part"]
    arrived = len(left["data.bin.part"])
    assert 0 < arrived <= 200_000
    server.break_after = None
    fetch(server, tmp_path)
    assert server.asked == [("data.bin", None), ("data.bin", f"bytes={arrived}-")]
    assert contents_of(tmp_path) == {"data.bin": CONTENTS}


def test_wrong_contents_are_refused_and_not_kept(server, tmp_path):
    server.contents = CONTENTS[:-1] + b"?"
    with pytest.raises(DataError, match=r"data\.bin.*hash"):
        fetch(server, tmp_path)
    assert contents_of(tmp_path) == {}


def test_a_part_of_something_else_is_refused_and_not_kept(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(b"<html>please log in")
    with pytest.raises(DataError, match="hash"):
        fetch(server, tmp_path)
    assert contents_of(tmp_path) == {}
    fetch(server, tmp_path)
    assert contents_of(tmp_path) == {"data.bin": CONTENTS}


def test_a_part_that_is_already_complete_is_taken(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENTS)
    fetch(server, tmp_path)
    assert contents_of(tmp_path) == {"data.bin": CONTENTS}


def test_an_unreachable_server_is_an_error_at_once(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(DataError, match=f"127.0.0.1:{port}/data.bin"):
        files.download(f"http://127.0.0.1:{port}/data.bin", "md5:00", tmp_path)
    assert time.monotonic() - start < 5
    assert contents_of(tmp_path) == {}


def fill(server: Server, folder: Path) -> None:
    names = ("a.bin", "b.bin")

    def source(folder: Path, wanted: list[str]) -> None:
        for name in wanted:
            fetch(server, folder, name)

    files.fill_folder(folder, dict.fromkeys(names, md5(CONTENTS)), [source])


def test_a_killed_process_leaves_no_file_and_its_part_is_used(server, tmp_path):
    server.break_after, server.hang = 200_000, True
    process = FORK.Process(target=fill, args=(server, tmp_path))
    process.start()
    part = tmp_path / "a.bin.part"
    deadline = time.monotonic() + 10
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "a.bin").exists()
    server.break_after, server.hang = None, False
    fill(server, tmp_path)  # the dead process's lock does not stand in the way
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes() == CONTENTS
    name, asked = server.asked[1]
    assert name == "a.bin"
    assert asked is not None


def test_processes_at_once_download_each_file_once(server, tmp_path):
    processes = [FORK.Process(target=fill, args=(server, tmp_path / "new")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=20)
    assert [process.exitcode for process in processes] == [0] * 4
    assert contents_of(tmp_path / "new") == {"a.bin": CONTENTS, "b.bin": CONTENTS}
    assert sorted(name for name, _ in server.asked) == ["a.bin", "b.bin"]


def test_fill_asks_each_source_for_what_is_still_wanted(tmp_path):
    (tmp_path / "intact").write_bytes(b"1")
    (tmp_path / "damaged").write_bytes(b"?")
    asked = []

    def broken(folder, names):
        asked.append(sorted(names))
        (folder / "absent").write_bytes(b"3")
        raise DataError("broken: gave up")

    def good(folder, names):
        asked.append(sorted(names))
        (folder / "damaged").write_bytes(b"2")

    def never(folder, names):
        raise AssertionError("nothing was wanted any more")

    md5s = {"intact": md5(b"1"), "damaged": md5(b"2"), "absent": md5(b"3")}
    files.fill_folder(tmp_path, md5s, [broken, good, never])
    assert asked == [["absent", "damaged"], ["damaged"]]
    assert contents_of(tmp_path) == {"intact": b"1", "damaged": b"2", "absent": b"3"}
    files.fill_folder(tmp_path, md5s, [never])


def test_fill_reports_every_source(tmp_path):
    def fail(text):
        def source(folder, names):
            raise DataError(text)

        return source

    with pytest.raises(DataError, match=r"(?s)one\.bin.*first is down.*second is down.*--data-dir") as caught:
        files.fill_folder(tmp_path, {"one.bin": md5(b"")}, [fail("first is down"), fail("second is down")])
    assert str(tmp_path) in str(caught.value)


def test_fill_checks_what_a_gz_contains_and_not_how_it_was_compressed(tmp_path):
    for level in (1, 9):
        (tmp_path / "a.gz").write_bytes(gzip.compress(CONTENTS, level))
        files.fill_folder(tmp_path, {"a.gz": md5(CONTENTS)}, [])
    (tmp_path / "a.gz").write_bytes(gzip.compress(CONTENTS)[:-20])
    with pytest.raises(DataError, match=r"a\.gz"):
        files.fill_folder(tmp_path, {"a.gz": md5(CONTENTS)}, [])


def test_a_cache_that_cannot_be_written_names_the_remedy(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="MEPROP_CACHE"):
        files.fill_folder(tmp_path / "file" / "mnist", {"a": md5(b"")}, [])


def test_find_folder_order(monkeypatch, tmp_path):
    given, shared, cache = (tmp_path / name for name in ("given", "shared", "cache"))
    for folder in (given, shared / "set"):
        folder.mkdir(parents=True)
        (folder / "x").touch()
    filled = []

    def missing(folder):
        return [] if (folder / "x").exists() else ["x"]

    def find(data_dir=None):
        return files.find_folder("set", data_dir, missing, filled.append)

    monkeypatch.setenv("MEPROP_CACHE", str(cache))
    monkeypatch.setenv("MEPROP_DATA", str(shared))
    assert find(given) == given
    assert find(shared) == shared / "set"
    assert find() == shared / "set"
    monkeypatch.setenv("MEPROP_DATA", str(given))
    assert find() == given
    assert filled == []
    monkeypatch.setenv("MEPROP_DATA", str(tmp_path / "nowhere"))
    with pytest.warns(UserWarning, match=r"MEPROP_DATA.*nowhere.*not a folder"):
        assert find() == cache / "set"
    monkeypatch.delenv("MEPROP_DATA")
    assert find() == cache / "set"
    assert filled == [cache / "set"] * 2


def test_a_data_dir_without_the_files_is_an_error_and_never_a_download(monkeypatch, tmp_path):
    monkeypatch.setenv("MEPROP_DATA", str(tmp_path))
    (tmp_path / "empty").mkdir()
    for name, found in (("empty", "lacks x"), ("nowhere", "not a folder")):
        with pytest.raises(DataError, match=rf"{name}.*{found}.*--data-dir"):
            files.find_folder("set", tmp_path / name, lambda folder: ["x"], lambda folder: pytest.fail("downloaded"))


def test_write_is_reproducible_and_keeps_the_old_file_when_it_fails(monkeypatch, tmp_path):
    path = tmp_path / "a.gz"
    files.write_contents(path, CONTENTS)
    first = path.read_bytes()
    assert gzip.decompress(first) == CONTENTS
    monkeypatch.setattr(time, "time", lambda: 1e9)
    files.write_contents(path, CONTENTS)
    assert path.read_bytes() == first

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        files.write_contents(path, b"other")
    assert contents_of(tmp_path) == {"a.gz": first}


def make_wheel(folder: Path, name: str, contents: dict[str, str]) -> str:
    """Write NAME-1.0 as a wheel that pip accepts; return its sha256."""
    info = f"{name}-1.0.dist-info"
    contents = contents | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for entry, text in contents.items():
            wheel.writestr(entry, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def package_index(monkeypatch, tmp_path):
    """A folder that is all the package index that pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def test_wheel_from_package_index(package_index):
    sha256 = make_wheel(package_index, "tinydata", {"tinydata/a.csv": "1,2"})
    with files.wheel_from_package_index("tinydata==1.0", sha256) as wheel, zipfile.ZipFile(wheel) as archive:
        assert archive.read("tinydata/a.csv") == b"1,2"
    assert not wheel.exists()


@pytest.mark.parametrize(
    ("requirement", "sha256", "found"),
    [("tinydata==1.0", "00" * 32, "sha256 is"), ("tinydata==2.0", None, r"pip failed(?s:.*)tinydata==2\.0")],
)
def test_a_wheel_that_is_absent_or_other_than_expected(package_index, requirement, sha256, found):
    actual = make_wheel(package_index, "tinydata", {})
    with pytest.raises(DataError, match=found), contextlib.ExitStack() as stack:
        stack.enter_context(files.wheel_from_package_index(requirement, sha256 or actual))
