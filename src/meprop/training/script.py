"""Tasks of users: a function in a file of theirs that returns a `Setup`."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from meprop.errors import MepropError, did_you_mean
from meprop.training.config import RunConfig
from meprop.training.task import Evaluate, Setup

DEFAULT = "train.py:make"
_MAKE = "make"


class ScriptError(MepropError):
    """A function of the user's file raised an error, or returned what it must not."""


@dataclass(frozen=True)
class ScriptConfig:
    """A task that is a function in a file."""

    script: str = DEFAULT
    """The file and the function in it that returns a `meprop.Setup`. It is called with the seed, and with the number of
    epochs if it has a parameter of the name epochs. Without a function, it is make."""

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.script if self.script.endswith(".py") else self.script.rpartition(":")[0])

    @property
    def function(self) -> str:
        """The function's name."""
        return _MAKE if self.script.endswith(".py") else self.script.rpartition(":")[2] or _MAKE


class ScriptTask:
    """The task of a user's file.

    Args:
        config: Which file, and which function in it.

    Raises:
        ValueError: There is no such file, or no such function in it.
        ScriptError: The file raises an error when it is imported.
    """

    name = "script"
    unit = ""

    def __init__(self, config: ScriptConfig) -> None:
        self.config = config
        if not config.path.is_file():
            raise ValueError(f"{config.path}: there is no such file; give FILE.py:FUNCTION, such as {DEFAULT}")
        self._module = self._import()
        found = getattr(self._module, config.function, None)
        if not inspect.isfunction(found):
            names = [name for name, each in vars(self._module).items() if inspect.isfunction(each)]
            raise ValueError(
                f"{config.path} has no function {config.function!r}; it has {', '.join(names) or 'none'}"
                + did_you_mean(config.function, names)
            )
        self._make = found
        self._metric: str | None = None

    def _import(self) -> ModuleType:
        """Import the file as `python FILE` would, but under its own name: workers of a DataLoader find it by that."""
        path = self.config.path.resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None  # it ends with .py
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        sys.modules[path.stem] = module
        with self._blamed("the import of it"):
            spec.loader.exec_module(module)
        return module

    @property
    def metric(self) -> str:
        """The metric of what the function returns."""
        if self._metric is None:
            self.make(0, RunConfig())
        assert self._metric is not None  # `make` has set it
        return self._metric

    @property
    def fingerprint(self) -> str:
        """A digest of the file. What it reads is not in it."""
        return hashlib.blake2b(self.config.path.read_bytes(), digest_size=6).hexdigest()

    def make(self, seed: int, config: RunConfig) -> Setup:
        """Return what the function returns, with its own functions checked when they are called.

        Raises:
            ScriptError: It raises an error, or returns something else.
        """
        call = f"{self.config.function}(seed={seed})"
        parameters = inspect.signature(self._make).parameters
        with self._blamed(call):
            made = self._make(seed, **({"epochs": config.epochs} if "epochs" in parameters else {}))
        if not isinstance(made, Setup):
            raise ScriptError(f"{self.config.path}: {call} returned {_kind(made)}; it has to return a meprop.Setup")
        self._metric = made.metric
        return replace(
            made,
            loss=self._checked_loss(made.loss),
            evaluate=self._checked_quality("evaluate", made.evaluate, made.metric),
            test=made.test and self._checked_quality("test", made.test, made.metric),
        )

    def _checked_loss(self, loss: Callable[[nn.Module, Any], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
        wanted = "it has to return a tensor of one number that depends on the model's parameters"

        def checked(model: nn.Module, batch: Any) -> Tensor:
            with self._blamed("the loss"):
                value = loss(model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ScriptError(f"{self.config.path}: the loss returned {_kind(value)}; {wanted}")
            return value

        return checked

    def _checked_quality(self, name: str, evaluate: Evaluate, metric: str) -> Evaluate:
        def checked(model: nn.Module) -> dict[str, float]:
            with self._blamed(name):
                value = evaluate(model)
            found: dict[Any, Any] = dict(value) if isinstance(value, Mapping) else {metric: value}
            if metric not in found:
                raise ScriptError(
                    f"{self.config.path}: {name} returned {list(found)}, without {metric!r}, which is Setup(metric=...)"
                )
            for key, number in found.items():
                if isinstance(number, bool) or not isinstance(number, int | float):
                    raise ScriptError(
                        f"{self.config.path}: {name} returned {_kind(number)} for {key!r}; it has to return a float, "
                        "or floats by name (tensor.item() makes one of a tensor)"
                    )
            return {str(key): float(number) for key, number in found.items()}

        return checked

    @contextmanager
    def _blamed(self, what: str) -> Generator[None]:
        """Say of an error in the user's code in which line of which file it was raised."""
        try:
            yield
        except MepropError:
            raise
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if Path(frame.filename) == self.config.path.resolve()]
            line = f", line {own[-1].lineno}" if own else ""
            raise ScriptError(f"{self.config.path}{line}: {what} raised {type(error).__name__}: {error}") from error


def _kind(value: object) -> str:
    """Return in words what a value is."""
    if isinstance(value, Tensor):
        grad = "" if value.requires_grad else ", without a gradient"
        return f"a tensor of shape {tuple(value.shape)}{grad}"
    return "nothing (None)" if value is None else f"a value of type {type(value).__name__}"
