"""Multi-head attention with projections whose backward pass is sparse."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meprop.functional.linear import linear_with_policy
from meprop.nn.base import Descriptor, SparseLayer, leaf, refuse_script, register, sparse_repr
from meprop.policy import Policy, needs_gradients
from meprop.rules import Rule


class MultiheadAttention(SparseLayer, torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose projections back-propagate only what `rule` keeps of their output gradients.

    There are four projections: of query, key, value and output. The rule chooses among the E entries of each token in
    each projection. It does so even if torch keeps the weights of query, key and value in one matrix. Attention itself
    is exact.

    Parameters, state_dict, initialisation, the forms of input and all arguments of `forward` are torch's own. The
    output equals torch's up to rounding. Torch's own forward pass runs without gradients, and with k >= embed_dim.
    Nested tensors work only without gradients, as in torch.

    A layer that is made by hand is always sparse. A layer that `meprop.convert` has made measures at its first backward
    pass whether sparse is faster on this machine. It measures its output's projection, and keeps the decision for all
    projections.

    Args:
        *args: The arguments of `torch.nn.MultiheadAttention`: embed_dim, num_heads, dropout, bias, and so on.
        rule: What to keep of the E entries, e.g. `meprop.TopK(0.05)`.
        sparse_grad: Make the gradients of the weights sparse tensors of the kept rows. See `meprop.functional.linear`.
        compute_dtype: torch.bfloat16 forms the projections' forward products in bfloat16. See
            `meprop.functional.linear`. It has no effect if torch's own forward pass runs.
        **kwargs: The keyword arguments of `torch.nn.MultiheadAttention`.

    Attributes:
        when: "always" for a layer that is always sparse, "auto" for one that is sparse only if that is measured to be
            faster.
        decision: With "auto", what was decided. None before the first backward pass.

    Raises:
        TypeError: `rule` is not a Rule, or `sparse_grad` is not a bool.
        ValueError: `sparse_grad` is used with a rule of scope "example" or with an exact sum, or `compute_dtype` is
            not torch.bfloat16 or None.
    """

    def __init__(
        self, *args: Any, rule: Rule, sparse_grad: bool = False, compute_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        policy = Policy(rule, sparse_grad, compute_dtype)
        super().__init__(*args, **kwargs)
        self.policy = policy.of_layer()

    __prepare_scriptable__ = refuse_script

    @leaf
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The same as in torch's layer. There are B sequences, L queries, S keys and H heads of size E / H.

        Args:
            query: Queries [L, B, E], [B, L, E] with `batch_first`, or [L, E] for one sequence.
            key: Keys [S, B, kdim], [B, S, kdim] with `batch_first`, or [S, kdim] for one sequence.
            value: Values [S, B, vdim], [B, S, vdim] with `batch_first`, or [S, vdim] for one sequence.
            key_padding_mask: A mask of keys [B, S] or [S]. A bool mask is True for keys to be ignored. A floating mask
                is added to the scores.
            need_weights: Whether to return the weights of attention. The call is faster without them.
            attn_mask: A mask of pairs of query and key [L, S] or [B * H, L, S], of the same dtypes.
            average_attn_weights: Whether to return the mean of the weights over the heads.
            is_causal: A hint that `attn_mask` is the causal mask. The mask has to be given as well.

        Returns:
            The output, in the shape of `query`, and the weights if `need_weights` is True, else None. The weights are
            [B, L, S], or [B, H, L, S] for each head. They have no dimension B for one sequence. They have more than S
            keys with `add_bias_kv` or `add_zero_attn`.

        Raises:
            ValueError: A shape does not fit, or `is_causal` is True without `attn_mask`.
            TypeError: A mask is neither of bools nor of a floating dtype.
        """
        if not self._is_sparse(query, key, value):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        is_single = query.dim() == 2
        projected = self._project_in(query, key, value)
        q, k, v = (self._heads(x[None] if is_single else x, self.batch_first or is_single) for x in projected)
        k, v = self._with_more_keys(k, v)
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(q, k, key_padding_mask, attn_mask)
        attended, weights = self._attend(q, k, v, mask, need_weights, causal)
        attended = attended.transpose(1, 2) if self.batch_first or is_single else attended.permute(2, 0, 1, 3)
        output = self._linear(attended.flatten(2), self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if is_single:
            return output[0], None if weights is None else weights[0]
        return output, weights

    def _is_sparse(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        tensors = {"query": query, "key": key, "value": value, **dict(self.named_parameters())}
        if self.rule.keeps_all(self.embed_dim) or self.policy.leave_to_torch(**tensors):
            return False
        return needs_gradients(*tensors.values())

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, blocks: int = 1) -> Tensor:
        return linear_with_policy(x, weight, bias, self.policy.in_blocks(blocks))

    def _project_in(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The projections of query, key and value, each [*, E]. Inputs that are one tensor share a product."""
        width, bias = self.embed_dim, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)  # pyright: ignore[reportUnnecessaryComparison]
            return tuple(map(self._linear, (query, key, value), weights, biases))
        weight = self.in_proj_weight
        if query is key and key is value:
            return self._linear(query, weight, bias, 3).chunk(3, dim=-1)
        sources, sizes = ([query, key], [1, 2]) if key is value else ([query, key, value], [1, 1, 1])
        rows = [size * width for size in sizes]
        weights = weight.split(rows)
        biases = [None] * len(rows) if bias is None else bias.split(rows)  # pyright: ignore[reportUnnecessaryComparison]
        products = map(self._linear, sources, weights, biases, sizes)
        return tuple(part for product in products for part in product.split(width, dim=-1))

    def _heads(self, x: Tensor, batch_first: bool) -> Tensor:
        """The tensor [B, L, E] or [L, B, E] as [B, H, L, D], where D = E / H is the size of a head."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

    def _with_more_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, D], followed by those that are the same for all sequences."""
        batch = k.shape[0]
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, self._heads(more, False).expand(batch, -1, -1, -1)], dim=2)
                for x, more in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v

    def _mask(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
        """What is added to the scores [B, H, L, S]. None means nothing."""
        masks: list[Tensor] = []
        if key_padding_mask is not None:
            masks.append(_additive("key_padding_mask", key_padding_mask, q.dtype).view(len(q), 1, 1, -1))
        if attn_mask is not None:
            shape = (len(q), self.num_heads) if attn_mask.dim() == 3 else (1, 1)
            masks.append(_additive("attn_mask", attn_mask, q.dtype).view(*shape, *attn_mask.shape[-2:]))
        return F.pad(sum(masks[1:], masks[0]), (0, k.shape[2] - masks[0].shape[3])) if masks else None

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The result of attention [B, H, L, D], and its weights [B, H, L, S]."""
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal), None
        scores = (q * sqrt(1 / self.head_dim)) @ k.transpose(-2, -1)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout)
        return weights @ v, weights

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal=True is a hint about attn_mask, which is None; give it, e.g. that of "
                "torch.nn.Transformer.generate_square_subsequent_mask"
            )
        if query.dim() not in (2, 3):
            raise ValueError(f"query is {list(query.shape)}; it is [L, B, E], with batch_first [B, L, E], or [L, E]")
        at = 0 if self.batch_first else 1
        batch = () if query.dim() == 2 else (query.shape[at],)
        targets, sources = query.shape[1 - at if batch else 0], key.shape[1 - at if key.dim() == 3 else 0]

        def sequence(length: int, width: int) -> tuple[int, ...]:
            return (length, width) if not batch else (*batch, length, width) if at == 0 else (length, *batch, width)

        pairs = (targets, sources)
        expected = [
            ("query", query, [sequence(targets, self.embed_dim)]),
            ("key", key, [sequence(sources, self.kdim)]),
            ("value", value, [sequence(sources, self.vdim)]),
            ("key_padding_mask", key_padding_mask, [(*batch, sources)]),
            ("attn_mask", attn_mask, [pairs, (self.num_heads * (batch[0] if batch else 1), *pairs)]),
        ]
        for name, tensor, shapes in expected:
            if tensor is not None and tuple(tensor.shape) not in shapes:
                allowed = " or ".join(str(list(shape)) for shape in shapes)
                raise ValueError(f"{name} is {list(tensor.shape)}; with query {list(query.shape)} it is {allowed}")

    def extra_repr(self) -> str:
        """The sizes and the rule."""
        return f"{self.embed_dim}, num_heads={self.num_heads}" + sparse_repr(self)


def _additive(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
    if not mask.is_floating_point():
        raise TypeError(f"{name} is of dtype {mask.dtype}; it is of bools, or floating, to be added to the scores")
    return mask.to(dtype)


class AttentionDescriptor(Descriptor[torch.nn.MultiheadAttention]):
    """The descriptor of multi-head attention. The rule chooses within each projection."""

    plain, sparse = torch.nn.MultiheadAttention, MultiheadAttention

    def features(self, layer: torch.nn.MultiheadAttention) -> tuple[int, int]:
        """The numbers of input and output features. Both are E."""
        return layer.embed_dim, layer.embed_dim

    def depth(self, layer: torch.nn.MultiheadAttention) -> int:
        """Two: the projections of query, key and value are side by side, and that of the output follows."""
        return 2

    def parts(self, layer: torch.nn.MultiheadAttention) -> tuple[torch.nn.Module, ...]:
        """The last projection. The layer reads its weight, and never calls it."""
        return (layer.out_proj,)


register(AttentionDescriptor())
