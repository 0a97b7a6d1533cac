"""Converting a model in place, and back; and the table that says what was done, and why not where it was not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isnan, nan
from numbers import Integral
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from meprop.copies import deepcopy
from meprop.errors import NoEffectWarning, NotSupportedError
from meprop.fusing import fuse as fuse_dropouts
from meprop.fusing import fused_in, unfuse
from meprop.nn.base import Descriptor, SparseLayer, become, descriptor_of, plain_kind, support_quantization
from meprop.ops.native import reason_missing
from meprop.policy import Policy, When
from meprop.reasons import Surroundings, other_weights, why_bypassed, why_left_out, why_unfit
from meprop.record import Record
from meprop.rules import Rule, Sampled
from meprop.rules.base import check_flag
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

# The class that a lazy layer takes when it gets its shape. Torch looks it up on the layer.
_BECOMES = "cls_to_become"

# The hooks that wait for the first gradient of each converted layer. They are not on the layer, as copies share none.
_gradient_hooks: WeakKeyDictionary[torch.nn.Module, list[RemovableHandle]] = WeakKeyDictionary()


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
    """

    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()

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
        return "\n".join([text_table([head, *rows]), count, *fused, *self.notes])


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
    fuse: bool = False,
) -> ConversionReport:
    """Lets the layers of a model back-propagate only what `rule` keeps, in place.

    Each `torch.nn.Linear` becomes a `meprop.nn.Linear`. `Conv1d`, `Conv2d`, `LSTM` and `MultiheadAttention` become ours
    in the same way; `TransformerEncoderLayer` and its like consist of these. So does the `Conv1D` of Hugging Face's
    GPT-2. A layer stays the same object with the same Parameters, so that optimizers, hooks and checkpoints go on.

    A layer that is already converted takes the new rule. If it could not be converted with that rule, it keeps the old
    one, and the report says why.

    The report gives the reason for each layer that stays dense. These layers do:

    - narrow ones;
    - subclasses, unless a `meprop.nn.base.Descriptor` makes them known;
    - layers whose `forward` was replaced on the instance, as accelerate's hooks do, or on the class of torch, and
      convolutions whose `_conv_forward` was;
    - LSTMs with projections, and convolutions with groups;
    - with scope "example" or `PerProduct`, convolutions that are not pointwise;
    - with `sparse_grad`, layers whose weight is computed, as by a parametrization;
    - layers whose weight is tied to a module of another kind;
    - the output layer of Hugging Face's models with all its parts, and layers tied to it, unless it is converted by
      itself;
    - those that `filter` refuses;
    - GRUs, RNNs, cells, three-dimensional and transposed convolutions and bilinear layers;
    - weights that a module multiplies without a layer, as experts do.

    A parametrized layer stays parametrized. A lazy layer takes its rule when it gets its shape, at the end of its first
    forward pass, which is torch's own. Run the model once before what works with its layers is made, such as a
    `meprop.RuleSchedule`.

    Args:
        model: Any module; it may itself be a Linear.
        rule: What to keep, e.g. `meprop.TopK(0.05)`. None means `meprop.Sampled()`, whose results are close to those of
            dense training without a number to choose (docs/entries.md).
        filter: Called with (name, layer) for each layer that could be converted, narrow ones included. Those with a
            false answer stay as they are.
        min_features: Layers with fewer output features stay dense, since among few there is little to leave out. The
            output layer of a classifier, which is best kept exact, is mostly such a one; keep that of a language model
            exact by `filter`. LSTMs count hidden units, attention counts embed_dim. Convolutions repeat the work of
            each output channel at every position, and need half as many channels.
        sparse_grad: Make each weight.grad a sparse tensor of the kept rows. It is for unified top-k and other rules
            with scope "batch", or with scope "global" and no exact sum. Such layers are always sparse, as their
            optimizer counts on it. LSTMs stay dense: they choose anew at each time step, so that most rows of their
            weights get a gradient. Conv1D stays dense: its features are columns.
        compute_dtype: torch.bfloat16: linear layers and convolutions form their forward product in bfloat16, for which
            the weight is cast in each call. Weights, gradients and activations stay what they are. See
            `meprop.functional.linear`. LSTMs round their weights alone, and do so for all products of both passes. See
            `meprop.functional.lstm`.
        when: "auto": each layer measures at its first backward pass whether being sparse is faster than dense on this
            machine, for the number of rows that it then gets. An LSTM measures at its first forward pass. The layer
            stays with the answer. The cache folder ($MEPROP_CACHE) remembers it, so that later runs decide alike. While
            the gradients ask for more than pays, the layer is dense, and asks its rule now and then (docs/entries.md).
            Under torch.compile nothing can be measured: a layer that has not decided yet is sparse. "always": sparse
            without measuring. Layers with `meprop.distributed.SynchronizedTopK` are always sparse.
        fuse: Compute each `torch.nn.Dropout` in a `torch.nn.Sequential` in one pass with the ReLU, GELU or Tanh before
            it, in training. The Sequential becomes a `meprop.nn.Sequential`. Its modules stay what they are, and so do
            all names and the state_dict. The random numbers are others than torch's, of the same distribution.
            `meprop.functional.activation_dropout` says for which tensors that is. Functional dropout, as in
            `TransformerEncoderLayer`, stays torch's. False leaves what was fused before.

    Returns:
        A report; `print` it.

    Raises:
        TypeError: `model`, `rule`, `filter`, `min_features`, `sparse_grad` or `fuse` is of the wrong type.
        ValueError: `min_features` is below 1, `when` or `compute_dtype` is unknown, or `sparse_grad` does not go with
            the rule.
        NotSupportedError: the model, or a part of it, is wrapped in DistributedDataParallel, FSDP, DataParallel or
            torch.compile: convert before wrapping.

    Warns:
        NoEffectWarning: no layer back-propagates sparsely, or `fuse` found nothing to fuse.
        RuntimeWarning: layers on the CPU are sparse, and the compiled kernels are not there.
    """
    check_model(model)
    policy = Policy(Sampled() if rule is None else rule, sparse_grad, compute_dtype, when)
    check_flag("fuse", fuse)
    if filter is not None and not callable(filter):  # pyright: ignore[reportUnnecessaryComparison]
        kind = type(filter).__name__
        raise TypeError(
            f"filter={filter!r} is of type {kind}; it must be None or a function of (name, layer), such as "
            "lambda name, layer: 'head' not in name"
        )
    if isinstance(min_features, bool) or not isinstance(min_features, Integral):
        kind = type(min_features).__name__
        raise TypeError(f"min_features={min_features!r} is of type {kind}; it must be an int of at least 1")
    if min_features < 1:
        raise ValueError(f"min_features={min_features}; it must be at least 1")

    surroundings, layers = Surroundings.of(model), described_layers(model)
    reasons: list[str | None] = []
    for name, layer, descriptor in layers:
        reason = why_unfit(layer, descriptor, surroundings)
        if reason is None and filter is not None and not filter(name, layer):
            reason = "refused by the filter"
        reasons.append(reason or why_left_out(layer, descriptor, policy, surroundings, min_features))
    for (_, layer, descriptor), reason in zip(layers, reasons, strict=True):  # nothing has failed so far
        if reason is None:
            _take(layer, descriptor, policy)
        else:
            vars(layer)[_REASON] = reason
    if fuse:
        fuse_dropouts(model)

    result = report(model)
    if fuse and not result.fused:
        warnings.warn(
            "fuse=True changed nothing: no torch.nn.Sequential of the model has a torch.nn.Dropout",
            NoEffectWarning,
            stacklevel=2,
        )
    if not any(layer.status == "sparse" for layer in result.layers):
        warnings.warn(
            f"convert changed nothing that matters: no layer is sparse.\n{result}", NoEffectWarning, stacklevel=2
        )
    elif (missing := reason_missing()) is not None and any(each.is_cpu for each in model.parameters()):
        warnings.warn(
            f"{missing}. Until then sparse layers on the CPU run plain torch operations, which are mostly slower than "
            "dense: with when='auto' such layers stay dense.",
            RuntimeWarning,
            stacklevel=2,
        )
    return result


