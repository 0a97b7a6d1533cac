"""Optimizers against torch's own: dense gradients, row-sparse ones in the three modes, and what users do with them."""

import copy
import io
import math

import pytest
import torch

import meprop
from meprop import ops, optim
from meprop.errors import NotSupportedError
from meprop.ops import GradientRows, native, reference

ROWS, WIDTH = 37, 19

KINDS = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd-l2": ("SGD", {"lr": 0.1, "weight_decay": 0.01}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "dampened": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "maximize": ("SGD", {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    "adam": ("Adam", {"lr": 0.01}),
    "adam-l2": ("Adam", {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-5}),
    "amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "adam-maximize": ("Adam", {"lr": 0.01, "maximize": True}),
    "adamw": ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    "adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.1}),
    "adagrad-l2": ("Adagrad", {"lr": 0.1, "weight_decay": 0.01}),
}
IN_ALL_MODES = ["sgd", "adagrad"]
"""What is exact in all three modes."""


def make(kind, params, **more):
    name, options = KINDS[kind]
    return getattr(optim, name)(params, **options, **more)


def make_torch(kind, params, **more):
    name, options = KINDS[kind]
    return getattr(torch.optim, name)(params, **options, **more)


def parameters(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((ROWS, WIDTH), (ROWS,), (5, 3))
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def sparse(values, indices, rows=ROWS):
    shape = (rows, *values.shape[1:])
    return torch.sparse_coo_tensor(torch.tensor(indices, dtype=torch.long)[None], values, shape, is_coalesced=True)


def gradients(step, dtype):
    """Of the three parameters: the first's is row-sparse but in every seventh step, the second has none at times."""
    generator = torch.Generator().manual_seed(1000 + step)
    first = torch.randn((ROWS, WIDTH), generator=generator, dtype=dtype)
    if step % 7 != 3:
        awake = torch.randperm(ROWS, generator=generator)[: step % 5].sort().values
        first = sparse(first[awake], awake.tolist())
    second = None if step % 11 == 5 else torch.randn(ROWS, generator=generator, dtype=dtype)
    return [first, second, torch.randn((5, 3), generator=generator, dtype=dtype)]


def train(optimizer, params, steps, dense=False):
    dtype = params[0].dtype
    for step in steps:
        for parameter, grad in zip(params, gradients(step, dtype), strict=False):
            parameter.grad = grad.to_dense() if dense and grad is not None else grad
        optimizer.step()


TOLERANCE = {torch.float32: {"rtol": 2e-4, "atol": 2e-5}, torch.float64: {"rtol": 1e-9, "atol": 1e-11}}


def assert_alike(found, expected, dtype):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE[dtype])


# ---------------------------------------------------------------- against torch


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


def test_lazy_adam_is_sparse_adam():
    ours, theirs = parameters(torch.float64)[:1], parameters(torch.float64)[:1]
    optimizer, expected = optim.Adam(ours, 0.01, sparse_rows="lazy"), torch.optim.SparseAdam(theirs, 0.01)
    for step in [step for step in range(200) if step % 7 != 3]:
        ours[0].grad, theirs[0].grad = gradients(step, torch.float64)[0], gradients(step, torch.float64)[0]
        optimizer.step()
        expected.step()
    # SparseAdam adds eps to the root before it is corrected for the moments' start
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["momentum", "dampened", "nesterov", "adam", "adam-l2", "amsgrad", "adamw"])
def test_decay_gives_a_waking_row_the_moments_of_the_dense_optimizer(kind, dtype):
    """Its moments are then those of torch's optimizer, if that had let the weight be where it is while it slept."""
    ours, theirs = parameters(dtype)[:1], parameters(dtype)[:1]
    optimizer, expected = make(kind, ours, sparse_rows="decay"), make_torch(kind, theirs)
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        awake = torch.randperm(ROWS, generator=generator)[: 1 + step % 3].sort().values
        grad = torch.randn((len(awake), WIDTH), generator=generator, dtype=dtype)
        before = ours[0].detach().clone()
        ours[0].grad = sparse(grad, awake.tolist())
        optimizer.step()
        asleep = torch.ones(ROWS, dtype=torch.bool).index_fill_(0, awake, False)
        assert torch.equal(ours[0][asleep], before[asleep])

        theirs[0].grad = ours[0].grad.to_dense()
        if KINDS[kind][1].get("weight_decay") and kind != "adamw":
            theirs[0].grad[asleep] = -KINDS[kind][1]["weight_decay"] * theirs[0].detach()[asleep]  # no L2 in sleep
        held = theirs[0].detach().clone()
        expected.step()
        if kind == "adamw":
            held *= 1 - 0.01 * 0.1
        with torch.no_grad():
            theirs[0][asleep] = held[asleep]
    if kind == "adamw":
        optimizer.wake()
    torch.testing.assert_close(ours[0], theirs[0], **TOLERANCE[dtype])
    optimizer.wake()
    names = [name for name in expected.state[theirs[0]] if name != "step"]
    for name in names:
        torch.testing.assert_close(optimizer.state[ours[0]][name], expected.state[theirs[0]][name], **TOLERANCE[dtype])
    assert "row_step" not in optimizer.state[ours[0]]


