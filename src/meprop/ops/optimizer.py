"""Steps of optimizers on a parameter [O, *], whose gradient may have only some rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from meprop.ops import native
from meprop.ops.products import described, grad_weight, native_declines_selection
from meprop.ops.registry import operation
from meprop.selection import RowSelection

Places = Tensor | EllipsisType
"""The indices of rows, or all rows."""

PARAMETER = "param"
"""Stands for the parameter itself among the names of its state."""

ROW_DECAY = "_row_decay"
"""How the name of a state ends that says how far another state, whose name comes before it, decays in each row [O]."""

ROW_WEIGHT_DECAY = "_row_weight_decay"
"""How the name of a state ends that says what weight decay adds to another state in each row [O], as a multiple of the
row's weights, or of their squares."""

OF_ROWS = (ROW_DECAY, ROW_WEIGHT_DECAY)
"""How the names of the states end that have one number for each row [O]."""


_SMALLEST_WHOLE = 1 << 20
"""Elements of the smallest parameter that has calls of its own. Torch's fused implementation takes the others in one
call, where ours would take a call for each."""


def is_large(parameter: Tensor) -> bool:
    """Whether a parameter is so large that calls of its own cost next to nothing."""
    return parameter.numel() >= _SMALLEST_WHOLE


@dataclass(frozen=True)
class GradientRows:
    """The rows of a parameter [O, *] for which a step has a gradient.

    Attributes:
        indices: The indices of the rows [k], int64, ascending. None for all rows, which then have no `decays`. The
            parameter may have any shape then, also [].
        values: The gradients of the rows [k, *].
        every_row: Whether the other rows move as well, with a gradient of zeros.
        decays: By what this step multiplies each row of a state, or of the parameter (`PARAMETER`), before the gradient
            acts [O]. The factors differ, as rows have missed steps. A state that is not named here decays as in one
            step of torch's optimizer.
    """

    indices: Tensor | None
    values: Tensor
    every_row: bool = False
    decays: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def check(self, weight: Tensor, *state: Tensor | None) -> None:
        """Raises a ValueError if the shapes of a parameter, of its state [O, *], and of this gradient do not fit."""
        fits = self.values.shape == (weight.shape if self.indices is None else (len(self.indices), *weight.shape[1:]))
        fits = fits and all(decay.shape == weight.shape[:1] for decay in self.decays.values())
        fits = fits and all(each is None or each.shape == weight.shape for each in state)
        if not fits:
            tensors = (self.values, *state, *self.decays.values())
            found = [list(tensor.shape) for tensor in tensors if tensor is not None]
            raise ValueError(
                f"gradient and state {found} do not go with a parameter {list(weight.shape)}; give it a new optimizer"
            )

    def decay(self, name: str, otherwise: float, at: Places, dimensions: int) -> Tensor | float:
        """The factors of the rows `at` as a column of so many dimensions, or the one of all rows."""
        decay = self.decays.get(name)
        return otherwise if decay is None else decay[at].view(-1, *[1] * (dimensions - 1))


@dataclass(frozen=True)
class GradientProduct:
    """The gradient of a linear map's weight [O, I] as the product that it is, which is not formed yet.

    A native step forms parts of it in the cache, and never writes them to memory.

    Attributes:
        selection: What is kept of the output gradient [N, O].
        x: The input [N, I].
    """

    selection: RowSelection
    x: Tensor

    def formed(self) -> Tensor:
        """The gradient [O, I]."""
        return grad_weight(self.selection, self.x)

    def check(self, weight: Tensor, *state: Tensor | None) -> None:
        """The same as that of `GradientRows`."""
        expected, rows = (self.selection.width, self.x.shape[1]), self.selection.rows
        if len(self.x) != rows or any(each is not None and each.shape != expected for each in (weight, *state)):
            found = [list(each.shape) for each in state if each is not None]
            raise ValueError(
                f"a parameter {list(weight.shape)} and its state {found} do not go with a selection "
                f"[{rows}, {self.selection.width}] and an input {list(self.x.shape)}; give it a new optimizer"
            )

    def decay(self, _name: str, otherwise: float, _at: Places, _dimensions: int) -> float:
        """The factor of all rows. None has missed a step."""
        return otherwise

    def declines(self) -> str | None:
        """Why native code cannot form the product. None if it can."""
        if len(self.x) == 0:
            return "an input without rows, which is not read"
        return native.declines(self.x, dtypes=native.FLOAT32) or native_declines_selection(self.selection)


Gradient = GradientRows | GradientProduct
"""The gradient of a parameter."""


def _declines(rows: Gradient, *tensors: Tensor | None) -> str | None:
    """Why native code cannot take a step on such tensors, which are the parameter and its state. None if it can."""
    if isinstance(rows, GradientProduct):
        reason = native.declines_scattered(*tensors, dtypes=native.FLOAT32) or rows.declines()
        return reason or native.declines_overlap(tensors)
    decays = rows.decays.values()
    return (
        native.declines_scattered(*tensors, rows.values, *decays, dtypes=native.FLOAT32)
        or native.declines_scattered(rows.indices, dtypes=native.INT64)
        or native.declines_overlap(tensors, rows.values, *decays, rows.indices)
    )


