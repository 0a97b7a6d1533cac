"""The registry of operations and of the backends that serve them.

An operation has a literal reference, whose docstring is the contract of all implementations. A backend is one file that
implements some of the operations. Backends are asked in order, and may decline a call with a reason. A call goes to the
first backend that implements the operation and does not decline. The reference implements every operation and never
declines.

Under `torch.compile` a call goes to the operator `torch.ops.meprop.*` of the same name instead. Torch can tell the
shapes of its results without running it. The compiled program serves that operator in the same way as an eager call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar, overload

import torch
from torch import Tensor

from meprop.profiles import is_profiled, labelled

P = ParamSpec("P")
R = TypeVar("R")
Run = TypeVar("Run", bound=Callable[..., Any])
Declines = Callable[..., str | None]
"""A function from the arguments of a call to the reason why it cannot be served. None means that it can."""

PLAIN = (Tensor, torch.nn.Parameter)
"""The types of tensors that only consist of their memory. Subclasses may be fake, distributed or wrapped."""


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor of a real dtype is what its memory says: no subclass, no negative bit, and no zero tensor."""
    return type(tensor) in PLAIN and not tensor.is_neg() and not tensor._is_zerotensor()


_is_compiling = torch.compiler.is_compiling
_mode, _PROXY = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY  # pyright: ignore


def is_proxied() -> bool:
    """Whether make_fx traces what runs, on plain tensors too."""
    return _mode(_PROXY) is not None


def in_graph() -> bool:
    """Whether what runs becomes a graph, of torch.compile or of make_fx."""
    return _is_compiling() or is_proxied()


def is_exporting() -> bool:
    """Whether what runs becomes a graph of torch.export.

    In torch 2.11, torch.compile takes torch's own function of this name for True in every graph. In 2.13 it does not.
    """
    return torch.compiler._is_exporting_flag  # pyright: ignore[reportPrivateUsage]


_library = torch.library.Library("meprop", "DEF")


@dataclass(frozen=True)
class Operator:
    """How an operation appears to `torch.compile`, as `torch.ops.meprop.*`.

    An eager call does not use the operator. A Python operator costs several microseconds. A direct call costs a
    fraction of a microsecond.

    Attributes:
        schema: The arguments and results, e.g. "(Tensor grad, int k) -> (Tensor, Tensor)".
        fake: A function from the operator's arguments to empty results of the right shapes.
        flatten: A function from the operation's arguments to the operator's. None if they are the same.
        restore: A function from the operator's arguments to the operation's. None if they are the same.
        sizes_follow_data: Whether a result has a size that only running the operator tells. `fake` then makes it with
            `torch.library.get_ctx`.
    """

    schema: str
    fake: Callable[..., Any]
    flatten: Callable[..., tuple[Any, ...]] | None = None
    restore: Callable[..., tuple[Any, ...]] | None = None
    sizes_follow_data: bool = False


class Operation(Generic[P, R]):
    """One operation, with the arguments of its reference. `operation` makes it.

    Attributes:
        name: The name of the operation in backends and in `torch.ops.meprop`.
        reference: The literal implementation, with which all others are compared.
    """

    def __init__(
        self,
        reference: Callable[P, Any],
        operator: Operator | None,
        traced: Callable[P, Any] | None,
        tensor_at: int,
        result: Callable[..., R] | None,
    ) -> None:
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.reference = reference
        self._traced = traced if operator is None else self._define(operator)
        self._tensor_at = tensor_at
        self._result = result
        self._served_by: tuple[tuple[Callable[..., Any], Declines | None, Backend], ...] = ()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Serves the call, and turns the result of an implementation into that of the operation."""
        tensor: Any = args[self._tensor_at]
        if self._traced is not None:
            if in_graph() or type(tensor) not in PLAIN or tensor.is_meta:
                found = self._traced(*args, **kwargs)
                return found if self._result is None else self._result(found, *args, **kwargs)
        elif not _is_compiling() and is_proxied():  # a graph of make_fx takes torch's operations only
            return self.literally(*args, **kwargs)
        for run, declines, _ in self._served_by:
            if declines is None or declines(*args, **kwargs) is None:
                if is_profiled():
                    run = labelled(f"meprop.{self.name}")(run)
                found = run(*args, **kwargs)
                return found if self._result is None else self._result(found, *args, **kwargs)
        raise AssertionError("the reference serves every call")

    def literally(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The same as a call, but always by the reference."""
        found = self.reference(*args, **kwargs)
        return found if self._result is None else self._result(found, *args, **kwargs)

    def explain(self, *args: P.args, **kwargs: P.kwargs) -> tuple[str, dict[str, str]]:
        """The name of the backend that would serve such a call, and why the backends before it decline."""
        reasons: dict[str, str] = {}
        for _, declines, backend in self._served_by:
            reason = None if declines is None else declines(*args, **kwargs)
            if reason is None:
                return backend.name, reasons
            reasons[backend.name] = reason
        raise AssertionError("the reference serves every call")

    def find_backends(self) -> None:
        """Looks up the backends that implement this operation, in order."""
        able = [backend for backend in _order if backend.missing is None and self.name in backend]
        self._served_by = tuple((*backend.implementations[self.name], backend) for backend in able)

    def _define(self, operator: Operator) -> Callable[..., Any]:
        """Defines the operator, and returns a function that calls it with the operation's arguments."""
        restore, flatten = operator.restore, operator.flatten

        def run(*args: Any) -> Any:
            arguments = args if restore is None else restore(*args)
            for implementation, declines, _ in self._served_by:
                if declines is None or declines(*arguments) is None:
                    return implementation(*arguments)
            raise AssertionError("the reference serves every call")

        _library.define(self.name + operator.schema)
        _library.impl(self.name, run, "CompositeExplicitAutograd")
        if operator.sizes_follow_data:
            torch.library.register_fake(f"meprop::{self.name}", operator.fake, lib=_library)
        else:  # the same for torch, and a millisecond of each import less
            _library.impl(self.name, operator.fake, "Meta")
        packet = getattr(torch.ops.meprop, self.name)
        return packet if flatten is None else lambda *args: packet(*flatten(*args))


