"""Steps against torch's own: dense gradients, row-sparse ones in the three modes, and what users do with them."""

import copy
import inspect
import math

import pytest
import torch

import meprop
from meprop import ops, optim, row_sparse
from meprop.errors import NotSupportedError
from optimizer_cases import (
    KINDS,
    ROWS,
    TOLERANCE,
    WIDTH,
    assert_alike,
    make,
    make_torch,
    parameters,
    sparse,
    train,
)

IN_ALL_MODES = ["sgd", "adagrad"]
"""What is exact in all three modes."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_is_what_torch_does_with_dense_gradients(kind, dtype):
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer, expected = make(kind, ours), make_torch(kind, theirs)
    train(optimizer, ours, range(300))
    train(expected, theirs, range(300), dense=True)
    assert_alike(ours, theirs, dtype)
    for one, other in zip(ours, theirs, strict=True):
        assert optimizer.state[one].keys() == expected.state[other].keys()
        for name, value in expected.state[other].items():
            torch.testing.assert_close(optimizer.state[one][name], value, **TOLERANCE[dtype])


@pytest.mark.parametrize("mode", ["decay", "lazy"])
@pytest.mark.parametrize("kind", IN_ALL_MODES)
def test_what_is_exact_in_all_modes(kind, mode):
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    train(make(kind, ours, sparse_rows=mode), ours, range(100))
    train(make_torch(kind, theirs), theirs, range(100), dense=True)
    assert_alike(ours, theirs, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_gradients_are_torchs_bit_for_bit(kind):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    train(make(kind, ours), ours, range(20), dense=True)
    train(make_torch(kind, theirs, fused=True), theirs, range(20), dense=True)
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_dense_gradient_is_that_of_all_rows_bit_for_bit(kind, monkeypatch):
    """Which gradients are row-sparse makes no difference to the rest, where native code does the steps of both."""
    if kind in ("amsgrad", "maximize", "adam-maximize"):
        pytest.skip("torch's implementation does the dense step")
    monkeypatch.setattr(ops.optimizer, "_SMALLEST_WHOLE", 1)
    dense, rows = parameters(torch.float32)[:1], parameters(torch.float32)[:1]
    both = make(kind, dense), make(kind, rows)
    for step in range(4):
        grad = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step))
        dense[0].grad, rows[0].grad = grad, sparse(grad, range(ROWS))
        for optimizer in both:
            optimizer.step()
    assert torch.equal(*dense, *rows)


@pytest.mark.parametrize("mode", ["decay", "lazy"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_gradient_are_neither_moved_nor_is_their_state(kind, mode):
    params = parameters(torch.float32)[:1]
    optimizer = make(kind, params, sparse_rows=mode)
    train(optimizer, params, range(8))
    before, state = params[0].detach().clone(), copy.deepcopy(optimizer.state[params[0]])
    params[0].grad = sparse(torch.ones(2, WIDTH), [4, 9])
    optimizer.step()
    without = torch.ones(ROWS, dtype=torch.bool).index_fill_(0, torch.tensor([4, 9]), False)
    assert torch.equal(params[0][without], before[without])
    assert not (params[0][~without] == before[~without]).any()
    for name, value in optimizer.state[params[0]].items():
        if value.dim() > 0 and "_row_" not in name:
            assert torch.equal(value[without], state[name][without]), name


@pytest.mark.parametrize("kind", ["momentum", "dampened", "adam", "amsgrad", "adamw", "adagrad-l2"])
def test_a_change_of_mode_begins_with_rows_that_are_up_to_date(kind):
    found, expected = parameters(torch.float64)[:1], parameters(torch.float64)[:1]
    optimizers = [make(kind, each, sparse_rows="decay") for each in (found, expected)]
    for optimizer, params in zip(optimizers, (found, expected), strict=True):
        train(optimizer, params, [1, 2, 4])
        if params is expected:
            optimizer.wake()
        optimizer.sparse_rows = "exact"
        train(optimizer, params, [5, 6, 8])
    assert torch.equal(found[0], expected[0])
    assert not any("_row_" in name for name in optimizers[0].state[found[0]])


@pytest.mark.parametrize(
    ("kind", "passes_over_all"),
    [("sgd", False), ("sgd-l2", True), ("momentum", True), ("adagrad", False), ("adagrad-l2", True), ("adam", True)],
)
def test_exact_passes_over_all_rows_only_where_that_changes_some(kind, passes_over_all, monkeypatch):
    name, found = f"{KINDS[kind][0].lower()}_rows", []
    update = getattr(ops, name)

    def noted(*args, **options):
        found.extend(each.every_row for each in args if hasattr(each, "every_row"))
        update(*args, **options)

    monkeypatch.setattr(ops, name, noted)
    params = parameters(torch.float32)[:1]
    params[0].grad = sparse(torch.ones(2, WIDTH), [4, 9])
    make(kind, params).step()
    assert found == [passes_over_all]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_arguments_and_their_defaults_are_torchs(name):
    ours, theirs = (dict(inspect.signature(getattr(each, name)).parameters) for each in (optim, torch.optim))
    assert ours.pop("sparse_rows").default == "exact"
    assert ours.pop("in_backward").default is False
    assert ours.pop("state_dtype").default is None
    assert ours.pop("copy_dtype").default is None
    found, expected = ([(each.default, each.kind) for each in side.values()] for side in (ours, theirs))
    assert list(ours) == list(theirs)
    assert found == expected


OTHER_VALUES = {"betas": (0.5, 0.6)} | dict.fromkeys(
    ("lr", "momentum", "dampening", "weight_decay", "eps", "lr_decay", "initial_accumulator_value"), 0.5
)
"""Other values than the default ones; that of an option that is not here is True."""


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name in ("SGD", "Adam", "AdamW", "Adagrad")
        for option in inspect.signature(getattr(torch.optim, name)).parameters
        if option != "params"
    ],
)
def test_every_option_reaches_torchs_optimizer(name, option):
    options = {option: OTHER_VALUES.get(option, True)} | ({"momentum": 0.5} if option == "nesterov" else {})
    ours, theirs = (getattr(each, name)(parameters(torch.float32), **options) for each in (optim, torch.optim))
    assert ours.defaults == theirs.defaults
    assert ours.defaults[option] == options[option]


def test_parameter_groups_have_options_of_their_own():
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    groups = [({"params": p[:1], "lr": 0.5, "momentum": 0.0}, {"params": p[1:]}) for p in (ours, theirs)]
    train(optim.SGD(groups[0], lr=0.1, momentum=0.9), ours, range(20))
    train(torch.optim.SGD(groups[1], lr=0.1, momentum=0.9), theirs, range(20), dense=True)
    assert_alike(ours, theirs, torch.float64)


def test_gradients_of_several_backward_passes_add_up():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 30)
    results = []
    for sparse_grad in (True, False):
        torch.manual_seed(1)
        model = torch.nn.Linear(30, 200)
        meprop.convert(model, meprop.TopK(10, scope="batch"), sparse_grad=sparse_grad, when="always")
        optimizer = optim.Adam(model.parameters(), 0.1)
        for half in (x[:2], x[2:]):
            for batch in half:
                model(batch).pow(2).sum().backward()
            optimizer.step()
            assert (model.weight.grad.layout == torch.sparse_coo) == sparse_grad
            optimizer.zero_grad()
        results.append(model.weight.detach())
    torch.testing.assert_close(*results)


def test_a_learning_rate_schedule_and_hooks_and_closures_work():
    params = parameters(torch.float64)
    optimizer = optim.SGD(params, lr=1.0, momentum=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        params[0].grad = sparse(torch.ones(1, WIDTH, dtype=torch.float64), [3])
        return torch.tensor(7.0)

    before = params[0].detach().clone()
    assert optimizer.step(closure) == 7
    schedule.step()
    optimizer.step(closure)
    assert calls == ["after", "after"]
    torch.testing.assert_close(params[0][3], before[3] - 1.0 - 0.1 * 1.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_goes_where_it_goes_with_torch(kind, value):
    ours, theirs = parameters(torch.float32)[:1], parameters(torch.float32)[:1]
    grad = torch.ones(2, WIDTH)
    grad[1, 3] = value
    optimizer, expected = make(kind, ours), make_torch(kind, theirs)
    for _ in range(2):
        ours[0].grad = sparse(grad, [4, 9])
        theirs[0].grad = ours[0].grad.to_dense()
        optimizer.step()
        expected.step()
    torch.testing.assert_close(ours[0], theirs[0], equal_nan=True, rtol=1e-5, atol=1e-6)


def test_grad_scaler_unscales_and_skips():
    params = parameters(torch.float32)[:2]
    optimizer = optim.Adam(params, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, backoff_factor=0.999, growth_interval=10**6)
    before = [parameter.detach().clone() for parameter in params]

    def step(value):
        scaler.scale(torch.tensor(1.0))
        params[0].grad, params[1].grad = sparse(torch.full((1, WIDTH), value), [3]), torch.full((ROWS,), 8.0)
        scaler.unscale_(optimizer)
        torch.testing.assert_close(params[1].grad[0], torch.tensor(1.0), rtol=0.01, atol=0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    step(math.inf)
    assert all(torch.equal(*pair) for pair in zip(params, before, strict=True))
    step(8.0)
    torch.testing.assert_close(params[0][3], before[0][3] - 0.1)
    scaler.scale(torch.tensor(1.0))
    params[0].grad, params[1].grad = None, torch.full((ROWS,), math.nan)
    scaler.step(optimizer)  # unscales by itself
    assert not params[1].isnan().any()


def test_the_version_of_what_is_written_goes_up():
    params = parameters(torch.float32)[:1]
    optimizer = optim.Adam(params)
    y = params[0].pow(2).sum()
    params[0].grad = sparse(torch.ones(1, WIDTH), [3])
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_uncoalesced_and_empty_gradients():
    params, twin = parameters(torch.float32)[:1], parameters(torch.float32)[:1]
    values = torch.arange(3.0)[:, None].expand(3, WIDTH)
    params[0].grad = torch.sparse_coo_tensor(torch.tensor([[5, 2, 5]]), values, (ROWS, WIDTH))
    twin[0].grad = params[0].grad.to_dense()
    for one in (params, twin):
        optim.Adam(one).step()
    torch.testing.assert_close(params[0], twin[0])
    before = params[0].detach().clone()
    params[0].grad = sparse(torch.empty(0, WIDTH), [])
    optim.Adam(params).step()
    assert torch.equal(params[0], before)


def test_another_default_device_does_not_matter():
    grad = torch.sparse_coo_tensor(torch.tensor([[5, 2, 5]]), torch.ones(3, WIDTH), (ROWS, WIDTH))
    with torch.device("meta"):
        assert row_sparse.distinct(grad)._indices().tolist() == [[2, 5]]


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_other_shapes_than_matrices(shape):
    ours, theirs = (torch.nn.Parameter(torch.ones(6, *shape)) for _ in range(2))
    optimizers = [optim.Adam([parameter], sparse_rows="decay") for parameter in (ours, theirs)]
    for index in (4, 2, 4):
        ours.grad = sparse(torch.full((1, *shape), 2.0), [index], 6)
        theirs.grad = ours.grad.to_dense()
        for optimizer in optimizers:
            optimizer.step()
    optimizers[0].wake()
    for name, value in optimizers[1].state[theirs].items():
        torch.testing.assert_close(optimizers[0].state[ours][name], value)


def test_values_of_any_memory_layout():
    ours, theirs = parameters(torch.float32)[:1], parameters(torch.float32)[:1]
    values = torch.arange(3.0 * WIDTH).view(WIDTH, 3).t()
    ours[0].grad = sparse(values, [2, 5, 9])
    assert not ours[0].grad._values().is_contiguous()
    theirs[0].grad = ours[0].grad.to_dense()
    for params in (ours, theirs):
        optim.SGD(params, 0.1).step()
    torch.testing.assert_close(ours[0], theirs[0])


@pytest.mark.parametrize("options", [{"differentiable": True}, {}])
def test_what_is_not_for_row_sparse_gradients_is_refused(options):
    dtype = torch.float32 if options else torch.complex64
    parameter = torch.nn.Parameter(torch.ones(3, 2, dtype=dtype))
    parameter.grad = sparse(torch.ones(1, 2, dtype=dtype), [1], 3)
    with pytest.raises(NotSupportedError, match="sparse_grad=False"):
        optim.Adam([parameter], **options).step()


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_the_number_of_a_captured_step_is_a_tensor(name):
    """It is for a GPU, but means the same on a CPU."""
    after = []
    for capturable in (False, True):
        params = parameters(torch.float32)[:1]
        optimizer = getattr(optim, name)(params, lr=0.1, capturable=capturable, sparse_rows="lazy")
        for number in range(4):
            params[0].grad = sparse(torch.ones(3, WIDTH) * (number - 1), [2, 5, 9])
            optimizer.step()
        after.append(params[0])
    torch.testing.assert_close(*after)


def test_entries_instead_of_rows_are_refused():
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    parameter.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(NotSupportedError, match="2 sparse dimensions"):
        optim.Adam([parameter]).step()


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_an_unknown_mode_is_refused(name):
    with pytest.raises(ValueError, match="sparse_rows='dense'; it is 'exact', 'decay' or 'lazy'"):
        getattr(optim, name)(parameters(torch.float32), sparse_rows="dense")
    optimizer = getattr(optim, name)(parameters(torch.float32), sparse_rows="lazy")
    with pytest.raises(ValueError, match="sparse_rows='dense'"):
        optimizer.sparse_rows = "dense"
    assert optimizer.sparse_rows == "lazy"


def test_a_mode_of_a_group_is_refused():
    with pytest.raises(ValueError, match="sparse_rows='lazy' in a parameter group"):
        optim.Adam([{"params": parameters(torch.float32), "sparse_rows": "lazy"}])


def test_a_compiled_step_of_row_sparse_gradients_is_refused():
    params = parameters(torch.float32)[:1]
    before = params[0].detach().clone()
    optimizer = optim.SGD(params, 1.0)
    params[0].grad = sparse(torch.ones(1, WIDTH), [2])
    with pytest.raises(RuntimeError, match=r"under torch\.compile; call it outside"):  # torch makes its own of ours
        torch.compile(lambda: optimizer.step(), backend="eager")()
    assert torch.equal(params[0], before)
