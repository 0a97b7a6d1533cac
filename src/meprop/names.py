"""Names of layers that are shown together."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def folded(name: str) -> str:
    """The name of a layer with a star for each place in a list: layers.0.mlp.up is layers.*.mlp.up."""
    return _NUMBER.sub("*", name)


def common_name(names: Sequence[str]) -> str:
    """The name of layers of one folded name, with a star where they differ: 0.up.0 and 1.up.0 are *.up.0."""
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in parts)
