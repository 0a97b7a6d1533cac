"""``state_dtype=torch.bfloat16``: states that are rounded at random, so that their means are right."""

import copy

import pytest
import torch
from torch import nn

import meprop
from meprop import ops, optim
from meprop.errors import NotSupportedError
from meprop.ops import rounding
from meprop.optim import narrow
from optimizer_cases import KINDS, ROWS, WIDTH, make, make_torch, parameters, saved, sparse, train

NARROW = {"state_dtype": torch.bfloat16}
SOME = [kind for kind in KINDS if kind != "amsgrad"]
MODES = ["exact", "decay", "lazy"]
STATES = ("momentum_buffer", "exp_avg", "exp_avg_sq", "sum")


def moments(optimizer):
    """All states that may be narrow."""
    states = [state for parameter in parameters_of(optimizer) if (state := optimizer.state.get(parameter))]
    return [state[name] for state in states for name in STATES if state.get(name) is not None]


def parameters_of(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def assert_same(one, other):
    for first, second in zip(parameters_of(one), parameters_of(other), strict=True):
        assert torch.equal(first, second)
    for first, second in zip(moments(one), moments(other), strict=True):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)


# ---------------------------------------------------------------- rounding


def test_the_mean_of_all_keys_is_what_is_rounded():
    """Each neighbour with the probability that is right: four standard deviations are left of 4000 keys."""
    values = torch.cat([torch.randn(500), torch.randn(100) * 1e-30, torch.tensor([0.0, -0.0, 1.0, -2.5, 3e38])])
    total = torch.zeros(len(values), dtype=torch.float64)
    for number in range(4000):
        rounded = rounding.stochastic(values, values.shape, ..., rounding.key_of(number)).double()
        assert ((rounded - values.double()).abs() < values.double().abs() * 2**-7 + 1e-45).all()
        total += rounded
    ulp = values.double().abs() * 2**-7
    assert ((total / 4000 - values).abs() <= 4.5 * ulp / 2 / 4000**0.5).all()


def test_special_values_stay_what_they_are():
    special = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.5])
    for number in range(50):
        for is_second in (False, True):
            key = rounding.key_of(number)
            rounded = rounding.stochastic(special, special.shape, ..., key, is_second=is_second)
            torch.testing.assert_close(rounded.float(), special, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(rounded.signbit()[2:], special.signbit()[2:])


@pytest.mark.parametrize("how", ["native", "literal"])
def test_rounding_makes_nothing_infinite(how, level, monkeypatch):
    """Beyond the largest number of bfloat16, up is infinity, from which no state would come back."""
    largest = torch.finfo(torch.bfloat16).max
    values = torch.tensor([largest, torch.finfo(torch.float32).max, 3.395e38, torch.inf]).repeat(16)
    if how == "literal":
        monkeypatch.setattr(ops, "sgd_rows", ops.sgd_rows.literally)
    parameter = nn.Parameter(torch.zeros(128))
    optimizer = optim.SGD([parameter], lr=0.0, momentum=0.9, **NARROW)
    parameter.grad = torch.cat([values, -values])
    optimizer.step()
    expected = values.clamp(max=largest).where(values.isfinite(), values)
    assert torch.equal(moments(optimizer)[0].float(), torch.cat([expected, -expected]))


def test_both_halves_of_neighbouring_entries_and_keys_look_independent():
    count = 1 << 18
    draws = []
    for number in (0, 1, 2, 1000, 1 << 40):
        words = rounding._mixed(torch.arange(count), rounding.key_of(number))
        draws += [(half.double() + 0.5) / 2**16 - 0.5 for half in (words & 0xFFFF, words >> 16)]
    pairs = [(draw[:-lag], draw[lag:]) for draw in draws for lag in (1, 2, 8, 32, 1000)]
    pairs += [(draws[i], draws[j]) for i in range(len(draws)) for j in range(i)]
    for one, other in pairs:
        assert abs(float((one * other).mean())) * 12 * len(one) ** 0.5 < 4.5
    for draw in draws:
        assert abs(float(draw.mean())) * (12 * count) ** 0.5 < 4.5
        counts = torch.histc(draw, 256, -0.5, 0.5).double()
        assert float(((counts - count / 256) ** 2).sum() / (count / 256)) < 255 + 4.5 * (2 * 255) ** 0.5


def to_nearest(values, *_, **__):
    return values.bfloat16()


# That native code has the bits of the literal reference is tested below.
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        pytest.param(kind, how, marks=[pytest.mark.slow] * (kind != "adam" and how != "native"))
        for kind in ("adam", "momentum", "adagrad")
        for how in ("native", "literal", "to nearest")
    ],
)
def test_moments_of_a_constant_gradient_have_the_right_mean(kind, how, monkeypatch):
    """Rounded to the nearest they stand still: a step adds less than half of what bfloat16 can tell apart."""
    parameter, steps = nn.Parameter(torch.zeros(64, 64)), 2000
    options = {"adam": {"betas": (0.9, 0.999)}, "momentum": {"momentum": 0.999}, "adagrad": {}}[kind]
    cls = {"adam": optim.Adam, "momentum": optim.SGD, "adagrad": optim.Adagrad}[kind]
    optimizer = cls([parameter], lr=1e-5, **options, **NARROW)
    if how != "native":
        name = {"adam": "adam_rows", "momentum": "sgd_rows", "adagrad": "adagrad_rows"}[kind]
        monkeypatch.setattr(ops, name, getattr(ops, name).literally)
    if how == "to nearest":
        monkeypatch.setattr(ops.optimizer, "stochastic", to_nearest)
    for _ in range(steps):
        parameter.grad = torch.full_like(parameter, 0.7)
        optimizer.step()
    state = moments(optimizer)[-1].float()  # Adam's second
    expected = {
        "adam": 0.49 * (1 - 0.999**steps),
        "momentum": 0.7 * (1 - 0.999**steps) / 0.001,
        "adagrad": 0.49 * steps,
    }[kind]
    error = abs(float(state.mean()) / expected - 1)
    assert error > 0.05 if how == "to nearest" else error < 2e-3
    if how != "to nearest":
        assert 1e-4 < float(state.std()) / expected < 0.1  # each entry is rounded on its own


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", SOME)
def test_training_is_that_with_float32_states_but_for_noise(kind, mode):
    wide, thin = parameters(torch.float32), parameters(torch.float32)
    one, other = make(kind, wide, sparse_rows=mode), make(kind, thin, sparse_rows=mode, **NARROW)
    train(one, wide, range(60))
    train(other, thin, range(60))
    one.wake()
    other.wake()
    assert all(moment.dtype == torch.bfloat16 for moment in moments(other))
    for first, second in zip(moments(one), moments(other), strict=True):
        assert (first - second.float()).norm() <= 0.05 * first.norm()
    start = parameters(torch.float32)
    for first, second, begin in zip(wide, thin, start, strict=True):
        assert (first - second).norm() <= 0.05 * (first - begin).norm()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", SOME)
