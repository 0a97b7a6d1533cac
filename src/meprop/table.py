"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the head first, as lines with aligned columns.

    Args:
        rows: At least one; all of equal length.

    Raises:
        ValueError: A row is longer or shorter than another.

    Example:
        >>> print(text_table([("layer", "kept"), ("0", "4.0%"), ("encoder", "all")]))
        layer    kept
        0        4.0%
        encoder  all
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
