"""The parts of `meprop.advise`: the free step, what a rule loses, folded names, and the decision."""

from __future__ import annotations

import math
import re
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import meprop
from meprop import speed
from meprop.advice import mind
from meprop.advice.decide import decide
from meprop.advice.free import free_backward
from meprop.advice.gradients import Agreement, agreements
from meprop.advice.mind import cast_seconds, note_of_disturbance
from meprop.advice.record import RuleAdvice
from meprop.advice.text import code, short
from meprop.advice.trial import Phases, Trial
from meprop.advice.ways import DENSE, FREE, Ways, typical
from meprop.names import common_name, folded
from meprop.rules.base import Rule

LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 5)),
    "lstm": (lambda: nn.LSTM(6, 8, 2), (5, 2, 6)),
    "attention": (lambda: Own(8), (2, 5, 8)),
}


class Own(nn.MultiheadAttention):
    def __init__(self, width):
        super().__init__(width, 2, batch_first=True)

    def forward(self, x, **options):
        return super().forward(x, x, x, **options)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_free_layer_has_torchs_outputs_and_zeros_for_gradients(kind):
    make, shape = LAYERS[kind]
    layer = make()
    x = torch.randn(shape, requires_grad=True)
    expected = layer(x)
    found = free_backward(layer.forward)(x)
    first = found[0] if isinstance(found, tuple) else found
    torch.testing.assert_close(first, expected[0] if isinstance(expected, tuple) else expected)
    first.square().sum().backward()
    for each in (x, *layer.parameters()):
        assert torch.equal(each.grad, torch.zeros_like(each))


@pytest.fixture(autouse=True)
def sparse(monkeypatch):
    monkeypatch.setattr(speed, "decide", lambda rule, shape: speed.Decision(True, shape.rows, 10.0, 1.0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 200), nn.Dropout(0.5), nn.ReLU(), nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 4)
    )


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


BATCHES = [(torch.randn(16, 12), torch.randint(4, (16,))) for _ in range(3)]


def test_ways_switch_classes_and_give_everything_back():
    model = network()
    before = [(type(each), sorted(vars(each))) for each in model.modules()]
    ways = Ways(model, [meprop.TopK(0.1), meprop.Sampled()], None, 128)
    assert set(ways.layers) == {"0", "3"}
    x = BATCHES[0][0]
    model.eval()
    outputs = {}
    for name in (*ways.names, *reversed(ways.names)):
        ways.take(name)
        outputs[name] = model(x)
        sparse = [isinstance(each, meprop.nn.Linear) for each in model.modules()]
        assert sum(sparse) == (2 if name in ways.rules else 0)
        assert ("forward" in vars(model[0])) == (name == FREE)
    assert all(torch.equal(outputs[DENSE], each) for each in outputs.values())
    ways.take(DENSE)
    after = [(type(each), sorted(set(vars(each)) - {"_meprop_reason"})) for each in model.modules()]
    assert after == before


def test_agreements_are_those_of_gradients_by_hand():
    model, rule = network(), meprop.TopK(0.1, "batch")
    trial = Trial(model, loss, None)
    ways = Ways(trial.model, [rule], None, 128)
    torch.manual_seed(5)
    (found,), noise = (
        each if not isinstance(each, dict) else each.values() for each in agreements(trial, ways, BATCHES)
    )

    torch.manual_seed(5)
    sparse = deepcopy(model)
    meprop.convert(sparse, rule, when="always")
    pairs, firsts = [], []
    for batch in BATCHES:
        seed = int(torch.randint(2**31, ()))
        both = []
        for each in (model, sparse):
            output = []
            handle = each[0].register_forward_hook(lambda _m, _i, out, output=output: output.append(out))
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                wanted = [each[0].weight, each[3].weight]
                value = loss(each, batch)
                grads = torch.autograd.grad(value, [*wanted, output[0]])
            handle.remove()
            both.append((torch.cat([grad.flatten() for grad in grads[:2]]), grads[2].flatten()))
        pairs.append((both[0][0], both[1][0]))
        firsts.append((both[0][1], both[1][1]))
    for got, expected in zip(found, (pairs, firsts), strict=True):
        dense, kept = (torch.cat(each) for each in zip(*expected, strict=True))
        assert got.error == pytest.approx(((kept - dense).norm() / dense.norm()).item(), rel=1e-4)
        assert got.cosine == pytest.approx(torch.cosine_similarity(dense, kept, dim=0).item(), rel=1e-4)
        assert 0 < got.error < 1
    gradients = torch.stack([dense for dense, _ in pairs])
    variance = gradients.var(dim=0).sum() / gradients.square().sum(dim=1).mean()
    assert noise.error == pytest.approx(variance.sqrt().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.mlp.up", "layers.*.mlp.up"),
        ("encoder.layer.11.attention.self.query", "encoder.layer.*.attention.self.query"),
        ("0", "*"),
        ("conv1", "conv1"),
        ("block2.0", "block2.*"),
        ("", ""),
    ],
)
def test_numbers_of_lists_are_folded(name, expected):
    assert folded(name) == expected


