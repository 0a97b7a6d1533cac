"""What a meter reads is what a literal layer keeps, and nothing is measured when nobody asks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import literal
import meprop
from meprop.energy import Energy
from meprop.rules import Rule
from meprop.selection import Selection


class Recording(Rule):
    """Another rule, of which it adds up literally what the entries hold that it keeps."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.scope, self.kept, self.whole = rule, rule.scope, 0.0, 0.0

    def select(self, grad_output_NO: Tensor) -> Selection:
        selection = self.rule.select(grad_output_NO)
        for entry, kept in zip(grad_output_NO.flatten(), selection.to_dense().flatten(), strict=True):
            square = float(entry.double()) ** 2
            self.whole += square
            self.kept += square if kept != 0 else 0.0
        return selection


def of_linear(rule: Rule, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Callable]:
    layer = meprop.nn.Linear(5, 13, rule=rule, dtype=dtype)
    return layer, torch.randn(3, 7, 5, dtype=dtype), lambda x, rule: literal.linear(x, layer.weight, layer.bias, rule)


def of_pointwise(rule: Rule, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Callable]:
    layer = meprop.nn.Conv2d(3, 11, 1, rule=rule, dtype=dtype)
    return layer, torch.randn(2, 3, 5, 1, dtype=dtype), lambda x, rule: literal.convolution(layer, x, rule)


def of_convolution(rule: Rule, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Callable]:
    layer = meprop.nn.Conv1d(3, 11, 3, rule=rule, stride=2, padding=1, dtype=dtype)
    return layer, torch.randn(2, 3, 9, dtype=dtype), lambda x, rule: literal.convolution(layer, x, rule)


def of_lstm(rule: Rule, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Callable]:
    layer = meprop.nn.LSTM(4, 9, rule=rule, dtype=dtype)
    return layer, torch.randn(5, 3, 4, dtype=dtype), lambda x, rule: literal.lstm(layer, x, rule)


def loss_of(output: Tensor) -> Tensor:
    weights = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    return (weights**3 * output).sum()


EXAMPLE, BATCH, WHOLE = meprop.TopK(3), meprop.TopK(3, "batch"), meprop.TopK(3, "global")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        *((kind, rule) for kind in (of_linear, of_pointwise, of_lstm) for rule in (EXAMPLE, BATCH, WHOLE)),
        *((of_linear, rule) for rule in (meprop.TopK(energy=0.7), meprop.TopK(1), meprop.TopK(12))),
        *((of_lstm, rule) for rule in (meprop.TopK(energy=0.7), meprop.InBlocks(meprop.TopK(1), 3))),
        *((of_convolution, rule) for rule in (BATCH, WHOLE)),
    ],
)
def test_the_energy_is_that_of_a_literal_layer(kind, rule, dtype):
    torch.manual_seed(0)
    layer, x, literally = kind(rule, dtype)
    meter, recording = meprop.Meter(layer), Recording(rule)
    with meter.measuring():
        output = layer(x)
        loss_of(output[0] if isinstance(output, tuple) else output).backward()
    loss_of(literally(x.clone().requires_grad_(), recording)).backward()
    assert meter.read()["energy"] == pytest.approx(recording.kept / recording.whole, rel=1e-5)


@pytest.mark.parametrize(
    "rule",
    [
        meprop.Sampled(noise=0.4, exact_sum=False),
        meprop.Sampled(2, exact_sum=False),
        meprop.Sampled(2, scope="example", exact_sum=False),
        meprop.Sampled(2, scope="batch"),
        meprop.RandomK(2),
        meprop.RandomK(2, scope="batch"),
        meprop.RandomK(2, scope="global"),
    ],
)
def test_drawn_entries_count_before_they_are_scaled(rule):
    """The gradient of a weight that meets single features is what was kept itself."""
    torch.manual_seed(0)
    layer, x = meprop.nn.Linear(6, 40, rule=rule), torch.eye(6)
    grad = torch.randn(6, 40) ** 3
    meter = meprop.Meter(layer)
    with meter.measuring():
        layer(x).backward(grad)
    kept = layer.weight.grad.t() != 0
    assert 0 < kept.sum() < kept.numel()
    assert meter.read()["energy"] == pytest.approx(float((grad[kept] ** 2).sum() / (grad**2).sum()), rel=1e-5)


