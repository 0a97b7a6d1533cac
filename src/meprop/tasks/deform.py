"""Images deformed at random: an elastic field, a rotation or a horizontal shear, and a scale for each axis.

These are the deformations of Ciresan, Meier, Gambardella and Schmidhuber (2010, https://arxiv.org/abs/1003.0358). Each
image is deformed in its own way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Draws(NamedTuple):
    """What the deformations of N images are made from; all float32."""

    noise: Tensor
    """``[N, 2, H + 2 * margin, W + 2 * margin]``, from -1 to 1: across, then down. Empty without an elastic field."""
    angle: Tensor
    """``[N]``, in radians."""
    sheared: Tensor
    """``[N]``, bool: whether the angle is of a horizontal shear, and not of a rotation."""
    scale: Tensor
    """``[N, 2]``: the factors across and down."""


@dataclass(frozen=True)
class Deformation:
    """How strongly images are deformed.

    Raises:
        ValueError: A setting is out of range; the message says what was got and what is allowed.
    """

    sigma: float
    """Standard deviation of the Gaussian that smooths the elastic field, in pixels."""
    alpha: float
    """Factor from the smoothed noise to pixels. With 0 there is no elastic field."""
    angle: float
    """The largest angle of rotation and shear, in degrees."""
    scale: float
    """The largest change of an axis, as a share of its length."""
    narrow_classes: tuple[int, ...] = (1, 7)
    """Classes with half of the angle: a turned 1 is like a 7."""

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma is {self.sigma}: it must be a positive number of pixels")
        for name, limit in (("alpha", math.inf), ("angle", 90), ("scale", 1)):
            if not 0 <= getattr(self, name) < limit:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0 and below {limit}")

    @property
    def margin(self) -> int:
        """Pixels of noise around an image, so that the field is as strong at its edge: three standard deviations."""
        return round(3 * self.sigma)

    def draw(self, labels: Tensor, height: int, width: int, generator: torch.Generator) -> Draws:
        """Draw what the images of these labels are deformed by.

        Args:
            labels: The class of each image, ``[N]``.
            height: Of the images, in pixels.
            width: Of the images, in pixels.
            generator: On the device of the labels, where all is drawn.
        """
        count, device = len(labels), generator.device
        angle, kind, across, down = torch.rand(4, count, generator=generator, device=device) * 2 - 1
        narrow, labels = torch.zeros(count, dtype=torch.bool, device=device), labels.long()
        for each in self.narrow_classes:
            narrow |= labels == each
        shape = count, 2, height + 2 * self.margin, width + 2 * self.margin
        return Draws(
            noise=_noise(shape, generator) if self.alpha > 0 else torch.empty(0, device=device),
            angle=torch.where(narrow, 0.5, 1.0) * angle * math.radians(self.angle),
            sheared=kind > 0,
            scale=1 + self.scale * torch.stack([across, down], dim=1),
        )

    def apply(self, images: Tensor, draws: Draws, background: float = -1.0) -> Tensor:
        """Return images ``[N, H, W]``, each deformed by what was drawn for it.

        The pixel at offset p from the centre gets the value at ``S A p + e(p)``. S scales the axes. A rotates or
        shears. e is alpha times the noise that the Gaussian has smoothed. Values between pixels are linear.

        Args:
            images: ``[N, H, W]``, float32 or float64.
            draws: Of `draw`, for as many images of this size, on the same device.
            background: The value outside of an image.
        """
        count, height, width = images.shape
        if count == 0:
            return images.clone()
        rows, columns = (
            torch.arange(size, dtype=images.dtype, device=images.device) - (size - 1) / 2 for size in (height, width)
        )
        offsets = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)  # [H, W, 2]: across, down
        sources = (offsets.view(-1, 2) @ _matrices(draws, images.dtype).mT).view(count, height, width, 2)
        if self.alpha > 0:
            noise = draws.noise.to(images.dtype)
            field = self._smoothing(height, noise) @ noise @ self._smoothing(width, noise).mT
            sources += self.alpha * field.movedim(1, -1)
        sources[..., 0] *= 2 / width  # in units of half an image
        sources[..., 1] *= 2 / height
        return F.grid_sample(images[:, None] - background, sources, align_corners=False)[:, 0] + background

    def _smoothing(self, size: int, noise: Tensor) -> Tensor:
        """The matrix ``[size, size + 2 * margin]`` that smooths noise along an axis and leaves the margin off.

        A product with it is ten times as fast as a convolution with the Gaussian, which has one channel.
        """
        device = noise.device
        padded = torch.arange(size + 2 * self.margin, device=device) - self.margin
        offsets = padded - torch.arange(size, device=device)[:, None]
        weights = torch.exp(-((offsets / self.sigma) ** 2) / 2) * (offsets.abs() <= self.margin)
        return (weights / weights[0].sum()).to(noise.dtype)


STRENGTHS = {
    "weak": Deformation(sigma=6.0, alpha=19.0, angle=7.5, scale=0.075),
    "paper": Deformation(sigma=6.0, alpha=38.0, angle=15.0, scale=0.15),
    "strong": Deformation(sigma=5.0, alpha=38.0, angle=15.0, scale=0.2),
}
"""The strengths by name. The paper has a range for all but the angle. "paper" is in it, and "strong" is its strongest
end. "weak" is half of "paper", which is ours."""


def deform(
    images: Tensor, labels: Tensor, strength: Deformation, generator: torch.Generator, *, background: float = -1.0
) -> Tensor:
    """Return images, each deformed anew; the same state of the generator gives the same bits.

    All is computed in float32 or wider, also under autocast. Narrower dtypes have too few digits for places of pixels.
    Products of float32 follow `torch.set_float32_matmul_precision`. With TF32 places differ by a hundredth of a pixel.

    Args:
        images: ``[N, H, W]``, of a floating dtype.
        labels: The class of each, ``[N]``.
        strength: How strongly, such as ``STRENGTHS["paper"]``.
        generator: On the device of images and labels. Nothing waits for a GPU, and a CUDA graph can have it all.
        background: The value outside of an image. That of MNIST's digits scaled to [-1, 1] is -1.

    Raises:
        ValueError: The images are not such, the labels are not as many, or they are on different devices.
    """
    if images.dim() != 3 or 0 in images.shape[1:] or not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} of shape {[*images.shape]}: they must be floats [N, H, W], with H and W of at "
            "least 1"
        )
    if not images.device == labels.device == generator.device:
        raise ValueError(
            f"images are on {images.device}, labels on {labels.device}, and the generator is on {generator.device}: "
            "all must be on one device"
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels have the shape {[*labels.shape]}: they must be [{len(images)}], one for each image")
    _, height, width = images.shape
    draws = strength.draw(labels, height, width, generator)
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    with torch.autocast(images.device.type, enabled=False):
        return strength.apply(wide, draws, background).to(images.dtype)


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform noise of 256 levels, symmetric about 0: eight values from each number drawn, as drawing is what costs."""
    size = math.prod(shape)
    drawn = torch.empty(-(-size // 8), dtype=torch.int64, device=generator.device)
    drawn.random_(-(2**63), None, generator=generator)
    return (drawn.view(torch.int8)[:size].view(shape).float() + 0.5) / 128


def _matrices(draws: Draws, dtype: torch.dtype) -> Tensor:
    """``[N, 2, 2]``: the rotation or shear of each image, then its scale."""
    angle, sheared, scale = draws.angle.to(dtype), draws.sheared, draws.scale.to(dtype)
    across = torch.stack([torch.where(sheared, 1, angle.cos()), torch.where(sheared, -angle.tan(), -angle.sin())], 1)
    down = torch.stack([torch.where(sheared, 0, angle.sin()), torch.where(sheared, 1, angle.cos())], 1)
    return scale[:, :, None] * torch.stack([across, down], dim=1)
