"""Sampled: what it refuses, its scopes, its dtypes, and tensors without contents."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import meprop

ALL = [meprop.Sampled(), meprop.Sampled(4), meprop.Sampled(4, "example"), meprop.Sampled(4, "batch")]
WHOLE = [meprop.Sampled(), meprop.Sampled(4), meprop.TopK(4, "global"), meprop.TopK(energy=0.9)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0.0}, "noise=0.0 is out of range"),
        ({"noise": float("inf")}, "noise=inf is out of range"),
        ({"noise": True}, "noise=True is a bool"),
        ({"k": 3, "noise": 0.1}, "k fixes the density"),
        ({"k": 3, "ceiling": 0.5}, "k fixes the density"),
        ({"k": 0}, "k=0 keeps nothing"),
        ({"scope": "example"}, "needs k"),
        ({"scope": "row"}, "scope='row'"),
        ({"floor": 0.4}, "floor=0.4 is not below ceiling=0.3"),
        ({"k": 3, "scope": "batch", "exact_sum": True}, "exact_sum=True"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        meprop.Sampled(**options)


@pytest.mark.parametrize("rule", [meprop.Sampled(ceiling=1), *ALL[1:]], ids=repr)
def test_the_mean_of_many_draws_is_the_gradient(rule):
    torch.manual_seed(0)
    grad = torch.randn(6, 30) * torch.randn(6, 1).exp()
    draws = torch.stack([rule.select(grad).to_dense() for _ in range(2000)])
    error = draws.std(dim=0) / 2000**0.5
    off = ((draws.mean(dim=0) - grad) / error)[error > 1e-2 * grad.abs().amax() / 2000**0.5]
    assert off.numel() > 50
    assert off.abs().max() < 6


@pytest.mark.parametrize("scope", ["global", "example"])
def test_the_sum_of_the_batch_is_exact(scope):
    grad = torch.randn(50, 30, dtype=torch.float64)
    rules = meprop.Sampled(3, scope), meprop.TopK(3, scope, exact_sum=True), meprop.RandomK(3, scope, exact_sum=True)
    for rule in rules:
        torch.testing.assert_close(rule.select(grad).to_dense().sum(dim=0), grad.sum(dim=0))


@pytest.mark.parametrize("rule", ALL, ids=repr)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_hidden(rule, value):
    grad = torch.randn(20, 30)
    grad[3, 5] = value
    kept = rule.select(grad)
    assert not kept.to_dense().isfinite().all()
    if rule.k is not None:
        assert kept.density <= 5 / 30


@pytest.mark.parametrize("rule", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_gradients_stay_finite(rule, dtype):
    grad = ((torch.rand(64, 128) + 1) * (2.5e4 if dtype == torch.float16 else 1e30)).to(dtype)
    kept = rule.select(grad)
    assert kept.values.isfinite().all()
    assert kept.shared is None or kept.shared.isfinite().all()


def test_a_fixed_share_is_kept_whatever_it_is():
    assert meprop.Sampled(0.5).select(torch.randn(40, 100)).density == 0.5


def test_a_floor_is_rounded_up():
    rule = meprop.Sampled(noise=1e4, floor=0.003, exact_sum=False)
    assert rule.select(torch.randn(4000, 128)).density > 0.003


@pytest.mark.parametrize("rule", WHOLE, ids=repr)
def test_tensors_without_contents_get_gradients_of_their_shapes(rule):
    layer = meprop.nn.Linear(16, 128, rule=rule, device="meta")
    x = torch.randn(4, 16, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert (x.grad.shape, layer.weight.grad.shape, layer.bias.grad.shape) == ((4, 16), (128, 16), (128,))
    with FakeTensorMode():
        layer, x = meprop.nn.Linear(16, 128, rule=rule), torch.randn(4, 16, requires_grad=True)
        layer(x).sum().backward()
        assert layer.weight.grad.shape == (128, 16)


def test_attention_compiles_as_one_graph():
    torch._dynamo.reset()
    layer = meprop.nn.MultiheadAttention(128, 4, batch_first=True, rule=meprop.Sampled())
    x = torch.randn(2, 3, 128, requires_grad=True)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return layer(x, x, x, need_weights=False)[0]

    torch.compile(attend, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert x.grad.isfinite().all()


def test_an_lstm_reports_what_was_kept():
    model = torch.nn.Sequential(torch.nn.LSTM(8, 128))
    meprop.convert(model, when="always")
    model(torch.randn(3, 2, 8))[0].sum().backward()
    assert "kept in 3 passes so far" in meprop.report(model).layers[0].reason
