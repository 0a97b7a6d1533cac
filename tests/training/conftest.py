from __future__ import annotations

import pytest

from tiny import TinyTask


@pytest.fixture
def task():
    return TinyTask()
