"""Which operations are understood, and what is said of the others."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import meprop
from prunable import RULE, WIDTH, Calls, quietly


@pytest.mark.parametrize(
    ("flatten", "understood"),
    [
        (lambda x: x.flatten(1), True),
        (lambda x: torch.flatten(x, start_dim=-3), True),
        (lambda x: x.flatten(1, end_dim=3), True),
        (lambda x: torch.flatten(input=x, start_dim=1), False),
        (lambda x: x.flatten(2).flatten(1), False),
        (lambda x: x.flatten(-2), False),
    ],
)
def test_channels_are_flattened_to_blocks_of_columns_or_not_at_all(flatten, understood):
    model = Calls(lambda m, x: m.head(flatten(m.conv(x))), conv=nn.Conv2d(3, WIDTH, 3))
    del model.a, model.b
    model.head = nn.Linear(WIDTH * 4 if understood else 4, 3)
    meprop.convert(model, meprop.TopK(5, scope="batch"), min_features=10, when="always")
    x = torch.randn(2, 3, 4, 4)
    if not understood:
        model.head = nn.LazyLinear(3)
        model(x)
    (reason,) = (layer.reason for layer in quietly(model, example_inputs=(x,)).report().layers if layer.name == "conv")
    assert (reason is None) == understood
    assert understood or "flatten" in reason


def flattened_as_unpacked(m: nn.Module, x: Tensor) -> Tensor:
    n, _, _, _ = (c := m.conv(x)).shape
    return m.flat(c.view(n, -1))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.head(m.conv(x).mean((2, 3))), None),
        (lambda m, x: m.head(m.conv(x).amax(dim=[-1, -2])), None),
        (lambda m, x: m.head(torch.mean(m.conv(x), (2,)).sum(2)), None),
        (lambda m, x: m.head(torch.mean(m.conv(x), (2, 3), keepdim=True).flatten(1)), None),
        (lambda m, x: m.head(m.conv(x).mean(axis=(2, 3))), None),
        (lambda m, x: m.head(torch.sum(m.conv(x), axis=2, keepdims=True).mean((-1, -2))), None),
        (lambda m, x: m.head((c := m.conv(x)).mean((2, 3))) + torch.zeros(3, dtype=c.dtype, device=c.device), None),
        (lambda m, x: m.head((c := m.conv(x)).mean((2, 3), keepdim=True).view(c.size(0), -1)), None),
        (lambda m, x: m.head((c := m.conv(x)).mean((2, 3))) * c.mean(3, keepdims=True).size(-3), "size of its units"),
        (lambda m, x: m.head((c := m.conv(x)).mean((2, 3))) * c.size(dim=1), "size of its units"),
        (lambda m, x: m.head(torch.ones(m.conv(x).shape).mean((2, 3))), "'ones' reads it"),
        (
            lambda m, x: m.head((c := m.conv(x)).mean((2, 3))) * c.mean(0, True).view(c.size(0), -1).sum(),
            "view.*reads it",
        ),
        (lambda m, x: m.head(m.conv(x).mean((2, 3)).view(2, WIDTH)), "'.view\\(\\)' reads it"),
        (lambda m, x: m.head(m.conv(x).mean((2, 3))) * m.conv(x).mean((1, 2)).sum(), "is over its units"),
        (lambda m, x: m.head(m.conv(x).mean((2, 3))) * m.conv(x).mean(), "is over its units"),
        (lambda m, x: m.flat((c := m.conv(x)).view(c.size(0), -1)), None),
        (lambda m, x: m.flat((c := m.conv(x)).reshape((c.relu().shape[0], -1))), None),
        (flattened_as_unpacked, None),
        (
            lambda m, x: m.flat((c := m.conv(x)).view(c.shape[0], c.shape[1] * c.shape[2] * c.shape[3])),
            "size of its units",
        ),
        (lambda m, x: m.flat(m.conv(x).view(-1, WIDTH * 4)), "reads it"),
        (lambda m, x: m.flat(m.conv(x).view(2, -1)), "reads it"),  # any number may be meant for something else
        (lambda m, x: m.flat(m.conv(x).view(m.conv(x).size(0), -1)), "reads it"),
        (lambda m, x: m.flat((c := m.conv(x)).view(c.size(0) * 1, -1)), "reads it"),
        (lambda m, x: m.head((c := m.conv(x)).view(c.size(0), -1, 2, 2).mean((2, 3))), "reads it"),
    ],
)
def test_means_over_positions_and_views_that_flatten_are_understood(forward, reason):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, WIDTH, 3)
            if "head" in forward.__code__.co_names:
                self.head = nn.Linear(WIDTH, 3)
            else:
                self.flat = nn.Linear(WIDTH * 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 3, 4, 4)
    meprop.convert(model, meprop.TopK(5, scope="batch"), min_features=10, when="always")
    simplifier = quietly(model, example_inputs=(x,))
    found = simplifier.report().layers[0].reason
    if reason is not None:
        assert re.search(reason, found)
        return
    assert found is None
    assert "give example_inputs" in (quietly(model).report().layers[0].reason or "give example_inputs")
    simplifier = meprop.Simplifier(model, 0.9, check_every=1, example_inputs=(x,))
    model(x).square().sum().backward()
    with torch.no_grad():
        model.conv.weight.mul_(kept := model.conv.activity.hits[:, None, None, None] > 0)
        model.conv.bias.mul_(kept.flatten())
    masked = model(x)
    simplifier.step()
    assert simplifier.widths["conv"] == 5
    torch.testing.assert_close(model(x), masked)
    torch.testing.assert_close(simplifier.compact()(x), masked)


def test_the_mean_over_time_of_an_lstm_and_a_linear_layer():
    model = Calls(lambda m, x: m.head(m.lstm(x)[0].mean(0) + m.a(x).mean(1)), lstm=nn.LSTM(6, WIDTH))
    del model.b
    x = torch.randn(4, 4, 6)
    meprop.convert(model, RULE, min_features=10, when="always")
    reasons = {layer.name: layer.reason for layer in quietly(model, example_inputs=(x,)).report().layers}
    assert "units of an LSTM with others" in reasons["a"]  # so the means were understood
    model = Calls(lambda m, x: m.head(m.a(x).mean(1)))
    del model.b
    meprop.convert(model, RULE, min_features=10, when="always")
    assert quietly(model, example_inputs=(x,)).report().layers[0].reason is None
    assert "give example_inputs" in quietly(model).report().layers[0].reason


@pytest.mark.parametrize(
    ("forward", "name", "shape"),
    [
        (lambda m, x: m.head(data := packed(m.a(x)).data) * data.size(1), "a", (4, 3, 6)),
        (lambda m, x: m.head((s := m.c(x[0]) + m.a(x)) + m.a(x[0])) * s.size(2), "c", (4, 3, 6)),
        (lambda m, x: m.head(torch.cat([m.conv(x)] * 2, axis=1).mean(1)), "conv", (6, 8)),
    ],
    ids=["a packed sequence has a dimension less", "a sum of two ranks", "the axis of cat"],
)
def test_no_dimension_is_mistaken_for_another(forward, name, shape):
    modules = {"c": nn.Linear(6, WIDTH), "conv": nn.Conv1d(6, WIDTH, 3)}
    called = forward.__code__.co_names
    model = Calls(forward, **{each: module for each, module in modules.items() if each in called})
    for each in {"a", "b"} - {*called}:
        delattr(model, each)
    meprop.convert(model, meprop.TopK(5, scope="batch"), min_features=10, when="always")
    report = quietly(model, example_inputs=(torch.randn(shape),)).report()
    (reason,) = (layer.reason for layer in report.layers if layer.name == name)
    assert re.search("size of its units|'cat' reads it", reason or "")


def packed(x: Tensor) -> PackedSequence:
    return nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 4, 2]))


def test_last_states_of_both_directions_side_by_side():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        _, (h, _) = m.lstm(x)
        return m.both(torch.cat([h[-2], h[-1]], dim=1))

    torch.manual_seed(0)
    model, x = (
        Calls(forward, lstm=nn.LSTM(6, WIDTH, bidirectional=True), both=nn.Linear(2 * WIDTH, 3)),
        torch.ones(4, 3, 6),
    )
    del model.a, model.b, model.head
    meprop.convert(model, RULE, min_features=10, when="always")
    assert re.search("'cat' joins.*count it from the last one", quietly(model).report().layers[0].reason)
    simplifier = meprop.Simplifier(model, 0.5, check_every=1, example_inputs=(x,))
    model(x).square().sum().backward()
    simplifier.step()
    assert model.both.in_features == 2 * model.lstm.hidden_size < 2 * WIDTH
    torch.testing.assert_close(simplifier.compact()(x), model(x))


REFUSALS = {
    "reshape": (lambda m, x: m.head(m.a(x).view(2, -1, WIDTH)), "a", r"'\.view\(\)' reads it, which is not"),
    "softmax": (lambda m, x: m.head(m.a(x).softmax(-1)), "a", r"'\.softmax\(\)'"),
    "layer norm": (lambda m, x: m.head(m.norm(m.a(x))), "a", r"'norm' \(LayerNorm\).*mean and variance"),
    "indexing": (lambda m, x: m.head(m.a(x)[:, :WIDTH]), "a", "'getitem'"),
    "product": (lambda m, x: m.head(m.a(x) @ m.b.weight), "a", "'matmul'"),
    "weight read": (lambda m, x: m.head(m.b(m.a(x))) + m.b.weight.sum(), "b", "'b.weight' is also read outside"),
    "output": (lambda m, x: m.a(x), "a", "the model's output"),
    "also the output": (lambda m, x: (m.head(m.a(x)), m.a(x)), "a", "the model's output"),
    "sum with the input": (lambda m, x: m.head(m.a(x) + torch.nn.functional.pad(x, (0, 18))), "a", "'add'"),
    "called on different units": (lambda m, x: m.head(m.b(m.a(x)) + m.b(m.b(m.a(x)))), "b", "called several times"),
    "not called": (lambda m, x: m.head(m.a(x)), "b", "not seen in the traced graph"),
    "control flow": (lambda m, x: m.head(m.a(x) if x.sum() > 0 else -m.a(x)), "a", "torch.fx cannot trace the model"),
    "unknown module": (lambda m, x: m.head(m.attention(m.a(x), m.a(x), m.a(x))[0]), "a", "'attention'"),
    "recurrent": (lambda m, x: m.head(m.gru(m.a(x))[0]), "a", r"'gru' \(GRU\)"),
    "initial states": (lambda m, x: m.head(m.lstm(x, (m.a(x[:1]), m.a(x[:1])))[0]), "lstm", "initial states"),
    "a batch norm of unknown rank": (lambda m, x: m.head(m.batch(m.a(x))), "a", "give example_inputs"),
    "lstm in a sum": (lambda m, x: m.head(m.lstm(x)[0] + m.a(x)), "lstm", "units of an LSTM with others"),
    "flattened, of unknown rank": (lambda m, x: m.head(m.conv(x).flatten(1)), "conv", "give example_inputs"),
    "concatenated, of unknown rank": (
        lambda m, x: torch.cat([m.conv(x)] * 2, 1),
        "conv",
        "'cat' joins.*example_inputs",
    ),
    "read along its positions": (lambda m, x: m.head(m.conv(x)), "conv", "'head' reads it along another dimension"),
    "pooled over units": (lambda m, x: m.head(F.max_pool1d(m.a(x), 2)), "a", "pools along the dimension of its units"),
    "a convolution of units": (lambda m, x: m.head(m.conv(m.a(x))), "a", "'conv' reads it along another dimension"),
    "read in groups": (lambda m, x: m.grouped(m.conv(x)).sum(), "conv", "'grouped' is a convolution in groups"),
    "sum of channels and features": (lambda m, x: m.head(m.conv(x) + m.a(x)), "a", "'add' reads it"),
    "all last states": (lambda m, x: m.head(m.lstm(x)[1][0]), "lstm", "all of an LSTM's last states"),
}


@pytest.mark.parametrize(("forward", "name", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_not_understood_is_not_pruned_and_says_why(forward, name, reason):
    modules = {
        "norm": nn.LayerNorm(WIDTH),
        "batch": nn.BatchNorm1d(WIDTH),
        "attention": nn.MultiheadAttention(WIDTH, 2),
        "gru": nn.GRU(WIDTH, WIDTH),
        "lstm": nn.LSTM(6, WIDTH),
        "conv": nn.Conv1d(6, WIDTH, 3),
        "grouped": nn.Conv1d(WIDTH, WIDTH, 3, groups=2),
    }
    called = forward.__code__.co_names
    model = Calls(forward, **{each: module for each, module in modules.items() if each in called})
    for each in {"a", "b", "head"} - {*called, name}:
        delattr(model, each)
    rule = meprop.TopK(5, scope="batch") if "conv" in called else RULE
    meprop.convert(model, rule, min_features=10, when="always")
    report = quietly(model).report()
    (layer,) = (layer for layer in report.layers if layer.name == name)
    assert layer.reason is not None
    assert re.search(reason, layer.reason)
    assert re.search(f"{name} .*cannot be pruned: .*{reason}", str(report))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (
            lambda m, x: m.head(nn.utils.rnn.pad_packed_sequence(sequence=m.lstm(m.packed(x))[0])[0]),
            "pad_packed_sequence",
        ),
        (lambda m, x: m.head(torch.cat(tensors=[m.a(x), m.b(x)], dim=-1)), None),
    ],
    ids=["pad_packed_sequence", "cat"],
)
def test_keyword_arguments_are_looked_at(forward, reason):
    model = Calls(forward)
    if reason is None:
        model.b, model.head = nn.Linear(6, WIDTH), nn.Linear(2 * WIDTH, 3)
    else:
        model.lstm = nn.LSTM(6, WIDTH)
        model.packed = lambda x: nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, 1]))
        del model.a, model.b
    meprop.convert(model, RULE, min_features=10, when="always")
    report = str(quietly(model).report())
    assert ("can be pruned" in report) == (reason is None)
    assert reason is None or reason in report


def test_batch_norm_of_three_dimensions_is_not_pruned():
    model = Calls(lambda m, x: m.head(m.batch(m.a(x))), batch=nn.BatchNorm1d(4))
    model.a = nn.Linear(6, 4)
    model.head = nn.Linear(4, 3)
    meprop.convert(model, meprop.TopK(2), min_features=4, when="always")
    simplifier = quietly(model, example_inputs=(torch.randn(5, 4, 6),))
    assert "gets 3-D input" in str(simplifier.report())
    assert model.batch.num_batches_tracked == 0  # the example changes nothing
