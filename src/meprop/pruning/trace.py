"""Finds the units of a model in its graph, which torch.fx traces.

The graph is traced in training and in evaluation mode, as a model may do different things in each. It is compared with
a call, as torch.fx's stand-ins for tensors may take other branches than tensors do.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from meprop.copies import unchanged
from meprop.pruning import operations  # noqa: F401  # pyright: ignore[reportUnusedImport]  (fills the table)
from meprop.pruning.groups import Finder, Units, full_name, is_part
from meprop.pruning.handlers import (
    NOTHING,
    Call,
    Value,
    handled_functions,
    handler_of,
    is_handled_as_a_whole,
    values_in,
)


def find(model: torch.nn.Module, example_inputs: Sequence[Any] | None) -> Units:
    """The groups of a model.

    Args:
        model: Plain or converted. It stays as it is, also if its forward pass keeps something.
        example_inputs: Arguments to call it with once. The call shows the ranks of tensors, and which modules are
            called; without it both stay unknown. The traced call has these arguments, or else those that have no
            default.
    """
    if "forward" in vars(model):
        return Units((), {}, "the model's forward has been replaced on the instance")
    ranks = None if example_inputs is None else _ranks(model, example_inputs)
    finder = Finder(model)
    seen: set[str] = set()
    for training in (True, False):
        try:
            graph, kept = _trace(model, training, example_inputs)
        except Exception as error:  # tracing runs the model's own code, which may fail in any way
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            return Units((), {}, f"torch.fx cannot trace the model: {line}")
        found = {str(node.target) for node in graph.nodes if node.op == "call_module"}
        inputs = sum(node.op == "placeholder" for node in graph.nodes)
        walk = _Walk(finder, graph, ranks or {})
        walk.run(*[NOTHING] * inputs, enable_io_processing=False)
        for name, node in kept.items():
            groups = [group for value in values_in(walk.env[node]) for group in value.groups]
            finder.block(groups, f"{name!r} keeps it for a later call")
        seen |= found
        if not training and ranks is not None:
            _block_what_differs(finder, found, set(ranks))
    return finder.result(seen)


def _ranks(model: torch.nn.Module, example_inputs: Sequence[Any]) -> dict[str, int | None]:
    """The modules that a call in evaluation mode reaches, and the rank of each one's first input, if it has one."""
    ranks: dict[str, int | None] = {}

    def remember(name: str, _: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        rank = inputs[0].dim() if inputs and isinstance(inputs[0], torch.Tensor) else None
        ranks[name] = rank if ranks.get(name, rank) == rank else None

    with unchanged(model), torch.no_grad():
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(remember, name))
        model.eval()(*example_inputs)
    return ranks


class _Tracer(torch.fx.Tracer):
    def __init__(self) -> None:
        functions = handled_functions()
        super().__init__(autowrap_functions=tuple(functions))
        # Functions are also found in their own modules, as in a call of rnn.pack_padded_sequence.
        homes = {each.__module__ for each in functions} & sys.modules.keys()
        self._autowrap_search += [sys.modules[name] for name in homes]

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return is_handled_as_a_whole(m) or super().is_leaf_module(m, module_qualified_name)


def _trace(
    model: torch.nn.Module, training: bool, example_inputs: Sequence[Any] | None
) -> tuple[torch.fx.Graph, dict[str, torch.fx.Node]]:
    """The graph, and the nodes whose values the model keeps, by the name of the attribute.

    Arguments that are not tensors are constants in the graph, and so are the defaults of those not given.
    """
    parameters = inspect.signature(model.forward).parameters
    constants = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
    for name, value in zip(parameters, example_inputs or (), strict=False):
        constants.pop(name, None)
        if value is None or isinstance(value, bool | int | float | str):
            constants[name] = value
    with unchanged(model):
        model.train(training)
        graph = _Tracer().trace(model, constants or None)
        kept = {
            full_name(name, attribute): each.node
            for name, module in model.named_modules()
            for attribute, value in vars(module).items()
            for each in tree_leaves(value)
            if isinstance(each, torch.fx.Proxy)
        }
    return graph, kept


def _block_what_differs(finder: Finder, found: set[str], called: set[str]) -> None:
    """Compares the modules in a graph with those that a call reached."""
    is_leaf, module = _Tracer().is_leaf_module, finder.model.get_submodule
    leaves = {name for name in called if is_leaf(module(name), name) and not is_part(name, found)}
    for name in sorted((found - called) | leaves):
        where = "a call with example_inputs" if name in called else "the traced graph"
        finder.block_all(f"{name!r} is in {where} only: the graph is not what is called")


class _Walk(torch.fx.Interpreter):
    """Runs a graph on values, with the handler of each operation."""

    def __init__(self, finder: Finder, graph: torch.fx.Graph, ranks: Mapping[str, int | None]) -> None:
        super().__init__(finder.model, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False
        self._finder, self._ranks = finder, ranks

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.target is operator.getitem and not n.users:  # unpacking makes them: `n, _, height, width = x.shape`
            return NOTHING
        return super().run_node(n)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Value:
        return NOTHING

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Value:
        self._finder.read_directly(str(target))
        return NOTHING

    def output(self, target: Any, args: Any, kwargs: Any) -> Value:
        return self._call("the model", args, kwargs).refuse(args, "it is the model's output")

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _handle(target, self._call(f".{target}()", args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _handle(target, self._call(getattr(target, "__name__", str(target)), args, kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        path, module = str(target), self.fetch_attr(target)
        x, *others = list(values_in((args, kwargs))) or [NOTHING]
        call = self._call(path, args, kwargs)
        if x.states:
            x = call.refuse(x, f"{call.name} reads all of an LSTM's last states")
        call = replace(call, x=x, values=[x, *others], module=module, path=path, rank=self._ranks.get(path))
        result = _handle(module, call)
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            reason = f"{call.name} has forward hooks or a forward of its own, which may do anything"
            return call.refuse([call.values, result], reason)
        return result

    def _call(self, name: str, args: Any, kwargs: Any) -> Call:
        x = args[0] if args and isinstance(args[0], Value) else NOTHING
        return Call(self._finder, repr(name), args, kwargs, x, list(values_in((args, kwargs))))


def _handle(operation: Any, call: Call) -> Any:
    handler = handler_of(operation)
    return call.not_understood() if handler is None else handler(call)
