"""Entries of a whole gradient: literally against native, and what they promise."""

import itertools
import random

import pytest
import torch
from tests.cases import GRADIENTS, LAYOUTS, NATIVE_DTYPES, SELECTIONS, gradient

from meprop import ops
from meprop.ops import native
from meprop.ops.entries import uniform
from meprop.ops.registry import backend
from meprop.selection import Entries

needs_native = pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")

KEY = torch.tensor(0x1234_5678_9ABC_DEF)


def described(k: int) -> dict[str, Entries]:
    return {
        "largest": Entries("largest", k),
        "energy": Entries("energy", share=0.9),
        "noise": Entries("noise", share=0.25, key=KEY),
        "much noise": Entries("noise", share=3.0, key=KEY),
        "noise and a floor": Entries("noise", k, share=3.0, key=KEY),
        "drawn": Entries("drawn", k, key=KEY),
    }


KINDS = list(described(1))


def assert_same(found, expected) -> None:
    assert found.starts.tolist() == expected.starts.tolist()
    assert found.indices.tolist() == expected.indices.tolist()
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=0, equal_nan=True)
    assert (found.shared is None) == (expected.shared is None)
    if found.shared is not None:
        torch.testing.assert_close(found.shared, expected.shared, rtol=1e-6, atol=1e-7, equal_nan=True)


CASES = list(itertools.product(SELECTIONS, GRADIENTS))
random.Random(0).shuffle(CASES)


@needs_native
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2, 3))])
@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_native_equals_the_reference(dtype, kind, level, part):
    """The quick part has other cases for each kind, dtype and level."""
    first = (part + KINDS.index(kind) + NATIVE_DTYPES.index(dtype) + native.levels().index(level)) % 4
    before = native.level()
    native.use_level(level)
    try:
        for (rows, width, k), content in CASES[first::4]:
            grad = gradient(content, rows, width, dtype)
            entries = described(k)[kind]._replace(exact_sum=content in ("normal", "ties"))
            assert_same(ops.choose_entries(grad, entries), ops.choose_entries.literally(grad, entries))
    finally:
        native.use_level(before)


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_native_reads_every_layout(kind, layout):
    grad = gradient("normal", 9, 257, torch.float32)
    grad = grad[:1].expand(9, 257) if layout == "rows on top of one another" else grad
    entries = described(20)[kind]._replace(exact_sum=True)
    assert_same(ops.choose_entries(LAYOUTS[layout](grad), entries), ops.choose_entries.literally(grad, entries))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_reads_every_layout(kind, layout):
    grad = gradient("normal", 9, 256, torch.float32)  # whole groups
    grad = grad[:1].expand(9, 256) if layout == "rows on top of one another" else grad
    found, expected = (
        ops.choose_entries.literally(each, described(20)[kind]) for each in (LAYOUTS[layout](grad), grad)
    )
    assert_same(found, expected)


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_no_bit(kind):
    grad = gradient("rows of all scales", 300, 257, torch.float32)
    entries, before, found = described(20)[kind]._replace(exact_sum=True), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(ops.choose_entries(grad, entries))
    finally:
        torch.set_num_threads(before)
    for each in found[1:]:
        assert_same(each, found[0])
        assert torch.equal(each.shared, found[0].shared)


# ---------------------------------------------------------------- chosen and multiplied with in one call


WANTED = {"everything": (True, True, True), "weight and bias": (False, True, True), "input": (True, False, False)}


