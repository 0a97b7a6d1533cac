"""Handlers of one's own: units are followed, and cut, through operations that meprop does not know."""

import doctest
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meprop
from meprop.nn.base import Descriptor, register, unregister
from meprop.pruning import Call, Value, elementwise, handlers, handles, remove_handler
from prunable import RULE, WIDTH, Calls, quietly


class Scale(nn.Module):
    """A number for each feature."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features, self.weight = features, nn.Parameter(torch.rand(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def bounded(x: Tensor) -> Tensor:
    """No function that meprop knows, and torch.fx could not look into it."""
    return x if float(x.detach().max()) < 0.1 else x.clamp(max=0.1)


@contextmanager
def handled(operation: Any, handler: Any, **options: Any) -> Iterator[None]:
    handles(operation, **options)(handler)
    try:
        yield
    finally:
        remove_handler(operation)


def scale(call: Call) -> Value:
    x = call.read(-1)
    call.lay_out({"weight": {0: x.groups}})
    return x


def resize_scale(module: Scale) -> None:
    module.features = len(module.weight)


def check_units_are_removed(model: nn.Module, x: Tensor) -> None:
    """Removes those of layer `a` that were not selected; what is left is the model that never read them."""
    simplifier = meprop.Simplifier(model, 0.9, check_every=1, example_inputs=(x,))
    model(x).square().sum().backward()
    active = model.a.activity.hits >= 0.9 * len(x)
    assert 0 < active.sum() < WIDTH
    with torch.no_grad():
        model.a.weight *= active[:, None]
        model.a.bias *= active
    masked = model(x)
    simplifier.step()
    assert simplifier.widths["a"] == active.sum()
    torch.testing.assert_close(model(x), masked)


def converted(forward: Any, **modules: nn.Module) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Calls(forward, **modules)
    del model.b
    meprop.convert(model, meprop.TopK(5, scope="batch"), min_features=10, when="always")
    return model, torch.randn(8, 6)


def test_units_are_removed_through_a_module_with_a_handler():
    model, x = converted(lambda m, x: m.head(m.scale(m.a(x))), scale=Scale(WIDTH))
    assert "reads it, which is not understood" in quietly(model).report().layers[0].reason
    with handled(Scale, scale, resize=resize_scale):
        check_units_are_removed(model, x)
    assert len(model.scale.weight) == model.scale.features < WIDTH


def test_units_are_removed_through_a_function_with_a_handler():
    model, x = converted(lambda m, x: m.head(bounded(m.a(x))))
    assert "cannot trace the model" in quietly(model).report().layers[0].reason
    with handled(bounded, elementwise):
        check_units_are_removed(model, x)


def test_units_are_removed_through_a_method_with_a_handler():
    model, x = converted(lambda m, x: m.head(m.a(x).clamp(-1, 1)))
    assert "'.clamp()' reads it" in quietly(model).report().layers[0].reason
    with handled("clamp", elementwise):
        check_units_are_removed(model, x)


def test_a_handler_is_gone_once_it_is_removed():
    model, _ = converted(lambda m, x: m.head(m.a(x).clamp(-1, 1)))
    with handled("clamp", elementwise):
        assert quietly(model).report().layers[0].reason is None
    assert "'.clamp()' reads it" in quietly(model).report().layers[0].reason


def test_a_handler_is_not_that_of_subclasses():
    class Louder(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flip(-1)

    model, _ = converted(lambda m, x: m.head(m.scale(m.a(x))), scale=Louder(WIDTH))
    with handled(Scale, scale):
        assert "reads it, which is not understood" in quietly(model).report().layers[0].reason


def test_hooks_on_a_module_with_a_handler_are_not_trusted():
    model, _ = converted(lambda m, x: m.head(m.scale(m.a(x))), scale=Scale(WIDTH))
    model.scale.register_forward_hook(lambda module, args, output: output.flip(-1))
    with handled(Scale, scale):
        assert "'scale' has forward hooks" in quietly(model).report().layers[0].reason


def test_a_second_handler_is_refused():
    with pytest.raises(ValueError, match=r"relu.* has a handler already; call remove_handler first"):
        handles("softmax", "relu")(elementwise)
    with pytest.raises(KeyError, match="softmax"):  # so nothing was registered
        remove_handler("softmax")


class Transposed(nn.Module):
    """A linear layer whose weight is [I, O]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.weight = inputs, nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class TransposedDescriptor(Descriptor[Transposed]):
    plain, sparse = Transposed, type("SparseTransposed", (Transposed,), {})

    def features(self, layer: Transposed) -> tuple[int, int]:
        return layer.weight.shape[0], layer.weight.shape[1]

    def unit_sets(self, layer: Transposed) -> tuple[str, ...]:
        return ("",)

    def layouts(self, layer: Transposed, outputs: Any, inputs: Any) -> dict[str, dict[int, Any]]:
        return {"weight": {0: inputs, 1: outputs}}

    def resize(self, layer: Transposed) -> None:
        layer.inputs = len(layer.weight)


def test_a_layer_is_understood_by_its_descriptor():
    model, x = converted(lambda m, x: m.head(m.own(m.a(x))), own=Transposed(WIDTH, WIDTH))
    register(descriptor := TransposedDescriptor())
    try:
        check_units_are_removed(model, x)
    finally:
        unregister(descriptor)
    assert model.own.inputs < WIDTH == model.head.in_features


class TwoSets(TransposedDescriptor):
    def features(self, layer: Transposed) -> tuple[int, int]:
        return layer.weight.shape[0], layer.weight.shape[1] // 2

    def unit_sets(self, layer: Transposed) -> tuple[str, ...]:
        return ("left", "right")


def test_sets_of_one_layer_which_keep_one_width_are_not_joined_with_others():
    modules = {"own": Transposed(6, 2 * WIDTH), "c": nn.Linear(6, WIDTH), "head": nn.Linear(2 * WIDTH, 3)}
    model, _ = converted(lambda m, x: m.head(torch.cat([m.a(x), m.c(x)], -1) + m.own(x)), **modules)
    register(descriptor := TwoSets())
    try:
        reasons = {layer.name: layer.reason for layer in quietly(model).report().layers}
    finally:
        unregister(descriptor)
    assert reasons["a"] == reasons["c"] == "'add' combines the units of 'own' with others"


def test_what_a_layer_gets_beside_its_input_is_refused():
    model, _ = converted(
        lambda m, x: m.head(m.own(m.a(x), m.c(x))), own=Transposed(WIDTH, WIDTH), c=nn.Linear(6, WIDTH)
    )
    meprop.convert(model, RULE, min_features=10, when="always")
    register(descriptor := TransposedDescriptor())
    try:
        reasons = {layer.name: layer.reason for layer in quietly(model).report().layers}
    finally:
        unregister(descriptor)
    assert reasons["a"] is None
    assert "'own' reads it, beside its input" in reasons["c"]


def test_the_example_of_the_docstring_holds():
    failed, tried = doctest.testmod(handlers)
    assert failed == 0 < tried
