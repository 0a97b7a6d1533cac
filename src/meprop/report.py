"""The table of a model's layers: which back-propagate sparsely, which do not, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any, Literal

import torch

from meprop.fusing import fused_in
from meprop.nn.base import Descriptor, SparseLayer, described_layers, plain_kind
from meprop.policy import Policy
from meprop.reasons import other_weights, why_bypassed
from meprop.rules import Rule
from meprop.table import text_table

# On a layer that convert left as it was: why.
REASON = "_meprop_reason"

# The class that a lazy layer takes when it gets its shape. Torch looks it up on the layer.
BECOMES = "cls_to_become"


@dataclass(frozen=True)
class LayerReport:
    """One layer of a model: what happens in its backward pass, and why.

    Attributes:
        name: Its name in the model, "" for the model itself. It is the name of the weight where a module multiplies
            weights without a layer, as experts of transformers do.
        kind: The plain class's name, e.g. "Linear".
        in_features: I. Convolutions count input channels.
        out_features: O, among which the rule chooses. Convolutions count output channels. LSTMs count hidden units, as
            the rule chooses within each gate. Attention counts E, as the rule chooses within each projection.
        status: "sparse" or "dense".
        k: How many of them are kept; None if dense, or if it depends on the gradient.
        density: The share of the output gradient that is kept; 1.0 if dense, NaN if it depends on the gradient.
        rule: The rule, None if the layer is a plain one.
        reason: Why it is dense, or what convert did.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    status: Literal["sparse", "dense"]
    k: int | None
    density: float
    rule: Rule | None
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """What was done to each layer of a model; `print(report)` shows a table.

    Attributes:
        layers: One record for each linear layer, convolution, recurrent layer or cell, bilinear layer, multi-head
            attention and weight of experts, in the model's order.
        notes: What may go wrong with this model and rule, a sentence each.
        fused: The Dropouts that are computed in one pass with the activation before them, e.g. "1 + 2", by the names of
            both modules. The name of a Dropout alone, if no activation is before it.
        skipping: The names of the layers whose forward products may leave out zeros of the input.
    """

    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    skipping: tuple[str, ...] = ()

    @property
    def density(self) -> float:
        """The share of the output gradients that is kept: the layers' mean, weighted by I x O.

        1.0 without layers; NaN if that of a layer depends on its gradient.
        """
        sizes = [layer.in_features * layer.out_features for layer in self.layers]
        kept = sum(size * layer.density for size, layer in zip(sizes, self.layers, strict=True))
        return kept / sum(sizes) if any(sizes) else 1.0

    def __str__(self) -> str:
        fused = [f"one pass for activation and dropout: {', '.join(self.fused)}"] if self.fused else []
        names = ", ".join(map(repr, self.skipping))
        skipping = [f"zeros of the input may be left out: {names}"] if names else []
        if not self.layers:
            nothing = "no linear or bilinear layers, no convolutions, no recurrent layers, no attention and no experts"
            return "\n".join([nothing, *fused])
        head = ("layer", "kind", "in x out", "backward", "kept", "why")
        rows = [
            (
                layer.name or "(the model itself)",
                layer.kind,
                f"{layer.in_features} x {layer.out_features}",
                layer.status,
                _kept(layer),
                layer.reason,
            )
            for layer in self.layers
        ]
        sparse = sum(layer.status == "sparse" for layer in self.layers)
        count = f"{sparse} of {len(self.layers)} layers back-propagate sparsely"
        return "\n".join([text_table([head, *rows]), count, *fused, *skipping, *self.notes])


def _kept(layer: LayerReport) -> str:
    if layer.status == "dense":
        return "all"
    share = "by the gradient" if isnan(layer.density) else f"{layer.density:.1%}"
    return share if layer.k is None else f"{layer.k} ({share})"


