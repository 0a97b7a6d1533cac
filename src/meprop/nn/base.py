"""The base of all layers, and the descriptors that tell the rest of the library about each kind of layer.

A kind of layer has one file, with two classes. One is a subclass of torch's layer. The other is its `Descriptor`, which
`register` makes known. Everything else (`meprop.convert`, the reports, the Simplifier) loops over descriptors and knows
no layer.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from os.path import dirname
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar, cast

import torch
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from meprop.errors import NotSupportedError
from meprop.ops.registry import PLAIN
from meprop.policy import Policy, When
from meprop.record import Activity, Record
from meprop.rules import Rule
from meprop.speed import Decision

P = ParamSpec("P")
R = TypeVar("R")

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
"""The numbers of the groups of units that a dimension of a tensor consists of, one after the other.

The gates of an LSTM have the same group four times. If the dimension is longer than the groups, each unit has equally
many adjacent entries, like the positions of a flattened channel.
"""


class SparseLayer:
    """The base of each layer of `meprop.nn`. It adds a policy to torch's layer.

    The options of the policy can be read and set as attributes of the layer. A new value is checked as in the
    constructor.

    Attributes:
        policy: The whole policy.
        rule: What the backward pass keeps.
        sparse_grad: Whether the weight's gradient is row-sparse.
        compute_dtype: The dtype of the forward product. None means the dtype of the tensors.
            For an LSTM it is the dtype of the weights in all products.
        skip_zeros: Whether forward products of linear maps leave out zeros of the input, where that is faster.
        when: "always" for a layer that is always sparse, "auto" for one that is sparse only if that is measured to be
            faster.
        decision: With "auto", what was decided. None before that.
        activity: What a `meprop.Simplifier` counts. None without a Simplifier.
    """

    if TYPE_CHECKING:  # torch.jit.script would look for the type, and compile the properties
        policy: Policy

    _plain: type[Any] | None = None  # the class of another library, from `register` on
    _plain_methods: Mapping[str, Any] = {}  # its own forward pass, and what that calls

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Any:
        """Makes a layer, also for `pickle` and `copy`."""
        support_quantization()
        return super().__new__(cls)

    __jit_unused_properties__ = ("rule", "sparse_grad", "compute_dtype", "skip_zeros", "when", "decision", "activity")

    @property
    def rule(self) -> Rule:
        """What the backward pass keeps. It may be replaced between passes.

        The next pass asks the new rule. What was measured for the rule before stays. Set `decision` to None to let the
        layer measure anew. A `meprop.RuleSchedule` of the model goes on from a rule that is set here.
        """
        return self.policy.rule

    @rule.setter
    def rule(self, rule: Rule) -> None:
        self._change(rule=rule, own_rule=None)
        self._record().ask_again()

    @property
    def sparse_grad(self) -> bool:
        """Whether the weight's gradient is a sparse tensor of the kept rows."""
        return self.policy.sparse_grad

    @sparse_grad.setter
    def sparse_grad(self, sparse_grad: bool) -> None:
        self._change(sparse_grad=sparse_grad)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype of the forward product. None means the dtype of the tensors."""
        return self.policy.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, compute_dtype: torch.dtype | None) -> None:
        self._change(compute_dtype=compute_dtype)

    @property
    def skip_zeros(self) -> bool:
        """Whether forward products of linear maps leave out zeros of the input, where that is measured to be faster."""
        return self.policy.skip_zeros

    @skip_zeros.setter
    def skip_zeros(self, skip_zeros: bool) -> None:
        self._change(skip_zeros=skip_zeros)

    @property
    def when(self) -> When:
        """Whether the layer is always sparse, or only if that is measured to be faster."""
        return self.policy.when

    @when.setter
    def when(self, when: When) -> None:
        self._change(when=when)

    def _change(self, **options: Any) -> None:
        policy = replace(self.policy, **options)
        layer = cast("torch.nn.Module", self)
        descriptor = descriptor_of(layer)
        if policy.skip_zeros and not (descriptor and descriptor.skips_zeros):
            raise NotSupportedError(f"skip_zeros of a {type(self).__name__}; linear layers have this option")
        if descriptor is not None and (reason := descriptor.why_dense(layer, policy)) is not None:
            raise NotSupportedError(f"this {type(self).__name__} cannot have {options}: {reason}")
        self.policy = policy

    @property
    def decision(self) -> Decision | None:
        """With "auto", what was decided. None before that. Set it to None to let the layer decide anew."""
        return self.policy.decision

    @decision.setter
    def decision(self, decision: Decision | None) -> None:
        if not isinstance(decision, Decision | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"decision={decision!r} is of type {type(decision).__name__}; it is a Decision or None")
        self._record().decision = decision
        self._record().ask_again()

    @property
    def activity(self) -> Activity | tuple[Activity, ...] | None:
        """What a Simplifier counts. It is a tuple if the sets of units have names. None without a Simplifier."""
        activities = self.policy.activities
        is_one = len(activities) == 1 and layer_descriptor(cast("torch.nn.Module", self)).unit_sets(self) == ("",)
        return activities[0] if is_one else activities or None

    @activity.setter
    def activity(self, activity: Activity | tuple[Activity, ...] | None) -> None:
        activities = activity if isinstance(activity, tuple) else () if activity is None else (activity,)
        if not all(isinstance(each, Activity) for each in activities):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"activity={activity!r}; it is an Activity, a tuple of them, or None")
        self._record().activities = activities

    def _record(self) -> Record:
        assert self.policy.record is not None
        return self.policy.record


def leaf(forward: Callable[P, R]) -> Callable[P, R]:
    """Decorates a layer's forward pass, so that torch.fx puts a call of the layer into a graph, and looks not inside.

    Torch.fx treats torch's own layers like that, but goes by the name of their module. Where a call of the layer does
    more than this forward pass (a subclass, hooks), and where the layer itself is traced, torch's own forward pass
    goes into the graph instead.

    Where somebody replaced the forward pass of torch's class, or a method that it calls, the replacement runs.
    """

    @wraps(forward)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        layer, *inputs = args
        if replaced_method(type(layer), layer) is not None:
            return cast("Any", type(layer))._plain.forward(*args, **kwargs)
        if not (inputs and type(inputs[0]) in PLAIN) and "torch.fx" in sys.modules:
            proxies = (each for each in (*inputs, *kwargs.values()) if isinstance(each, torch.fx.Proxy))
            proxy = next(proxies, None)
            if proxy is not None and isinstance(tracer := proxy.tracer, torch.fx.Tracer):
                return cast("R", _traced(cast("torch.nn.Module", layer), tracer, inputs, kwargs))
        return forward(*args, **kwargs)

    return call


def replaced_method(sparse: Any, layer: Any = None) -> str | None:
    """The method of a class of ours, or of a layer of it, in whose place another one is. None if there is none.

    For the forward pass this is that of the plain class, because ours is another one in any case.
    """
    for name, own in sparse._plain_methods.items():
        if getattr(sparse._plain if name == "forward" else sparse, name) is not own:
            return name
        if name != "forward" and layer is not None and name in vars(layer):
            return name
    return None


def _traced(layer: torch.nn.Module, tracer: torch.fx.Tracer, inputs: list[Any], kwargs: dict[str, Any]) -> Any:
    descriptor = layer_descriptor(layer)
    hooks = layer._forward_hooks or layer._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]
    is_whole = type(layer).forward is descriptor.sparse.forward and "forward" not in vars(layer) and not hooks
    if is_whole and layer is not tracer.root:
        return tracer.create_proxy("call_module", tracer.path_of_module(layer), tuple(inputs), kwargs)
    return descriptor.plain.forward(layer, *inputs, **kwargs)


def refuse_script(layer: torch.nn.Module) -> torch.nn.Module:
    """Raises a NotSupportedError. `torch.jit.script` calls it under the name `__prepare_scriptable__`."""
    raise NotSupportedError(
        f"torch.jit.script of a {type(layer).__name__} of meprop; script a plain copy of the model, made by "
        "copy.deepcopy and meprop.revert"
    )


def sparse_repr(layer: SparseLayer) -> str:
    """What `extra_repr` adds to the text of torch's layer."""
    sparse_grad = ", sparse_grad=True" if layer.sparse_grad else ""
    compute_dtype = f", compute_dtype={layer.compute_dtype}" if layer.compute_dtype is not None else ""
    skip_zeros = ", skip_zeros=True" if layer.skip_zeros else ""
    return f", rule={layer.rule}{sparse_grad}{compute_dtype}{skip_zeros}"


