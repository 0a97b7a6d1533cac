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


@pytest.mark.slow
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


@pytest.mark.parametrize("scope", ["example", "batch"])
def test_what_is_drawn_of_a_tensor_without_contents_is_everything(scope):
    kept = meprop.Sampled(0.5, scope=scope).select(torch.randn(4, 128, device="meta"))
    assert (kept.density, kept.values.is_meta) == (1, True)


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


# ---------------------------------------------------------------- row-sparse gradients

LEAVES_ROWS = [
    meprop.Sampled(noise=1.0, exact_sum=False, ceiling=1),
    meprop.Sampled(2, exact_sum=False),
    meprop.TopK(2, scope="global"),
    meprop.RandomK(2, scope="global"),
]


def heavy_tailed(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width) * torch.exp(3 * torch.randn(1, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rule", LEAVES_ROWS, ids=str)
def test_rows_of_the_weights_gradient_without_an_entry_are_left_out(rule, dtype):
    torch.manual_seed(0)
    x, grad = torch.randn(7, 5, dtype=dtype, requires_grad=True), heavy_tailed(7, 60).to(dtype)
    weight, bias = torch.randn(60, 5, dtype=dtype, requires_grad=True), torch.zeros(60, dtype=dtype, requires_grad=True)
    found = []
    for sparse_grad in (False, True):
        torch.manual_seed(3)
        y = meprop.functional.linear(x, weight, bias, rule=rule, sparse_grad=sparse_grad)
        found.append(torch.autograd.grad(y, [x, weight, bias], grad))
    (dx, dense, db), (dx_sparse, rows, db_sparse) = found
    assert rows.is_sparse
    assert rows.is_coalesced()
    assert rows.indices()[0].tolist() == dense.ne(0).any(dim=1).nonzero()[:, 0].tolist()
    assert 0 < len(rows.values()) < 30
    for one, other in ((dx_sparse, dx), (rows.to_dense(), dense), (db_sparse, db)):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_gradient_of_zeros_has_no_rows():
    weight = torch.randn(60, 5, requires_grad=True)
    y = meprop.functional.linear(torch.randn(7, 5), weight, rule=LEAVES_ROWS[0], sparse_grad=True)
    (grad,) = torch.autograd.grad(y, weight, torch.zeros(7, 60))
    assert grad.is_sparse
    assert grad.shape == (60, 5)
    assert grad._nnz() == 0


@pytest.mark.parametrize(
    "rule", [meprop.Sampled(), meprop.Sampled(2), meprop.TopK(2, "global", exact_sum=True)], ids=str
)
def test_an_exact_sum_leaves_no_row_out(rule):
    with pytest.raises(ValueError, match=r"sparse_grad=True with .* exact_sum=False"):
        meprop.nn.Linear(5, 60, rule=rule, sparse_grad=True)


def test_training_with_rows_left_out_is_training_with_zeros_in_them():
    losses = []
    for sparse_grad in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 200), torch.nn.ReLU(), torch.nn.Linear(200, 3))
        meprop.convert(model, LEAVES_ROWS[0], when="always", sparse_grad=sparse_grad)
        optimizer = meprop.optim.Adam(model.parameters(), lr=0.01, sparse_rows="exact")
        x, target = torch.randn(30, 20), torch.randint(3, (30,))
        for _ in range(5):
            loss = torch.nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
