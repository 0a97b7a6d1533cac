"""What the layers have in common, and what the rest of the library needs to know of each kind: its descriptor.

A layer is one file: the class, a subclass of torch's, and its `Descriptor`, which `register` makes known. Everything
else (`meprop.convert`, the reports, the Simplifier) is a loop over descriptors, and knows no layer.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Generic, Literal, TypeVar, cast

import torch

from meprop.errors import NotSupportedError
from meprop.policy import Activity, Policy, When
from meprop.rules import Rule
from meprop.speed import Decision

__all__ = [
    "Descriptor",
    "Layout",
    "SparseLayer",
    "descriptor_of",
    "descriptors",
    "layer_descriptor",
    "register",
    "sparse_repr",
    "unregister",
]


Layout = tuple[int, ...]
"""The groups of units that a dimension of a tensor consists of, one after the other, by their numbers: of an LSTM's
gates four times the same. Where the dimension is longer, each unit has equally many adjacent entries, as the positions
of a flattened channel."""


class SparseLayer:
    """What each layer of `meprop.nn` has beside a plain one: a policy.

    Its options can be read and set as attributes of the layer. They are checked as when it was made.

    Attributes:
        policy: All of it.
        rule: What the backward pass keeps.
        sparse_grad: Whether the weight's gradient is row-sparse.
        compute_dtype: In which the forward product is formed.
        when: "always" sparse, or "auto".
        decision: With "auto", what was decided; None before that.
        activity: What a `meprop.Simplifier` counts; None without one.
    """

    policy: Policy

    @property
    def rule(self) -> Rule:
        """What the backward pass keeps. It may be replaced between passes."""
        return self.policy.rule

    @rule.setter
    def rule(self, rule: Rule) -> None:
        self._change(rule=rule)

    @property
    def sparse_grad(self) -> bool:
        """Whether the weight's gradient is a sparse tensor of the kept rows."""
        return self.policy.sparse_grad

    @sparse_grad.setter
    def sparse_grad(self, sparse_grad: bool) -> None:
        self._change(sparse_grad=sparse_grad)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """In which the forward product is formed; None: in that of the tensors."""
        return self.policy.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, compute_dtype: torch.dtype | None) -> None:
        self._change(compute_dtype=compute_dtype)

    @property
    def when(self) -> When:
        """Whether the layer is always sparse, or only if measured to be faster."""
        return self.policy.when

    @when.setter
    def when(self, when: When) -> None:
        self._change(when=when)

    def _change(self, **options: Any) -> None:
        policy = replace(self.policy, **options)
        layer = cast("torch.nn.Module", self)
        descriptor = descriptor_of(layer)
        if descriptor is not None and (reason := descriptor.why_dense(layer, policy)) is not None:
            raise NotSupportedError(f"this {type(self).__name__} cannot have {options}: {reason}")
        self.policy = policy

    @property
    def decision(self) -> Decision | None:
        """With "auto", what was decided; None before that, which is how it is made to decide anew."""
        return self.policy.decision

    @decision.setter
    def decision(self, decision: Decision | None) -> None:
        assert self.policy.record is not None
        self.policy.record.decision = decision

    @property
    def activity(self) -> Activity | tuple[Activity, ...] | None:
        """What a Simplifier counts: one, or a tuple where the sets of units have names; None without one."""
        activities = self.policy.activities
        is_one = len(activities) == 1 and layer_descriptor(cast("torch.nn.Module", self)).unit_sets(self) == ("",)
        return activities[0] if is_one else activities or None

    @activity.setter
    def activity(self, activity: Activity | tuple[Activity, ...] | None) -> None:
        activities = activity if isinstance(activity, tuple) else () if activity is None else (activity,)
        assert self.policy.record is not None
        self.policy.record.activities = activities


def sparse_repr(layer: SparseLayer) -> str:
    """What `extra_repr` says beside torch's."""
    sparse_grad = ", sparse_grad=True" if layer.sparse_grad else ""
    compute_dtype = f", compute_dtype={layer.compute_dtype}" if layer.compute_dtype is not None else ""
    return f", rule={layer.rule}{sparse_grad}{compute_dtype}"


Layer = TypeVar("Layer", bound=torch.nn.Module)


