"""An activation with dropout of its results, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from meprop.ops import native
from meprop.ops.registry import operation

Activation = Literal["identity", "relu", "gelu", "gelu_tanh", "tanh"]
"""The names of activations. "gelu_tanh" is GELU with ``approximate="tanh"``."""

FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
}
"""Torch's own function of each activation, in the order of the native codes."""

_CODES = {name: code for code, name in enumerate(FUNCTIONS)}
_BLOCK = 64  # entries for which there is a word of bits
_ALL = 1 << 16


def needs_input(activation: Activation) -> bool:
    """Whether the gradient of an activation reads the input. The gradient of the others reads the bits only."""
    return activation not in ("identity", "relu")


def dropped_of(p: float) -> int:
    """How many of the 2^16 values of an entry's random bits drop it. It is never all of them."""
    return min(round(p * _ALL), _ALL - 1)


def _scale(p: float) -> float:
    return _ALL / (_ALL - dropped_of(p))


# ---------------------------------------------------------------- the literal reference


@operation()
def activation_dropout(x: Tensor, activation: Activation, p: float, key: int, /) -> tuple[Tensor, Tensor]:
    """Dropout of an activation's results.

    Each entry has 16 random bits. It is dropped if their number is below p 2^16, rounded to a whole number d. So it is
    dropped with probability d / 2^16, which is within 2^-16 of p. What is kept is multiplied by 2^16 / (2^16 - d), so
    that the mean is exact. What is dropped is multiplied by 0, as torch does, so that NaN and infinity give NaN.

    The random bits are those of Philox 4x32-10 (Salmon et al., SC 2011) for the key. Entry i of block b of 64 entries
    has half i % 2 of word i / 32 * 2 + i % 4 / 2 of counter 8 b + i % 32 / 4. Halves are counted from the lower one.

    Args:
        x: Input [*] of a floating dtype. Its entries are counted in the order of the result's memory.
        activation: The activation.
        p: The probability, above 0 and below 1.
        key: The key, from 0 to 2^63 - 1.

    Returns:
        The result [*], with the dtype of x and the strides of ``torch.empty_like(x)``. And words of bits, int64
        [number of entries / 64, rounded up]: whether an entry is kept, and with "relu" also whether x is above 0 or
        NaN. Bits beyond the last entry are 0.
    """
    result = torch.empty_like(x)
    kept = _laid_out(_draw(x.numel(), dropped_of(p), key, x.device), x.shape, result.stride())
    wide = x if x.dtype == torch.float64 else x.float()
    result.copy_(FUNCTIONS[activation](wide) * (kept * _scale(p)))
    passes = kept & ~(x <= 0) if activation == "relu" else kept
    return result, _packed(passes.as_strided((x.numel(),), (1,)))


@operation()
def activation_dropout_gradient(
    grad: Tensor,
    x: Tensor | None,
    bits: Tensor,
    activation: Activation,
    p: float,
    stride: tuple[int, ...],
    /,
) -> Tensor:
    """The gradient of `activation_dropout`.

    It is grad times the derivative at x times what kept entries are multiplied by. It is multiplied by 0 where an entry
    is dropped, as torch does. With "relu" it is 0 where the bit is 0, whatever grad is there.

    Args:
        grad: The gradient of the result [*].
        x: Input [*]. None with "relu" and "identity".
        bits: The words of bits.
        activation: The activation.
        p: The probability.
        stride: The strides of the result.

    Returns:
        The gradient of x [*], with the dtype of grad.
    """
    passes = _laid_out(_unpacked(bits)[: grad.numel()], grad.shape, stride)
    wide = grad if grad.dtype == torch.float64 else grad.float()
    if activation == "relu":
        return torch.where(passes, wide * _scale(p), 0.0).to(grad.dtype)
    result = wide * (passes * _scale(p))
    if x is not None:
        result = result * _derivative(x if x.dtype == torch.float64 else x.float(), activation)
    return result.to(grad.dtype)


