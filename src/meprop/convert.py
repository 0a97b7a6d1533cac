"""Converting a model in place, and back; and the table that says what was done, and why not where it was not."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from meprop import copies, nn
from meprop.errors import NoEffectWarning, NotSupportedError
from meprop.functional import check_rule
from meprop.nn.conv import why_not_sparse
from meprop.nn.linear import SPARSE_STATE, SparseLayer, When, sparse_state
from meprop.rules import Rule

Filter = Callable[[str, torch.nn.Module], bool]
Convolution = torch.nn.Conv1d | torch.nn.Conv2d

# Plain class -> the class that takes over its instances. A layer keeps its identity: only its class changes, so that
# parameters, buffers, hooks and references to it stay what they are, and a root module can be converted too.
_SPARSE_CLASSES: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.Linear: nn.Linear,
    torch.nn.LSTM: nn.LSTM,
    torch.nn.Conv1d: nn.Conv1d,
    torch.nn.Conv2d: nn.Conv2d,
    torch.nn.MultiheadAttention: nn.MultiheadAttention,
}
_TRANSFORMERS = "transformers.pytorch_utils"


def _sparse_classes() -> dict[type[torch.nn.Module], type[torch.nn.Module]]:
    """With those for libraries that are imported already: a model cannot have layers of others."""
    if _TRANSFORMERS not in sys.modules:
        return _SPARSE_CLASSES
    from meprop.nn.huggingface import Conv1D, PlainConv1D

    return {**_SPARSE_CLASSES, PlainConv1D: Conv1D}


def _plain_classes() -> dict[type[torch.nn.Module], type[torch.nn.Module]]:
    return {sparse: plain for plain, sparse in _sparse_classes().items()}


# A wrapper holds references into the model that a change of class would pass by.
_WRAPPERS = {
    "DataParallel": "with when='always' before wrapping it in DataParallel",
    "DistributedDataParallel": "before wrapping it in DistributedDataParallel",
    "FullyShardedDataParallel": "before wrapping it in FullyShardedDataParallel",
    "FSDPModule": "before fully_shard",
    "OptimizedModule": "before torch.compile",
}

# On a layer that convert left as it was: why. Kept on the layer, so that meprop.report can say so later.
_REASON = "_meprop_left_alone"


@dataclass(frozen=True)
class LayerReport:
    """One layer of a model: what happens in its backward pass, and why.

    Attributes:
        name: Its name in the model, "" for the model itself.
        kind: The plain class's name, e.g. "Linear".
        in_features: I; of a convolution, its input channels.
        out_features: O, among which the rule chooses; of a convolution, its output channels; of an LSTM, the hidden
            units H, as it chooses within each gate; of attention E, as it chooses within each projection.
        status: "sparse" or "dense".
        k: How many of them are kept; None if dense.
        density: k / O; 1.0 if dense.
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
        """The share of the output gradients that is kept: the layers' mean, weighted by I x O; 1.0 without layers."""
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
                f"{layer.k} ({layer.density:.1%})" if layer.k is not None else "all",
                layer.reason,
            )
            for layer in self.layers
        ]
        sparse = sum(layer.status == "sparse" for layer in self.layers)
        count = f"{sparse} of {len(self.layers)} layers back-propagate sparsely"
        return "\n".join([table([head, *rows]), count, *self.notes])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def convert(
    model: torch.nn.Module,
    rule: Rule,
    *,
    filter: Filter | None = None,
    min_features: int = 128,
    sparse_grad: bool = False,
    compute_dtype: torch.dtype | None = None,
    when: When = "auto",
) -> ConversionReport:
    """Lets linear layers, convolutions, LSTMs and attention of a model back-propagate only what `rule` keeps. In place.

    Each `torch.nn.Linear` becomes a `meprop.nn.Linear`, and so do `Conv1d`, `Conv2d`, `LSTM`, `MultiheadAttention`
    (which `TransformerEncoderLayer` and its like consist of) and the `Conv1D` of Hugging Face's GPT-2: the same object
    with the same Parameters, so that optimizers, hooks and checkpoints go on as before. A layer that is already
    converted takes the new rule, or, where a plain one would stay dense, stays as it is, and the report says why. What
    stays dense is in the report with the reason: narrow layers, subclasses (whose own forward pass would be lost),
    LSTMs with projections, convolutions with groups and, with scope "example", those that are not pointwise, layers
    whose weight is tied to a module of another kind, the output layer of Hugging Face's models (to have it sparse,
    convert it by itself), and what `filter` refuses.

    Args:
        model: Any module; it may itself be a Linear.
        rule: What to keep, e.g. `meprop.TopK(0.05)`.
        filter: Called with (name, layer) for each layer that could be converted; those with a false answer stay as they
            are.
        min_features: Layers with fewer output features (LSTMs: hidden units; attention: embed_dim) stay dense: among
            few there is little to leave out, and the output layer of a classifier is best kept exact. That of a
            language model is wide: keep it exact by `filter`. Of convolutions, which repeat the work of each output
            channel at every position, those with fewer than half as many channels.
        sparse_grad: Make each weight.grad a sparse tensor of the kept rows; for rules with scope "batch". Such layers
            are always sparse, as their optimizer counts on it. LSTMs stay dense then: they choose anew at each time
            step, so that most rows of their weights get a gradient; so does Conv1D, of which features are columns.
        compute_dtype: torch.bfloat16: linear layers form their forward product in bfloat16, from a copy of the weight
            that is kept from step to step; weights, gradients and activations stay what they are. See
            `meprop.functional.linear`. Convolutions do so too, without keeping the copy. LSTMs take no part.
        when: "auto": at its first backward pass (an LSTM: forward pass) each layer measures, for the number of rows it
            then gets, whether being sparse is faster than dense on this machine, and stays with the answer; it is
            remembered in the cache folder ($MEPROP_CACHE), so that later runs decide alike. Under torch.compile, where
            nothing can be measured, a layer that has not decided yet is sparse. "always": sparse without asking; with
            `meprop.distributed.SynchronizedTopK` layers always are.

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
    check_rule(rule, sparse_grad, compute_dtype)
    if when not in get_args(When):
        raise ValueError(f"when={when!r}; it is 'auto' or 'always'")
    if min_features < 1:
        raise ValueError(f"min_features={min_features}; it must be at least 1")

    classes, foreign, heads = _sparse_classes(), _owners_of_other_kinds(model), _output_layers(model)
    for name, layer in named_layers(model):
        reason = _reason_to_skip(layer, rule, foreign, min_features, sparse_grad)
        if reason is None and layer in heads and layer is not model:
            reason = "it gives the model's outputs"
        if reason is None and filter is not None and not filter(name, layer):
            reason = "refused by the filter"
        if reason is not None:
            vars(layer)[_REASON] = reason
            continue
        vars(layer).pop(_REASON, None)
        layer_dtype = None if isinstance(layer, torch.nn.LSTM) else compute_dtype
        vars(layer).update(sparse_state(rule, sparse_grad, layer_dtype, when))
        _become(layer, classes.get(type(layer), type(layer)))

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
    classes = _plain_classes()
    for name, layer in named_layers(model):
        vars(layer).pop(_REASON, None)
        if type(layer) in classes:
            for attribute in SPARSE_STATE:
                vars(layer).pop(attribute)
            _become(layer, classes[type(layer)])
            for parameter in layer.parameters():
                copies.forget(parameter)
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
    layers = named_layers(model)
    records = tuple(_describe(name, layer) for name, layer in layers)
    notes: list[str] = []
    if records and (last := records[-1]).status == "sparse" and last.out_features > last.in_features:
        notes.append(f"If the last one, {last.name!r}, gives the model's outputs, rather leave it dense: use filter")
    rules = [layer.rule for _, layer in layers if isinstance(layer, SparseLayer)]
    by_example = any(rule.scope == "example" for rule in rules)
    if by_example and any(type(module).__name__.endswith(("LayerNorm", "RMSNorm")) for module in model.modules()):
        notes.append(
            "If its layers' outputs are summed, and normalised only where they are read (pre-norm, as in GPT), choose "
            "with scope='batch': with scope 'example' the sum grows, and it hardly learns (docs/transformers.md)"
        )
    return ConversionReport(records, tuple(notes))


def _become(layer: torch.nn.Module, cls: type[torch.nn.Module]) -> None:
    object.__setattr__(layer, "__class__", cls)


def named_layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """What could be converted, by name."""
    classes, modules = tuple(_sparse_classes()), dict(model.named_modules())
    # Attention reads the weight of its last projection, and never calls the layer.
    parts = {module.out_proj for module in modules.values() if isinstance(module, torch.nn.MultiheadAttention)}
    return [(name, module) for name, module in modules.items() if isinstance(module, classes) and module not in parts]


def _output_layers(model: torch.nn.Module) -> set[torch.nn.Module | None]:
    """Those that models in Hugging Face's manner, of which `model` may consist, say that they have."""
    found: set[torch.nn.Module | None] = set()
    for module in model.modules():
        with suppress(NotImplementedError):
            found.add(getattr(module, "get_output_embeddings", lambda: None)())
    return found


