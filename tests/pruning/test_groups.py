"""Which units go together, and which must stay because of who else has them."""

import pytest
import torch
from torch import Tensor, nn

import meprop
from prunable import CASES, RULE, WIDTH, Calls, alive_units, make, quietly, train


def test_a_residual_sum_keeps_what_any_of_its_layers_keeps():
    model, x = make(CASES["residual"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    simplifier = meprop.Simplifier(model, 0.3, optimizer=optimizer, check_every=1)
    train(model, optimizer, x)
    hits = torch.stack([layer.activity.hits for layer in (model.first, model.block, model.scaled)])
    simplifier.step()
    active = hits >= 0.3 * len(x)
    assert active.sum(dim=1).max() < active.any(dim=0).sum() < WIDTH  # or the test would say nothing
    for alive in alive_units(simplifier).values():
        assert torch.equal(alive, active.any(dim=0).nonzero().flatten())


def test_an_lstm_keeps_one_width_the_largest_that_a_layer_needs():
    model, x = make(CASES["stacked, bidirectional lstm"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    simplifier = meprop.Simplifier(model, 0.3, optimizer=optimizer, check_every=1)
    train(model, optimizer, x)
    hits = [activity.hits.clone() for activity in model.lstm.activity]
    simplifier.step()
    needed = [int((each >= 0.3 * 10).sum()) for each in hits]
    assert len(set(needed)) > 1  # or the test would say nothing
    assert set(simplifier.widths.values()) == {max(needed)}
    for each, alive in zip(hits, alive_units(simplifier).values(), strict=True):
        dead = torch.ones(WIDTH, dtype=torch.bool).index_fill(0, alive, False)
        assert each[alive].min() >= each[dead].max()


def test_what_another_method_reads_is_not_pruned():
    model = Calls(lambda m, x: m.head(m.a(x)))  # and b, which reads a's units elsewhere
    meprop.convert(model, RULE, min_features=10, when="always")
    assert "'b' is not seen in the traced graph, and may read it" in str(quietly(model).report())


def test_what_is_refused_is_left_as_it_is():
    model = Calls(lambda m, x: m.head(m.b(m.a(x).softmax(-1))))
    meprop.convert(model, RULE, min_features=10, when="always")
    simplifier = meprop.Simplifier(model, 0.5, check_every=1)
    model(torch.randn(8, 6)).sum().backward()
    simplifier.step()
    assert simplifier.widths["a"] == WIDTH > simplifier.widths["b"]
    assert simplifier.activity["a"].sum() > 0  # counted all the same


def test_tied_weights_are_not_pruned():
    model = Calls(lambda m, x: m.head(m.c(m.b(m.a(x)))), c=nn.Linear(WIDTH, WIDTH))
    model.c.weight = model.b.weight
    meprop.convert(model, RULE, min_features=10, when="always")
    reasons = {layer.name: layer.reason for layer in quietly(model).report().layers}
    assert "'b.weight' is tied to 'c.weight'" in reasons["b"]
    assert "tied" in reasons["a"]  # whose units are its columns


def test_hooks_and_subclasses_are_not_trusted():
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = Calls(lambda m, x: m.head(m.scaled(m.b(m.a(x)))), scaled=Scaled(WIDTH, WIDTH))
    model.a.register_forward_hook(lambda module, args, output: output.flip(-1))
    meprop.convert(model, RULE, min_features=10, when="always")
    reasons = {layer.name: layer.reason for layer in quietly(model).report().layers}
    assert "forward hooks" in reasons["a"]
    assert "'scaled'" in reasons["b"]


def test_what_a_hook_returns_may_have_any_size():
    model = Calls(lambda m, x: m.head(torch.cat([m.a(x), m.b(x)], -1)), b=nn.Linear(6, WIDTH), head=nn.Linear(72, 3))
    model.a.register_forward_hook(lambda module, args, output: output.repeat(1, 2))
    meprop.convert(model, RULE, min_features=10, when="always")
    reasons = {layer.name: layer.reason for layer in quietly(model).report().layers}
    assert "forward hooks" in reasons["a"]
    assert "'cat' reads it" in reasons["b"]  # as its place among the head's columns is not known


def test_normalisation_of_units_and_of_something_else_is_not_pruned():
    model = Calls(lambda m, x: m.head(m.norm(m.a(x))) + m.norm(x).sum(), norm=nn.BatchNorm1d(6), head=nn.Linear(6, 3))
    model.a = nn.Linear(6, 6)
    del model.b
    meprop.convert(model, meprop.TopK(2), min_features=4, when="always")
    reason = quietly(model, example_inputs=(torch.randn(8, 6),)).report().layers[0].reason
    assert reason == "'norm' is called several times, with different units"


def test_units_are_not_pruned_where_the_rule_goes_with_this_width_only():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    meprop.convert(model, meprop.InBlocks(meprop.TopK(1), 4), min_features=3, when="always")
    with pytest.warns(meprop.NoEffectWarning, match="not 4 equal blocks"):
        simplifier = meprop.Simplifier(model, 1.0, check_every=1)
    model(torch.randn(3, 6)).sum().backward()
    simplifier.step()
    assert simplifier.widths == {"0": 8}
