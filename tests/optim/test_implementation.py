"""Which of torch's implementations does a dense step: decided in each step, and seen nowhere outside of it."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meprop import ops, optim
from meprop.errors import NotSupportedError
from meprop.ops import native
from meprop.optim.base import RowSparseOptimizer
from optimizer_cases import KINDS, make, make_torch, needs_late_state, saved, sparse

SOME = ["sgd", "momentum", "adam", "amsgrad", "adamw", "adagrad"]
DTYPES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.bfloat16: {"rtol": 0.02, "atol": 0.02},
    torch.float16: {"rtol": 0.003, "atol": 0.003},
}


class Calls(TorchDispatchMode):
    """Notes whether torch's fused kernels are called."""

    def __init__(self):
        super().__init__()
        self.fused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fused |= "fused" in str(func)
        return func(*args, **(kwargs or {}))


def is_fused(optimizer):
    """Whether torch's fused kernels do a step of these gradients."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    with Calls() as calls:
        optimizer.step()
    return calls.fused


def tensors(dtype, count=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(9, 5, generator=generator).to(dtype)) for _ in range(count)]


def to(params, dtype):
    """What ``module.to(dtype)`` does to its parameters."""
    for parameter in params:
        parameter.grad = None
        parameter.data = parameter.data.to(dtype)


def train(optimizer, steps, rows):
    """Steps with dense gradients, or with gradients of two rows, sparse ones if the optimizer is ours."""
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in params:
            grad = torch.randn(9, 5, generator=generator).to(parameter.dtype)
            if rows:
                grad = sparse(grad[[2, 6]], [2, 6], 9)
                grad = grad if isinstance(optimizer, RowSparseOptimizer) else grad.to_dense()
            parameter.grad = grad
        optimizer.step()


def before_the_first_step(make, dtype):
    params = tensors(torch.float32)
    optimizer = make(params)
    to(params, dtype)
    return optimizer


def between_steps(make, dtype):
    params = tensors(torch.float32)
    optimizer = make(params)
    train(optimizer, range(2), False)
    to(params, dtype)
    return optimizer


def back_to_float32(make, dtype):
    params = tensors(dtype)
    optimizer = make(params)
    to(params, torch.float32)
    return optimizer


def mixed(make, dtype):
    return make([*tensors(dtype), *tensors(torch.float32)])


def one_of_two(make, dtype):
    params = tensors(torch.float32)
    optimizer = make(params)
    to(params[:1], dtype)
    return optimizer


def a_group_added_later(make, dtype):
    optimizer = make(tensors(torch.float32))
    train(optimizer, range(2), False)
    needs_late_state(optimizer)
    optimizer.add_param_group({"params": tensors(dtype)})
    return optimizer


def deep_copied(make, dtype):
    params = tensors(torch.float32)
    optimizer, params = copy.deepcopy((make(params), params))
    to(params, dtype)
    return optimizer


def pickled(make, dtype):
    params = tensors(torch.float32)
    optimizer, params = saved(make(params), params)
    to(params, dtype)
    return optimizer


def loaded(make, dtype):
    """The state of a run in float32 goes to one in another dtype."""
    earlier = make(tensors(torch.float32))
    train(earlier, range(2), False)
    optimizer = make(tensors(dtype))
    optimizer.load_state_dict(copy.deepcopy(earlier.state_dict()))
    return optimizer


CHANGES = [
    before_the_first_step,
    between_steps,
    back_to_float32,
    mixed,
    one_of_two,
    a_group_added_later,
    deep_copied,
    pickled,
    loaded,
]


def parameters_of(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize("rows", [False, True], ids=["dense", "row-sparse"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", SOME)
def test_a_change_of_dtypes_is_followed_as_by_torch(kind, change, dtype, rows):
    """Where torch refuses a change, we do so for dense gradients as well. We take row-sparse ones there."""
    if rows and dtype == torch.float16:
        pytest.skip("Adam's eps is zero in float16, and what rows of zeros get then is 0 / 0")
    optimizer, expected = (change(lambda params, how=how: how(kind, params), dtype) for how in (make, make_torch))
    try:
        train(expected, range(2, 5), rows)
    except RuntimeError:  # Adam's state is of another dtype
        if not rows:
            with pytest.raises(RuntimeError):
                train(optimizer, range(2, 5), rows)
            return
        train(optimizer, range(2, 5), rows)
        expected = change(lambda params: make_torch(kind, params), torch.float32)
        train(expected, range(2, 5), rows)
    else:
        train(optimizer, range(2, 5), rows)
    for one, other in zip(parameters_of(optimizer), parameters_of(expected), strict=True):
        tolerance = DTYPES[torch.float32 if dtype == torch.float64 else dtype]  # some tensor is of float32
        torch.testing.assert_close(one, other.to(one.dtype), **tolerance)
    for ours, theirs in zip(optimizer.state_dict()["param_groups"], expected.state_dict()["param_groups"], strict=True):
        assert ours == theirs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_go_both_ways_in_every_dtype(kind, dtype):
    first, second, third = tensors(dtype), tensors(dtype), tensors(dtype)
    ours, theirs, again = make(kind, first), make_torch(kind, second), make(kind, third)
    for optimizer in (ours, theirs, again):
        train(optimizer, range(2), False)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    again.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for optimizer in (ours, theirs, again):
        train(optimizer, range(2, 4), False)
    for one, other, another in zip(first, second, third, strict=True):
        torch.testing.assert_close(one, other, **DTYPES[dtype])
        torch.testing.assert_close(one, another, **DTYPES[dtype])


@pytest.mark.parametrize("kind", SOME)
def test_the_fused_implementation_is_taken_where_it_fits_in_this_step(kind):
    params = tensors(torch.float32)
    optimizer = make(kind, params)
    needs_late_state(optimizer)
    assert is_fused(optimizer)
    to(params, torch.bfloat16)
    optimizer.state.clear()
    assert not is_fused(optimizer)
    to(params, torch.float64)
    optimizer.state.clear()
    assert is_fused(optimizer)
    optimizer.add_param_group({"params": tensors(torch.float32)})
    assert is_fused(optimizer)
    optimizer.param_groups[0]["foreach"] = True
    assert is_fused(optimizer)  # the other group is
    optimizer.param_groups[1]["fused"] = False
    assert not is_fused(optimizer)


@pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("kind", SOME)
def test_native_code_does_the_steps_of_large_parameters_that_it_can(kind, monkeypatch):
    monkeypatch.setattr(ops.optimizer, "_SMALLEST_WHOLE", 45)
    params = [torch.nn.Parameter(torch.ones(9, 5)), torch.nn.Parameter(torch.ones(5, 9))]
    optimizer = make(kind, params)
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    with Calls() as calls:
        optimizer.step()
    assert calls.fused == (kind == "amsgrad")
    with Calls() as calls:
        params[0].grad, params[1].grad = None, torch.ones(5, 9)
        monkeypatch.setattr(ops.optimizer, "_SMALLEST_WHOLE", 46)
        optimizer.step()
    assert calls.fused


LAYOUTS = {
    "a transposed gradient": lambda p: setattr(p, "grad", torch.randn(5, 9).t()),
    "a gradient of broadcast memory": lambda p: setattr(p, "grad", torch.randn(1, 5).expand(9, 5)),
    "a transposed parameter": lambda p: setattr(p, "data", torch.randn(5, 9).t()),
    "every second column": lambda p: setattr(p, "data", torch.randn(9, 10)[:, ::2]),
    "channels last": lambda p: setattr(p, "data", torch.randn(9, 5, 3, 3).to(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", SOME)
def test_every_memory_layout_gives_torchs_step(kind, layout):
    """torch's fused kernels of the CPU take no note of strides."""
    results = []
    for how in (make, make_torch):
        params = tensors(torch.float32, 1)
        optimizer = how(kind, params)
        torch.manual_seed(0)
        if layout == "channels last":
            LAYOUTS[layout](params[0])
            optimizer = how(kind, params)
        for _ in range(3):
            params[0].grad = torch.randn(params[0].shape)
            if layout != "channels last":
                LAYOUTS[layout](params[0])
            optimizer.step()
        results.append(params[0].detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def negated(tensor):
    """The same values, whose memory has the other sign."""
    return torch._neg_view(-tensor)


class Other(torch.Tensor):
    """A subclass."""


def zeros_without_memory():
    return torch._efficientzerotensor((9, 5))


NOT_PLAIN = {
    "a negated gradient": lambda p: setattr(p, "grad", negated(torch.randn(9, 5))),
    "an imaginary part of a conjugate": lambda p: setattr(
        p, "grad", torch.randn(9, 5, dtype=torch.complex64).conj().imag
    ),
    "a gradient of zeros without memory": lambda p: setattr(p, "grad", zeros_without_memory()),
    "a subclass": lambda p: setattr(p, "grad", torch.randn(9, 5).as_subclass(Other)),
    "a negated parameter": lambda p: setattr(p, "data", negated(p.detach())),
    "a negated parameter and gradient": lambda p: (
        setattr(p, "data", negated(p.detach())),
        setattr(p, "grad", negated(torch.randn(9, 5))),
    ),
    "negated rows": lambda p: setattr(p, "grad", sparse(negated(torch.randn(2, 5)), [2, 6], 9)),
    "rows of zeros without memory": lambda p: setattr(p, "grad", sparse(torch._efficientzerotensor((2, 5)), [2, 6], 9)),
    "rows of a negated parameter": lambda p: (
        setattr(p, "data", negated(p.detach())),
        setattr(p, "grad", sparse(torch.randn(2, 5), [2, 6], 9)),
    ),
}


@pytest.mark.parametrize("mode", ["exact", "decay", "lazy"])
@pytest.mark.parametrize("what", NOT_PLAIN)
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_not_what_their_memory_says_give_torchs_step(kind, what, mode):
    if mode != "exact" and "rows" in what and kind not in ("sgd", "adagrad"):
        pytest.skip("rows without a gradient are not torch's there")
    results = []
    for how, options in ((make, {"sparse_rows": mode}), (make_torch, {})):
        (parameter,) = params = tensors(torch.float32, 1)
        optimizer = how(kind, params, **options)
        torch.manual_seed(0)
        for _ in range(3):
            parameter.grad = torch.randn(9, 5)
            NOT_PLAIN[what](parameter)
            if how is make_torch:
                parameter.grad = parameter.grad.to_dense().resolve_neg().clone()
            optimizer.step()
        results.append(parameter.detach().clone().as_subclass(torch.Tensor).resolve_neg())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SOME)
