"""Tasks of users: a function in a file of theirs that returns a `Setup`."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from meprop.errors import MepropError, did_you_mean
from meprop.training.config import RunConfig
from meprop.training.task import Evaluate, Setup

DEFAULT = "train.py:make"
_MAKE = "make"
_imported: set[str] = set()
"""The names under which files of users are in `sys.modules`."""


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
        ValueError: There is no such file, it has the name of another module, or there is no such function in it.
        ScriptError: The file raises an error when it is imported.
    """

    name = "script"
    unit = ""

    def __init__(self, config: ScriptConfig) -> None:
        self.config = config
        if config.path.suffix != ".py" or not config.path.is_file():
            raise ValueError(f"{config.path}: there is no such file; give FILE.py:FUNCTION, such as {DEFAULT}")
        self._path = config.path.resolve()  # the file may change the working directory
        self.fingerprint = hashlib.blake2b(self._path.read_bytes(), digest_size=6).hexdigest()
        """Of the file as it is imported. What it reads is not in it."""
        self._module = self._import()
        found = getattr(self._module, config.function, None)
        if not callable(found):
            names = [name for name, each in vars(self._module).items() if inspect.isfunction(each)]
            raise ValueError(
                f"{config.path} has no function {config.function!r}; it has {', '.join(names) or 'none'}"
                + did_you_mean(config.function, names)
            )
        self._make = found
        self._metric: str | None = None
        self._layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # of the models that it has made

    def _import(self) -> ModuleType:
        """Import the file as `python FILE` would, but under its own name: workers of a DataLoader find it by that."""
        path = self._path
        if path.stem in sys.stdlib_module_names or (path.stem in sys.modules and path.stem not in _imported):
            raise ValueError(f"{self.config.path} has the name of the module {path.stem}; give the file another name")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None  # it ends with .py
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        _imported.add(path.stem)
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        sys.modules[path.stem] = module
        with self._calling("the import of it"):
            spec.loader.exec_module(module)
        return module

    @property
    def metric(self) -> str:
        """The metric of what the function returns."""
        if self._metric is None:
            self.make(0, RunConfig())
        assert self._metric is not None  # `make` has set it
        return self._metric

    def make(self, seed: int, config: RunConfig) -> Setup:
        """Return what the function returns, with its own functions checked when they are called.

        Raises:
            ScriptError: It raises an error, or returns something else.
        """
        call = f"{self.config.function}(seed={seed})"
        parameters = inspect.signature(self._make).parameters
        named = {"seed": seed, "epochs": config.epochs}
        named = {name: value for name, value in named.items() if name in parameters}
        with self._calling(call):
            made = self._make(*(() if "seed" in named else (seed,)), **named)
        if not isinstance(made, Setup):
            raise ScriptError(f"{self.config.path}: {call} returned {_kind(made)}; it has to return a meprop.Setup")
        layers = {each for each in made.model.modules() if next(each.parameters(recurse=False), None) is not None}
        if not layers.isdisjoint(self._layers):
            raise ScriptError(
                f"{self.config.path}: {call} returned layers of an earlier call; each run needs a model of its own, "
                f"made in {self.config.function}"
            )
        self._layers.update(layers)
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
            with self._calling("the loss"):
                value = loss(model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ScriptError(f"{self.config.path}: the loss returned {_kind(value)}; {wanted}")
            return value

        return checked

    def _checked_quality(self, name: str, evaluate: Evaluate, metric: str) -> Evaluate:
        def checked(model: nn.Module) -> dict[str, float]:
            with self._calling(name):
                value = evaluate(model)
            found: dict[Any, Any] = dict(value) if isinstance(value, Mapping) else {metric: value}
            if metric not in found:
                raise ScriptError(
                    f"{self.config.path}: {name} returned {list(found)}, without {metric!r}, which is Setup(metric=...)"
                )
            for key, number in found.items():
                if isinstance(number, bool) or not isinstance(number, Real):
                    raise ScriptError(
                        f"{self.config.path}: {name} returned {_kind(number)} for {key!r}; it has to return a float, "
                        "or floats by name (tensor.item() makes one of a tensor)"
                    )
            return {str(key): float(number) for key, number in found.items()}

        return checked

    @contextmanager
    def blamed(self, what: str) -> Generator[None]:
        """See `Task`."""
        try:
            yield
        except Exception as error:
            if isinstance(error, MepropError) or _is_ours(error):
                raise
            raise self._blame(what, error) from error

    @contextmanager
    def _calling(self, what: str) -> Generator[None]:
        """Say of an error in a call of the user's code in which line of which file it was raised."""
        try:
            yield
        except MepropError:
            raise
        except (Exception, SystemExit) as error:
            raise self._blame(what, error) from error

    def _blame(self, what: str, error: BaseException) -> ScriptError:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == self._path]
        line = f", line {own[-1].lineno}" if own else ""
        return ScriptError(f"{self.config.path}{line}: {what} raised {type(error).__name__}: {error}")


def _is_ours(error: Exception) -> bool:
    """Whether our code raised an error, or called last what did: other than what trains, which calls the user's."""
    names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    if names[-1].startswith("meprop."):
        return True
    ours = [name for name in names if name.startswith("meprop.")]
    return bool(ours) and not ours[-1].startswith(("meprop.training.", "meprop.bench."))


def _kind(value: object) -> str:
    """Return in words what a value is."""
    if isinstance(value, Tensor):
        grad = "" if value.requires_grad else ", without a gradient"
        return f"a tensor of shape {tuple(value.shape)}{grad}"
    return "nothing (None)" if value is None else f"a value of type {type(value).__name__}"
