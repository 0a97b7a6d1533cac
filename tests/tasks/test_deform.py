"""Deformed images are those of a literal reference, and follow from the generator alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from meprop.tasks.deform import STRENGTHS, Deformation, deform

PAPER = STRENGTHS["paper"]
FAINT = replace(PAPER, sigma=0.5)  # a small margin: fewer pixels for the loops


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images_of(count, height, width, dtype=torch.float64):
    return torch.rand(count, height, width, generator=generator(1), dtype=dtype) * 2 - 1


def smoothed(noise, strength, row, column):
    """The noise around a pixel, weighted by the Gaussian: the pixel is `margin` from the noise's corner."""
    reach = range(-strength.margin, strength.margin + 1)
    total = weights = 0.0
    for i in reach:
        for j in reach:
            weight = math.exp(-(i * i + j * j) / (2 * strength.sigma**2))
            weights += weight
            total += weight * noise[row + strength.margin + i][column + strength.margin + j]
    return total / weights


def pixel(image, x, y, background):
    """Linear between the four pixels around column x and row y."""
    height, width = len(image), len(image[0])
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            inside = 0 <= row < height and 0 <= column < width
            value = image[row][column] if inside else background
            total += value * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def literal(image, strength, draws, index, background):
    """One image, pixel by pixel, by Ciresan et al."""
    height, width = len(image), len(image[0])
    angle, across, down = draws.angle[index].item(), *draws.scale[index].tolist()
    result = []
    for row in range(height):
        for column in range(width):
            x, y = column - (width - 1) / 2, row - (height - 1) / 2
            if draws.sheared[index]:
                turned_x, turned_y = x - math.tan(angle) * y, y
            else:
                turned_x = math.cos(angle) * x - math.sin(angle) * y
                turned_y = math.sin(angle) * x + math.cos(angle) * y
            source_x, source_y = across * turned_x, down * turned_y
            if strength.alpha:
                noise_x, noise_y = draws.noise[index].tolist()
                source_x += strength.alpha * smoothed(noise_x, strength, row, column)
                source_y += strength.alpha * smoothed(noise_y, strength, row, column)
            result.append(pixel(image, source_x + (width - 1) / 2, source_y + (height - 1) / 2, background))
    return torch.tensor(result, dtype=torch.float64).view(height, width)


