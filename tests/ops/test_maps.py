"""Convolutions with kept maps: against torch's own backward pass in float64, and what drawn maps promise."""

import pytest
import torch
from torch import Tensor

from meprop import ops
from meprop.ops import native
from meprop.ops.maps import Maps, maps_backward
from meprop.selection import Entries, RowSelection

needs_native = pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")

# N, I, O, size, kernel, stride, padding, dilation
SHAPES = {
    "2d": (5, 6, 7, (6, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    "1d": (4, 5, 6, (11,), (3,), (1,), (1,), (1,)),
    "1d, all moves": (3, 4, 5, (14,), (4,), (2,), (3,), (3,)),
    "all moves": (3, 4, 5, (9, 8), (3, 2), (2, 3), (2, 1), (2, 1)),
    "a dilation across": (3, 17, 5, (9, 12), (2, 3), (1, 1), (0, 2), (1, 3)),
    "a kernel larger than the image": (2, 3, 4, (3, 2), (7, 5), (1, 1), (4, 3), (1, 1)),
    "padding of one side": (2, 3, 4, (4, 6), (3, 3), (1, 1), (0, 2), (1, 1)),
    "one input channel": (9, 1, 8, (12, 12), (5, 5), (1, 1), (2, 2), (1, 1)),
    "one image": (1, 3, 8, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
    "one output channel": (6, 3, 1, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
    "one position": (3, 2, 4, (3, 4), (3, 4), (1, 1), (0, 0), (1, 1)),
    "wide": (3, 70, 40, (5, 9), (3, 3), (1, 1), (1, 1), (1, 1)),
    "a stride that leaves a rest": (3, 4, 5, (8, 9), (3, 3), (3, 3), (0, 0), (1, 1)),
    "no image": (0, 3, 4, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
}


def make(name: str, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> tuple[Tensor, ...]:
    """Gradient, input and weight. The norms of the maps have heavy tails, and half of the entries are zero."""
    examples, inputs, outputs, size, kernel, stride, padding, dilation = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    positions = [
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, k, step, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    shapes = [(examples, outputs, *positions), (examples, inputs, *size), (outputs, inputs, *kernel)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    scale = torch.randn(examples, outputs, generator=generator).mul(2).exp().view(examples, outputs, *[1] * len(size))
    tensors[0] = (tensors[0] * scale * (torch.rand(shapes[0], generator=generator) < 0.5)).to(dtype)
    if channels_last:
        tensors = [each.contiguous(memory_format=torch.channels_last) for each in tensors]
    return tuple(tensors)


def some_maps(grad: Tensor, exact_sum: bool) -> Maps:
    """About a third of the maps, some of them scaled. The first image has none."""
    kept = torch.rand(grad.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.34
    kept[:1] = len(grad) == 1
    starts = torch.zeros(len(grad) + 1, dtype=torch.int64)
    starts[1:] = kept.sum(dim=1).cumsum(0)
    channels = kept.nonzero()[:, 1].int()
    factors = 1 + torch.arange(len(channels)) % 3 * 0.75
    return Maps(starts, channels, factors, exact_sum)


def expected(maps: Maps, grad: Tensor, x: Tensor, weight: Tensor, moves: tuple) -> tuple[Tensor, Tensor]:
    """By torch, in float64, image by image and map by map."""
    grad = grad.double()
    x, weight = (each.detach().double().clone().requires_grad_() for each in (x, weight))
    sparse = torch.zeros_like(grad)
    for n in range(len(grad)):
        for e in range(int(maps.starts[n]), int(maps.starts[n + 1])):
            sparse[n, maps.channels[e]] = grad[n, maps.channels[e]] * maps.factors[e].double()
    if maps.exact_sum and len(grad) > 0:
        sparse = sparse + (grad - sparse).mean(dim=0)
    stride, padding, dilation = moves
    convolve = torch.nn.functional.conv2d if grad.dim() == 4 else torch.nn.functional.conv1d
    return torch.autograd.grad(convolve(x, weight, None, stride, padding, dilation), (x, weight), sparse)


def close(found: Tensor, exact: Tensor, eps: float) -> None:
    scale = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
    torch.testing.assert_close(found.double(), exact, rtol=8 * eps, atol=8 * eps * scale)


@pytest.mark.parametrize("exact_sum", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_those_of_the_masked_gradient(poisoned, name, dtype, exact_sum):
    levels = native.levels() if dtype in native.DTYPE_CODES else [native.level()]
    before, moves = native.level(), SHAPES[name][5:]
    for channels_last in (False, True) if len(moves[0]) == 2 else (False,):
        grad, x, weight = make(name, dtype, channels_last)
        maps = some_maps(grad, exact_sum)
        exact = expected(maps, grad, x, weight, moves)
        eps = max(torch.finfo(dtype).eps, 1e-13)
        for level in levels:
            native.use_level(level)
            try:
                found = maps_backward(maps, grad, x, weight, moves, (True, True))
            finally:
                native.use_level(before)
            for each, of, tensor in zip(found, exact, (x, weight), strict=True):
                assert each.dtype == dtype
                assert each.stride() == tensor.stride()
                close(each, of, eps)
        for each, of in zip(maps_backward.literally(maps, grad, x, weight, moves, (True, True)), exact, strict=True):
            close(each, of, eps)


@needs_native
@pytest.mark.parametrize("name", SHAPES)
def test_native_serves_every_geometry_in_its_dtypes(name):
    grad, x, weight = make(name)
    call = (some_maps(grad, True), grad, x, weight, SHAPES[name][5:], (True, True))
    assert maps_backward.explain(*call)[0] == "native"
    half = (call[0], *(each.half() for each in call[1:4]), *call[4:])
    assert "float16" in maps_backward.explain(*half)[1]["native"]


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_what_is_not_wanted_is_not_computed(needs):
    grad, x, weight = make("2d")
    maps, moves = some_maps(grad, True), SHAPES["2d"][5:]
    both = maps_backward(maps, grad, x, weight, moves, (True, True))
    for each, needed, of in zip(maps_backward(maps, grad, x, weight, moves, needs), needs, both, strict=True):
        assert (each is not None) == needed
        assert each is None or torch.equal(each, of)


@needs_native
@pytest.mark.parametrize("exact_sum", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype, exact_sum):
    generator, before, found = torch.Generator().manual_seed(0), torch.get_num_threads(), []
    shapes = [(40, 33, 14, 14), (40, 20, 14, 14), (33, 20, 3, 3)]
    grad, x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    call = (some_maps(grad, exact_sum), grad, x, weight, ((1, 1), (1, 1), (1, 1)), (True, True))
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append((ops.map_norms(grad), *maps_backward(*call)))
    finally:
        torch.set_num_threads(before)
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, found[0], strict=True))


@pytest.mark.parametrize("exact_sum", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_drawn_maps_have_the_gradient_as_their_mean(exact_sum):
    """A wrong scale of a map would be seen: most maps are below the threshold."""
    grad, x, weight = make("2d")
    norms, moves, draws = ops.map_norms(grad), SHAPES["2d"][5:], 4000
    total = [torch.zeros(each.shape, dtype=torch.float64) for each in (x, weight)]
    squares = [torch.zeros_like(each) for each in total]
    for key in range(draws):
        entries = Entries("noise", share=1.0, exact_sum=exact_sum, key=torch.tensor(key * 0x9E37_79B9 + 7))
        kept = ops.choose_entries(norms, entries)
        for i, each in enumerate(maps_backward(ops.kept_maps(kept, norms), grad, x, weight, moves, (True, True))):
            total[i] += each.double()
            squares[i] += each.double().square()
    every = Maps(torch.arange(6) * 7, torch.arange(7, dtype=torch.int32).repeat(5), torch.ones(35), False)
    for mean, square, exact in zip(total, squares, expected(every, grad, x, weight, moves), strict=True):
        mean, square = mean / draws, square / draws
        error = ((square - mean.square()) / draws).sqrt()
        often = error > 1e-6 * exact.abs().max()
        off = (mean - exact)[often] / error[often]
        assert off.numel() > 100
        assert off.abs().max() < 6
        assert 0.7 < off.square().mean().sqrt() < 1.3


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_the_added_variance_is_that_of_the_budget(noise):
    """The sum of the squares of norms is that of the entries, so that the budget of norms is the entries' too."""
    grad, *_ = make("wide")
    norms = ops.map_norms(grad)
    maps = ops.kept_maps(ops.choose_entries(norms, Entries("noise", share=noise, key=torch.tensor(3))), norms)
    before = norms[maps.images, maps.channels]
    threshold = (before * maps.factors)[maps.factors > 1].double()
    torch.testing.assert_close(threshold, threshold[:1].expand_as(threshold))  # each drawn map has this norm
    below = norms.double()[norms < threshold[0]]
    assert (below * threshold[0] - below.square()).sum() <= noise * grad.double().square().sum() * (1 + 1e-6)
    assert torch.equal(maps.factors[before >= threshold[0] * (1 + 1e-6)].unique(), torch.ones(1))


def test_an_exact_sum_is_exact():
    """The sum over the images of the gradients of equal images, and of the whole gradient of the weight."""
    grad, x, weight = make("2d")
    x = x[:1].expand_as(x)
    maps, moves = some_maps(grad, True), SHAPES["2d"][5:]
    every = Maps(torch.arange(6) * 7, torch.arange(7, dtype=torch.int32).repeat(5), torch.ones(35), False)
    found = maps_backward(maps, grad, x, weight, moves, (True, True))
    exact = expected(every, grad, x, weight, moves)
    close(found[0].sum(dim=0), exact[0].sum(dim=0), 1e-6)
    close(found[1], exact[1], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_norms(dtype):
    grad, *_ = make("wide", dtype)
    grad[1, 2, 3, 4], grad[0, 1] = float("nan"), 0
    norms = ops.map_norms(grad)
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norms.isnan().nonzero().tolist() == [[1, 2]]
    exact = grad.double().square().sum(dim=(2, 3)).sqrt()
    torch.testing.assert_close(norms.double(), exact, rtol=2e-7, atol=0, equal_nan=True)
    tiny = ops.map_norms(torch.full((1, 1, 4, 4), 1e-30))  # whose squares no float32 has
    torch.testing.assert_close(tiny, torch.full((1, 1), 4e-30))


def test_infinity_and_nan_stay_where_they_are():
    grad, x, weight = make("padding of one side")
    grad[0] = 0
    grad[0, 1, 0, 0], grad[1, 2, 1, 1] = float("inf"), float("nan")
    kept = RowSelection(grad.new_tensor([1.0, 1.0]), torch.tensor([1, 2]).int(), 4, starts=torch.tensor([0, 1, 2]))
    maps = ops.kept_maps(kept, torch.ones(2, 4))
    found = maps_backward(maps, grad, x, weight, SHAPES["padding of one side"][5:], (True, True))
    assert found[0][0].isfinite().logical_not().any(dim=0).nonzero().amax(dim=0).tolist() == [2, 0]
    assert found[1].isfinite().flatten(1).all(dim=1).tolist() == [True, False, False, True]


@needs_native
def test_maps_that_do_not_fit_are_refused():
    grad, x, weight = make("2d")
    maps, moves = some_maps(grad, False), SHAPES["2d"][5:]
    for wrong in (maps._replace(channels=maps.channels + 7), maps._replace(starts=maps.starts.flip(0))):
        with pytest.raises(IndexError):
            maps_backward(wrong, grad, x, weight, moves, (True, True))
    for wrong in (maps._replace(starts=maps.starts[1:]), maps._replace(factors=maps.factors[1:])):
        with pytest.raises(ValueError, match="do not go with"):
            maps_backward(wrong, grad, x, weight, moves, (True, True))
    with pytest.raises(ValueError, match="do not go with"):
        maps_backward(maps, grad, x[:, 1:], weight, moves, (True, True))
    with pytest.raises(ValueError, match="do not go with"):
        maps_backward(maps, grad, x[:, :, 2:].contiguous(), weight, moves, (True, True))
