"""What is traced is what is called, and tracing changes nothing."""

import collections
import copy
import io
import pickle
import random
import threading

import numpy
import pytest
import torch
from torch import Tensor, nn

import meprop
from prunable import CASES, RULE, WIDTH, Calls, make, quietly


def test_a_graph_that_is_not_what_is_called_is_not_trusted():
    """Types are others where fx traces."""
    model = Calls(lambda m, x: m.head(m.b(m.act(m.a(x)) if isinstance(x, Tensor) else m.a(x))), act=nn.Softmax(-1))
    meprop.convert(model, RULE, min_features=10, when="always")
    report = str(quietly(model, example_inputs=(torch.randn(2, 6),)).report())
    assert "'act' is in a call with example_inputs only" in report
    assert "can be pruned" not in report


@pytest.mark.parametrize("where", ["model", "part"])
def test_a_forward_on_the_instance_is_not_trusted(where):
    model, _ = make(CASES["stack"], torch.float32)
    owner = model if where == "model" else next(each for each in model if isinstance(each, nn.Linear))
    owner.forward = type(owner).forward.__get__(owner)
    report = str(quietly(model).report())
    assert ("replaced on the instance" if where == "model" else "a forward of its own") in report


def test_the_tracer_leaves_nothing_behind():
    model = Calls(lambda m, x: m.head(m.b(m.a(x)) + torch.randn(WIDTH)))
    meprop.convert(model, RULE, min_features=10, when="always")
    before, random = set(vars(model)), torch.get_rng_state()
    quietly(model)
    assert set(vars(model)) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_evaluation_is_looked_at_too():
    model = Calls(lambda m, x: m.head(m.b(m.a(x))) if m.training else m.head(m.b(m.a(x).softmax(-1))))
    meprop.convert(model, RULE, min_features=10, when="always")
    reasons = {layer.name: layer.reason for layer in meprop.Simplifier(model).report().layers}
    assert "softmax" in reasons["a"]
    assert reasons["b"] is None
    assert model.training


def test_the_tagger_and_the_parsers_network_are_understood():
    tagging = pytest.importorskip("meprop.tasks.tagging")
    tagger = tagging.Tagger([9, 5, 4], 3, tagging.TaggingConfig(hidden=WIDTH))
    parser = nn.Sequential(
        *(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, WIDTH), nn.ReLU(), nn.Dropout(0.1), nn.Linear(WIDTH, 3)),
    )
    for model, prunable in ((tagger, {"lstm"}), (parser, {"2"})):
        meprop.convert(model, RULE, min_features=10, when="always")
        report = meprop.Simplifier(model).report()
        assert {layer.name for layer in report.layers if layer.reason is None} == prunable


class Optional(nn.Module):
    """Its LSTM takes what it is given, and is called with or without."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None, scale: float | None = None) -> Tensor:
        output, _ = self.lstm(x, hx)
        return self.head(output if scale is None else output.softmax(-1))


def test_what_is_traced_is_a_call_with_the_arguments_of_the_example():
    model = Optional()
    meprop.convert(model, RULE, min_features=10, when="always")
    x, hx = torch.randn(4, 2, 6), (torch.zeros(1, 2, WIDTH), torch.zeros(1, 2, WIDTH))
    for example_inputs, reason in (
        (None, None),
        ((x,), None),
        ((x, hx), "it gets initial states, which have its width"),
        ((x, None, 2.0), "'.softmax()' reads it, which is not understood"),
    ):
        report = quietly(model, example_inputs=example_inputs).report()
        assert report.layers[0].reason == reason


# ---- models that keep something


class Memory:
    """An object that is no tensor and no container."""

    def __init__(self) -> None:
        self.last = None


class Keeps(nn.Module):
    """Two layers, with things in which a forward pass may keep something."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.register_buffer("mean", torch.ones(3))
        self.kept, self.calls, self.seen, self.named = None, 0, [], {"last": []}
        self.queue, self.names, self.memory = collections.deque(maxlen=2), set(), Memory()
        self.inner = nn.Module()
        self.inner.kept = None
        self._forward = forward

    def body(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x, self.body(x))


def running_mean(m, x, y):
    now = y.detach().mean(0)
    m.kept = now if m.kept is None else 0.9 * m.kept + 0.1 * now
    return y - m.kept


def last_step(m, x, y):
    before, m.kept = m.kept, y.mean(0)  # with its history
    return y if before is None else y - before.detach()


def buffer_in_place(m, x, y):
    with torch.no_grad():
        m.mean.mul_(0.9).add_(0.1 * y.mean(0))
    return y - m.mean


def listed(m, x, y):
    m.seen.append(y.mean())
    return y


def nested(m, x, y):
    m.named["last"].append((y, {"of": x}))
    return y + (0.0 if len(m.named["last"]) < 2 else m.named["last"][-2][0].detach().mean(0))


def queued(m, x, y):
    m.queue.append(y)
    return y


def counted(m, x, y):
    m.calls += 1
    m.names.add(m.calls)
    return y * m.calls


def in_an_object(m, x, y):
    m.memory.last = y
    return y


def in_a_module(m, x, y):
    m.inner.kept = y
    return y


def parameter_in_place(m, x, y):
    with torch.no_grad():
        m.head.bias.clamp_(-0.01, 0.01)
    return y


