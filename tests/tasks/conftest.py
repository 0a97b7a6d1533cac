"""Fixtures of the tasks' tests."""

import pytest

from meprop.tasks import treebank


@pytest.fixture
def real_treebank() -> None:
    """Skips a test where UD English EWT is not here already: tests download nothing from outside."""
    if treebank.locate(None) is None:
        pytest.skip("UD English EWT is not here: set MEPROP_DATA, or run meprop data tagging")