def test_native_code_and_plain_torch_give_the_same_bits(kind, mode, level, monkeypatch):
    optimizers = [make(kind, parameters(torch.float32), sparse_rows=mode, **NARROW) for _ in range(2)]
    train(optimizers[0], parameters_of(optimizers[0]), range(25))
    for name in ("sgd_rows", "adam_rows", "adagrad_rows"):
        monkeypatch.setattr(ops, name, getattr(ops, name).literally)
    train(optimizers[1], parameters_of(optimizers[1]), range(25))
    assert_same(*optimizers)


@pytest.mark.parametrize("kind", ["adam", "momentum", "adagrad"])
def test_random_states_are_neither_read_nor_changed(kind):
    """So copies of a model in several processes stay the same, whatever their seeds are."""
    results = []
    for seed in (1, 2):
        params = parameters(torch.float32)
        optimizer = make(kind, params, **NARROW)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        train(optimizer, params, range(5))
        assert torch.equal(before, torch.get_rng_state())
        results.append(optimizer)
    assert_same(*results)


def test_parameters_and_steps_have_random_numbers_of_their_own():
    params = [nn.Parameter(torch.zeros(40, 40)) for _ in range(2)]
    optimizer = optim.SGD(params, lr=1e-3, momentum=0.9, **NARROW)
    seen = []
    for _ in range(2):
        for parameter in params:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros(40, 40)
            parameter.grad = torch.full_like(parameter, 1 + 2**-9)  # a quarter of the way to the next bfloat16
        optimizer.step()
        seen += [moment.float() for moment in moments(optimizer)]
    for i, one in enumerate(seen):
        assert 0.2 < float((one > 1).float().mean()) < 0.3
        assert not any(torch.equal(one, other) for other in seen[:i])


