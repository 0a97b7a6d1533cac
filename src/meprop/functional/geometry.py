"""How a convolution moves over its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from meprop import ops

Numbers = int | tuple[int, ...]
"""One number for all spatial dimensions, or one for each."""


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its input, with a number for each spatial dimension. It pads with zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output of torch's own convolution."""
        return torch.convolution(x, weight, bias, self.stride, self.padding, self.dilation, False, self._zeros, 1)

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> ops.Gradients:
        """Torch's own gradients of input, weight and bias, where they are needed."""
        bias_sizes = [grad.shape[1]]
        return torch.ops.aten.convolution_backward(
            grad, x, weight, bias_sizes, self.stride, self.padding, self.dilation, False, self._zeros, 1, needs
        )

    def is_pointwise(self, weight: Tensor) -> bool:
        """Whether the convolution is a linear map of each position."""
        return is_pointwise(weight.shape[2:], self.stride, self.padding)

    @property
    def _zeros(self) -> tuple[int, ...]:
        return (0,) * len(self.stride)


def is_pointwise(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether a convolution is a linear map of each position."""
    return {*kernel, *stride} == {1} and not any(padding)


def padded(
    x: Tensor, kernel: torch.Size, stride: Numbers, padding: Numbers | str, dilation: Numbers
) -> tuple[Tensor, Geometry]:
    """The input that a convolution moves over, and how it moves.

    The input is padded already if one side gets more padding than the other.
    """
    stride, dilation = _each(stride, kernel), _each(dilation, kernel)
    if padding == "same":
        if {*stride} != {1}:
            raise ValueError(f"padding='same' with stride={stride}; it is for a stride of 1")
        both = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        if any(total % 2 for total in both):
            x = F.pad(x, [side for total in reversed(both) for side in (0, total % 2)])
        padding = tuple(total // 2 for total in both)
    elif padding == "valid":
        padding = 0
    elif isinstance(padding, str):
        raise ValueError(f"padding={padding!r}; it is 'same', 'valid', or numbers")
    return x, Geometry(stride, _each(padding, kernel), dilation)


def _each(value: Numbers, kernel: torch.Size) -> tuple[int, ...]:
    """A number for each spatial dimension."""
    if not isinstance(value, int | Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"stride, padding and dilation are an int or ints, not {value!r}")
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * len(kernel) if len(numbers) == 1 else numbers
