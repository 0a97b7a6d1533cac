"""The public surface is what surface.txt says: every name that a user imports, with its signature.

Users import the modules in `MODULES`. Of each, the names in its `__all__` are public. Other names that `dir()` shows,
such as submodules that an import leaves behind, are not. Of a class, the constructor and the members without an
underscore are public, unless they are torch's own.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import GenericAlias, ModuleType
from typing import ForwardRef

import pytest

from meprop.ops.registry import Operation

FILE = Path(__file__).with_name("surface.txt")
HOW_TO_ACCEPT = "If the change is meant: MEPROP_UPDATE_SURFACE=1 pytest tests/test_surface.py, and read the difference."
MODULES = [
    "meprop",
    "meprop.advice",
    "meprop.boosting",
    "meprop.chip.core",
    "meprop.chip.cost",
    "meprop.chip.design",
    "meprop.chip.model",
    "meprop.chip.synthesis",
    "meprop.chip.yosys",
    "meprop.distributed",
    "meprop.edges",
    "meprop.errors",
    "meprop.functional",
    "meprop.integrations.huggingface",
    "meprop.integrations.lightning",
    "meprop.nn",
    "meprop.nn.base",
    "meprop.nn.huggingface",
    "meprop.ops",
    "meprop.optim",
    "meprop.policy",
    "meprop.record",
    "meprop.pruning",
    "meprop.rules",
    "meprop.selection",
]


# ---------------------------------------------------------------- what is public


def public_names(module: ModuleType) -> list[str]:
    return sorted(module.__all__)


def is_ours(cls: type) -> bool:
    return cls.__module__.startswith("meprop")


def is_function(value: object) -> bool:
    return inspect.isfunction(value) or isinstance(value, Operation)


def own_annotations(cls: type) -> list[tuple[str, object]]:
    """Of attributes that get their values elsewhere."""
    annotations = vars(cls).get("__annotations__", {})
    return [(name, each) for name, each in annotations.items() if name[0] != "_" and name not in vars(cls)]


def members(cls: type) -> Iterator[tuple[str, object]]:
    """The public members that meprop defines: of a class, and of those of ours that it is made of.

    torch's optimizers put a `step` of torch's into the class when the first one is made: it is none of them.
    """
    names = {name for base in cls.__mro__ if is_ours(base) for name in vars(base)}
    for name in sorted(name for name in names if not name.startswith("_")):
        value = inspect.getattr_static(cls, name)
        if not inspect.isfunction(value) or value.__module__.startswith("meprop"):
            yield name, value


# ---------------------------------------------------------------- as text


class AsWritten:
    """An annotation as it is in the source, without quotes; of an object, its name without the module."""

    def __init__(self, annotation: object) -> None:
        if isinstance(annotation, ForwardRef):
            annotation = annotation.__forward_arg__
        if isinstance(annotation, type) and not isinstance(annotation, GenericAlias):
            annotation = annotation.__qualname__
        self.text = annotation if isinstance(annotation, str) else re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(annotation))

    def __repr__(self) -> str:
        return self.text


def signature(function: Callable[..., object]) -> str:
    found = inspect.signature(function)

    def written(annotation: object) -> object:
        return annotation if annotation is inspect.Signature.empty else AsWritten(annotation)

    parameters = [each.replace(annotation=written(each.annotation)) for each in found.parameters.values()]
    return str(found.replace(parameters=parameters, return_annotation=written(found.return_annotation)))


def constructor(cls: type) -> str:
    """Its arguments, if the constructor is ours."""
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base) or base is object)
    if issubclass(cls, tuple):
        owner = cls
    return signature(cls).removesuffix(" -> None") if is_ours(owner) else ""


def bases(cls: type, public: set[type]) -> list[type]:
    """The nearest classes that it is a subclass of and that are public, or not ours."""
    known = [base for base in cls.__mro__[1:-1] if base in public or not is_ours(base)]
    known = [base for base in known if base.__module__ not in ("abc", "typing")]
    return [base for base in known if not any(base in other.__mro__[1:] for other in known)]


def lines_of_members(cls: type) -> Iterator[str]:
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    yield from (f"    {each.name}: {AsWritten(each.type)}" for each in fields if not each.init)
    if not fields and not issubclass(cls, tuple):
        annotations = {
            name: each for base in reversed(cls.__mro__) if is_ours(base) for name, each in own_annotations(base)
        }
        yield from (f"    {name}: {AsWritten(each)}" for name, each in sorted(annotations.items()))
    for name, value in members(cls):
        if isinstance(value, functools.cached_property):
            yield f"    {name}: {AsWritten(inspect.signature(value.func).return_annotation)}"
        elif isinstance(value, property):
            settable = "" if value.fset is None else ", can be set"
            yield f"    {name}: {AsWritten(inspect.signature(value.fget).return_annotation)}{settable}"
        elif isinstance(value, staticmethod | classmethod):
            yield f"    {type(value).__name__} {name}{signature(getattr(cls, name))}"
        elif inspect.isfunction(value):
            yield f"    {name}{signature(value)}"
        elif name not in {each.name for each in fields} | set(getattr(cls, "_fields", ())):
            yield f"    {name} = {value!r}"


def lines_of_class(name: str, cls: type, public: set[type]) -> Iterator[str]:
    of = bases(cls, public)
    owners = [base.__module__.partition(".")[0] for base in of]
    names = [
        base.__name__ if base in public or owner == "builtins" else f"{owner}.{base.__name__}"
        for base, owner in zip(of, owners, strict=True)
    ]
    yield f"  class {name}{constructor(cls)}" + (f", subclass of {' and '.join(names)}" if names else "")
    inherited = {line for base in of if base in public for line in lines_of_members(base)}
    yield from (line for line in lines_of_members(cls) if line not in inherited)


def lines_of_module(module: ModuleType, public: set[type], homes: dict[int, str]) -> Iterator[str]:
    """`homes` says in which module each class and function was listed first."""
    yield module.__name__
    for name in public_names(module):
        value = getattr(module, name)
        if inspect.ismodule(value):
            yield f"  module {name}"
        elif not inspect.isclass(value) and not is_function(value):
            yield f"  {name} = {AsWritten(value)}"
        elif homes.setdefault(id(value), module.__name__) != module.__name__:
            yield f"  {name}, that of {homes[id(value)]}"
        elif inspect.isclass(value):
            yield from lines_of_class(name, value, public)
        else:
            yield f"  {name}{signature(value)}"


def surface() -> str:
    modules = [importlib.import_module(name) for name in MODULES]
    values = [getattr(module, name) for module in modules for name in public_names(module)]
    public, homes = {value for value in values if inspect.isclass(value)}, dict[int, str]()
    parts = ["\n".join(lines_of_module(module, public, homes)) for module in modules]
    head = "# What users import, with signatures. tests/test_surface.py compares it and writes it.\n"
    head += "# A member that a class has from a public one above it is not repeated.\n"
    return head + "".join(f"\n{wrapped(part)}\n" for part in parts)


def wrapped(text: str) -> str:
    return "\n".join(
        textwrap.fill(line, 120, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )


# ---------------------------------------------------------------- the tests


def test_the_surface_is_the_one_that_is_written_down():
    found = surface()
    if os.environ.get("MEPROP_UPDATE_SURFACE"):
        FILE.write_text(found)
    written = FILE.read_text()
    if found != written:
        difference = difflib.unified_diff(written.splitlines(), found.splitlines(), "surface.txt", "now", lineterm="")
        pytest.fail("\n".join(["the public surface has changed.", *difference, HOW_TO_ACCEPT]), pytrace=False)


@pytest.mark.parametrize("name", MODULES)
def test_a_public_module_says_what_is_public(name):
    module = importlib.import_module(name)
    assert isinstance(module.__all__, list)
    assert len(set(module.__all__)) == len(module.__all__)
    assert set(module.__all__) <= set(dir(module))
    assert not any(each.startswith("_") for each in module.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    public = public_names(module)
    assert public
    for each in public:
        value = getattr(module, each)
        if inspect.isclass(value):
            assert has_its_own_text(value), f"{name}.{each}"
            undocumented = [
                member for member, found in members(value) if not member_is_documented(value, member, found)
            ]
            if dataclasses.is_dataclass(value):
                fields = [field.name for field in dataclasses.fields(value) if field.init]
                undocumented += [field for field in fields if not is_described(value, field)]
            assert not undocumented, f"of {name}.{each}"
        elif is_function(value) or inspect.ismodule(value):
            assert value.__doc__, f"{name}.{each}"
        else:
            assert each in names_with_a_text_below(), f"{name}.{each}"


def has_its_own_text(cls: type) -> bool:
    """Not one that it inherits, nor the one that a dataclass makes of its arguments."""
    text = vars(cls).get("__doc__")
    return bool(text) and not text.startswith(f"{cls.__name__}(")


def member_is_documented(cls: type, name: str, value: object) -> bool:
    """A method or property by a text of its own, an attribute in its class's text or by one below it."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property | functools.cached_property) or inspect.isfunction(value):
        return bool(value.__doc__)
    return is_described(cls, name)


def is_described(cls: type, attribute: str) -> bool:
    """In the text of the class or below the attribute, here or in a class that this is a subclass of."""
    texts = (vars(base).get("__doc__") or "" for base in cls.__mro__)
    return any(f" {attribute}: " in text for text in texts) or any(
        attribute in names_with_a_text_in(ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body)
        for base in cls.__mro__
        if is_ours(base)
    )


@functools.cache
def names_with_a_text_below() -> set[str]:
    """The constants and types of the library that have a string after their assignment."""
    paths = (Path(__file__).parents[1] / "src" / "meprop").rglob("*.py")
    return set().union(*(names_with_a_text_in(ast.parse(path.read_text()).body) for path in paths))


def names_with_a_text_in(body: list[ast.stmt]) -> set[str]:
    """The names that are assigned or annotated in it with a string below."""
    found: set[str] = set()
    for statement, below in pairwise(body):
        if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(below, ast.Expr) and is_text(below.value):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
