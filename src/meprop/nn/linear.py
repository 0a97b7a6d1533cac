"""The linear layer with a sparse backward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from meprop.functional.linear import linear_with_policy
from meprop.nn.base import Descriptor, Layout, SparseLayer, leaf, register, sparse_repr
from meprop.policy import Policy
from meprop.rules import Rule


class Linear(SparseLayer, torch.nn.Linear):
    """`torch.nn.Linear` that back-propagates only what `rule` keeps of its output gradient.

    Parameters, forward pass, state_dict and initialisation are torch's own. A layer that is made by hand is always
    sparse. A layer that `meprop.convert` has made measures at its first backward pass whether sparse is faster on this
    machine, and keeps that decision.

    Args:
        in_features: I, the number of input features.
        out_features: O, the number of output features.
        bias: Whether there is a bias.
        device: The device of the parameters.
        dtype: The dtype of the parameters.
        rule: What to keep, e.g. `meprop.TopK(0.05)`.
        sparse_grad: Make weight.grad a sparse tensor of the kept rows. See `meprop.functional.linear`.
        compute_dtype: torch.bfloat16 forms the forward product in bfloat16. See `meprop.functional.linear`.
        skip_zeros: Leave zeros of the input out of the forward product, where that is faster. See
            `meprop.functional.linear`.

    Attributes:
        when: "always" for a layer that is always sparse, "auto" for one that is sparse only if that is measured to be
            faster.
        decision: With "auto", what was decided. None before the first backward pass.
        activity: What a `meprop.Simplifier` counts. None without a Simplifier.

    Raises:
        TypeError: `rule` is not a Rule, or `sparse_grad` or `skip_zeros` is not a bool.
        ValueError: `sparse_grad` is used with a rule of scope "example" or with an exact sum, or `compute_dtype` is
            not torch.bfloat16 or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rule: Rule,
        sparse_grad: bool = False,
        compute_dtype: torch.dtype | None = None,
        skip_zeros: bool = False,
    ) -> None:
        policy = Policy(rule, sparse_grad, compute_dtype, skip_zeros=skip_zeros)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.policy = policy.of_layer()

    def forward(self, input: Tensor) -> Tensor:
        """The output [*, O] for an input [*, I]. In a script of torch.jit it is torch's own."""
        if torch.jit.is_scripting():
            return F.linear(input, self.weight, self.bias)
        else:  # noqa: RET505  (torch.jit leaves out a branch, not what follows it)
            return self._forward(input)

    @leaf
    def _forward(self, input: Tensor) -> Tensor:
        return linear_with_policy(input, self.weight, self.bias, self.policy)

    def extra_repr(self) -> str:
        """The text of torch's layer, and the rule."""
        return super().extra_repr() + sparse_repr(self)


class LinearDescriptor(Descriptor[torch.nn.Linear]):
    """The descriptor of linear layers. Their units are the rows of the weight."""

    plain, sparse = torch.nn.Linear, Linear
    skips_zeros = True

    def features(self, layer: torch.nn.Linear) -> tuple[int, int]:
        """The numbers of input and output features, I and O."""
        return layer.in_features, layer.out_features

    def unit_sets(self, layer: torch.nn.Linear) -> tuple[str, ...]:
        """One set, the output features."""
        return ("",)

    def layouts(self, layer: torch.nn.Linear, outputs: Layout, inputs: Layout) -> dict[str, dict[int, Layout]]:
        """The layouts of the weight [O, I] and of the bias [O]."""
        bias = {} if layer.bias is None else {"bias": {0: outputs}}  # pyright: ignore[reportUnnecessaryComparison]
        return {"weight": {0: outputs, 1: inputs}, **bias}

    def resize(self, layer: torch.nn.Linear) -> None:
        """Takes I and O from the weight."""
        layer.out_features, layer.in_features = layer.weight.shape


register(LinearDescriptor())