def random_number(m, x, y):
    m.kept = random.random()
    return y * m.kept


def random_of_numpy(m, x, y):
    return y * float(numpy.random.rand())  # noqa: NPY002


def random_of_torch(m, x, y):
    return y + torch.randn(3)


def modes(m, x, y):
    m.head.train(not m.head.training)
    return y


def hooks(m, x, y):
    m.head.register_forward_pre_hook(counted)
    m.head._forward_pre_hooks.clear()
    m.inner.register_forward_pre_hook(counted)
    return y


def new_buffer(m, x, y):
    m.register_buffer("late", torch.zeros(3))
    return y + m.late


KEPT = [running_mean, last_step, buffer_in_place, listed, nested, queued, counted, in_an_object, in_a_module]
KEPT += [parameter_in_place, random_number, random_of_numpy, random_of_torch, modes, hooks, new_buffer]


def kept_by(value, seen):
    """All that an object holds, as plain data with the identity of what is mutable."""
    if isinstance(value, Tensor):
        return id(value), value.tolist(), value.requires_grad, value.is_leaf, value._version
    if isinstance(value, dict):
        return id(value), [(name, kept_by(each, seen)) for name, each in value.items() if name != "policy"]
    if isinstance(value, list | tuple | set | collections.deque):
        return id(value), [kept_by(each, seen) for each in value]
    if isinstance(value, nn.Module | Memory) and id(value) not in seen:
        seen.add(id(value))
        return id(value), kept_by(vars(value), seen)
    return repr(value)


def state_of(model):
    generator = numpy.random.get_state()  # noqa: NPY002
    return kept_by(model, set()), random.getstate(), torch.get_rng_state().tolist(), generator[1].tolist(), generator[2]


@pytest.mark.parametrize("by_example", [False, True])
@pytest.mark.parametrize("called", [0, 2])
@pytest.mark.parametrize("forward", KEPT)
def test_what_a_forward_pass_keeps_is_as_if_nothing_had_been_traced(forward, called, by_example):
    torch.manual_seed(0)
    model, x = Keeps(forward), torch.randn(5, 6)
    meprop.convert(model, RULE, min_features=10, when="always")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(called):
        model(x)
    before = state_of(model)
    example_inputs = (x,) if by_example else None
    simplifier = meprop.Simplifier(model, 0.3, optimizer=optimizer, check_every=1, example_inputs=example_inputs)
    assert state_of(model) == before
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        simplifier.step()
    assert simplifier.widths["a"] < WIDTH
    before = state_of(model)
    compact = simplifier.compact()
    assert state_of(model) == before
    drawn = [*state_of(model)[1:]]
    expected = model(x)
    for each in (compact, copy.deepcopy(compact), pickle.loads(pickle.dumps(compact))):
        random.setstate(drawn[0])
        torch.set_rng_state(torch.tensor(drawn[1], dtype=torch.uint8))
        numpy.random.set_state(("MT19937", numpy.array(drawn[2], dtype=numpy.uint32), drawn[3], 0, 0.0))  # noqa: NPY002
        torch.testing.assert_close(each(x), expected)


class Logs(Keeps):
    """It holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__(listed)
        self.lock, self.file = threading.Lock(), io.TextIOWrapper(io.BytesIO())

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            self.calls += 1
        return super().forward(x)


def test_what_cannot_be_copied_is_shared():
    model = Logs()
    meprop.convert(model, RULE, min_features=10, when="always")
    simplifier = meprop.Simplifier(model, 0.3)
    assert simplifier.report().layers[0].reason is None
    assert (model.calls, model.seen, model.lock.locked()) == (0, [], False)


def test_units_that_are_kept_for_a_later_call_stay():
    def keep(m, x):
        h = m.a(x)
        m.kept = {"hidden": [h]}
        return m.head(m.b(h))

    model = Calls(keep)
    meprop.convert(model, RULE, min_features=10, when="always")
    reasons = {layer.name: layer.reason for layer in meprop.Simplifier(model, 0.3).report().layers}
    assert reasons["a"] == "'kept' keeps it for a later call"
    assert reasons["b"] is None


def test_a_layer_that_the_forward_pass_makes_is_undone():
    def make_one(m, x):
        if not hasattr(m, "late"):
            m.late = nn.Linear(WIDTH, WIDTH)
        return m.head(m.late(m.b(m.a(x))))

    model, x = Calls(make_one), torch.randn(2, 6)
    meprop.convert(model, RULE, min_features=10, when="always")
    assert "module is not installed as a submodule" in str(quietly(model).report())
    assert not hasattr(model, "late")
    model(x)
    assert "not installed" not in str(quietly(model).report())


def test_the_model_is_as_it_was_if_its_forward_pass_fails():
    def fail(m, x):
        m.kept = m.a(x)
        random.random()
        raise RuntimeError("no")

    model = Calls(fail)
    meprop.convert(model, RULE, min_features=10, when="always")
    x = torch.randn(2, 6)
    before = state_of(model)
    assert "cannot trace the model: no" in str(quietly(model).report())
    with pytest.raises(RuntimeError, match="no"):
        quietly(model, example_inputs=(x,))
    assert state_of(model) == before
