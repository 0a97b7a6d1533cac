"""The checks of what a Simplifier is given: its arguments, and a saved state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from meprop.convert import check_model
from meprop.errors import NotSupportedError
from meprop.pruning.cutting import Optimizers, parameters_of
from meprop.pruning.groups import Group
from meprop.pruning.report import Check
from meprop.rules import Rule


def check_kinds(model: Any, example_inputs: Any) -> None:
    """Checks the kinds of the model and of its inputs, and that there is one process."""
    if isinstance(model, torch.optim.Optimizer):
        raise TypeError(f"model is of type {type(model).__name__}; write Simplifier(model, optimizer=optimizer)")
    check_model(model, "simplify the module inside, unwrapped")
    if not isinstance(example_inputs, Sequence | None) or isinstance(example_inputs, str | bytes):
        kind = type(example_inputs).__name__
        raise TypeError(f"example_inputs is of type {kind}; it is a tuple of the model's arguments: (tensor,)")
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise NotSupportedError("several processes would count, and prune, differently; simplify in one")


def check_bounds(threshold: float | None, of_mean: float | None, max_removal: float) -> None:
    """Checks the shares."""
    for name, value in {"threshold": threshold, "of_mean": of_mean, "max_removal": max_removal}.items():
        if value is None and name != "max_removal":
            continue
        if isinstance(value, torch.optim.Optimizer):
            raise TypeError(f"{name} is of type {type(value).__name__}; write Simplifier(model, optimizer=optimizer)")
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; it is a share, a number from 0 to 1")
    if threshold is not None and of_mean is not None:
        raise ValueError(f"threshold={threshold} and of_mean={of_mean} are two measures; give one of them")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold}; it is a share of the examples, from 0 to 1")
    if of_mean is not None and not 0 <= of_mean <= 1:
        raise ValueError(f"of_mean={of_mean}; it is a share of a layer's mean number of hits, from 0 to 1")
    if not 0 < max_removal <= 1:
        raise ValueError(f"max_removal={max_removal}; it is a share of a layer's units, above 0 and at most 1")


def as_optimizers(optimizer: Any, model: torch.nn.Module) -> Optimizers:
    """The optimizers, and those inside of them that they wrap, as those of trainers do."""
    given = () if optimizer is None else tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
    if optimizer is not None and not given:
        raise ValueError(f"optimizer={optimizer!r}; it is an optimizer or several. Leave it out if there is none")
    for each in given:
        if not isinstance(each, torch.optim.Optimizer):
            kind = f"{type(optimizer).__name__}, with a {type(each).__name__}" * isinstance(optimizer, list | tuple)
            raise TypeError(
                f"optimizer is of type {kind or type(each).__name__}; it is a torch.optim.Optimizer, or a list of them"
            )
        if parameters_of([each]).isdisjoint(model.parameters()):
            raise ValueError("the optimizer has none of the model's parameters; give the one that trains it")
    return tuple(_with_inner(given))


def _with_inner(optimizers: Iterable[Any]) -> Iterable[torch.optim.Optimizer]:
    for each in optimizers:
        while isinstance(each, torch.optim.Optimizer):
            yield each
            each = getattr(each, "optimizer", None)


def why_not_covered(tensors: dict[str, Tensor], optimizers: Optimizers) -> str | None:
    """Why tensors cannot be cut: an optimizer that is not given may train them. None if they can be.

    Args:
        tensors: The tensors that are, or may be, cut, by name.
        optimizers: All that were given. Without one nothing is said, because then there is none.
    """
    own = parameters_of(optimizers)
    missing = [name for name, tensor in tensors.items() if tensor.requires_grad and tensor not in own]
    if not optimizers or not missing:
        return None
    others = f" and {len(missing) - 1} more" * (len(missing) > 1)
    return (
        f"units of parameter {missing[0]!r}{others} can be removed, and it is in none of the optimizers that were "
        "given. The state in another one would not be cut. Give all: Simplifier(model, optimizer=[first, second]). If "
        "nothing trains it, call requires_grad_(False) on it first"
    )


def why_all_would_go(
    threshold: float | None,
    of_mean: float | None,
    min_units: int,
    layers: Iterable[tuple[str, Any]],
    groups: Sequence[Group],
) -> str | None:
    """Why nearly all units of a layer would be removed, whose rule keeps a share; None if not, or nobody knows.

    A unit is hit by as large a share of the examples, on average, as the rule keeps of the units. Where that share is a
    fixed one, it does not rise when units go, so that a threshold above it is never reached. Under `of_mean` the rule
    then selects ever fewer units. Where the rule keeps a fixed number of entries, the remaining units share these. A
    unit of an LSTM is hit by the entries of four gates, and a channel of a convolution by those of all positions.

    Args:
        threshold: That of the Simplifier.
        of_mean: That of the Simplifier.
        min_units: That of the Simplifier.
        layers: The converted layers that make units, by name.
        groups: Of their units.
    """
    widths = {each.layer: group.width for group in groups if group.reason is None for each in group.producers}
    for name, layer in layers:
        rule: Rule = layer.rule
        if name not in widths:
            continue
        width = widths[name]
        kept, of_twice = rule.density(width), rule.density(2 * width)
        if kept is None or of_twice is None or of_twice < 0.75 * kept or kept == 1:
            continue
        advice = f"Give the rule a fixed number of entries, such as {max(1, round(kept * width))}, which the remaining "
        advice += "units share"
        entries = 1 if isinstance(layer, torch.nn.Linear) else 4 if isinstance(layer, torch.nn.LSTM) else None
        if threshold is not None and entries is not None and (hit := entries * kept) <= 1.05 * threshold:
            return (  # counts are rounded
                f"threshold={threshold} would remove nearly all units of layer {name!r}: its rule {rule} keeps "
                f"{kept:.1%} of the units, whatever their number, so that an average unit is hit by no more than "
                f"{hit:.1%} of the examples. {advice}; or take a threshold well below {hit:.2g}"
            )
        if of_mean and min_units * kept < 1:
            return (
                f"of_mean={of_mean} may remove nearly all units of layer {name!r}: its rule {rule} keeps {kept:.1%} of "
                f"the units, whatever their number, which is {kept * width:.0f} of {width} units now, and 1 of "
                f"{round(1 / kept)} later. {advice}; or a min_units of {round(1 / kept)} or more"
            )
    return None


@dataclass(frozen=True)
class SavedState:
    """What `Simplifier.state_dict` gives, checked; the tensors are copies.

    Attributes:
        steps: The number of steps.
        alive: The units [n] of each group that are left, by their number at the start.
        hits: By label, how often each unit that is left was hit [n].
        examples: By label, the number of examples.
        shares: By label, the activity at the last check [O].
        history: The checks.
    """

    steps: int
    alive: list[Tensor]
    hits: dict[str, Tensor]
    examples: dict[str, int]
    shares: dict[str, Tensor]
    history: list[Check]


def read_state(
    state: dict[str, Any], starts: list[int], shares: dict[str, Tensor], group_of: dict[str, int]
) -> SavedState:
    """A saved state.

    Args:
        state: What was saved.
        starts: The width that each group began with.
        shares: By label, the activity of the simplifier that loads it [O].
        group_of: The group of each label, if it is in one.

    Raises:
        ValueError: It is not one of a Simplifier, of another model's, or damaged.
    """
    try:
        is_of_this_model = state["starts"] == starts and state["hits"].keys() == shares.keys()
        read = SavedState(
            int(state["steps"]),
            [alive.clone() for alive in state["alive"]],
            {label: hits.clone() for label, hits in state["hits"].items()},
            {label: int(examples) for label, examples in state["examples"].items()},
            {label: share.float().clone() for label, share in state["shares"].items()},
            [Check(**check) for check in state["history"]],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the state is damaged, or not that of a simplifier: {error!r}") from error
    if not is_of_this_model:
        raise ValueError("the state is that of a simplifier of another model")
    if len(read.alive) != len(starts) or not read.shares.keys() == read.examples.keys() == shares.keys():
        raise ValueError("the state is damaged: it does not have all sets of units")
    for label, share in shares.items():
        number = group_of.get(label)
        left = len(share) if number is None else len(read.alive[number])
        if read.hits[label].shape != (left,) or read.shares[label].shape != share.shape:
            raise ValueError(f"the state is damaged: it has another number of units of {label!r} than it says")
    return read
