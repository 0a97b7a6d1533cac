"""State: saved and loaded, given to torch's optimizers and taken from them, counted."""

import copy
import io

import pytest
import torch

from meprop import optim
from optimizer_cases import KINDS, ROWS, WIDTH, assert_alike, make, make_torch, parameters, sparse, train


@pytest.mark.parametrize("mode", ["exact", "decay", "lazy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_bit_for_bit(kind, mode):
    whole = parameters(torch.float32)
    train(make(kind, whole, sparse_rows=mode), whole, range(40))

    params = parameters(torch.float32)
    optimizer = make(kind, params, sparse_rows=mode)
    train(optimizer, params, range(17))
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    params = [torch.nn.Parameter(parameter) for parameter in saved["params"]]
    optimizer = make(kind, params, sparse_rows=mode)
    optimizer.load_state_dict(saved["optimizer"])
    train(optimizer, params, range(17, 40))
    assert all(torch.equal(*pair) for pair in zip(params, whole, strict=True))


@pytest.mark.parametrize("mode", ["exact", "decay", "lazy"])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_go_to_torchs_optimizers_and_back(kind, mode):
    ours = parameters(torch.float64)
    optimizer = make(kind, ours, sparse_rows=mode)
    train(optimizer, ours, range(20))
    optimizer.wake()
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    expected = make_torch(kind, theirs)
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, ours, range(20, 30), dense=True)
    train(expected, theirs, range(20, 30), dense=True)
    assert_alike(ours, theirs, torch.float64)

    back = [torch.nn.Parameter(parameter.detach().clone()) for parameter in theirs]
    again = make(kind, back, sparse_rows=mode)
    again.load_state_dict(copy.deepcopy(expected.state_dict()))
    train(again, back, range(30, 40))
    train(optimizer, ours, range(30, 40))
    assert_alike(back, ours, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_of_the_state_dict_is_torchs(kind):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer, expected = make(kind, ours), make_torch(kind, theirs)
    train(optimizer, ours, range(5))
    train(expected, theirs, range(5), dense=True)
    found, wanted = optimizer.state_dict(), expected.state_dict()
    assert found["state"].keys() == wanted["state"].keys()
    for index, state in wanted["state"].items():
        assert found["state"][index].keys() == state.keys()
    assert [group.keys() for group in found["param_groups"]] == [group.keys() for group in wanted["param_groups"]]


def _saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: torch.load(_saved(one), weights_only=False)])
def test_copies_keep_the_mode(copied):
    optimizer = optim.AdamW(parameters(torch.float32), sparse_rows="lazy")
    assert copied(optimizer).sparse_rows == "lazy"


def test_the_rows_decays_are_loaded_as_they_are_into_half_precision():
    parameter = torch.nn.Parameter(torch.ones(ROWS, WIDTH, dtype=torch.bfloat16))
    optimizer = optim.SGD([parameter], 0.01, momentum=0.9, sparse_rows="decay")
    for step in range(ROWS):
        parameter.grad = sparse(torch.ones(1, WIDTH, dtype=torch.bfloat16), [step])
        optimizer.step()
    before = optimizer.state[parameter]["momentum_buffer_row_decay"].clone()
    torch.testing.assert_close(before, 0.9 ** torch.arange(ROWS).flip(0).float())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    after = optimizer.state[parameter]["momentum_buffer_row_decay"]
    assert after.dtype == torch.float32
    assert torch.equal(after, before)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("kind", "mode"), [("adam", "exact"), ("adam", "decay"), ("adagrad", "exact")])
def test_steps_are_counted_in_float32_whatever_the_default_dtype(kind, mode, default):
    params = parameters(torch.float32)[:1]
    torch.set_default_dtype(default)
    try:
        optimizer = make(kind, params, sparse_rows=mode)
        for _ in range(258):
            params[0].grad = sparse(torch.ones(1, WIDTH, dtype=torch.float32), [3])
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    state = optimizer.state[params[0]]
    assert float(state["step"]) == 258
    assert {value.dtype for name, value in state.items() if kind == "adam" or name != "step"} == {torch.float32}


def test_a_state_of_another_shape_is_refused():
    small, large = torch.nn.Parameter(torch.ones(4, 6)), torch.nn.Parameter(torch.ones(40, 600))
    optimizer, other = optim.Adam([small]), optim.Adam([large])
    small.grad = sparse(torch.ones(1, 6), [2], 4)
    optimizer.step()
    with pytest.raises(ValueError, match=r"'exp_avg' is \[4, 6\], its parameter \[40, 600\]"):
        other.load_state_dict(optimizer.state_dict())
