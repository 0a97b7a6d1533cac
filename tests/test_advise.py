"""`meprop.advise`: what it leaves as it was, what it refuses, and what it says of models of each kind."""

from __future__ import annotations

import json
import random
import re
from copy import deepcopy
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import meprop
import meprop.advice as advice_module
from meprop import machine, speed
from meprop.advice.trial import Phases
from meprop.ops import native


@pytest.fixture(autouse=True)
def sparse(monkeypatch):
    """Every layer finds that sparse is faster, whatever the machine does."""
    monkeypatch.setattr(speed, "decide", lambda rule, shape: speed.Decision(True, shape.rows, 10.0, 1.0))


RULES = (meprop.Sampled(noise=0.25), meprop.TopK(0.1, "batch"))
SHORT = {"seconds": 0.05, "warm_up_steps": 2, "rules": RULES}


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 128)
        self.lstm = nn.LSTM(128, 128, batch_first=True)
        self.head = nn.Linear(128, 4)

    def forward(self, words):
        return self.head(self.lstm(self.embedding(words))[0][:, -1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(128, 4, 256, batch_first=True) for _ in range(2))
        self.head = nn.Linear(128, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(dim=1))


def perceptron(*, norm=False):
    between = [nn.BatchNorm1d(256), nn.Dropout(0.5)] if norm else []
    return nn.Sequential(nn.Linear(12, 256), *between, nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))


def convolutions():
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4))


MODELS = {
    "perceptron": (perceptron, lambda: torch.randn(8, 12), {"0", "2"}),
    "tagger": (Tagger, lambda: torch.randint(20, (4, 6)), {"lstm"}),
    "encoder": (
        Encoder,
        lambda: torch.randn(4, 6, 128),
        {"layers.*.self_attn", "layers.*.linear1", "layers.*.linear2"},
    ),
    "convolutions": (convolutions, lambda: torch.randn(2, 3, 8, 8), {"0", "2"}),
}


def pairs(inputs, count=6):
    return [(x := inputs(), torch.randint(4, (len(x),))) for _ in range(count)]


def loss(model, batch):
    inputs, classes = batch
    return F.cross_entropy(model(inputs), classes)


def small(**options):
    """Advice for a small model."""
    model = options.pop("model", None) or perceptron()
    return meprop.advise(model, options.pop("batches", pairs(MODELS["perceptron"][1])), loss, **{**SHORT, **options})


# ---------------------------------------------------------------- what it says


@pytest.mark.parametrize("name", MODELS)
def test_each_kind_of_model_gets_parts_rules_layers_and_a_verdict(name):
    make, inputs, expected = MODELS[name]
    torch.manual_seed(0)
    model = make()
    advice = meprop.advise(model, pairs(inputs), loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **SHORT)
    assert [part.name for part in advice.parts if not part.within] == [
        "forward pass",
        "backward pass",
        "optimizer (SGD)",
    ]
    assert sum(part.ms for part in advice.parts if not part.within) == pytest.approx(advice.step_ms, rel=0.5)
    assert [each.rule for each in advice.rules] == list(RULES)
    measured = {group.name: group for group in advice.groups if group.best_rule is not None}
    assert set(measured) == expected
    assert all(group.share > 0 and group.gain > 0 for group in measured.values())
    narrow = [group for group in advice.groups if "narrow" in group.why]
    assert all(group.best_rule is None and group.share is not None for group in narrow)
    assert len(narrow) == 1
    assert bool(advice.line) == (advice.predicted > 1)


