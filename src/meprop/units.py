"""Which units of a model live and die together: found in its traced graph, with the reason where that cannot be told.

A unit is an output feature of a linear layer, an output channel of a convolution, or a hidden unit of an LSTM. With it
go the rows that make it, whatever holds one number for it on the way (batch normalisation), and the columns of all
layers that read it. Units that are added or multiplied entry by entry go together, as one group.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils import rnn

from meprop import nn

Convolution = torch.nn.Conv1d | torch.nn.Conv2d
features = lambda layer: descriptor_of(layer).features(layer)
from meprop.nn.base import SparseLayer, descriptor_of

Layout = tuple[int, ...]
"""The groups that a dimension of a tensor consists of, one after the other: of an LSTM's gates four times the same.

Where the dimension is longer, each unit has equally many adjacent entries: the positions of a flattened channel.
"""

Prunable = torch.nn.Linear | torch.nn.LSTM | Convolution
"""Layers that make units."""

_LINEARS = (torch.nn.Linear, nn.Linear)
_LSTMS = (torch.nn.LSTM, nn.LSTM)
_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, nn.Conv1d, nn.Conv2d)
_ELEMENTWISE_MODULES = {
    *(torch.nn.ReLU, torch.nn.ReLU6, torch.nn.LeakyReLU, torch.nn.RReLU, torch.nn.ELU, torch.nn.SELU, torch.nn.CELU),
    *(torch.nn.GELU, torch.nn.SiLU, torch.nn.Mish, torch.nn.Softplus, torch.nn.Softsign, torch.nn.Threshold),
    *(torch.nn.Tanh, torch.nn.Sigmoid, torch.nn.LogSigmoid, torch.nn.Hardtanh, torch.nn.Hardsigmoid),
    *(torch.nn.Hardswish, torch.nn.Hardshrink, torch.nn.Softshrink, torch.nn.Tanhshrink),
    *(torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.AlphaDropout, torch.nn.Identity),
}
_ELEMENTWISE_FUNCTIONS = {
    *(torch.relu, torch.relu_, torch.tanh, torch.sigmoid, torch.abs, torch.neg, torch.square, operator.neg),
    *(F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus, F.softsign),
    *(F.tanh, F.sigmoid, F.logsigmoid, F.hardtanh, F.hardsigmoid, F.hardswish, F.dropout, F.dropout1d, F.dropout2d),
}
_ELEMENTWISE_METHODS = {"relu", "relu_", "tanh", "sigmoid", "abs", "neg", "square", "contiguous", "clone", "float"}
_BINARY = {
    *(operator.add, operator.sub, operator.mul, operator.iadd, operator.isub, operator.imul),
    *(torch.add, torch.sub, torch.mul),
}
_BINARY_METHODS = {"add", "add_", "sub", "sub_", "mul", "mul_"}
_SCALED = {operator.truediv, operator.itruediv, torch.div}
# Of the positions of each channel by itself, with the number of spatial dimensions that they are for.
_POOLING: dict[Any, int] = {
    **dict.fromkeys((torch.nn.MaxPool1d, torch.nn.AvgPool1d, torch.nn.AdaptiveAvgPool1d), 1),
    **dict.fromkeys((torch.nn.MaxPool2d, torch.nn.AvgPool2d, torch.nn.AdaptiveAvgPool2d), 2),
    **dict.fromkeys((torch.nn.AdaptiveMaxPool1d, F.adaptive_max_pool1d), 1),
    **dict.fromkeys((torch.nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d), 2),
    **dict.fromkeys((F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d), 1),
    **dict.fromkeys((F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d), 2),
}
_REDUCTIONS = {torch.mean, torch.sum, torch.amax, torch.amin, "mean", "sum", "amax", "amin"}
_NO_ENTRIES = {"batch_sizes", "sorted_indices", "unsorted_indices", "device", "dtype"}
_RANK_UNKNOWN = "count it from the last one, or give example_inputs"
_PACKING = (rnn.pack_padded_sequence, rnn.pad_packed_sequence)


@dataclass(frozen=True)
class Producer:
    """A set of units where they are made.

    Attributes:
        layer: The name of a linear layer, a convolution or an LSTM.
        index: Which layer and direction of an LSTM, in the order of its states; else 0.
        label: A name for the set: the layer's, of an LSTM with several with e.g. ".l1_reverse".
        width: How many units there are.
    """

    layer: str
    index: int
    label: str
    width: int


def producers(name: str, layer: Prunable) -> list[Producer]:
    """The sets of units that a layer of this name makes."""
    if not isinstance(layer, torch.nn.LSTM):
        return [Producer(name, 0, name, features(layer)[1])]
    places = [f"l{i}{suffix}" for i in range(layer.num_layers) for suffix in _suffixes(layer)]
    labels = [f"{name}.{place}" for place in places] if len(places) > 1 else [name]
    return [Producer(name, index, label, layer.hidden_size) for index, label in enumerate(labels)]


def _suffixes(lstm: torch.nn.LSTM) -> tuple[str, ...]:
    return ("", "_reverse") if lstm.bidirectional else ("",)


@dataclass(frozen=True)
class Group:
    """Units that live and die together: the first units of all producers, the second, and so on.

    Attributes:
        producers: Who makes them; several where their outputs are added.
        reason: Why no unit can be removed; None if it can.
    """

    producers: tuple[Producer, ...]
    reason: str | None

    @property
    def width(self) -> int:
        """How many units there are."""
        return self.producers[0].width


@dataclass(frozen=True)
class Units:
    """The groups of a model.

    Attributes:
        groups: All of them.
        layouts: Of each tensor (module's and tensor's name) that has entries of units, for some of its dimensions, the
            groups by their number.
        unreached: Why nothing is known of the layers that are in no group.
    """

    groups: tuple[Group, ...]
    layouts: dict[tuple[str, str], dict[int, Layout]]
    unreached: str


def find(model: torch.nn.Module, example_inputs: Sequence[Any] | None) -> Units:
    """The groups of a model, by tracing it with torch.fx in training and in evaluation mode.

    Args:
        model: Plain or converted. It is left as it is, but for what its own forward pass stores.
        example_inputs: Arguments to call it with once, for what depends on the rank of a tensor, and to see that the
            graph has the modules that are called; None: both stay unknown. What is traced is a call with these, or with
            the arguments that have no default.
    """
    if "forward" in vars(model):
        return Units((), {}, "the model's forward has been replaced on the instance")
    calls = None if example_inputs is None else _calls(model, example_inputs)
    finder = _Finder(model, calls or {})
    seen: set[str] = set()
    for training in (True, False):
        try:
            with _mode(model, training):
                graph = _trace(model, example_inputs)
        except Exception as error:  # tracing runs the model's own code, which may fail in any way
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            return Units((), {}, f"torch.fx cannot trace the model: {line}")
        finder.walk(graph)
        found = {str(node.target) for node in graph.nodes if node.op == "call_module"}
        seen |= found
        if not training and calls is not None:
            finder.block_what_differs(found, calls.keys())
    return finder.result(seen)


@contextmanager
def _mode(model: torch.nn.Module, training: bool) -> Generator[None]:
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


def _calls(model: torch.nn.Module, example_inputs: Sequence[Any]) -> dict[str, int | None]:
    """The modules that a call in evaluation mode reaches, and the rank of each one's first input, if it has one."""
    calls: dict[str, int | None] = {}

    def remember(name: str, _: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        rank = inputs[0].dim() if inputs and isinstance(inputs[0], torch.Tensor) else None
        calls[name] = rank if calls.get(name, rank) == rank else None

    hooks = [module.register_forward_pre_hook(partial(remember, name)) for name, module in model.named_modules()]
    try:
        with _mode(model, False), torch.no_grad(), torch.random.fork_rng():
            model(*example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


class _Tracer(torch.fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_functions=_PACKING)
        self._autowrap_search.append(rnn)  # also where they are called as rnn.pack_padded_sequence

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        layers = Prunable | torch.nn.MultiheadAttention
        return isinstance(m, layers) or super().is_leaf_module(m, module_qualified_name)


def _trace(model: torch.nn.Module, example_inputs: Sequence[Any] | None) -> torch.fx.Graph:
    """Arguments that are no tensors are constants of the graph, and so are the defaults of those that are not given."""
    parameters = inspect.signature(model.forward).parameters
    constants = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
    for name, value in zip(parameters, example_inputs or (), strict=False):
        constants.pop(name, None)
        if value is None or isinstance(value, bool | int | float | str):
            constants[name] = value
    own = set(vars(model))
    with torch.random.fork_rng():
        graph = _Tracer().trace(model, constants or None)
    for name in vars(model).keys() - own:
        if name.startswith("_tensor_constant"):  # which the tracer leaves behind
            delattr(model, name)
    return graph


@dataclass(frozen=True)
class _Value:
    """What is known of a tensor.

    Attributes:
        groups: The groups whose units a dimension has, one after the other; none: no units that we follow.
        dim: Which dimension that is, counted from the last one: behind a convolution, not the last one.
        rank: The number of dimensions, if known.
        blocks: Each unit has several adjacent entries: a channel's positions, flattened.
        states: It is instead an LSTM's last states, with those of one group in each entry of the first dimension.
    """

    groups: Layout = ()
    dim: int = -1
    rank: int | None = None
    blocks: bool = False
    states: bool = False

    def place(self, dim: Any) -> int | None:
        """A dimension as an argument names it, counted from the last one, if that is known."""
        if not isinstance(dim, int) or (dim >= 0 and (self.rank is None or dim >= self.rank)):
            return None
        return dim if dim < 0 else dim - (self.rank or 0)


@dataclass(frozen=True)
class _Shape:
    """The sizes of a tensor."""

    of: _Value


@dataclass(frozen=True)
class _Examples:
    """The size of a tensor's first dimension, which is not that of its units."""

    of: _Value


_NOTHING = _Value()


def _values(arguments: Any) -> Generator[_Value]:
    """All values in arguments, however nested; of sizes as a whole those that they are of, but not the same object."""
    if isinstance(arguments, _Value):
        yield arguments
    elif isinstance(arguments, _Shape):
        yield replace(arguments.of)
    elif isinstance(arguments, dict):
        yield from _values(list(arguments.values()))
    elif isinstance(arguments, slice):
        yield from _values([arguments.start, arguments.stop, arguments.step])
    elif isinstance(arguments, list | tuple):
        for argument in arguments:
            yield from _values(argument)


class _Finder:
    """What is found in walks through graphs of one model."""

    def __init__(self, model: torch.nn.Module, ranks: Mapping[str, int | None]) -> None:
        self.model, self.ranks = model, ranks
        self._producers: list[Producer] = []  # by number of their group, before groups are joined
        self._joined: list[int] = []
        self._reasons: dict[int, str] = {}
        self._layouts: dict[tuple[str, str], dict[int, Layout]] = {}
        self.read_directly: set[str] = set()

    def walk(self, graph: torch.fx.Graph) -> None:
        inputs = sum(node.op == "placeholder" for node in graph.nodes)
        _Walk(self, graph).run(*[_NOTHING] * inputs, enable_io_processing=False)

    def made_by(self, name: str, layer: Prunable) -> Layout:
        """The groups of the units that a layer makes."""
        made = producers(name, layer)
        if made[0] not in self._producers:
            self._joined += range(len(self._joined), len(self._joined) + len(made))
            self._producers += made
        return tuple(self._producers.index(producer) for producer in made)

    def width(self, group: int) -> int:
        return self._producers[group].width

    def block(self, groups: Iterable[int], reason: str) -> None:
        """Says why these groups cannot lose a unit; the first reason stays."""
        for group in groups:
            self._reasons.setdefault(group, reason)

    def _block_all(self, reason: str) -> None:
        self.block(range(len(self._producers)), reason)

    def block_what_differs(self, found: set[str], called: Collection[str]) -> None:
        """Compares the modules in a graph with those that a call reached: types decide otherwise where fx traces."""
        is_leaf = _Tracer().is_leaf_module
        leaves = {
            name for name in called if is_leaf(self.model.get_submodule(name), name) and not _is_part(name, found)
        }
        for name in sorted((found - set(called)) | leaves):
            where = "a call with example_inputs" if name in called else "the traced graph"
            self._block_all(f"{name!r} is in {where} only: the graph is not what is called")

    def _block_for_unseen(self, seen: set[str]) -> None:
        """Of a layer outside of the graph, another method's say, it is not known what it reads."""
        for name, module in self.model.named_modules():
            own = {_full_name(name, parameter) for parameter, _ in module.named_parameters(recurse=False)}
            if own - self.read_directly and not _is_part(name, seen):
                self._block_all(f"{name!r} is not seen in the traced graph, and may read it")

    def join(self, one: Layout, other: Layout, what: str) -> None:
        """Says that units are combined entry by entry."""
        if [self.width(group) for group in one] != [self.width(group) for group in other]:
            return self.block([*one, *other], f"{what} combines it with what has other units")
        for a, b in zip(one, other, strict=True):
            if self._find(a) != self._find(b):
                if any(isinstance(self._layer(group), torch.nn.LSTM) for group in (a, b)):
                    self.block([a, b], f"{what} combines the units of an LSTM with others")
                self._joined[self._find(b)] = self._find(a)
        return None

    def lay_out(self, module: str, tensor: str, dims: dict[int, Layout]) -> None:
        """Says what the dimensions of a tensor consist of."""
        if (module, tensor) not in self._layouts:
            self._layouts[module, tensor] = dims
            return
        for dim, layout in self._layouts[module, tensor].items():
            if [*map(self._find, layout)] != [*map(self._find, dims[dim])]:
                self.block([*layout, *dims[dim]], f"{module!r} is called several times, with different units")

    def _layer(self, group: int) -> torch.nn.Module:
        return self.model.get_submodule(self._producers[group].layer)

    def _find(self, group: int) -> int:
        while self._joined[group] != group:
            group = self._joined[group]
        return group

    def result(self, seen: set[str]) -> Units:
        """What was found, in graphs with these modules."""
        self._block_shared_tensors()
        self._block_for_unseen(seen)
        for number in range(len(self._producers)):
            if not isinstance(self._layer(number), SparseLayer):
                self.block([number], "it is not converted, so that nothing is counted")
        for number, producer in enumerate(self._producers):  # an LSTM has one width
            if number in self._reasons:
                same = [other for other, its in enumerate(self._producers) if its.layer == producer.layer]
                self.block(same, self._reasons[number])
        roots = sorted({self._find(number) for number in range(len(self._producers))})
        groups: list[Group] = []
        for root in roots:
            members = [number for number in range(len(self._producers)) if self._find(number) == root]
            reason = next((self._reasons[number] for number in members if number in self._reasons), None)
            groups.append(Group(tuple(self._producers[number] for number in members), reason))
        layouts = {
            tensor: {dim: tuple(roots.index(self._find(group)) for group in layout) for dim, layout in dims.items()}
            for tensor, dims in self._layouts.items()
        }
        return Units(tuple(groups), layouts, "it is not seen in the traced graph")

    def _block_shared_tensors(self) -> None:
        owners: dict[torch.Tensor, list[str]] = {}
        for name, module in self.model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                owners.setdefault(parameter, []).append(_full_name(name, own))
        names = {name: shared for shared in owners.values() for name in shared}
        for (module, tensor), dims in self._layouts.items():
            name = _full_name(module, tensor)
            groups = [group for layout in dims.values() for group in layout]
            others = [other for other in names.get(name, []) if other != name]
            if others:
                self.block(groups, f"{name!r} is tied to {', '.join(map(repr, others))}")
            if {name, *others} & self.read_directly:
                self.block(groups, f"{name!r} is also read outside of its layer")


class _Walk(torch.fx.Interpreter):
    """Runs a graph on `_Value`s."""

    def __init__(self, finder: _Finder, graph: torch.fx.Graph) -> None:
        super().__init__(finder.model, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False
        self._finder = finder

    def _not_understood(self, arguments: Any, reason: str) -> _Value:
        self._finder.block([group for value in _values(arguments) for group in value.groups], reason)
        return _NOTHING

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.target is operator.getitem and not n.users:  # as of `n, _, height, width = x.shape`
            return _NOTHING
        return super().run_node(n)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> _Value:
        return _NOTHING

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> _Value:
        self._finder.read_directly.add(str(target))
        return _NOTHING

    def output(self, target: Any, args: Any, kwargs: Any) -> _Value:
        return self._not_understood(args, "it is the model's output")

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target == "flatten":
            return self._flatten(".flatten()", args, kwargs)
        if target in _REDUCTIONS:
            return self._reduce(f".{target}()", args, kwargs)
        if target in ("view", "reshape"):
            return self._view(f".{target}()", args, kwargs)
        if target == "size" and args[0].groups:
            return self._size(*args, **kwargs) if kwargs or len(args) > 1 else _Shape(args[0])
        return self._apply(f".{target}()", target in _ELEMENTWISE_METHODS, target in _BINARY_METHODS, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is operator.getitem and isinstance(args[0], tuple):
            return args[0][args[1]]
        if target is operator.getitem and isinstance(args[0], _Shape):
            return self._size(args[0].of, args[1])
        if target is getattr and args[1] == "shape" and args[0].groups:
            return _Shape(args[0])
        if target is operator.getitem and args[0].states and isinstance(args[1], int):  # of one layer and direction
            return _Value((args[0].groups[args[1]],), rank=args[0].rank and args[0].rank - 1)
        if target in _PACKING:  # what is packed has a dimension less
            x = replace(self._apply(target.__name__, True, False, args, kwargs), rank=None)
            return x if target is rnn.pack_padded_sequence else (x, _NOTHING)
        if target is getattr and args[1] in _NO_ENTRIES:
            return _NOTHING
        if target is torch.cat:
            dim = kwargs.get("dim", kwargs.get("axis", 0)) if len(args) < 2 else args[1]
            parts = list(_values(args[0] if args else kwargs["tensors"]))
            if all(part.groups and not part.states and not part.blocks for part in parts) and {
                (part.dim, part.place(dim)) for part in parts
            } == {(parts[0].dim, parts[0].dim)}:
                return replace(parts[0], groups=tuple(group for part in parts for group in part.groups))
            if any(part.groups and part.place(dim) is None and part.rank is None for part in parts):
                return self._not_understood(parts, f"'cat' joins units, or another dimension: {_RANK_UNKNOWN}")
        if target is torch.flatten and args:
            return self._flatten("'flatten'", args, kwargs)
        if target in _REDUCTIONS and args:
            return self._reduce(f"{target.__name__!r}", args, kwargs)
        if target in _POOLING and args and not kwargs.get("return_indices"):
            return self._pool("pooling", _POOLING[target], args[0])
        number = len(args) > 1 and isinstance(args[1], int | float)
        elementwise = target in _ELEMENTWISE_FUNCTIONS or (target in _SCALED and number)
        elementwise = elementwise or (target is getattr and args[1] == "data")
        name = f".{args[1]}" if target is getattr else getattr(target, "__name__", str(target))
        return self._apply(name, elementwise, target in _BINARY, args, kwargs)

    def _apply(self, name: str, elementwise: bool, binary: bool, args: Any, kwargs: Any) -> _Value:
        """What comes of an operation on entries, of one tensor or of two."""
        values = list(_values((args, kwargs)))
        followed = [value for value in values if value.groups]
        understood = followed and not any(value.states for value in followed)
        if understood and elementwise and len(followed) == 1 and args and followed[0] is args[0]:
            return followed[0]
        if understood and binary and len(values) == 1:  # and a number
            return followed[0]
        if understood and binary and len(followed) == 2 and _same_place(*followed):
            self._finder.join(followed[0].groups, followed[1].groups, f"{name!r}")
            return replace(followed[0], rank=followed[0].rank if followed[0].rank == followed[1].rank else None)
        return self._not_understood(values, f"{name!r} reads it, which is not understood")

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module, name = self.fetch_attr(target), str(target)
        x, *others = list(_values((args, kwargs))) or [_NOTHING]
        kind = type(module)
        if x.states:
            x = self._not_understood(x, f"{name!r} reads all of an LSTM's last states")
        if kind in _LINEARS:
            return self._linear(name, module, x)
        if kind in _CONVOLUTIONS:
            return self._convolution(name, module, x)
        if kind in _LSTMS and module.proj_size == 0:
            return self._lstm(name, module, x, others)
        if kind is torch.nn.Flatten and not _is_hooked(module):
            return self._flatten(repr(name), (x, module.start_dim, module.end_dim), {})
        if kind in _POOLING and not _is_hooked(module) and not getattr(module, "return_indices", False):
            return self._pool(repr(name), _POOLING[kind], x)
        if kind in _ELEMENTWISE_MODULES and not _is_hooked(module):
            return x
        if kind in (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d) and x.groups:
            return self._batch_norm(name, module, x)
        why = "which is not understood"
        if kind is torch.nn.LayerNorm:
            why = "whose mean and variance would be others with fewer units"
        return self._not_understood([x, *others], f"{name!r} ({kind.__name__}) reads it, {why}")

    def _lay_out(self, name: str, module: torch.nn.Module, tensors: dict[str, dict[int, Layout]]) -> None:
        for tensor, dims in tensors.items():
            self._finder.lay_out(name, tensor, dims)
        if _is_hooked(module):
            groups = [group for dims in tensors.values() for layout in dims.values() for group in layout]
            self._finder.block(groups, f"{name!r} has forward hooks or a forward of its own, which may do anything")

    def _read(self, name: str, x: _Value, dim: int) -> _Value:
        """What a layer reads that takes its inputs from this dimension."""
        if x.groups and x.dim != dim:
            return self._not_understood(x, f"{name!r} reads it along another dimension than that of its units")
        return x

    def _linear(self, name: str, layer: torch.nn.Linear, x: _Value) -> _Value:
        (group,) = self._finder.made_by(name, layer)
        x = self._read(name, x, -1)
        tensors: dict[str, dict[int, Layout]] = {"weight": {0: (group,), 1: x.groups}}
        if layer.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            tensors["bias"] = {0: (group,)}
        self._lay_out(name, layer, tensors)
        return _Value((group,), rank=self._finder.ranks.get(name))

    def _convolution(self, name: str, layer: torch.nn.Conv1d | torch.nn.Conv2d, x: _Value) -> _Value:
        (group,) = self._finder.made_by(name, layer)
        dim = 1 - layer.weight.dim()
        x = self._read(name, x, dim)
        if layer.groups > 1:
            self._not_understood([x, made := _Value((group,), dim)], f"{name!r} is a convolution in groups")
            return made
        tensors: dict[str, dict[int, Layout]] = {"weight": {0: (group,), 1: x.groups}}
        if layer.bias is not None:
            tensors["bias"] = {0: (group,)}
        self._lay_out(name, layer, tensors)
        return _Value((group,), dim, self._finder.ranks.get(name))

    def _pool(self, name: str, spatial: int, x: _Value) -> _Value:
        if x.groups and x.dim != -1 - spatial:
            return self._not_understood(x, f"{name} pools along the dimension of its units")
        return x

    def _flatten(self, name: str, args: Any, kwargs: Any) -> _Value:
        x: _Value = args[0]
        start, end = (*args[1:], *(0, -1)[len(args) - 1 :])
        start, end = kwargs.get("start_dim", start), kwargs.get("end_dim", end)
        if x.dim < -1 and x.rank is None:
            return self._not_understood(x, f"{name} flattens it, or another dimension: give example_inputs")
        if x.dim == -1 or x.states or (x.place(start), x.place(end)) != (x.dim, -1):
            return self._not_understood(x, f"{name} flattens it otherwise than from the channels on")
        return _Value(x.groups, rank=None if x.rank is None else x.rank + x.dim + 1, blocks=True)

    def _reduce(self, name: str, args: Any, kwargs: Any) -> _Value:
        """The mean over positions, say."""
        x: _Value = args[0]
        given = dict(zip(("dim", "keepdim"), args[1:], strict=False)) | kwargs
        dims = given.get("dim", given.get("axis", ()))  # torch takes NumPy's names, too
        places = [x.place(dim) for dim in (dims if isinstance(dims, list | tuple) else [dims])]
        if not x.groups or x.states:
            return self._not_understood(x, f"{name} reads it, which is not understood")
        if x.rank is None and None in places:
            return self._not_understood(x, f"{name} is over its units, or another dimension: {_RANK_UNKNOWN}")
        if not places or None in places or x.dim in places:
            return self._not_understood(x, f"{name} is over its units")
        if given.get("keepdim") or given.get("keepdims"):
            return replace(x) if x.rank is None or -x.rank in places else x  # another object: of other examples
        behind = sum(place > x.dim for place in places if place is not None)
        return replace(x, dim=x.dim + behind, rank=None if x.rank is None else x.rank - len(places))

    def _size(self, x: _Value, dim: Any) -> _Value | _Examples:
        place = x.place(dim)
        if place is None and x.rank is None and not x.states:
            return self._not_understood(x, f"the size of its units' dimension is read, or another: {_RANK_UNKNOWN}")
        if place is None or place == x.dim or x.states:
            return self._not_understood(x, "the size of its units' dimension is read, or of several")
        return _Examples(x) if x.rank is not None and place == -x.rank else _NOTHING

    def _view(self, name: str, args: Any, kwargs: Any) -> _Value:
        """`x.view(x.size(0), -1)` is a flattening; otherwise numbers of units may be in the sizes."""
        x, *sizes = args
        sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes
        if x.dim < -1 and x.rank is None:
            return self._not_understood(x, f"{name} flattens it, or another dimension: give example_inputs")
        examples = sizes[0] if len(sizes) == 2 and sizes[1] == -1 else None
        if x.dim < -1 and x.place(1) == x.dim and isinstance(examples, _Examples) and examples.of is x:
            return _Value(x.groups, rank=2, blocks=True)
        return self._apply(name, False, False, args, kwargs)

    def _lstm(
        self, name: str, lstm: torch.nn.LSTM, x: _Value, states: list[_Value]
    ) -> tuple[_Value, tuple[_Value, _Value]]:
        every, directions = self._finder.made_by(name, lstm), len(_suffixes(lstm))
        tensors: dict[str, dict[int, Layout]] = {}
        inputs = (self._not_understood(x, f"{name!r} reads channels") if x.blocks else self._read(name, x, -1)).groups
        for layer in range(lstm.num_layers):
            outputs = every[layer * directions : (layer + 1) * directions]
            for group, suffix in zip(outputs, _suffixes(lstm), strict=True):
                gates, place = (group,) * 4, f"l{layer}{suffix}"
                tensors[f"weight_ih_{place}"] = {0: gates, 1: inputs}
                tensors[f"weight_hh_{place}"] = {0: gates, 1: (group,)}
                if lstm.bias:
                    tensors |= {f"bias_{part}_{place}": {0: gates} for part in ("ih", "hh")}
            inputs = outputs
        self._lay_out(name, lstm, tensors)
        if states:
            self._not_understood(states, f"{name!r} gets it as an initial state")
            self._finder.block(every, "it gets initial states, which have its width")
        rank = self._finder.ranks.get(name)
        last = _Value(every, rank=rank, states=True)
        return _Value(inputs, rank=rank), (last, last)

    def _batch_norm(self, name: str, norm: torch.nn.BatchNorm1d | torch.nn.BatchNorm2d, x: _Value) -> _Value:
        rank, needed = self._finder.ranks.get(name), 1 - x.dim
        if isinstance(norm, torch.nn.BatchNorm1d) and rank != needed:
            found = (
                "takes 2-D and 3-D inputs differently: give example_inputs" if rank is None else f"gets {rank}-D input"
            )
            return self._not_understood(x, f"{name!r} (BatchNorm1d) {found}")
        x = self._read(name, x, x.dim if isinstance(norm, torch.nn.BatchNorm1d) else -3)
        tensors = ("weight", "bias", "running_mean", "running_var")
        self._lay_out(name, norm, {tensor: {0: x.groups} for tensor in tensors if getattr(norm, tensor) is not None})
        return x


def _same_place(one: _Value, other: _Value) -> bool:
    """Whether two values have their units in the same dimension."""
    same_rank = one.rank is None or other.rank is None or one.rank == other.rank
    return same_rank and (one.dim, one.blocks) == (other.dim, other.blocks)


def _full_name(module: str, tensor: str) -> str:
    return f"{module}.{tensor}" if module else tensor


def _is_part(name: str, of: set[str]) -> bool:
    """Whether a module is one of these, or inside of one."""
    return any(name == each or name.startswith(f"{each}.") for each in of)


def _is_hooked(module: torch.nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]
    return bool(hooks) or "forward" in vars(module)


def entries(layout: Layout, widths: Sequence[int], kept: dict[int, torch.Tensor], size: int) -> torch.Tensor:
    """Which entries stay of a dimension, when of some groups only some units are kept.

    Args:
        layout: The dimension's groups.
        widths: Of all groups.
        kept: The units [n] that stay of a group, int64, ascending; all of those that are not in it.
        size: Of the dimension, a multiple of the sum of its groups' widths.
    """
    parts: list[torch.Tensor] = []
    start = 0
    for group in layout:
        parts.append(start + kept.get(group, torch.arange(widths[group])))
        start += widths[group]
    positions = size // start
    return (torch.cat(parts)[:, None] * positions + torch.arange(positions)).flatten()
