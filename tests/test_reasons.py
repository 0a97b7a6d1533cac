"""Why layers stay dense: tables of what hides a backward pass, of output layers, and of layers of other kinds."""

import copy
import functools
import pickle
import subprocess
import sys
import types
import warnings
import weakref
from dataclasses import dataclass

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import meprop

RULE = meprop.TopK(5, scope="batch")
LAYERS = {
    "Linear": (lambda: nn.Linear(8, 200), (3, 8)),
    "Conv1d": (lambda: nn.Conv1d(8, 200, 3), (2, 8, 9)),
    "Conv2d": (lambda: nn.Conv2d(8, 200, 3), (2, 8, 5, 5)),
    "LSTM": (lambda: nn.LSTM(8, 200), (4, 2, 8)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(160, 4), (4, 2, 160)),
}
of_each_layer = pytest.mark.parametrize("kind", LAYERS)


def make(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]
    return layer(), torch.randn(shape)


def call(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    output = layer(x, x, x) if isinstance(layer, nn.MultiheadAttention) else layer(x)
    return output[0] if isinstance(output, tuple) else output


def convert(model: nn.Module, rule: meprop.Rule = RULE, **options) -> meprop.ConversionReport:
    return meprop.convert(model, rule, **{"when": "always", **options})


def gradient(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The gradients of all parameters, one after the other."""
    call(layer, x).square().sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in layer.parameters()])


# ---- forward replaced on the instance


def by_a_closure(layer):
    forward = layer.forward
    layer.forward = lambda *args: forward(*args)


def by_a_partial(layer):
    layer.forward = functools.partial(layer.forward)


def by_a_wrapper(layer):
    layer.forward = functools.wraps(layer.forward)(
        functools.partial(lambda forward, *args: forward(*args), layer.forward)
    )


def by_a_method(layer):
    forward = layer.forward
    layer.forward = types.MethodType(lambda self, *args: forward(*args), layer)


def by_accelerate(layer):
    add_hook_to_module(layer, ModelHook())


def by_accelerate_twice(layer):
    add_hook_to_module(layer, ModelHook())
    add_hook_to_module(layer, ModelHook(), append=True)


class Holder:
    def __init__(self, forward):
        self.held = forward

    def __call__(self, *args):
        return self.held(*args)

    def run(self, *args):
        return self.held(*args)


def by_an_object(layer):
    layer.forward = Holder(layer.forward)


def by_a_method_of_an_object(layer):
    layer.forward = Holder(layer.forward).run


def by_a_default(layer):
    def forward(*args, held=layer.forward):
        return held(*args)

    layer.forward = forward


def by_an_attribute(layer):
    layer.before = layer.forward
    layer.forward = types.MethodType(lambda self, *args: self.before(*args), layer)


def by_a_global(layer):
    global held
    held = layer.forward
    layer.forward = lambda *args: held(*args)


WRAPS = [
    *(by_a_closure, by_a_partial, by_a_wrapper, by_a_method, by_accelerate, by_accelerate_twice),
    *(by_an_object, by_a_method_of_an_object, by_a_default, by_an_attribute, by_a_global),
]


@of_each_layer
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_forward_replaced_before_stays_torchs_and_the_report_says_so(kind, wrap):
    layer, x = make(kind)
    wrap(layer)
    with pytest.warns(meprop.NoEffectWarning):
        report = convert(layer, meprop.Sampled())
    assert report.layers[0].status == "dense"
    assert "its forward was replaced on the instance" in report.layers[0].reason
    assert report.density == 1.0
    call(layer, x).sum().backward()
    assert type(layer).__module__.startswith("torch.nn")


@of_each_layer
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_wrapped_forward_of_ours_stays_sparse_and_the_report_says_so(kind, wrap):
    layer, x = make(kind)
    convert(layer, meprop.Sampled(noise=1.0))
    wrap(layer)
    record = meprop.report(layer).layers[0]
    assert (record.status, record.reason) == ("sparse", "always")
    call(layer, x).sum().backward()
    assert layer.policy.record.passes > 0


@of_each_layer
def test_a_forward_put_in_the_place_of_ours_is_reported_and_may_be_taken_off(kind):
    layer, _ = make(kind)
    convert(layer, meprop.Sampled(noise=1.0))
    layer.forward = functools.partial(getattr(nn, kind).forward, layer)
    for report in (meprop.report(layer), meprop.report(copy.deepcopy(layer))):
        assert report.layers[0].status == "dense"
        assert "its forward was replaced on the instance" in report.layers[0].reason
        assert report.density == 1.0
    del layer.forward
    assert meprop.report(layer).layers[0].status == "sparse"


@of_each_layer
def test_what_cannot_be_seen_through_counts_by_the_passes_that_it_lets_through(kind):
    layer, x = make(kind)
    convert(layer, meprop.Sampled(noise=1.0))
    forwards = {id(layer): [layer.forward]}
    layer.forward = lambda *args: forwards[id(layer)][0](*args)
    assert "its forward was replaced on the instance" in meprop.report(layer).layers[0].reason
    call(layer, x).sum().backward()
    assert meprop.report(layer).layers[0].status == "sparse"
    layer.forward = functools.partial(getattr(nn, kind).forward, layer)
    assert meprop.report(layer).layers[0].status == "dense"


# ---- forward replaced on torch's class


def doubled(forward):
    def twice(self, *args):
        output = forward(self, *args)
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    return twice


@of_each_layer
def test_a_forward_of_torchs_class_that_is_replaced_before_runs_and_the_layer_stays_dense(kind, monkeypatch):
    layer, x = make(kind)
    monkeypatch.setattr(getattr(nn, kind), "forward", doubled(getattr(nn, kind).forward))
    expected = call(layer, x)
    with pytest.warns(meprop.NoEffectWarning):
        (record,) = convert(layer).layers
    assert record.status == "dense"
    assert f".{kind}.forward was replaced" in record.reason
    assert torch.equal(call(layer, x), expected)


@of_each_layer
def test_a_forward_of_torchs_class_that_is_replaced_later_runs_until_it_is_put_back(kind, monkeypatch):
    layer, x = make(kind)
    plain = copy.deepcopy(layer)
    convert(layer)
    with monkeypatch.context() as patch:
        patch.setattr(getattr(nn, kind), "forward", doubled(getattr(nn, kind).forward))
        assert torch.equal(call(layer, x), call(plain, x))
        gradients = [gradient(each, x) for each in (layer, plain)]
        assert torch.equal(*gradients)
        (record,) = meprop.report(layer).layers
        assert record.status == "dense"
        assert f".{kind}.forward was replaced" in record.reason
    call(layer, x).sum().backward()
    assert meprop.report(layer).layers[0].status == "sparse"


def test_a_forward_of_torchs_class_that_was_replaced_before_the_import_is_known():
    program = """
import torch
forward = torch.nn.Linear.forward
torch.nn.Linear.forward = lambda self, x: 2 * forward(self, x)
import meprop
layer = torch.nn.Linear(8, 200)
print(meprop.convert(layer).layers[0].reason)
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("torch.nn.modules.linear.Linear.forward was replaced")


CONVOLUTIONS = ["Conv1d", "Conv2d"]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("place", ["torch's class", "our class", "the layer"])
@pytest.mark.parametrize("first", ["convert", "replace"])
def test_a_method_that_torchs_forward_calls_runs_if_it_is_replaced_and_the_report_says_so(
    kind, place, first, monkeypatch
):
    layer, x = make(kind)
    plain = copy.deepcopy(layer)
    if first == "convert":
        convert(layer)
    twice = doubled(getattr(nn, kind)._conv_forward)
    with monkeypatch.context() as patch:
        if place == "the layer":
            for each in (layer, plain):
                patch.setattr(each, "_conv_forward", types.MethodType(twice, each), raising=False)
        else:
            patch.setattr(getattr(nn if place == "torch's class" else meprop.nn, kind), "_conv_forward", twice)
        if first == "replace":
            with pytest.warns(meprop.NoEffectWarning):
                convert(layer)
        (record,) = meprop.report(layer).layers
        assert record.status == "dense"
        assert "_conv_forward was replaced, and what replaced it runs" in record.reason
        if place != "our class":
            assert torch.equal(gradient(layer, x), gradient(plain, x))
        elif first == "convert":
            assert torch.equal(call(layer, x), 2 * call(plain, x))
    assert convert(layer).layers[0].status == "sparse"


# ---- calls that end elsewhere


def past(layer, *args):
    return getattr(nn, type(layer).__name__).forward(layer, *args)


def by_a_hook(layer, patch):
    layer.register_forward_hook(lambda module, args, output: past(module, *args))


def by_call_impl(layer, patch):
    layer._call_impl = functools.partial(past, layer)


def by_call_of_the_class(layer, patch):
    patch.setattr(type(layer), "__call__", past, raising=False)


def by_call_of_torchs_class(layer, patch):
    patch.setattr(type(layer).__mro__[2], "__call__", past, raising=False)


@of_each_layer
@pytest.mark.parametrize("how", [by_a_hook, by_call_impl, by_call_of_the_class, by_call_of_torchs_class])
def test_a_call_that_ends_elsewhere_takes_effect_and_the_report_says_so_after_the_first_step(kind, how, monkeypatch):
    layer, x = make(kind)
    convert(layer)
    how(layer, monkeypatch)
    optimizer = torch.optim.SGD(layer.parameters())
    call(layer, x).square().sum().backward()
    optimizer.zero_grad()
    (record,) = meprop.report(layer).layers
    assert record.status == "dense"
    assert "no sparse backward pass seen yet" in record.reason


def test_hooks_of_accelerate_that_are_taken_off_let_a_layer_be_converted():
    layer = nn.Linear(8, 200)
    add_hook_to_module(layer, ModelHook())
    with pytest.warns(meprop.NoEffectWarning):
        convert(layer)
    remove_hook_from_module(layer)
    assert "forward" in vars(layer)  # accelerate leaves the plain method on the instance
    del layer.forward
    assert convert(layer).layers[0].status == "sparse"
    assert accelerate.__version__


HOOKS = {
    "forward hook": lambda layer: layer.register_forward_hook(
        lambda module, args, output: (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2
    ),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(
        lambda module, args: tuple(each * 2 for each in args)
    ),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda *args: None),
}


@of_each_layer
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_torch_do_not_hinder(kind, hook):
    layer, x = make(kind)
    HOOKS[hook](layer)
    assert convert(layer, meprop.Sampled(noise=1.0)).layers[0].status == "sparse"
    call(layer, x.requires_grad_()).sum().backward()
    assert layer.policy.record.passes > 0


# ---- the output layer


class Wrapper(nn.Module):
    """As PEFT's lora.Linear and ModulesToSaveWrapper: it hands on what it does not have."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.lora_A, self.lora_B = nn.Linear(256, 128), nn.Linear(128, 512)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_layer, name)


class Language(nn.Module):
    def __init__(self, outputs, make_head=lambda: nn.Linear(256, 512)):
        super().__init__()
        self.body, self.lm_head = nn.Linear(64, 256), make_head()
        self.outputs = outputs

    def get_output_embeddings(self):
        return self.outputs(self)

    def predict(self, x):
        return self.lm_head(x).softmax(dim=-1)


def cycle(layer):
    found = [layer]
    found.append(found)
    return found


def raises(error):
    def outputs(model):
        raise error

    return outputs


HEADS = {
    "the layer": (lambda model: model.lm_head, lambda: nn.Linear(256, 512)),
    "a wrapper": (lambda model: model.lm_head, lambda: Wrapper(nn.Linear(256, 512))),
    "a wrapper in a wrapper": (lambda model: model.lm_head, lambda: Wrapper(Wrapper(nn.Linear(256, 512)))),
    "several layers": (lambda model: model.lm_head, lambda: nn.Sequential(nn.Linear(256, 300), nn.Linear(300, 512))),
    "a tuple": (lambda model: (None, model.lm_head), lambda: nn.Linear(256, 512)),
    "a list": (lambda model: [model.lm_head], lambda: Wrapper(nn.Linear(256, 512))),
    "a dict": (lambda model: {"lm": model.lm_head}, lambda: nn.Linear(256, 512)),
    "the weight": (lambda model: model.lm_head.weight, lambda: nn.Linear(256, 512)),
    "a view of the weight": (lambda model: model.lm_head.weight.t()[:8], lambda: nn.Linear(256, 512)),
    "a namespace": (lambda model: types.SimpleNamespace(base=[model.lm_head]), lambda: nn.Linear(256, 512)),
    "a bound method": (lambda model: model.lm_head.forward, lambda: nn.Linear(256, 512)),
    "a partial": (lambda model: functools.partial(model.lm_head), lambda: nn.Linear(256, 512)),
    "a partial with it": (lambda model: functools.partial(max, key=model.lm_head), lambda: nn.Linear(256, 512)),
    "a generator": (lambda model: (each for each in [model.lm_head]), lambda: nn.Linear(256, 512)),
    "values": (lambda model: {"lm": model.lm_head}.values(), lambda: Wrapper(nn.Linear(256, 512))),
    "a cycle": (lambda model: cycle(model.lm_head), lambda: nn.Linear(256, 512)),
    "a closure": (lambda model: (lambda head: lambda x: head(x))(model.lm_head), lambda: nn.Linear(256, 512)),
    "a closure of the model": (lambda model: lambda x: model.lm_head(x), lambda: Wrapper(nn.Linear(256, 512))),
    "a product": (
        lambda model: lambda x: x @ model.lm_head.weight.t() + model.lm_head.bias,
        lambda: nn.Linear(256, 512),
    ),
    "a function of it": (lambda model: lambda x: F.linear(x, model.lm_head.weight), lambda: nn.Linear(256, 512)),
    "a default": (lambda model: lambda x, head=model.lm_head: head(x), lambda: nn.Linear(256, 512)),
    "a method of the model": (lambda model: model.predict, lambda: nn.Linear(256, 512)),
    "a name": (lambda model: "lm_head", lambda: Wrapper(nn.Linear(256, 512))),
    "names": (
        lambda model: ["lm_head.0", "lm_head.1.weight"],
        lambda: nn.Sequential(*map(nn.Linear, (256, 256), (256, 512))),
    ),
    "a property": (lambda model: WithProperty(model), lambda: nn.Linear(256, 512)),
    "slots": (lambda model: WithSlots(model.lm_head), lambda: nn.Linear(256, 512)),
    "the data": (lambda model: model.lm_head.weight.data, lambda: nn.Linear(256, 512)),
    "a view of the data": (lambda model: model.lm_head.weight.data.t()[:8], lambda: nn.Linear(256, 512)),
    "detached": (lambda model: model.lm_head.weight.detach(), lambda: nn.Linear(256, 512)),
    "an entry of the state": (lambda model: model.state_dict()["lm_head.weight"], lambda: nn.Linear(256, 512)),
    "the state": (lambda model: model.lm_head.state_dict(), lambda: Wrapper(nn.Linear(256, 512))),
}


class WithProperty:
    def __init__(self, model):
        self.holder = weakref.ref(model)

    @property
    def again(self):  # each one is a new object
        return WithProperty(self.holder())

    @property
    def fails(self):
        raise OSError

    @property
    def weight(self):
        return self.holder().lm_head.weight


@dataclass(slots=True)
class WithSlots:
    layer: nn.Module


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("place", [lambda model: model, lambda model: nn.Sequential(model), Wrapper])
def test_every_part_of_what_gives_the_outputs_stays_dense(head, place):
    model = place(Language(*HEADS[head]))
    report = convert(model)
    layers = {layer.name.rpartition("body")[1] or layer.name: layer for layer in report.layers}
    assert layers.pop("body").status == "sparse"
    parts = [layer for name, layer in layers.items() if "lm_head" in name]
    assert {layer.status for layer in parts} == {"dense"}
    assert all("gives the model's outputs" in layer.reason for layer in parts)


@pytest.mark.parametrize(
    "outputs",
    [
        lambda model: None,
        lambda model: "head",
        lambda model: {"kind": "text"},
        lambda model: model,
        raises(NotImplementedError()),
        raises(KeyError()),
    ],
)
def test_a_model_that_names_no_output_layer_is_converted_whole(outputs):
    assert {layer.status for layer in convert(Language(outputs)).layers} == {"sparse"}


def test_a_method_of_the_model_itself_names_no_output_layer_and_an_iterator_that_it_keeps_is_not_used_up():
    inner = Language(lambda model: model.get_output_embeddings)
    assert {layer.status for layer in convert(nn.Sequential(inner)).layers} == {"sparse"}
    keeps = Language(lambda model: model.kept)
    keeps.kept = iter([keeps.lm_head])
    convert(keeps)
    assert next(keeps.kept) is keeps.lm_head


class NamesByProperty(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.lm_head = nn.Linear(64, 256), nn.Linear(256, 512)

    @property
    def get_output_embeddings(self):
        return self.lm_head


def test_a_property_may_be_the_output_layer():
    assert [layer.status for layer in convert(NamesByProperty()).layers] == ["sparse", "dense"]


def test_weights_beside_the_named_one_in_the_same_memory_are_converted():
    model = Language(lambda model: model.lm_head.weight.data)
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())  # all are parts of it from here on
    assert model.body.weight.untyped_storage().data_ptr() == model.lm_head.weight.untyped_storage().data_ptr()
    assert [layer.status for layer in convert(model).layers] == ["sparse", "dense"]


def test_layers_tied_to_the_output_layer_stay_dense_and_a_head_by_itself_does_not():
    model = Language(lambda model: model.lm_head, lambda: Wrapper(nn.Linear(256, 512)))
    model.twin = nn.Linear(256, 512)
    model.twin.weight = model.lm_head.base_layer.weight
    reasons = {layer.name: layer.reason for layer in convert(model).layers}
    assert reasons["twin"] == "its weight is tied to the layer that gives the model's outputs"
    assert {layer.status for layer in convert(model.lm_head).layers} == {"sparse"}


# ---- lazy layers


LAZY = {
    "Linear": (lambda: nn.LazyLinear(200), (3, 8)),
    "Conv1d": (lambda: nn.LazyConv1d(200, 3), (2, 8, 9)),
    "Conv2d": (lambda: nn.LazyConv2d(200, 3), (2, 8, 5, 5)),
}


@pytest.mark.parametrize("kind", LAZY)
@pytest.mark.parametrize(
    "duplicate", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_lazy_layer_takes_its_rule_when_it_gets_its_shape(kind, duplicate):
    model = nn.Sequential(LAZY[kind][0]())
    convert(model, meprop.TopK(3, scope="batch"))
    report = convert(model)
    record = report.layers[0]
    assert (record.kind, record.status, record.k) == (kind, "sparse", 5)
    assert record.reason == "takes its rule at its first forward pass, when it gets its shape"
    model, x = duplicate(model), torch.randn(LAZY[kind][1])
    model(x)
    assert type(model[0]) is getattr(meprop.nn, kind)
    assert meprop.report(model).layers[0].reason == "always"
    model(x).square().sum().backward()
    assert int((model[0].weight.grad.flatten(1) != 0).any(dim=1).sum()) == 5
    meprop.revert(model)
    assert vars(model[0]).keys() == vars(nn.Sequential(getattr(nn, kind)(8, 200, 3))[0]).keys()


@pytest.mark.parametrize("kind", LAZY)
def test_a_lazy_layer_reverted_refused_or_narrow_stays_torchs(kind):
    lazy, x = LAZY[kind][0], torch.randn(LAZY[kind][1])
    reverted, refused, narrow = (nn.Sequential(lazy()) for _ in range(3))
    convert(reverted)
    meprop.revert(reverted)
    with pytest.warns(meprop.NoEffectWarning):
        assert convert(refused, filter=lambda *_: False).layers[0].reason == "refused by the filter"
    with pytest.warns(meprop.NoEffectWarning):
        assert "narrow: 200" in convert(narrow, min_features=1000).layers[0].reason
    for model in (reverted, refused, narrow):
        model(x)
        assert type(model[0]) is getattr(nn, kind)


# ---- parametrized layers


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


PARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "own": lambda layer, name: parametrize.register_parametrization(layer, name, Doubled()),
}
NAMES = {"LSTM": "weight_hh_l0", "MultiheadAttention": "in_proj_weight"}


@of_each_layer
@pytest.mark.parametrize("how", PARAMETRIZED)
def test_a_parametrized_layer_is_converted_as_one_that_is_parametrized_later(kind, how):
    name, grads = NAMES.get(kind, "weight"), []
    for first in ("convert", "parametrize"):
        layer, x = make(kind)
        for act in sorted(("convert", "parametrize"), reverse=first == "parametrize"):
            if act == "convert":
                assert convert(layer).layers[0].status == "sparse"
            else:
                torch.manual_seed(1)
                PARAMETRIZED[how](layer, name)
        assert isinstance(layer, getattr(meprop.nn, kind))
        record = meprop.report(layer).layers[0]
        assert (record.kind, record.status, record.reason) == (kind, "sparse", "always")
        torch.manual_seed(2)
        grads.append(gradient(layer, x))
    assert torch.equal(*grads)


@of_each_layer
@pytest.mark.parametrize("how", PARAMETRIZED)
def test_parametrized_layers_are_reverted_copied_and_freed(kind, how):
    name = NAMES.get(kind, "weight")
    layer, x = make(kind)
    PARAMETRIZED[how](layer, name)
    twin, plain = copy.deepcopy(layer), getattr(nn, kind)
    convert(layer)
    assert not isinstance(twin, meprop.nn.base.SparseLayer)  # torch derives one class for a layer and its copies
    reverted = copy.deepcopy(layer)
    meprop.revert(reverted)
    assert parametrize.type_before_parametrizations(reverted) is plain
    assert not torch.equal(gradient(reverted.eval(), x), gradient(layer.eval(), x))
    parametrize.remove_parametrizations(reverted, name)
    assert type(reverted) is plain
    parametrize.remove_parametrizations(layer, name)
    assert type(layer) is getattr(meprop.nn, kind)


COMPUTED = {
    **PARAMETRIZED,
    "old weight_norm": torch.nn.utils.weight_norm,
    "old spectral_norm": torch.nn.utils.spectral_norm,
    "pruning": lambda layer, name: prune.random_unstructured(layer, name, 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "Conv2d"])
@pytest.mark.parametrize("how", COMPUTED)
def test_a_computed_weight_gets_no_row_sparse_gradients(kind, how):
    layer, x = make(kind)
    COMPUTED[how](layer, "weight")
    assert convert(layer).layers[0].status == "sparse"
    call(layer, x).sum().backward()
    meprop.revert(layer)
    with pytest.warns(meprop.NoEffectWarning):
        reason = convert(layer, sparse_grad=True).layers[0].reason
    assert reason.startswith("sparse_grad: its weight is computed")


# ---- subclasses, the filter, and what meprop does not know


class Unchanged(nn.Linear):
    pass


class Changed(nn.Linear):
    def forward(self, input):
        return super().forward(input)


def test_a_subclass_is_told_apart_by_its_own_forward():
    model = nn.Sequential(Unchanged(8, 200), Changed(8, 200), parametrizations.weight_norm(Unchanged(8, 200)))
    with pytest.warns(meprop.NoEffectWarning):
        reasons = [layer.reason for layer in convert(model).layers]
    ending = "which convert does not know; meprop.nn.base.register makes it known"
    assert reasons == [
        f"Unchanged is a subclass of Linear, {ending}",
        f"Changed is a subclass of Linear with a forward pass of its own, {ending}",
        f"ParametrizedUnchanged is a subclass of Linear, {ending}",
    ]


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(8, 20), nn.Conv2d(8, 20, 3, groups=2), nn.LSTM(8, 20, proj_size=3), nn.MultiheadAttention(20, 2)],
)
def test_a_refused_layer_is_blamed_for_nothing_else(layer):
    with pytest.warns(meprop.NoEffectWarning):
        assert convert(layer, filter=lambda *_: False).layers[0].reason == "refused by the filter"


OTHERS = {
    "GRU": (nn.GRU(3, 200), 3, 200),
    "RNN": (nn.RNN(3, 200), 3, 200),
    "LSTMCell": (nn.LSTMCell(3, 200), 3, 200),
    "GRUCell": (nn.GRUCell(3, 200), 3, 200),
    "RNNCell": (nn.RNNCell(3, 200), 3, 200),
    "Conv3d": (nn.Conv3d(3, 200, 1), 3, 200),
    "ConvTranspose1d": (nn.ConvTranspose1d(3, 200, 1), 3, 200),
    "ConvTranspose2d": (nn.ConvTranspose2d(3, 200, 1), 3, 200),
    "ConvTranspose3d": (nn.ConvTranspose3d(3, 200, 1), 3, 200),
    "LazyConv3d": (nn.LazyConv3d(200, 1), 0, 200),
    "Bilinear": (nn.Bilinear(3, 4, 200), 12, 200),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_layers_without_a_sparse_backward_pass_are_listed_and_count_as_dense(kind):
    other, inputs, outputs = OTHERS[kind]
    model = nn.Sequential(nn.Linear(12, 200), other, nn.Linear(200, 200))
    for report in (convert(model), meprop.report(model)):
        record = report.layers[1]
        assert (record.name, record.kind, record.in_features, record.out_features) == ("1", kind, inputs, outputs)
        assert (record.status, record.density, record.rule) == ("dense", 1.0, None)
        assert record.reason == f"meprop has no sparse backward pass for {kind}"
        sparse = (12 * 200 + 200 * 200) * 5 / 200
        assert report.density == pytest.approx((sparse + inputs * outputs) / ((12 + 200 + inputs) * 200))
    meprop.revert(model)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(3, *shape)) for shape in ((40, 8), (8, 20)))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(3, 40))
        self.count = nn.Parameter(torch.ones(2, 2, 2, dtype=torch.int64), requires_grad=False)


class Heads(nn.Module):
    """As in XLNet: the weights of heads are multiplied by einsum."""

    def __init__(self):
        super().__init__()
        self.q = nn.Parameter(torch.randn(8, 4, 5))
        self.pos_embedding, self.q_bias = nn.Parameter(torch.randn(4, 8, 5)), nn.Parameter(torch.randn(4, 8, 5))
        self.query = nn.Parameter(torch.randn(1, 8, 5))


HELD = {
    "Experts": (Experts, [("gate_up_proj", 8, 120), ("down_proj", 20, 24)]),
    "Heads": (Heads, [("q", 5, 32)]),
    "PReLU": (nn.PReLU, []),
    "LayerNorm": (lambda: nn.LayerNorm([3, 4, 5]), []),
    "Embedding": (lambda: nn.Embedding(30, 40), []),
    "ParameterList": (lambda: nn.ParameterList([torch.ones(3)]), []),
    "ConvTranspose1d": (lambda: parametrizations.weight_norm(nn.ConvTranspose1d(3, 200, 2)), [("", 3, 200)]),
}


@pytest.mark.parametrize("kind", HELD)
def test_weights_that_a_module_multiplies_without_a_layer_are_listed_and_count_as_dense(kind):
    make, expected = HELD[kind]
    model = nn.Sequential(nn.Linear(12, 200), make(), nn.Linear(200, 200))
    for report in (convert(model), meprop.report(model)):
        found = report.layers[1:-1]
        wanted = [(".".join(filter(None, ("1", name))), *sizes) for name, *sizes in expected]
        assert [(each.name, each.in_features, each.out_features) for each in found] == wanted
        assert all((each.status, each.density, each.rule) == ("dense", 1.0, None) for each in found)
        assert all("meprop has no sparse backward pass for" in each.reason for each in found)
        assert (report.density > 0.0251) == bool(expected)
    meprop.revert(model)


def test_experts_of_transformers_are_in_the_report():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_local_experts": 4, "num_hidden_layers": 1}
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    layers = {layer.name.partition("mlp.")[2]: layer for layer in convert(model).layers}
    found = [layers[f"experts.{name}"] for name in ("gate_up_proj", "down_proj")]
    assert [(each.kind, each.in_features, each.out_features, each.status) for each in found] == [
        ("MixtralExperts", 128, 4 * 512, "dense"),
        ("MixtralExperts", 256, 4 * 128, "dense"),
    ]


def test_without_native_code_convert_warns(monkeypatch):
    monkeypatch.setattr("meprop.ops.native._reason_missing", "no compiled extension; reinstall")
    for layer in (nn.Linear(8, 200), nn.LazyLinear(200)):
        with pytest.warns(RuntimeWarning, match="no compiled extension; reinstall.*when='auto' such layers stay dense"):
            meprop.convert(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(nn.Linear(8, 200, device="meta"))


class Weighted(nn.Module):
    """A wrapper in the place of a layer whose weight is read."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias


def test_a_layer_whose_weight_another_reads_is_part_of_that_one():
    layer = nn.MultiheadAttention(160, 4)
    layer.out_proj = Weighted(layer.out_proj)
    assert [(record.name, record.status) for record in convert(layer).layers] == [("", "sparse")]
    assert not isinstance(layer.out_proj.base_layer, meprop.nn.Linear)
    x = torch.randn(4, 2, 160)
    layer(x, x, x)[0].square().sum().backward()
    assert int((layer.out_proj.weight.grad != 0).any(dim=1).sum()) == 5
