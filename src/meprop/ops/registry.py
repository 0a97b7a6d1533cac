"""The operations, and the backends that serve them: in order, each saying per call why it declines.

An operation is its literal reference: a function whose docstring is the contract of all implementations. A backend is
one file that implements some of the operations. A call goes to the first backend that implements the operation and does
not decline the call; the reference implements every operation and never declines.

Under `torch.compile` a call takes another way: to the operator `torch.ops.meprop.*` of the same name, whose results'
shapes torch can tell without running it. In the compiled program that operator is served as an eager call is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar, overload

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
Run = TypeVar("Run", bound=Callable[..., Any])
Declines = Callable[..., str | None]
"""From the arguments of a call, why it cannot be served; None: it can."""

PLAIN = (Tensor, torch.nn.Parameter)
"""The types of tensors that are nothing but their memory: subclasses may be fake, distributed or wrapped."""

_is_compiling = torch.compiler.is_compiling
_library = torch.library.Library("meprop", "DEF")


@dataclass(frozen=True)
class Operator:
    """How an operation appears to `torch.compile`, as `torch.ops.meprop.*`.

    An eager call does not come this way: a Python operator costs several microseconds, a direct call a fraction of one.

    Attributes:
        schema: Arguments and results, e.g. "(Tensor grad, int k) -> (Tensor, Tensor)".
        fake: From the operator's arguments to empty results of the right shapes.
        flatten: From the operation's arguments to the operator's; None: they are the same.
        restore: From the operator's arguments to the operation's; None: they are the same.
    """

    schema: str
    fake: Callable[..., Any]
    flatten: Callable[..., tuple[Any, ...]] | None = None
    restore: Callable[..., tuple[Any, ...]] | None = None


class Operation(Generic[P, R]):
    """One operation, called as its reference is; made by `operation`.

    Attributes:
        name: By which backends and `torch.ops.meprop` know it.
        reference: The literal implementation, the oracle of all others.
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
        """Serves the call; what implementations give becomes what callers get."""
        if self._traced is not None and (_is_compiling() or type(args[self._tensor_at]) not in PLAIN):
            found = self._traced(*args, **kwargs)
            return found if self._result is None else self._result(found, *args, **kwargs)
        for run, declines, _ in self._served_by:
            if declines is None or declines(*args, **kwargs) is None:
                found = run(*args, **kwargs)
                return found if self._result is None else self._result(found, *args, **kwargs)
        raise AssertionError("the reference serves every call")

    def literally(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """As a call, of the reference."""
        found = self.reference(*args, **kwargs)
        return found if self._result is None else self._result(found, *args, **kwargs)

    def explain(self, *args: P.args, **kwargs: P.kwargs) -> tuple[str, dict[str, str]]:
        """Which backend would serve such a call, and why those before it decline."""
        reasons: dict[str, str] = {}
        for _, declines, backend in self._served_by:
            reason = None if declines is None else declines(*args, **kwargs)
            if reason is None:
                return backend.name, reasons
            reasons[backend.name] = reason
        raise AssertionError("the reference serves every call")

    def find_backends(self) -> None:
        """Notes who implements it, in order."""
        able = [backend for backend in _order if backend.missing is None and self.name in backend]
        self._served_by = tuple((*backend.implementations[self.name], backend) for backend in able)

    def _define(self, operator: Operator) -> Callable[..., Any]:
        """Defines the operator, and returns what calls it with the operation's arguments."""
        restore, flatten = operator.restore, operator.flatten

        def run(*args: Any) -> Any:
            arguments = args if restore is None else restore(*args)
            for implementation, declines, _ in self._served_by:
                if declines is None or declines(*arguments) is None:
                    return implementation(*arguments)
            raise AssertionError("the reference serves every call")

        _library.define(self.name + operator.schema)
        _library.impl(self.name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"meprop::{self.name}", operator.fake, lib=_library)
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
    """Makes an operation of its literal reference, whose name it has.

    Args:
        operator: How `torch.compile` sees it.
        traced: What a call does under `torch.compile`, in place of an operator: consist of other operations.
        tensor_at: Which argument, by its place, is the tensor that tells whether such a call is traced.
        result: From what implementations give, and the arguments of the call, to what callers get; None: the same.
    """

    def decorate(reference_: Callable[P, Any]) -> Operation[P, Any]:
        made = Operation(reference_, operator, traced, tensor_at, result)
        _operations[made.name] = made
        reference.implements(made)(reference_)
        return made

    return decorate


class Backend:
    """Implementations of some operations, which are its attributes by the operations' names.

    Args:
        name: In `backend_info` and in `backend`.
        missing: Why it cannot be used here at all; None: it can.
        details: More that `backend_info` says of it.
    """

    def __init__(
        self, name: str, missing: str | None = None, details: Callable[[], dict[str, Any]] = dict[str, Any]
    ) -> None:
        self.name, self.missing, self.details = name, missing, details
        self.implementations: dict[str, tuple[Callable[..., Any], Declines | None]] = {}

    def implements(self, operation: Operation[..., Any], declines: Declines | None = None) -> Callable[[Run], Run]:
        """Makes the decorated function this backend's implementation of an operation.

        Args:
            operation: Which one; the function takes its arguments and keeps its contract.
            declines: From the same arguments, why such a call cannot be served; None: every call can be.
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
"""The literal implementations: any floating dtype, any device."""

_order = [reference]


def register(backend_: Backend, *, before: str = "reference") -> None:
    """Lets a backend serve calls from now on, those that it implements and does not decline; not if it is missing.

    Args:
        backend_: The backend.
        before: The name of the backend that it is asked before.

    Raises:
        ValueError: Its name is taken, or no backend is called `before`.
    """
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
    """The backend of this name; its attributes are its implementations.

    Raises:
        ValueError: There is none.
    """
    for each in _order:
        if each.name == name:
            return each
    raise ValueError(f"no backend {name!r}; the backends are {', '.join(each.name for each in _order)}")


def backend_info() -> dict[str, Any]:
    """What serves calls here, and why what does not, does not.

    Returns:
        A dict: "native" (whether the compiled kernels are in use), "isa" (their instruction-set level, or None),
        "levels" (those that run here), "forced" (the value of MEPROP_ISA, or None), "threads", "triton" (False: no GPU
        kernels yet), "reasons" (per backend not in use, why). A backend of one's own is there by its name.
    """
    info: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for each in _order:
        if each is not reference:
            info |= {each.name: each.missing is None, **each.details()}
        if each.missing is not None:
            reasons[each.name] = each.missing
    return {**info, "reasons": reasons}
