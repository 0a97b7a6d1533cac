"""Budgets of noise from the depth of a model."""

from __future__ import annotations

from dataclasses import replace
from math import expm1, log1p

import torch

from meprop.nn.base import SparseLayer, described_layers
from meprop.rules import InBlocks, PerProduct, Rule, Sampled
from meprop.rules.base import checked_share

__all__ = ["share_noise"]


def share_noise(model: torch.nn.Module, total: float) -> dict[str, float]:
    """Gives each converted layer an equal share of one budget of noise for the whole model, in place.

    The noise in a layer's output gradient passes through all layers below it. So the budgets r of layers in series
    multiply: the lowest weight's gradient has a variance of prod(1 + r) - 1 of its square. With L layers in series each
    gets r = (1 + total)^(1 / L) - 1, so that this is `total`. Equal shares keep the product with the least cost, if
    equal budgets cost each layer the same.

    All layers count as if they were in series, attention twice, an LSTM once for each of its layers. So the budgets are
    rather too small where some are side by side. Within an LSTM noise also passes through time, which is not counted.
    The product is that of layers which pass noise and gradient on alike, as random matrices do. Trained layers pass on
    much less of the noise (docs/entries.md), so that `total` is a careful bound of theirs.

    Layers whose rule has no budget are left as they are, and so are those that were measured to be dense. Call it
    before a `meprop.RuleSchedule` is made.

    Args:
        model: A model converted with `meprop.Sampled(noise=...)`, or with a `meprop.PerProduct` whose `input` is one.
            The budget for a weight's gradient is left as it is, because that noise passes through no layer.
        total: The budget of the whole model, above 0.

    Returns:
        The budget of each layer, by its name.

    Raises:
        ValueError: `total` is out of range, or no layer has a budget.
        TypeError: `model` is not a module, or `total` is not a number.

    Example:
        >>> import torch, meprop
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 200), torch.nn.ReLU(), torch.nn.Linear(200, 200))
        >>> report = meprop.convert(model, meprop.Sampled(noise=0.25))
        >>> shares = share_noise(model, 0.44)
        >>> {name: round(noise, 3) for name, noise in shares.items()}
        {'0': 0.2, '2': 0.2}
        >>> model[0].rule.noise == shares["0"]
        True
    """
    if not isinstance(model, torch.nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model is of type {type(model).__name__}; it must be a torch.nn.Module")
    total = checked_share("total", total, below_one=False)
    layers, depth = dict[str, SparseLayer](), 0
    for name, layer, descriptor in described_layers(model):
        if not isinstance(layer, SparseLayer) or _with_budget(layer.rule, total) is None:
            continue
        if not layer.policy.measured_dense:
            layers[name] = layer
            depth += descriptor.depth(layer)
    if not layers:
        raise ValueError("no sparse layer has a budget of noise; call meprop.convert(model, meprop.Sampled(noise=...))")
    share = expm1(log1p(total) / depth)
    for layer in layers.values():
        layer.rule = _with_budget(layer.rule, share) or layer.rule
    return dict.fromkeys(layers, share)


def _with_budget(rule: Rule, noise: float) -> Rule | None:
    """The rule with another budget for the input's gradient. None if it has none."""
    if isinstance(rule, Sampled):
        return None if rule.noise is None else replace(rule, noise=noise)
    if isinstance(rule, InBlocks):
        part = _with_budget(rule.rule, noise)
        return None if part is None else replace(rule, rule=part)
    if isinstance(rule, PerProduct):
        part = None if rule.input is None else _with_budget(rule.input, noise)
        return None if part is None else replace(rule, input=part)
    return None