@pytest.mark.parametrize("kind", ["adam", "adam-l2", "momentum", "adagrad", "maximize"])
@pytest.mark.parametrize("rule", [None, meprop.Sampled(noise=0.5)])
def test_in_backward_gives_the_bits_of_the_separate_step(kind, rule, monkeypatch):
    monkeypatch.setattr(ops.optimizer, "_SMALLEST_WHOLE", 1)
    taken = []
    step = optim.Adam._step_of_product
    monkeypatch.setattr(
        optim.base.RowSparseOptimizer,
        "_step_of_product",
        lambda self, *args: taken.append(step(self, *args)) or taken[-1],
    )
    results = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        first = nn.Linear(24, 40) if rule is None else meprop.nn.Linear(24, 40, rule=rule)
        model = nn.Sequential(first, nn.ReLU(), nn.Linear(40, 5))
        optimizer = make(kind, model.parameters(), in_backward=in_backward, **NARROW)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(16, 24)).square().mean().backward()
            optimizer.step()
        results.append(optimizer)
    assert_same(*results)
    assert len(moments(results[1])) >= 4
    assert taken == ([] if rule is None else [kind != "maximize"] * 4)


@pytest.mark.parametrize("layout", ["a transposed gradient", "a transposed parameter", "a scalar", "nothing"])
@pytest.mark.parametrize("kind", ["adam", "momentum", "adagrad"])
def test_every_memory_layout_is_taken(kind, layout):
    parameter = nn.Parameter(
        {"a scalar": torch.tensor(1.0), "nothing": torch.zeros(0, 4)}.get(layout, torch.ones(6, 4))
    )
    if layout == "a transposed parameter":
        parameter.data = torch.ones(4, 6).t()
    twin = nn.Parameter(parameter.detach().clone(memory_format=torch.contiguous_format))
    optimizer, other = make(kind, [parameter], **NARROW), make(kind, [twin], **NARROW)
    for _ in range(3):
        grad = torch.randn(twin.shape)
        twin.grad = grad
        parameter.grad = grad.t().contiguous().t() if layout == "a transposed gradient" else grad.clone()
        optimizer.step()
        other.step()
    assert_same(optimizer, other)


def test_the_number_of_threads_changes_no_bit(threads):
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(300, 500))
        optimizer = optim.Adam([parameter], **NARROW)
        for _ in range(3):
            parameter.grad = torch.randn(300, 500)
            optimizer.step()
        results.append(optimizer)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", SOME)
def test_a_resumed_run_goes_on_bit_for_bit(kind, mode):
    whole = make(kind, parameters(torch.float32), sparse_rows=mode, **NARROW)
    train(whole, parameters_of(whole), range(40))
    params = parameters(torch.float32)
    optimizer = make(kind, params, sparse_rows=mode, **NARROW)
    train(optimizer, params, range(17))
    params, state = saved(params, optimizer.state_dict())
    optimizer = make(kind, params, sparse_rows=mode, **NARROW)
    optimizer.load_state_dict(state)
    train(optimizer, params, range(17, 40))
    assert_same(optimizer, whole)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: saved(one)[0]])
def test_copies_go_on_alike(copied):
    optimizer = make("adam", parameters(torch.float32), **NARROW)
    train(optimizer, parameters_of(optimizer), range(5))
    other = copied(optimizer)
    assert other.state_dtype == torch.bfloat16
    for one in (optimizer, other):
        train(one, parameters_of(one), range(5, 10))
    assert_same(optimizer, other)


@pytest.mark.parametrize("source", ["torch", "float32", "bfloat16"])
@pytest.mark.parametrize("target", ["torch", "float32", "bfloat16"])
@pytest.mark.parametrize("kind", SOME)
def test_state_dicts_load_both_ways(kind, source, target):
    """Into a narrow optimizer states become bfloat16, and into another one float32; their values stay."""

    def of(which, params):
        return (
            make_torch(kind, params)
            if which == "torch"
            else make(kind, params, **(NARROW if which == "bfloat16" else {}))
        )

    params = parameters(torch.float32)
    earlier = of(source, params)
    train(earlier, params, range(5), dense=True)
    later = of(target, [nn.Parameter(parameter.detach().clone()) for parameter in params])
    later.load_state_dict(copy.deepcopy(earlier.state_dict()))
    before, after = moments(earlier), moments(later)
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        assert other.dtype == (torch.bfloat16 if target == "bfloat16" else torch.float32)
        torch.testing.assert_close(other.float(), one.float(), rtol=2**-8 if target == "bfloat16" else 0, atol=0)
    assert target == "torch" or (narrow.ROUNDING in str(later.state_dict()["state"])) <= (target == "bfloat16")
    for optimizer in (earlier, later):
        train(optimizer, parameters_of(optimizer), range(5, 8), dense=True)
    for one, other in zip(parameters_of(earlier), parameters_of(later), strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)


