"""Layers as literal as the method: torch's own operations, and between them the gradient of what a rule keeps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from meprop import RowSelection, Rule


class KeepAll(Rule):
    """Keeps everything, but does not say so: the sparse path then has to give the dense gradients."""

    def count(self, features: int) -> int:
        return features - 1

    def select(self, grad_output_NO: Tensor) -> RowSelection:
        indices = torch.arange(grad_output_NO.shape[1], dtype=torch.int32).expand(grad_output_NO.shape)
        return RowSelection(grad_output_NO, indices, grad_output_NO.shape[1])


class KeepOfGradient(torch.autograd.Function):
    """The identity, whose gradient is what the rule keeps: the literal meaning of meProp."""

    @staticmethod
    def forward(ctx, x: Tensor, rule: Rule) -> Tensor:
        ctx.rule = rule
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rule.select(grad.flatten(0, -2)).to_dense().view(grad.shape), None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, rule: Rule, blocks: int = 1) -> Tensor:
    """A linear map; the rule chooses within each block of its output. The bias is outside of what is selected."""
    parts = F.linear(x, weight).chunk(blocks, dim=-1)
    kept = torch.cat([KeepOfGradient.apply(part, rule) for part in parts], dim=-1)
    return F.linear(x.detach(), weight.detach(), bias) + (kept - kept.detach())


class KeepMapsOfGradient(KeepOfGradient):
    """The identity, whose gradient [N, O, *] is that of the maps whose norms the rule keeps as they are."""

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        kept_NO = ctx.rule.select(torch.linalg.vector_norm(grad.flatten(2).float(), dim=2)).to_dense()
        return torch.where(kept_NO.view(*kept_NO.shape, *[1] * (grad.dim() - 2)) != 0, grad, 0), None


def convolution(layer: torch.nn.Conv1d | torch.nn.Conv2d, x: Tensor, rule: Rule) -> Tensor:
    """x [N, I, *] to [N, O, *]; the rule sees a row for each position of each example. The bias as in `linear`.

    A rule for the whole gradient sees the norms of maps, unless the layer is pointwise.
    """
    output = layer._conv_forward(x, layer.weight, None)
    padding = set() if isinstance(layer.padding, str) else {*layer.padding}  # "same" adds none to a kernel of 1
    is_pointwise = {*layer.kernel_size, *layer.stride} == {1} and padding <= {0}
    if rule.scope == "global" and not is_pointwise:
        kept = KeepMapsOfGradient.apply(output, rule)
    else:
        kept = KeepOfGradient.apply(output.movedim(1, -1), rule).movedim(-1, 1)
    bare = layer._conv_forward(x.detach(), layer.weight.detach(), layer.bias)
    return bare + (kept - kept.detach())


def attention(layer: torch.nn.MultiheadAttention, inputs: tuple[Tensor, ...], rule: Rule) -> Tensor:
    """Query [L, B, E], key [S, B, kdim] and value [S, B, vdim] to [L, B, E], without masks."""
    weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    if layer.in_proj_weight is not None:
        weights = layer.in_proj_weight.chunk(3)
    projected = map(linear, inputs, weights, layer.in_proj_bias.chunk(3), [rule] * 3)
    q, k, v = (part.unflatten(-1, (layer.num_heads, -1)).permute(1, 2, 0, 3) for part in projected)
    attended = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2)
    return linear(attended, layer.out_proj.weight, layer.out_proj.bias, rule)


def lstm(layer: torch.nn.LSTM, x: Tensor, rule: Rule) -> Tensor:
    """x [T, B, I] to [T, B, H], of one layer in one direction, from states of zeros; always in float32 or float64."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    weights = (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0)
    x, weight_ih, weight_hh, *biases = (tensor.to(dtype).to(x.dtype) for tensor in (x, *weights))
    with torch.autocast("cpu", enabled=False):
        return _walk(x, weight_ih, weight_hh, biases[0] + biases[1], rule)[0].to(dtype)


def lstms(layer: torch.nn.LSTM, x: Tensor, rule: Rule) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What an LSTM of any layers and directions returns for whole sequences [T, B, I], or [B, T, I] with `batch_first`.

    States are zeros at first. There is no dropout.
    """
    x = x.transpose(0, 1) if layer.batch_first else x
    last = []
    for number in range(layer.num_layers):
        outputs = []
        for suffix in ("", "_reverse")[: 1 + layer.bidirectional]:
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            weight_ih, weight_hh, *biases = (getattr(layer, f"{name}_l{number}{suffix}", None) for name in names)
            bias = biases[0] + biases[1] if layer.bias else None
            output, *states = _walk(x.flip(0) if suffix else x, weight_ih, weight_hh, bias, rule)
            outputs.append(output.flip(0) if suffix else output)
            last.append(states)
        x = torch.cat(outputs, dim=-1)
    h, c = (torch.stack(states) for states in zip(*last, strict=True))
    return x.transpose(0, 1) if layer.batch_first else x, (h, c)


def _walk(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, ...]:
    """Output [T, B, H] and the last states h and c [B, H], one time step after the other."""
    h = c = x.new_zeros(x.shape[1], weight_hh.shape[1])
    outputs = []
    for x_t in x:
        both = torch.cat([x_t, h], dim=1), torch.cat([weight_ih, weight_hh], dim=1)
        i, f, g, o = linear(*both, bias, rule, 4).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), h, c