def test_an_lstm_draws_in_the_measured_pass_what_it_draws_else():
    torch.manual_seed(0)
    rule = meprop.Sampled(3)
    layer, x = meprop.nn.LSTM(6, 20, rule=rule), torch.eye(6)[None]
    plain = nn.LSTM(6, 20)
    plain.load_state_dict(layer.state_dict())
    grad = torch.randn(1, 6, 20) ** 3
    plain(x)[0].backward(grad)
    meter = meprop.Meter(layer)
    with meter.measuring():
        layer(x)[0].backward(grad)
    whole, kept = plain.weight_ih_l0.grad.t(), layer.weight_ih_l0.grad.t() != 0
    assert meter.read()["energy"] == pytest.approx(float((whole[kept] ** 2).sum() / (whole**2).sum()), rel=1e-4)


def test_what_all_rows_share_is_not_kept():
    kept = meprop.CompensatedTopK(3).select(torch.randn(7, 13))
    energy, alone = Energy(), Energy()
    grad = torch.randn(7, 13)
    energy.add(grad, kept)
    alone.add(grad, meprop.RowSelection(kept.values, kept.indices, 13))
    assert kept.shared is not None
    assert (energy.kept, energy.whole) == (alone.kept, alone.whole)


RULES = [
    EXAMPLE,
    BATCH,
    WHOLE,
    meprop.Sampled(noise=0.4),
    meprop.Sampled(3, scope="example"),
    meprop.RandomK(3),
    meprop.PerProduct(input=EXAMPLE, weight=meprop.Sampled(3)),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_measuring_changes_no_gradient_and_no_random_number(rule):
    ends = []
    for is_measured in (False, True):
        torch.manual_seed(0)
        inner = nn.Linear(40, 30) if rule.differs else nn.LSTM(40, 30)
        layers = {
            "first": nn.Linear(6, 40),
            "second": inner,
            "third": nn.Conv1d(1, 40, 1),
            "last": nn.Conv1d(40, 20, 3),
        }
        model = nn.ModuleDict(layers)
        meprop.convert(
            model, rule, min_features=5, when="always", filter=lambda name, _: name != "last" or not rule.differs
        )
        meter = meprop.Meter(model)
        hidden = model["second"](model["first"](torch.randn(7, 6)))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        pending = loss_of(model["third"](hidden[:, None]))
        if is_measured:
            with meter.measuring():
                pending.backward()
            assert 0 < meter.read()["energy"] <= 1
        else:
            pending.backward()
        ends.append([*(each.grad for each in model.parameters() if each.grad is not None), torch.rand(1)])
    assert all(map(torch.equal, *ends))


def model_of(rule: Rule, **options) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 200), nn.ReLU(), nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 3))
    meprop.convert(model, rule, when="always", **options)
    return model


def train(model: nn.Module, seed: int = 0) -> None:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()


def test_nothing_is_measured_when_nobody_asks(monkeypatch):
    calls = []
    monkeypatch.setattr(Energy, "add", lambda self, grad, selection: calls.append(grad.shape))
    model = model_of(meprop.TopK(10))
    meter = meprop.Meter(model)
    train(model)
    assert set(meter.read(layers=True)) == {"density", "k", "density/0", "density/2", "density/4"}
    assert calls == []
    with meter.measuring():
        train(model)
    assert calls == [(16, 150), (16, 200)]
    with pytest.raises(RuntimeError), meter.measuring():
        model(torch.randn(4, 7))  # it has 6 features
    train(model)
    assert len(calls) == 2


def test_the_numbers_are_those_of_the_report_for_a_rule_with_k():
    model = model_of(meprop.TopK(10))
    meter = meprop.Meter(model)
    train(model)
    found = meter.read(layers=True)
    assert found["density"] == meprop.report(model).density
    assert found["k"] == 10
    assert [found[f"density/{name}"] for name in (0, 2, 4)] == [0.05, 10 / 150, 1.0]