def test_all_forms_say_the_same_and_fit_80_columns():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(12, 256), nn.ReLU(), nn.Linear(256, 12)) for _ in range(2)))
    advice = small(model=model, rules=None, optimizer=torch.optim.Adam(model.parameters()))
    text = str(advice)
    assert max(map(len, text.splitlines())) <= 80
    assert "*.0 x2 12 x 256" in " ".join(text.split())
    found = json.loads(advice.to_json())
    assert found == advice.to_dict()
    assert found["rules"][0]["rule"] == "Sampled(noise=0.25)"
    assert found["groups"][0]["layers"] == ["0.0", "1.0"]

    class Cells(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.text = [], []

        def handle_starttag(self, tag, attrs):
            self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_data(self, data):
            self.text.append(data)

    cells = Cells()
    cells.feed(advice._repr_html_())
    assert not cells.open
    assert "Sampled(noise=0.25)" in cells.text
    for note in advice.notes:
        assert note in cells.text


BATCHES = {
    "list": list,
    "tuple": tuple,
    "generator": lambda batches: (batch for batch in batches),
    "one": lambda batches: batches[:1],
    "loader": lambda batches: DataLoader(
        TensorDataset(*map(torch.cat, zip(*batches, strict=True))), batch_size=8, shuffle=True
    ),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_any_iterable(kind):
    batches = BATCHES[kind](pairs(MODELS["perceptron"][1]))
    advice = small(batches=batches, rules=RULES[:1], warm_up_steps=9)
    assert (advice.noise is None) == (kind == "one")
    assert (advice.rules[0].of_noise is None) == (kind == "one" or not advice.rules[0].sparse_layers)
    assert any("only" in note and "batches" in note for note in advice.notes)
    assert "9 steps" in advice.state


def test_batches_are_only_passed_on():
    def of_dict(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"][0])

    batches = [{"x": x, "y": [y, "a name"]} for x, y in pairs(MODELS["perceptron"][1])]
    assert meprop.advise(perceptron(), batches, of_dict, **SHORT).bound > 0


# ---------------------------------------------------------------- what it leaves as it was


def states(model, optimizer):
    """All that advise could change, as bits."""
    numpy = np.random.get_state()  # noqa: NPY002
    return {
        "model": {name: each.clone() for name, each in model.state_dict().items()},
        "gradients": {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None},
        "optimizer": deepcopy(optimizer.state_dict()),
        "random": (torch.get_rng_state(), random.getstate(), numpy[1].tolist(), numpy[2]),
        "attributes": [(type(each), sorted(vars(each)), each.training) for each in model.modules()],
        "hooks": [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules()],
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.01)),
        lambda parameters: torch.optim.AdamW(parameters, fused=True),
        lambda parameters: meprop.optim.Adam(parameters),
    ],
    ids=["sgd", "adam", "fused", "ours"],
)
@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_everything_is_as_before(make, converted):
    torch.manual_seed(0)
    model = perceptron(norm=True)
    if converted:
        meprop.convert(model, meprop.TopK(0.1), when="always")
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # puts a step of its own on the optimizer
    batches = pairs(MODELS["perceptron"][1])
    loss(model, batches[0]).backward()
    optimizer.step()
    schedule.step()
    before, step = states(model, optimizer), optimizer.step

    def drawing(model, batch):
        random.random()
        np.random.rand()  # noqa: NPY002
        return loss(model, batch)

    meprop.advise(model, DataLoader(batches, batch_size=None, shuffle=True), drawing, optimizer=optimizer, **SHORT)
    assert same(before, states(model, optimizer))
    assert optimizer.step == step


def test_gradients_of_a_loss_and_the_generator_of_a_loader_are_as_before():
    model, head = perceptron(), nn.Linear(4, 4)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    head.weight.grad = torch.ones(4, 4)
    generator = torch.Generator().manual_seed(3)
    batches = DataLoader(pairs(MODELS["perceptron"][1]), batch_size=None, shuffle=True, generator=generator)
    before = generator.get_state()

    def with_head(model, batch):
        return F.cross_entropy(head(model(batch[0])), batch[1])

    meprop.advise(model, batches, with_head, optimizer=optimizer, **SHORT)
    assert torch.equal(head.weight.grad, torch.ones(4, 4))
    assert head.bias.grad is None
    assert torch.equal(generator.get_state(), before)


def test_a_loss_may_take_entries_out_of_a_batch():
    batches = [{"x": x, "y": y} for x, y in pairs(MODELS["perceptron"][1])]

    def popping(model, batch):
        return F.cross_entropy(model(batch["x"]), batch.pop("y"))

    assert meprop.advise(perceptron(), batches, popping, **SHORT).bound >= 1
    assert all("y" in batch for batch in batches)


def test_a_replaced_function_of_torch_stays_replaced(monkeypatch):
    linear, calls = F.linear, []
    monkeypatch.setattr(F, "linear", replaced := lambda *args: calls.append(1) or linear(*args))
    make, inputs, _ = MODELS["encoder"]
    meprop.advise(make(), pairs(inputs, 2), loss, **SHORT)
    assert F.linear is replaced


