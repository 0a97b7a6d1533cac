"""Convolutions with a sparse backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]  (what Conv1d and Conv2d have in common)

from meprop import functional, ops, speed
from meprop.errors import NotSupportedError
from meprop.functional import Geometry
from meprop.nn.linear import SparseLayer, sparse_repr, sparse_state, standing
from meprop.rules import Rule


@dataclass(frozen=True)
class ConvShape:
    """What the speed of a convolution's backward pass depends on, beside the machine.

    Attributes:
        input: Its shape [N, I, *S].
        outputs: O.
        kernel: Its sizes.
        geometry: Stride, padding and dilation.
        positions: Of the output, the product of its sizes in space.
        channels_last: Whether the output gradient is in that memory format.
        dtype: Of the output gradient.
        device: Its type, "cpu" or "cuda".
        needs: Whether gradients of input, weight and bias are wanted.
    """

    input: torch.Size
    outputs: int
    kernel: tuple[int, ...]
    geometry: Geometry
    positions: int
    channels_last: bool
    dtype: torch.dtype
    device: str
    needs: tuple[bool, bool, bool]

    @property
    def rows(self) -> int:
        """Positions of all examples."""
        return self.input[0] * self.positions

    def __str__(self) -> str:
        moves = (self.kernel, self.geometry.stride, self.geometry.padding, self.geometry.dilation)
        sizes = " ".join("x".join(map(str, each)) for each in (self.input, *moves))
        needs = "".join(name for name, needed in zip("xwb", self.needs, strict=True) if needed)
        return f"conv {sizes} to {self.outputs} {needs}" + (" channels_last" if self.channels_last else "")

    def passes(self, rule: Rule) -> speed.Passes:
        """Of such a convolution."""
        geometry, weight_shape = self.geometry, (self.outputs, self.input[1], *self.kernel)
        x, weight, bias = speed.random_tensors(self, self.input, weight_shape, (self.outputs,))
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        wanted = [tensor.requires_grad_() for tensor, needs in zip((x, weight, bias), self.needs, strict=True) if needs]
        grad_output = torch.randn_like(geometry.output(x, weight, bias))

        def dense() -> object:
            return torch.autograd.grad(geometry.output(x, weight, bias), wanted, grad_output)

        def sparse() -> object:
            output = functional.apply_convolution(x, weight, bias, geometry, rule, False, None, None)
            return torch.autograd.grad(output, wanted, grad_output)

        return dense, sparse


class _Convolution(SparseLayer, _ConvNd):
    """What the layers have in common: all but the number of spatial dimensions."""

    def __init__(
        self,
        *args: Any,
        rule: Rule,
        sparse_grad: bool = False,
        compute_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        functional.check_rule(rule, sparse_grad, compute_dtype)
        super().__init__(*args, **kwargs)
        reason = why_not_sparse(self, rule)
        if reason is not None:
            raise NotSupportedError(f"{reason}; for this layer use torch.nn.{type(self).__name__}")
        vars(self).update(sparse_state(rule, sparse_grad, compute_dtype, "always"))

    def forward(self, input: Tensor) -> Tensor:
        """Input [N, I, *S] or [I, *S] to output [N, O, *T] or [O, *T]."""
        own, asks = standing(self)
        if own:
            return super().forward(input)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        input, geometry = functional.padded(input, self.weight.shape[2:], self.stride, padding, self.dilation)
        return functional.apply_convolution(
            input,
            self.weight,
            self.bias,
            geometry,
            self.rule,
            self.sparse_grad,
            self._decide if asks else None,
            self.compute_dtype,
            self.activity,
        )

    def _decide(self, grad: Tensor, input: torch.Size, geometry: Geometry, needs: tuple[bool, bool, bool]) -> bool:
        if len(grad) == 0:  # says nothing about the batches to come
            return True
        if self.decision is None:  # else an earlier call of this layer in the same step has decided
            positions = grad.shape[2:].numel()
            channels_last = ops.memory_format(grad) == torch.channels_last
            shape = ConvShape(
                input,
                self.out_channels,
                self.kernel_size,
                geometry,
                positions,
                channels_last,
                grad.dtype,
                grad.device.type,
                needs,
            )
            self.decision = speed.decide(self.rule, shape)
        return self.decision.sparse

    def extra_repr(self) -> str:
        """As torch's, and the rule."""
        return super().extra_repr() + sparse_repr(self)


def why_not_sparse(layer: torch.nn.Conv1d | torch.nn.Conv2d | _ConvNd, rule: Rule) -> str | None:
    """`functional.why_not_sparse` of a layer."""
    padding = () if isinstance(layer.padding, str) else layer.padding  # of a kernel of 1, "same" is none
    pointwise = functional.is_pointwise(layer.kernel_size, layer.stride, padding)
    return functional.why_not_sparse(rule, pointwise, layer.groups)


class Conv1d(_Convolution, torch.nn.Conv1d):
    """`torch.nn.Conv1d` that back-propagates only what `rule` keeps of its output gradient. See `Conv2d`."""


class Conv2d(_Convolution, torch.nn.Conv2d):
    """`torch.nn.Conv2d` that back-propagates only what `rule` keeps of its output gradient.

    Parameters, forward pass, state_dict and initialisation are torch's own, and so are kernel, stride, padding with all
    its modes, dilation and memory formats. Backwards see `meprop.functional.conv2d`. A layer made by hand is always
    sparse; one that `meprop.convert` made decides at its first backward pass whether that is faster here, and stays
    with it.

    Args:
        *args: As `torch.nn.Conv2d`: in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype.
        rule: What to keep, e.g. `meprop.TopK(0.1, scope="batch")`.
        sparse_grad: Make weight.grad a sparse tensor of the kept channels' rows; see `meprop.functional.linear`.
        compute_dtype: torch.bfloat16: form the forward product in bfloat16; see `meprop.functional.conv2d`.
        **kwargs: As `torch.nn.Conv2d`.

    Attributes:
        when: "always" sparse, or "auto": only if measured to be faster.
        decision: With "auto", what was decided; None before the first backward pass.
        activity: What a `meprop.Simplifier` counts; None without one.

    Raises:
        NotSupportedError: `groups` above 1, or scope "example" for a layer that is not pointwise: kernel 1, stride 1,
            no padding.
        TypeError: `rule` is not a Rule.
        ValueError: `sparse_grad` with a rule whose rows keep entries of their own; another compute_dtype.
    """
