"""The device of the tests of kernels: a GPU, or the CPU where Triton interprets them (`make test-kernels`)."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from meprop import ops
from meprop.ops import native, triton

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU the kernels run where they are interpreted, and what is about a GPU itself not at all."""
    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents and (not triton.INTERPRETS or item.get_closest_marker("cuda")):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """A GPU, or a CPU whose operations the kernels serve."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    ops.remove(native.backend)
    yield torch.device("cpu")
    ops.register(native.backend, before="triton")
