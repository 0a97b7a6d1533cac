"""Digits that are stretched or squeezed to one width, so that networks see the same digits in several ways.

Members of the committee of Ciresan, Meier, Gambardella and Schmidhuber (2011, https://arxiv.org/abs/1103.4487) are
trained on digits of different widths. The interpolation is ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize_widths(images: Tensor, digit_width: int) -> Tensor:
    """Return images ``[N, H, W]`` whose digits have one width, in the middle; heights stay.

    A digit is as wide as the smallest box around the pixels above 0, the background. Values between pixels are linear.
    An image of the background alone stays what it is.

    Each operation is rounded by itself, so that the bits do not depend on the processor: data have a digest.

    Args:
        images: ``[N, H, W]``, of a floating dtype, from 0.
        digit_width: Of each digit, in pixels, from 1 to W.

    Raises:
        ValueError: The width is out of range.
    """
    height, width = images.shape[1:]
    if not 1 <= digit_width <= width:
        raise ValueError(f"digit_width is {digit_width}: it must be from 1 to {width}, the width of the images")
    ink = (images > 0).any(1).int()
    first, last = ink.argmax(1), width - 1 - ink.flip(1).argmax(1)
    centre, scale = (first + last)[:, None] / 2, (last - first + 1)[:, None] / digit_width
    offsets = torch.arange(width) - (width - 1) / 2
    source = (centre + scale * offsets + 1).clamp(0, width + 1)  # a column of background is added on each side
    padded = F.pad(images, (1, 1))

    def at(column: Tensor) -> Tensor:
        return padded.gather(2, column.long()[:, None].expand(-1, height, -1))

    share = (source - source.floor())[:, None].to(images.dtype)
    return at(source.floor()) * (1 - share) + at(source.ceil()) * share
