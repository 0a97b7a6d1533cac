"""What operations do to units: one table with a handler for each operation, open to users.

A model's traced graph is walked with a `Value` in the place of each tensor. An operation without a handler is refused:
the units that it reads cannot be removed, and the reason names it. `meprop.pruning.operations` has the handlers of
torch's operations, `handles` adds others.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from meprop.nn.base import Layout, descriptor_of, layer_descriptor
from meprop.pruning.groups import Finder


@dataclass(frozen=True)
class Value:
    """What is known of a tensor.

    Attributes:
        groups: The groups of units that one dimension consists of, one after the other. It is empty if no units are
            followed in this tensor.
        dim: That dimension, counted from the last one: -1 behind a linear layer, -3 behind a `Conv2d`.
        rank: The number of dimensions. None if it is not known.
        flattened: Whether each unit has several adjacent entries: the positions of a flattened channel.
        states: Whether it is the last states of an LSTM. Then entry i of the first dimension has the units of
            `groups[i]`.
    """

    groups: Layout = ()
    dim: int = -1
    rank: int | None = None
    flattened: bool = False
    states: bool = False

    def place(self, dim: Any) -> int | None:
        """A dimension as an argument names it, counted from the last one. None if that cannot be told."""
        if not isinstance(dim, int) or (dim >= 0 and (self.rank is None or dim >= self.rank)):
            return None
        return dim if dim < 0 else dim - (self.rank or 0)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a tensor: its `shape`."""

    of: Value


@dataclass(frozen=True)
class BatchSize:
    """The size of a tensor's first dimension, where that is not the dimension of its units."""

    of: Value


NOTHING = Value()
"""A tensor of which nothing is known."""


def values_in(arguments: Any) -> Generator[Value]:
    """All values in arguments, however nested. Sizes count as a value that is equal to the one whose sizes they are."""
    if isinstance(arguments, Value):
        yield arguments
    elif isinstance(arguments, Sizes):
        yield replace(arguments.of)
    elif isinstance(arguments, dict):
        yield from values_in(list(arguments.values()))
    elif isinstance(arguments, slice):
        yield from values_in([arguments.start, arguments.stop, arguments.step])
    elif isinstance(arguments, list | tuple):
        for argument in arguments:
            yield from values_in(argument)


@dataclass(frozen=True)
class Call:
    """One call in the graph, and what a handler can say about it.

    Attributes:
        finder: What is known of all units so far; the methods below write into it.
        name: The called module, function or method as reasons name it, in quotes.
        args: The positional arguments, with a `Value` for each tensor.
        kwargs: The keyword arguments.
        x: The input: the first argument of a function, the first tensor that a module gets. `NOTHING` if there is none.
        values: All tensors among the arguments, `x` included.
        module: The module. None if a function or a method is called.
        path: The name of the module in the model.
        rank: The number of dimensions of the module's first input. None if it is not known.
    """

    finder: Finder = field(repr=False)
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Value
    values: Sequence[Value]
    module: Any = None
    path: str = ""
    rank: int | None = None

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument that is given by its position or by one of its names."""
        if position < len(self.args):
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    def refuse(self, values: Any, reason: str) -> Value:
        """Says that units in these values, however nested, cannot be removed. Returns `NOTHING`."""
        self.finder.block([group for value in values_in(values) for group in value.groups], reason)
        return NOTHING

    def not_understood(self, why: str = "which is not understood") -> Value:
        """Refuses all arguments. Returns `NOTHING`."""
        kind = "" if self.module is None else f" ({type(self.module).__name__})"
        return self.refuse(self.values, f"{self.name}{kind} reads it, {why}")

    def read(self, dim: int) -> Value:
        """The input `x` of an operation that takes features from dimension `dim`. Refuses units elsewhere."""
        if self.x.groups and self.x.dim != dim:
            return self.refuse(self.x, f"{self.name} reads it along another dimension than that of its units")
        return self.x

    def join(self, one: Value, other: Value) -> None:
        """Says that the operation combines the units of two values entry by entry, so that they go together."""
        self.finder.join(one.groups, other.groups, self.name)

    def lay_out(self, tensors: dict[str, dict[int, Layout]]) -> None:
        """Says what tensors of the module consist of, by their names and dimensions, so that they are cut.

        It is to be said in each call, also where a layout is empty: a module that is called with and without units
        cannot be cut.
        """
        for tensor, dims in tensors.items():
            self.finder.lay_out(self.path, tensor, dims)

    def made(self) -> Layout:
        """The groups of the units that the module, a layer, makes."""
        return self.finder.made_by(self.path, self.module)

    def lay_out_layer(self, inputs: Layout) -> Layout:
        """Lays out the tensors of the module, a layer, for these input features. Returns what `made` returns."""
        made = self.made()
        self.lay_out(layer_descriptor(self.module).layouts(self.module, made, inputs))
        return made


Operation = type[torch.nn.Module] | Callable[..., Any] | str
"""The type of a module, a function, or the name of a tensor's method."""
Handler = Callable[[Call], Any]
"""Takes a call, and returns what it returns: a `Value` for each tensor, nested as the call's result is.

It must return `NOTHING`, after `refuse` or `not_understood`, wherever units could end up in another order, in another
dimension or combined with each other.
"""
Resize = Callable[[Any], None]
"""Makes a module's attributes those of its tensors, which were cut."""
_AnyHandler = TypeVar("_AnyHandler", bound=Handler)

