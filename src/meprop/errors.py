"""The errors and warnings of meprop, beside Python's own ValueError and TypeError."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral

__all__ = ["DataError", "MepropError", "NoEffectWarning", "NotSupportedError"]


class MepropError(Exception):
    """Base class of the errors that are meprop's own."""


class NotSupportedError(MepropError, RuntimeError):
    """The request is valid, but meprop cannot serve it. The message says what to do instead."""


class DataError(MepropError, RuntimeError):
    """A data file is missing, damaged or not what it claims to be. The message names the file and the remedy."""


class NoEffectWarning(UserWarning):
    """A call succeeded, but changed nothing."""


def nearest(wrong: str, names: Iterable[str]) -> str | None:
    """Return the name that is most like a wrong one, whatever its case; None if none is like it."""
    import difflib

    by_case = {name.casefold(): name for name in names}
    found = difflib.get_close_matches(wrong.casefold(), by_case, n=1)
    return by_case[found[0]] if found else None


def did_you_mean(wrong: str, names: Iterable[str]) -> str:
    """Return the end of a message about a wrong name: a question after the nearest name, or nothing."""
    name = nearest(wrong, names)
    return "" if name is None else f"; did you mean {name}?"


def check_counts(**counts: tuple[int, int]) -> None:
    """Checks numbers, each with the least that is allowed."""
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; it is an int")
        if value < least:
            raise ValueError(f"{name}={value}; it must be at least {least}")
