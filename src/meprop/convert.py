"""Converting a model in place, and back; and the table that says what was done, and why not where it was not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import isnan, nan
from typing import Any, Literal

import torch

from meprop.errors import NoEffectWarning, NotSupportedError
from meprop.nn.base import Descriptor, SparseLayer, descriptor_of
from meprop.policy import Policy, When
from meprop.rules import Rule, Sampled
from meprop.table import text_table

Filter = Callable[[str, torch.nn.Module], bool]

# A wrapper holds references into the model that a change of class would pass by.
_WRAPPERS = {
    "DataParallel": "with when='always' before wrapping it in DataParallel",
    "DistributedDataParallel": "before wrapping it in DistributedDataParallel",
    "FullyShardedDataParallel": "before wrapping it in FullyShardedDataParallel",
    "FSDPModule": "before fully_shard",
    "OptimizedModule": "before torch.compile",
}

# On a layer that convert left as it was: why. Kept on the layer, so that meprop.report can say so later.
_REASON = "_meprop_reason"


@dataclass(frozen=True)
class LayerReport:
    """One layer of a model: what happens in its backward pass, and why.

    Attributes:
        name: Its name in the model, "" for the model itself.
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
        layers: One record for each linear layer, convolution, LSTM and multi-head attention, in the model's order.
        notes: What may go wrong with this model and rule, a sentence each.
    """

    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def density(self) -> float:
        """The share of the output gradients that is kept: the layers' mean, weighted by I x O.

        1.0 without layers; NaN if that of a layer depends on its gradient.
        """
        sizes = [layer.in_features * layer.out_features for layer in self.layers]
        kept = sum(size * layer.density for size, layer in zip(sizes, self.layers, strict=True))
        return kept / sum(sizes) if any(sizes) else 1.0

    def __str__(self) -> str:
        if not self.layers:
            return "no linear layers, no convolutions, no LSTMs and no attention"
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
        return "\n".join([text_table([head, *rows]), count, *self.notes])


def _kept(layer: LayerReport) -> str:
    if layer.status == "dense":
        return "all"
    share = "by the gradient" if isnan(layer.density) else f"{layer.density:.1%}"
    return share if layer.k is None else f"{layer.k} ({share})"


def convert(
    model: torch.nn.Module,
    rule: Rule | None = None,
    *,
    filter: Filter | None = None,
    min_features: int = 128,
    sparse_grad: bool = False,
    compute_dtype: torch.dtype | None = None,
    when: When = "auto",
) -> ConversionReport:
    """Lets the layers of a model back-propagate only what `rule` keeps, in place.

    Each `torch.nn.Linear` becomes a `meprop.nn.Linear`. `Conv1d`, `Conv2d`, `LSTM` and `MultiheadAttention` become ours
    in the same way; `TransformerEncoderLayer` and its like consist of these. So does the `Conv1D` of Hugging Face's
    GPT-2. A layer stays the same object with the same Parameters, so that optimizers, hooks and checkpoints go on.

    A layer that is already converted takes the new rule. If it could not be converted with that rule, it keeps the old
    one, and the report says why.

    The report gives the reason for each layer that stays dense. These layers do:

    - narrow ones;
    - subclasses, whose own forward pass would be lost;
    - LSTMs with projections, and convolutions with groups;
    - with scope "example" or `PerProduct`, convolutions that are not pointwise;
    - layers whose weight is tied to a module of another kind;
    - the output layer of Hugging Face's models, unless it is converted by itself;
    - those that `filter` refuses.

    Args:
        model: Any module; it may itself be a Linear.
        rule: What to keep, e.g. `meprop.TopK(0.05)`. None means `meprop.Sampled()`, whose results are close to those of
            dense training without a number to choose (docs/entries.md).
        filter: Called with (name, layer) for each layer that could be converted. Those with a false answer stay as they
            are.
        min_features: Layers with fewer output features stay dense, since among few there is little to leave out. The
            output layer of a classifier, which is best kept exact, is mostly such a one; keep that of a language model
            exact by `filter`. LSTMs count hidden units, attention counts embed_dim. Convolutions repeat the work of
            each output channel at every position, and need half as many channels.
        sparse_grad: Make each weight.grad a sparse tensor of the kept rows. It is for unified top-k and other rules
            with scope "batch", or with scope "global" and no exact sum. Such layers are always sparse, as their
            optimizer counts on it. LSTMs stay dense: they choose anew at each time step, so that most rows of their
            weights get a gradient. Conv1D stays dense: its features are columns.
        compute_dtype: torch.bfloat16: linear layers form their forward product in bfloat16, from a copy of the weight
            that is kept from step to step. Weights, gradients and activations stay what they are. See
            `meprop.functional.linear`. Convolutions form theirs in bfloat16 without keeping the copy. LSTMs do not
            take part.
        when: "auto": each layer measures at its first backward pass whether being sparse is faster than dense on this
            machine, for the number of rows that it then gets. An LSTM measures at its first forward pass. The layer
            stays with the answer. The cache folder ($MEPROP_CACHE) remembers it, so that later runs decide alike. Under
            torch.compile nothing can be measured: a layer that has not decided yet is sparse. "always": sparse without
            measuring. Layers with `meprop.distributed.SynchronizedTopK` are always sparse.

    Returns:
        A report; `print` it.

    Raises:
        TypeError: `model` or `rule` is of the wrong type.
        ValueError: `min_features` is below 1, `when` or `compute_dtype` is unknown, or `sparse_grad` does not go with
            the rule.
        NotSupportedError: the model, or a part of it, is wrapped in DistributedDataParallel, FSDP, DataParallel or
            torch.compile: convert before wrapping.

    Warns:
        NoEffectWarning: no layer back-propagates sparsely.
    """
    check_model(model)
    policy = Policy(Sampled() if rule is None else rule, sparse_grad, compute_dtype, when)
    if min_features < 1:
        raise ValueError(f"min_features={min_features}; it must be at least 1")

    holders, heads = _holders_of_other_kinds(model), _output_layers(model)
    for name, layer, descriptor in described_layers(model):
        reason = _why_left_alone(layer, descriptor, policy, holders, min_features)
        if reason is None and layer in heads and layer is not model:
            reason = "it gives the model's outputs"
        if reason is None and filter is not None and not filter(name, layer):
            reason = "refused by the filter"
        if reason is not None:
            vars(layer)[_REASON] = reason
            continue
        vars(layer).pop(_REASON, None)
        vars(layer)["policy"] = descriptor.policy(policy).of_layer()
        _become(layer, descriptor.sparse)

    result = report(model)
    if not any(layer.status == "sparse" for layer in result.layers):
        warnings.warn(
            f"convert changed nothing that matters: no layer is sparse.\n{result}", NoEffectWarning, stacklevel=2
        )
    return result


def revert(model: torch.nn.Module) -> None:
    """Makes every converted layer a plain `torch.nn` one again, in place, with the same Parameters.

    Raises:
        TypeError: `model` is not a module.
        NotSupportedError: the model is wrapped (revert the module inside), or a layer is of a subclass of one of
            meprop.nn's, as parametrizations make.
    """
    check_model(model)
    for name, layer, descriptor in described_layers(model):
        vars(layer).pop(_REASON, None)
        if type(layer) is descriptor.sparse:
            del vars(layer)["policy"]
            _become(layer, descriptor.plain)
        elif isinstance(layer, SparseLayer):
            raise NotSupportedError(
                f"layer {name!r} is a {type(layer).__name__}, made from meprop.nn's layer: it cannot be made plain. "
                "Remove what was added to it (parametrizations) first."
            )


def plain_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the model, reverted: of plain `torch.nn` layers. Raises what `revert` does."""
    model = copy.deepcopy(model)
    revert(model)
    return model


