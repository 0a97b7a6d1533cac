"""Colours that can be told from a background."""

from __future__ import annotations

WHITE, NIGHT = "#FFFFFF", "#14171C"
"""What charts are drawn on, light and dark: --surface of page.css."""
_CONTRAST = 3.0  # WCAG 2.2, 1.4.11, of what is no text


def legible(color: str, background: str) -> str:
    """Return a colour, mixed with white or black until its contrast with the background is 3 or more.

    Args:
        color: As `"#RRGGBB"`.
        background: The same. A dark one has colours lightened, a light one darkened.
    """
    towards = 255 if _luminance(_channels(background)) < 0.2 else 0
    tints = (
        [round(each + (towards - each) * percent / 100) for each in _channels(color)] for percent in range(0, 101, 4)
    )
    found = next(each for each in tints if contrast(each, _channels(background)) >= _CONTRAST)
    return "#" + "".join(f"{each:02X}" for each in found)


def contrast(first: list[int], second: list[int]) -> float:
    """Return the contrast ratio of two colours by WCAG 2.2, from 1 to 21, of channels from 0 to 255."""
    high, low = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _channels(color: str) -> list[int]:
    return [int(color[at : at + 2], 16) for at in (1, 3, 5)]


def _luminance(channels: list[int]) -> float:
    """Return the relative luminance of WCAG 2.2."""
    shares = [each / 255 for each in channels]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in shares]
    return sum(weight * each for weight, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
