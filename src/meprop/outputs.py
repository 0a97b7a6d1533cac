"""What gives a model's outputs: the layers and weights that `get_output_embeddings` names, in whatever form."""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property, partial, reduce
from types import FunctionType, MemberDescriptorType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from meprop.ops.registry import is_plain

__all__ = ["closure", "outputs_of", "sharing_memory"]

Found = torch.nn.Module | Tensor

# How deep what a model returned is looked into. An attribute may make a new object whenever it is read.
_DEPTH = 6


def outputs_of(module: Any) -> list[Found]:
    """The layers, or weights, that a model in Hugging Face's manner says that its outputs come from.

    An iterator that the model keeps is not read, because that would use it up.
    """
    try:
        asked = module.get_output_embeddings
        found: Any = asked() if callable(asked) and not isinstance(asked, torch.nn.Module) else asked
        if isinstance(found, Iterator) and any(found is each for each in vars(module).values()):
            return []
        model = getattr(asked, "__self__", module)  # a wrapper may hand on what the model inside answers
        return [each for each in _Search(model).within(found, 0, True) if each is not module and each is not model]
    except Exception:  # it has no such method, or cannot answer: both are usual
        return []


class _Search:
    """Looks for modules and tensors in what a model returned.

    It looks into containers, attributes, bound methods, partials and functions. A view counts as the tensor that it is
    a view of.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.seen: dict[int, Any] = {}  # it keeps what it has seen, so that no other object gets its id

    def within(self, found: Any, depth: int, by_name: bool = False) -> Iterator[Found]:
        """What is in `found`. A string counts as a name in the model if it is the answer or in a container of it."""
        if isinstance(found, torch.nn.Module):
            yield found
        elif isinstance(found, Tensor):
            yield found if found._base is None else found._base
        elif isinstance(found, str):
            yield from self._named(found) if by_name else ()
        elif found is not None and not isinstance(found, (bytes, type, ModuleType)):
            if id(found) in self.seen or depth > _DEPTH:
                return
            self.seen[id(found)] = found
            for each in found.values() if isinstance(found, Mapping) else found if isinstance(found, Iterable) else ():
                yield from self.within(each, depth + 1, by_name)
            for each in self._held_by(found):
                yield from self.within(each, depth + 1)

    def _named(self, name: str) -> Iterator[Found]:
        try:
            found: Any = reduce(getattr, name.split("."), self.model)
        except AttributeError:
            return
        if isinstance(found, Found):
            yield found

    def _held_by(self, found: Any) -> Iterator[Any]:
        holder = getattr(found, "__self__", None)  # of a bound method
        function = getattr(found, "__func__", found)
        yield from (holder, *getattr(found, "__dict__", {}).values())
        if isinstance(found, partial):
            yield from (found.func, *found.args, *found.keywords.values())
        if isinstance(function, FunctionType):
            held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
            yield from (*held, *(each for each in closure(function).values() if not isinstance(each, Found)))
            yield from _read_by(function, holder)
            return
        for name in _computed(type(found)):
            try:
                yield getattr(found, name)
            except Exception:  # it runs code of the object's class, which may fail in any way
                continue


def _read_by(function: FunctionType, holder: Any) -> Iterator[Found]:
    """The modules and tensors that a function reads: the last one of each chain of attributes, as `model.lm_head`."""
    names, at = closure(function), None
    if holder is not None:
        names[function.__code__.co_varnames[0]] = holder
    for step in dis.get_instructions(function):
        inner = getattr(at, step.argval, None) if step.opname in ("LOAD_ATTR", "LOAD_METHOD") else None
        if not isinstance(inner, Found):  # the chain has ended
            if isinstance(at, Found):
                yield at
            if step.opname == "LOAD_GLOBAL":
                inner = function.__globals__.get(step.argval)
            elif step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
                inner = names.get(step.argval)
        at = inner if isinstance(inner, Found) else None


def closure(function: FunctionType) -> dict[str, Any]:
    """What a function holds in its closure, by name."""
    held: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # it is empty yet
            held[name] = cell.cell_contents
    return held


def _computed(cls: type[Any]) -> Iterator[str]:
    """The names of a class's properties and slots."""
    for each in cls.__mro__:
        for name, value in vars(each).items():
            if isinstance(value, (property, cached_property, MemberDescriptorType)):
                yield name


def sharing_memory(tensor: Tensor, parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    """Those parameters that a tensor shares memory with, such as that of which it is the data."""
    if (place := _place(tensor)) is None:
        return
    storage, begin, end = place
    for parameter in parameters:
        other = _place(parameter)
        if other is not None and other[0] == storage and other[1] < end and begin < other[2]:
            yield parameter


def _place(tensor: Tensor) -> tuple[int, int, int] | None:
    """The address of a tensor's storage, and where it begins and ends. None if that says nothing."""
    if is_lazy(tensor) or not is_plain(tensor) or tensor.layout is not torch.strided or tensor.numel() == 0:
        return None
    if not (storage := tensor.untyped_storage().data_ptr()):
        return None
    begin = tensor.data_ptr()
    length = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return storage, begin, begin + length * tensor.element_size()
