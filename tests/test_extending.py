"""A rule and a layer of somebody's own, each in one place: what CONTRIBUTING.md says under "To add", carried out.

`AboveShare` is a rule that only answers `select`, with another number of entries in each row. `GRUCell` is a layer made
of linear maps, with its descriptor. Both are used as ours are, and held against the literal layers.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import literal
import meprop
from meprop import rules
from meprop.functional.linear import linear_with_policy
from meprop.nn.base import Descriptor, SparseLayer, register, sparse_repr, unregister
from meprop.policy import Policy

# ---------------------------------------------------------------- the rule


@dataclass(frozen=True)
class AboveShare(meprop.Rule):
    """Keeps all entries of a row whose magnitude is above a share of the row's largest; of a row of zeros, none.

    Args:
        share: Of the largest magnitude, at least 0 and below 1.
    """

    share: float
    scope: rules.Scope | None = "example"

    def select(self, grad_output_NO: Tensor) -> meprop.RowSelection:
        magnitude_NO = grad_output_NO.abs()
        kept_NO = ~(magnitude_NO <= self.share * magnitude_NO.amax(dim=1, keepdim=True))  # NaN is kept
        starts = torch.zeros(len(kept_NO) + 1, dtype=torch.int64, device=kept_NO.device)
        starts[1:] = kept_NO.sum(dim=1).cumsum(0)
        indices = kept_NO.nonzero()[:, 1].int()
        return meprop.RowSelection(grad_output_NO[kept_NO], indices, grad_output_NO.shape[1], starts=starts)


RULE = AboveShare(0.5)


def assert_same_gradients(found: nn.Module, expected: nn.Module) -> None:
    """Of every parameter, which all have one."""
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert other.grad.any()
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_the_rule_keeps_another_number_of_entries_in_each_row():
    grad = torch.tensor([[1.0, -4.0, 3.0, 2.0], [0.0] * 4, [2.0, -2.0, 2.0, 2.0], [float("nan"), 1.0, 1.0, 0.0]])
    selection = RULE.select(grad)
    assert selection.starts.tolist() == [0, 2, 2, 6, 10]
    assert selection.indices.tolist() == [1, 2, 0, 1, 2, 3, 0, 1, 2, 3]
    assert selection.density == 10 / 16
    assert RULE.select(torch.zeros(0, 4)).to_dense().shape == (0, 4)
    assert repr(RULE) == "AboveShare(share=0.5, scope='example')"  # by which measurements of it are remembered


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [(), (0,), (1,), (7,), (2, 3)])
def test_the_rule_in_functional_linear(batch, dtype):
    torch.manual_seed(0)
    results = []
    for function in (meprop.functional.linear, literal.linear):
        torch.manual_seed(1)
        shapes = ((*batch, 6), (33, 6), (33,))
        leaves = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
        if function is literal.linear:
            leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
        matrix = leaves[0] if batch else leaves[0][None]
        output = function(matrix, *leaves[1:], rule=RULE)
        grad = torch.randn(output.shape, dtype=torch.float64).to(dtype)
        results.append(torch.autograd.grad(output, leaves, grad.to(output.dtype)))
    eps = torch.finfo(dtype).eps
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=8 * eps, atol=64 * eps)


# Each layer, its literal twin's output from (layer, input), and the shape of its input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "Linear": (
        lambda: nn.Linear(6, 40),
        lambda layer, x: literal.linear(x, layer.weight, layer.bias, RULE),
        (2, 3, 6),
    ),
    "pointwise Conv1d": (
        lambda: nn.Conv1d(6, 40, 1),
        lambda layer, x: literal.convolution(layer, x, RULE),
        (2, 6, 5),
    ),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(40, 4),
        lambda layer, x: literal.attention(layer, (x, x, x), RULE),
        (3, 2, 40),
    ),
    "LSTM": (lambda: nn.LSTM(6, 40), lambda layer, x: literal.lstm(layer, x, RULE), (3, 2, 6)),
}


def output_of(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.MultiheadAttention):
        return layer(x, x, x, need_weights=False)[0]
    output = layer(x)
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_converted_layer_takes_the_rule(name, autocast):
    make, twin_output, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    twin = copy.deepcopy(layer)
    report = meprop.convert(layer, RULE, min_features=1, when="always")
    assert [each.status for each in report.layers] == ["sparse"]
    assert "AboveShare(share=0.5" in repr(layer)
    assert "always" in str(report)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs = output_of(layer, x), twin_output(twin, x)
    for output in outputs:
        torch.manual_seed(1)
        (output.float() * torch.randn(output.shape)).sum().backward()
    eps = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
    for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
        assert other.grad.any()
        torch.testing.assert_close(one.grad, other.grad, rtol=16 * eps, atol=16 * eps * float(other.grad.abs().max()))


def test_a_layer_made_by_hand_takes_the_rule_and_leaves_most_out():
    torch.manual_seed(0)
    layer, x = meprop.nn.Linear(6, 200, rule=AboveShare(0.8)), torch.randn(1, 6)
    layer(x).square().sum().backward()
    grad = 2 * layer(x).detach()
    kept = int((layer.weight.grad != 0).any(dim=1).sum())
    assert kept == int((grad.abs() > 0.8 * grad.abs().max()).sum())
    assert 0 < kept < 100


def test_the_rule_goes_where_rules_with_scope_example_go():
    with pytest.raises(ValueError, match=r"sparse_grad=True with AboveShare"):
        meprop.nn.Linear(6, 200, rule=RULE, sparse_grad=True)
    with pytest.raises(meprop.NotSupportedError, match=r"AboveShare.* at each position"):
        meprop.nn.Conv2d(3, 20, 3, rule=RULE)


# ---------------------------------------------------------------- the layer: this much would be its file


class GRUCell(SparseLayer, nn.GRUCell):
    """`torch.nn.GRUCell` that back-propagates only what `rule` keeps of the gradients of each gate's two products.

    Args:
        *args: As `torch.nn.GRUCell`.
        rule: What to keep of the H entries of each product, e.g. `meprop.TopK(20)`.
        **kwargs: As `torch.nn.GRUCell`.
    """

    def __init__(self, *args: Any, rule: meprop.Rule, **kwargs: Any) -> None:
        policy = Policy(rule)
        super().__init__(*args, **kwargs)
        self.policy = policy.of_layer()

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Input [*, I] and state [*, H] to the next state [*, H]."""
        h = input.new_zeros(*input.shape[:-1], self.hidden_size) if hx is None else hx
        policy = self.policy.in_blocks(3)  # the rule chooses within each of three gates
        r_x, z_x, n_x = linear_with_policy(input, self.weight_ih, self.bias_ih, policy).chunk(3, dim=-1)
        r_h, z_h, n_h = linear_with_policy(h, self.weight_hh, self.bias_hh, policy).chunk(3, dim=-1)
        z = (z_x + z_h).sigmoid()
        return (1 - z) * (n_x + (r_x + r_h).sigmoid() * n_h).tanh() + z * h

    def extra_repr(self) -> str:
        """What torch's says, and the policy."""
        return super().extra_repr() + sparse_repr(self)


