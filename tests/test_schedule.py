"""Schedules of rules: which rule each layer has in each step, what stays, and what a dense phase costs."""

import copy
import doctest
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import meprop
from meprop import schedule as module
from meprop import speed

RULE = meprop.Sampled(noise=1.0, ceiling=1)
UNIFIED = meprop.TopK(3, scope="batch")


def dense_ends(step, rule):
    """At the top level, so that it can be pickled."""
    return rule if 2 <= step < 4 else None


def converted(rule=UNIFIED, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 50))
    meprop.convert(model, rule, **{"min_features": 5, "when": "always", **options})
    return model


def rows(model, x=None):
    """How many rows of the last weight get a gradient."""
    model.zero_grad()
    model(torch.randn(6, 8) if x is None else x).square().sum().backward()
    grad = model[2].weight.grad
    return int((grad.to_dense().abs().sum(dim=1) > 0).sum())


def statuses(model):
    return [layer.status for layer in meprop.report(model).layers]


# ---------------------------------------------------------------- phases


@pytest.mark.parametrize("options", [{}, {"sparse_grad": True}, {"compute_dtype": torch.bfloat16}], ids=str)
def test_phases_change_at_their_step(options):
    model = converted(**options)
    schedule = meprop.RuleSchedule(model, dense_ends)
    found = []
    for _ in range(6):
        found.append(rows(model))
        schedule.step()
    assert found == [50, 50, 3, 3, 50, 50]
    assert schedule.steps == 6
    assert model[0].policy == replace(converted(**options)[0].policy, rule=module.DENSE, own_rule=UNIFIED)


def test_layers_with_different_rules_go_on_with_their_own():
    model, other = converted(), meprop.TopK(7)
    model[2].rule = other
    schedule = meprop.RuleSchedule(model, lambda step, rule: None if step == 1 else rule)
    found = [(model[0].rule, model[2].rule)]
    for _ in range(2):
        schedule.step()
        found.append((model[0].rule, model[2].rule))
    assert found == [(UNIFIED, other), (module.DENSE, module.DENSE), (UNIFIED, other)]


LAYERS = {
    "Linear": (lambda: nn.Linear(8, 40), (5, 8), RULE),
    "Conv2d": (lambda: nn.Conv2d(3, 40, 3), (2, 3, 6, 6), UNIFIED),
    "pointwise": (lambda: nn.Conv1d(3, 40, 1), (2, 3, 6), RULE),
    "LSTM": (lambda: nn.LSTM(8, 40), (4, 2, 8), RULE),
    "attention": (lambda: nn.MultiheadAttention(40, 4), (4, 2, 40), RULE),
    "per product": (lambda: nn.Linear(8, 40), (5, 8), meprop.PerProduct(input=RULE, weight=None)),
}