def revert(model: torch.nn.Module) -> None:
    """Makes every converted layer a plain `torch.nn` one again, in place, with the same Parameters.

    What was fused is torch's own again, too.

    Raises:
        TypeError: `model` is not a module.
        NotSupportedError: the model is wrapped (revert the module inside), or a layer is of a class that was derived
            from one of meprop.nn's.
    """
    check_model(model)
    layers = described_layers(model)
    for name, layer, descriptor in layers:
        if isinstance(layer, SparseLayer) and plain_kind(layer) is not descriptor.plain:
            plain = descriptor.plain.__name__
            raise NotSupportedError(
                f"layer {name!r} is a {type(layer).__name__}, a class derived from meprop.nn.{plain}, which cannot be "
                f"made plain; derive it from torch.nn.{plain}, or replace the layer"
            )
    for _, layer, descriptor in layers:
        make_plain(layer, descriptor)
    unfuse(model)


def make_plain(layer: torch.nn.Module, descriptor: Descriptor[Any]) -> None:
    """Makes a layer plain, if it was converted or waits for its shape."""
    vars(layer).pop(_REASON, None)
    _forget_hooks(layer)
    if _policy_of(layer) is not None:
        del vars(layer)["policy"]
        vars(layer).pop(_BECOMES, None)
    if isinstance(layer, SparseLayer):
        become(layer, descriptor.plain)