class GRUCellDescriptor(Descriptor[nn.GRUCell]):
    """Makes `meprop.convert` and the reports know it."""

    plain = nn.GRUCell
    sparse = GRUCell
    feature_name = "hidden units"

    def features(self, layer: nn.GRUCell) -> tuple[int, int]:
        """I, and H."""
        return layer.input_size, layer.hidden_size


# ---------------------------------------------------------------- and these its tests

INPUTS, UNITS, BATCH = 6, 20, 3


@pytest.fixture
def registered() -> Iterator[GRUCellDescriptor]:
    """A file of the library would call `register` at its end; tests take it back."""
    descriptor = GRUCellDescriptor()
    register(descriptor)
    yield descriptor
    unregister(descriptor)


class Recurrent(nn.Module):
    """A cell, step by step, and a narrow output layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.GRUCell(INPUTS, UNITS), nn.Linear(UNITS, 2)

    def next(self, x: Tensor, h: Tensor) -> Tensor:
        return self.cell(x, h)

    def forward(self, inputs_TNI: Tensor) -> Tensor:
        h = inputs_TNI.new_zeros(inputs_TNI.shape[1], UNITS)
        for x in inputs_TNI:
            h = self.next(x, h)
        return self.head(h)


class Literal(Recurrent):
    """The same, with a literal cell."""

    def __init__(self, rule: meprop.Rule) -> None:
        super().__init__()
        self.rule = rule

    def next(self, x: Tensor, h: Tensor) -> Tensor:
        cell = self.cell
        r_x, z_x, n_x = literal.linear(x, cell.weight_ih, cell.bias_ih, self.rule, 3).chunk(3, dim=-1)
        r_h, z_h, n_h = literal.linear(h, cell.weight_hh, cell.bias_hh, self.rule, 3).chunk(3, dim=-1)
        z = (z_x + z_h).sigmoid()
        return (1 - z) * (n_x + (r_x + r_h).sigmoid() * n_h).tanh() + z * h


def convert(model: nn.Module, rule: meprop.Rule, **options: Any) -> meprop.ConversionReport:
    return meprop.convert(model, rule, **{"when": "always", "min_features": UNITS, **options})


@pytest.mark.parametrize("batch", [(), (BATCH,)])
@pytest.mark.parametrize("given_state", [False, True])
def test_a_cell_that_keeps_all_is_torchs(batch, given_state):
    torch.manual_seed(0)
    ours, theirs = GRUCell(INPUTS, UNITS, rule=literal.KeepAll()), nn.GRUCell(INPUTS, UNITS)
    theirs.load_state_dict(ours.state_dict())
    x, h = torch.randn(*batch, INPUTS), torch.randn(*batch, UNITS)
    arguments = (x, h) if given_state else (x,)
    outputs = [cell(*arguments) for cell in (ours, theirs)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_cell_made_by_hand_is_sparse_in_each_of_its_gates():
    torch.manual_seed(0)
    cell = GRUCell(INPUTS, UNITS, rule=meprop.TopK(4, scope="batch"))
    cell(torch.randn(BATCH, INPUTS), torch.randn(BATCH, UNITS)).square().sum().backward()
    for weight in (cell.weight_ih, cell.weight_hh):
        assert (weight.grad.view(3, UNITS, -1) != 0).any(dim=2).sum(dim=1).tolist() == [4, 4, 4]
    assert repr(cell) == f"GRUCell({INPUTS}, {UNITS}, rule=TopK(k=4, scope='batch'))"
    with pytest.raises(TypeError, match=r"rule=0\.05"):
        GRUCell(INPUTS, UNITS, rule=0.05)


def test_a_cell_is_converted_in_place_and_reported(registered):
    model, plain = Recurrent(), Recurrent()
    parameters, x = list(model.parameters()), torch.randn(2, BATCH, INPUTS)
    report = convert(model, meprop.TopK(4))
    assert type(model.cell) is GRUCell
    cell, head = report.layers
    assert (cell.name, cell.kind, cell.in_features, cell.out_features) == ("cell", "GRUCell", INPUTS, UNITS)
    assert (cell.status, cell.k, cell.density, cell.reason) == ("sparse", 4, 0.2, "always")
    assert head.status == "dense"
    assert str(meprop.report(model)) == str(report)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("rule", [meprop.TopK(4), meprop.TopK(4, scope="batch"), meprop.CompensatedTopK(4)], ids=str)
def test_a_converted_cell_trains_as_its_literal_twin(registered, rule):
    models = Recurrent(), Literal(rule)
    assert [each.status for each in convert(models[0], rule).layers] == ["sparse", "dense"]
    start = models[0].cell.weight_hh.detach().clone()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for step in range(5):
        x = torch.randn(4, BATCH, INPUTS, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        assert_same_gradients(*models)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(models[0].cell.weight_hh, start)


def test_the_rule_and_the_layer_of_ones_own_together(registered):
    models, x = (Recurrent(), Literal(RULE)), torch.randn(4, BATCH, INPUTS)
    assert [each.status for each in convert(models[0], RULE).layers] == ["sparse", "dense"]
    for model in models:
        model(x).square().sum().backward()
    assert_same_gradients(*models)


def test_a_converted_cell_is_reverted_without_a_trace(registered):
    model, untouched = Recurrent(), Recurrent()
    convert(model, meprop.TopK(4))
    assert type(model.cell) is GRUCell
    meprop.revert(model)
    assert type(model.cell) is nn.GRUCell
    assert vars(model.cell).keys() == vars(untouched.cell).keys()
    x = torch.randn(2, BATCH, INPUTS)
    assert torch.equal(model(x), untouched(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_converted_cell_are_converted(registered, duplicate):
    model = Recurrent()
    convert(model, meprop.TopK(4))
    twin, x = duplicate(model), torch.randn(2, BATCH, INPUTS)
    assert type(twin.cell) is GRUCell
    assert twin.cell.rule == meprop.TopK(4)
    assert twin.cell.policy.record is not model.cell.policy.record
    for each in (model, twin):
        each(x).square().sum().backward()
    assert_same_gradients(twin, model)


def test_a_narrow_cell_and_a_subclass_stay_dense_and_say_why(registered):
    class OwnForward(nn.GRUCell):
        pass

    model = nn.ModuleDict({"narrow": nn.GRUCell(6, 19), "subclass": OwnForward(6, 20), "sparse": nn.GRUCell(6, 20)})
    report = convert(model, meprop.TopK(4))
    assert [layer.status for layer in report.layers] == ["dense", "dense", "sparse"]
    assert report.layers[0].reason == "narrow: 19 hidden units, min_features=20"
    assert "OwnForward is a subclass of GRUCell" in report.layers[1].reason


@pytest.mark.parametrize("faster", [False, True])
def test_a_cell_decides_once_by_measurement(registered, monkeypatch, faster):
    asked: list[object] = []
    decision = meprop.speed.Decision(faster, BATCH, 1.0, 1.0)
    monkeypatch.setattr(meprop.speed, "decide", lambda *arguments: asked.append(arguments) or decision)
    model, plain, x = Recurrent(), Recurrent(), torch.randn(4, BATCH, INPUTS)
    report = convert(model, meprop.TopK(4, scope="batch"), when="auto")
    assert "to be measured at its first backward pass" in report.layers[0].reason
    for each in (model, plain):
        each(x).square().sum().backward()
    assert len(asked) == 1
    rows = int((model.cell.weight_hh.grad != 0).any(dim=1).sum())
    assert rows < 3 * UNITS if faster else rows == 3 * UNITS
    if not faster:
        assert_same_gradients(model, plain)


def test_a_layer_that_is_not_registered_is_left_alone():
    model = Recurrent()
    with pytest.warns(meprop.NoEffectWarning, match="no layer is sparse"):
        report = convert(model, meprop.TopK(4))
    assert [layer.name for layer in report.layers] == ["cell", "head"]
    assert type(model.cell) is nn.GRUCell


def test_a_class_has_one_descriptor(registered):
    with pytest.raises(ValueError, match="GRUCell has a descriptor already"):
        register(GRUCellDescriptor())


def test_a_layer_made_from_another_takes_its_own_descriptor():
    """Not that of the class that it is a subclass of, which became known before."""

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class SparseScaled(SparseLayer, Scaled):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * linear_with_policy(input, self.weight, self.bias, self.policy)

    class ScaledDescriptor(Descriptor[Scaled]):
        plain, sparse = Scaled, SparseScaled

        def features(self, layer: Scaled) -> tuple[int, int]:
            return layer.in_features, layer.out_features

    descriptor = ScaledDescriptor()
    register(descriptor)
    try:
        model = nn.Sequential(Scaled(8, 40), nn.Linear(40, 40))
        report = convert(model, meprop.TopK(4))
        assert [(layer.kind, layer.status) for layer in report.layers] == [("Scaled", "sparse"), ("Linear", "sparse")]
        assert [type(layer) for layer in model] == [SparseScaled, meprop.nn.Linear]
        meprop.revert(model)
        assert [type(layer) for layer in model] == [Scaled, nn.Linear]
    finally:
        unregister(descriptor)