def takes_whole(parameter: Tensor, *others: Tensor | None) -> bool:
    """Whether native code does the step of such a parameter, with a dense gradient and a state like the others."""
    if not is_large(parameter) or native.reason_missing() is not None:
        return False
    return native.declines_scattered(parameter, *others, dtypes=native.FLOAT32) is None


def _call(name: str, weight: Tensor, rows: Gradient, *own: float) -> None:
    """The native call of an optimizer's step. The first of its arguments are those of all optimizers."""
    function, threads = getattr(native.extension(), name), torch.get_num_threads()
    if isinstance(rows, GradientProduct):
        x = native.readable(rows.x, weight.dtype)
        examples, _, _, (_, k, _, _, *selection), _alive = described(rows.selection)
        sizes = *weight.shape, 0, 0, 0, weight.data_ptr(), True, threads
        function(*sizes, k, *selection, examples, x.data_ptr(), x.stride(0), *own)
        return
    if rows.indices is None:
        sizes = 1, weight.numel(), 1
    else:
        sizes = len(weight), weight.numel() // max(1, len(weight)), len(rows.indices)
    addresses = native.address(rows.indices), rows.values.data_ptr(), weight.data_ptr()
    function(*sizes, *addresses, rows.every_row, threads, *_NO_PRODUCT, *own)


_NO_PRODUCT = (0,) * 9


def _own_decays(rows: Gradient, *names: str) -> list[int]:
    """The addresses of the decays of these states."""
    decays = {} if isinstance(rows, GradientProduct) else rows.decays
    return [native.address(decays.get(name)) for name in names]


def _moving_rows(weight: Tensor, rows: Gradient) -> tuple[Places, Tensor]:
    """The rows that move, and their gradients.

    Raises:
        IndexError: The indices do not ascend, or are no rows of the parameter.
    """
    if isinstance(rows, GradientProduct):
        return ..., grad_weight.literally(rows.selection, rows.x)
    if rows.indices is None:
        return ..., rows.values
    if rows.indices.is_cpu and not ascending.literally(rows.indices, len(weight)):  # of a GPU, asking would be a wait
        raise IndexError(
            f"the indices of a gradient's rows must ascend, and lie within the {len(weight)} rows there are"
        )
    at, grad = rows.indices, rows.values
    if rows.every_row:
        at, grad = torch.arange(len(weight), device=weight.device), torch.zeros_like(weight).index_copy_(0, at, grad)
    return at, grad


def _decayed(grad: Tensor, weight: Tensor, weight_decay: float) -> Tensor:
    """The gradient with weight decay. As in torch's optimizers, a decay of 0 adds nothing, also to infinite weights."""
    return grad + weight_decay * weight if weight_decay != 0 else grad


def _store(tensor: Tensor, at: Places, values: Tensor) -> None:
    """Writes rows of a parameter or of its state, which may be of different dtypes after ``model.to(dtype)``."""
    tensor[at] = values.to(tensor.dtype)


# ---------------------------------------------------------------- SGD