@pytest.mark.parametrize("mode", ["decay", "lazy"])
@pytest.mark.parametrize("kind", KINDS)
def test_sleeping_rows_are_neither_moved_nor_is_their_state(kind, mode):
    params = parameters(torch.float32)[:1]
    optimizer = make(kind, params, sparse_rows=mode)
    train(optimizer, params, range(8))
    before, state = params[0].detach().clone(), copy.deepcopy(optimizer.state[params[0]])
    params[0].grad = sparse(torch.ones(2, WIDTH), [4, 9])
    optimizer.step()
    asleep = torch.ones(ROWS, dtype=torch.bool).index_fill_(0, torch.tensor([4, 9]), False)
    assert torch.equal(params[0][asleep], before[asleep])
    assert not (params[0][~asleep] == before[~asleep]).any()
    for name, value in optimizer.state[params[0]].items():
        if value.dim() > 0:
            assert torch.equal(value[asleep], state[name][asleep]), name


# ---------------------------------------------------------------- native against reference

OPS = {
    "sgd": ("sgd_rows", 0, {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.1, "nesterov": False}),
    "momentum": ("sgd_rows", 1, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.0, "nesterov": True}),
    "adam": ("adam_rows", 2, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1, "decoupled": False}),
    "adamw": ("adam_rows", 2, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1, "decoupled": True}),
    "adagrad": ("adagrad_rows", 1, {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.1}),
}


@pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("slept", [False, True])
@pytest.mark.parametrize("every_row", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (40, 16), (33, 100), (300, 257), (3, 0)])
@pytest.mark.parametrize("op", OPS)
def test_native_updates_are_the_references_in_float64(level, op, shape, every_row, slept):
    name, states, options = OPS[op]
    generator = torch.Generator().manual_seed(0)
    rows = shape[0]
    for count in {0, 1, rows // 3, rows}:
        awake = torch.randperm(rows, generator=generator)[:count].sort().values
        grad = torch.randn((count, shape[1]), generator=generator)
        tensors = [torch.randn(shape, generator=generator).abs() for _ in range(1 + states)]
        row_step = torch.randint(0, 9, (rows,), generator=generator).float() if slept else None
        narrow = torch.zeros(shape, dtype=torch.bfloat16)
        wide = [tensor.double() for tensor in tensors]
        wide_step = None if row_step is None else row_step.clone()
        missing = [None] if name == "sgd_rows" and states == 0 else []
        missing += [None] if name == "adam_rows" else []
        found = GradientRows(awake, grad, every_row, row_step, narrow)
        getattr(ops.backend("native"), name)(*tensors, *missing, found, 12.0, **options)
        oracle = GradientRows(awake, grad.double(), every_row, wide_step)
        getattr(reference, name)(*wide, *missing, oracle, 12.0, **options)
        for found, expected in zip(tensors, wide, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        if row_step is not None:
            assert torch.equal(row_step, wide_step)
        moved = torch.ones(rows, dtype=torch.bool) if every_row else torch.zeros(rows, dtype=torch.bool)
        moved[awake] = True
        assert torch.equal(narrow[moved], tensors[0][moved].bfloat16())
        assert not narrow[~moved].any()


@pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")
def test_the_number_of_threads_changes_no_bit():
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            generator = torch.Generator().manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(500, 300, generator=generator))]
            optimizer = optim.Adam(params)
            for _ in range(3):
                awake = torch.randperm(500, generator=generator)[:50].sort().values.tolist()
                params[0].grad = sparse(torch.randn(50, 300, generator=generator), awake, 500)
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        results.append(params[0].detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("indices", [[-1, 3], [3, ROWS], [4, 4], [5, 2]])
def test_native_code_refuses_rows_that_are_not_there(indices):
    weight = torch.zeros(ROWS, WIDTH)
    rows = GradientRows(torch.tensor(indices), torch.ones(2, WIDTH))
    with pytest.raises(IndexError, match="ascend"):
        ops.backend("native").adagrad_rows(weight, weight.clone(), rows, 1.0, lr=1.0, eps=1.0, weight_decay=0.0)
    assert not weight.any()


# ---------------------------------------------------------------- as users use them


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


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: torch.load(_saved(one), weights_only=False)])
def test_copies_keep_the_mode(copied):
    optimizer = optim.AdamW(parameters(torch.float32), sparse_rows="lazy")
    assert copied(optimizer).sparse_rows == "lazy"


def _saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


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


def test_other_shapes_than_matrices():
    ours, theirs = (torch.nn.Parameter(torch.ones(6, 2, 3)) for _ in range(2))
    ours.grad = sparse(torch.full((1, 2, 3), 2.0), [4], 6)
    theirs.grad = ours.grad.to_dense()
    for parameter in (ours, theirs):
        optim.Adam([parameter], sparse_rows="decay").step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", [{"differentiable": True}, {"capturable": True}])
