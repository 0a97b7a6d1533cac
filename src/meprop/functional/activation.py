"""An activation with dropout of its results, in one pass over memory each way."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meprop import ops
from meprop.errors import did_you_mean
from meprop.ops import native
from meprop.ops.activation import FUNCTIONS, Activation, needs_input
from meprop.ops.registry import in_graph, is_exporting
from meprop.policy import is_dual
from meprop.profiles import labelled

_LEAST_ENTRIES = 8192
"""The size from which one pass is measured to be faster than torch's passes."""


def activation_dropout(x: Tensor, activation: Activation = "relu", p: float = 0.5, training: bool = True) -> Tensor:
    """Dropout of an activation's results: ``torch.nn.functional.dropout(activation(x), p, training)``.

    In training, one native pass reads x, draws, and writes the result and one bit for each entry. One pass of the
    backward pass reads the gradient and the bits. GELU and tanh also read x there. Torch draws on one thread, and keeps
    a number for each entry. This function draws on all threads.

    The results have the distribution of torch's. They are not those that torch draws with the same seed. Each entry is
    dropped by 16 random bits of its own: with probability p rounded to a multiple of 2^-16, 1 excluded. What is kept is
    multiplied by 1 / (1 - this probability), so that the mean is exact. Random numbers are those of a counter-based
    generator. Its key comes from torch's global generator, so that ``torch.manual_seed`` repeats them, for any number
    of threads, and so does checkpointing that preserves the random state.

    As in torch's function, what is dropped is multiplied by 0: NaN and infinity give NaN. So it is in the backward
    pass, except with "relu". There the gradient of an entry that is dropped or not above 0 is 0, whatever its output
    gradient is. Torch gives NaN if a dropped entry above 0 has an output gradient that is not finite.

    The pass is for float32 and bfloat16 tensors on the CPU of at least 8192 entries. Everything else is left to torch's
    own functions, with their results and random numbers: evaluation, p = 0 and p = 1, other dtypes and devices, small
    tensors, subclasses of Tensor, transforms of torch.func and forward-mode differentiation, torch.compile,
    torch.export, torch.jit.trace and make_fx. `create_graph=True` works. Its backward pass consists of torch's
    operations.

    Args:
        x: Input [*] of any shape and floating dtype.
        activation: "relu", "gelu", "gelu_tanh" (GELU with ``approximate="tanh"``), "tanh", or "identity" for dropout
            alone.
        p: The probability of an entry to be dropped.
        training: Whether to drop. The result is that of the activation otherwise.

    Returns:
        The result [*], with the dtype of x.

    Raises:
        TypeError: p is not a number.
        ValueError: `activation` is unknown, or p is not from 0 to 1.
    """
    check_activation(activation)
    check_probability(p)
    if not is_one_pass(x, p, training):
        return F.dropout(FUNCTIONS[activation](x), p, training)
    return one_pass(x, activation, p)


def check_activation(activation: Any) -> None:
    """Raises a ValueError for an activation that is unknown."""
    if activation not in FUNCTIONS:
        guess = did_you_mean(activation, FUNCTIONS) if isinstance(activation, str) else ""
        raise ValueError(f"activation={activation!r}; the activations are {', '.join(FUNCTIONS)}{guess}")


def check_probability(p: Any) -> None:
    """Raises an error for what is not a number from 0 to 1."""
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"p={p!r} is of type {type(p).__name__}; it is a number from 0 to 1")
    if not 0 <= float(p) <= 1:
        raise ValueError(f"p={p!r}; the probability of an entry to be dropped is from 0 to 1")


def is_one_pass(x: Any, p: float, training: bool) -> bool:
    """Whether the native pass serves this input. Torch's own functions do otherwise."""
    if not training or not 0 < p < 1 or in_graph() or x is None or native.declines(x) is not None:
        return False
    if torch.jit.is_tracing() or is_exporting() or is_dual(x):
        return False
    return x.numel() >= _LEAST_ENTRIES


def one_pass(x: Tensor, activation: Activation, p: float) -> Tensor:
    """The native pass, for an input that `is_one_pass` accepts."""
    key, p = int(torch.randint(0, 2**63 - 1, (), device="cpu")), float(p)  # torch's Dropout takes a tensor as p, too
    if torch.is_grad_enabled() and x.requires_grad:
        return _ActivationDropout.apply(x, activation, p, key)  # pyright: ignore[reportReturnType]  (apply is untyped)
    return ops.activation_dropout(x, activation, p, key)[0]


class _ActivationDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation, p: float, key: int) -> Tensor:
        result, bits = ops.activation_dropout(x, activation, p, key)
        ctx.save_for_backward(x if needs_input(activation) else None, bits)
        ctx.options = activation, p, result.stride()
        return result

    @staticmethod
    @labelled("meprop.activation_dropout.backward")
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, bits) = grad_outputs, ctx.saved_tensors
        if grad.layout is not torch.strided:
            grad = grad.to_dense()
        gradient = ops.activation_dropout_gradient
        if torch.is_grad_enabled():  # create_graph=True: of operations that torch can differentiate
            return gradient.literally(grad, x, bits, *ctx.options), None, None, None
        return gradient(grad, x, bits, *ctx.options), None, None, None