def test_a_busy_machine_is_said():
    calm, busy = ([[Phases(each, 0.0, 0.0) for each in of]] for of in ([1.0, 1.0, 1.1], [1.0, 1.5, 1.6]))
    assert not list(note_of_disturbance(calm, typical(calm)))
    (note,) = note_of_disturbance(busy, typical(busy))
    assert "50% longer" in note


def test_a_name_has_a_star_where_layers_differ():
    assert common_name(["layers.0.mlp.0", "layers.1.mlp.0"]) == "layers.*.mlp.0"
    assert common_name(["0.2", "1.3"]) == "*.*"
    assert common_name(["layers.0.mlp.0"]) == "layers.0.mlp.0"
    assert common_name([""]) == ""


RULES = [
    meprop.Sampled(noise=0.25),
    meprop.Sampled(0.04, exact_sum=True),
    meprop.TopK(0.04, "global"),
    meprop.TopK(20),
    meprop.TopK(energy=0.99),
    meprop.CompensatedTopK(0.04),
    meprop.PerProduct(input=None, weight=meprop.TopK(0.04)),
    meprop.InBlocks(meprop.TopK(0.04), 3),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_code_of_a_rule_is_the_rule(rule):
    assert eval(code(rule), {"meprop": meprop}) == rule


# ---------------------------------------------------------------- the decision


def tried(rule, speedup, of_noise, *, sparse_layers=1):
    agreement = Agreement(0.9, of_noise) if sparse_layers else None
    return RuleAdvice(rule, 10 / speedup, speedup, 0.04, sparse_layers, rule.unbiased, agreement, agreement, of_noise)


SAMPLED, NOISY, TOPK = meprop.Sampled(noise=0.25), meprop.Sampled(noise=1.0), meprop.TopK(0.04, "global")
DECISIONS = {
    "the fastest that is faithful": ([(SAMPLED, 1.3, 0.5), (NOISY, 1.4, 0.9)], 2.0, SAMPLED),
    "unbiased where it is nearly as fast": ([(SAMPLED, 1.3, 0.5), (TOPK, 1.35, 0.3)], 2.0, SAMPLED),
    "biased where it is much faster": ([(SAMPLED, 1.1, 0.5), (TOPK, 1.35, 0.3)], 2.0, TOPK),
    "not biased by much": ([(SAMPLED, 1.1, 0.5), (TOPK, 1.35, 0.8)], 2.0, SAMPLED),
    "nothing to gain": ([(SAMPLED, 1.06, 0.5)], 1.04, "Leave it dense: at most 1.04x is possible here."),
    "no gain": ([(SAMPLED, 1.02, 0.5)], 1.5, "Leave it dense: the fastest rule, .* makes the step 1.02x as fast"),
    "too far": ([(NOISY, 1.3, 1.5)], 1.5, "too far from the dense ones"),
    "all measured dense": ([(SAMPLED, 1.0, 0.5, 0)], 1.5, "each layer measured"),
    "no layers": ([(SAMPLED, 1.0, 0.5, 0)], 1.0, "Leave it dense: at most 1.00x is possible here."),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_the_decision(case):
    rows, bound, expected = DECISIONS[case]
    results = [tried(*row[:3], sparse_layers=row[3] if len(row) > 3 else 1) for row in rows]
    line, verdict, predicted = decide(results, bound, 10.0, "", 128)
    if isinstance(expected, Rule):
        assert line == f'meprop.convert(model, {code(expected)}, when="auto")'
        assert predicted == max(each.speedup for each in results if each.rule == expected)
        assert f"{predicted:.2f}x" in verdict
    else:
        assert (line, predicted) == ("", 1.0)
        assert re.search(expected, verdict)


def test_the_line_has_the_options_of_the_call():
    line, *_ = decide([tried(SAMPLED, 1.5, 0.1)], 2.0, 10.0, "lambda name, _: name != 'lm_head'", 64)
    model = nn.ModuleDict({"up": nn.Linear(64, 64), "lm_head": nn.Linear(64, 256)})
    report = eval(line, {"meprop": meprop, "model": model})
    assert {each.name: each.status for each in report.layers} == {"up": "sparse", "lm_head": "dense"}


def only_up(name, _layer):
    return name == "up"


@pytest.mark.parametrize(
    ("filter", "expected"),
    [(None, "lambda name, _: name != 'lm_head'"), (only_up, "only_up"), (lambda name, _: name == "up", "filter")],
)
def test_the_code_of_the_filter_is_that_of_the_call(filter, expected):
    model = nn.Sequential()
    model.add_module("up", nn.Linear(200, 200))
    model.add_module("lm_head", nn.Linear(200, 300))
    ways = Ways(model, [SAMPLED], filter, 128)
    assert (list(ways.layers), ways.chosen) == (["up"], expected)


# ---------------------------------------------------------------- bias

UNBIASED = [
    meprop.Sampled(noise=0.25),
    meprop.Sampled(2),
    meprop.Sampled(2, "example"),
    meprop.Sampled(2, "batch"),
    meprop.Sampled(noise=1.0, exact_sum=False),
    meprop.InBlocks(meprop.Sampled(1), 4),
]
BIASED = [meprop.TopK(2), meprop.TopK(0.25, "global"), meprop.RandomK(2), meprop.InBlocks(meprop.TopK(1), 4)]


@pytest.mark.parametrize(
    ("rule", "unbiased"), [*((rule, True) for rule in UNBIASED), *((rule, False) for rule in BIASED)], ids=repr
)
def test_unbiased_rules_are_those_whose_mean_is_the_gradient(rule, unbiased):
    torch.manual_seed(0)
    gradient = torch.randn(4, 8)
    draws = torch.stack([rule.select(gradient).to_dense() for _ in range(500)])
    z = (draws.mean(dim=0) - gradient) / (draws.std(dim=0) / math.sqrt(len(draws)) + 1e-6)
    assert rule.unbiased == unbiased
    assert (z.abs().max().item() < 5) == unbiased


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (meprop.PerProduct(input=None, weight=SAMPLED), True),
        (meprop.PerProduct(input=TOPK, weight=SAMPLED), False),
        (meprop.CompensatedTopK(2), False),
    ],
    ids=repr,
)
def test_rules_of_rules_are_unbiased_if_all_are(rule, expected):
    assert rule.unbiased == expected


def test_short_texts():
    assert [short(rule) for rule in RULES[:3]] == [
        "Sampled(noise=0.25)",
        "Sampled(0.04, exact_sum=True)",
        'TopK(0.04, "global")',
    ]


def test_a_disturbed_cast_does_not_count(monkeypatch):
    clock = iter([0.0, 9.0, 10.0, 10.5, 20.0, 21.0])  # before and after the cast of each step
    monkeypatch.setattr(mind, "perf_counter", lambda: next(clock))
    trial = SimpleNamespace(step=lambda batch: batch.to(torch.bfloat16))
    assert cast_seconds(trial, torch.ones(2), 3) == 0.5
