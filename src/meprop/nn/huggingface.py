"""The linear layer of GPT-2 in Hugging Face's transformers, which this module needs, with a sparse backward pass."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D as PlainConv1D

from meprop.functional.linear import linear_with_policy
from meprop.nn.base import Descriptor, SparseLayer, register, sparse_repr
from meprop.policy import Policy
from meprop.rules import Rule

__all__ = ["Conv1D", "Conv1DDescriptor"]


class Conv1D(SparseLayer, PlainConv1D):
    """`transformers.pytorch_utils.Conv1D`, a linear layer with weight [I, O], that back-propagates what `rule` keeps.

    In all else as `meprop.nn.Linear`, but that the weight's gradient cannot be row-sparse: selected output features are
    its columns.

    Args:
        nf: Size O of each output.
        nx: Size I of each input.
        rule: What to keep, e.g. `meprop.TopK(0.05)`.
        compute_dtype: torch.bfloat16: form the forward product in bfloat16.

    Raises:
        TypeError: `rule` is not a Rule.
        ValueError: another compute_dtype.
    """

    def __init__(self, nf: int, nx: int, *, rule: Rule, compute_dtype: torch.dtype | None = None) -> None:
        policy = Policy(rule, False, compute_dtype)
        super().__init__(nf, nx)
        self.policy = policy.of_layer()

    def forward(self, x: Tensor) -> Tensor:
        """Input [*, I] to output [*, O]."""
        return linear_with_policy(x, self.weight.t(), self.bias, self.policy)

    def __repr__(self) -> str:
        return f"Conv1D(nf={self.nf}, nx={self.nx}{sparse_repr(self)})"


class Conv1DDescriptor(Descriptor[PlainConv1D]):
    """A linear layer whose weight is [I, O]."""

    plain, sparse = PlainConv1D, Conv1D

    def features(self, layer: PlainConv1D) -> tuple[int, int]:
        """I and O."""
        return layer.nx, layer.nf

    def why_dense(self, layer: PlainConv1D, policy: Policy) -> str | None:
        """Its weight's gradient cannot be row-sparse."""
        if policy.sparse_grad:
            return "sparse_grad: the output features of its weight are columns, not rows"
        return None


register(Conv1DDescriptor())