def report(model: torch.nn.Module) -> ConversionReport:
    """The table of `convert`, as things are now."""
    layers = described_layers(model)
    records = tuple(_describe(name, layer, descriptor) for name, layer, descriptor in layers)
    notes: list[str] = []
    if records and (last := records[-1]).status == "sparse" and last.out_features > last.in_features:
        notes.append(f"If the last one, {last.name!r}, gives the model's outputs, rather leave it dense: use filter")
    by_example = any(layer.rule.scope == "example" for _, layer, _ in layers if isinstance(layer, SparseLayer))
    if by_example and any(type(module).__name__.endswith(("LayerNorm", "RMSNorm")) for module in model.modules()):
        notes.append(
            "If its layers' outputs are summed, and normalised only where they are read (pre-norm, as in GPT), choose "
            "with scope='batch': with scope 'example' the sum grows, and it hardly learns (docs/transformers.md)"
        )
    return ConversionReport(records, tuple(notes))


def _become(layer: torch.nn.Module, cls: type[torch.nn.Module]) -> None:
    object.__setattr__(layer, "__class__", cls)


def described_layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module, Descriptor[Any]]]:
    """What could be converted, or is: each layer by name, with its descriptor."""
    described = [(name, module, descriptor_of(module)) for name, module in model.named_modules()]
    layers = [(name, module, descriptor) for name, module, descriptor in described if descriptor is not None]
    parts = {part for _, layer, descriptor in layers for part in descriptor.parts(layer)}
    return [(name, layer, descriptor) for name, layer, descriptor in layers if layer not in parts]


