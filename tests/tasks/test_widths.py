"""Digits get one width, as a literal loop over pixels has it."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("pooch")

from interrupted import write_mnist
from meprop.tasks.digits import DigitsConfig, DigitsTask, load
from meprop.tasks.widths import normalize_widths


def literal(image_HW, digit_width):
    """One image, pixel by pixel."""
    height, width = image_HW.shape
    inked = [column for column in range(width) if any(image_HW[row, column] > 0 for row in range(height))]
    first, last = (inked[0], inked[-1]) if inked else (0, width - 1)
    found = torch.zeros_like(image_HW)
    for column in range(width):
        source = (first + last) / 2 + (column - (width - 1) / 2) * (last - first + 1) / digit_width
        for row in range(height):
            for neighbour in (math.floor(source), math.floor(source) + 1):
                if 0 <= neighbour < width:
                    found[row, column] += (1 - abs(source - neighbour)) * image_HW[row, neighbour]
    return found


def boxed(count, height, width, seed=0):
    """Noise in boxes of many widths, of one pixel and of the whole image too, and an image without ink."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, height, width, generator=generator, dtype=torch.float64)
    first, last = torch.randint(width, (2, count), generator=generator).sort(0).values
    first[0], last[0], first[1], last[1] = 0, width - 1, width - 1, width - 1
    columns = torch.arange(width)
    images *= ((columns >= first[:, None]) & (columns <= last[:, None]))[:, None]
    images[2] = 0
    return images


@pytest.mark.parametrize(("height", "width"), [(1, 7), (5, 8), (4, 1), (6, 13)])
def test_it_is_what_a_loop_over_pixels_gives(height, width):
    images = boxed(9, height, width)
    for digit_width in {1, 2, width // 2, width} - {0}:
        if digit_width <= width:
            expected = torch.stack([literal(image, digit_width) for image in images])
            torch.testing.assert_close(normalize_widths(images, digit_width), expected, atol=1e-5, rtol=0)


def test_a_digit_of_that_width_is_moved_to_the_middle_bit_for_bit():
    images = torch.zeros(1, 3, 9)
    images[0, :, :5] = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) + 0.1
    found = normalize_widths(images, 5)
    assert torch.equal(found[0, :, 2:7], images[0, :, :5])
    assert found.count_nonzero() == 15
    assert torch.equal(normalize_widths(found, 5), found)


def test_digits_of_any_width_have_the_same_box_then():
    images = boxed(30, 4, 16, seed=1)[3:]
    found = normalize_widths(images, 8)
    inked = (found > 0).any(1)
    assert inked[:, 4:12].all()  # with a faint edge of at most one pixel where a digit is stretched
    stretched = (images > 0).any(1).sum(1) < 8
    assert (inked.sum(1) == 8)[~stretched].all()
    assert (found[stretched] >= 0).all()


@pytest.mark.parametrize("width", [0, -1, 10])
def test_widths_out_of_range_are_refused(width):
    with pytest.raises(ValueError, match=f"digit_width is {width}: it must be from 1 to 9"):
        normalize_widths(torch.zeros(2, 3, 9), width)


def test_a_task_reads_each_split_that_way(tmp_path):
    data = write_mnist(tmp_path, 53, packed=False)
    plain, narrow = (load(DigitsConfig(data, dev_size=10, digit_width=width)) for width in (None, 2))
    for split in ("train", "dev", "test"):
        before, after = (getattr(each, f"{split}_images").view(-1, 5, 5) for each in (plain, narrow))
        expected = normalize_widths((before[:, :4, :4] + 1) / 2, 2) * 2 - 1
        torch.testing.assert_close(after[:, :4, :4], expected)
        assert (after[:, :, 4] == -1).all()
    tasks = [DigitsTask(DigitsConfig(data, dev_size=10, digit_width=width)) for width in (None, 2)]
    assert tasks[0].fingerprint != tasks[1].fingerprint


def test_a_task_refuses_widths_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="digit_width is 0: it must be at least 1"):
        DigitsConfig(digit_width=0)
    with pytest.raises(ValueError, match="digit_width is 5: it must be from 1 to 4"):
        load(DigitsConfig(write_mnist(tmp_path, 53, packed=False), dev_size=10, digit_width=5))
