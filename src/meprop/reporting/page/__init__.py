"""`meprop report`: results as one page of HTML, which needs no network."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meprop.machine import write_atomically
from meprop.reporting.look import PHASE_COLORS
from meprop.reporting.page import cards, curves, sources, tables, units
from meprop.reporting.page.colors import NIGHT, WHITE, legible
from meprop.reporting.page.differences import differences
from meprop.reporting.page.series import COLORS, Judged, Series, judged, series_of
from meprop.reporting.page.sources import Source

if TYPE_CHECKING:
    from jinja2 import Template

PAGE = "report.html"
_MARK = b'<meta name="generator" content="meprop report">'
_PHASE_COLORS = ("#9AA8B8", "#3F5B78", "#B9892F")  # none that a rule has
_HERE = Path(__file__).parent


def write_report(paths: Sequence[Path], out: Path | None = None, *, overwrite: bool = False) -> Path:
    """Write a page about results, set side by side.

    Args:
        paths: Files of results, or folders with a result.json.
        out: The file of the page. None: report.html beside the first result.
        overwrite: Whether to replace a file that is no such page.

    Returns:
        The file of the page.

    Raises:
        ValueError: There is no path, one of them holds no result, or `out` is a folder or may not be replaced.
        DataError: A result is damaged.
        OSError: The page cannot be written.
    """
    if not paths:
        raise ValueError("give the folder of a result, such as runs/compare-mnist, or several")
    found = sources.read_all(paths)
    out = found[0].path.with_name(PAGE) if out is None else out
    _check_free(out, overwrite)
    page = rendered(found).encode(errors="replace")  # a name in a result may hold what UTF-8 cannot
    write_atomically(out, lambda file: file.write(page))
    return out


def _check_free(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; give a file, such as {out / PAGE}")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}; make it, or give another file")
    if out.exists() and not overwrite:
        with out.open("rb") as file:
            if _MARK not in file.read(1000):
                raise ValueError(f"{out} is no page of meprop report; give another --out, or --overwrite to replace it")


def rendered(found: Sequence[Source]) -> str:
    """Return the page about results as HTML."""
    template, scripts = _form()
    digests = (base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in scripts)
    return template.render(
        **_content(found),
        style=(_HERE / "page.css").read_text(),
        scripts=scripts,
        allowed=" ".join(f"'sha256-{each}'" for each in digests),
    )


@functools.cache
def _form() -> tuple[Template, list[str]]:
    """Return the template and the scripts."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    names = ("vendor/d3.min.js", "vendor/plot.umd.min.js", "page.js")
    return environment.get_template("page.html"), [(_HERE / name).read_text() for name in names]


def _content(found: Sequence[Source]) -> dict[str, Any]:
    """Return what the template shows."""
    series = series_of(found)
    verdicts = judged(series)
    points, parts = curves.points(series), curves.parts(series)
    lines = units.lines(series)
    widths, sets = units.widths(lines), dict.fromkeys(each.label for each in lines)
    targets = dict.fromkeys(round(each.verdict.target, 4) for each in verdicts)
    return {
        "tasks": list(dict.fromkeys(source.title for source in found)),
        "lead": _lead(series),
        "metric": found[0].metric + found[0].unit,
        "series": series,
        "colors": _palette([each.color for each in series]),
        "phases": dict(zip(PHASE_COLORS, _palette(_PHASE_COLORS), strict=True)),
        "differences": differences(found),
        "unfinished": [(each.label, run) for each in series for run in each.running],
        "cards": _cards(series, verdicts),
        "targets": list(targets),
        "points": points,
        "described": curves.described(points),
        "kept": curves.kept(points),
        "parts": parts,
        "parts_described": "; ".join(f"{each.label} {each.whole:.3g} seconds" for each in parts),
        "scores": tables.scores(series),
        "layers": tables.layers(series),
        "widths": widths,
        "widths_described": "; ".join(
            f"{each.label} ends with {each.width}" for each in {each.label: each for each in widths}.values()
        ),
        "activity": units.activity(lines),
        "sets": dict(zip(sets, _palette((COLORS * len(sets))[: len(sets)]), strict=True)),
        "models": tables.models(found),
        "disturbed": tables.disturbed(series),
        "made": tables.made(found),
        "texts": [source.text.replace("<", "\\u003c") for source in found],
    }


def _palette(colors: Sequence[str]) -> list[tuple[str, str]]:
    """Return each colour as it is on light and on dark ground."""
    return [(legible(color, WHITE), legible(color, NIGHT)) for color in colors]


def _cards(series: Sequence[Series], verdicts: Sequence[Judged]) -> list[cards.Card]:
    """Return a card for each verdict, then one for each other series that no verdict is about."""
    found = [cards.of_verdict(each, series.index(each.series)) for each in verdicts]
    shown = [each for verdict in verdicts for each in (verdict.series, verdict.dense)]
    return found + [
        cards.without_verdict(each, place) for place, each in enumerate(series) if each.runs and each not in shown
    ]


def _lead(series: Sequence[Series]) -> str:
    """Return in a line what the results hold."""
    runs = [run for each in series for run in each.runs]
    epochs = sorted({run.epochs for run in runs})
    of = f" of {tables.listed(epochs)} epochs" if epochs else ""
    seeds = sorted({run.seed for run in runs})
    return f"{len(runs)} finished runs{of}" + (f", seeds {tables.listed(seeds)}" if seeds else "")