@operation()
def sgd_rows(
    weight: Tensor,
    buffer: Tensor | None,
    rows: Gradient,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """`torch.optim.SGD` on the rows that move, in place.

    Args:
        weight: The parameter [O, *].
        buffer: The momentum buffer [O, *], named "momentum_buffer" in `rows.decays`. None without momentum.
        rows: The gradient.
        lr: The same as torch's.
        momentum: The same as torch's.
        dampening: The same as torch's.
        weight_decay: The same as torch's.
        nesterov: The same as torch's.

    Raises:
        ValueError: The shapes do not fit.
        IndexError: The indices of the rows do not ascend, or are no rows of the parameter.
    """
    rows.check(weight, buffer)
    at, grad = _moving_rows(weight, rows)
    w = weight[at]
    grad = _decayed(grad, w, weight_decay)
    if buffer is not None:
        keep = rows.decay("momentum_buffer", momentum, at, weight.dim())
        _store(buffer, at, buffer[at] * keep + (1 - dampening) * grad)
        grad = grad + momentum * buffer[at] if nesterov else buffer[at]
    _store(weight, at, w - lr * grad)


def _native_sgd_declines(weight: Tensor, buffer: Tensor | None, rows: Gradient, **_: Any) -> str | None:
    return _declines(rows, weight, buffer)


@native.backend.implements(sgd_rows, _native_sgd_declines)
def _native_sgd_rows(
    weight: Tensor,
    buffer: Tensor | None,
    rows: Gradient,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    rows.check(weight, buffer)
    state = native.address(buffer), *_own_decays(rows, "momentum_buffer")
    _call("sgd_rows", weight, rows, *state, nesterov, lr, momentum, dampening, weight_decay)
    native.written(weight, buffer)


# ---------------------------------------------------------------- Adam


@operation()
def adam_rows(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    rows: Gradient,
    step: float,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """`torch.optim.Adam` on the rows that move, in place. With decoupled weight decay it is AdamW.

    Args:
        weight: The parameter [O, *].
        exp_avg: The first moment [O, *]. Its name in `rows.decays` is this one.
        exp_avg_sq: The second moment [O, *]. Its name in `rows.decays` is this one.
        max_exp_avg_sq: The largest second moment so far [O, *] with AMSGrad, else None.
        rows: The gradient.
        step: The number of this step, counted from 1.
        lr: The same as torch's.
        betas: The same as torch's.
        eps: The same as torch's.
        weight_decay: The same as torch's.
        decoupled: Whether the weight decay is decoupled, as in AdamW.

    Raises:
        ValueError: The shapes do not fit.
        IndexError: The indices of the rows do not ascend, or are no rows of the parameter.
    """
    rows.check(weight, exp_avg, exp_avg_sq, max_exp_avg_sq)
    at, grad = _moving_rows(weight, rows)
    w = weight[at]
    if decoupled:
        w = w * rows.decay(PARAMETER, 1 - lr * weight_decay, at, weight.dim())
    else:
        grad = _decayed(grad, w, weight_decay)
    keep_first, keep_second = (
        rows.decay(name, beta, at, weight.dim()) for name, beta in zip(("exp_avg", "exp_avg_sq"), betas, strict=True)
    )
    _store(exp_avg, at, exp_avg[at] * keep_first + (1 - betas[0]) * grad)
    _store(exp_avg_sq, at, exp_avg_sq[at] * keep_second + (1 - betas[1]) * grad * grad)
    second = exp_avg_sq[at]
    if max_exp_avg_sq is not None:
        second = torch.maximum(max_exp_avg_sq[at], second)
        _store(max_exp_avg_sq, at, second)
    root = second.sqrt() / sqrt(1 - betas[1] ** step) + eps
    _store(weight, at, w - lr / (1 - betas[0] ** step) * exp_avg[at] / root)


def _native_adam_declines(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    rows: Gradient,
    _step: float,
    **_: Any,
) -> str | None:
    if max_exp_avg_sq is not None:
        return "native kernels have no AMSGrad"
    return _declines(rows, weight, exp_avg, exp_avg_sq)


@native.backend.implements(adam_rows, _native_adam_declines)
def _native_adam_rows(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    _max_exp_avg_sq: None,
    rows: Gradient,
    step: float,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    rows.check(weight, exp_avg, exp_avg_sq)
    state = exp_avg.data_ptr(), exp_avg_sq.data_ptr()
    decays = _own_decays(rows, "exp_avg", "exp_avg_sq", PARAMETER)
    _call("adam_rows", weight, rows, *state, *decays, decoupled, step, lr, *betas, eps, weight_decay)
    native.written(weight, exp_avg, exp_avg_sq)


# ---------------------------------------------------------------- Adagrad


@operation()
def adagrad_rows(weight: Tensor, sum_: Tensor, rows: Gradient, *, lr: float, eps: float, weight_decay: float) -> None:
    """`torch.optim.Adagrad` on the rows that move, in place.

    Args:
        weight: The parameter [O, *].
        sum_: The sum of the squared gradients [O, *].
        rows: The gradient.
        lr: The learning rate of this step.
        eps: The same as torch's.
        weight_decay: The same as torch's.

    Raises:
        ValueError: The shapes do not fit.
        IndexError: The indices of the rows do not ascend, or are no rows of the parameter.
    """
    rows.check(weight, sum_)
    at, grad = _moving_rows(weight, rows)
    grad = _decayed(grad, weight[at], weight_decay)
    _store(sum_, at, sum_[at] + grad * grad)
    _store(weight, at, weight[at] - lr * grad / (sum_[at].sqrt() + eps))


def _native_adagrad_declines(weight: Tensor, sum_: Tensor, rows: Gradient, **_: Any) -> str | None:
    return _declines(rows, weight, sum_)


@native.backend.implements(adagrad_rows, _native_adagrad_declines)
def _native_adagrad_rows(
    weight: Tensor, sum_: Tensor, rows: Gradient, *, lr: float, eps: float, weight_decay: float
) -> None:
    rows.check(weight, sum_)
    _call("adagrad_rows", weight, rows, sum_.data_ptr(), lr, eps, weight_decay)
    native.written(weight, sum_)


# ---------------------------------------------------------------- a question about a gradient


@operation()
def ascending(indices: Tensor, rows: int, /) -> bool:
    """Whether indices [k], int64, ascend and lie within [0, rows)."""
    return len(indices) == 0 or bool((indices.diff() > 0).all() and indices[0] >= 0 and indices[-1] < rows)


def _native_ascending_declines(indices: Tensor, _rows: int) -> str | None:
    return native.declines_scattered(indices, dtypes=native.INT64)


@native.backend.implements(ascending, _native_ascending_declines)
def _native_ascending(indices: Tensor, rows: int) -> bool:
    return native.extension().ascending(indices.data_ptr(), len(indices), rows)
