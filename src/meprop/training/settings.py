"""Settings that come as untyped values, from a table of TOML or from a line of text, checked against a dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from meprop.errors import did_you_mean


def hints(config: type[Any], but: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the types of a dataclass's fields by name, without those of the names `but`."""
    found = get_type_hints(config)
    return {field.name: found[field.name] for field in fields(config) if field.name not in but}


def checked(
    table: Mapping[str, Any], allowed: Mapping[str, Any], where: str, required: Iterable[str] = ()
) -> dict[str, Any]:
    """Return a table's values, lists as tuples, each of the type that is allowed under its key.

    Args:
        table: The values by key.
        allowed: The types by key.
        where: What error messages begin with.
        required: Keys that must be there.

    Raises:
        ValueError: A key is unknown or missing, or a value is of another type; the message names the key.
    """
    from typeguard import CollectionCheckStrategy, TypeCheckError, check_type  # which `meprop --help` need not import

    found: dict[str, Any] = {}
    for key, given in table.items():
        if key not in allowed:
            there = f"there is no such key; there are {', '.join(allowed)}{did_you_mean(key, allowed)}"
            raise ValueError(f"{where}{key}: {there}")
        value = tuple(given) if isinstance(given, list) else given
        parts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(part, int) and abs(part) >= 2**63 for part in parts):
            raise ValueError(f"{where}{key} is beyond 64 bits; TOML has no such integers")
        takes_bools = allowed[key] is bool or bool in get_args(allowed[key])
        ok = takes_bools or not any(isinstance(part, bool) for part in parts)  # to Python a bool is an int
        try:
            check_type(value, allowed[key], collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError:
            ok = False
        if not ok:
            expected = inspect.formatannotation(allowed[key]).replace("typing.", "")
            raise ValueError(f"{where}{key} is {given!r}; it must be {expected}")
        found[key] = value
    for key in required:
        if key not in found:
            raise ValueError(f"{where}{key} is missing")
    return found
