"""An advice as text of 80 columns, and as HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from math import isnan
from textwrap import wrap

import meprop
from meprop.advice.record import Advice, GroupAdvice, Part, RuleAdvice
from meprop.rules import Rule
from meprop.table import text_table

__all__ = ["code", "html", "milliseconds", "plain", "short"]

_WIDTH, _BAR = 80, 30

_Rows = list[tuple[str, ...]]


def short(rule: Rule) -> str:
    """A rule as it is written most briefly, such as TopK(0.04, "global")."""
    return re.sub(r"\b(k|scope)=", "", repr(rule)).replace("'", '"')


def code(rule: Rule) -> str:
    """A rule as code in which meprop's own names begin with meprop."""
    return re.sub(r"\b(\w+)\(", lambda found: f"{'meprop.' * hasattr(meprop, found[1])}{found[0]}", short(rule))


def plain(advice: Advice) -> str:
    """The tables as text."""
    parts: list[str] = ["\n".join(_headline(advice))]
    for title, rows, legend in _tables(advice):
        lines = [title, *(f"  {line}" for line in text_table(rows).splitlines())]
        parts.append("\n".join([*lines, *_wrapped(legend, "  ")]))
    if advice.notes:
        lines = [line for note in advice.notes for line in _wrapped([note], "- ")]
        parts.append("\n".join(["Mind", *(f"  {line}" for line in lines)]))
    parts.append("\n".join(_wrapped([f"Measured {advice.state}, {advice.measured}."], "")))
    return "\n\n".join(parts)


def html(advice: Advice) -> str:
    """The tables as HTML."""
    first, *others = _headline(advice)
    parts = [f"<p><b>{escape(first)}</b></p>", *(f"<p>{escape(line)}</p>" for line in others)]
    for title, (head, *rows), legend in _tables(advice):
        cells = "".join(f"<th>{escape(cell.strip())}</th>" for cell in head)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell.strip())}</td>' for cell in row)}</tr>" for row in rows)
        caption = f"<caption><b>{escape(title)}</b></caption>"
        parts.append(f"<table>{caption}<thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>")
        parts += [f"<p>{escape(line)}</p>" for line in legend]
    if advice.notes:
        parts.append(f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in advice.notes)}</ul>")
    parts.append(f"<p>Measured {escape(advice.state)}, {escape(advice.measured)}.</p>")
    return f"<div>{''.join(parts)}</div>"


def _headline(advice: Advice) -> list[str]:
    return (
        [f"Try  {advice.line}", *_wrapped([f"It {advice.verdict}"], "")]
        if advice.line
        else _wrapped([advice.verdict], "")
    )


def _wrapped(lines: Sequence[str], indent: str) -> list[str]:
    width = _WIDTH - (2 if indent == "- " else 0)
    return [
        part for line in lines for part in wrap(line, width, initial_indent=indent, subsequent_indent=" " * len(indent))
    ]


def _tables(advice: Advice) -> list[tuple[str, _Rows, list[str]]]:
    """Each table: its title, its rows with the head first, and what is said below it."""
    head = ("part", "ms", "share", "")
    parts = [head, *(_part_row(part) for part in advice.parts)]
    tables = [(f"A dense step takes {milliseconds(advice.step_ms)} ms", _aligned(parts, (1, 2)), list[str]())]
    if advice.rules:
        tables.append(("What a rule makes of it", *_rule_table(advice)))
    if advice.groups:
        tables.append(("Layers, by their share of the backward pass", *_layer_table(advice.groups)))
    return tables


def _part_row(part: Part) -> tuple[str, ...]:
    bar = "#" * max(0, round(part.share * _BAR))
    return f"{'  of that, ' * part.within}{part.name}", milliseconds(part.ms), f"{part.share:.0%}", bar


def _rule_table(advice: Advice) -> tuple[_Rows, list[str]]:
    head = ("rule", "step", "kept", "dW cos", "err", "of noise", "dx cos", "err")
    rows = [head, *map(_rule_row, advice.rules)]
    if advice.noise is not None:
        of_noise = (_fixed(advice.noise.cosine), _fixed(advice.noise.error), "1.00x")
        rows.append(("(another batch)", "", "", *of_noise, "", ""))
    legend = [
        "step: dense / this. dW: cosine and relative error of the weights' gradient against the dense one. of noise: "
        "this error / the noise that a batch's own gradient has. dx: of the gradient that reaches the first layer.",
    ]
    if any(not each.unbiased for each in advice.rules):
        legend.append("* biased: what is left out does not average out over the steps, as noise does.")
    return _aligned(rows, range(1, len(head))), legend


def _rule_row(each: RuleAdvice) -> tuple[str, ...]:
    name = f"{short(each.rule)}{'' if each.unbiased else ' *'}"
    step = f"{each.speedup:.2f}x"
    if each.weights is None or each.first is None:
        return name, step, "all", "", "", "", "", ""
    of_noise = "" if each.of_noise is None else f"{each.of_noise:.2f}x"
    agreements = [_fixed(value) for one in (each.weights, each.first) for value in (one.cosine, one.error)]
    kept = "" if each.kept is None else f"{each.kept:.1%}"
    return name, step, kept, *agreements[:2], of_noise, *agreements[2:]


def _layer_table(groups: Sequence[GroupAdvice]) -> tuple[_Rows, list[str]]:
    reasons = list(dict.fromkeys(each.why for each in groups if each.why))
    rows: _Rows = [("layer", "", "in x out", "share", "gain", "best")]
    for each in sorted(groups, key=lambda each: -(each.share or 0.0)):
        best = f"dense ({reasons.index(each.why) + 1})" if each.why else short(each.best_rule) if each.best_rule else ""
        rows.append(
            (
                each.name or each.kind,
                f"x{len(each.layers)}" if len(each.layers) > 1 else "",
                f"{each.in_features} x {each.out_features}",
                "" if each.share is None else f"{each.share:.0%}",
                "" if each.gain is None else f"{each.gain:.1f}x",
                best,
            )
        )
    aligned = _aligned(rows, (3, 4))
    room = _WIDTH - max(len(text_table([row[1:]])) for row in _padded(aligned)) - 4
    clipped: _Rows = [(_clipped(name, room), *others) for name, *others in aligned]
    return clipped, [f"({number}) {reason}" for number, reason in enumerate(reasons, 1)]


def _clipped(name: str, room: int) -> str:
    """The end of a name, from a dot on."""
    if len(name) <= room:
        return name
    end = name[3 - room :]
    return f"...{end[end.find('.') + 1 :]}"


def _padded(rows: _Rows) -> _Rows:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [tuple(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _aligned(rows: _Rows, right: Sequence[int]) -> _Rows:
    """The same with the cells of some columns aligned at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [tuple(cell.rjust(widths[at]) if at in right else cell for at, cell in enumerate(row)) for row in rows]


def milliseconds(ms: float) -> str:
    """A time with about three digits."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def _fixed(value: float) -> str:
    return "" if isnan(value) else f"{value:.2f}"
