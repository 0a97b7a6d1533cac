"""Simplifier: what it counts, whom it removes, and that what is left is the model whose removed units are masked."""

import copy
import doctest
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import meprop
from meprop.pruning import simplifier as simplify

RULE = meprop.TopK(5)
WIDTH = 24


# ---------------------------------------------------------------- models, and where their units are


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scaled, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        y = torch.tanh(self.block(h)) * 0.5
        y += h
        return self.head(y + self.scaled(y).sigmoid())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, WIDTH), nn.Linear(6, 30), nn.Linear(WIDTH + 30, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x).relu(), F.gelu(self.right(x))], dim=-1))


class Packed(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, WIDTH, **options)
        self.head = nn.Linear(WIDTH * (2 if self.lstm.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.tensor([4, 4, 2]))
        output, _ = self.lstm(packed)
        return self.head(pad_packed_sequence(output)[0])


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.below, self.lstm, self.head = nn.Linear(6, WIDTH), nn.LSTM(WIDTH, WIDTH, 2), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.lstm(F.elu(self.below(x)))
        return self.head(h[-1])


class ConvResidual(nn.Module):
    """Two convolutions added, and a third one; pooled, concatenated, flattened, and read by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.third, self.norm = nn.Conv2d(WIDTH, 30, 2, bias=False), nn.BatchNorm2d(30)
        self.head = nn.Linear((WIDTH + 30) * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout2d(F.max_pool2d(self.first(x).relu(), 2), 0.0)
        h = h + self.second(h)
        deep = F.adaptive_avg_pool2d(self.norm(self.third(h)), 2)
        return self.head(torch.flatten(torch.cat([F.avg_pool2d(h, 2), deep], dim=1), 1))


Places = list[tuple[str, int, list[int], int]]


@dataclass(frozen=True)
class Case:
    """A model, and for each set of units where they are.

    That is: tensor, dimension, the places of the first unit's first entry, and how many adjacent entries each unit has.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    places: dict[str, Places]
    rule: meprop.Rule = RULE
    # Batch normalisation takes the bias before it out again: Adam would blow up what rounding leaves of its gradient.
    optimizer: str = "adam"


def rows(*tensors: str) -> Places:
    return [(tensor, 0, [0], 1) for tensor in tensors]


def of_linear(name: str) -> Places:
    return rows(f"{name}.weight", f"{name}.bias")


def of_norm(name: str) -> Places:
    return [*of_linear(name), *rows(f"{name}.running_mean", f"{name}.running_var")]


def of_lstm(place: str) -> Places:
    gates = [gate * WIDTH for gate in range(4)]
    tensors = [f"lstm.{tensor}_{place}" for tensor in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    return [*((tensor, 0, gates, 1) for tensor in tensors), (f"lstm.weight_hh_{place}", 1, [0], 1)]


def reads(tensor: str, start: int = 0, positions: int = 1) -> tuple[str, int, list[int], int]:
    return (tensor, 1, [start], positions)


CASES = {
    "stack": Case(
        lambda: nn.Sequential(
            *(nn.Linear(6, WIDTH), nn.ReLU(), nn.Dropout(0.0)),
            *(nn.Linear(WIDTH, 30), nn.Sigmoid(), nn.Linear(30, 3)),
        ),
        (8, 6),
        {"0": [*of_linear("0"), reads("3.weight")], "3": [*of_linear("3"), reads("5.weight")]},
    ),
    "batch norm": Case(
        lambda: nn.Sequential(nn.Linear(6, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)),
        (8, 6),
        {
            "0": [*of_linear("0"), *of_norm("1"), reads("3.weight")],
        },
        optimizer="momentum",
    ),
    "convolutions": Case(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, WIDTH, 3, stride=2), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Dropout2d(0.0)),
            *(nn.Conv2d(WIDTH, 30, (2, 1)), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(30 * 4, 3)),
        ),
        (8, 3, 11, 9),
        {
            "0": [*of_linear("0"), *of_norm("1"), reads("4.weight")],
            "4": [*of_linear("4"), reads("8.weight", positions=4)],
        },
        meprop.TopK(5, scope="batch"),
        "momentum",
    ),
    "convolutions in one dimension": Case(
        lambda: nn.Sequential(
            *(nn.Conv1d(3, WIDTH, 3), nn.BatchNorm1d(WIDTH), nn.GELU(), nn.AvgPool1d(2)),
            *(nn.Conv1d(WIDTH, WIDTH, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(1), nn.Linear(WIDTH, 3)),
        ),
        (8, 3, 14),
        {
            "0": [*of_linear("0"), *of_norm("1"), reads("4.weight")],
            "4": [*of_linear("4"), reads("7.weight")],
        },
        meprop.TopK(5, scope="batch"),
        "momentum",
    ),
    "convolutions in a sum": Case(
        ConvResidual,
        (8, 3, 8, 8),
        {
            "first": [
                *(*of_linear("first"), *of_linear("second"), reads("second.weight"), reads("third.weight")),
                reads("head.weight", positions=4),
            ],
            "third": [*rows("third.weight"), *of_norm("norm"), reads("head.weight", WIDTH * 4, positions=4)],
        },
        meprop.TopK(5, scope="batch"),
    ),
    "residual": Case(
        Residual,
        (8, 6),
        {
            "first": [
                *(*of_linear("first"), *of_linear("block"), *of_linear("scaled")),
                *(reads("block.weight"), reads("scaled.weight"), reads("head.weight")),
            ]
        },
    ),
    "branches": Case(
        Branches,
        (8, 6),
        {
            "left": [*of_linear("left"), reads("head.weight")],
            "right": [*of_linear("right"), reads("head.weight", WIDTH)],
        },
    ),
    "lstm": Case(Packed, (4, 3, 6), {"lstm": [*of_lstm("l0"), reads("head.weight")]}),
    "stacked, bidirectional lstm": Case(
        lambda: Packed(num_layers=2, bidirectional=True),
        (4, 3, 6),
        {
            "lstm.l0": [*of_lstm("l0"), reads("lstm.weight_ih_l1"), reads("lstm.weight_ih_l1_reverse")],
            "lstm.l0_reverse": [
                *of_lstm("l0_reverse"),
                *(reads("lstm.weight_ih_l1", WIDTH), reads("lstm.weight_ih_l1_reverse", WIDTH)),
            ],
            "lstm.l1": [*of_lstm("l1"), reads("head.weight")],
            "lstm.l1_reverse": [*of_lstm("l1_reverse"), reads("head.weight", WIDTH)],
        },
    ),
    "last state": Case(
        LastState,
        (4, 3, 6),
        {
            "below": [*of_linear("below"), reads("lstm.weight_ih_l0")],
            "lstm.l0": [*of_lstm("l0"), reads("lstm.weight_ih_l1")],
            "lstm.l1": [*of_lstm("l1"), reads("head.weight")],
        },
    ),
}

OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=True),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5, centered=True),
    "ours": lambda parameters: meprop.optim.Adam(parameters, lr=1e-2),
}


def make(
    case: Case, dtype: torch.dtype = torch.float64, rule: meprop.Rule | None = None, **options
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = case.make().to(dtype)
    meprop.convert(model, rule or case.rule, min_features=10, when="always", **options)
    return model, torch.randn(case.shape, dtype=dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """A step; the gradients stay. The loss is returned, and keeps its graph alive, as it does in many loops."""
    optimizer.zero_grad()
    loss = (model(x) - 1).square().sum()
    loss.backward()
    optimizer.step()
    return loss


def alive_units(simplifier: meprop.Simplifier) -> dict[str, Tensor]:
    return {label: (~share.isnan()).nonzero().flatten() for label, share in simplifier.activity.items()}


def mask(model: nn.Module, case: Case, alive: dict[str, Tensor]) -> None:
    """Nobody reads what is not alive."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for label, places in case.places.items():
        for tensor, dim, (start, *_), positions in places:
            if dim == 1:
                width = len(tensors[case.places[label][0][0]]) // len(case.places[label][0][2])
                dead = torch.ones(width, dtype=torch.bool)
                dead[alive[label]] = False
                with torch.no_grad():
                    read = tensors[tensor][:, start : start + width * positions]
                    read[:, dead.repeat_interleave(positions)] = 0


def keep(name: str, whole: Tensor, case: Case, alive: dict[str, Tensor], widths: dict[str, int]) -> Tensor:
    """The entries of a tensor of the masked model that the smaller one has."""
    for dim in range(whole.dim()):
        stays = torch.ones(whole.shape[dim], dtype=torch.bool)
        for label, places in case.places.items():
            for tensor, its_dim, starts, positions in places:
                if (tensor, its_dim) == (name, dim):
                    lives = torch.zeros(widths[label], dtype=torch.bool).index_fill_(0, alive[label], True)
                    for start in starts:
                        stays[start : start + len(lives) * positions] = lives.repeat_interleave(positions)
        whole = whole.to_dense().index_select(dim, stays.nonzero().flatten())
    return whole


def check_cut(case: Case, dtype: torch.dtype, optimizer_of, threshold: float = 0.3, **options) -> None:
    """Cuts in mid-training; the smaller model must be the masked one, and both must train on alike."""
    model, x = make(case, dtype, **options)
    optimizer = optimizer_of(model.parameters())
    simplifier = meprop.Simplifier(model, threshold, optimizer=optimizer, check_every=3, example_inputs=(x,))
    parameters = list(model.parameters())
    for _ in range(2):
        loss = train(model, optimizer, x)
        simplifier.step()
    starts = simplifier.widths
    loss = train(model, optimizer, x)
    masked, masked_optimizer = copy.deepcopy((model, optimizer))
    for parameter, twin in zip(model.parameters(), masked.parameters(), strict=True):
        twin.grad = parameter.grad.clone()
    simplifier.step()

    alive = alive_units(simplifier)
    for label in case.places:
        assert 0 < len(alive[label]) < starts[label], label
    mask(masked, case, alive)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5

    def assert_same() -> None:
        small, large = model.state_dict(), masked.state_dict()
        for name, value in small.items():
            expected = keep(name, large[name], case, alive, starts)
            torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
        named = zip(dict(model.named_parameters()).items(), masked.parameters(), strict=True)
        for (name, parameter), twin in named:
            expected = keep(name, twin.grad, case, alive, starts)
            torch.testing.assert_close(parameter.grad.to_dense(), expected, rtol=tolerance, atol=tolerance)
            state, of_twin = optimizer.state[parameter], masked_optimizer.state[twin]
            assert state.keys() == of_twin.keys()
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim():
                    expected = keep(name, of_twin[key], case, alive, starts)
                    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)

    assert_same()
    for training in (False, True):
        model.train(training), masked.train(training)
        torch.testing.assert_close(model(x), masked(x), rtol=tolerance, atol=tolerance)
    small = simplifier.compact().eval()
    assert not any(type(module).__module__.startswith("meprop") for module in small.modules())
    torch.testing.assert_close(small(x), masked.eval()(x), rtol=tolerance, atol=tolerance)
    masked.train()

    assert loss.requires_grad  # its graph is alive
    train(model, optimizer, x)
    train(masked, masked_optimizer, x)
    assert_same()
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_left_is_the_masked_model_and_trains_on_alike(case, dtype):
    check_cut(case, dtype, OPTIMIZERS[case.optimizer])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_optimizer_is_cut(name):
    check_cut(CASES["stack"], torch.float64, OPTIMIZERS[name])


@pytest.mark.parametrize("sparse_rows", ["exact", "decay", "lazy"])
def test_row_sparse_gradients_and_the_age_of_rows_are_cut(sparse_rows):
    check_cut(
        CASES["stack"],
        torch.float32,
        lambda parameters: meprop.optim.Adam(parameters, lr=1e-2, sparse_rows=sparse_rows),
        threshold=0.05,
        rule=meprop.TopK(5, scope="batch"),
        sparse_grad=True,
    )


def test_the_copy_in_bfloat16_is_cut():
    model, x = make(CASES["stack"], torch.float32, compute_dtype=torch.bfloat16)
    optimizer = meprop.optim.Adam(model.parameters(), lr=1e-2)
    simplifier = meprop.Simplifier(model, 0.3, optimizer=optimizer, check_every=2)
    for _ in range(3):
        train(model, optimizer, x)
        simplifier.step()
        expected = simplifier.compact()
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected(x), rtol=2e-2, atol=2e-2)
    assert simplifier.widths["0"] < WIDTH
    train(model, optimizer, x)


# ---------------------------------------------------------------- counting and choosing


@pytest.mark.filterwarnings("ignore::meprop.NoEffectWarning")
@pytest.mark.parametrize("scope", ["example", "batch"])
@pytest.mark.parametrize("k", [5, 100])
def test_units_are_removed_by_what_a_literal_count_says(k, scope):
    """Also where everything is selected: then the entries that are not zero count."""
    rule = meprop.TopK(k, scope=scope)
    model, x = make(CASES["stack"], rule=rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    simplifier = meprop.Simplifier(model, 0.25, optimizer=optimizer, check_every=6)
    hits = torch.zeros(WIDTH)

    def count(grad: Tensor) -> None:
        hits.add_((rule.select(grad).to_dense() != 0).sum(dim=0))

    handle = model[0].register_forward_hook(lambda *args: args[2].register_hook(count) and None)
    for seed in range(6):
        torch.manual_seed(seed)
        train(model, optimizer, torch.randn_like(x))
        if seed % 2:  # accumulated over two batches in each of the optimizer's steps
            model(x).sum().backward()
        simplifier.step()
    handle.remove()
    share = hits / (9 * len(x))
    alive = share >= 0.25
    assert 0 < alive.sum() < WIDTH
    assert simplifier.widths["0"] == int(alive.sum())
    found = simplifier.activity["0"]
    assert torch.equal(found.isnan(), ~alive)
    torch.testing.assert_close(found[alive], share[alive])


def test_a_residual_sum_keeps_what_any_of_its_layers_keeps():
    model, x = make(CASES["residual"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    simplifier = meprop.Simplifier(model, 0.3, optimizer=optimizer, check_every=1)
    train(model, optimizer, x)
    hits = torch.stack([layer.activity.hits for layer in (model.first, model.block, model.scaled)])
    simplifier.step()
    active = hits >= 0.3 * len(x)
    assert active.sum(dim=1).max() < active.any(dim=0).sum() < WIDTH  # or the test would say nothing
    for alive in alive_units(simplifier).values():
        assert torch.equal(alive, active.any(dim=0).nonzero().flatten())


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
    return pack_padded_sequence(x, torch.tensor([4, 4, 2]))


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


def test_what_is_cut_keeps_its_memory_format():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.ReLU(), nn.Conv2d(WIDTH, 4, 3))
    model.to(memory_format=torch.channels_last)
    meprop.convert(model, meprop.TopK(5, scope="batch"), min_features=10, when="always")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    simplifier = meprop.Simplifier(model, 0.9, optimizer=optimizer, check_every=1)
    model(torch.randn(6, 3, 20, 20).contiguous(memory_format=torch.channels_last)).square().sum().backward()
    optimizer.step()
    simplifier.step()
    assert simplifier.widths["0"] == 5
    for layer in (model[0], model[2]):
        for tensor in (layer.weight, layer.weight.grad, optimizer.state[layer.weight]["momentum_buffer"]):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
            assert not tensor.is_contiguous()


def test_a_channel_is_kept_for_any_of_its_positions():
    """A share of the examples, however few of an example's positions are not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 3))
    meprop.convert(model, meprop.TopK(5, scope="batch"), min_features=10, when="always")
    x = torch.randn(6, 3, 20, 20)
    simplifier = meprop.Simplifier(model, 0.9, check_every=1, example_inputs=(x,))
    model(x).square().sum().backward()
    assert model[0].activity.examples == 6
    simplifier.step()
    assert simplifier.widths["0"] == 5


def test_an_lstm_keeps_one_width_the_largest_that_a_layer_needs():
    model, x = make(CASES["stacked, bidirectional lstm"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    simplifier = meprop.Simplifier(model, 0.3, optimizer=optimizer, check_every=1)
    train(model, optimizer, x)
    hits = [activity.hits.clone() for activity in model.lstm.activity]
    simplifier.step()
    needed = [int((each >= 0.3 * 10).sum()) for each in hits]
    assert len(set(needed)) > 1  # or the test would say nothing
    assert set(simplifier.widths.values()) == {max(needed)}
    for each, alive in zip(hits, alive_units(simplifier).values(), strict=True):
        dead = torch.ones(WIDTH, dtype=torch.bool).index_fill(0, alive, False)
        assert each[alive].min() >= each[dead].max()


@pytest.mark.parametrize("warmup", [0, 4, 5])
def test_cycles_that_prune_alternate_with_cycles_that_only_train(warmup):
    model, _ = make(CASES["stack"])
    simplifier = meprop.Simplifier(model, 0.5, check_every=2, cycle=4, warmup=warmup)
    for _ in range(12):
        for layer in (model[0], model[3]):
            layer.activity.hits.fill_(10)
            layer.activity.hits[0] = 4  # a unit to remove, at each check
            layer.activity.examples = 10
        simplifier.step()
    prunes = {
        0: [True, True, False, False, True, True],
        4: [False, False, True, True, False, False],
        5: [False, False, True, True, False, False],  # its cycle is steps 6 to 9
    }[warmup]
    assert [(check.step, check.prunes) for check in simplifier.history] == list(
        zip(range(2, 13, 2), prunes, strict=True)
    )
    removed = [sum(prunes[: number + 1]) for number in range(6)]
    assert [WIDTH - check.widths["0"] for check in simplifier.history] == removed
    assert alive_units(simplifier)["3"].tolist() == list(range(removed[-1], 30))


def test_the_counts_begin_again_at_each_check():
    model, x = make(CASES["stack"])
    simplifier = meprop.Simplifier(model, 0.0, check_every=1, cycle=1)
    for _ in range(3):
        model(x).sum().backward()
        assert model[0].activity.examples == len(x)
        simplifier.step()
    assert simplifier.widths == {"0": WIDTH, "3": 30}  # with a threshold of 0 they are only counted


def test_without_examples_nothing_is_removed():
    model, x = make(CASES["stack"])
    simplifier = meprop.Simplifier(model, 1.0, check_every=1)
    with torch.no_grad():
        model(x)
    simplifier.step()
    assert simplifier.widths == {"0": WIDTH, "3": 30}
    assert simplifier.activity["0"].isnan().all()


def test_a_threshold_that_would_empty_a_layer_keeps_min_units_and_warns():
    model, x = make(CASES["stack"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    simplifier = meprop.Simplifier(model, 1.0, optimizer=optimizer, check_every=1, min_units=4)
    train(model, optimizer, torch.randn(50, 6, dtype=torch.float64))
    hits = model[0].activity.hits.clone()
    with pytest.warns(UserWarning, match="would leave 0 of 24 units of layer '0': its min_units=4 most active"):
        simplifier.step()
    assert simplifier.widths == {"0": 4, "3": 4}
    assert sorted(hits[alive_units(simplifier)["0"]].tolist()) == sorted(hits.tolist())[-4:]
    train(model, optimizer, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been said; nothing more is removed
        simplifier.step()
    assert simplifier.widths == {"0": 4, "3": 4}


def test_a_check_removes_no_more_than_max_removal_the_least_active_units_first():
    model, _ = make(CASES["stack"])
    simplifier = meprop.Simplifier(model, 0.9, check_every=1, cycle=100, max_removal=0.25, min_units=3)
    widths = [30]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the threshold would leave none, but a check takes a quarter at most
        while widths[-1] > 4:
            hits = model[3].activity.hits
            hits.copy_(torch.arange(len(hits)))
            model[0].activity.hits.fill_(100)
            model[0].activity.examples = model[3].activity.examples = 100
            simplifier.step()
            widths.append(simplifier.widths["3"])
            assert alive_units(simplifier)["3"].tolist() == list(range(30 - widths[-1], 30))
    assert widths == [30, 23, 18, 14, 11, 9, 7, 6, 5, 4]  # the last ones: one at least, or it would never end
    assert simplifier.widths["0"] == WIDTH
    model[3].activity.examples = 100
    with pytest.warns(UserWarning, match="would leave 0 of 4 units of layer '3': its min_units=3 most active"):
        simplifier.step()


def test_a_share_is_one_of_the_new_width():
    model, x = make(CASES["stack"], rule=meprop.TopK(0.25))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    simplifier = meprop.Simplifier(model, 0.3, optimizer=optimizer, check_every=1)
    train(model, optimizer, x)
    simplifier.step()
    width = simplifier.widths["0"]
    assert width < WIDTH
    optimizer.zero_grad()
    model(x[:1]).sum().backward()
    assert (model[0].weight.grad.abs().sum(dim=1) > 0).sum() <= round(0.25 * width)
    assert meprop.report(model).layers[0].out_features == width


def test_a_compiled_model_is_counted_and_cut_as_it_is():
    torch._dynamo.reset()
    runs = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager")):
        model, x = make(CASES["stack"], torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        simplifier = meprop.Simplifier(model, 0.3, optimizer=optimizer, check_every=2)
        called = wrap(model)
        for _ in range(5):
            train(called, optimizer, x)
            simplifier.step()
        runs.append((simplifier.history, model[0].activity.hits.tolist()))
    assert runs[0] == runs[1]
    assert runs[0][0][-1].widths["0"] < WIDTH


# ---------------------------------------------------------------- what cannot be pruned


class Calls(nn.Module):
    """Two layers and a head, with a forward pass of one's choice."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        for name, module in modules.items():
            self.add_module(name, module)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


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


def quietly(model: nn.Module, **options) -> meprop.Simplifier:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", meprop.NoEffectWarning)
        return meprop.Simplifier(model, 1.0, **options)


def test_what_another_method_reads_is_not_pruned():
    model = Calls(lambda m, x: m.head(m.a(x)))  # and b, which reads a's units elsewhere
    meprop.convert(model, RULE, min_features=10, when="always")
    assert "'b' is not seen in the traced graph, and may read it" in str(quietly(model).report())


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


def test_the_tracer_leaves_nothing_behind():
    model = Calls(lambda m, x: m.head(m.b(m.a(x)) + torch.randn(WIDTH)))
    meprop.convert(model, RULE, min_features=10, when="always")
    before, random = set(vars(model)), torch.get_rng_state()
    quietly(model)
    assert set(vars(model)) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_nothing_to_prune_warns():
    with pytest.warns(meprop.NoEffectWarning, match="cannot be pruned: it is not converted"):
        meprop.Simplifier(nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3)))


def test_what_is_refused_is_left_as_it_is():
    model = Calls(lambda m, x: m.head(m.b(m.a(x).softmax(-1))))
    meprop.convert(model, RULE, min_features=10, when="always")
    simplifier = meprop.Simplifier(model, 0.5, check_every=1)
    model(torch.randn(8, 6)).sum().backward()
    simplifier.step()
    assert simplifier.widths["a"] == WIDTH > simplifier.widths["b"]
    assert simplifier.activity["a"].sum() > 0  # counted all the same


def test_tied_weights_are_not_pruned():
    model = Calls(lambda m, x: m.head(m.c(m.b(m.a(x)))), c=nn.Linear(WIDTH, WIDTH))
    model.c.weight = model.b.weight
    meprop.convert(model, RULE, min_features=10, when="always")
    reasons = {layer.name: layer.reason for layer in quietly(model).report().layers}
    assert "'b.weight' is tied to 'c.weight'" in reasons["b"]
    assert "tied" in reasons["a"]  # whose units are its columns


def test_hooks_and_subclasses_are_not_trusted():
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = Calls(lambda m, x: m.head(m.scaled(m.b(m.a(x)))), scaled=Scaled(WIDTH, WIDTH))
    model.a.register_forward_hook(lambda module, args, output: output.flip(-1))
    meprop.convert(model, RULE, min_features=10, when="always")
    reasons = {layer.name: layer.reason for layer in quietly(model).report().layers}
    assert "forward hooks" in reasons["a"]
    assert "'scaled'" in reasons["b"]


def test_evaluation_is_looked_at_too():
    model = Calls(lambda m, x: m.head(m.b(m.a(x))) if m.training else m.head(m.b(m.a(x).softmax(-1))))
    meprop.convert(model, RULE, min_features=10, when="always")
    reasons = {layer.name: layer.reason for layer in meprop.Simplifier(model).report().layers}
    assert "softmax" in reasons["a"]
    assert reasons["b"] is None
    assert model.training


def test_batch_norm_of_three_dimensions_is_not_pruned():
    model = Calls(lambda m, x: m.head(m.batch(m.a(x))), batch=nn.BatchNorm1d(4))
    model.a = nn.Linear(6, 4)
    model.head = nn.Linear(4, 3)
    meprop.convert(model, meprop.TopK(2), min_features=4, when="always")
    simplifier = quietly(model, example_inputs=(torch.randn(5, 4, 6),))
    assert "gets 3-D input" in str(simplifier.report())
    assert model.batch.num_batches_tracked == 0  # the example changes nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, "threshold=-0.1; it is a share"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"check_every": 0}, "check_every=0; it must be at least 1"),
        ({"cycle": 0}, "cycle=0"),
        ({"warmup": -1}, "warmup=-1; it must be at least 0"),
        ({"max_removal": 0.0}, "max_removal=0.0; it is a share of a layer's units, above 0"),
        ({"max_removal": 1.1}, "max_removal=1.1"),
        ({"min_units": 0}, "min_units=0"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        meprop.Simplifier(make(CASES["stack"])[0], **options)


def test_arguments_of_the_wrong_kind_are_refused():
    model, x = make(CASES["stack"])
    kinds = [{"check_every": 1.5}, {"min_units": 2.5}, {"cycle": True}]
    kinds += [{"example_inputs": wrong} for wrong in (x, {"x": x}, 5)]
    for options in kinds:
        with pytest.raises(TypeError, match=next(iter(options))):
            meprop.Simplifier(model, **options)
    with pytest.raises(ValueError, match="none of the model's parameters"):
        meprop.Simplifier(model, optimizer=torch.optim.Adam(make(CASES["stack"])[0].parameters()))


def test_wrapped_models_are_refused():
    with pytest.raises(meprop.NotSupportedError, match="the model is a DataParallel; simplify the module inside"):
        meprop.Simplifier(nn.DataParallel(make(CASES["stack"])[0]))
    with pytest.raises(TypeError, match="function"):
        meprop.Simplifier(lambda x: x)


@pytest.mark.parametrize(
    "change", [meprop.revert, lambda m: meprop.convert(m, RULE, min_features=10), meprop.Simplifier]
)
def test_layers_that_no_longer_count_are_noticed(change):
    model, _ = make(CASES["stack"])
    simplifier = meprop.Simplifier(model, check_every=1)
    change(model)
    with pytest.raises(meprop.NotSupportedError, match="layer '0' no longer counts"):
        simplifier.step()


def test_a_state_that_cannot_be_cut_is_refused_before_anything_changes():
    model, x = make(CASES["stack"])
    optimizer = torch.optim.LBFGS(model.parameters())
    simplifier = meprop.Simplifier(model, 0.5, optimizer=optimizer, check_every=1)
    for _ in range(2):
        optimizer.step(lambda: (optimizer.zero_grad(), (loss := model(x).square().sum()).backward())[1] or loss)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="min_units"), pytest.raises(meprop.NotSupportedError, match="LBFGS has a"):
        simplifier.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert simplifier.widths["0"] == WIDTH


def test_a_state_that_lies_with_a_parameter_that_is_not_cut_is_refused_too():
    model = nn.Sequential(
        *[nn.Linear(WIDTH, WIDTH), nn.Softmax(-1), nn.Linear(WIDTH, WIDTH), nn.ReLU()], nn.Linear(WIDTH, 3)
    )
    meprop.convert(model, RULE, min_features=10, when="always")
    optimizer, x = torch.optim.LBFGS(model.parameters()), torch.randn(8, WIDTH)
    simplifier = meprop.Simplifier(model, 0.9, optimizer=optimizer, check_every=1)
    for _ in range(2):
        optimizer.step(lambda: (optimizer.zero_grad(), (loss := model(x).square().sum()).backward())[1] or loss)
    with pytest.warns(UserWarning, match="min_units"), pytest.raises(meprop.NotSupportedError, match="LBFGS has a"):
        simplifier.step()
    assert simplifier.widths["2"] == WIDTH


# ---------------------------------------------------------------- states and copies


@pytest.mark.parametrize("at", [7, 8, 9])  # in mid-cycle between two checks, at one, and in a cycle that only trains
@pytest.mark.parametrize("name", ["stack", "stacked, bidirectional lstm"])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, name, at):
    def start():
        model, x = make(CASES[name], torch.float32)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        simplifier = meprop.Simplifier(model, 0.2, optimizer=optimizer, check_every=4, cycle=8)
        return model, optimizer, simplifier, x

    def run(model, optimizer, simplifier, x, steps):
        for seed in steps:
            torch.manual_seed(seed)
            train(model, optimizer, torch.randn_like(x))
            simplifier.step()

    whole = start()
    run(*whole, range(24))
    part = start()
    run(*part, range(at))
    torch.save([each.state_dict() for each in part[:3]], tmp_path / "state")
    model_state, optimizer_state, state = torch.load(tmp_path / "state", weights_only=True)
    resumed = start()
    resumed[2].load_state_dict(state)
    assert str(resumed[2].report()) == str(part[2].report())
    resumed[0].load_state_dict(model_state)
    resumed[1].load_state_dict(optimizer_state)
    run(*resumed, range(at, 24))
    assert whole[2].widths[next(iter(whole[2].widths))] < WIDTH
    assert resumed[2].history == whole[2].history
    for one, other in zip(resumed[0].state_dict().values(), whole[0].state_dict().values(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(resumed[2].activity.values(), whole[2].activity.values(), strict=True):
        assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))


def test_a_state_of_another_model_is_refused():
    state = meprop.Simplifier(make(CASES["stack"])[0]).state_dict()
    with pytest.raises(ValueError, match="of another model"):
        meprop.Simplifier(make(CASES["residual"])[0]).load_state_dict(state)
    model, x = make(CASES["stack"])
    simplifier = meprop.Simplifier(model, 0.5, check_every=1)
    model(x).sum().backward()
    simplifier.step()
    with pytest.raises(ValueError, match="units that are removed here"):
        simplifier.load_state_dict(state)

    model, x = make(CASES["batch norm"])
    simplifier = meprop.Simplifier(model, 0.5, check_every=1, example_inputs=(x,))
    model(x).square().sum().backward()
    simplifier.step()
    assert min(simplifier.widths.values()) < WIDTH
    with pytest.raises(ValueError, match=r"cannot be pruned here: .*give example_inputs"):
        quietly(make(CASES["batch norm"])[0]).load_state_dict(simplifier.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda things: pickle.loads(pickle.dumps(things))])
def test_copies_go_on_alike_and_apart(duplicate):
    model, x = make(CASES["stack"])
    optimizer = torch.optim.Adam(model.parameters())
    simplifier = meprop.Simplifier(model, 0.3, optimizer=optimizer, check_every=2)
    train(model, optimizer, x)
    simplifier.step()
    twins = duplicate((model, optimizer, simplifier))
    untouched = twins[0][0].activity.hits.clone()
    for things in ((model, optimizer, simplifier), twins):
        assert torch.equal(things[0][0].activity.hits, untouched)
        train(things[0], things[1], x)
        things[2].step()
    assert twins[2].widths == simplifier.widths
    assert simplifier.widths["0"] < WIDTH
    assert torch.equal(twins[0](x), model(x))


# ---------------------------------------------------------------- the compact model


def simplified(name: str) -> tuple[nn.Module, meprop.Simplifier, Tensor]:
    model, x = make(CASES[name], torch.float32)
    simplifier = meprop.Simplifier(model, 0.3, check_every=1, example_inputs=(x,))
    model(x).square().sum().backward()
    simplifier.step()
    model.zero_grad()
    return simplifier.compact().eval(), simplifier, x


@pytest.mark.parametrize("name", CASES)
def test_the_compact_model_is_saved_as_safetensors(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, simplifier, x = simplified(name)
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    loaded = simplifier.compact().eval()
    for parameter in loaded.parameters():
        parameter.data.zero_()
    safetensors.load_model(loaded, str(tmp_path / "model.safetensors"))
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("lstm", "stacked, bidirectional lstm")])
def test_the_compact_model_is_exported(name):
    """By torch.export; packed sequences are none of its types."""
    model, _, x = simplified(name)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("lstm", "stacked, bidirectional lstm")])
def test_the_compact_model_is_exported_to_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, _, x = simplified(name)
    torch.onnx.export(model, (x,), str(tmp_path / "model.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), rtol=0, atol=1e-5)


def test_a_compact_lstm_is_exported(tmp_path):
    """By torch.export, and where its packages are there to ONNX: one that gets tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), Last(nn.LSTM(5, WIDTH)), nn.Linear(WIDTH, 3))
    x = torch.randn(4, 3, 6)
    meprop.convert(model, RULE, min_features=10, when="always")
    simplifier = meprop.Simplifier(model, 0.3, check_every=1)
    model(x).square().sum().backward()
    simplifier.step()
    compact = simplifier.compact().eval()
    assert compact[1].lstm.hidden_size < WIDTH
    exported = torch.export.export(compact, (x,)).module()
    torch.testing.assert_close(exported(x), compact(x), rtol=0, atol=1e-6)
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(compact, (x,), str(tmp_path / "model.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), compact(x).detach(), rtol=0, atol=1e-5)


class Last(nn.Module):
    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def test_the_example_of_the_docstring_holds():
    assert doctest.testmod(simplify) == (0, 7)


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