def gradients(layer, x):
    inputs = (x,) * 3 if isinstance(layer, nn.MultiheadAttention) else (x,)
    output = layer(*inputs)
    output = output[0] if isinstance(output, tuple) else output
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    return [x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("name", LAYERS)
def test_a_dense_phase_is_torchs_own_bit_for_bit(name):
    make, shape, rule = LAYERS[name]
    torch.manual_seed(0)
    plain, x = make(), torch.randn(shape)
    layer = copy.deepcopy(plain)
    meprop.convert(layer, rule, min_features=5, when="always")
    schedule = meprop.RuleSchedule(layer, lambda step, rule: None if step == 0 else rule)
    expected = gradients(plain, x.clone().requires_grad_())
    for dense, gradient in zip(expected, gradients(layer, x.clone().requires_grad_()), strict=True):
        assert torch.equal(dense, gradient)
    schedule.step()
    layer.zero_grad()
    sparse = gradients(layer, x.clone().requires_grad_())
    assert not torch.equal(sparse[0], expected[0])
    assert layer.rule == rule


def test_a_dense_phase_has_no_node_of_ours():
    model = converted()
    schedule = meprop.RuleSchedule(model, dense_ends)
    assert type(model(torch.randn(6, 8)).grad_fn).__name__ == "AddmmBackward0"
    schedule.load_state_dict({"steps": 2})
    assert type(model(torch.randn(6, 8)).grad_fn).__name__ == "_LinearBackward"


def test_an_annealed_budget_changes_what_is_kept():
    model = converted(RULE)
    schedule = meprop.RuleSchedule(
        model, lambda step, _: meprop.Sampled(noise=meprop.anneal(0.1, 10.0, step / 2), ceiling=1)
    )
    x, kept, noises = torch.randn(200, 8), [], []
    for _ in range(4):
        record = model[2].policy.record
        before = record.kept
        rows(model, x)
        kept.append(record.kept - before)
        noises.append(model[2].rule.noise)
        schedule.step()
    assert noises == pytest.approx([0.1, 1.0, 10.0, 10.0])
    assert kept[0] > 1.5 * kept[1] > 1.5 * 1.5 * kept[2] > 0


# ---------------------------------------------------------------- with when="auto"


@pytest.mark.parametrize("faster", [True, False])
def test_a_layer_is_measured_once_with_its_own_rule_and_stays_so(monkeypatch, faster):
    measured = []

    def decide(rule, shape):
        measured.append(rule)
        return speed.Decision(faster, shape.rows, 100.0, 10.0)

    monkeypatch.setattr(speed, "decide", decide)
    model = converted(meprop.TopK(3), when="auto")
    schedule = meprop.RuleSchedule(
        model, lambda step, _: None if step == 0 else meprop.TopK(meprop.anneal(39, 2, step / 9))
    )
    rows(model)
    assert measured == []  # a dense phase measures nothing
    for _ in range(9):
        schedule.step()
        rows(model)
    assert measured == [meprop.TopK(3)] * 2
    assert model[2].rule == meprop.TopK(2)
    assert statuses(model) == ["sparse" if faster else "dense"] * 2


def test_attention_is_measured_with_its_own_rule_in_blocks(monkeypatch):
    measured = []

    def decide(rule, shape):
        measured.append(rule)
        return speed.Decision(True, shape.rows, 100.0, 10.0)

    monkeypatch.setattr(speed, "decide", decide)
    layer = nn.MultiheadAttention(40, 4)
    meprop.convert(layer, meprop.TopK(3), min_features=5)
    meprop.RuleSchedule(layer, lambda step, rule: meprop.TopK(20))
    gradients(layer, torch.randn(4, 2, 40).requires_grad_())
    assert measured == [meprop.TopK(3)]  # of the output's projection, which is the first to go backward
    layer.decision = None
    layer.out_proj.requires_grad_(False)
    x = torch.randn(4, 2, 40)
    layer._linear(x, layer.in_proj_weight, None, 3).sum().backward()
    assert measured[1:] == [meprop.InBlocks(meprop.TopK(3), 3)]


# ---------------------------------------------------------------- state, copies, and the way back


def test_a_state_goes_on_where_it_was_taken():
    model = converted()
    schedule = meprop.RuleSchedule(model, dense_ends)
    for _ in range(3):
        schedule.step()
    state = schedule.state_dict()
    assert state == {"steps": 3}
    other = converted()
    resumed = meprop.RuleSchedule(other, dense_ends)
    resumed.load_state_dict(state)
    assert [rows(model), rows(other)] == [3, 3]
    for each in (schedule, resumed):
        each.step()
    assert [rows(model), rows(other)] == [50, 50]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_by_itself(copied):
    model = converted()
    schedule = meprop.RuleSchedule(model, dense_ends)
    twin, twins = copied((model, schedule))
    for _ in range(2):
        twins.step()
    assert [rows(model), rows(twin)] == [50, 3]
    alone = copied(model)  # in a dense phase; a new schedule finds the rule that it was converted with
    meprop.RuleSchedule(alone, lambda step, rule: rule)
    assert rows(alone) == 3


def test_a_model_reverts_in_any_phase_and_the_schedule_goes_on_without_it():
    model = converted()
    schedule = meprop.RuleSchedule(model, dense_ends)
    meprop.revert(model)
    assert type(model[0]) is nn.Linear
    assert "policy" not in vars(model[0])
    for _ in range(3):
        schedule.step()
    assert type(model[2]) is nn.Linear
    assert rows(model) == 50


def test_a_new_rule_of_a_layer_is_the_one_to_go_on_from():
    model = converted()
    schedule = meprop.RuleSchedule(model, lambda step, rule: None if step == 1 else rule)
    schedule.step()
    model[0].rule = meprop.TopK(9)
    meprop.convert(model, meprop.TopK(4), filter=lambda name, _: name == "2", min_features=5, when="always")
    schedule.step()
    assert (model[0].rule, model[2].rule) == (meprop.TopK(9), meprop.TopK(4))


def test_paused_shows_the_rules_themselves():
    model = converted()
    schedule = meprop.RuleSchedule(model, dense_ends)
    assert statuses(model) == ["dense", "dense"]
    assert f"by a schedule of {UNIFIED}" in str(meprop.report(model))
    with schedule.paused():
        assert statuses(model) == ["sparse", "sparse"]
    assert statuses(model) == ["dense", "dense"]


def test_a_simplifier_counts_in_all_phases():
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    simplifier = meprop.Simplifier(model, 0.0, optimizer=optimizer, check_every=100)
    schedule = meprop.RuleSchedule(model, lambda step, rule: None if step == 0 else rule)
    rows(model)
    assert model[0].activity.examples == 6
    schedule.step()
    rows(model)
    assert model[0].activity.examples == 12
    assert simplifier is not None


def test_a_compiled_model_follows_its_schedule():
    torch._dynamo.reset()
    model = converted()
    schedule = meprop.RuleSchedule(model, dense_ends)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for _ in range(6):
        model.zero_grad()
        run(torch.randn(6, 8)).square().sum().backward()
        found.append(int((model[2].weight.grad.abs().sum(dim=1) > 0).sum()))
        schedule.step()
    assert found == [50, 50, 3, 3, 50, 50]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("model", "rule_at", "message"),
    [
        (None, dense_ends, "model is of type NoneType"),
        (converted(), 3, "rule_at=3 is of type int; it is a function of step and rule"),
        (converted(), lambda step, rule: 0.5, r"is 0.5, of type float; it is a rule, or None for a dense step"),
    ],
)
def test_wrong_arguments_are_refused(model, rule_at, message):
    with pytest.raises(TypeError, match=message):
        meprop.RuleSchedule(model, rule_at)