def kind_of(layer: torch.nn.Module) -> str:
    """The name of the plain class that it is of, or of a subclass of."""
    return next(cls.__name__ for cls in _sparse_classes() if isinstance(layer, cls))


def features(layer: Any) -> tuple[int, int]:
    """Of its input, and those among which a rule chooses."""
    if isinstance(layer, torch.nn.LSTM):
        return layer.input_size, layer.hidden_size
    if isinstance(layer, torch.nn.MultiheadAttention):
        return layer.embed_dim, layer.embed_dim
    if isinstance(layer, Convolution):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, torch.nn.Linear):
        return layer.in_features, layer.out_features
    return layer.nx, layer.nf


def _describe(name: str, layer: torch.nn.Module) -> LayerReport:
    kind = _plain_classes().get(type(layer), type(layer)).__name__
    inputs, width = features(layer)
    if not isinstance(layer, SparseLayer):
        reason = vars(layer).get(_REASON, "not converted")
        return LayerReport(name, kind, inputs, width, "dense", None, 1.0, None, reason)
    rule, k = layer.rule, layer.rule.count(width)
    if k >= width:
        return LayerReport(name, kind, inputs, width, "dense", None, 1.0, rule, f"{rule} keeps everything")
    if layer.decision is not None:
        reason = str(layer.decision)
    elif layer.when == "auto":
        reason = f"to be measured at its first {'forward' if kind == 'LSTM' else 'backward'} pass"
    else:
        reason = "always"
    if _REASON in vars(layer):
        reason += f"; keeps {rule}: {vars(layer)[_REASON]}"
    if layer.decision is not None and not layer.decision.sparse:
        return LayerReport(name, kind, inputs, width, "dense", None, 1.0, rule, reason)
    return LayerReport(name, kind, inputs, width, "sparse", k, k / width, rule, reason)


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