def test_states_that_come_without_load_state_dict_become_narrow():
    """ZeroRedundancyOptimizer puts them there itself."""
    params = parameters(torch.float32)
    earlier = make_torch("adam", params)
    train(earlier, params, range(5), dense=True)
    later = make("adam", params, **NARROW)
    for parameter, state in earlier.state.items():
        later.state[parameter] = copy.deepcopy(state)
    train(later, params, range(5, 8))
    assert {moment.dtype for moment in moments(later)} == {torch.bfloat16}


def test_adagrads_first_sums_and_groups_that_are_added_later_are_narrow():
    params = parameters(torch.float32)
    optimizer = optim.Adagrad(params[:1], initial_accumulator_value=0.5, **NARROW)
    optimizer.add_param_group({"params": params[1:]})
    train(optimizer, params, range(3))
    assert {moment.dtype for moment in moments(optimizer)} == {torch.bfloat16}
    assert len(moments(optimizer)) == 3


def test_the_bytes_of_the_state_are_half():
    sizes = []
    for options in ({}, NARROW):
        parameter = nn.Parameter(torch.zeros(1000, 100))
        optimizer = optim.Adam([parameter], **options)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        sizes.append(sum(moment.untyped_storage().nbytes() for moment in moments(optimizer)))
    assert sizes == [800_000, 400_000]


def test_clipping_and_frozen_parameters_are_as_ever():
    params = parameters(torch.float32)
    optimizer = optim.Adam(params, **NARROW)
    params[0].grad = sparse(torch.full((2, WIDTH), 100.0), [4, 9], ROWS)
    params[1].grad = torch.full((ROWS,), 100.0)
    assert float(optim.clip_grad_norm_(params, 1.0)) > 100
    optimizer.step()
    assert all(float(moment.float().norm()) < 0.11 for moment in moments(optimizer))
    assert params[2] not in optimizer.state


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("name", ["foreach", "fused", "capturable", "differentiable", "amsgrad"])
def test_options_that_do_not_go_with_it_are_named(name):
    with pytest.raises(NotSupportedError, match=rf"Adam with state_dtype=torch.bfloat16 and {name}=True"):
        optim.Adam(parameters(torch.float32), **{name: True}, **NARROW)
    params = parameters(torch.float32)
    optimizer = optim.Adam(params, **NARROW)
    optimizer.param_groups[0][name] = True
    before = [parameter.detach().clone() for parameter in params]
    with pytest.raises(NotSupportedError, match=name):
        train(optimizer, params, range(1))
    assert all(torch.equal(*pair) for pair in zip(params, before, strict=True))


class Other(torch.Tensor):
    """A subclass."""


REFUSED = {
    "float64": torch.ones(3, 4, dtype=torch.float64),
    "bfloat16": torch.ones(3, 4, dtype=torch.bfloat16),
    "complex64": torch.ones(3, 4, dtype=torch.complex64),
    "type Other": torch.ones(3, 4).as_subclass(Other).requires_grad_(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_parameters_that_are_not_plain_float32_are_named(what):
    parameter = REFUSED[what] if what == "type Other" else nn.Parameter(REFUSED[what])
    with pytest.raises(NotSupportedError, match=what):
        optim.AdamW([parameter], **NARROW)
    optimizer = optim.AdamW(parameters(torch.float32), **NARROW)
    with pytest.raises(NotSupportedError, match=what):
        optimizer.add_param_group({"params": [parameter]})
    assert len(optimizer.param_groups) == 1
    if what in ("float64", "bfloat16"):  # after the optimizer has been made
        (parameter,) = parameters_of(optimizer)[:1]
        parameter.data = parameter.data.to(REFUSED[what].dtype)
        parameter.grad = torch.ones_like(parameter)
        with pytest.raises(NotSupportedError, match=what):
            optimizer.step()


@pytest.mark.parametrize(
    ("value", "error"),
    [(torch.float16, ValueError), (torch.float32, ValueError), ("bfloat16", TypeError), (16, TypeError)],
)
def test_other_dtypes_are_refused(value, error):
    with pytest.raises(error, match=r"state_dtype=.*torch\.bfloat16"):
        optim.SGD(parameters(torch.float32), momentum=0.9, state_dtype=value)


def test_a_group_has_no_dtype_of_its_own():
    optimizer = optim.SGD(parameters(torch.float32), momentum=0.9)
    with pytest.raises(ValueError, match="make one optimizer for each"):
        optimizer.add_param_group({"params": [], "state_dtype": torch.bfloat16})


def test_a_compiled_step_is_refused():
    params = parameters(torch.float32)
    optimizer = optim.Adam(params, **NARROW)
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(Exception, match=r"under torch\.compile"):
        torch.compile(lambda: optimizer.step(), backend="eager")()
