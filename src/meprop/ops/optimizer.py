"""Steps of optimizers on a parameter [O, *], whose gradient may have only some rows."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from meprop.ops import native, triton
from meprop.ops.gradients import PARAMETER, Gradient, GradientProduct, GradientRows
from meprop.ops.products import described, grad_weight
from meprop.ops.registry import operation
from meprop.ops.rounding import Places, stochastic

_SMALLEST_WHOLE = 1 << 20
"""Elements of the smallest parameter that has calls of its own. Torch's fused implementation takes the others in one
call, where ours would take a call for each."""


def is_large(elements: int) -> bool:
    """Whether a parameter of so many elements is so large that calls of its own cost next to nothing."""
    return elements >= _SMALLEST_WHOLE


def _declines(rows: Gradient, options: dict[str, Any], weight: Tensor, *state: Tensor | None) -> str | None:
    """Why native code cannot take a step on such a parameter and its state. None if it can."""
    of_state = native.FLOAT32 if options.get("key") is None else native.BFLOAT16
    copy: Tensor | None = options.get("copy")
    reason = (
        native.declines_scattered(weight, dtypes=native.FLOAT32)
        or native.declines_scattered(*state, dtypes=of_state)
        or native.declines_scattered(copy, dtypes=native.BFLOAT16)
    )
    if reason is not None:
        return reason
    values = None if isinstance(rows, GradientProduct) else rows.values
    decays = rows.decays.values()
    return (
        (rows.declines() if isinstance(rows, GradientProduct) else None)
        or native.declines_scattered(values, *decays, dtypes=native.FLOAT32)
        or native.declines_scattered(rows.indices, dtypes=native.INT64)
        or native.declines_overlap((weight, copy, *state), values, *decays, rows.indices)
    )


def takes_whole(parameter: Tensor, *others: Tensor | None) -> bool:
    """Whether native code does the step of such a parameter, with a dense gradient and a state like the others."""
    if not is_large(parameter.numel()) or native.reason_missing() is not None:
        return False
    return native.declines_scattered(parameter, *others, dtypes=native.FLOAT32) is None


def _call(name: str, weight: Tensor, copy: Tensor | None, rows: Gradient, *own: float) -> None:
    """The native call of an optimizer's step. The first of its arguments are those of all optimizers."""
    function, threads = getattr(native.extension(), name), torch.get_num_threads()
    if isinstance(rows, GradientProduct):
        x = native.readable(rows.x, weight.dtype)
        examples, _, _, (_, k, _, _, *selection), _alive = described(rows.of_rows)
        count = len(weight if rows.indices is None else rows.indices)
        addresses = native.address(rows.indices), 0, weight.data_ptr(), native.address(copy)
        sizes = *weight.shape, count, *addresses, False, threads
        function(*sizes, k, *selection, examples, x.data_ptr(), x.stride(0), *own)
        return
    if rows.indices is None:
        sizes = 1, weight.numel(), 1
    else:
        sizes = len(weight), weight.numel() // max(1, len(weight)), len(rows.indices)
    addresses = native.address(rows.indices), rows.values.data_ptr(), weight.data_ptr(), native.address(copy)
    function(*sizes, *addresses, rows.every_row, threads, *_NO_PRODUCT, *own)


_NO_PRODUCT = (0,) * 9


def _own_decays(rows: Gradient, *names: str) -> list[int]:
    """The addresses of the decays of these states."""
    return [native.address(rows.decays.get(name)) for name in names]


def _moving_rows(weight: Tensor, rows: Gradient) -> tuple[Places, Tensor]:
    """The rows that move, and their gradients.

    Raises:
        IndexError: The indices do not ascend, or are no rows of the parameter.
    """
    is_product = isinstance(rows, GradientProduct)
    values = grad_weight.literally(rows.selection, rows.x) if is_product else rows.values
    if rows.indices is None:
        return ..., values
    if rows.indices.is_cpu and not ascending.literally(rows.indices, len(weight)):  # of a GPU, asking would be a wait
        raise IndexError(
            f"the indices of a gradient's rows must ascend, and lie within the {len(weight)} rows there are"
        )
    at, grad = rows.indices, values[rows.indices] if is_product else values
    if not is_product and rows.every_row:
        at, grad = torch.arange(len(weight), device=weight.device), torch.zeros_like(weight).index_copy_(0, at, grad)
    return at, grad


def _decayed(grad: Tensor, weight: Tensor, weight_decay: float) -> Tensor:
    """The gradient with weight decay. As in torch's optimizers, a decay of 0 adds nothing, also to infinite weights."""
    return grad + weight_decay * weight if weight_decay != 0 else grad


def _load(tensor: Tensor, at: Places, key: int | None) -> Tensor:
    """Rows of a state, in float32 if it is rounded with a key."""
    return tensor[at] if key is None else tensor[at].float()


