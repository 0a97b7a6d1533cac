"""Converting a model in place, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from meprop.copies import deepcopy
from meprop.errors import NoEffectWarning, NotSupportedError
from meprop.fusing import fuse as fuse_dropouts
from meprop.fusing import unfuse
from meprop.nn.base import Descriptor, SparseLayer, become, described_layers, plain_kind, support_quantization
from meprop.ops.native import reason_missing
from meprop.policy import Policy, When
from meprop.reasons import Surroundings, why_left_out, why_unfit
from meprop.record import Record
from meprop.report import BECOMES, REASON, ConversionReport, check_type, has_gradient, policy_of, report
from meprop.rules import Rule, Sampled
from meprop.rules.base import check_flag

Filter = Callable[[str, torch.nn.Module], bool]

# A wrapper holds references into the model that a change of class would pass by.
_WRAPPERS = {
    "DataParallel": "with when='always' before wrapping it in DataParallel",
    "DistributedDataParallel": "before wrapping it in DistributedDataParallel",
    "FullyShardedDataParallel": "before wrapping it in FullyShardedDataParallel",
    "FSDPModule": "before fully_shard",
    "OptimizedModule": "before torch.compile",
}

# The hooks that wait for the first gradient of each converted layer. They are not on the layer, as copies share none.
_gradient_hooks: WeakKeyDictionary[torch.nn.Module, list[RemovableHandle]] = WeakKeyDictionary()


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
    skip_zeros: bool = False,
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
        skip_zeros: Leave zeros of the input out of the forward products of linear layers, where so many entries are
            zero that this is measured to be faster. After a ReLU most are. See `meprop.functional.linear`. Other kinds
            of layers do not get the option.

    Returns:
        A report; `print` it.

    Raises:
        TypeError: `model`, `rule`, `filter`, `min_features`, `sparse_grad`, `fuse` or `skip_zeros` is of the
            wrong type.
        ValueError: `min_features` is below 1, `when` or `compute_dtype` is unknown, or `sparse_grad` does not go with
            the rule.
        NotSupportedError: the model, or a part of it, is wrapped in DistributedDataParallel, FSDP, DataParallel or
            torch.compile: convert before wrapping.

    Warns:
        NoEffectWarning: no layer back-propagates sparsely or may leave out zeros, or `fuse` found nothing to fuse.
        RuntimeWarning: layers on the CPU are sparse, and the compiled kernels are not there.
    """
    check_model(model)
    policy = Policy(Sampled() if rule is None else rule, sparse_grad, compute_dtype, when, skip_zeros)
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
            vars(layer)[REASON] = reason
    if fuse:
        fuse_dropouts(model)

    result = report(model)
    if fuse and not result.fused:
        warnings.warn(
            "fuse=True changed nothing: no torch.nn.Sequential of the model has a torch.nn.Dropout",
            NoEffectWarning,
            stacklevel=2,
        )
    if not result.skipping and not any(layer.status == "sparse" for layer in result.layers):
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
    vars(layer).pop(REASON, None)
    _forget_hooks(layer)
    if policy_of(layer) is not None:
        del vars(layer)["policy"]
        vars(layer).pop(BECOMES, None)
    if isinstance(layer, SparseLayer):
        become(layer, descriptor.plain)


def plain_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the model, reverted: of plain `torch.nn` layers. Raises what `revert` does.

    A tensor that the model keeps from an earlier call is copied without its history.
    """
    model = deepcopy(model)
    revert(model)
    return model


def _take(layer: torch.nn.Module, descriptor: Descriptor[Any], policy: Policy) -> None:
    """Gives the layer the policy, and our class if it has torch's."""
    support_quantization()
    vars(layer).pop(REASON, None)
    made = replace(policy, skip_zeros=policy.skip_zeros and descriptor.skips_zeros).of_layer()
    vars(layer)["policy"] = made
    assert made.record is not None
    made.record.had_gradient = has_gradient(layer)
    _note_first_gradient(layer, made.record)
    if isinstance(layer, LazyModuleMixin):
        vars(layer)[BECOMES] = descriptor.sparse
    elif not isinstance(layer, SparseLayer):
        become(layer, descriptor.sparse)


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


def check_model(model: torch.nn.Module, remedy: str | None = None) -> None:
    """Raises the errors of `convert` that concern the model; `remedy` is what to do with a wrapped one, if not that."""
    check_type(model)
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__module__.startswith("torch.") and cls.__name__ in _WRAPPERS:
                place = f"its part {name!r}" if name else "the model"
                remedy = remedy or f"call meprop.convert {_WRAPPERS[cls.__name__]}"
                raise NotSupportedError(f"{place} is a {cls.__name__}; {remedy}")