_table: dict[Operation, tuple[Handler, Resize | None]] = {}


def handles(*operations: Operation, resize: Resize | None = None) -> Callable[[_AnyHandler], _AnyHandler]:
    """A decorator: makes a function the handler of these operations.

    A module or a function with a handler is one node of the graph: torch.fx does not look into it. It only finds a
    function that is called by its name in a module, if that does not begin with an underscore.

    Args:
        *operations: The type of a module, a function, or the name of a tensor's method. Subclasses do not inherit the
            handler of a type. A layer of `meprop.nn` has the handler of the plain class.
        resize: A function that is called with a module after its tensors were cut, to set attributes such as
            `num_features`. A layer needs none, as it has `Descriptor.resize`.

    Raises:
        ValueError: There is no operation, or one has a handler already. `remove_handler` removes it.
        TypeError: An operation, the handler or `resize` is of another type.

    Example:
        >>> import torch
        >>> from meprop.pruning import Call, Value, handles, remove_handler
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self, features):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(features))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> @handles(Scale)
        ... def scale(call: Call) -> Value:
        ...     x = call.read(-1)
        ...     call.lay_out({"weight": {0: x.groups}})  # one entry a unit
        ...     return x
        >>> remove_handler(Scale)
    """
    if not operations:
        raise ValueError("handles() names no operation; name those that the function handles: @handles(Scale)")
    for operation in operations:
        if not (callable(operation) or isinstance(operation, str)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"handles({operation!r}); it takes types of modules, functions, and names of methods")
    if resize is not None and not callable(resize):
        raise TypeError(f"resize={resize!r}; it is a function that is called with a module, or None")

    def register(handler: _AnyHandler) -> _AnyHandler:
        if not callable(handler):
            raise TypeError(f"the handler of {operations} is {handler!r}; it is a function of a Call")
        for operation in operations:
            if operation in _table:
                raise ValueError(f"{operation!r} has a handler already; call remove_handler first")
        _table.update(dict.fromkeys(operations, (handler, resize)))
        return handler

    return register


def remove_handler(*operations: Operation) -> None:
    """Removes the handlers of operations.

    Raises:
        KeyError: An operation has none. No handler has been removed then.
    """
    for operation in operations:
        if operation not in _table:
            raise KeyError(f"{operation!r} has no handler")
    for operation in operations:
        del _table[operation]


def handler_of(operation: Any) -> Handler | None:
    """The handler of a module (by its type), a function or a method's name. None if there is none."""
    if not isinstance(operation, torch.nn.Module):
        return _table.get(operation, (None, None))[0]
    kind, descriptor = _plain_type(operation), descriptor_of(operation)
    if kind in _table:
        return _table[kind][0]
    is_layer = descriptor is not None and kind is descriptor.plain and descriptor.unit_sets(operation)
    return layer if is_layer else None


def is_handled_as_a_whole(module: torch.nn.Module) -> bool:
    """Whether a module is one node of the graph: a layer, or a module with a handler."""
    return descriptor_of(module) is not None or type(module) in _table


def handled_functions() -> list[Callable[..., Any]]:
    """The functions with a handler that torch.fx would look into, which it does not with `torch.nn.functional`."""
    return [each for each in _table if isinstance(each, FunctionType) and each.__module__ != F.__name__]


def resize(module: torch.nn.Module) -> None:
    """Makes a module's attributes those of its tensors, which were cut."""
    _, own = _table.get(_plain_type(module), (None, None))
    descriptor = descriptor_of(module)
    if own is not None:
        own(module)
    elif descriptor is not None:
        descriptor.resize(module)


def layer(call: Call) -> Value:
    """Follows the units of a layer whose descriptor says all: it turns features of its input into other features."""
    dim = layer_descriptor(call.module).feature_dim(call.module)
    made = call.lay_out_layer(call.read(dim).groups)
    if len(made) > 1:
        call.finder.keep_apart(made, f"the units of {call.name}")  # which keep one width
    call.refuse(call.values[1:], f"{call.name} reads it, beside its input")
    return Value(made, dim, call.rank)


def _plain_type(module: torch.nn.Module) -> type[torch.nn.Module]:
    descriptor = descriptor_of(module)
    return descriptor.plain if descriptor is not None and type(module) is descriptor.sparse else type(module)