def assert_one_call_is_two(grad, weight, x, needs_bias, entries) -> None:
    """The one native call must give the bits of the selection's own products, and how many entries it has."""
    gradients, kept = ops.entries_backward(entries, grad, weight, x, needs_bias)
    selection = ops.keep_entries(grad, entries)
    assert int(kept) == selection.values.numel()
    for found, expected in zip(gradients, ops.backward_with(selection, grad, weight, x, needs_bias), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@needs_native
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_one_call_gives_the_bits_of_two(level, poisoned, dtype, kind, wanted):
    needs_input, needs_weight, needs_bias = WANTED[wanted]
    for number, ((rows, width, k), content) in enumerate(itertools.product(SELECTIONS, GRADIENTS)):
        if number % 5 != KINDS.index(kind) % 5:
            continue
        grad = gradient(content, rows, width, dtype)
        weight = gradient("normal", width, 35, dtype, seed=1) if needs_input else None
        x = gradient("normal", rows, 35, dtype, seed=2) if needs_weight else None
        entries = described(k)[kind]._replace(exact_sum=number % 2 == 0)
        for ceiling in (1.0, 0.3):
            assert_one_call_is_two(grad, weight, x, needs_bias, entries._replace(ceiling=ceiling))


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_call_reads_every_layout(layout):
    grad = gradient("normal", 9, 257, torch.float32)
    grad = grad[:1].expand(9, 257) if layout == "rows on top of one another" else grad
    weight, x = gradient("normal", 257, 33, torch.float32), gradient("normal", 9, 33, torch.float32)
    for entries in described(20).values():
        assert_one_call_is_two(LAYOUTS[layout](grad), weight, x, True, entries._replace(exact_sum=True))


@needs_native
def test_one_call_is_the_same_for_any_number_of_threads(threads):
    grad = gradient("rows of all scales", 300, 257, torch.float32)
    weight, x = gradient("normal", 257, 133, torch.float32), gradient("normal", 300, 133, torch.float32)
    found = []
    for number in (1, 2, 3, 7):
        torch.set_num_threads(number)
        gradients, _ = ops.entries_backward(described(20)["noise"]._replace(exact_sum=True), grad, weight, x, True)
        found.append(gradients)
    assert all(torch.equal(*pair) for each in found[1:] for pair in zip(each, found[0], strict=True))


@needs_native
def test_one_call_with_more_entries_than_scratch_is_kept_for():
    grad = gradient("normal", 1100, 1000, torch.float32)
    weight, x = gradient("normal", 1000, 3, torch.float32), gradient("normal", 1100, 3, torch.float32)
    for entries in (Entries("largest", 990, exact_sum=True), Entries("noise", 990, 0.1, True, KEY)):
        assert_one_call_is_two(grad, weight, x, True, entries)


def test_one_call_is_the_reference_in_float64():
    grad, weight = gradient("normal", 33, 65, torch.float64), gradient("normal", 65, 7, torch.float64)
    x = gradient("normal", 33, 7, torch.float64, seed=3)
    for entries in described(5).values():
        kept = ops.keep_entries(grad, entries).to_dense()
        (of_input, of_weight, of_bias), _ = ops.entries_backward(entries, grad, weight, x, True)
        torch.testing.assert_close(of_input, kept @ weight)
        torch.testing.assert_close(of_weight, kept.t() @ x)
        torch.testing.assert_close(of_bias, grad.sum(dim=0))


@needs_native
@pytest.mark.parametrize("wrong", ["weight", "input"])
def test_one_call_refuses_shapes_that_do_not_go_together(wrong):
    shapes = {"grad": (4, 17), "weight": (17, 3), "input": (4, 3)} | {wrong: (5, 3)}
    grad, weight, x = (torch.randn(shape) for shape in shapes.values())
    for run in (ops.entries_backward, ops.entries_backward.literally):
        with pytest.raises(ValueError, match="does not go with"):
            run(described(2)["noise"], grad, weight, x, True)


def _one_row(grad):
    grad[:-1] *= 1e-6


def _one_entry(grad):
    grad[333, 17] = 1e12


def _one_that_is_not_zero(grad):
    grad.zero_()[333, 17] = 1e-3


def _too_large_to_square(grad):
    grad *= 1e-37
    grad[333, 17] = 1e37


def _nothing_finite(grad):
    grad.zero_()[333, 17:19] = torch.tensor([torch.inf, torch.nan])


# Thresholds are searched for in a sample first. What it does not see must be found in the whole.
MISLEADING = {
    "nothing": lambda _: None,
    "one row": _one_row,
    "one entry": _one_entry,
    "one that is not zero": _one_that_is_not_zero,
    "too large to square": _too_large_to_square,
    "nothing finite": _nothing_finite,
    "zeros": torch.Tensor.zero_,
}


@needs_native
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("case", MISLEADING)
def test_a_sample_that_misleads_changes_nothing(case, dtype):
    grad = gradient("normal", 401, 300, torch.float32)  # more groups than a sample has
    MISLEADING[case](grad)
    grad = grad.to(dtype)
    for entries in described(12).values():
        found = ops.choose_entries(grad, entries)
        assert_same(found, ops.choose_entries.literally(grad, entries))
        if entries.keep == "noise" and entries.k == 0:
            assert added_noise(grad, found) <= entries.share


def added_noise(grad, kept) -> float:
    """The variance that draws add, over the sum of squares, for the threshold that the entries show."""
    magnitudes, drawn = grad.abs().double(), kept.values.double().abs()
    changed = drawn.isfinite() & (drawn != magnitudes[kept.row_numbers(), kept.indices.long()])
    if not changed.any():
        return 0.0
    threshold, finite = drawn[changed].max(), magnitudes[magnitudes.isfinite()]
    below = finite[finite < threshold]
    return ((below * threshold - below * below).sum() / finite.square().sum()).item()


@pytest.mark.parametrize("name", ["native", "reference"])
def test_largest_are_those_of_a_stable_sort(name):
    run = backend(name)
    if run.missing is not None:
        pytest.skip(run.missing)
    grad = gradient("ties", 40, 63, torch.float32)
    values, indices, starts, _ = run.choose_entries(grad, Entries("largest", 5))
    order = sorted(range(grad.numel()), key=lambda place: (-abs(grad.flatten()[place].item()), place))[: 5 * 40]
    rows = torch.arange(40).repeat_interleave(starts.diff())
    assert (rows * 63 + indices).tolist() == sorted(order)
    assert torch.equal(values, grad[rows, indices.long()])


@pytest.mark.parametrize("content", ["normal", "rows of all scales", "mostly zero", "constant"])
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("noise", [0.05, 0.25, 1.0, 8.0])
def test_the_variance_is_within_the_budget_and_uses_it(noise, dtype, content):
    grad = gradient(content, 64, 257, dtype)
    kept = ops.choose_entries(grad, Entries("noise", share=noise, key=KEY))
    magnitudes = grad.abs().double()
    drawn = kept.values.double().abs()
    # The threshold is what is written for entries below it, and no entry that is kept as it is lies below.
    changed = drawn != magnitudes[kept.row_numbers(), kept.indices.long()]
    threshold = drawn[changed].max() if changed.any() else drawn.min()
    below = magnitudes < threshold
    variance = (magnitudes * threshold - magnitudes.square())[below].sum() / magnitudes.square().sum()
    assert variance <= noise * (1 + 1e-6)
    largest = magnitudes.max()
    if content != "constant" and threshold < largest:
        assert variance >= 0.93 * noise


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_energy_is_held_by_hardly_more_entries_than_necessary(share):
    grad = gradient("rows of all scales", 64, 257, torch.float32)
    kept = ops.choose_entries(grad, Entries("energy", share=share))
    squares = grad.double().square()
    assert kept.values.double().square().sum() >= share * squares.sum()
    held = squares.flatten().sort(descending=True).values.cumsum(0)
    enough = int((held < (share + 0.02 * (1 - share)) * squares.sum()).sum()) + 1
    assert len(kept.indices) <= 1.02 * enough + 1


@pytest.mark.parametrize("kind", ["noise", "much noise", "drawn"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_draws_have_the_gradient_as_their_mean(dtype, kind):
    """Copies of the rows below one another have the threshold of one copy, and each row is drawn by itself.

    With "drawn" the rows share out a number of entries, so that copies are no draws of their own.
    """
    grad = gradient("rows of all scales", 12, 40, dtype)
    copies, keys = (1, 10_000) if kind == "drawn" else (2500, 4)
    total = torch.zeros(grad.shape, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for key in range(keys):
        entries = described(4)[kind]._replace(key=torch.tensor(key * 0x9E37_79B9 + 7))
        drawn = ops.choose_entries(grad.repeat(copies, 1), entries).to_dense().double().view(copies, *grad.shape)
        total += drawn.sum(dim=0)
        squares += drawn.square().sum(dim=0)
    mean = total / (copies * keys)
    variance = squares / (copies * keys) - mean.square()
    often = variance.sqrt() > 1e-6 * mean.abs()
    often &= mean.abs() > 1e-3 * (squares / total.abs().clamp(min=1e-300))  # drawn in more than 10 of 10,000 draws
    off = (mean - grad.double())[often] / (variance[often] / (copies * keys)).sqrt()
    assert often.sum() > 20
    assert off.abs().max() < 5
    assert 0.8 < off.std() < 1.2
    certain = (variance.sqrt() <= 1e-6 * mean.abs()) & (mean != 0)
    torch.testing.assert_close(mean[certain], grad.double()[certain])


def test_drawn_are_exactly_so_many_or_all_that_are_not_zero():
    for seed, (rows, width, k) in enumerate(SELECTIONS):
        for content in ("normal", "ties", "mostly zero", "rows of all scales", "zeros"):
            grad = gradient(content, rows, width, torch.float32, seed)
            kept = ops.choose_entries(grad, Entries("drawn", k, key=torch.tensor(seed)))
            assert len(kept.indices) == min(k * rows, int(grad.count_nonzero()))


@pytest.mark.parametrize("choose", [ops.choose_entries, ops.choose_entries.literally])
@pytest.mark.parametrize("entries", [Entries("drawn", 12, key=KEY), Entries("noise", 12, share=0.25, key=KEY)])
def test_probabilities_that_vanish_beside_one_row_do_not_keep_everything(entries, choose):
    grad = gradient("normal", 100, 300, torch.float32)
    grad[:-1] *= 1e-20
    grad[-1] = 1
    assert 1190 <= len(choose(grad, entries).indices) < 1260


@pytest.mark.parametrize("choose", [ops.choose_entries, ops.choose_entries.literally])
@pytest.mark.parametrize("others", [1, 300])
def test_probabilities_that_vanish_at_twice_the_threshold_end_the_search(others, choose):
    grad = torch.full((1, 1 + others), 2.0**-24.6)
    grad[0, 0] = 1
    assert choose(grad, Entries("drawn", 1, key=KEY)).indices.tolist() == [0]


def test_random_numbers_are_philox():
    # The vectors of the authors' test (Random123, kat_vectors: philox4x32 10), whose upper 24 bits are used.
    assert uniform(0, 4).tolist() == [word >> 8 for word in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)]


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_the_scale_of_a_gradient_does_not_matter(scale):
    grad = gradient("normal", 30, 40, torch.float32)
    entries = Entries("noise", share=1.0, key=KEY)
    places = [ops.choose_entries(each, entries).indices.tolist() for each in (grad, grad * 2.0**-60)]
    assert places[0] == places[1]
    kept = ops.choose_entries(grad * scale, entries)
    if scale < 1e-35:
        assert len(kept.indices) == grad.numel()  # no threshold: everything is kept as it is
    else:
        assert 0.2 < kept.density < 0.5
