"""meSimp: units that back-propagation hardly ever selects are removed, for good, while a model trains.

Sun et al., "Training Simplification and Model Simplification for Deep Learning" (TKDE 2018, arXiv 1711.06528). Theirs
masks units; here they are cut out of parameters, gradients and the optimizer's state.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from meprop import units
from meprop.convert import check_model, described_layers, plain_copy, table
from meprop.errors import NoEffectWarning, NotSupportedError
from meprop.nn.base import SparseLayer, descriptor_of

Convolution = torch.nn.Conv1d | torch.nn.Conv2d
features = lambda layer: descriptor_of(layer).features(layer)
kind_of = lambda layer: descriptor_of(layer).plain.__name__
named_layers = lambda model: [x[:2] for x in described_layers(model)]
from meprop.ops import memory_format
from meprop.policy import Activity


@dataclass(frozen=True)
class Check:
    """What a check found, and did.

    Attributes:
        step: After how many steps it was.
        prunes: Whether its cycle is one that prunes.
        widths: Units of each set, by its label, after the check: of a linear layer or a convolution, or of each layer
            and direction of an LSTM.
    """

    step: int
    prunes: bool
    widths: dict[str, int]


@dataclass(frozen=True)
class LayerWidth:
    """One layer of a model that is simplified.

    Attributes:
        name: Its name in the model.
        kind: "Linear", "LSTM", "Conv1d" or "Conv2d".
        width: Its output features, hidden units or output channels now.
        start: How many it began with.
        reason: Why none can be removed; None if they can.
    """

    name: str
    kind: str
    width: int
    start: int
    reason: str | None


@dataclass(frozen=True)
class SimplificationReport:
    """How wide each layer is; `print(report)` shows a table.

    Attributes:
        layers: One record for each linear layer, convolution and LSTM, in the model's order.
    """

    layers: tuple[LayerWidth, ...]

    def __str__(self) -> str:
        rows = [
            (
                layer.name or "(the model itself)",
                layer.kind,
                f"{layer.width} of {layer.start} ({layer.width / layer.start:.0%})",
                "can be pruned" if layer.reason is None else f"cannot be pruned: {layer.reason}",
            )
            for layer in self.layers
        ]
        return table([("layer", "kind", "width", "note"), *rows])


class Simplifier:
    """Removes units that are rarely among what back-propagation selects, while a converted model trains.

    Each converted layer counts in how many examples (LSTMs: time steps of examples) a unit has a selected entry that is
    not zero; of a convolution's channel, at any position. Every `check_every` steps a unit of which that share is below
    `threshold` is removed for good, and the counts begin again. Cycles that prune alternate with cycles that only
    train; the first one, after `warmup` steps, prunes.

    What is removed: the rows that make the unit, in all four gates of an LSTM, and in all layers that read it the
    columns; from parameters, gradients and the optimizer's state, in place. What is left computes what it would if the
    unit's output, after activation and normalisation, were zero wherever it is read. That of a saturated sigmoid, which
    back-propagation does not select either, was not zero: there something is lost.

    Units that are added or multiplied entry by entry, as in a residual sum, go together: where each of their layers has
    a share below the threshold. The layers and directions of one LSTM keep one width, the largest that any of them
    needs: `torch.nn.LSTM` has one hidden_size. The model's outputs are never pruned, nor is anything whose readers are
    not all understood: `report` says why. The graph is that of a call with `example_inputs`, else with the arguments
    that have no default. A layer that keeps a share of its entries keeps that share of its new width; one that keeps as
    many as it has units keeps all, of which those that are not zero are counted.

    Everything is counted in steps, as a training loop may have no epochs. The paper's code checks 8 times per epoch, in
    cycles of 5 of 20 epochs. Make it when the model is on its device, and load a state before those of model and
    optimizer, as it cuts them to their size.

    Args:
        model: A model that `meprop.convert` has converted. Watched layers are always sparse, and their parameters stay
            the same objects.
        threshold: A share of the examples, from 0 (nothing is removed, only counted) to 1.
        optimizer: That of the model, whose state is cut too; None only if it has none.
        check_every: Steps between checks.
        cycle: Steps of a cycle.
        warmup: Steps before the first cycle, in which nothing is removed: what the units of a model do that has learned
            nothing yet says little of what they will do.
        max_removal: The largest share of its units that a layer loses at one check, the least active ones; one unit it
            may always lose. What they no longer take of the k entries goes to the others, so that with a small share
            the last widths are those at which all units reach the threshold; with 1, the paper's way, a first check may
            remove far more.
        min_units: Units that a layer keeps at least, the most active ones.
        example_inputs: Arguments for the model. It is run with them once, in evaluation mode, to see how many
            dimensions tensors have; without, units that `torch.nn.BatchNorm1d` reads are not pruned, nor channels that
            are flattened, averaged or concatenated.

    Attributes:
        model: The model.
        steps: Steps so far.
        history: A record of each check.

    Raises:
        TypeError: `model` is not a module, or another argument of the wrong type.
        ValueError: An argument is out of range, or the optimizer another model's.
        NotSupportedError: The model is wrapped (DistributedDataParallel, FSDP, torch.compile), or there are several
            processes, which would prune differently.

    Warns:
        NoEffectWarning: Nothing can be pruned.

    Example:
        >>> import torch, meprop
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 200), torch.nn.ReLU(), torch.nn.Linear(200, 2))
        >>> report = meprop.convert(model, meprop.TopK(10), when="always")
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> simplifier = meprop.Simplifier(model, 0.1, optimizer=optimizer, check_every=20)
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
        threshold: float = 0.1,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        check_every: int = 500,
        cycle: int = 20_000,
        warmup: int = 0,
        max_removal: float = 1.0,
        min_units: int = 1,
        example_inputs: Sequence[Any] | None = None,
    ) -> None:
        check_model(model, "simplify the module inside, unwrapped")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold}; it is a share of the examples, from 0 to 1")
        if not 0 < max_removal <= 1:
            raise ValueError(f"max_removal={max_removal}; it is a share of a layer's units, above 0 and at most 1")
        least = {"check_every": 1, "cycle": 1, "warmup": 0, "min_units": 1}
        for (name, bound), value in zip(least.items(), (check_every, cycle, warmup, min_units), strict=True):
            if isinstance(value, bool) or not isinstance(value, int):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; it is an int")
            if value < bound:
                raise ValueError(f"{name}={value}; it must be at least {bound}")
        if not isinstance(example_inputs, Sequence | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            kind = type(example_inputs).__name__
            raise TypeError(f"example_inputs is of type {kind}; it is a tuple of the model's arguments: (tensor,)")
        if optimizer is not None:
            own = {id(parameter) for parameter in model.parameters()}
            if not any(id(each) in own for group in optimizer.param_groups for each in group["params"]):
                raise ValueError("the optimizer has none of the model's parameters; give the one that trains it")
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise NotSupportedError("several processes would count, and prune, differently; simplify in one")
        self.model, self.threshold, self.optimizer = model, threshold, optimizer
        self.check_every, self.cycle, self.warmup = check_every, cycle, warmup
        self.max_removal, self.min_units = max_removal, min_units
        self.steps = 0
        self.history: list[Check] = []
        self._units = units.find(model, example_inputs)
        self._alive = [torch.arange(group.width) for group in self._units.groups]
        self._group_of = {
            producer.label: number for number, group in enumerate(self._units.groups) for producer in group.producers
        }
        self._activities = self._watch()
        self._shares = {label: torch.full((len(a.hits),), torch.nan) for label, a in self._activities.items()}
        if all(group.reason is not None for group in self._units.groups):
            warnings.warn(f"nothing can be pruned\n{self.report()}", NoEffectWarning, stacklevel=2)

    def step(self) -> None:
        """To be called after each of the optimizer's steps; a check is made when it is time.

        Raises:
            NotSupportedError: A layer has been converted anew or reverted; or the optimizer has a state that is not of
                its parameter's shape, and cannot be cut. Nothing has been changed then.

        Warns:
            UserWarning: Fewer than `min_units` would be left, where that many are now.
        """
        self.steps += 1
        if self.steps % self.check_every != 0:
            return
        self._check_watched()
        shares = {
            label: activity.hits.cpu().double() / activity.examples for label, activity in self._activities.items()
        }
        prunes = self.steps > self.warmup and (self.steps - self.warmup - 1) // self.cycle % 2 == 0
        self._cut(kept := self._choose(shares) if prunes else {})
        for label, activity in self._activities.items():
            alive, share = self._alive_of(label), shares[label]
            self._shares[label] = torch.full_like(self._shares[label], torch.nan)
            self._shares[label][alive] = share[kept.get(self._group_of.get(label, -1), slice(None))].float()
            activity.reset()
        self.history.append(Check(self.steps, prunes, self.widths))

    @property
    def widths(self) -> dict[str, int]:
        """Units of each set now, by its label: of each layer, of an LSTM of each of its layers and directions."""
        return {label: len(self._alive_of(label)) for label in self._activities}

    @property
    def activity(self) -> dict[str, Tensor]:
        """Of the units that each set began with, the share of examples that hit them before the last check [O].

        Float32; NaN for those that are removed, and before the first check.
        """
        return {label: share.clone() for label, share in self._shares.items()}

    def report(self) -> SimplificationReport:
        """How wide each layer is now, and why it cannot be pruned, if so."""
        return SimplificationReport(tuple(self._describe(name, layer) for name, layer in named_layers(self.model)))

    def compact(self) -> torch.nn.Module:
        """A copy of the model as it is now, of plain torch layers.

        Raises:
            NotSupportedError: A layer cannot be reverted: see `meprop.revert`.
        """
        return plain_copy(self.model)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to continue bit for bit, beside the states of model and optimizer.

        Tensors and plain data only.
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
        """Continues where `state_dict` was taken, by a simplifier of an equal model: cuts model and optimizer to size.

        Load the states of model and optimizer afterwards.

        Raises:
            ValueError: The state is that of another model, or of one with units that are removed here.
            NotSupportedError: As `step`.
        """
        self._check_watched()
        if (
            state["starts"] != [group.width for group in self._units.groups]
            or state["hits"].keys() != self.widths.keys()
        ):
            raise ValueError("the state is that of a simplifier of another model")
        kept = {number: torch.isin(now, state["alive"][number]) for number, now in enumerate(self._alive)}
        if any(int(kept[number].sum()) != len(then) for number, then in enumerate(state["alive"])):
            raise ValueError("the state has units that are removed here; load it into a new model")
        cut = {number: mask.nonzero().flatten() for number, mask in kept.items() if not mask.all()}
        for number in cut:
            if (reason := self._units.groups[number].reason) is not None:
                label = self._units.groups[number].producers[0].label
                raise ValueError(f"the state lacks units of {label!r}, which cannot be pruned here: {reason}")
        self._cut(cut)
        for label, activity in self._activities.items():
            activity.hits.copy_(state["hits"][label])
            activity.examples = state["examples"][label]
        self._shares = {label: share.clone() for label, share in state["shares"].items()}
        self.steps, self.history = state["steps"], [Check(**check) for check in state["history"]]

    # ---- counting

    def _watch(self) -> dict[str, Activity]:
        """Lets each converted layer count, and so be sparse; returns what they count into, by label."""
        activities: dict[str, Activity] = {}
        for name, layer in named_layers(self.model):
            if isinstance(layer, SparseLayer) and isinstance(layer, units.Prunable):
                device = next(layer.parameters()).device
                own = {made.label: Activity.of_units(made.width, device) for made in units.producers(name, layer)}
                layer.when, layer.decision = "always", None
                layer.activity = tuple(own.values())
                activities |= own
        return activities

    def _check_watched(self) -> None:
        watched = {
            id(activity)
            for _, layer in named_layers(self.model)
            if isinstance(layer, SparseLayer) and isinstance(layer, units.Prunable)
            for activity in (layer.activity if isinstance(layer.activity, tuple) else (layer.activity,))
        }
        for label, activity in self._activities.items():
            if id(activity) not in watched:
                raise NotSupportedError(
                    f"layer {label!r} no longer counts for this Simplifier: it has been converted anew or reverted, or "
                    "another one was made; go on with that one, or make a new one"
                )

    def _alive_of(self, label: str) -> Tensor:
        """The units [n] that are left of a set, by their number at the start."""
        number = self._group_of.get(label)
        return torch.arange(len(self._activities[label].hits)) if number is None else self._alive[number]

    def _describe(self, name: str, layer: torch.nn.Module) -> LayerWidth:
        kind = kind_of(layer)
        if not isinstance(layer, units.Prunable):
            width = features(layer)[1]
            return LayerWidth(name, kind, width, width, "only linear layers, convolutions and LSTMs are")
        made = units.producers(name, layer)[0]
        number = self._group_of.get(made.label)
        if number is None:
            return LayerWidth(name, kind, made.width, made.width, self._units.unreached)
        group = self._units.groups[number]
        return LayerWidth(name, kind, made.width, group.width, group.reason)

    # ---- removing

    def _choose(self, shares: dict[str, Tensor]) -> dict[int, Tensor]:
        """The places [n] of the units to keep, of the groups that lose some."""
        of_layer: dict[str, dict[int, Tensor]] = {}  # groups that must have the same width: those of an LSTM
        for number, group in enumerate(self._units.groups):
            if group.reason is None:
                share = torch.stack([shares[producer.label] for producer in group.producers]).amax(dim=0)
                of_layer.setdefault(group.producers[0].layer, {})[number] = share
        kept: dict[int, Tensor] = {}
        for layer, of_group in of_layer.items():
            if any(share.isnan().any() for share in of_group.values()):  # no examples, no evidence
                continue
            wanted = max(int((share >= self.threshold).sum()) for share in of_group.values())
            width = len(next(iter(of_group.values())))
            least = min(self.min_units, width)
            count = max(wanted, least, width - max(1, int(self.max_removal * width)))
            if wanted < least == count < width:
                warnings.warn(
                    f"threshold={self.threshold} would leave {wanted} of {width} units of layer {layer!r}: its "
                    f"min_units={least} most active ones are kept. Take a lower threshold",
                    stacklevel=3,
                )
            if count < width:
                for number, share in of_group.items():
                    kept[number] = share.argsort(descending=True, stable=True)[:count].sort().values
        return kept

    def _cut(self, kept: dict[int, Tensor]) -> None:
        """Keeps of these groups only these places [n]."""
        widths = [len(alive) for alive in self._alive]
        cuts: dict[tuple[str, str], dict[int, Tensor]] = {}
        tensors: list[Tensor] = []
        for (module, name), dims in self._units.layouts.items():
            concerned = {dim: layout for dim, layout in dims.items() if not kept.keys().isdisjoint(layout)}
            if concerned:
                tensors.append(tensor := getattr(self.model.get_submodule(module), name))
                cuts[module, name] = {
                    dim: units.entries(layout, widths, kept, tensor.shape[dim]) for dim, layout in concerned.items()
                }
        if tensors and self.optimizer is not None:  # all of it: LBFGS keeps that of all parameters with one
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    _check_state(parameter, self.optimizer)
        for tensor, indices in zip(tensors, cuts.values(), strict=True):
            _cut_tensor(tensor, indices, self.optimizer)
        for module in {module for module, _ in cuts}:
            _update_sizes(self.model.get_submodule(module))
        for number, places in kept.items():
            self._alive[number] = self._alive[number][places]
            for producer in self._units.groups[number].producers:
                activity = self._activities[producer.label]
                activity.hits = activity.hits[places.to(activity.hits.device)]


def _check_state(tensor: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Refuses a state of which it is not known how it goes with its parameter."""
    state: dict[str, Any] = optimizer.state.get(tensor, {})
    for name, value in state.items():
        fits = not isinstance(value, list | tuple | dict)
        if isinstance(value, Tensor):
            fits = value.shape == (tensor.shape[:1] if name == "row_step" else tensor.shape) or value.numel() == 1
        if not fits:
            raise NotSupportedError(
                f"{type(optimizer).__name__} has a state {name!r} that is not of its parameter's shape "
                f"{list(tensor.shape)}, and cannot be cut with it; take another optimizer"
            )


def _cut_tensor(tensor: Tensor, indices: dict[int, Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    """Keeps of these dimensions only these entries, in place: also of gradient and optimizer's state."""

    def cut(each: Tensor) -> Tensor:
        form = None if each.is_sparse else memory_format(each)
        for dim, index in indices.items():
            each = each.index_select(dim, index.to(each.device))
        return each if form is None else each.contiguous(memory_format=form)

    if optimizer is not None:
        state: dict[str, Any] = optimizer.state.get(tensor, {})
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == tensor.shape:
                state[name] = cut(value)
            elif name == "row_step" and 0 in indices:
                state[name] = value[indices[0].to(value.device)]
    grad, tensor.grad = tensor.grad, None
    data = cut(tensor.detach())
    # Autograd remembers a parameter's shape while an older graph is alive, and forgets it with another dtype.
    tensor.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float16 else torch.float16)
    tensor.data = data
    tensor.grad = None if grad is None else cut(grad)


def _update_sizes(module: torch.nn.Module) -> None:
    """Makes a module's attributes those of its tensors."""
    if isinstance(module, torch.nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, torch.nn.LSTM):
        module.input_size = module.get_parameter("weight_ih_l0").shape[1]
        module.hidden_size = module.get_parameter("weight_hh_l0").shape[1]
        module.flatten_parameters()
    elif isinstance(module, Convolution):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
        module.num_features = len(next(tensor for tensor in (module.weight, module.running_mean) if tensor is not None))
