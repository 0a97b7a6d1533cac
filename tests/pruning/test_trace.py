"""What is traced is what is called, and tracing changes nothing."""

import pytest
import torch
from torch import Tensor, nn

import meprop
from prunable import CASES, RULE, WIDTH, Calls, make, quietly


def test_a_graph_that_is_not_what_is_called_is_not_trusted():
    """Types are others where fx traces."""
    model = Calls(lambda m, x: m.head(m.b(m.act(m.a(x)) if isinstance(x, Tensor) else m.a(x))), act=nn.Softmax(-1))
    meprop.convert(model, RULE, min_features=10, when="always")
    report = str(quietly(model, example_inputs=(torch.randn(2, 6),)).report())
    assert "'act' is in a call with example_inputs only" in report
    assert "can be pruned" not in report


@pytest.mark.parametrize("where", ["model", "part"])
def test_a_forward_on_the_instance_is_not_trusted(where):
    model, _ = make(CASES["stack"], torch.float32)
    owner = model if where == "model" else next(each for each in model if isinstance(each, nn.Linear))
    owner.forward = type(owner).forward.__get__(owner)
    report = str(quietly(model).report())
    assert ("replaced on the instance" if where == "model" else "a forward of its own") in report


def test_the_tracer_leaves_nothing_behind():
    model = Calls(lambda m, x: m.head(m.b(m.a(x)) + torch.randn(WIDTH)))
    meprop.convert(model, RULE, min_features=10, when="always")
    before, random = set(vars(model)), torch.get_rng_state()
    quietly(model)
    assert set(vars(model)) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_evaluation_is_looked_at_too():
    model = Calls(lambda m, x: m.head(m.b(m.a(x))) if m.training else m.head(m.b(m.a(x).softmax(-1))))
    meprop.convert(model, RULE, min_features=10, when="always")
    reasons = {layer.name: layer.reason for layer in meprop.Simplifier(model).report().layers}
    assert "softmax" in reasons["a"]
    assert reasons["b"] is None
    assert model.training


def test_the_tagger_and_the_parsers_network_are_understood():
    tagging = pytest.importorskip("meprop.tasks.tagging")
    tagger = tagging.Tagger([9, 5, 4], 3, tagging.TaggingConfig(hidden=WIDTH))
    parser = nn.Sequential(
        *(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, WIDTH), nn.ReLU(), nn.Dropout(0.1), nn.Linear(WIDTH, 3)),
    )
    for model, prunable in ((tagger, {"lstm"}), (parser, {"2"})):
        meprop.convert(model, RULE, min_features=10, when="always")
        report = meprop.Simplifier(model).report()
        assert {layer.name for layer in report.layers if layer.reason is None} == prunable


class Optional(nn.Module):
    """Its LSTM takes what it is given, and is called with or without."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None, scale: float | None = None) -> Tensor:
        output, _ = self.lstm(x, hx)
        return self.head(output if scale is None else output.softmax(-1))


def test_what_is_traced_is_a_call_with_the_arguments_of_the_example():
    model = Optional()
    meprop.convert(model, RULE, min_features=10, when="always")
    x, hx = torch.randn(4, 2, 6), (torch.zeros(1, 2, WIDTH), torch.zeros(1, 2, WIDTH))
    for example_inputs, reason in (
        (None, None),
        ((x,), None),
        ((x, hx), "it gets initial states, which have its width"),
        ((x, None, 2.0), "'.softmax()' reads it, which is not understood"),
    ):
        report = quietly(model, example_inputs=example_inputs).report()
        assert report.layers[0].reason == reason