Layer = TypeVar("Layer", bound=torch.nn.Module)


class Descriptor(Generic[Layer]):
    """What the rest of the library needs to know of one kind of layer.

    Attributes:
        plain: The class of another library whose instances are converted.
        sparse: The class of ours that they become, a subclass of `SparseLayer` and of `plain`.
        feature_name: The name of what `features` counts, in the plural.
        decides_in: The pass in which a layer with ``when="auto"`` measures.
        skips_zeros: Whether its forward product can leave out zeros of the input. Others do not get this option.
        methods: The methods of `plain` whose replacement runs in converted layers too: the forward pass, and what it
            calls that others are known to replace.
    """

    plain: type[Any]
    sparse: type[Any]
    feature_name: str = "output features"
    decides_in: Literal["forward", "backward"] = "backward"
    skips_zeros: bool = False
    methods: Sequence[str] = ("forward",)

    def features(self, layer: Layer) -> tuple[int, int]:
        """The number of features of the input, and of those among which a rule chooses."""
        raise NotImplementedError

    def why_dense(self, layer: Layer, policy: Policy) -> str | None:
        """Why a layer cannot have this policy. None if it can."""
        return None

    def why_narrow(self, layer: Layer, min_features: int) -> str | None:
        """Why a layer has too few features to gain from sparsity. None if it has enough."""
        _, width = self.features(layer)
        return f"narrow: {width} {self.feature_name}, min_features={min_features}" if width < min_features else None

    def depth(self, layer: Layer) -> int:
        """How many linear maps with an output gradient of their own an input passes through, one after the other."""
        return 1

    def parts(self, layer: Layer) -> Iterable[torch.nn.Module]:
        """Modules inside the layer that are not layers of their own, because it reads their weights itself."""
        return ()

    # ---- for pruning: which units the layer has, and how to cut them

    def unit_sets(self, layer: Layer) -> Sequence[str]:
        """The names of the sets of units that a layer makes, each with as many units as it has features.

        Most layers make one set, named "". `SparseLayer.activity` is then one `Activity`. With other names it is a
        tuple of them in this order. A layer without sets is not pruned, and units that it reads are not removed.
        """
        return ()

    def feature_dim(self, layer: Layer) -> int:
        """The dimension of input and output that has the features, counted from the last one."""
        return -1

    def layouts(self, layer: Layer, outputs: Layout, inputs: Layout) -> dict[str, dict[int, Layout]]:
        """What the dimensions of the layer's tensors consist of, by the tensor's name and then by the dimension.

        Args:
            layer: The layer.
            outputs: The groups of the layer's sets of units, in the order of `unit_sets`. The features of the output
                are these units, one set after the other. If they are not, register a handler for the layer with
                `meprop.pruning.handles`.
            inputs: The groups of the input's features. It is empty if they are not units that can be removed.
        """
        raise NotImplementedError

    def resize(self, layer: Layer) -> None:
        """Sets the sizes among the layer's attributes to those of its tensors, after they were cut."""
        raise NotImplementedError


