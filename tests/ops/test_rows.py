"""Whole rows: drawn without bias, exactly k of them, and multiplied with as the masked gradient is."""

import pytest
import torch
import torch.nn.functional as F

import meprop
from cases import GRADIENTS, gradient
from meprop import ops
from meprop.selection import WholeRows

DRAWN = meprop.Sampled(0.3, scope="rows")


def starts(count: int) -> list[torch.Tensor]:
    return [torch.tensor((2 * number + 1) * (1 << 24) // (2 * count)) for number in range(count)]


def test_the_mean_over_all_starts_is_the_gradient():
    """Starts at equal distances stand for all of them."""
    grad = gradient("normal", 9, 5, torch.float64) * torch.logspace(-2, 1, 9)[:, None]
    draws = torch.stack([ops.draw_whole_rows(grad, 4, start).to_dense() for start in starts(1 << 13)])
    torch.testing.assert_close(draws.mean(dim=0), grad, rtol=2e-2, atol=2e-4)


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 5, 17])
def test_exactly_k_rows_in_their_order(k, dtype, kind):
    grad = gradient(kind, 17, 6, dtype)
    for start in starts(5):
        kept = ops.draw_whole_rows(grad, k, start)
        assert kept.values.shape == (k, 6)
        assert (kept.numbers.diff() > 0).all()
        assert kept.numbers[0] >= 0
        assert kept.numbers[-1] < 17
        assert torch.equal(kept.sums.isfinite(), grad.sum(dim=0).isfinite())


def test_large_rows_stay_as_they_are_and_small_ones_get_one_norm():
    grad = gradient("rows of all scales", 40, 8, torch.float64)
    norms = grad.norm(dim=1)
    kept = ops.draw_whole_rows(grad, 12, torch.tensor(7_777_777))
    found = kept.values.norm(dim=1)
    certain = torch.isclose(found, norms[kept.numbers], rtol=1e-12)
    drawn = found[~certain]
    assert 0 < len(drawn) < 12
    torch.testing.assert_close(drawn, drawn[:1].expand(len(drawn)))
    assert found[certain].min() >= drawn[0] * (1 - 1e-6)
    assert norms[norms > drawn[0] * (1 + 1e-6)].numel() == certain.sum()


def test_rows_that_are_not_finite_are_never_hidden():
    grad = torch.randn(30, 4)
    grad[3, 1], grad[20, 2] = float("nan"), float("inf")
    kept = ops.draw_whole_rows(grad, 4, torch.tensor(0))
    assert {3, 20} <= set(kept.numbers.tolist())
    torch.testing.assert_close(kept.to_dense()[[3, 20]], grad[[3, 20]], equal_nan=True, rtol=0, atol=0)


def test_zeros_fill_up():
    grad = torch.zeros(10, 3)
    grad[4], grad[8] = 1.0, 2.0
    kept = ops.draw_whole_rows(grad, 5, torch.tensor(9))
    assert torch.equal(kept.to_dense(), grad)
    assert len(kept.numbers) == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_products_are_those_of_the_masked_gradient(dtype):
    layer = meprop.nn.Linear(7, 5, rule=DRAWN).to(dtype)
    x, to = gradient("normal", 20, 7, dtype).requires_grad_(), gradient("normal", 20, 5, dtype, seed=1)
    torch.manual_seed(3)
    kept = DRAWN.select(to).to_dense().double()
    torch.manual_seed(3)
    of_x, of_weight, of_bias = torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], to)
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 64 * torch.finfo(dtype).eps}
    torch.testing.assert_close(of_x.double(), kept @ layer.weight.double(), **tolerance)
    torch.testing.assert_close(of_weight.double(), kept.t() @ x.double(), **tolerance)
    torch.testing.assert_close(of_bias.double(), to.double().sum(dim=0), **tolerance)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_a_convolution_is_that_of_the_drawn_images(last):
    layer = meprop.nn.Conv2d(3, 4, 3, padding=1, rule=DRAWN).double()
    x = torch.randn(10, 3, 5, 6, dtype=torch.float64)
    to = torch.randn(10, 4, 5, 6, dtype=torch.float64)
    if last:
        x, to = (each.to(memory_format=torch.channels_last) for each in (x, to))
    x.requires_grad_()
    torch.manual_seed(1)
    kept = DRAWN.select(to.movedim(1, -1).flatten(1)) if last else DRAWN.select(to.flatten(1))
    masked = kept.to_dense().view(10, 5, 6, 4).movedim(-1, 1) if last else kept.to_dense().view(to.shape)
    expected = torch.autograd.grad(F.conv2d(x, layer.weight, None, padding=1), [x, layer.weight], masked)
    torch.manual_seed(1)
    found = torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], to)
    for one, other in zip(found, [*expected, to.sum(dim=(0, 2, 3))], strict=True):
        torch.testing.assert_close(one, other)
    assert found[0].is_contiguous(memory_format=torch.channels_last) == last


