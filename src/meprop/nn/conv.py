"""Convolutions with a sparse backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]  (what Conv1d and Conv2d have in common)

from meprop.errors import NotSupportedError
from meprop.functional.conv import convolution_with_policy, why_not_sparse
from meprop.functional.geometry import is_pointwise, padded
from meprop.nn.base import Descriptor, Layout, SparseLayer, register, sparse_repr
from meprop.policy import Policy
from meprop.rules import Rule


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
        policy = Policy(rule, sparse_grad, compute_dtype)
        super().__init__(*args, **kwargs)
        reason = _why_dense(self, rule)
        if reason is not None:
            raise NotSupportedError(f"{reason}; for this layer use torch.nn.{type(self).__name__}")
        self.policy = policy.of_layer()

    def forward(self, input: Tensor) -> Tensor:
        """Input [N, I, *S] or [I, *S] to output [N, O, *T] or [O, *T]."""
        if self.policy.is_settled_dense():
            return super().forward(input)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        input, geometry = padded(input, self.weight.shape[2:], self.stride, padding, self.dilation)
        return convolution_with_policy(input, self.weight, self.bias, geometry, self.policy)

    def extra_repr(self) -> str:
        """What torch's says, and the rule."""
        return super().extra_repr() + sparse_repr(self)


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


Plain = torch.nn.Conv1d | torch.nn.Conv2d


def _why_dense(layer: Plain | _ConvNd, rule: Rule) -> str | None:
    padding = () if isinstance(layer.padding, str) else layer.padding  # of a kernel of 1, "same" is none
    return why_not_sparse(rule, is_pointwise(layer.kernel_size, layer.stride, padding), layer.groups)


class ConvolutionDescriptor(Descriptor[Plain]):
    """A convolution: its features are channels."""

    feature_name = "output channels"

    def __init__(self, plain: type[Plain], sparse: type[Plain]) -> None:
        self.plain, self.sparse = plain, sparse

    def features(self, layer: Plain) -> tuple[int, int]:
        """Input and output channels."""
        return layer.in_channels, layer.out_channels

    def why_dense(self, layer: Plain, policy: Policy) -> str | None:
        """Groups; entries chosen at each position of a kernel above 1."""
        return _why_dense(layer, policy.rule)

    def why_narrow(self, layer: Plain, min_features: int) -> str | None:
        """Half as many channels are enough: each one's work is repeated at every position."""
        if 2 * layer.out_channels >= min_features:
            return None
        return f"narrow: {layer.out_channels} output channels, less than half of min_features={min_features}"

    def feature_dim(self, layer: Plain) -> int:
        """The channels' dimension is before those of space."""
        return 1 - layer.weight.dim()

    def unit_sets(self, layer: Plain) -> tuple[str, ...]:
        """One: its output channels."""
        return ("",)

    def layouts(self, layer: Plain, outputs: Layout, inputs: Layout) -> dict[str, dict[int, Layout]]:
        """The weight [O, I, *K] and the bias [O]."""
        bias = {} if layer.bias is None else {"bias": {0: outputs}}
        return {"weight": {0: outputs, 1: inputs}, **bias}

    def resize(self, layer: Plain) -> None:
        """Takes the channels from the weight."""
        layer.out_channels, layer.in_channels = layer.weight.shape[:2]


register(ConvolutionDescriptor(torch.nn.Conv1d, Conv1d))
register(ConvolutionDescriptor(torch.nn.Conv2d, Conv2d))
