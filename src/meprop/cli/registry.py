"""How `tyro` reads paths, and shows the help of options."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

_BREAK = re.compile(r"(?<!\n)\n[ \t]*(?!\s|(?!None)[\w.-]+( or more)?: )")
"""A line break that only keeps the source narrow. A line of a list begins with `word: ` or `1 or more: `."""


def registry() -> Any:
    """Return the rules for `tyro`.

    A path may begin with the home directory as `~`, which a shell leaves alone in --out=~/runs. The help of an option
    is the docstring of its field without the line breaks of the source.
    """
    from tyro.constructors import (
        ConstructorRegistry,
        PrimitiveConstructorSpec,
        PrimitiveTypeInfo,
        StructConstructorSpec,
        StructTypeInfo,
    )

    rules = ConstructorRegistry()
    within = False

    @rules.struct_rule
    def options(info: StructTypeInfo) -> StructConstructorSpec | None:  # pyright: ignore[reportUnusedFunction]
        nonlocal within
        if within or not is_dataclass(info.type):
            return None
        within = True  # the rules of tyro are to have their turn
        try:
            made = ConstructorRegistry.get_struct_spec(info)
        finally:
            within = False
        if not isinstance(made, StructConstructorSpec):
            return None
        return replace(made, fields=tuple(replace(each, helptext=_joined(each.helptext)) for each in made.fields))

    @rules.primitive_rule
    def path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:  # pyright: ignore[reportUnusedFunction]
        if info.type is not Path:
            return None
        from meprop.machine import expanded

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda texts: expanded(texts[0]),
            is_instance=lambda each: isinstance(each, Path),
            str_from_instance=lambda each: [str(each)],
        )

    return rules


def _joined(about: str | Callable[[], str | None] | None) -> Callable[[], str | None]:
    """Return what makes the help when it is asked for."""

    def joined() -> str | None:
        text = about() if callable(about) else about
        return text and _BREAK.sub(" ", text)

    return joined