def test_the_energy_of_the_model_is_the_share_of_all_squares():
    model = model_of(meprop.TopK(10))
    meter, squares = meprop.Meter(model), []
    for number in (0, 2):
        model[number].register_forward_hook(
            lambda _module, _inputs, output: output.register_hook(squares.append) and None
        )
    with meter.measuring():
        train(model)
        train(model, seed=1)
    kept = [each.abs().topk(10).values for each in squares]
    expected = sum(float((each**2).sum()) for each in kept) / sum(float((each**2).sum()) for each in squares)
    found = meter.read(layers=True)
    assert found["energy"] == pytest.approx(expected, rel=1e-5)
    assert len(squares) == 4
    assert set(found) >= {"energy/0", "energy/2"}
    assert "energy/4" not in found


def test_each_reading_is_of_the_passes_since_the_last_one():
    model = model_of(meprop.Sampled(noise=0.5))
    before, meter = meprop.Meter(model), meprop.Meter(model)
    assert meter.read() == {}  # no pass so far: the rule fixes nothing
    densities = []
    for seed in (1, 2):
        with meter.measuring():
            train(model, seed)
        densities.append(meter.read(layers=True))
    assert meter.read() == {}
    assert densities[0] != densities[1]
    assert all({"density", "k", "energy", "density/2", "energy/2"} <= set(each) for each in densities)
    mean = (densities[0]["density/2"] + densities[1]["density/2"]) / 2
    assert before.read(layers=True)["density/2"] == pytest.approx(mean)  # another meter is not disturbed
    assert meprop.report(model).layers[1].density == pytest.approx(mean)


def test_the_meter_that_is_asked_last_measures():
    model = model_of(meprop.TopK(10))
    outer, inner = meprop.Meter(model), meprop.Meter(model)
    with outer.measuring():
        with inner.measuring():
            train(model)
        assert "energy" in inner.read()
        assert "energy" not in outer.read()
        train(model)
        assert "energy" in outer.read()
        assert "energy" not in outer.read()
    assert "energy" not in inner.read()


def test_a_gradient_that_is_not_finite_has_no_energy():
    model = model_of(meprop.TopK(10))
    meter = meprop.Meter(model)
    with meter.measuring():
        (model(torch.randn(4, 6)) * torch.inf).sum().backward()
    assert set(meter.read()) == {"density", "k"}


def test_dense_phases_and_plain_models_count_as_dense():
    plain = nn.Linear(6, 200)
    meter = meprop.Meter(plain)
    with meter.measuring():
        train(plain)
    assert meter.read(layers=True) == {"density": 1.0, "density/model": 1.0}
    model = model_of(meprop.TopK(10))
    meprop.RuleSchedule(model, lambda step, rule: None)
    meter = meprop.Meter(model)
    with meter.measuring():
        train(model)
    assert meter.read() == {"density": 1.0}


def test_what_is_converted_anew_is_read_anew():
    model = model_of(meprop.Sampled(noise=0.5))
    meter = meprop.Meter(model)
    train(model)
    meprop.convert(model, meprop.TopK(energy=0.5), when="always")
    train(model, 1)
    found = meter.read(layers=True)
    assert found["density/2"] == meprop.report(model).layers[1].density


def test_a_copy_of_a_model_that_is_measured_is_no_part_of_it():
    model = model_of(meprop.TopK(10))
    meter = meprop.Meter(model)
    with meter.measuring():
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for each in copies:
            train(each)
    assert "energy" not in meter.read()
    assert all(each[0].policy.record.energy is None for each in copies)


def test_a_compiled_graph_is_not_measured_and_not_compiled_again():
    torch._dynamo.reset()  # graphs of other tests count against the limit above which torch compiles no more
    model = model_of(meprop.TopK(10))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    meter = meprop.Meter(compiled)
    train(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True), meter.measuring():
        train(compiled)
    assert set(meter.read()) == {"density", "k"}


def test_a_model_is_a_module():
    with pytest.raises(TypeError, match=r"model is of type list; it must be a torch\.nn\.Module"):
        meprop.Meter([nn.Linear(2, 3)])