@overload
def operation(
    *, operator: Operator | None = None, traced: Callable[..., Any] | None = None, tensor_at: int = 0
) -> Callable[[Callable[P, R]], Operation[P, R]]: ...
@overload
def operation(
    *, operator: Operator | None = None, tensor_at: int = 0, result: Callable[..., R]
) -> Callable[[Callable[P, Any]], Operation[P, R]]: ...
def operation(
    *,
    operator: Operator | None = None,
    traced: Callable[..., Any] | None = None,
    tensor_at: int = 0,
    result: Callable[..., Any] | None = None,
) -> Callable[[Callable[P, Any]], Operation[P, Any]]:
    """Makes an operation from its literal reference. The operation has the name of the reference.

    Args:
        operator: How the operation appears to `torch.compile`.
        traced: A function that is called under `torch.compile` in place of an operator. It composes other operations.
        tensor_at: The place of the argument whose type tells whether a call is traced. It is a tensor.
        result: A function from the result of an implementation and the arguments of the call to the result of the
            operation. None if the two results are the same.
    """

    def decorate(reference_: Callable[P, Any]) -> Operation[P, Any]:
        made = Operation(reference_, operator, traced, tensor_at, result)
        _operations[made.name] = made
        reference.implements(made)(reference_)
        return made

    return decorate


class Backend:
    """Implementations of some operations. Each one is an attribute with the name of its operation.

    Args:
        name: The name of the backend in `backend_info` and in `backend`.
        missing: Why the backend cannot be used on this machine. None if it can.
        details: A function that returns further entries for `backend_info`.
    """

    def __init__(
        self, name: str, missing: str | None = None, details: Callable[[], dict[str, Any]] = dict[str, Any]
    ) -> None:
        self.name, self.missing, self.details = name, missing, details
        self.implementations: dict[str, tuple[Callable[..., Any], Declines | None]] = {}

    def implements(self, operation: Operation[..., Any], declines: Declines | None = None) -> Callable[[Run], Run]:
        """Makes the decorated function this backend's implementation of an operation.

        Args:
            operation: The operation. The function takes its arguments and keeps its contract.
            declines: A function from the same arguments to the reason why such a call cannot be served. None if every
                call can be served.
        """

        def decorate(run: Run) -> Run:
            self.implementations[operation.name] = run, declines
            operation.find_backends()
            return run

        return decorate

    def __repr__(self) -> str:
        return f"Backend({self.name!r})"

    def __contains__(self, name: str) -> bool:
        return name in self.implementations

    def __getattr__(self, name: str) -> Callable[..., Any]:
        implementations = self.__dict__.get("implementations", {})
        if name not in implementations:
            raise AttributeError(f"backend {self.__dict__.get('name')!r} does not implement {name!r}")
        return implementations[name][0]


_operations: dict[str, Operation[..., Any]] = {}

reference = Backend("reference")
"""The literal implementations, for any floating dtype and any device."""

_order = [reference]


def register(backend_: Backend, *, before: str = "reference") -> None:
    """Lets a backend serve the calls that it implements and does not decline, from now on.

    A backend that is missing is registered as well, but serves no calls.

    Args:
        backend_: The backend.
        before: The name of another backend. The new backend is asked before it.

    Raises:
        ValueError: The name of the new backend is taken, or no backend is called `before`.
        TypeError: `backend_` is not a Backend.
    """
    if not isinstance(backend_, Backend):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"register({backend_!r}); it takes a meprop.ops.Backend")
    names = [each.name for each in _order]
    if backend_.name in names:
        raise ValueError(f"a backend {backend_.name!r} is registered already; remove it first, or choose another name")
    if before not in names:
        raise ValueError(f"before={before!r}: the backends are {', '.join(names)}")
    _order.insert(names.index(before), backend_)
    _find_backends()


def remove(backend_: Backend) -> None:
    """Lets a backend serve no more calls.

    Raises:
        ValueError: It is not registered, or the reference, which serves what no other does.
    """
    if backend_ is reference or backend_ not in _order:
        names = ", ".join(each.name for each in _order if each is not reference)
        raise ValueError(f"{backend_!r} cannot be removed; the backends that can be are {names}")
    _order.remove(backend_)
    _find_backends()


def _find_backends() -> None:
    for each in _operations.values():
        each.find_backends()


def backend(name: str) -> Backend:
    """The backend of this name. Its attributes are its implementations.

    Raises:
        ValueError: There is no such backend.
    """
    for each in _order:
        if each.name == name:
            return each
    raise ValueError(f"no backend {name!r}; the backends are {', '.join(each.name for each in _order)}")


def backend_info() -> dict[str, Any]:
    """The backends that serve calls on this machine, and the reasons why others do not.

    Returns:
        A dict. "native" is whether the compiled kernels are in use, "isa" is their instruction-set level or None,
        "levels" are the levels that run on this machine, "forced" is the value of MEPROP_ISA or None, "threads" is the
        number of threads, "triton" is whether the GPU's kernels are in use, and "reasons" says for each backend that is
        not in use why it is not. A backend that a user has registered has an entry under its name.
    """
    info: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for each in _order:
        if each is not reference:
            info |= {each.name: each.missing is None, **each.details()}
        if each.missing is not None:
            reasons[each.name] = each.missing
    return {**info, "reasons": reasons}
