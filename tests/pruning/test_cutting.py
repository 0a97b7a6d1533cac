"""What is left after a cut is the model whose removed units are masked; it trains on alike."""

import copy

import pytest
import torch
from torch import Tensor, nn

import meprop
from prunable import (
    CASES,
    RULE,
    WIDTH,
    Case,
    alive_units,
    make,
    train,
)

OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=True),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5, centered=True),
    "ours": lambda parameters: meprop.optim.Adam(parameters, lr=1e-2),
}
NARROW = {
    "adam": lambda parameters: meprop.optim.Adam(parameters, lr=1e-2, state_dtype=torch.bfloat16),
    "momentum": lambda parameters: meprop.optim.SGD(parameters, lr=1e-2, momentum=0.9, state_dtype=torch.bfloat16),
    "adagrad": lambda parameters: meprop.optim.Adagrad(parameters, lr=1e-2, state_dtype=torch.bfloat16),
}


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


def is_matrix(value) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1


def check_cut(
    case: Case, dtype: torch.dtype, optimizer_of, threshold: float = 0.3, is_rounded: bool = False, **options
) -> None:
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
    if is_rounded:
        tolerance = 0.02
        states = [state for state in optimizer.state.values() if isinstance(state.get("rounding"), int)]
        assert len(states) == len(parameters)
        assert all(value.dtype == torch.bfloat16 for state in states for value in state.values() if is_matrix(value))
    assert_same()
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_left_is_the_masked_model_and_trains_on_alike(case, dtype):
    check_cut(case, dtype, OPTIMIZERS[case.optimizer])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_optimizer_is_cut(name):
    check_cut(CASES["stack"], torch.float64, OPTIMIZERS[name])


@pytest.mark.parametrize("name", NARROW)
def test_states_in_bfloat16_are_cut_and_stay_so(name):
    """In the step that follows, the entries that are left have other places, and so are rounded otherwise."""
    check_cut(CASES["stack"], torch.float32, NARROW[name], is_rounded=True)


@pytest.mark.parametrize("sparse_rows", ["exact", "decay", "lazy"])
def test_row_sparse_gradients_and_the_decay_of_rows_are_cut(sparse_rows):
    check_cut(
        CASES["stack"],
        torch.float32,
        lambda parameters: meprop.optim.Adam(parameters, lr=1e-2, sparse_rows=sparse_rows),
        threshold=0.05,
        rule=meprop.TopK(5, scope="batch"),
        sparse_grad=True,
    )


def test_a_layer_with_a_compute_dtype_is_cut():
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