class Descriptor(Generic[Layer]):
    """What the rest of the library needs to know of one kind of layer.

    Attributes:
        plain: The class of others that is converted.
        sparse: The class of ours that takes over its instances: a subclass of `SparseLayer` and of `plain`.
        feature_name: What `features` counts, in the plural.
        decides_in: In which pass a layer with ``when="auto"`` measures.
    """

    plain: type[Any]
    sparse: type[Any]
    feature_name: str = "output features"
    decides_in: Literal["forward", "backward"] = "backward"

    def features(self, layer: Layer) -> tuple[int, int]:
        """The features of its input, and those among which a rule chooses."""
        raise NotImplementedError

    def why_dense(self, layer: Layer, policy: Policy) -> str | None:
        """Why a layer cannot have this policy; None if it can."""
        return None

    def why_narrow(self, layer: Layer, min_features: int) -> str | None:
        """Why a layer has too few features to gain; None if it has enough."""
        _, width = self.features(layer)
        return f"narrow: {width} {self.feature_name}, min_features={min_features}" if width < min_features else None

    def policy(self, policy: Policy) -> Policy:
        """What of a policy such layers take."""
        return policy

    def parts(self, layer: Layer) -> Iterable[torch.nn.Module]:
        """Modules inside of it that are not layers of their own, since it reads their weights itself."""
        return ()

    # ---- for pruning: what its units are, and how to cut them

    def unit_sets(self, layer: Layer) -> Sequence[str]:
        """The names of the sets of units that a layer makes, each with as many units as it has features.

        Most layers make one set, named "". `SparseLayer.activity` is then one `Activity`, and with other names a tuple
        of them in this order. A layer without sets is not pruned, and units that it reads are not removed.
        """
        return ()

    def feature_dim(self, layer: Layer) -> int:
        """The dimension of its input and of its output that has the features, counted from the last one."""
        return -1

    def layouts(self, layer: Layer, outputs: Layout, inputs: Layout) -> dict[str, dict[int, Layout]]:
        """What the dimensions of its tensors consist of: by the tensor's name, then by the dimension.

        Args:
            layer: The layer.
            outputs: The groups of its sets of units, in the order of `unit_sets`. The features of its output are these
                units, one set after the other; where they are not, `meprop.pruning.handles` takes a handler for the
                layer.
            inputs: The groups of its input's features. It is empty if they are not units that can be removed.
        """
        raise NotImplementedError

    def resize(self, layer: Layer) -> None:
        """Makes its attributes those of its tensors, which were cut."""
        raise NotImplementedError


_descriptors: list[Descriptor[Any]] = []
# Layers of libraries that need not be there: known once the library is imported, as a model cannot have them before.
_of_other_libraries = {"transformers.pytorch_utils": "meprop.nn.huggingface"}


def register(descriptor: Descriptor[Any]) -> None:
    """Makes a kind of layer known: models that have it are converted, reported and pruned.

    Raises:
        ValueError: Its plain class has a descriptor already.
    """
    if any(descriptor.plain is each.plain for each in _descriptors):
        raise ValueError(f"{descriptor.plain.__qualname__} has a descriptor already")
    _descriptors.append(descriptor)


def unregister(descriptor: Descriptor[Any]) -> None:
    """Takes `register` back.

    Raises:
        ValueError: The descriptor is not registered.
    """
    if descriptor not in _descriptors:
        raise ValueError(f"{descriptor!r} is not registered")
    _descriptors.remove(descriptor)


def descriptors() -> Sequence[Descriptor[Any]]:
    """All that are known, in the order in which they became so."""
    for library, module in _of_other_libraries.items():
        if library in sys.modules:
            importlib.import_module(module)
    return tuple(_descriptors)


def descriptor_of(module: torch.nn.Module) -> Descriptor[Any] | None:
    """That of a layer, or of the class that it is a subclass of; None for other modules."""
    every = descriptors()
    exact = (each for each in every if type(module) in (each.plain, each.sparse))
    return next(exact, None) or next((each for each in every if isinstance(module, each.plain)), None)


def layer_descriptor(layer: torch.nn.Module) -> Descriptor[Any]:
    """That of a layer.

    Raises:
        TypeError: The module is no layer that is known.
    """
    descriptor = descriptor_of(layer)
    if descriptor is None:
        raise TypeError(f"{type(layer).__qualname__} has no descriptor; meprop.nn.base.register makes one known")
    return descriptor
