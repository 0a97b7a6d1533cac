"""Why `meprop.convert` leaves a layer dense: each reason as a user reads it in the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]  (the base of all convolutions)
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from meprop.nn.base import Descriptor, SparseLayer, descriptor_of, plain_kind, replaced_method
from meprop.outputs import closure, outputs_of, sharing_memory
from meprop.policy import Policy

__all__ = ["Surroundings", "other_weights", "why_bypassed", "why_left_out", "why_unfit"]


@dataclass(frozen=True)
class Surroundings:
    """What the rest of a model has to do with a layer.

    Attributes:
        holders: Parameters that modules of other kinds hold (an embedding, say), and a name for the holder.
        output_parts: The layers that give the model's outputs, with all modules inside.
        output_weights: The parameters of these.
    """

    holders: Mapping[Tensor, str]
    output_parts: frozenset[torch.nn.Module]
    output_weights: frozenset[Tensor]

    @classmethod
    def of(cls, model: torch.nn.Module) -> Surroundings:
        """Looks at the whole model."""
        layers = [module for module in model.modules() if descriptor_of(module) is not None]
        inside = {part for layer in layers for part in layer.modules()}
        holders: dict[Tensor, str] = {
            parameter: f"{type(module).__name__} {name!r}"
            for name, module in model.named_modules()
            if module not in inside
            for parameter in module.parameters(recurse=False)
        }
        outputs = [each for module in model.modules() for each in outputs_of(module) if each is not model]
        parts = frozenset(part for each in outputs if isinstance(each, torch.nn.Module) for part in each.modules())
        weights: set[Tensor] = {each for each in outputs if isinstance(each, Tensor)}
        known = tuple(model.parameters())
        for each in weights - set(known):  # its data, or a part of a state_dict
            weights.update(sharing_memory(each, known))
        weights.update(parameter for part in parts for parameter in part.parameters(recurse=False))
        return cls(holders, parts, frozenset(weights))


def why_unfit(layer: torch.nn.Module, descriptor: Descriptor[Any], surroundings: Surroundings) -> str | None:
    """Why a layer cannot be converted, whatever the rule. None if it can."""
    plain, own = descriptor.plain, type(layer)
    if plain_kind(layer) is not plain and not isinstance(layer, SparseLayer):
        its_own = "" if own.forward is plain.forward else " with a forward pass of its own"
        return (
            f"{own.__name__} is a subclass of {plain.__name__}{its_own}, which convert does not know; "
            "meprop.nn.base.register makes it known"
        )
    if (reason := why_bypassed(layer, descriptor)) is not None:
        return reason
    for name, parameter in layer.named_parameters():
        if not parameter.is_floating_point():
            return f"its {name} is of dtype {parameter.dtype}, and only floating dtypes are supported"
        if parameter in surroundings.holders and _is_matrix(parameter):
            return f"its {name} is tied to {surroundings.holders[parameter]}"
    return None


def why_bypassed(layer: torch.nn.Module, descriptor: Descriptor[Any], seen_sparse: bool = False) -> str | None:
    """Why calls of the layer would not reach the forward pass of our class. None if they would.

    What replaced a forward pass, and cannot be seen through, counts by `seen_sparse`: whether the layer had a sparse
    backward pass.
    """
    ours = type(layer) if isinstance(layer, SparseLayer) else descriptor.sparse
    if (name := replaced_method(ours, layer)) is not None:
        on_instance = name != "forward" and name in vars(layer)
        whose = "its " if on_instance else f"{descriptor.plain.__module__}.{descriptor.plain.__qualname__}."
        return f"{whose}{name} was replaced, and what replaced it runs; put the original back, and convert again"
    replaced = vars(layer).get("forward")
    if replaced is None or _leads_to(replaced, ours.forward, layer):
        return None
    if seen_sparse and not _leads_to(replaced, descriptor.plain.forward, layer):
        return None
    return (
        "its forward was replaced on the instance, so that calls pass the sparse one by; "
        "convert before that (accelerate's hooks do it, for one), or take it off first"
    )


def _leads_to(found: Any, target: Any, layer: torch.nn.Module) -> bool:
    """Whether a callable is `target`, or holds it.

    A callable holds what is in its closure, default values and attributes, what functools.partial and functools.wraps
    put there, and the attributes of the layer and the global variables that it names.
    """
    seen: dict[int, Any] = {}
    waiting = [found]
    while waiting:
        each = waiting.pop()
        if getattr(each, "__func__", each) is target:
            return True
        if callable(each) and not isinstance(each, (type, torch.nn.Module)) and id(each) not in seen:
            seen[id(each)] = each
            waiting += _held_by(each, layer)
    return False


def _held_by(found: Any, layer: torch.nn.Module) -> Iterator[Any]:
    holder = getattr(found, "__self__", None)  # of a bound method
    function = getattr(found, "__func__", found)
    for each in (found, function, *(() if isinstance(holder, torch.nn.Module) else (holder,))):
        yield from getattr(each, "__dict__", {}).values()
    if isinstance(found, partial):
        yield from (found.func, *found.args, *found.keywords.values())
    if isinstance(function, FunctionType):
        yield from (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        for name in function.__code__.co_names:
            yield from (function.__globals__.get(name), vars(layer).get(name))
        yield from closure(function).values()


def why_left_out(
    layer: torch.nn.Module,
    descriptor: Descriptor[Any],
    policy: Policy,
    surroundings: Surroundings,
    min_features: int,
) -> str | None:
    """Why a layer that could be converted is not, with this policy and in this model. None if it is."""
    if layer in surroundings.output_parts:
        return "it gives the model's outputs"
    if any(parameter in surroundings.output_weights and _is_matrix(parameter) for parameter in layer.parameters()):
        return "its weight is tied to the layer that gives the model's outputs"
    if policy.sparse_grad and _computes_weights(layer):
        return "sparse_grad: its weight is computed from other parameters, whose gradients cannot be row-sparse"
    if (reason := descriptor.why_dense(layer, policy) or descriptor.why_narrow(layer, min_features)) is not None:
        return reason
    try:
        policy.rule.count(descriptor.features(layer)[1])
    except ValueError as error:  # it does not fit this width
        return str(error)
    return None


def _is_matrix(parameter: Tensor) -> bool:
    return is_lazy(parameter) or parameter.dim() >= 2


def _computes_weights(layer: torch.nn.Module) -> bool:
    """Whether a parametrization, or a hook as that of torch.nn.utils.weight_norm or prune, computes its weights."""
    return any(
        is_parametrized(part)
        or any(isinstance(each, Tensor) and not isinstance(each, torch.nn.Parameter) for each in vars(part).values())
        for part in layer.modules()
    )


def other_weights(module: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """The weights of a module that has no descriptor, which have a backward pass that stays dense.

    Returns:
        The numbers of input and output features, by the name of the weight. The name is "" for the weights of a layer
        of torch together. Weights that a module of another kind multiplies by itself, as experts of transformers
        do, have a name each. All dimensions but the last one count as output features.
    """
    if isinstance(module, (RNNBase, RNNCellBase)):
        return {"": (module.input_size, module.hidden_size)}
    if isinstance(module, _ConvNd):
        return {"": (module.in_channels, module.out_channels)}
    if isinstance(module, torch.nn.Bilinear):
        return {"": (module.in1_features * module.in2_features, module.out_features)}
    if isinstance(module, ParametrizationList):  # it is a part of a layer
        return {}
    own = module.named_parameters(recurse=False)
    held = {name: weight for name, weight in own if not is_lazy(weight) and weight.is_floating_point()}
    kind = type(module).__name__
    return {
        name: (weight.shape[-1], weight.numel() // weight.shape[-1])
        for name, weight in held.items()
        if weight.numel() > 0 and _is_multiplied(kind, name, weight)
    }


def _is_multiplied(kind: str, name: str, weight: Tensor) -> bool:
    """Whether a parameter looks like matrices that inputs are multiplied with, and not like a table or a bias."""
    if "Expert" in kind:
        return weight.dim() >= 2 and "bias" not in name
    other = "Norm" in kind or any(part in name for part in ("bias", "pos", "emb"))
    return weight.dim() == 3 and min(weight.shape) > 1 and not other