def plain_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the model, reverted: of plain `torch.nn` layers. Raises what `revert` does.

    A tensor that the model keeps from an earlier call is copied without its history.
    """
    model = deepcopy(model)
    revert(model)
    return model


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
    _check_type(model)
    layers = described_layers(model)
    policies = [policy for _, layer, _ in layers if (policy := _policy_of(layer)) is not None]
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
    return ConversionReport(tuple(records), tuple(notes), fused_in(model))


def likely_output(layers: Sequence[LayerReport]) -> LayerReport | None:
    """The layer that seems to give the model's outputs, if it is sparse: the last one, if it widens. None otherwise."""
    last = layers[-1] if layers else None
    return last if last is not None and last.status == "sparse" and last.out_features > last.in_features else None


def _take(layer: torch.nn.Module, descriptor: Descriptor[Any], policy: Policy) -> None:
    """Gives the layer the policy, and our class if it has torch's."""
    support_quantization()
    vars(layer).pop(_REASON, None)
    vars(layer)["policy"] = made = policy.of_layer()
    assert made.record is not None
    made.record.had_gradient = _has_gradient(layer)
    _note_first_gradient(layer, made.record)
    if isinstance(layer, LazyModuleMixin):
        vars(layer)[_BECOMES] = descriptor.sparse
    elif not isinstance(layer, SparseLayer):
        become(layer, descriptor.sparse)


def _has_gradient(layer: torch.nn.Module) -> bool:
    return any(parameter.grad is not None for parameter in layer.parameters())


def _note_first_gradient(layer: torch.nn.Module, record: Record) -> None:
    """Lets the record know when a parameter of the layer gets its first gradient. A later one costs nothing."""
    _forget_hooks(layer)
    handles = _gradient_hooks[layer] = list[RemovableHandle]()

    def note(_: Tensor) -> None:
        record.got_gradient = True
        for handle in handles:
            handle.remove()

    for each in layer.parameters():
        if not is_lazy(each) and each.is_leaf and each.requires_grad:
            handles.append(each.register_post_accumulate_grad_hook(note))


def _forget_hooks(layer: torch.nn.Module) -> None:
    for handle in _gradient_hooks.pop(layer, ()):
        handle.remove()


def _policy_of(layer: torch.nn.Module) -> Policy | None:
    """The policy that the layer has, or will have when it gets its shape."""
    return vars(layer)["policy"] if isinstance(layer, SparseLayer) or _BECOMES in vars(layer) else None


def described_layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module, Descriptor[Any]]]:
    """What could be converted, or is: each layer by name, with its descriptor."""
    described = [(name, module, descriptor_of(module)) for name, module in model.named_modules()]
    layers = [(name, module, descriptor) for name, module, descriptor in described if descriptor is not None]
    parts = {inner for _, layer, descriptor in layers for part in descriptor.parts(layer) for inner in part.modules()}
    return [(name, layer, descriptor) for name, layer, descriptor in layers if layer not in parts]


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

    policy = _policy_of(layer)
    if policy is None:
        return dense(None, vars(layer).get(_REASON, "not converted"))
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
    if _REASON in vars(layer):
        reason += f"; keeps {rule}: {vars(layer)[_REASON]}"
    if policy.measured_dense:
        return dense(rule, reason)
    density = rule.density(width)
    if not record.seen_sparse:
        evidence = record.left_to_torch or ("others had some" if trained else None)
        if record.got_gradient or (_has_gradient(layer) and not record.had_gradient):
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


def check_model(model: torch.nn.Module, remedy: str | None = None) -> None:
    """Raises the errors of `convert` that concern the model; `remedy` is what to do with a wrapped one, if not that."""
    _check_type(model)
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__module__.startswith("torch.") and cls.__name__ in _WRAPPERS:
                place = f"its part {name!r}" if name else "the model"
                remedy = remedy or f"call meprop.convert {_WRAPPERS[cls.__name__]}"
                raise NotSupportedError(f"{place} is a {cls.__name__}; {remedy}")


def _check_type(model: torch.nn.Module) -> None:
    if not isinstance(model, torch.nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model is of type {type(model).__name__}; it must be a torch.nn.Module")
