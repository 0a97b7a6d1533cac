"""The report says what happened: which layers had a sparse backward pass."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import meprop
from meprop import speed
from meprop.nn.base import descriptor_of

RULE = meprop.TopK(3, scope="batch")


class ReadsPast(nn.Module):
    """A model that reads the weight of `past` itself. `through` is called if it is asked for."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.past, self.through, self.calls = nn.Linear(6, 8), nn.Linear(6, 8), calls

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.past.weight, self.past.bias)
        return y + self.through(x) if self.calls else y


def status_of(model: nn.Module) -> dict[str, tuple[str, str]]:
    return {layer.name: (layer.status, layer.reason) for layer in meprop.report(model).layers}


@pytest.mark.parametrize("calls", [False, True])
@pytest.mark.parametrize("zero", [False, True], ids=["", "gradients set to None"])
def test_a_layer_whose_weight_is_read_past_it_is_dense_and_counts_so(calls, zero):
    model = ReadsPast(calls)
    report = meprop.convert(model, RULE, when="always", min_features=1)
    assert [layer.reason for layer in report.layers] == ["always", "always"]
    assert meprop.report(model).layers == report.layers
    model(torch.randn(4, 6)).sum().backward()
    if zero:
        model.zero_grad()
    status, reason = status_of(model)["past"]
    assert status == "dense"
    assert "no sparse backward pass seen yet" in reason
    if calls:
        assert status_of(model)["through"] == ("sparse", "always")
        assert meprop.report(model).density == pytest.approx((1 + 3 / 8) / 2)


