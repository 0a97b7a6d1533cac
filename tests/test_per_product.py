"""Rules that differ for the two products of a backward pass."""

import pytest
import torch

import meprop

TOP, RANDOM = meprop.TopK(3), meprop.TopK(5, "global")


def tensors(dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (7, 9), (20, 9), (20,), (7, 20)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def gradients(rule):
    *leaves, grad = tensors()
    leaves = [leaf.requires_grad_() for leaf in leaves]
    meprop.functional.linear(*leaves, rule=rule).backward(grad)
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(("of_input", "of_weight"), [(TOP, RANDOM), (None, TOP), (RANDOM, None)])
def test_each_product_has_its_rule(of_input, of_weight):
    x, weight, _, grad = tensors()
    kept = [grad if rule is None else rule.select(grad).to_dense() for rule in (of_input, of_weight)]
    found = gradients(meprop.PerProduct(input=of_input, weight=of_weight))
    for gradient, expected in zip(found, (kept[0] @ weight, kept[1].t() @ x, grad.sum(dim=0)), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_a_simplifier_counts_what_the_weight_gets():
    model = torch.nn.Sequential(torch.nn.Linear(9, 20), torch.nn.ReLU(), torch.nn.Linear(20, 4))
    meprop.convert(model, meprop.PerProduct(input=None, weight=TOP), min_features=5, when="always")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    simplifier = meprop.Simplifier(model, 0.0, optimizer=optimizer, check_every=100)
    model(torch.randn(6, 9)).sum().backward()
    assert model[0].policy.activity.examples == 6
    assert model[0].policy.activity.hits.sum() <= 6 * 3
    assert simplifier is not None


def test_compiled_as_one_graph():
    torch.manual_seed(0)
    layer = meprop.nn.Linear(9, 20, rule=meprop.PerProduct(input=TOP, weight=RANDOM))
    x = torch.randn(7, 9, requires_grad=True)
    layer(x).square().sum().backward()
    eager = [x.grad.clone(), layer.weight.grad.clone()]
    x.grad = layer.weight.grad = None
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for found, expected in zip((x.grad, layer.weight.grad), eager, strict=True):
        torch.testing.assert_close(found, expected)


def test_attention_has_it_within_each_projection():
    torch.manual_seed(0)
    rule = meprop.PerProduct(input=None, weight=meprop.TopK(2))
    layer = meprop.nn.MultiheadAttention(40, 4, rule=rule)
    x = torch.randn(3, 2, 40)
    layer(x, x, x)[0].sum().backward()
    for block in layer.in_proj_weight.grad.chunk(3):
        assert 0 < (block.abs().sum(dim=1) > 0).sum() <= 2 * 6


def test_what_is_not_one_linear_map_stays_dense_or_refuses():
    rule = meprop.PerProduct(input=TOP, weight=RANDOM)
    model = torch.nn.ModuleList([torch.nn.LSTM(9, 20), torch.nn.Conv1d(9, 20, 3)])
    with pytest.warns(meprop.NoEffectWarning):
        report = meprop.convert(model, rule, min_features=5)
    assert [layer.status for layer in report.layers] == ["dense", "dense"]
    with pytest.raises(meprop.NotSupportedError, match="one rule for all"):
        meprop.nn.LSTM(9, 20, rule=rule)


@pytest.mark.parametrize(("of_input", "of_weight", "error"), [(None, None, ValueError), (3, TOP, TypeError)])
def test_wrong_rules_are_refused(of_input, of_weight, error):
    with pytest.raises(error):
        meprop.PerProduct(input=of_input, weight=of_weight)


def test_equal_rules_are_two_rules_all_the_same():
    layer = meprop.nn.MultiheadAttention(40, 4, rule=meprop.PerProduct(input=TOP, weight=TOP))
    x = torch.randn(3, 2, 40)
    layer(x, x, x)[0].sum().backward()
    assert layer.in_proj_weight.grad.abs().sum() > 0
    with pytest.raises(meprop.NotSupportedError, match="one rule for all"):
        meprop.nn.LSTM(9, 20, rule=meprop.PerProduct(input=TOP, weight=TOP))
    with pytest.raises(TypeError, match="no single rule"):
        meprop.InBlocks(meprop.PerProduct(input=TOP, weight=TOP), 2)


def test_a_part_that_does_not_fit_a_width_leaves_that_layer_dense():
    model = torch.nn.Sequential(torch.nn.Linear(8, 20), torch.nn.Linear(20, 21))
    rule = meprop.PerProduct(input=meprop.InBlocks(meprop.TopK(1), 3), weight=None)
    report = meprop.convert(model, rule, min_features=5, when="always")
    assert [layer.status for layer in report.layers] == ["dense", "sparse"]
    assert "not 3 equal blocks" in report.layers[0].reason


def test_of_a_frozen_weight_a_simplifier_counts_what_its_rule_keeps():
    model = torch.nn.Sequential(torch.nn.Linear(9, 20), torch.nn.ReLU(), torch.nn.Linear(20, 4))
    meprop.convert(model, meprop.PerProduct(input=None, weight=TOP), min_features=5, when="always")
    simplifier = meprop.Simplifier(model, 0.0, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), check_every=100)
    model[0].weight.requires_grad_(False)
    model(torch.randn(6, 9, requires_grad=True)).sum().backward()
    assert 0 < model[0].policy.activity.hits.sum() <= 6 * 3
    assert simplifier is not None


def test_the_density_of_a_top_k_counts_as_that_of_draws_does():
    sampled, half = meprop.Sampled(noise=1.0), meprop.TopK(0.5)
    for rule in (meprop.PerProduct(input=sampled, weight=half), meprop.PerProduct(input=half, weight=sampled)):
        layer = meprop.nn.Linear(9, 200, rule=rule)
        grad = torch.zeros(20, 200)
        grad[:, 0] = 1  # all that is drawn
        layer(torch.randn(20, 9, requires_grad=True)).backward(grad)
        assert layer.policy.record.passes == 2
        assert 0.25 < layer.policy.record.density <= (0.5 + 1 / 200) / 2


def test_the_density_of_both_products_counts():
    first = meprop.PerProduct(input=meprop.Sampled(noise=1.0, ceiling=1), weight=None)
    second = meprop.PerProduct(input=None, weight=meprop.Sampled(noise=1.0, ceiling=1))
    for rule in (first, second):
        model = torch.nn.Sequential(torch.nn.Linear(9, 200))
        meprop.convert(model, rule, when="always")
        model(torch.randn(20, 9, requires_grad=True)).backward(torch.randn(20, 200))
        (layer,) = meprop.report(model).layers
        assert 0.55 < layer.density < 0.9  # a half is of the dense product
        assert "2 passes" in layer.reason
        assert "1 of them dense" in layer.reason
