"""Steps of optimizers on a parameter [O, *] whose gradient has only some rows.

The module also has what `meprop.copies` asks of gradients and copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from meprop.ops import native
from meprop.ops.registry import operation


@dataclass(frozen=True)
class GradientRows:
    """The rows of a parameter [O, *] for which a step has a gradient.

    Attributes:
        indices: The indices of the rows [k], int64, ascending.
        values: The gradients of the rows [k, *].
        every_row: Whether the other rows move as well, with a gradient of zeros.
        row_step: The step until which the state of each row is up to date [O], float32. A step makes up for what a
            moving row has missed, and writes its own number here. None means that all rows are up to date.
        bf16_copy: A bfloat16 copy of the parameter. The new values of the rows that move are written into it. None
            means that there is no copy.
    """

    indices: Tensor
    values: Tensor
    every_row: bool = False
    row_step: Tensor | None = None
    bf16_copy: Tensor | None = None

    def check(self, weight: Tensor, *state: Tensor | None) -> None:
        """Raises a ValueError if the shapes of a parameter, of its state [O, *], and of this gradient do not fit."""
        fits = self.values.shape == (len(self.indices), *weight.shape[1:])
        fits = fits and (self.row_step is None or self.row_step.shape == weight.shape[:1])
        fits = fits and all(each is None or each.shape == weight.shape for each in (*state, self.bf16_copy))
        if not fits:
            tensors = (self.values, *state, self.row_step, self.bf16_copy)
            found = [list(tensor.shape) for tensor in tensors if tensor is not None]
            raise ValueError(
                f"gradient and state {found} do not go with a parameter {list(weight.shape)}; give it a new optimizer"
            )


def _declines(rows: GradientRows, *tensors: Tensor | None) -> str | None:
    """Why native code cannot take a step on such tensors, which are the parameter and its state. None if it can."""
    reason = native.declines_scattered(*tensors, rows.values, rows.row_step, dtypes=native.FLOAT32)
    if reason is None:
        reason = native.declines_scattered(rows.indices, dtypes=native.INT64)
    if reason is None and rows.bf16_copy is not None:
        reason = native.declines_scattered(rows.bf16_copy, dtypes=native.BFLOAT16)
    return reason


def _arguments(weight: Tensor, rows: GradientRows) -> tuple[int, ...]:
    """The first arguments of the native calls of all optimizers."""
    return (
        len(weight),
        weight.numel() // max(1, len(weight)),
        len(rows.indices),
        rows.indices.data_ptr(),
        rows.values.data_ptr(),
        weight.data_ptr(),
        native.address(rows.bf16_copy),
        rows.every_row,
        native.address(rows.row_step),
        torch.get_num_threads(),
    )


def _moving_rows(weight: Tensor, rows: GradientRows, step: float) -> tuple[Tensor, Tensor, Tensor | float]:
    """The rows that move, their gradients, and the number of steps that each has missed.

    The number is a column. It is 0.0 if no row has missed a step.
    """
    at, grad = rows.indices, rows.values
    if rows.every_row:
        at, grad = torch.arange(len(weight), device=weight.device), torch.zeros_like(weight).index_copy_(0, at, grad)
    if rows.row_step is None:
        return at, grad, 0.0
    missed_steps = step - 1 - rows.row_step[at]
    rows.row_step[at] = step
    return at, grad, missed_steps.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))


def _write_copy(weight: Tensor, at: Tensor, rows: GradientRows) -> None:
    if rows.bf16_copy is not None:
        rows.bf16_copy[at] = weight[at].to(rows.bf16_copy.dtype)


# ---------------------------------------------------------------- SGD


@operation()
def sgd_rows(
    weight: Tensor,
    buffer: Tensor | None,
    rows: GradientRows,
    step: float,
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
        buffer: The momentum buffer [O, *]. None without momentum.
        rows: The gradient.
        step: The number of this step, counted from 1.
        lr: The same as torch's.
        momentum: The same as torch's.
        dampening: The same as torch's.
        weight_decay: The same as torch's.
        nesterov: The same as torch's.

    Raises:
        ValueError: The shapes do not fit.
    """
    rows.check(weight, buffer)
    at, grad, missed_steps = _moving_rows(weight, rows, step)
    w = weight[at]
    grad = grad + weight_decay * w
    if buffer is not None:
        buffer[at] = buffer[at] * momentum ** (missed_steps + 1) + (1 - dampening) * grad
        grad = grad + momentum * buffer[at] if nesterov else buffer[at]
    weight[at] = w - lr * grad
    _write_copy(weight, at, rows)


def _native_sgd_declines(
    weight: Tensor, buffer: Tensor | None, rows: GradientRows, _step: float, **_: Any
) -> str | None:
    return _declines(rows, weight, buffer)