_descriptors: list[Descriptor[Any]] = []
# Layers of optional libraries are known once the library is imported. No model can have them before.
_of_other_libraries = {"transformers.pytorch_utils": "meprop.nn.huggingface"}


def register(descriptor: Descriptor[Any]) -> None:
    """Makes a kind of layer known. Layers of this kind are then converted, reported and pruned.

    Raises:
        ValueError: The plain class has a descriptor already.
        TypeError: `descriptor` is not an instance of a Descriptor.
    """
    if not isinstance(descriptor, Descriptor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"register({descriptor!r}); it takes an instance of a subclass of meprop.nn.base.Descriptor")
    if any(descriptor.plain is each.plain for each in _descriptors):
        raise ValueError(f"{descriptor.plain.__qualname__} has a descriptor already")
    _descriptors.append(descriptor)
    descriptor.sparse._plain = descriptor.plain
    descriptor.sparse._plain_methods = {name: own_method(descriptor.plain, name) for name in descriptor.methods}


def own_method(plain: type[Any], name: str) -> Any:
    """A method of a class, as it is now. None for a class of torch that has one from elsewhere already."""
    method = getattr(plain, name)
    code = getattr(method, "__code__", None)
    from_torch = code is not None and code.co_filename.startswith(dirname(torch.__file__))
    return method if from_torch or not plain.__module__.startswith("torch.") else None