@pytest.mark.parametrize(
    ("shape", "strength"),
    [
        ((1, 1, 1), FAINT),
        ((3, 1, 7), FAINT),
        ((4, 9, 5), FAINT),
        ((4, 5, 9), replace(FAINT, alpha=0.0)),
        ((4, 6, 6), replace(FAINT, angle=0.0, scale=0.0)),
        ((2, 6, 7), PAPER),
        ((2, 7, 7), STRENGTHS["weak"]),
    ],
)
@pytest.mark.parametrize("background", [-1.0, 0.0])
def test_images_are_those_of_a_literal_reference(shape, strength, background):
    images, labels = images_of(*shape), torch.arange(shape[0])
    draws = strength.draw(labels, *shape[1:], generator())
    assert shape[0] < 3 or 0 < draws.sheared.sum() < shape[0]  # both kinds
    expected = [literal(image.tolist(), strength, draws, i, background) for i, image in enumerate(images)]
    found = deform(images, labels, strength, generator(), background=background)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-6)
    narrow = deform(images.float(), labels, strength, generator(), background=background)
    torch.testing.assert_close(narrow.double(), found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_images_are_deformed_in_float32(dtype):
    """torch's grid_sample gives NaN for such images in their own dtype."""
    images, labels = images_of(2, 300, 280, dtype), torch.arange(2)
    expected = deform(images.float(), labels, PAPER, generator())
    found = deform(images, labels, PAPER, generator())
    assert torch.equal(found, expected.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(deform(images.float(), labels, PAPER, generator()), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_classes_are_numbers_of_any_dtype(dtype):
    images, strength = images_of(4, 5, 5), replace(FAINT, narrow_classes=(1, 300))
    expected = deform(images, torch.tensor([0, 1, 1, 0]), strength, generator())
    assert torch.equal(deform(images, torch.tensor([0, 1, 1, 0], dtype=dtype), strength, generator()), expected)


def test_nothing_to_deform_by_leaves_the_images_alone():
    images = images_of(5, 8, 6)
    still = Deformation(sigma=1.0, alpha=0.0, angle=0.0, scale=0.0)
    torch.testing.assert_close(deform(images, torch.zeros(5), still, generator()), images, rtol=0, atol=1e-12)
    assert deform(images[:0], torch.zeros(0), PAPER, generator()).shape == (0, 8, 6)


@pytest.mark.parametrize("strength", STRENGTHS.values(), ids=STRENGTHS)
def test_what_is_drawn_fills_its_range(strength):
    labels = torch.arange(10).repeat(400)
    draws = strength.draw(labels, 3, 3, generator())
    for digit in range(10):
        angles = draws.angle[labels == digit].rad2deg()
        limit = strength.angle / 2 if digit in (1, 7) else strength.angle
        assert 0.97 * limit < angles.max() <= limit
        assert -limit <= angles.min() < -0.97 * limit
    for scale in draws.scale.T:
        assert (scale - 1).abs().max() == pytest.approx(strength.scale, rel=0.01)
        assert scale.mean() == pytest.approx(1, abs=0.01)
    assert draws.sheared.float().mean() == pytest.approx(0.5, abs=0.05)


def test_the_noise_is_uniform():
    noise = PAPER.draw(torch.zeros(20), 5, 5, generator()).noise
    levels = noise.unique()
    assert len(levels) == 256
    assert (levels[1:] - levels[:-1]).unique().tolist() == [2 / 256]
    assert noise.abs().max() == 255 / 256
    assert noise.mean() == pytest.approx(0, abs=0.005)
    assert noise.square().mean() == pytest.approx(1 / 3, abs=0.005)
    related = torch.corrcoef(noise[:16].flatten().view(-1, 8).T)  # eight values are of one number drawn
    torch.testing.assert_close(related, torch.eye(8), rtol=0, atol=0.06)


def test_each_image_is_deformed_in_its_own_way():
    image = images_of(1, 29, 29)
    found = deform(image.expand(6, -1, -1), torch.full((6,), 3), PAPER, generator())
    assert len(found.unique(dim=0)) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_of_the_generator_gives_the_same_bits(dtype):
    images, labels = images_of(100, 29, 29, dtype), torch.arange(100) % 10
    state, threads = generator(), torch.get_num_threads()
    before = state.get_state()
    first = deform(images, labels, PAPER, state)
    assert not torch.equal(deform(images, labels, PAPER, state), first)
    state.set_state(before)
    try:
        torch.set_num_threads(3)
        assert torch.equal(deform(images, labels, PAPER, state), first)
    finally:
        torch.set_num_threads(threads)


def test_classes_that_a_narrow_dtype_does_not_have_are_no_others():
    of_none = Deformation(sigma=2.0, alpha=0.0, angle=20.0, scale=0.0, narrow_classes=())
    of_others = Deformation(sigma=2.0, alpha=0.0, angle=20.0, scale=0.0, narrow_classes=(300, -1))  # 44, 255 in 8 bits
    images, labels = torch.rand(2, 9, 9, generator=generator()), torch.tensor([44, 255], dtype=torch.uint8)
    assert torch.equal(*(deform(images, labels, each, generator()) for each in (of_none, of_others)))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 784), torch.zeros(2), r"images are torch.float32 of shape \[2, 784\].*must be floats"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2), r"images are torch.uint8.*must be floats"),
        (torch.zeros(2, 0, 4), torch.zeros(2), r"of shape \[2, 0, 4\].*with H and W of at least 1"),
        (
            torch.zeros(2, 4, 4, device="meta"),
            torch.zeros(2),
            r"images are on meta, labels on cpu, and the generator is on cpu: all must be on one device",
        ),
        (torch.zeros(2, 4, 4), torch.zeros(3), r"labels have the shape \[3\]: they must be \[2\]"),
    ],
)
def test_other_images_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        deform(images, labels, PAPER, generator())


@pytest.mark.parametrize(
    ("name", "value"), [("sigma", 0.0), ("sigma", math.inf), ("alpha", -1.0), ("angle", 90.0), ("scale", math.nan)]
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}: it must be"):
        replace(PAPER, **{name: value})