def run_past(layer: nn.Module, x: Tensor) -> None:
    """A backward pass through torch's own functions of the weights of a converted layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer), "forward", descriptor_of(layer).plain.forward)
        run(layer, x)


def run(layer: nn.Module, x: Tensor) -> None:
    output = layer(x, x, x) if isinstance(layer, nn.MultiheadAttention) else layer(x)
    (output[0] if isinstance(output, tuple) else output).square().sum().backward()


LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), (4, 6, 5)),
    "pointwise": (lambda: nn.Conv2d(6, 8, 1), (4, 6, 5, 5)),
    "lstm": (lambda: nn.LSTM(6, 8), (4, 2, 6)),
    "attention": (lambda: nn.MultiheadAttention(8, 2), (4, 2, 8)),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), (4, 6)),
}


@pytest.mark.parametrize("before", [False, True], ids=["", "a gradient before"])
@pytest.mark.parametrize("when", ["auto", "always"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_alone_that_trains_past_its_forward_pass_is_dense_when_its_gradient_is_gone(kind, when, before):
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    if before:
        run(layer, x)
    meprop.convert(layer, RULE, when=when, min_features=1)
    assert status_of(layer)[""][0] == "sparse"
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    run_past(layer, x)
    optimizer.step()
    optimizer.zero_grad()
    status, reason = status_of(layer)[""]
    assert (status, meprop.report(layer).density) == ("dense", 1.0)
    assert reason.endswith("no sparse backward pass seen yet: a parameter of it got a gradient")


@pytest.mark.parametrize("kind", ["linear", "conv1d", "pointwise"])
def test_a_layer_alone_of_which_only_the_bias_trains_is_dense_when_its_gradient_is_gone(kind):
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    layer.weight.requires_grad_(False)
    meprop.convert(layer, RULE, when="always", min_features=1)
    run(layer, x)
    layer.zero_grad()
    status, reason = status_of(layer)[""]
    assert status == "dense"
    assert reason.endswith("a parameter of it got a gradient")


def test_a_layer_past_which_a_model_reads_is_dense_also_where_the_others_were_measured_to_be_dense(monkeypatch):
    monkeypatch.setattr(speed, "decide", lambda rule, shape: speed.Decision(False, 4, 1.0, 2.0))
    model = ReadsPast(calls=True)
    meprop.convert(model, RULE, min_features=1)
    model.past.requires_grad_(False)
    model(torch.randn(4, 6)).sum().backward()
    assert {status for status, _ in status_of(model).values()} == {"dense"}


EDITS = {
    "load_state_dict": lambda layer: layer.load_state_dict(copy.deepcopy(layer.state_dict())),
    "init": lambda layer: [nn.init.normal_(each) for each in layer.parameters()],
    "double": lambda layer: layer.double(),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", LAYERS)
def test_an_edit_of_the_weights_is_no_training(kind, edit):
    layer = LAYERS[kind][0]()
    meprop.convert(layer, RULE, when="always", min_features=1)
    EDITS[edit](layer)
    assert status_of(layer)[""] == ("sparse", "always")


@pytest.mark.parametrize("kind", LAYERS)
def test_the_wait_for_a_gradient_ends_with_the_first_one_and_with_revert(kind):
    make, shape = LAYERS[kind]
    hooks: list[int] = []
    for end in (lambda layer: run(layer, torch.randn(shape)), meprop.revert, lambda layer: None):
        layer = make()
        meprop.convert(layer, RULE, when="always", min_features=1)
        pickle.loads(pickle.dumps(copy.deepcopy(layer))) if kind != "weight_norm" else copy.deepcopy(layer)
        end(layer)
        hooks.append(sum(len(each._post_accumulate_grad_hooks or ()) for each in layer.parameters()))
    assert hooks[:2] == [0, 0]
    assert hooks[2] > 0


def test_a_gradient_from_before_the_conversion_says_nothing():
    model = nn.Sequential(nn.Linear(6, 8))
    model(torch.randn(4, 6)).sum().backward()
    meprop.convert(model, RULE, when="always", min_features=1)
    assert status_of(model)["0"][0] == "sparse"
    model(torch.randn(4, 6)).sum().backward()
    assert status_of(model)["0"] == ("sparse", "always")


@pytest.mark.parametrize("rule", [RULE, meprop.Sampled(noise=0.25), meprop.TopK(3, scope="global")], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_each_kind_of_layer_counts_its_sparse_passes(kind, rule):
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    meprop.convert(layer, rule, when="always", min_features=1)
    for passes in (1, 2):
        run(layer, x)
        assert layer.policy.record.sparse_passes == passes * (2 if kind == "attention" else 1)  # two projections
    with torch.no_grad():
        layer(x, x, x) if kind == "attention" else layer(x)
    (record,) = meprop.report(layer).layers
    assert record.status == "sparse"
    assert "seen yet" not in record.reason


def test_a_compiled_layer_is_known_to_be_sparse():
    torch.compiler.reset()
    layer = nn.Linear(6, 8)
    meprop.convert(layer, RULE, when="always", min_features=1)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.randn(4, 6)).sum().backward()
    assert status_of(layer)[""] == ("sparse", "always")


@pytest.mark.parametrize(
    "kind",
    # A pointwise convolution, a parametrized layer, and the projections of attention are linear products.
    [
        *("linear", "conv1d", "lstm"),
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("pointwise", "attention", "weight_norm")),
    ],
)
def test_a_layer_whose_backward_pass_alone_is_compiled_is_known_to_be_sparse(kind):
    torch.compiler.reset()
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    meprop.convert(layer, RULE, when="always", min_features=1)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        run(layer, x)
    assert status_of(layer)[""] == ("sparse", "always")


@pytest.mark.parametrize("scope", ["batch", "example", "global"])
@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_graph_of_make_fx_has_the_sparse_backward_pass_that_the_report_tells_of(kind, mode, scope):
    make, shape = LAYERS[kind]
    layer = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", meprop.NoEffectWarning)
        report = meprop.convert(layer, meprop.TopK(3, scope=scope), when="always", min_features=1)
    if report.layers[0].status == "dense" or (kind == "lstm" and mode == "fake"):
        return  # an LSTM is torch's own on tensors without contents
    names, values = zip(*layer.named_parameters(), strict=True)

    def gradients(x: Tensor, *values: Tensor) -> list[Tensor]:
        inputs = (x, x, x) if kind == "attention" else (x,)
        output = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), inputs)
        loss = (output[0] if isinstance(output, tuple) else output).square().sum()
        return list(torch.autograd.grad(loss, values))

    trace = make_fx(gradients, tracing_mode=mode)
    if kind == "lstm":
        with pytest.raises(meprop.NotSupportedError, match="make_fx of an LSTM"):
            trace(torch.randn(shape), *values)
        return
    graph = trace(torch.randn(shape), *values)
    assert status_of(layer)[""] == ("sparse", "always")
    x = torch.randn(shape)
    with torch.no_grad():
        found = graph(x, *values)
    for each, expected in zip(found, gradients(x, *values), strict=True):
        torch.testing.assert_close(each, expected)
