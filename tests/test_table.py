"""Tables as plain text."""

import pytest

from meprop.table import text_table


def test_columns_are_as_wide_as_their_widest_cell_and_lines_have_no_trailing_space():
    lines = text_table([("name", "kept", "why"), ("0", "4.0%", ""), ("encoder", "all", "narrow")]).splitlines()
    assert lines == ["name     kept  why", "0        4.0%", "encoder  all   narrow"]


def test_a_row_that_lacks_a_cell_is_refused():
    with pytest.raises(ValueError, match=r"zip\(\)"):
        text_table([("a", "b"), ("c",)])
