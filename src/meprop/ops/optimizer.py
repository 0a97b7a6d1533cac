"""Steps of optimizers on a parameter [O, *] whose gradient has only some rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from meprop.ops import native
from meprop.ops.registry import operation

PARAMETER = "param"
"""Stands for the parameter itself among the names of its state."""

ROW_DECAY = "_row_decay"
"""How the name of a state ends that says how far another state, whose name comes before it, decays in each row [O]."""

ROW_WEIGHT_DECAY = "_row_weight_decay"
"""How the name of a state ends that says what weight decay adds to another state in each row [O], as a multiple of the
row's weights, or of their squares."""

OF_ROWS = (ROW_DECAY, ROW_WEIGHT_DECAY)
"""How the names of the states end that have one number for each row [O]."""


@dataclass(frozen=True)
class GradientRows:
    """The rows of a parameter [O, *] for which a step has a gradient.

    Attributes:
        indices: The indices of the rows [k], int64, ascending.
        values: The gradients of the rows [k, *].
        every_row: Whether the other rows move as well, with a gradient of zeros.
        decays: By what this step multiplies each row of a state, or of the parameter (`PARAMETER`), before the gradient
            acts [O]. The factors differ, as rows have missed steps. A state that is not named here decays as in one
            step of torch's optimizer.
    """

    indices: Tensor
    values: Tensor
    every_row: bool = False
    decays: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def check(self, weight: Tensor, *state: Tensor | None) -> None:
        """Raises a ValueError if the shapes of a parameter, of its state [O, *], and of this gradient do not fit."""
        fits = self.values.shape == (len(self.indices), *weight.shape[1:])
        fits = fits and all(decay.shape == weight.shape[:1] for decay in self.decays.values())
        fits = fits and all(each is None or each.shape == weight.shape for each in state)
        if not fits:
            tensors = (self.values, *state, *self.decays.values())
            found = [list(tensor.shape) for tensor in tensors if tensor is not None]
            raise ValueError(
                f"gradient and state {found} do not go with a parameter {list(weight.shape)}; give it a new optimizer"
            )

    def decay(self, name: str, otherwise: float, at: Tensor, dimensions: int) -> Tensor | float:
        """The factors of the rows `at` as a column of so many dimensions, or the one of all rows."""
        decay = self.decays.get(name)
        return otherwise if decay is None else decay[at].view(-1, *[1] * (dimensions - 1))


def _declines(rows: GradientRows, *tensors: Tensor | None) -> str | None:
    """Why native code cannot take a step on such tensors, which are the parameter and its state. None if it can."""
    decays = rows.decays.values()
    return (
        native.declines_scattered(*tensors, rows.values, *decays, dtypes=native.FLOAT32)
        or native.declines_scattered(rows.indices, dtypes=native.INT64)
        or native.declines_overlap(tensors, rows.values, *decays, rows.indices)
    )


def _arguments(weight: Tensor, rows: GradientRows) -> tuple[int, ...]:
    """The first arguments of the native calls of all optimizers."""
    return (
        len(weight),
        weight.numel() // max(1, len(weight)),
        len(rows.indices),
        rows.indices.data_ptr(),
        rows.values.data_ptr(),
        weight.data_ptr(),
        rows.every_row,
        torch.get_num_threads(),
    )


def _moving_rows(weight: Tensor, rows: GradientRows) -> tuple[Tensor, Tensor]:
    """The rows that move, and their gradients.

    Raises:
        IndexError: The indices do not ascend, or are no rows of the parameter.
    """
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


def _store(tensor: Tensor, at: Tensor, values: Tensor) -> None:
    """Writes rows of a parameter or of its state, which may be of different dtypes after ``model.to(dtype)``."""
    tensor[at] = values.to(tensor.dtype)


# ---------------------------------------------------------------- SGD


@operation()
def sgd_rows(
    weight: Tensor,
    buffer: Tensor | None,
    rows: GradientRows,
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


def _native_sgd_declines(weight: Tensor, buffer: Tensor | None, rows: GradientRows, **_: Any) -> str | None:
    return _declines(rows, weight, buffer)


@native.backend.implements(sgd_rows, _native_sgd_declines)
def _native_sgd_rows(
    weight: Tensor,
    buffer: Tensor | None,
    rows: GradientRows,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    rows.check(weight, buffer)
    state = native.address(buffer), native.address(rows.decays.get("momentum_buffer"))
    native.extension().sgd_rows(*_arguments(weight, rows), *state, nesterov, lr, momentum, dampening, weight_decay)
    native.written(weight, buffer)


# ---------------------------------------------------------------- Adam


@operation()
def adam_rows(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    rows: GradientRows,
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
    rows: GradientRows,
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
    rows: GradientRows,
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
    decays = [native.address(rows.decays.get(name)) for name in ("exp_avg", "exp_avg_sq", PARAMETER)]
    options = decoupled, step, lr, *betas, eps, weight_decay
    native.extension().adam_rows(*_arguments(weight, rows), *state, *decays, *options)
    native.written(weight, exp_avg, exp_avg_sq)


# ---------------------------------------------------------------- Adagrad


@operation()
def adagrad_rows(
    weight: Tensor, sum_: Tensor, rows: GradientRows, *, lr: float, eps: float, weight_decay: float
) -> None:
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


def _native_adagrad_declines(weight: Tensor, sum_: Tensor, rows: GradientRows, **_: Any) -> str | None:
    return _declines(rows, weight, sum_)


@native.backend.implements(adagrad_rows, _native_adagrad_declines)
def _native_adagrad_rows(
    weight: Tensor, sum_: Tensor, rows: GradientRows, *, lr: float, eps: float, weight_decay: float
) -> None:
    rows.check(weight, sum_)
    native.extension().adagrad_rows(*_arguments(weight, rows), sum_.data_ptr(), lr, eps, weight_decay)
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