def test_what_is_not_for_row_sparse_gradients_is_refused(options):
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    parameter.grad = sparse(torch.ones(1, 2), [1], 3)
    with pytest.raises(NotSupportedError, match="sparse_grad=False"):
        optim.Adam([parameter], **options).step()


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


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_by_norm_is_torchs(norm_type, max_norm):
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    values = torch.arange(3.0, dtype=torch.float64)[:, None].expand(3, WIDTH)
    ours[0].grad = torch.sparse_coo_tensor(torch.tensor([[5, 2, 5]]), values, (ROWS, WIDTH))
    ours[1].grad = torch.ones(ROWS, dtype=torch.float64)
    theirs[0].grad, theirs[1].grad = ours[0].grad.to_dense(), ours[1].grad.clone()
    norm = optim.clip_grad_norm_(iter(ours), max_norm, norm_type)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type))
    assert ours[0].grad.layout == torch.sparse_coo
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(one.grad.to_dense(), other.grad)
    ours[1].grad[0] = math.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        optim.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True)


# ---------------------------------------------------------------- faults of a cold review


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam", "adagrad"])
def test_dense_half_precision_is_not_given_to_fused_kernels(kind, dtype):
    """torch 2.13's fused SGD leaves most entries of such parameters where they are (pytorch#191763)."""
    ours, theirs = ([torch.nn.Parameter(torch.ones(64, dtype=dtype))] for _ in range(2))
    optimizer, expected = make(kind, ours), make_torch(kind, theirs)
    for _ in range(3):
        ours[0].grad, theirs[0].grad = torch.ones_like(ours[0]), torch.ones_like(theirs[0])
        optimizer.step()
        expected.step()
    torch.testing.assert_close(ours[0], theirs[0])


@pytest.mark.parametrize("choice", [{"foreach": False}, {"foreach": True}, {"fused": False}])
def test_a_chosen_implementation_stays(choice):
    (name, value), *_ = choice.items()
    group = optim.Adam(parameters(torch.float32), **choice).param_groups[0]
    assert group[name] is value
    assert not group["fused"]


def test_the_rows_steps_are_loaded_as_they_are_into_half_precision():
    parameter = torch.nn.Parameter(torch.ones(ROWS, WIDTH, dtype=torch.bfloat16))
    optimizer = optim.SGD([parameter], 0.01, momentum=0.9, sparse_rows="decay")
    for step in range(300):  # bfloat16 holds the integers up to 256
        parameter.grad = sparse(torch.ones(1, WIDTH, dtype=torch.bfloat16), [step % ROWS])
        optimizer.step()
    before = optimizer.state[parameter]["row_step"].clone()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    after = optimizer.state[parameter]["row_step"]
    assert after.dtype == torch.float32
    assert torch.equal(after, before)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("kind", "mode"), [("adam", "exact"), ("adam", "decay"), ("momentum", "decay")])
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
    assert {state[name].dtype for name in ("step", "row_step") if name in state} == {torch.float32}


def test_a_state_of_another_shape_is_refused():
    small, large = torch.nn.Parameter(torch.ones(4, 6)), torch.nn.Parameter(torch.ones(40, 600))
    optimizer, other = optim.Adam([small]), optim.Adam([large])
    small.grad = sparse(torch.ones(1, 6), [2], 4)
    optimizer.step()
    with pytest.raises(ValueError, match=r"'exp_avg' is \[4, 6\], its parameter \[40, 600\]"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("what", ["gradient", "state", "row_step"])
def test_rows_of_another_shape_are_refused_before_memory_is_touched(what):
    weight, buffer, values, row_step = torch.ones(4, 6), torch.ones(4, 6), torch.ones(1, 6), torch.zeros(4)
    if what == "gradient":
        values = torch.ones(1, 5)
    if what == "state":
        buffer = torch.ones(3, 6)
    if what == "row_step":
        row_step = torch.zeros(3)
    options = {"lr": 1.0, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
    with pytest.raises(ValueError, match=r"do not go with a parameter \[4, 6\]"):
        ops.sgd_rows(weight, buffer, GradientRows(torch.tensor([1]), values, row_step=row_step), 1.0, **options)
    assert torch.equal(weight, torch.ones(4, 6))


def test_adagrad_takes_groups_that_are_added_later():
    ours, theirs = ([torch.nn.Parameter(torch.ones(ROWS, WIDTH)) for _ in range(2)] for _ in range(2))
    for params, module in ((ours, optim), (theirs, torch.optim)):
        optimizer = module.Adagrad(params[:1], 0.1, initial_accumulator_value=0.5)
        optimizer.add_param_group({"params": params[1:]})
        for _ in range(2):
            params[1].grad = sparse(torch.ones(1, WIDTH), [3])
            optimizer.step()
    torch.testing.assert_close(ours[1], theirs[1])


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


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_clipping_takes_gradients_without_rows(norm_type):
    params = parameters(torch.float32)[:2]
    params[0].grad, params[1].grad = sparse(torch.empty(0, WIDTH), []), torch.full((ROWS,), 2.0)
    expected = torch.linalg.vector_norm(params[1].grad, norm_type)
    torch.testing.assert_close(optim.clip_grad_norm_(params, 1.0, norm_type), expected)
    params[1].grad = None
    assert optim.clip_grad_norm_(params, 1.0, norm_type) == 0
