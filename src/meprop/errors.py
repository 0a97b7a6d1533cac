"""The errors and warnings of meprop, beside Python's own ValueError and TypeError."""

__all__ = ["DataError", "MepropError", "NoEffectWarning", "NotSupportedError"]


class MepropError(Exception):
    """Base class of the errors that are meprop's own."""


class NotSupportedError(MepropError, RuntimeError):
    """The request is valid, but meprop cannot serve it. The message says what to do instead."""


class DataError(MepropError, RuntimeError):
    """A data file is missing, damaged or not what it claims to be. The message names the file and the remedy."""


class NoEffectWarning(UserWarning):
    """A call succeeded, but changed nothing."""