def _store(tensor: Tensor, at: Places, values: Tensor, key: int | None = None, *, is_second: bool = False) -> Tensor:
    """Writes rows of a parameter or of its state, and returns what the step goes on from.

    Without a key this is what has been written. The dtypes may differ then after ``model.to(dtype)``. With a key
    bfloat16 is written, and the step goes on from the values before they are rounded.
    """
    if key is None:
        tensor[at] = values.to(tensor.dtype)
        return tensor[at]
    tensor[at] = stochastic(values, tensor.shape, at, key, is_second=is_second)
    return values


def _store_weight(weight: Tensor, copy: Tensor | None, at: Places, values: Tensor) -> None:
    """Writes rows of a parameter, and of its copy if there is one."""
    weight[at] = values.to(weight.dtype)
    if copy is not None:
        copy[at] = weight[at].to(copy.dtype)


def _root(squares: Tensor) -> Tensor:
    """The square roots. Torch's of float32 may be off by a unit in the last place."""
    return squares.double().sqrt().to(squares.dtype)


def _code(key: int | None) -> int:
    """A key as native code takes it."""
    return -1 if key is None else key


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
    key: int | None = None,
    copy: Tensor | None = None,
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
        key: With a key the parameter is float32, and its state bfloat16, which is computed in float32 and rounded as
            `meprop.ops.rounding.stochastic` does. The step goes on from what is rounded. None: no such rounding.
        copy: The parameter in another dtype [O, *], which gets the rows that move, rounded to the nearest. None: none.

    Raises:
        ValueError: The shapes do not fit.
        IndexError: The indices of the rows do not ascend, or are no rows of the parameter.
    """
    rows.check(weight, copy, buffer)
    at, grad = _moving_rows(weight, rows)
    w = weight[at]
    grad = _decayed(grad, w, weight_decay)
    if buffer is not None:
        keep = rows.decay("momentum_buffer", momentum, at, weight.dim())
        sum_ = _store(buffer, at, _load(buffer, at, key) * keep + (1 - dampening) * grad, key)
        grad = grad + momentum * sum_ if nesterov else sum_
    _store_weight(weight, copy, at, w - lr * grad)


def _native_sgd_declines(weight: Tensor, buffer: Tensor | None, rows: Gradient, **options: Any) -> str | None:
    return _declines(rows, options, weight, buffer)


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
    key: int | None = None,
    copy: Tensor | None = None,
) -> None:
    rows.check(weight, copy, buffer)
    state = native.address(buffer), *_own_decays(rows, "momentum_buffer")
    _call("sgd_rows", weight, copy, rows, *state, nesterov, _code(key), lr, momentum, dampening, weight_decay)
    native.written(weight, copy, buffer)


# ---------------------------------------------------------------- Adam


@operation()
def adam_rows(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    rows: Gradient,
    step: float | Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    key: int | None = None,
    copy: Tensor | None = None,
) -> None:
    """`torch.optim.Adam` on the rows that move, in place. With decoupled weight decay it is AdamW.

    Args:
        weight: The parameter [O, *].
        exp_avg: The first moment [O, *]. Its name in `rows.decays` is this one.
        exp_avg_sq: The second moment [O, *]. Its name in `rows.decays` is this one.
        max_exp_avg_sq: The largest second moment so far [O, *] with AMSGrad, else None.
        rows: The gradient.
        step: The number of this step, counted from 1. A tensor [] is not read on the host, so that a captured graph
            counts on.
        lr: The same as torch's.
        betas: The same as torch's.
        eps: The same as torch's.
        weight_decay: The same as torch's.
        decoupled: Whether the weight decay is decoupled, as in AdamW.
        key: As of `sgd_rows`.
        copy: As of `sgd_rows`.

    Raises:
        ValueError: The shapes do not fit.
        IndexError: The indices of the rows do not ascend, or are no rows of the parameter.
    """
    rows.check(weight, copy, exp_avg, exp_avg_sq, max_exp_avg_sq)
    at, grad = _moving_rows(weight, rows)
    w = weight[at]
    if decoupled:
        w = w * rows.decay(PARAMETER, 1 - lr * weight_decay, at, weight.dim())
    else:
        grad = _decayed(grad, w, weight_decay)
    keep_first, keep_second = (
        rows.decay(name, beta, at, weight.dim()) for name, beta in zip(("exp_avg", "exp_avg_sq"), betas, strict=True)
    )
    first = _load(exp_avg, at, key) * keep_first + (1 - betas[0]) * grad
    second = _load(exp_avg_sq, at, key) * keep_second + (1 - betas[1]) * grad * grad
    first = _store(exp_avg, at, first, key)
    second = _store(exp_avg_sq, at, second, key, is_second=True)
    if max_exp_avg_sq is not None:
        second = torch.maximum(max_exp_avg_sq[at], second)
        _store(max_exp_avg_sq, at, second)
    if isinstance(step, Tensor):
        rate, scale = ((1 - beta ** step.double()).to(second.dtype) for beta in betas)
        root = _root(second) / scale.sqrt() + eps
        _store_weight(weight, copy, at, w - lr / rate * (first / root))
        return
    root = _root(second) * (1 / sqrt(1 - betas[1] ** step)) + eps
    _store_weight(weight, copy, at, w - lr / (1 - betas[0] ** step) * (first / root))


def _native_adam_declines(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    rows: Gradient,
    step: float | Tensor,
    **options: Any,
) -> str | None:
    if max_exp_avg_sq is not None:
        return "native kernels have no AMSGrad"
    if isinstance(step, Tensor):
        return "native kernels take the number of a step, not a tensor"
    return _declines(rows, options, weight, exp_avg, exp_avg_sq)


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
    key: int | None = None,
    copy: Tensor | None = None,
) -> None:
    rows.check(weight, copy, exp_avg, exp_avg_sq)
    state = exp_avg.data_ptr(), exp_avg_sq.data_ptr()
    decays = _own_decays(rows, "exp_avg", "exp_avg_sq", PARAMETER)
    _call("adam_rows", weight, copy, rows, *state, *decays, decoupled, _code(key), step, lr, *betas, eps, weight_decay)
    native.written(weight, copy, exp_avg, exp_avg_sq)


def _triton_adam_declines(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    rows: Gradient,
    _step: float | Tensor,
    **options: Any,
) -> str | None:
    if max_exp_avg_sq is not None or options.get("key") is not None or options.get("copy") is not None:
        return "kernels have neither AMSGrad nor states that are rounded at random, and write no copy of the parameter"
    if isinstance(rows, GradientProduct) or rows.indices is None or rows.every_row or len(rows.indices) == 0:
        return "kernels are for gradients of some rows"
    tensors = weight, exp_avg, exp_avg_sq, rows.values
    if not all(each.is_contiguous() for each in tensors):
        return "kernels take contiguous tensors here"
    return triton.declines(*tensors)


@triton.backend.implements(adam_rows, _triton_adam_declines)
def _triton_adam_rows(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    _max_exp_avg_sq: None,
    rows: Gradient,
    step: float | Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    key: None = None,
    copy: None = None,
) -> None:
    del key, copy
    assert isinstance(rows, GradientRows)  # others are declined
    assert rows.indices is not None
    rows.check(weight, exp_avg, exp_avg_sq)
    decays = rows.decays.get("exp_avg"), rows.decays.get("exp_avg_sq"), rows.decays.get(PARAMETER)
    triton.kernels().adam_rows(
        *(weight, exp_avg, exp_avg_sq, rows.indices, rows.values),
        decays if decoupled else (*decays[:2], None),
        step,
        lr=lr,
        betas=betas,
        eps=eps,
        keep_weight=1 - lr * weight_decay if decoupled else 1.0,
        weight_decay=0.0 if decoupled else weight_decay,
    )


# ---------------------------------------------------------------- Adagrad


@operation()
def adagrad_rows(
    weight: Tensor,
    sum_: Tensor,
    rows: Gradient,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    key: int | None = None,
    copy: Tensor | None = None,
) -> None:
    """`torch.optim.Adagrad` on the rows that move, in place.

    Args:
        weight: The parameter [O, *].
        sum_: The sum of the squared gradients [O, *].
        rows: The gradient.
        lr: The learning rate of this step.
        eps: The same as torch's.
        weight_decay: The same as torch's.
        key: As of `sgd_rows`.
        copy: As of `sgd_rows`.

    Raises:
        ValueError: The shapes do not fit.
        IndexError: The indices of the rows do not ascend, or are no rows of the parameter.
    """
    rows.check(weight, copy, sum_)
    at, grad = _moving_rows(weight, rows)
    grad = _decayed(grad, weight[at], weight_decay)
    squares = _store(sum_, at, _load(sum_, at, key) + grad * grad, key)
    _store_weight(weight, copy, at, weight[at] - lr * (grad / (_root(squares) + eps)))


def _native_adagrad_declines(weight: Tensor, sum_: Tensor, rows: Gradient, **options: Any) -> str | None:
    return _declines(rows, options, weight, sum_)


@native.backend.implements(adagrad_rows, _native_adagrad_declines)
def _native_adagrad_rows(
    weight: Tensor,
    sum_: Tensor,
    rows: Gradient,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    key: int | None = None,
    copy: Tensor | None = None,
) -> None:
    rows.check(weight, copy, sum_)
    _call("adagrad_rows", weight, copy, rows, sum_.data_ptr(), _code(key), lr, eps, weight_decay)
    native.written(weight, copy, sum_)


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
