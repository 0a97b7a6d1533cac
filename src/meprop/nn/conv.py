"""Convolutions with a sparse backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]  (the base of Conv1d and Conv2d)

from meprop.errors import NotSupportedError
from meprop.functional.conv import convolution_with_policy, why_not_sparse
from meprop.functional.geometry import is_pointwise, padded
from meprop.nn.base import Descriptor, Layout, SparseLayer, leaf, register, sparse_repr
from meprop.policy import Policy
from meprop.rules import Rule


class _Convolution(SparseLayer, _ConvNd):
    """The base of both layers. It has everything except the number of spatial dimensions."""

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
        """The output [N, O, *T] for an input [N, I, *S], or without N. In a torch.jit script it is torch's."""
        if torch.jit.is_scripting():
            return self._conv_forward(input, self.weight, self.bias)
        else:  # noqa: RET505  (torch.jit leaves out a branch, not what follows it)
            return self._forward(input)

    @leaf
    def _forward(self, input: Tensor) -> Tensor:
        policy, weight, bias = self.policy, self.weight, self.bias
        if policy.is_settled_dense() or policy.leave_to_torch(input=input, weight=weight, bias=bias):
            return super().forward(input)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        input, geometry = padded(input, weight.shape[2:], self.stride, padding, self.dilation)
        return convolution_with_policy(input, weight, bias, geometry, policy)

    def extra_repr(self) -> str:
        """The text of torch's layer, and the rule."""
        return super().extra_repr() + sparse_repr(self)


class Conv1d(_Convolution, torch.nn.Conv1d):
    """`torch.nn.Conv1d` that back-propagates only what `rule` keeps of its output gradient. See `Conv2d`."""


class Conv2d(_Convolution, torch.nn.Conv2d):
    """`torch.nn.Conv2d` that back-propagates only what `rule` keeps of its output gradient.

    Parameters, forward pass, state_dict and initialisation are torch's own. Kernel, stride, padding with all its modes,
    dilation and memory formats are torch's own as well. `meprop.functional.conv2d` describes the backward pass. A layer
    that is made by hand is always sparse. A layer that `meprop.convert` has made measures at its first backward pass
    whether sparse is faster on this machine, and keeps that decision.

    Args:
        *args: The arguments of `torch.nn.Conv2d`: in_channels, out_channels, kernel_size, stride, padding, dilation,
            groups, bias, padding_mode, device, dtype.
        rule: What to keep, e.g. `meprop.TopK(0.1, scope="batch")` or `meprop.Sampled(noise=0.25)`.
        sparse_grad: Make weight.grad a sparse tensor of the kept channels' rows. See `meprop.functional.conv2d`.
        compute_dtype: torch.bfloat16 forms the forward product in bfloat16. See `meprop.functional.conv2d`.
        **kwargs: The keyword arguments of `torch.nn.Conv2d`.

    Attributes:
        when: "always" for a layer that is always sparse, "auto" for one that is sparse only if that is measured to be
            faster.
        decision: With "auto", what was decided. None before the first backward pass.
        activity: What a `meprop.Simplifier` counts. None without a Simplifier.

    Raises:
        NotSupportedError: `groups` is above 1, or scope "example" or a `PerProduct` is used with a layer that is not
            pointwise. A pointwise layer has kernel 1, stride 1 and no padding.
        TypeError: `rule` is not a Rule, or `sparse_grad` is not a bool.
        ValueError: `sparse_grad` is used with scope "example" or an exact sum, or `compute_dtype` is not torch.bfloat16
            or None.
    """


Plain = torch.nn.Conv1d | torch.nn.Conv2d


def _why_dense(layer: Plain | _ConvNd, rule: Rule) -> str | None:
    padding = () if isinstance(layer.padding, str) else layer.padding  # "same" adds no padding to a kernel of 1
    return why_not_sparse(rule, is_pointwise(layer.kernel_size, layer.stride, padding), layer.groups)


class ConvolutionDescriptor(Descriptor[Plain]):
    """The descriptor of convolutions. Their features are channels."""

    feature_name = "output channels"
    methods = ("forward", "_conv_forward")

    def __init__(self, plain: type[Plain], sparse: type[Plain]) -> None:
        self.plain, self.sparse = plain, sparse

    def features(self, layer: Plain) -> tuple[int, int]:
        """The numbers of input and output channels."""
        return layer.in_channels, layer.out_channels

    def why_dense(self, layer: Plain, policy: Policy) -> str | None:
        """A reason if there are groups, or if the rule goes for pointwise convolutions only."""
        return _why_dense(layer, policy.rule)

    def why_narrow(self, layer: Plain, min_features: int) -> str | None:
        """Half as many channels are enough, because the work of a channel is repeated at each position."""
        if 2 * layer.out_channels >= min_features:
            return None
        return f"narrow: {layer.out_channels} output channels, less than half of min_features={min_features}"

    def feature_dim(self, layer: Plain) -> int:
        """The dimension of the channels, which comes before the spatial dimensions."""
        return 1 - layer.weight.dim()

    def unit_sets(self, layer: Plain) -> tuple[str, ...]:
        """One set, the output channels."""
        return ("",)

    def layouts(self, layer: Plain, outputs: Layout, inputs: Layout) -> dict[str, dict[int, Layout]]:
        """The layouts of the weight [O, I, *K] and of the bias [O]."""
        bias = {} if layer.bias is None else {"bias": {0: outputs}}
        return {"weight": {0: outputs, 1: inputs}, **bias}

    def resize(self, layer: Plain) -> None:
        """Takes the channels from the weight."""
        layer.out_channels, layer.in_channels = layer.weight.shape[:2]


register(ConvolutionDescriptor(torch.nn.Conv1d, Conv1d))
register(ConvolutionDescriptor(torch.nn.Conv2d, Conv2d))