def test_a_frozen_trunk_has_nothing_to_gain():
    model = perceptron()
    model[:3].requires_grad_(False)
    advice = small(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert {group.why for group in advice.groups[:2]} == {"no gradient reaches it"}
    assert (advice.line, advice.bound) == ("", 1.0)
    assert all(each.sparse_layers == 0 for each in advice.rules)


def test_no_rule_passes_the_bound(monkeypatch):
    """A free step that the machine has slowed down is not said to be one."""
    times = advice_module.steps_in_turns

    def disturbed(*args):
        found = times(*args)
        return {**found, "free": [[Phases(9.0, 9.0, 9.0)] for _ in found["free"]]}

    monkeypatch.setattr(advice_module, "steps_in_turns", disturbed)
    advice = small()
    assert advice.bound >= max(1.0, *(each.speedup for each in advice.rules if each.sparse_layers))


@pytest.mark.parametrize("cls", [torch.optim.Adagrad, meprop.optim.Adagrad])
def test_a_state_before_the_first_step_is_no_step(cls):
    model = perceptron()
    advice = small(model=model, optimizer=cls(model.parameters()), warm_up_steps=None)
    assert "steps of Adagrad" in advice.state


def test_it_goes_on_from_the_state_of_the_optimizer():
    model = perceptron()
    optimizer = torch.optim.Adam(model.parameters())
    batches = pairs(MODELS["perceptron"][1])
    loss(model, batches[0]).backward()
    optimizer.step()
    advice = small(model=model, optimizer=optimizer, warm_up_steps=None)
    assert advice.state == "at the weights as they were given"


# ---------------------------------------------------------------- what it refuses


class Never(nn.Module):
    def forward(self, x):
        return x


OTHER = perceptron()


def other_model(model, batch):
    return loss(OTHER, batch)


X = torch.randn(8, 12)
Y = torch.randint(4, (8,))
ONE = [(X, Y)]
REFUSED = {
    "a loss for each example": (
        {"loss": lambda model, batch: model(batch[0]).sum(dim=1)},
        ValueError,
        r"shape \[8\].*scalar",
    ),
    "a loss that is a number": ({"loss": lambda model, batch: 1.0}, TypeError, "returned a float.*a tensor"),
    "a loss without a graph": (
        {"loss": lambda model, batch: loss(model, batch).detach()},
        ValueError,
        "without a graph.*detach",
    ),
    "a loss of another model": ({"loss": other_model}, ValueError, "no parameter of its model a gradient"),
    "a loss that is nan": ({"loss": lambda model, batch: loss(model, batch) * torch.nan}, ValueError, "returned nan"),
    "a loss that is no function": ({"loss": 3}, TypeError, "loss is of type int"),
    "no batches": ({"batches": []}, ValueError, "a list without a batch"),
    "an empty loader": ({"batches": DataLoader([])}, ValueError, "a DataLoader without a batch"),
    "a batch": ({"batches": X}, TypeError, "batches is of type Tensor.*iterable"),
    "a dict": ({"batches": {"x": X}}, TypeError, "batches is of type dict"),
    "a number": ({"batches": 3}, TypeError, "batches is of type int"),
    "no parameters": ({"model": Never()}, ValueError, "none of the model's 0 parameters"),
    "a frozen model": (
        {"model": perceptron().requires_grad_(False)},
        ValueError,
        "none of the model's 6 parameters needs a gradient.*requires_grad_",
    ),
    "no model": ({"model": 3}, TypeError, "model is of type int"),
    "a wrapped model": (
        {"model": nn.DataParallel(perceptron())},
        meprop.NotSupportedError,
        "DataParallel; call meprop.advise with the model inside",
    ),
    "another's optimizer": (
        {"optimizer": torch.optim.SGD(perceptron().parameters())},
        ValueError,
        "no parameter of the model",
    ),
    "no optimizer": ({"optimizer": "sgd"}, TypeError, "optimizer is of type str"),
    "no rules": ({"rules": []}, ValueError, "rules is empty"),
    "a number as a rule": ({"rules": [0.04]}, TypeError, "rules has 0.04 of type float"),
    "no seconds": ({"seconds": 0}, ValueError, "seconds=0"),
    "half a step": ({"warm_up_steps": 0.5}, ValueError, "warm_up_steps=0.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_says_what_it_got_and_what_it_wants(case):
    options, error, message = REFUSED[case]
    arguments = {"model": perceptron(), "batches": ONE, "loss": loss, **SHORT, **options}
    with pytest.raises(error, match=message):
        meprop.advise(**arguments)


@pytest.mark.parametrize("kind", ["LBFGS", "in_backward"])
def test_optimizers_that_it_cannot_try(kind):
    model = perceptron()
    optimizer = (
        torch.optim.LBFGS(model.parameters())
        if kind == "LBFGS"
        else meprop.optim.Adam(model.parameters(), in_backward=True)
    )
    with pytest.raises(meprop.NotSupportedError, match=kind):
        small(model=model, optimizer=optimizer)


def test_a_loss_that_diverges_is_said():
    model = perceptron()
    with pytest.raises(ValueError, match=r"returned (nan|inf).*learning rate"):
        small(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e9), warm_up_steps=30)


# ---------------------------------------------------------------- what bites


class Odd(nn.Module):
    """A model with a layer that nothing calls, a frozen one, one that is run again, and a wide output."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.never = nn.Linear(12, 256), nn.Linear(256, 256), nn.Linear(256, 300)
        self.frozen, self.norm = nn.Linear(256, 256), nn.LayerNorm(256)
        self.head = nn.Linear(256, 300)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = checkpoint(self.again, self.first(x), use_reentrant=False)
        return self.head(self.norm(self.frozen(x)))


NOTES = {
    "eval": (lambda: perceptron().eval(), {}, "eval mode"),
    "converted": (lambda: converted(), {}, "converted already"),
    "compiled": (lambda: torch.compile(perceptron(), backend="eager"), {}, "without torch.compile"),
    "compiled in place": (lambda: compiled_in_place(), {}, "without torch.compile"),
    "no optimizer": (perceptron, {}, "No optimizer was given"),
    "checkpointing": (Odd, {}, "'again'.*checkpointing"),
    "output": (Odd, {}, "'head' seems to give the model's outputs"),
    "normalisation": (Odd, {"rules": [meprop.TopK(0.04)]}, r"layer normalisation. TopK\(0.04, \"example\"\) is biased"),
    "double": (
        lambda: perceptron().double(),
        {"batches": [(X.double(), Y)], "rules": RULES[1:]},
        "float64.*float32 and bfloat16",
    ),
}


def converted():
    model = perceptron()
    meprop.convert(model, meprop.TopK(0.04))
    return model


def compiled_in_place():
    model = perceptron()
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("case", NOTES)
def test_what_bites_is_said(case):
    make, options, message = NOTES[case]
    assert re.search(message, "\n".join(small(model=make(), **options).notes))


def test_layers_that_are_not_called_are_named_and_no_part_of_the_bound():
    groups = {group.name: group for group in small(model=Odd()).groups}
    assert groups["never"].why == "the loss does not call it"
    assert groups["never"].share is None
    assert groups["head"].why == "gives the model's outputs"
    assert groups["frozen"].share > 0


@pytest.mark.parametrize(("share", "keeps", "said"), [(0.3, False, True), (0.01, False, False), (0.3, True, False)])
def test_memory_that_comes_fresh_in_each_step_is_said(share, keeps, said, monkeypatch):
    monkeypatch.setattr(advice_module, "fresh_memory", lambda trial, batch: (2.0**27, share, 1e-3))
    monkeypatch.setattr(machine, "_keeps", keeps)
    notes = "\n".join(small().notes)
    assert (
        "128 MiB, which the one before freed: about 30% of it. Call meprop.machine.keep_freed_memory()" in notes
    ) == said


def test_denormal_products_are_said():
    advice = meprop.advise(perceptron(), ONE, lambda model, batch: loss(model, batch) * 1e-37, **SHORT)
    assert any("set_flush_denormal" in note for note in advice.notes)


@pytest.mark.skipif(native.reason_missing() is not None, reason="there are no native kernels here")
def test_zeros_in_the_inputs_of_linear_layers_are_said():
    model = perceptron()
    with torch.no_grad():
        model[0].bias -= 1  # so that ReLU leaves few entries
    said = [note for note in small(model=model).notes if "skip_zeros=True" in note]
    assert re.search(r"few entries are not zero: '2' \d+%\. With", said[0])  # of no other layer
    assert not any("skip_zeros" in note for note in small().notes)


def test_without_native_code_it_is_said(monkeypatch):
    from meprop.advice import mind

    monkeypatch.setattr(mind, "reason_missing", lambda: "there is no compiler")
    assert any(note.startswith("there is no compiler") for note in small().notes)


def test_casts_of_autocast_are_a_part():
    def narrow(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, batch)

    advice = meprop.advise(perceptron(), ONE, narrow, **SHORT)
    assert advice.parts[-1].name.startswith("casts")
    assert 0 < advice.parts[-1].share < 1
