"""when="auto": a layer whose gradients ask for more than pays is dense, and asks its rule now and then."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import meprop
from meprop import speed
from meprop.record import Record

RULE = meprop.Sampled(noise=0.25)
STREAK, EVERY = 32, 17


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MEPROP_CACHE", str(tmp_path))


def decide(monkeypatch, break_even):
    monkeypatch.setattr(speed, "decide", lambda rule, shape: speed.Decision(True, shape.rows, 2.0, 1.0, break_even))


@pytest.fixture
def asked(monkeypatch):
    """A list that grows whenever a rule of draws is asked."""
    asked, as_entries = [], meprop.Sampled.as_entries
    monkeypatch.setattr(meprop.Sampled, "as_entries", lambda *args: asked.append(1) or as_entries(*args))
    return asked


# ---------------------------------------------------------------- where dense is as fast


@pytest.mark.parametrize(
    ("usual", "larger", "expected"),
    [
        (20.0, 80.0, 0.04 + (100 / 1.05 - 20) / 60 * 0.21),  # on a line through both
        (20.0, 99.0, 0.04 + (100 / 1.05 - 20) / 79 * 0.21),  # between the two
        (20.0, 21.0, 1.0),  # beyond everything
        (20.0, 15.0, 1.0),  # the time does not grow
    ],
)
@pytest.mark.parametrize(
    "rule",
    [
        RULE,
        meprop.TopK(energy=0.9),
        meprop.PerProduct(input=RULE, weight=meprop.TopK(energy=0.9)),
        meprop.InBlocks(RULE, 4),
    ],
    ids=["sampled", "energy", "per product", "in blocks"],
)
def test_the_break_even_lies_on_a_line_through_two_measurements(monkeypatch, rule, usual, larger, expected):
    times = {str(rule.typical(0.04)): usual, str(rule.typical(0.25)): larger}
    monkeypatch.setattr(speed, "measure", lambda rule, shape: (100.0, times.pop(str(rule))))
    layer = nn.Linear(20, 200)
    meprop.convert(layer, rule)
    layer(torch.randn(3, 20)).sum().backward()
    assert layer.decision.break_even == pytest.approx(expected)
    limit = f"as fast as dense at {expected:.0%} kept"
    assert (limit in meprop.report(layer).layers[0].reason) == (expected < 1)
    assert not times


@pytest.mark.parametrize(
    ("rule", "dense_us"), [(meprop.TopK(5), 100.0), (meprop.Sampled(0.1), 100.0), (RULE, 5.0)], ids=str
)
def test_nothing_else_is_measured_where_nothing_depends_on_it(monkeypatch, rule, dense_us):
    """The rule has a density of its own, or dense is faster at the usual one."""
    rules = []
    monkeypatch.setattr(speed, "measure", lambda rule, shape: rules.append(rule) or (dense_us, 20.0))
    layer = nn.Linear(20, 200)
    meprop.convert(layer, rule)
    layer(torch.randn(3, 20)).sum().backward()
    assert len(rules) == 1
    assert layer.decision.break_even == 1.0


# ---------------------------------------------------------------- layers that keep too much


def even_and_few():
    """An output gradient of which a budget keeps about half, and one of which it keeps two entries."""
    even, few = torch.randn(20, 200), torch.zeros(20, 200)
    few[3, 5] = few[4, 6] = 1.0
    return even, few


@pytest.mark.parametrize("when", ["auto", "always"])
@pytest.mark.parametrize("break_even", [0.3, 0.9], ids=["above", "below"])
@pytest.mark.parametrize("options", [{}, {"compute_dtype": torch.bfloat16}], ids=["plain", "bfloat16"])
def test_a_rule_that_keeps_too_much_for_long_is_asked_now_and_then(when, break_even, options, monkeypatch, asked):
    decide(monkeypatch, break_even)
    model = nn.Sequential(nn.Linear(5, 200))
    meprop.convert(model, meprop.Sampled(noise=0.25, ceiling=0.99), when=when, **options)
    rests = when == "auto" and break_even == 0.3

    def passes(count, grad):
        asked.clear()
        for _ in range(count):
            model(torch.randn(20, 5)).backward(grad)
        return len(asked)

    even, few = even_and_few()
    assert passes(STREAK, even) == STREAK
    assert passes(3 * EVERY, even) == (3 if rests else 3 * EVERY)
    assert ("dense for now" in str(meprop.report(model))) == rests
    assert passes(EVERY, few) == (1 if rests else EVERY)  # the last one sees that the gradient has changed
    assert "dense for now" not in str(meprop.report(model))
    assert passes(10, few) == 10
    (layer,) = meprop.report(model).layers
    assert f"{STREAK + 4 * EVERY + 10} passes" in layer.reason
    assert f"{4 * (EVERY - 1) if rests else 0} of them dense" in layer.reason


@pytest.mark.parametrize("when", ["auto", "always"])
def test_a_rule_that_keeps_everything_is_asked_now_and_then(when, monkeypatch, asked):
    decide(monkeypatch, 1.0)
    layer = nn.Linear(5, 200)
    meprop.convert(layer, RULE, when=when)
    for _ in range(STREAK + 2 * EVERY):
        layer(torch.randn(20, 5)).backward(torch.randn(20, 200))  # half of it is more than the ceiling
    assert len(asked) == (STREAK + 2 if when == "auto" else STREAK + 2 * EVERY)
    assert layer.policy.record.density == 1.0


def dense_gradients(layer, x, grad):
    """The gradients of torch's own layer, beside those of ours."""
    plain = copy.deepcopy(layer)
    meprop.revert(plain)
    results = []
    for module in (layer, plain):
        module.zero_grad()
        output = module(x)
        output = output[0] if isinstance(output, tuple) else output
        output.backward(grad)
        results.append([parameter.grad for parameter in module.parameters()])
    return results


