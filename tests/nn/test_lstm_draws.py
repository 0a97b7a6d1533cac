"""LSTMs with entries of all rows, mostly drawn: the native walk back against the literal one, and what both promise."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from tests.cases import SEQUENCES as SIZES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import meprop
from meprop import functional, ops
from meprop.functional.lstm import chosen_of_gates, lstm_with_policy
from meprop.ops import native
from meprop.policy import Policy
from meprop.record import Activity
from meprop.selection import Entries, Selection

INPUTS = 6
KEY = torch.tensor(0x1234_5678_9ABC_DEF)
CHOICES = {
    "noise": Entries("noise", share=0.25, key=KEY, ceiling=0.3),
    "exact sum": Entries("noise", share=0.25, exact_sum=True, key=KEY, ceiling=0.3),
    "much noise": Entries("noise", share=8.0, key=KEY, ceiling=0.3),
    "much noise, exact sum": Entries("noise", share=8.0, exact_sum=True, key=KEY, ceiling=0.3),
    "some steps are dense": Entries("noise", share=2.0, exact_sum=True, key=KEY, ceiling=0.12),
    "drawn": Entries("drawn", 3, key=torch.tensor(2**63 - 2)),  # the keys of later time steps wrap around
    "drawn, exact sum": Entries("drawn", 3, exact_sum=True, key=KEY),
    "most are drawn": Entries("drawn", 70, key=KEY),  # of the 76 of 19 units: a whole matrix
    "most are drawn, exact sum": Entries("drawn", 70, exact_sum=True, key=KEY),
    "largest": Entries("largest", 3),
    "largest, exact sum": Entries("largest", 1, exact_sum=True),
    "energy": Entries("energy", share=0.9),
    "energy, exact sum": Entries("energy", share=0.9, exact_sum=True, ceiling=0.4),
}


def refuses(_: Tensor) -> Selection:
    raise AssertionError("entries that are described are not asked for")


def arguments(
    sizes: list[int], inputs: int, units: int, reverse: bool, choice: Entries
) -> tuple[Callable[..., list[Tensor]], Tensor]:
    """A call of the backward pass by an implementation, and the gradient of the output, which may be changed before."""
    torch.manual_seed(0)
    rows, batch, batch_sizes = sum(sizes), sizes[0], torch.tensor(sizes)
    x = torch.randn(rows, inputs)
    weights = torch.randn(4 * units, inputs) / 4, torch.randn(4 * units, units) / units**0.5
    *trace, _, _ = ops.lstm_forward(x, *weights, None, (torch.randn(batch, units), None), batch_sizes, reverse)
    grad = torch.randn(rows, units) * torch.randn(rows, 1).exp() ** 2
    last = torch.randn(batch, units)

    def run(call: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        hits, kept = torch.zeros(units, dtype=torch.int64), torch.zeros(len(sizes), dtype=torch.int64)
        gradients = (grad, last, None)
        found = call(
            tuple(trace), x, *weights, batch_sizes, reverse, gradients, choice, refuses, (True,) * 6, hits, kept
        )
        return [*found, hits, kept]

    return run, grad


# The last has whole panels of columns, and is no multiple of any vector.
@pytest.mark.parametrize(("inputs", "units"), [(1, 1), (INPUTS, 19), (70, 131)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_native_walk_draws_and_computes_what_the_literal_one_does(level, poisoned, sizes, reverse, inputs, units):
    for choice in CHOICES.values():
        run, _ = arguments(sizes, inputs, units, reverse, choice)
        *found, hits, kept = run(ops.lstm_backward)
        *expected, expected_hits, expected_kept = run(ops.lstm_backward.literally)
        assert kept.tolist() == expected_kept.tolist()
        assert hits.tolist() == expected_hits.tolist()
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize(
    "choice",
    [pytest.param(each, id=name, marks=[pytest.mark.slow] * (name != "exact sum")) for name, each in CHOICES.items()],
)
def test_the_number_of_threads_changes_no_bit(level, threads, choice):
    for (sizes, units), reverse in itertools.product([([130, 33, 7, 1], 131), ([3] * 5, 500)], [False, True]):
        run, _ = arguments(sizes, INPUTS, units, reverse, choice)
        found = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(run(ops.lstm_backward))
        for each in found[1:]:
            assert all(torch.equal(one, other) for one, other in zip(each, found[0], strict=True))


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_zeros_stay_zeros_and_nan_is_not_hidden(level, choice):
    for call in (ops.lstm_backward, ops.lstm_backward.literally):
        run, grad = arguments([4, 4, 2], INPUTS, 19, False, choice)
        grad[:] = 0
        grad[3, 5] = float("nan")  # of the first time step, the last one of the walk back
        of_x, *_, kept = run(call)
        assert of_x[3].isnan().all()
        assert not of_x[4:].isnan().any()
        if not choice.exact_sum:
            assert not of_x[:3].isnan().any()
        assert kept[0] >= 1
        run, grad = arguments([4, 4, 2], INPUTS, 19, False, choice)
        grad[:] = 0
        for one in functional_of_zeros(choice, call):
            assert not one.any()


def functional_of_zeros(choice: Entries, call: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """All gradients of an LSTM whose outputs have gradients of zero."""
    x, weights, sizes = torch.randn(10, INPUTS), (torch.randn(76, INPUTS), torch.randn(76, 19)), torch.tensor([4, 4, 2])
    *trace, _, _ = ops.lstm_forward(x, *weights, None, (None, None), sizes, False)
    gradients = torch.zeros(10, 19), None, torch.zeros(4, 19)
    return call(tuple(trace), x, *weights, sizes, False, gradients, choice, refuses, (True,) * 6)


def test_a_step_above_the_ceiling_is_dense():
    torch.manual_seed(0)
    plain = torch.nn.LSTM(INPUTS, 40)
    layer = meprop.nn.LSTM(INPUTS, 40, rule=meprop.Sampled(noise=1e-4, ceiling=0.05))
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(5, 3, INPUTS)
    for each in (plain, layer):
        each(x)[0].square().sum().backward()
    for one, other in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    record = layer.policy.record
    assert record.passes == record.dense_passes == 5
    assert record.density == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_with_the_exact_sum_one_row_alone_is_dense(dtype):
    """What is missing of one row is its mean, so that nothing can be left out."""
    torch.manual_seed(0)
    plain = torch.nn.LSTM(INPUTS, 40, dtype=dtype)
    x = torch.randn(5, 1, INPUTS, dtype=dtype)
    plain(x)[0].square().sum().backward()
    drawn = meprop.Sampled(noise=2.0, exact_sum=True), meprop.Sampled(2, exact_sum=True)
    for rule in (*drawn, meprop.TopK(2, scope="global", exact_sum=True)):
        layer = meprop.nn.LSTM(INPUTS, 40, dtype=dtype, rule=rule)
        layer.load_state_dict(plain.state_dict())
        layer(x)[0].square().sum().backward()
        for one, other in zip(layer.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
        assert layer.policy.record.density == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_density_of_every_step_is_noted(dtype):
    layer = meprop.nn.LSTM(INPUTS, 40, dtype=dtype, rule=meprop.Sampled(4))
    layer(torch.randn(5, 3, INPUTS, dtype=dtype))[0].sum().backward()
    record = layer.policy.record
    assert (record.passes, record.dense_passes) == (5, 0)
    assert (record.kept, record.seen) == (5 * 3 * 16, 5 * 3 * 160)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_seed_repeats_all_draws_and_a_checkpoint_changes_none(dtype):
    layer = meprop.nn.LSTM(INPUTS, 40, rule=meprop.Sampled(noise=0.5)).to(dtype)
    x = torch.randn(5, 3, INPUTS, dtype=dtype, requires_grad=True)

    def gradients(seed: int, recompute: bool) -> tuple[Tensor, ...]:
        output = checkpoint(lambda each: layer(each)[0], x, use_reentrant=False) if recompute else layer(x)[0]
        torch.manual_seed(seed)
        return torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])

    once = gradients(0, False)
    for again in (gradients(0, False), gradients(0, True)):
        assert all(torch.equal(one, other) for one, other in zip(again, once, strict=True))
    assert not torch.equal(gradients(1, False)[0], once[0])


def test_narrow_dtypes_go_the_native_way_in_float32_and_float64_the_literal_one():
    rule = meprop.Sampled(noise=0.25)
    for dtype, expected in ((torch.float32, "native"), (torch.float64, "reference")):
        if native.reason_missing() is not None:
            expected = "reference"
        rows, units, sizes = 6, 8, torch.tensor([3, 3])
        trace = (
            torch.zeros(9, units, dtype=dtype),
            torch.zeros(9, units, dtype=dtype),
            torch.zeros(6, 32, dtype=dtype),
        )
        weights = torch.zeros(32, INPUTS, dtype=dtype), torch.zeros(32, units, dtype=dtype)
        choice = chosen_of_gates(rule, units, torch.device("cpu"))
        x = torch.zeros(rows, INPUTS, dtype=dtype)
        name, _ = ops.lstm_backward.explain(
            trace, x, *weights, sizes, False, (None, None, None), choice, refuses, (True,) * 6
        )
        assert name == expected


def test_what_counts_units_counts_the_draws_of_any_gate():
    torch.manual_seed(0)
    units, rows = 30, 8
    x, batch_sizes = torch.eye(rows), torch.tensor([3, 3, 2])
    weights = [(torch.randn(4 * units, n) / 4).requires_grad_() for n in (rows, units)]
    activity = Activity.of_units(units)
    policy = Policy(meprop.Sampled(2, exact_sum=False))
    output, _ = lstm_with_policy(x, None, (*weights, None, None), batch_sizes, False, policy, activity)
    kept, _ = torch.autograd.grad(output, weights, torch.randn(rows, units))
    assert torch.equal(activity.hits, (kept.view(4, units, rows) != 0).any(dim=0).sum(dim=1))
    assert activity.examples == rows


def test_what_is_not_wanted_changes_nothing_else():
    for choice in CHOICES.values():
        run, _ = arguments([5, 5, 2], INPUTS, 40, False, choice)
        whole = run(ops.lstm_backward)[:6]
        for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
            needs = (*wanted, True, True, True)
            part = run(lambda *each, needs=needs: ops.lstm_backward(*each[:9], needs, *each[10:]))[:6]
            for one, other, needed in zip(part, whole, needs, strict=True):
                assert (one is not None) == needed
                if one is not None:
                    assert torch.equal(one, other)


# ---------------------------------------------------------------- the mean of the draws


def _off(found: list[Tensor], expected: Tensor) -> Tensor:
    """How many standard errors the mean of the draws is away from what is expected, where draws differ."""
    drawn = torch.stack(found).double()
    error = drawn.std(dim=0) / len(found) ** 0.5
    return ((drawn.mean(dim=0) - expected.double()) / error)[error > 1e-3 * expected.abs().mean()]


@pytest.mark.parametrize("exact_sum", [False, True])
@pytest.mark.parametrize("keep", ["noise", "drawn"])
def test_the_mean_of_the_whole_walk_is_the_dense_gradient(keep, exact_sum):
    """Each time step draws by itself, and the walk is linear in each step's gradient: no step adds a bias.

    Copies of a sequence in one batch are draws of the same threshold, up to the noise that they carry.
    """
    copies, draws, units = 40, 150, 24
    torch.manual_seed(0)
    plain = torch.nn.LSTM(INPUTS, units, bias=False)
    x = torch.randn(4, 3, INPUTS).repeat(1, copies, 1)
    grad = torch.randn(4, 3, units).repeat(1, copies, 1)
    rule = (
        meprop.Sampled(noise=2.0, exact_sum=exact_sum, ceiling=1)
        if keep == "noise"
        else meprop.Sampled(0.1, exact_sum=exact_sum)
    )
    layer = meprop.nn.LSTM(INPUTS, units, bias=False, rule=rule)
    layer.load_state_dict(plain.state_dict())

    def gradients(each: torch.nn.LSTM) -> list[Tensor]:
        given = x.clone().requires_grad_()
        of_x, *of_weights = torch.autograd.grad(each(given)[0], [given, *each.parameters()], grad)
        return [of_x.view(4, copies, 3, INPUTS).mean(dim=1), *of_weights]

    expected = gradients(plain)
    found = [gradients(layer) for _ in range(draws)]
    for number, exact in enumerate(expected):
        off = _off([each[number] for each in found], exact)
        if exact_sum and len(off) == 0:
            continue
        assert off.abs().max() < 5.5
        assert 0.7 < off.std() < 1.3
    assert layer.policy.record.density < 0.5
    if not exact_sum:  # a wrong scale would show
        wrong = _off([1.1 * each[2] for each in found], expected[2])
        assert wrong.abs().max() > 6


def test_a_copy_draws_as_its_original_from_the_same_seed():
    layer = meprop.nn.LSTM(INPUTS, 20, num_layers=2, bidirectional=True, rule=meprop.Sampled(noise=0.5))
    twin = copy.deepcopy(layer)
    x = torch.randn(5, 3, INPUTS)
    for each in (layer, twin):
        torch.manual_seed(3)
        each(x)[0].square().sum().backward()
    for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_functional_draws_from_packed_rows():
    torch.manual_seed(0)
    sizes = torch.tensor([4, 2, 1])
    weights = [torch.randn(80, n, requires_grad=True) for n in (INPUTS, 20)]
    x = torch.randn(7, INPUTS, requires_grad=True)
    for reverse in (False, True):
        output, _ = functional.lstm(
            x, None, *weights, rule=meprop.Sampled(noise=0.5), batch_sizes=sizes, reverse=reverse
        )
        for grad in torch.autograd.grad(output.sum(), [x, *weights]):
            assert grad.isfinite().all()
            assert grad.any()


def test_the_exact_sum_is_left_out_unless_it_is_asked_for():
    torch.manual_seed(0)
    x, found = torch.randn(4, 6, 5), {}
    for exact_sum in (None, False, True):
        torch.manual_seed(1)
        lstm = meprop.nn.LSTM(5, 20, rule=meprop.Sampled(3, exact_sum=exact_sum))
        lstm(x)[0].square().sum().backward()
        found[exact_sum] = lstm.weight_hh_l0.grad
    assert torch.equal(found[None], found[False])
    assert not torch.equal(found[None], found[True])
    rule = meprop.Sampled(3)
    assert (rule.exact_sum, rule.in_steps().exact_sum) == (None, False)
    assert rule.select(torch.randn(9, 30)).shared is not None
    assert repr(rule) == "Sampled(k=3)"
    assert repr(meprop.Sampled(3, exact_sum=True)) == "Sampled(k=3, exact_sum=True)"