def _derivative(x: Tensor, activation: Activation) -> Tensor:
    """The derivative of an activation that `needs_input`, of operations that torch can differentiate."""
    if activation == "tanh":
        return 1 - x.tanh().square()
    if activation == "gelu":
        return (1 + torch.erf(x / sqrt(2))) / 2 + x * torch.exp(-x.square() / 2) / sqrt(2 * pi)
    inner = sqrt(2 / pi) * (x + 0.044715 * x**3)
    rate = sqrt(2 / pi) * (1 + 3 * 0.044715 * x.square())
    return (1 + inner.tanh()) / 2 + x * (1 - inner.tanh().square()) * rate / 2


def _draw(entries: int, dropped: int, key: int, device: torch.device) -> Tensor:
    """Which entries are kept, bool [entries]."""
    blocks = -(-entries // _BLOCK)
    words = torch.stack(_philox(key, torch.arange(blocks * 8, device=device)), dim=1)  # [counters, 4]
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=2)  # [counters, 4, 2]
    # An entry of a block is at [word / 2, counter, word % 2, half].
    order = halves.view(blocks, 8, 2, 2, 2).transpose(1, 2)
    return order.reshape(-1)[:entries] >= dropped


def _philox(key: int, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four random words of each counter, int64 as the counters."""
    word = 0xFFFFFFFF
    k0, k1 = key & word, key >> 32
    c = counter & word, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # modulo 2^64
        c = (b >> 32 & word) ^ c[1] ^ k0, b & word, (a >> 32 & word) ^ c[3] ^ k1, a & word
        k0, k1 = k0 + 0x9E3779B9 & word, k1 + 0xBB67AE85 & word
    return c


def _laid_out(flat: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """A tensor of these strides that has such entries in its memory."""
    result = torch.empty_strided(shape, stride, dtype=flat.dtype, device=flat.device)
    result.as_strided((flat.numel(),), (1,)).copy_(flat)
    return result


def _packed(flags: Tensor) -> Tensor:
    """Flags as the bits of words, int64, from the lowest bit on."""
    padded = F.pad(flags, (0, -flags.numel() % _BLOCK)).view(-1, _BLOCK)
    return (padded.long() << torch.arange(_BLOCK, device=flags.device)).sum(dim=1)


def _unpacked(bits: Tensor) -> Tensor:
    """The bits of words as flags."""
    return (bits[:, None] >> torch.arange(_BLOCK, device=bits.device) & 1).bool().flatten()


# ---------------------------------------------------------------- the native call


def _in_order(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The same values with these strides."""
    if tensor.stride() == stride and not tensor.is_neg():
        return tensor
    return tensor.new_empty_strided(tensor.shape, stride).copy_(tensor)


def _native_declines(x: Tensor, *_: object) -> str | None:
    return native.declines(x)


@native.backend.implements(activation_dropout, _native_declines)
def _native_activation_dropout(x: Tensor, activation: Activation, p: float, key: int) -> tuple[Tensor, Tensor]:
    result, bits = torch.empty_like(x), x.new_empty(-(-x.numel() // _BLOCK), dtype=torch.int64)
    x = _in_order(x, result.stride())
    native.extension().drop(
        *(native.DTYPE_CODES[x.dtype], _CODES[activation], key, dropped_of(p), x.numel()),
        *(x.data_ptr(), result.data_ptr(), 0, bits.data_ptr(), torch.get_num_threads(), _scale(p)),
    )
    return result, bits


def _native_gradient_declines(grad: Tensor, x: Tensor | None, bits: Tensor, *_: object) -> str | None:
    if x is not None and x.dtype != grad.dtype:
        return f"native kernels take one dtype here, not {grad.dtype} and {x.dtype}"
    return native.declines(grad, x) or native.declines_scattered(bits, dtypes=native.INT64)


@native.backend.implements(activation_dropout_gradient, _native_gradient_declines)
def _native_gradient(
    grad: Tensor, x: Tensor | None, bits: Tensor, activation: Activation, p: float, stride: tuple[int, ...]
) -> Tensor:
    grad, x = _in_order(grad, stride), None if x is None else _in_order(x, stride)
    result = grad.new_empty_strided(grad.shape, stride)
    native.extension().drop_gradient(
        *(native.DTYPE_CODES[grad.dtype], _CODES[activation], 0, 0, grad.numel()),
        *(native.address(x), result.data_ptr(), grad.data_ptr(), bits.data_ptr(), torch.get_num_threads(), _scale(p)),
    )
    return result