def _output_layers(model: torch.nn.Module) -> set[torch.nn.Module | None]:
    """Those that models in Hugging Face's manner, of which `model` may consist, say that they have."""
    found: set[torch.nn.Module | None] = set()
    for module in model.modules():
        with suppress(NotImplementedError):
            found.add(getattr(module, "get_output_embeddings", lambda: None)())
    return found


def _describe(name: str, layer: torch.nn.Module, descriptor: Descriptor[Any]) -> LayerReport:
    is_known = type(layer) in (descriptor.plain, descriptor.sparse)
    kind = descriptor.plain.__name__ if is_known else type(layer).__name__
    inputs, width = descriptor.features(layer)

    def dense(rule: Rule | None, reason: str) -> LayerReport:
        return LayerReport(name, kind, inputs, width, "dense", None, 1.0, rule, reason)

    if not isinstance(layer, SparseLayer):
        return dense(None, vars(layer).get(_REASON, "not converted"))
    rule, decision = layer.rule, layer.decision
    if rule.keeps_all(width):
        own = layer.policy.own_rule
        return dense(rule, f"{rule} keeps everything" + (f", by a schedule of {own}" if own else ""))
    if decision is not None:
        reason = str(decision)
    elif layer.when == "auto":
        reason = f"to be measured at its first {descriptor.decides_in} pass"
    else:
        reason = "always"
    if _REASON in vars(layer):
        reason += f"; keeps {rule}: {vars(layer)[_REASON]}"
    if decision is not None and not decision.sparse:
        return dense(rule, reason)
    density = rule.density(width)
    record = layer.policy.record
    if density is None and record is not None and record.density is not None:
        density = record.density
        reason += f"; kept in {record.passes} passes so far, {record.dense_passes} of them dense"
    return LayerReport(
        name, kind, inputs, width, "sparse", rule.count(width), nan if density is None else density, rule, reason
    )


def check_model(model: torch.nn.Module, remedy: str | None = None) -> None:
    """Raises the errors of `convert` that concern the model; `remedy` is what to do with a wrapped one, if not that."""
    if not isinstance(model, torch.nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model is of type {type(model).__name__}; it must be a torch.nn.Module")
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__module__.startswith("torch.") and cls.__name__ in _WRAPPERS:
                place = f"its part {name!r}" if name else "the model"
                remedy = remedy or f"call meprop.convert {_WRAPPERS[cls.__name__]}"
                raise NotSupportedError(f"{place} is a {cls.__name__}; {remedy}")


def _holders_of_other_kinds(model: torch.nn.Module) -> dict[torch.Tensor, str]:
    """Parameters that other modules than such layers hold (an embedding, say), and a name for the holder."""
    return {
        parameter: f"{type(module).__name__} {name!r}"
        for name, module in model.named_modules()
        if descriptor_of(module) is None
        for parameter in module.parameters(recurse=False)
    }


def _why_left_alone(
    layer: torch.nn.Module,
    descriptor: Descriptor[Any],
    policy: Policy,
    holders: dict[torch.Tensor, str],
    min_features: int,
) -> str | None:
    if type(layer) not in (descriptor.plain, descriptor.sparse):
        return f"{type(layer).__name__} is a subclass of {descriptor.plain.__name__} with a forward pass of its own"
    for parameter in layer.parameters():
        if not parameter.is_floating_point():
            return f"its weight is of dtype {parameter.dtype}"
        if parameter.dim() >= 2 and parameter in holders:
            return f"its weight is tied to {holders[parameter]}"
    if (reason := descriptor.why_dense(layer, policy) or descriptor.why_narrow(layer, min_features)) is not None:
        return reason
    try:
        policy.rule.count(descriptor.features(layer)[1])
    except ValueError as error:  # it does not fit this width
        return str(error)
    return None
