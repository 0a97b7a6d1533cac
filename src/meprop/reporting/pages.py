"""Tables as Markdown, and the sections of hand-written pages that are generated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from meprop.machine import write_atomically


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells, the head first, as a Markdown table; all columns but the first are aligned right."""
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def short_commit(commit: str | None) -> str:
    """Return what a page says of `tracking.commit()`."""
    found, dash, dirty = (commit or "unknown").partition("-")
    return f"commit {found[:12]}{dash}{dirty}"


def markers(section: str) -> tuple[str, str]:
    """Return the lines between which a page has the section of this name."""
    return f"<!-- {section}: begin -->", f"<!-- {section}: end -->"


def sections(page: Path) -> list[str]:
    """Return the names of a page's generated sections, in order; none if there is no such page."""
    return re.findall(r"<!-- (.+?): begin -->", page.read_text(encoding="utf-8")) if page.is_file() else []


def check_section(page: Path, section: str) -> None:
    """Raise ValueError unless the file is there and has the two lines between which the section goes."""
    _around(page.read_text(encoding="utf-8") if page.is_file() else "", section, page)


def write_sections(page: Path, contents: Mapping[str, str]) -> None:
    """Replace sections of a page by new contents; everything else stays.

    Raises:
        ValueError: The page has no such section.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    for section, content in contents.items():
        before, after = _around(text, section, page)
        begin, end = markers(section)
        text = f"{before}{begin}\n{content}\n{end}{after}"
    write_atomically(page, lambda file: file.write(text.encode()))


def _around(text: str, section: str, page: Path) -> tuple[str, str]:
    begin, end = markers(section)
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"--page {page}: there must be such a file, with the lines {begin} and {end}")
    return before, after