def test_a_negated_state_gives_torchs_step(kind):
    results = []
    for how in (make, make_torch):
        (parameter,) = params = tensors(torch.float32, 1)
        optimizer = how(kind, params)
        for seed in range(3):
            torch.manual_seed(seed)
            parameter.grad = torch.randn(9, 5)
            optimizer.step()
            state = optimizer.state[parameter]
            state |= {name: negated(value) for name, value in state.items() if name != "step" and value is not None}
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "choice",
    [{"foreach": False}, {"foreach": True}, {"fused": False}, {"differentiable": True}, {"lr": torch.tensor(0.1)}],
)
def test_a_chosen_implementation_stays(choice):
    optimizer = optim.Adam(tensors(torch.float32), **choice)
    optimizer.add_param_group({"params": tensors(torch.float32)})
    if "differentiable" not in choice:  # a step of leaves is not differentiable
        assert not is_fused(optimizer)
    for group in optimizer.param_groups:
        for name, value in choice.items():
            assert group[name] is value


def test_a_step_that_fails_leaves_no_choice_behind():
    params = tensors(torch.float32)
    optimizer = optim.Adam([{"params": params[:1]}, {"params": params[1:]}])
    params[0].grad, params[1].grad = torch.ones(9, 5), torch.eye(9, 5).to_sparse()
    with pytest.raises(NotSupportedError):
        optimizer.step()
    assert [group["fused"] for group in optimizer.param_groups] == [None, None]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_hooks_run_once(name):
    """Also where torch has put the running of hooks around the step of its own class."""
    getattr(torch.optim, name)(tensors(torch.float32))
    params, calls = tensors(torch.float32), []
    optimizer = getattr(optim, name)(params)
    optimizer.register_step_pre_hook(lambda *_: calls.append(f"before, {optimizer.param_groups[0]['fused']}"))
    optimizer.register_step_post_hook(lambda *_: calls.append(f"after, {optimizer.param_groups[0]['fused']}"))
    assert is_fused(optimizer)
    assert calls == ["before, None", "after, None"]


def test_a_compiled_step_is_torchs():
    params = tensors(torch.float32)
    optimizer = optim.SGD(params, lr=1.0)
    before = [parameter.detach().clone() for parameter in params]
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for number in (1, 2):
        for parameter in params:
            parameter.grad = torch.ones_like(parameter)
        step()
        for parameter, start in zip(params, before, strict=True):
            torch.testing.assert_close(parameter.detach(), start - number)
