"""Files that are changed at random towards code that no file has reached yet, by atheris. `make fuzz` runs it.

It takes the name of a format of `test_fuzz` and the number of files. An input that is neither read nor refused ends it
with a traceback.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import atheris

# The finder of an editable installation hides the sources from atheris, which then sees no coverage.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

with atheris.instrument_imports(include=["meprop"]):
    from meprop.cli import faults
    from meprop.errors import DataError
    from test_fuzz import FORMATS


def main(name: str, runs: str) -> None:
    """Read so many files, the first of which is a right one."""
    loader = type(vars(faults)["__loader__"]).__name__
    if loader != "AtherisSourceFileLoader":  # else it would say so in the middle of its output, and go on blindly
        raise SystemExit(f"atheris has not instrumented meprop: it was loaded by a {loader}")
    write, read, finish = FORMATS[name]
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        corpus, path = Path(folder) / "corpus", Path(folder) / f"file{'.toml' if name == 'toml' else ''}"
        corpus.mkdir()
        write(path)
        path.replace(corpus / "right")

        def read_or_refused(content: bytes) -> None:
            path.write_bytes(finish(content))
            try:
                read(path)
            except (DataError, ValueError) as error:
                if not (isinstance(error, DataError) or faults.is_refusal(error)) or str(path) not in str(error):
                    raise

        atheris.Setup([sys.argv[0], str(corpus), f"-runs={runs}", "-max_len=4096", "-timeout=10"], read_or_refused)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