@pytest.mark.parametrize("kind", ["linear", "pointwise", "convolution", "lstm"])
def test_a_layer_that_rests_is_torchs_own_and_reports_what_was_kept(kind, monkeypatch):
    decide(monkeypatch, 0.01)
    layer, x, shape = {
        "linear": lambda: (nn.Linear(5, 200), torch.randn(20, 5), (20, 200)),
        "pointwise": lambda: (nn.Conv2d(3, 64, 1), torch.randn(4, 3, 5, 5), (4, 64, 5, 5)),
        "convolution": lambda: (nn.Conv1d(3, 64, 3), torch.randn(4, 3, 7), (4, 64, 5)),
        "lstm": lambda: (nn.LSTM(5, 40), torch.randn(6, 4, 5), (6, 4, 40)),
    }[kind]()
    meprop.convert(layer, RULE, min_features=1)
    grad = torch.randn(shape) ** 5  # a budget keeps few of its entries
    for _ in range(STREAK):
        output = layer(x)
        (output[0] if kind == "lstm" else output).backward(grad)
    record = layer.policy.record
    kept, seen, passes = record.kept, record.seen, record.passes
    for _ in range(EVERY - 1):
        ours, plain = dense_gradients(layer, x, grad)
        assert all(map(torch.equal, ours, plain))
    assert record.passes == passes * (1 + (EVERY - 1) / STREAK)
    assert record.seen == seen * (1 + (EVERY - 1) / STREAK)
    assert record.kept - kept == record.seen - seen
    ours, plain = dense_gradients(layer, x, grad)  # the rule is asked
    assert not all(map(torch.equal, ours, plain))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("layer", "size"),
    [(nn.Linear(5, 200), (5,)), (nn.Conv1d(3, 64, 3), (3, 7)), (nn.Conv1d(3, 64, 3), (2, 3, 7))],
    ids=["linear", "unbatched convolution", "convolution"],
)
def test_a_layer_that_rests_takes_what_it_takes_otherwise(layer, size, autocast, monkeypatch):
    decide(monkeypatch, 0.01)
    layer, x = copy.deepcopy(layer), torch.randn(size)
    plain = copy.deepcopy(layer)
    meprop.convert(layer, RULE, min_features=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for _ in range(STREAK + 2):
            output = layer(x)
            output.float().square().sum().backward()
        assert layer.policy.record.sparse_passes == STREAK
        expected = plain(x)
    assert output.dtype == expected.dtype
    assert torch.equal(output, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["linear", "lstm"])
def test_a_layer_under_checkpointing_saves_the_same_tensors_in_both_passes(kind, use_reentrant, monkeypatch):
    decide(monkeypatch, 0.01)
    layer = nn.Linear(5, 200) if kind == "linear" else nn.LSTM(5, 40)
    meprop.convert(layer, RULE, min_features=1)
    x = torch.randn(3, 20, 5, requires_grad=True)
    for _ in range(STREAK + 2 * EVERY):
        output = checkpoint(layer, x, use_reentrant=use_reentrant)
        (output[0] if kind == "lstm" else output).square().sum().backward()
        assert all(bool(parameter.grad.isfinite().all()) for parameter in layer.parameters())


@pytest.mark.parametrize("options", [{"compute_dtype": torch.bfloat16}, {}], ids=["compute_dtype", "autocast"])
def test_an_lstm_that_rounds_does_so_in_every_pass(options, monkeypatch, asked):
    """Torch's own does not round, and has no autocast on some processors."""
    decide(monkeypatch, 0.01)
    layer, x = nn.LSTM(5, 40), torch.randn(6, 4, 5)
    meprop.convert(layer, RULE, min_features=1, **options)
    with torch.autocast("cpu", torch.bfloat16, enabled=not options):
        with torch.no_grad():
            layer(x)
        assert layer.decision is None  # a pass without gradients decides nothing
        for _ in range(STREAK + 2 * EVERY):
            layer(x)[0].float().square().sum().backward()
    assert layer.policy.record.rested == 0
    assert len(asked) == STREAK + 2 * EVERY


def test_a_pass_without_gradients_is_none(monkeypatch):
    decide(monkeypatch, 0.01)
    layer = nn.Linear(5, 200)
    meprop.convert(layer, RULE)
    even, _ = even_and_few()
    for _ in range(STREAK):
        layer(torch.randn(20, 5)).backward(even)
    with torch.no_grad():
        layer(torch.randn(20, 5))
    assert (layer.policy.record.passes, layer.policy.record.rested) == (STREAK, 0)


def test_a_time_step_is_no_pass_of_its_own_and_each_product_is_asked_in_its_turn():
    record = Record()
    for _ in range(STREAK - 1):
        record.note(kept=80, seen=80, passes=25, dense_passes=25)  # 25 time steps
    assert not record.rests()
    record.note(kept=80, seen=80, passes=25, dense_passes=25)
    asked = [number for number in range(4 * EVERY) if not record.rests()]
    assert {number % 2 for number in asked} == {0, 1}  # of two products, one after the other
    assert {number % 3 for number in asked} == {0, 1, 2}


def test_a_record_goes_on_from_its_state():
    record, other = Record(speed.Decision(True, 4, 2.0, 1.0, 0.5)), Record()
    for _ in range(STREAK + 1):
        record.note(kept=60, seen=80, passes=1, dense_passes=0)
    record.rests()
    other.load_state_dict(copy.deepcopy(record.state_dict()))
    assert other.state_dict() == record.state_dict()
    assert [other.rests() for _ in range(2 * EVERY)] == [record.rests() for _ in range(2 * EVERY)]


# ---------------------------------------------------------------- what may happen to a layer that rests


def resting(monkeypatch, **options):
    """A linear layer that rests, and a function that runs passes of a gradient and says how many were sparse."""
    decide(monkeypatch, 0.3)
    layer, (even, few) = nn.Linear(5, 200), even_and_few()
    meprop.convert(layer, meprop.Sampled(noise=0.25, ceiling=0.99), **options)

    def passes(count, grad=few):
        before = layer.policy.record.sparse_passes
        for _ in range(count):
            layer(torch.randn(20, 5)).backward(grad)
        return layer.policy.record.sparse_passes - before

    assert passes(STREAK, even) == STREAK
    assert passes(1, even) == 0
    return layer, passes


@pytest.mark.parametrize("rule", [meprop.TopK(5), meprop.Sampled(0.1), RULE], ids=str)
def test_a_new_rule_is_asked_at_once(rule, monkeypatch):
    layer, passes = resting(monkeypatch)
    layer.rule = rule
    assert passes(5) == 5


def test_a_new_decision_is_made_at_once(monkeypatch):
    layer, passes = resting(monkeypatch)
    layer.decision = None
    assert passes(5) == 5
    assert layer.decision is not None


def test_a_rule_of_a_schedule_that_fixes_a_density_is_asked_in_every_pass(monkeypatch):
    layer, passes = resting(monkeypatch)
    meprop.RuleSchedule(layer, lambda step, rule: meprop.TopK(5))
    assert passes(EVERY) == EVERY


def test_empty_batches_tell_nothing(monkeypatch):
    decide(monkeypatch, 0.3)
    layer = nn.Linear(5, 200)
    meprop.convert(layer, RULE)
    for _ in range(STREAK):
        layer(torch.randn(0, 5)).sum().backward()
    assert not layer.policy.record.keeps_too_much
    assert layer.policy.record.costly_streak == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"compute_dtype": torch.bfloat16}], ids=["plain", "bfloat16"])
def test_a_pass_under_checkpointing_counts_once(use_reentrant, options, monkeypatch):
    layer, _ = resting(monkeypatch, **options)
    x, (even, _) = torch.randn(20, 5, requires_grad=True), even_and_few()
    for _ in range(2 * EVERY):
        checkpoint(layer, x, use_reentrant=use_reentrant).backward(even)
    assert layer.policy.record.passes == STREAK + 1 + 2 * EVERY


def test_a_transform_of_torch_func_is_refused_in_every_pass(monkeypatch):
    layer, passes = resting(monkeypatch)
    for _ in range(EVERY):
        with pytest.raises(meprop.NotSupportedError, match=r"torch\.func"):
            torch.func.grad(lambda x: layer(x).sum())(torch.randn(20, 5))
    assert passes(1) == 0  # none of them counts


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_by_itself(how, monkeypatch):
    layer, passes = resting(monkeypatch)
    other, record = how(layer), layer.policy.record
    assert passes(EVERY) == 2  # it is asked once, and again as it kept little
    assert not record.keeps_too_much
    assert other.policy.record.keeps_too_much