def test_a_rule_that_a_layer_cannot_have_changes_nothing():
    model = nn.Sequential(nn.Conv1d(3, 40, 1), nn.Conv1d(40, 50, 3))
    meprop.convert(model, UNIFIED, min_features=5, when="always")
    schedule = meprop.RuleSchedule(model, lambda step, rule: rule if step < 3 else meprop.TopK(3))
    schedule.step()
    schedule.step()
    with pytest.raises(
        meprop.NotSupportedError, match=r"rule_at\(3, .*which layer '1' cannot have.*None for a dense step"
    ):
        schedule.step()
    assert (model[0].rule, model[1].rule, schedule.steps) == (UNIFIED, UNIFIED, 2)


def test_a_row_sparse_layer_keeps_its_scope():
    model = converted(sparse_grad=True)
    with pytest.raises(ValueError, match="sparse_grad=True with"):
        meprop.RuleSchedule(model, lambda step, rule: meprop.TopK(3))


@pytest.mark.parametrize("state", [{}, {"steps": -1}, {"steps": True}, {"steps": 1.5}])
def test_a_state_of_something_else_is_refused(state):
    with pytest.raises(ValueError, match="that of a RuleSchedule"):
        meprop.RuleSchedule(converted(), dense_ends).load_state_dict(state)


def test_a_model_without_converted_layers_is_warned_of():
    with pytest.warns(meprop.NoEffectWarning, match=r"call meprop\.convert"):
        meprop.RuleSchedule(nn.Linear(8, 8), dense_ends)


# ---------------------------------------------------------------- anneal


def test_annealing_is_geometric_and_ends():
    assert [meprop.anneal(0.1, 10.0, share) for share in (-1, 0, 0.5, 1, 2)] == pytest.approx([0.1, 0.1, 1, 10, 10])
    assert [meprop.anneal(400, 4, share) for share in (0, 0.5, 1)] == [400, 40, 4]


@pytest.mark.parametrize(
    "arguments", [(0, 1, 0.5), (1, -1, 0.5), (1, float("inf"), 0.5), (1, 2, float("nan")), (True, 2, 1)]
)
def test_numbers_that_cannot_be_annealed_are_refused(arguments):
    with pytest.raises(ValueError, match=r"(share|start|end)="):
        meprop.anneal(*arguments)


def test_the_examples_in_the_docstrings_run():
    results = doctest.testmod(module)
    assert results.failed == 0
    assert results.attempted >= 8
