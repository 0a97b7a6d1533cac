"""Simplifier: counts which units are selected, chooses those that are removed, and removes them.

Source: Sun et al., "Training Simplification and Model Simplification for Deep Learning: A Minimal Effort Back
Propagation Method" (TKDE 2018, arXiv 1711.06528). The paper's code masks units. Here they are cut out of parameters,
gradients and the optimizer's state.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from meprop.convert import plain_copy
from meprop.errors import NoEffectWarning, NotSupportedError, check_counts
from meprop.nn.base import SparseLayer, described_layers, layer_descriptor
from meprop.pruning.arguments import (
    as_optimizers,
    check_bounds,
    check_kinds,
    read_state,
    why_all_would_go,
    why_not_covered,
)
from meprop.pruning.cutting import Cut, cut
from meprop.pruning.groups import Producer, entries, full_name, producers
from meprop.pruning.report import Check, LayerWidth, SimplificationReport
from meprop.pruning.trace import find
from meprop.record import Activity

_OF_MEAN = 0.5
_EVIDENCE = 10
"""How many hits `of_mean` of the mean must be at least for a layer's units to be judged."""


class Simplifier:
    """Removes units that are rarely among what back-propagation selects, while a converted model trains.

    Counting. A selected entry that is not zero hits its unit. Each converted layer counts in how many examples each
    unit is hit. In an LSTM each time step of each sequence is an example. A channel of a convolution is hit by an entry
    at any position.

    Checks. Every `check_every` steps, each unit that was hit too rarely is removed for good: less often than the share
    `of_mean` of the mean, which is the layer's hits divided by the number of units that it began with. With `threshold`
    the measure is the paper's, a share of the examples. Then the counts begin again. Cycles that prune alternate with
    cycles that only train. The first cycle follows `warmup` steps, and prunes. Everything is counted in steps, as a
    training loop may have no epochs. The paper's code checks 8 times per epoch. Its cycles have 5 of 20 epochs.

    Removing. The rows that compute a unit are removed (in an LSTM those of all gates), and the columns of all layers
    that read it. They are removed from parameters, gradients and the optimizer's state, in place. The smaller model
    computes what the larger one would if the unit's output, after activation and normalisation, were zero wherever it
    is read. The output of a saturated sigmoid is not zero, and back-propagation does not select it either: removing it
    loses something.

    Groups. Units that are added or multiplied entry by entry, as in a residual sum, are removed together: when they are
    hit too rarely in each of their layers. The layers and directions of one LSTM keep one width, the largest that
    any of them needs, as `torch.nn.LSTM` has one hidden_size. The model's outputs are never pruned. Neither are units
    that an unknown operation reads: `report` says why, and `meprop.pruning.handles` makes operations known. The graph
    is that of a call with `example_inputs`, or else with the arguments that have no default.

    Rules. A layer that keeps a share of its entries keeps that share of its new width. A layer that keeps at least as
    many entries as it has units keeps all, and the units hit by an entry that is not zero are counted.

    Make the Simplifier when the model is on its device. Load its state before the states of model and optimizer, as it
    cuts them to their size.

    Args:
        model: A model that `meprop.convert` has converted. Watched layers are always sparse. Their parameters stay the
            same objects.
        threshold: A share of the examples, from 0 to 1, for rules with a fixed number of entries in each row. Units
            that fewer examples hit are removed. With 0 nothing is removed, only counted. None for `of_mean`.
        of_mean: A share, from 0 to 1, of the mean number of hits. It is the sum of a layer's hits divided by the number
            of units that it began with. It is for every rule: the hits of a budget of noise get fewer as training goes
            on, and their mean with them. What is left of a layer shares the hits, so that removal ends. A layer is
            judged when this share of its mean is 10 hits or more. Until then it goes on counting. None for 0.5, or for
            `threshold` where that is given.
        optimizer: The optimizer of the model, whose state is cut too. A list if there are several. None only if there
            is none.
        check_every: Steps between checks.
        cycle: Steps of a cycle.
        warmup: Steps before the first cycle, in which nothing is removed. The activity of units in a model that has
            learned nothing yet says little about their later activity.
        max_removal: The largest share of its units that a layer loses at one check, the least active ones first. It may
            always lose one unit. With `threshold` the remaining units then share the k entries, so that their shares
            rise: with a small `max_removal`, removal ends at the widths where all units reach the threshold. With 1, as
            in the paper, the first check may remove far more.
        min_units: The number of units that a layer keeps in any case, the most active ones.
        example_inputs: Arguments for the model, which is run with them once, in evaluation mode, to see how many
            dimensions tensors have. Without them some units are not pruned: those that `torch.nn.BatchNorm1d` reads,
            and channels that are flattened, averaged or concatenated.

    Attributes:
        model: The model.
        steps: The number of steps so far.
        history: A record of each check.

    Raises:
        TypeError: `model` is not a module, or another argument has the wrong type.
        ValueError: An argument is out of range, both `threshold` and `of_mean` are given, the optimizer is another
            model's, or a parameter whose entries may be removed requires a gradient and is in none of the optimizers.
        NotSupportedError: The model is wrapped (DistributedDataParallel, FSDP, torch.compile), or there are several
            processes, which would prune differently.

    Warns:
        NoEffectWarning: Nothing can be pruned.
        UserWarning: `threshold` is above the share of the units that a rule keeps at every width. Or `of_mean` is used
            with such a rule, and `min_units` allows a width at which it keeps one entry.

    Example:
        >>> import torch, meprop
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 200), torch.nn.ReLU(), torch.nn.Linear(200, 2))
        >>> report = meprop.convert(model, meprop.TopK(10), when="always")
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> simplifier = meprop.Simplifier(model, optimizer=optimizer, check_every=20)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(32, 8)).square().sum().backward()
        ...     optimizer.step()
        ...     simplifier.step()
        >>> simplifier.compact()[0].out_features == simplifier.history[0].widths["0"] < 200
        True
    """

    def __init__(
        self,
        model: torch.nn.Module,
        threshold: float | None = None,
        *,
        of_mean: float | None = None,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        check_every: int = 500,
        cycle: int = 20_000,
        warmup: int = 0,
        max_removal: float = 1.0,
        min_units: int = 1,
        example_inputs: Sequence[Any] | None = None,
    ) -> None:
        check_kinds(model, example_inputs)
        check_bounds(threshold, of_mean, max_removal)
        check_counts(check_every=(check_every, 1), cycle=(cycle, 1), warmup=(warmup, 0), min_units=(min_units, 1))
        self.model, self.threshold = model, threshold
        self._optimizers = as_optimizers(optimizer, model)
        self.of_mean = _OF_MEAN if threshold is None and of_mean is None else of_mean
        self.check_every, self.cycle, self.warmup = int(check_every), int(cycle), int(warmup)
        self.max_removal, self.min_units = max_removal, int(min_units)
        self.steps = 0
        self.history: list[Check] = []
        self._units = find(model, example_inputs)
        if (reason := why_not_covered(self._removable(), self._optimizers)) is not None:
            raise ValueError(reason)
        self._alive = [torch.arange(group.width) for group in self._units.groups]
        self._group_of = {
            producer.label: number for number, group in enumerate(self._units.groups) for producer in group.producers
        }
        self._activities = self._watch()
        self._shares = {label: torch.full((len(a.hits),), torch.nan) for label, a in self._activities.items()}
        if all(group.reason is not None for group in self._units.groups):
            warnings.warn(f"nothing can be pruned\n{self.report()}", NoEffectWarning, stacklevel=2)
        elif reason := why_all_would_go(threshold, self.of_mean, min_units, self._watched_layers(), self._units.groups):
            warnings.warn(reason, stacklevel=2)

    def step(self) -> None:
        """Is to be called after each step of the optimizer. Every `check_every` calls it makes a check.

        Raises:
            NotSupportedError: A layer has been converted anew or reverted. Or something cannot be cut, which the
                message names: a tensor, its gradient, a state of an optimizer, a module's attributes, or a parameter
                that is in none of the optimizers any more. Then nothing has been changed, and the step is not counted.
                It may be called again when the cause is gone.

        Warns:
            UserWarning: The check would leave fewer than `min_units` units of a layer that has more.
        """
        steps = self.steps + 1
        if steps % self.check_every != 0:
            self.steps = steps
            return
        self._check_watched()
        shares = {
            label: activity.hits.cpu().double() / activity.examples for label, activity in self._activities.items()
        }
        waiting: set[str] = set()
        prunes = steps > self.warmup and (steps - self.warmup - 1) // self.cycle % 2 == 0
        self._cut(kept := self._choose(shares, waiting) if prunes else {})
        self.steps = steps
        for label, activity in self._activities.items():
            alive, share = self._alive_of(label), shares[label]
            self._shares[label] = torch.full_like(self._shares[label], torch.nan)
            self._shares[label][alive] = share[kept.get(self._group_of.get(label, -1), slice(None))].float()
            if label not in waiting:
                activity.reset()
        self.history.append(Check(self.steps, prunes, self.widths))

    @property
    def widths(self) -> dict[str, int]:
        """The number of units of each set now, by the set's label (see `Check`)."""
        return {label: len(self._alive_of(label)) for label in self._activities}

    @property
    def activity(self) -> dict[str, Tensor]:
        """The share of examples that hit each unit before the last check: float32 [O], by the set's label.

        O counts the units that the set began with. The share is NaN for removed units, and before the first check.
        """
        return {label: share.clone() for label, share in self._shares.items()}

    def report(self) -> SimplificationReport:
        """How wide each layer is now, and for each layer that cannot be pruned, why."""
        return SimplificationReport(
            tuple(self._describe(name, layer) for name, layer, _ in described_layers(self.model))
        )

    def compact(self) -> torch.nn.Module:
        """A copy of the model as it is now, with plain torch layers.

        Raises:
            NotSupportedError: A layer cannot be reverted: see `meprop.revert`.
        """
        return plain_copy(self.model)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue bit for bit, beside the states of model and optimizer.

        It consists of tensors and plain data only.
        """
        return {
            "steps": self.steps,
            "starts": [group.width for group in self._units.groups],
            "alive": [alive.clone() for alive in self._alive],
            "hits": {label: activity.hits.cpu().clone() for label, activity in self._activities.items()},
            "examples": {label: activity.examples for label, activity in self._activities.items()},
            "shares": self.activity,
            "history": [asdict(check) for check in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where the simplifier of an equal model was: cuts model and optimizer to the sizes they had there.

        Load the states of model and optimizer afterwards.

        Raises:
            ValueError: The state is damaged or that of another model, or has units that are removed here, or lacks
                units that cannot be pruned here. Nothing has been changed.
            NotSupportedError: For the reasons of `step`.
        """
        self._check_watched()
        starts = [group.width for group in self._units.groups]
        loaded = read_state(state, starts, self._shares, self._group_of)
        kept = {number: torch.isin(now, loaded.alive[number]) for number, now in enumerate(self._alive)}
        if any(int(kept[number].sum()) != len(then) for number, then in enumerate(loaded.alive)):
            raise ValueError("the state has units that are removed here; load it into a new model")
        cut = {number: mask.nonzero().flatten() for number, mask in kept.items() if not mask.all()}
        for number in cut:
            if (reason := self._units.groups[number].reason) is not None:
                label = self._units.groups[number].producers[0].label
                raise ValueError(f"the state lacks units of {label!r}, which cannot be pruned here: {reason}")
        hits = {label: hits.to(self._activities[label].hits.device) for label, hits in loaded.hits.items()}
        self._cut(cut)
        for label, activity in self._activities.items():
            activity.hits, activity.examples = hits[label], loaded.examples[label]
        self._shares, self.steps, self.history = loaded.shares, loaded.steps, loaded.history

    # ---- counting

    def _watch(self) -> dict[str, Activity]:
        """Lets each converted layer count, and so be sparse. Returns what they count into, by label."""
        activities: dict[str, Activity] = {}
        for name, layer in self._watched_layers():
            device = next(layer.parameters()).device
            own = {made.label: Activity.of_units(made.width, device) for made in producers(name, layer)}
            layer.when, layer.decision = "always", None
            layer.activity = tuple(own.values())
            activities |= own
        return activities

    def _watched_layers(self) -> list[tuple[str, Any]]:
        """The converted layers that make units."""
        return [
            (name, layer)
            for name, layer, descriptor in described_layers(self.model)
            if isinstance(layer, SparseLayer) and descriptor.unit_sets(layer)
        ]

    def _check_watched(self) -> None:
        watched: list[Activity] = []
        for _, layer in self._watched_layers():
            watched += layer.policy.activities
        for label, activity in self._activities.items():
            if all(activity is not each for each in watched):
                raise NotSupportedError(
                    f"layer {label!r} no longer counts for this Simplifier: it has been converted anew or reverted, or "
                    "another one was made; go on with that one, or make a new one"
                )

    def _alive_of(self, label: str) -> Tensor:
        """The units [n] that are left of a set, by their number at the start."""
        number = self._group_of.get(label)
        return torch.arange(len(self._activities[label].hits)) if number is None else self._alive[number]

    def _describe(self, name: str, layer: torch.nn.Module) -> LayerWidth:
        descriptor = layer_descriptor(layer)
        kind, width = descriptor.plain.__name__, descriptor.features(layer)[1]
        made = producers(name, layer)
        if not made:
            return LayerWidth(name, kind, width, width, "only linear layers, convolutions and LSTMs are")
        number = self._group_of.get(made[0].label)
        if number is None:
            return LayerWidth(name, kind, width, width, self._units.unreached)
        group = self._units.groups[number]
        return LayerWidth(name, kind, width, group.width, group.reason)

    # ---- removing

    def _choose(self, shares: dict[str, Tensor], waiting: set[str]) -> dict[int, Tensor]:
        """The places [n] of the units that stay, for each group that loses some.

        The labels of layers with too few hits to judge by are added to `waiting`.
        """
        name, bound = ("threshold", self.threshold) if self.of_mean is None else ("of_mean", self.of_mean)
        assert bound is not None  # one of the two is given
        of_layer: dict[str, dict[int, Tensor]] = {}  # the groups of one LSTM keep one width
        for number, group in enumerate(self._units.groups):
            if group.reason is None:
                of_each = torch.stack([shares[producer.label] for producer in group.producers])
                if self.of_mean is not None:
                    of_each *= group.width / of_each.sum(dim=1, keepdim=True)  # NaN where no unit is hit
                share = of_each.amax(dim=0)
                of_layer.setdefault(group.producers[0].layer, {})[number] = share
        kept: dict[int, Tensor] = {}
        for layer, of_group in of_layer.items():
            made = [each for number in of_group for each in self._units.groups[number].producers]
            if self.of_mean is not None and any(self._has_few_hits(each) for each in made):
                waiting |= {each.label for each in made}
                continue
            if any(share.isnan().any() for share in of_group.values()):  # no examples, or no hits: no evidence
                continue
            wanted = max(int((share >= bound).sum()) for share in of_group.values())
            width = len(next(iter(of_group.values())))
            least = min(self.min_units, width)
            count = max(wanted, least, width - max(1, int(self.max_removal * width)))
            if wanted < least == count < width:
                warnings.warn(
                    f"{name}={bound} would leave {wanted} of {width} units of layer {layer!r}: its "
                    f"min_units={least} most active ones are kept. Take a lower {name}",
                    stacklevel=3,
                )
            if count < width:
                for number, share in of_group.items():
                    kept[number] = share.argsort(descending=True, stable=True)[:count].sort().values
        return kept

    def _has_few_hits(self, made: Producer) -> bool:
        assert self.of_mean is not None
        least = self.of_mean * int(self._activities[made.label].hits.sum()) / made.width
        return 0 < least < _EVIDENCE

    def _cut(self, kept: dict[int, Tensor]) -> None:
        """Keeps of these groups only the units at these places [n]. If that fails, nothing has been changed."""
        cuts, modules = self._cuts(kept)
        if (reason := why_not_covered({each.name: each.tensor for each in cuts}, self._optimizers)) is not None:
            raise NotSupportedError(f"{reason}. Nothing has been changed")
        alive = {number: self._alive[number][places] for number, places in kept.items()}
        hits: dict[str, Tensor] = {}
        for number, places in kept.items():
            for producer in self._units.groups[number].producers:
                counted = self._activities[producer.label].hits
                hits[producer.label] = counted[places.to(counted.device)]
        cut(cuts, modules, self._optimizers)
        for number, units in alive.items():
            self._alive[number] = units
        for label, counted in hits.items():
            self._activities[label].hits = counted

    def _cuts(self, kept: dict[int, Tensor]) -> tuple[list[Cut], dict[str, torch.nn.Module]]:
        """What stays of each tensor of which something goes, and the modules of these tensors by name."""
        widths = [len(alive) for alive in self._alive]
        cuts: list[Cut] = []
        modules: dict[str, torch.nn.Module] = {}
        for (module, own), dims in self._units.layouts.items():
            layouts = {dim: layout for dim, layout in dims.items() if not kept.keys().isdisjoint(layout)}
            if layouts:
                modules[module], tensor = self._tensor(module, own)
                name = full_name(module, own)
                cuts.append(Cut(name, tensor, entries(layouts, widths, kept, tensor.shape, name)))
        return cuts, modules

    def _tensor(self, module: str, own: str) -> tuple[torch.nn.Module, Tensor]:
        """A module, and its tensor of this name.

        Raises:
            NotSupportedError: There is none. Nothing has been changed.
        """
        try:
            holder = self.model.get_submodule(module)
            tensor = getattr(holder, own)
        except AttributeError as error:
            tensor, holder = error, self.model
        if not isinstance(tensor, Tensor):
            raise NotSupportedError(
                f"{full_name(module, own)!r} is {tensor!r}, not a tensor. The model has been changed since the "
                "Simplifier was made, or a handler lays out what is not there. Nothing has been changed; make a new "
                "Simplifier"
            )
        return holder, tensor

    def _removable(self) -> dict[str, Tensor]:
        """The tensors that may lose entries, by name."""
        removable = {number for number, group in enumerate(self._units.groups) if group.reason is None}
        return {
            full_name(*name): self._tensor(*name)[1]
            for name, dims in self._units.layouts.items()
            if any(not removable.isdisjoint(layout) for layout in dims.values())
        }