def report(model: torch.nn.Module) -> ConversionReport:
    """The table of `convert`, with what has happened since.

    A converted model that has not been trained is reported as it will be. Once there was training, a layer without a
    sparse backward pass is dense. Something may read its weight past the layer, or nothing may call the layer. There
    was training if one of these holds:

    - a parameter of the layer got a gradient since `convert`, even if that gradient is gone;
    - another layer had a sparse backward pass, or has measured.

    An edit of the weight, as by `load_state_dict`, is no training. If the `forward` of a layer was replaced on the
    instance by something that cannot be seen through, its passes tell.

    The report counts the layer's own passes, and does not see what else adds to a gradient. A layer is sparse if it is
    called, even if something reads its weight past it as well. In compiled graphs passes are not counted: a layer is
    sparse there once it is traced. Copies of layers, lazy layers, layers that were made by hand, and parameters that
    were frozen at `convert` are known to have got a gradient only while they have it.

    Raises:
        TypeError: `model` is not a module.
    """
    check_type(model)
    layers = described_layers(model)
    policies = [policy for _, layer, _ in layers if (policy := policy_of(layer)) is not None]
    trained = any(policy.record is not None and policy.record.seen_training for policy in policies)
    known = {layer: descriptor for _, layer, descriptor in layers}
    records: list[LayerReport] = []
    for name, module in model.named_modules():
        if module in known:
            records.append(_describe(name, module, known[module], trained))
        else:
            records += _describe_other(name, module)
    notes: list[str] = []
    if (last := likely_output(records)) is not None:
        which = f"If the last one, {last.name!r}," if last.name else "If this layer"
        notes.append(f"{which} gives the model's outputs, rather leave it dense: use filter")
    by_example = any(layer.rule.scope == "example" for _, layer, _ in layers if isinstance(layer, SparseLayer))
    if by_example and any(type(module).__name__.endswith(("LayerNorm", "RMSNorm")) for module in model.modules()):
        notes.append(
            "If its layers' outputs are summed, and normalised only where they are read (pre-norm, as in GPT), choose "
            "with scope='batch': with scope 'example' the sum grows, and it hardly learns (docs/transformers.md)"
        )
    skipping = tuple(name for name, layer, _ in layers if (policy := policy_of(layer)) and policy.skip_zeros)
    return ConversionReport(tuple(records), tuple(notes), fused_in(model), skipping)


def likely_output(layers: Sequence[LayerReport]) -> LayerReport | None:
    """The layer that seems to give the model's outputs, if it is sparse: the last one, if it widens. None otherwise."""
    last = layers[-1] if layers else None
    return last if last is not None and last.status == "sparse" and last.out_features > last.in_features else None


def policy_of(layer: torch.nn.Module) -> Policy | None:
    """The policy that the layer has, or will have when it gets its shape."""
    return vars(layer)["policy"] if isinstance(layer, SparseLayer) or BECOMES in vars(layer) else None


def _describe_other(name: str, module: torch.nn.Module) -> Iterator[LayerReport]:
    kind = type(module).__name__
    reason = f"meprop has no sparse backward pass for {kind}"
    for weight, features in other_weights(module).items():
        place = ".".join(part for part in (name, weight) if part)
        yield LayerReport(place, kind, *features, "dense", None, 1.0, None, reason)


def _describe(name: str, layer: torch.nn.Module, descriptor: Descriptor[Any], trained: bool) -> LayerReport:
    kind = (plain_kind(layer) or type(layer)).__name__
    inputs, width = descriptor.features(layer)

    def dense(rule: Rule | None, reason: str) -> LayerReport:
        return LayerReport(name, kind, inputs, width, "dense", None, 1.0, rule, reason)

    policy = policy_of(layer)
    if policy is None:
        return dense(None, vars(layer).get(REASON, "not converted"))
    rule, record = policy.rule, policy.record
    decision = policy.decision if policy.when == "auto" else None
    assert record is not None  # it is a layer's
    if (bypassed := why_bypassed(layer, descriptor, record.seen_sparse)) is not None:
        return dense(rule, bypassed)
    if rule.keeps_all(width):
        own = policy.own_rule
        return dense(rule, f"{rule} keeps everything" + (f", by a schedule of {own}" if own else ""))
    if not isinstance(layer, SparseLayer):
        reason = "takes its rule at its first forward pass, when it gets its shape"
    elif decision is not None:
        reason = str(decision)
    elif policy.when == "auto":
        reason = f"to be measured at its first {descriptor.decides_in} pass"
    else:
        reason = "always"
    if REASON in vars(layer):
        reason += f"; keeps {rule}: {vars(layer)[REASON]}"
    if policy.measured_dense:
        return dense(rule, reason)
    density = rule.density(width)
    if not record.seen_sparse:
        evidence = record.left_to_torch or ("others had some" if trained else None)
        if record.got_gradient or (has_gradient(layer) and not record.had_gradient):
            evidence = evidence or "a parameter of it got a gradient"
        if evidence is not None:
            return dense(rule, f"{reason}; no sparse backward pass seen yet: {evidence}")
    if density is None and record.density is not None:
        density = record.density
        reason += f"; kept in {record.passes} passes so far, {record.dense_passes} of them dense"
        if policy.when == "auto" and record.keeps_too_much:
            reason += "; dense for now, as its gradients ask for more than pays"
    return LayerReport(
        name, kind, inputs, width, "sparse", rule.count(width), nan if density is None else density, rule, reason
    )


def has_gradient(layer: torch.nn.Module) -> bool:
    """Whether a parameter of the layer has a gradient now."""
    return any(parameter.grad is not None for parameter in layer.parameters())


def check_type(model: torch.nn.Module) -> None:
    """Raises the TypeError of what is not a module."""
    if not isinstance(model, torch.nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model is of type {type(model).__name__}; it must be a torch.nn.Module")
