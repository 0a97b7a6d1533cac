"""Fixtures of all tests, and the choice of the extension that they test."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch  # before the extension, which shares its OpenMP runtime

from meprop.ops import native

if path := os.environ.get("MEPROP_TEST_EXTENSION"):  # another build of it, such as the sanitized one
    spec = importlib.util.spec_from_file_location("meprop._C", path)
    assert spec is not None
    assert spec.loader is not None
    native._extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native._extension)


NO_LEVELS = pytest.param(None, marks=pytest.mark.skip(reason="there are no native kernels here"))


@pytest.fixture(params=native.levels() or [NO_LEVELS])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction-set level that runs here, in turn, in use."""
    before = native.level()
    assert before is not None
    native.use_level(request.param)
    yield request.param
    native.use_level(before)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills every uninitialised tensor with NaN (or the largest integer), so that an unwritten element shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def small_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of MNIST's format: 120 and 30 images of 4 x 4 pixels."""
    from interrupted import write_mnist

    return write_mnist(tmp_path_factory.mktemp("mnist"), 120, packed=False)


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in place of pictures. Drawing takes longer than a small run; what is drawn is tested in tests/reporting."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"a picture"))


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
