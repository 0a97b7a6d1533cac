"""What a Simplifier says: a record of each check, and a table of the layers."""

from __future__ import annotations

from dataclasses import dataclass

from meprop.table import text_table


@dataclass(frozen=True)
class Check:
    """What a check found, and did.

    Attributes:
        step: How many steps there were before it.
        prunes: Whether it was in a cycle that prunes.
        widths: The number of units of each set after the check, by the set's label. A linear layer and a convolution
            make one set, an LSTM one for each layer and direction.
    """

    step: int
    prunes: bool
    widths: dict[str, int]


@dataclass(frozen=True)
class LayerWidth:
    """One layer of a model that is simplified.

    Attributes:
        name: Its name in the model.
        kind: The name of the plain class, e.g. "Linear".
        width: How many output features, hidden units or output channels it has now.
        start: How many it began with.
        reason: Why none can be removed. It is None if they can.
    """

    name: str
    kind: str
    width: int
    start: int
    reason: str | None


@dataclass(frozen=True)
class SimplificationReport:
    """How wide each layer is. `print(report)` shows a table.

    Attributes:
        layers: One record for each layer that `meprop.report` lists, in the same order.
    """

    layers: tuple[LayerWidth, ...]

    def __str__(self) -> str:
        rows = [
            (
                layer.name or "(the model itself)",
                layer.kind,
                f"{layer.width} of {layer.start} ({layer.width / layer.start:.0%})",
                "can be pruned" if layer.reason is None else f"cannot be pruned: {layer.reason}",
            )
            for layer in self.layers
        ]
        return text_table([("layer", "kind", "width", "note"), *rows])