def unregister(descriptor: Descriptor[Any]) -> None:
    """Takes `register` back.

    Raises:
        ValueError: The descriptor is not registered.
    """
    if descriptor not in _descriptors:
        raise ValueError(f"{descriptor!r} is not registered")
    _descriptors.remove(descriptor)


def descriptors() -> Sequence[Descriptor[Any]]:
    """All known descriptors, in the order of their registration."""
    for library, module in _of_other_libraries.items():
        if library in sys.modules:
            importlib.import_module(module)
    return tuple(_descriptors)


def descriptor_of(module: torch.nn.Module) -> Descriptor[Any] | None:
    """The descriptor of a layer, or of the layer class that it is a subclass of. None for other modules."""
    every = descriptors()
    exact = (each for each in every if type(module) in (each.plain, each.sparse))
    return next(exact, None) or next((each for each in every if isinstance(module, each.plain)), None)


def described_layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module, Descriptor[Any]]]:
    """What could be converted, or is: each layer by name, with its descriptor."""
    described = [(name, module, descriptor_of(module)) for name, module in model.named_modules()]
    layers = [(name, module, descriptor) for name, module, descriptor in described if descriptor is not None]
    parts = {inner for _, layer, descriptor in layers for part in descriptor.parts(layer) for inner in part.modules()}
    return [(name, layer, descriptor) for name, layer, descriptor in layers if layer not in parts]


def layer_descriptor(layer: torch.nn.Module) -> Descriptor[Any]:
    """The descriptor of a layer.

    Raises:
        TypeError: The module is not a layer of a known kind.
    """
    descriptor = descriptor_of(layer)
    if descriptor is None:
        raise TypeError(f"{type(layer).__qualname__} has no descriptor; meprop.nn.base.register makes one known")
    return descriptor


def plain_kind(layer: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The plain class that a layer is of, is converted from, or will be of. None for subclasses and other modules.

    A parametrized layer counts as what it was before, and a lazy layer as what it becomes when it gets its shape.
    """
    kind = type(layer).cls_to_become if isinstance(layer, LazyModuleMixin) else type_before_parametrizations(layer)
    return next((each.plain for each in descriptors() if kind in (each.plain, each.sparse)), None)


def support_quantization() -> None:
    """Lets torch's quantization take layers of ours. Programs without such layers keep torch as it is."""
    importlib.import_module("meprop.integrations.quantization").support()


def become(layer: torch.nn.Module, cls: type[torch.nn.Module]) -> None:
    """Changes the class of a layer. A parametrized layer stays parametrized."""
    if is_parametrized(layer):  # torch has derived a class; copies of the layer share it, so it cannot change itself
        derived = {name: value for name, value in vars(type(layer)).items() if name != "__dict__"}
        cls = type(f"Parametrized{cls.__name__}", (cls,), derived)
    object.__setattr__(layer, "__class__", cls)
