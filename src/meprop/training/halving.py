"""Successive halving: many candidates for a short time, the best of them for a longer one.

Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization" (AISTATS 2016).
"""

from __future__ import annotations

import math
import re

FACTOR = 3
"""One of so many candidates goes on."""
_LAST = 2
"""So few candidates are not worth a further round."""
_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def rounds(candidates: int) -> list[int]:
    """Return how many candidates each round has. All rounds are given the same time.

    Raises:
        ValueError: There is no candidate.
    """
    if candidates < 1:
        raise ValueError(f"there are {candidates} candidates; give one or more")
    found = [candidates]
    while found[-1] > _LAST:
        found.append(math.ceil(found[-1] / FACTOR))
    return found


def read_duration(text: str) -> float:
    """Return the seconds of a time such as "90s", "10min" or "1.5h".

    Raises:
        ValueError: It is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)", text.strip())
    if found is None or not float(found[1]):
        raise ValueError(f"--budget must be a time such as 90s, 10min or 1.5h, got {text!r}")
    return float(found[1]) * _UNITS[found[2]]