@native.backend.implements(sgd_rows, _native_sgd_declines)
def _native_sgd_rows(
    weight: Tensor,
    buffer: Tensor | None,
    rows: GradientRows,
    step: float,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    rows.check(weight, buffer)
    state = native.address(buffer)
    native.extension().sgd_rows(*_arguments(weight, rows), state, nesterov, step, lr, momentum, dampening, weight_decay)
    native.written(weight, rows.bf16_copy, buffer)


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
        exp_avg: The first moment [O, *].
        exp_avg_sq: The second moment [O, *].
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
    """
    rows.check(weight, exp_avg, exp_avg_sq, max_exp_avg_sq)
    at, grad, missed_steps = _moving_rows(weight, rows, step)
    w = weight[at]
    if decoupled:
        w = w * (1 - lr * weight_decay) ** (missed_steps + 1)
    else:
        grad = grad + weight_decay * w
    exp_avg[at] = exp_avg[at] * betas[0] ** (missed_steps + 1) + (1 - betas[0]) * grad
    exp_avg_sq[at] = exp_avg_sq[at] * betas[1] ** (missed_steps + 1) + (1 - betas[1]) * grad * grad
    second = exp_avg_sq[at]
    if max_exp_avg_sq is not None:
        max_exp_avg_sq[at] = second = torch.maximum(max_exp_avg_sq[at], second)
    root = second.sqrt() / sqrt(1 - betas[1] ** step) + eps
    weight[at] = w - lr / (1 - betas[0] ** step) * exp_avg[at] / root
    _write_copy(weight, at, rows)


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
    native.extension().adam_rows(*_arguments(weight, rows), *state, decoupled, step, lr, *betas, eps, weight_decay)
    native.written(weight, rows.bf16_copy, exp_avg, exp_avg_sq)


# ---------------------------------------------------------------- Adagrad


@operation()
def adagrad_rows(
    weight: Tensor, sum_: Tensor, rows: GradientRows, step: float, *, lr: float, eps: float, weight_decay: float
) -> None:
    """`torch.optim.Adagrad` on the rows that move, in place.

    Args:
        weight: The parameter [O, *].
        sum_: The sum of the squared gradients [O, *].
        rows: The gradient.
        step: The number of this step, counted from 1.
        lr: The learning rate of this step.
        eps: The same as torch's.
        weight_decay: The same as torch's.

    Raises:
        ValueError: The shapes do not fit.
    """
    rows.check(weight, sum_)
    at, grad, _ = _moving_rows(weight, rows, step)
    grad = grad + weight_decay * weight[at]
    sum_[at] = sum_[at] + grad * grad
    weight[at] = weight[at] - lr * grad / (sum_[at].sqrt() + eps)
    _write_copy(weight, at, rows)


def _native_adagrad_declines(weight: Tensor, sum_: Tensor, rows: GradientRows, _step: float, **_: Any) -> str | None:
    return _declines(rows, weight, sum_)


@native.backend.implements(adagrad_rows, _native_adagrad_declines)
def _native_adagrad_rows(
    weight: Tensor, sum_: Tensor, rows: GradientRows, step: float, *, lr: float, eps: float, weight_decay: float
) -> None:
    rows.check(weight, sum_)
    native.extension().adagrad_rows(*_arguments(weight, rows), sum_.data_ptr(), step, lr, eps, weight_decay)
    native.written(weight, rows.bf16_copy, sum_)


# ---------------------------------------------------------------- questions about a gradient and about a copy


@operation()
def ascending(indices: Tensor, rows: int, /) -> bool:
    """Whether indices [k], int64, ascend and lie within [0, rows)."""
    return len(indices) == 0 or bool((indices.diff() > 0).all() and indices[0] >= 0 and indices[-1] < rows)


def _native_ascending_declines(indices: Tensor, _rows: int) -> str | None:
    return native.declines_scattered(indices, dtypes=native.INT64)


@native.backend.implements(ascending, _native_ascending_declines)
def _native_ascending(indices: Tensor, rows: int) -> bool:
    return native.extension().ascending(indices.data_ptr(), len(indices), rows)


@operation()
def copy_agrees(weight: Tensor, copy: Tensor, samples: int, /) -> bool:
    """Whether a copy equals a contiguous weight that is cast to its dtype.

    About `samples` entries are compared. They are evenly spread.
    """
    flat = weight.detach().view(-1)
    stride = max(1, len(flat) // samples) | 1  # odd, so that the samples lie in different columns
    found, expected = copy.view(-1)[::stride], flat[::stride].to(copy.dtype)
    return torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)


def _native_copy_declines(weight: Tensor, copy: Tensor, _samples: int) -> str | None:
    return native.declines_scattered(weight, dtypes=native.FLOAT32) or native.declines_scattered(
        copy, dtypes=native.BFLOAT16
    )


@native.backend.implements(copy_agrees, _native_copy_declines)
def _native_copy_agrees(weight: Tensor, copy: Tensor, samples: int) -> bool:
    return native.extension().copy_agrees(weight.data_ptr(), copy.data_ptr(), weight.numel(), samples)