def _owners_of_other_kinds(model: torch.nn.Module) -> dict[torch.Tensor, str]:
    """Parameters that modules other than such layers hold (an embedding, say), and a name for the holder."""
    kinds = tuple(_sparse_classes())
    return {
        parameter: f"{type(module).__name__} {name!r}"
        for name, module in model.named_modules()
        if not isinstance(module, kinds)
        for parameter in module.parameters(recurse=False)
    }


def _reason_to_skip(
    layer: torch.nn.Module, rule: Rule, foreign: dict[torch.Tensor, str], min_features: int, sparse_grad: bool
) -> str | None:
    kind = kind_of(layer)
    if type(layer) not in _sparse_classes() and type(layer) not in _plain_classes():
        return f"{type(layer).__name__} is a subclass of {kind} with a forward pass of its own"
    for parameter in layer.parameters():
        if not parameter.is_floating_point():
            return f"its weight is of dtype {parameter.dtype}"
        if parameter.dim() >= 2 and parameter in foreign:
            return f"its weight is tied to {foreign[parameter]}"
    _, width = features(layer)
    what = "output features"
    if isinstance(layer, torch.nn.LSTM):
        what = "hidden units"
        if layer.proj_size > 0:
            return f"it has projections (proj_size={layer.proj_size})"
        if sparse_grad:
            return "sparse_grad: an LSTM chooses anew at each time step"
        if rule.communicates:
            return "the rule would have to wait for other processes at each time step"
    if sparse_grad and kind == "Conv1D":
        return "sparse_grad: the output features of its weight are columns, not rows"
    if isinstance(layer, Convolution):
        if 2 * width < min_features:
            return f"narrow: {width} output channels, less than half of min_features={min_features}"
        if (reason := why_not_sparse(layer, rule)) is not None:
            return reason
    elif width < min_features:
        return f"narrow: {width} {what}, min_features={min_features}"
    try:
        rule.count(width)
    except ValueError as error:  # it does not fit this width
        return str(error)
    return None