def test_attention_and_its_blocks_draw_the_same_rows():
    model = torch.nn.ModuleList([torch.nn.MultiheadAttention(16, 2)])
    report = meprop.convert(model, DRAWN, min_features=4, when="always")
    assert len(report.layers) >= 1
    x = torch.randn(6, 3, 16)
    model[0](x, x, x)[0].square().sum().backward()
    assert model[0].in_proj_weight.grad.any(dim=1).all()


def test_a_compiled_layer_draws_rows():
    torch._dynamo.reset()
    layer = meprop.nn.Linear(8, 6, rule=DRAWN)
    x = torch.randn(40, 8)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert layer.weight.grad.any()


def test_units_are_counted_by_the_rows_that_hit_them():
    record = meprop.policy.Activity.of_units(3)
    record.count(WholeRows(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0]]), torch.tensor([0, 3]).int(), 4), 2)
    assert record.hits.tolist() == [1, 0, 2]
    assert record.examples == 2


def test_an_lstm_has_no_whole_rows():
    model = torch.nn.ModuleList([torch.nn.LSTM(8, 40)])
    with pytest.warns(meprop.NoEffectWarning):
        report = meprop.convert(model, DRAWN, min_features=4)
    assert "draw other sequences" in str(report)
    with pytest.raises(meprop.NotSupportedError, match="draw other sequences"):
        meprop.nn.LSTM(8, 40, rule=DRAWN)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: meprop.Sampled(3, scope="rows"), "k=3 with scope='rows'; it is a share of the rows"),
        (lambda: meprop.Sampled(scope="rows"), "scope='rows' needs k"),
        (lambda: meprop.Sampled(0.5, scope="rows", exact_sum=True), "it would fill up what is left out"),
        (lambda: meprop.TopK(0.5, scope="rows"), "the scope is 'example', 'batch' or 'global'"),
        (lambda: meprop.InBlocks(DRAWN, 2), "the same in all blocks"),
        (lambda: meprop.nn.Linear(4, 4, rule=DRAWN, sparse_grad=True), "sparse_grad=True"),
        (lambda: ops.draw_whole_rows(torch.ones(3, 2), 4, torch.tensor(0)), "k=4 rows of an output gradient"),
        (lambda: WholeRows(torch.ones(2, 3), torch.tensor([0, 1]), 5), "int32"),
        (lambda: WholeRows(torch.ones(2, 3), torch.tensor([0, 1]).int(), -1), "rows=-1"),
        (lambda: WholeRows(torch.ones(2, 3), torch.tensor([0, 1]).int(), 5, torch.ones(2)), r"sums is \[O\] = \[3\]"),
    ],
)
def test_what_is_wrong_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_all_rows_are_the_dense_layer_and_none_are_none():
    assert meprop.Sampled(1.0, scope="rows").keeps_all(7)
    layer = meprop.nn.Linear(4, 3, rule=DRAWN)
    layer(torch.empty(0, 4)).sum().backward()
    assert not layer.weight.grad.any()
    assert DRAWN.density(10) == 0.3
    assert DRAWN.count(10) is None


def test_a_graph_of_any_number_of_rows():
    torch._dynamo.reset()
    layer = meprop.nn.Linear(8, 6, rule=DRAWN)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (40, 33, 12):
        layer.weight.grad = None
        compiled(torch.randn(rows, 8)).square().sum().backward()
        assert layer.weight.grad.any()


def test_numbers_that_are_no_rows_are_refused():
    grad, weight, x = torch.ones(4, 3), torch.ones(3, 2), torch.ones(4, 2)
    for numbers in ([1, 1], [3, 2], [-1, 0], [2, 4]):
        kept = WholeRows(grad[:2], torch.tensor(numbers).int(), 4)
        with pytest.raises(IndexError, match="within the 4 rows"):
            ops.backward_with(kept, grad, weight, x)


def test_a_rule_for_each_product_of_a_pointwise_convolution():
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 1))
    meprop.convert(model, meprop.PerProduct(input=None, weight=DRAWN), min_features=4, when="always")
    model(torch.randn(5, 4, 3, 3)).square().sum().backward()
    assert model[0].weight.grad.any()


def test_a_symbolic_trace_is_of_any_number_of_rows():
    from torch.fx.experimental.proxy_tensor import make_fx

    def backward(grad, weight, x):
        return ops.backward_with(DRAWN.select(grad), grad, weight, x, True)

    weight = torch.randn(3, 2)
    traced = make_fx(backward, tracing_mode="symbolic")(torch.randn(8, 3), weight, torch.randn(8, 2))
    of_x, of_weight, of_bias = traced(torch.randn(11, 3), weight, torch.randn(11, 2))
    assert of_x.shape == (11, 2)
    assert of_weight.shape == (3, 2)
    assert of_bias.shape == (3,)
