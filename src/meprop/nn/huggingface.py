"""The linear layer of GPT-2 in Hugging Face's transformers, with a sparse backward pass.

This module needs transformers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D as PlainConv1D

from meprop.functional.linear import linear_with_policy
from meprop.nn.base import Descriptor, SparseLayer, leaf, register, sparse_repr
from meprop.policy import Policy
from meprop.rules import Rule

__all__ = ["Conv1D", "Conv1DDescriptor"]


class Conv1D(SparseLayer, PlainConv1D):
    """`transformers.pytorch_utils.Conv1D`, a linear layer with weight [I, O], that back-propagates what `rule` keeps.

    The layer is like `meprop.nn.Linear` otherwise, except that the weight's gradient cannot be row-sparse. Output
    features are columns of this weight, not rows.

    Args:
        nf: O, the number of output features.
        nx: I, the number of input features.
        rule: What to keep, e.g. `meprop.TopK(0.05)`.
        compute_dtype: torch.bfloat16 forms the forward product in bfloat16. None forms it in the dtype of the tensors.
        skip_zeros: Leave zeros of the input out of the forward product, where that is faster. See
            `meprop.functional.linear`.

    Raises:
        TypeError: `rule` is not a Rule, or `skip_zeros` is not a bool.
        ValueError: `compute_dtype` is not torch.bfloat16 or None.
    """

    def __init__(
        self, nf: int, nx: int, *, rule: Rule, compute_dtype: torch.dtype | None = None, skip_zeros: bool = False
    ) -> None:
        policy = Policy(rule, False, compute_dtype, skip_zeros=skip_zeros)
        super().__init__(nf, nx)
        self.policy = policy.of_layer()

    def forward(self, x: Tensor) -> Tensor:
        """The output [*, O] for an input [*, I]. In a script of torch.jit it is torch's own."""
        if torch.jit.is_scripting():
            return F.linear(x, self.weight.t(), self.bias)
        else:  # noqa: RET505  (torch.jit leaves out a branch, not what follows it)
            return self._forward(x)

    @leaf
    def _forward(self, x: Tensor) -> Tensor:
        return linear_with_policy(x, self.weight.t(), self.bias, self.policy)

    def __repr__(self) -> str:
        return f"Conv1D(nf={self.nf}, nx={self.nx}{sparse_repr(self)})"


class Conv1DDescriptor(Descriptor[PlainConv1D]):
    """A linear layer whose weight is [I, O]."""

    plain, sparse = PlainConv1D, Conv1D
    skips_zeros = True

    def features(self, layer: PlainConv1D) -> tuple[int, int]:
        """The numbers of input and output features, I and O."""
        return layer.nx, layer.nf

    def why_dense(self, layer: PlainConv1D, policy: Policy) -> str | None:
        """A reason if row-sparse gradients are wanted, because the weight cannot have them."""
        if policy.sparse_grad:
            return "sparse_grad: the output features of its weight are columns, not rows"
        return None


register(Conv1DDescriptor())
