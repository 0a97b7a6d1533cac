"""What a converted model keeps of its gradients while it trains, as numbers for a logger."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite, nan

import torch

from meprop.energy import Energy
from meprop.nn.base import SparseLayer
from meprop.record import Record
from meprop.report import ConversionReport, LayerReport, report

__all__ = ["Meter"]


class Meter:
    """Reads what a converted model kept of its gradients since it was read last, as numbers for a logger.

    What was counted stays in the meter, so that several meters of one model do not disturb each other. A meter costs
    nothing between its calls. The energy alone has to be measured, in the passes that run in `measuring`.

    Args:
        model: A model that `meprop.convert` has converted, or will have when the meter is used. It may be wrapped.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> import torch, meprop
        >>> model = torch.nn.Linear(8, 200)
        >>> report = meprop.convert(model, meprop.TopK(20), when="always")
        >>> meter = meprop.Meter(model)
        >>> with meter.measuring():
        ...     model(torch.eye(8)).sum().backward()
        >>> meter.read()
        {'density': 0.1, 'k': 20.0, 'energy': 0.1}
    """

    def __init__(self, model: torch.nn.Module) -> None:
        if not isinstance(model, torch.nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"model is of type {type(model).__name__}; it must be a torch.nn.Module")
        self._model = model
        self._energies: dict[Record, Energy] = {}
        self._read = {record: (record.kept, record.seen) for record in self._records().values()}

    @contextmanager
    def measuring(self) -> Generator[None]:
        """A context whose backward passes measure the energy that they keep. It changes no gradient.

        Each of them reads the output gradients once more, and chooses from them once more where native code chooses. An
        LSTM walks through its time steps once more, in plain torch operations. Passes of a compiled graph are not
        measured. Nor are those that a layer with ``when="auto"`` leaves dense without asking its rule. Within another
        meter's context the inner meter measures.
        """
        records = list(self._records().values())
        before = [record.energy for record in records]
        for record in records:
            record.energy = self._energies.setdefault(record, Energy())
        try:
            yield
        finally:
            for record, energy in zip(records, before, strict=True):
                record.energy = energy

    def read(self, *, layers: bool = False) -> dict[str, float]:
        """The numbers since the last call, or since the meter was made.

        | name | what |
        |---|---|
        | "density" | the share of the output gradients that was kept, the mean of `ConversionReport.density` |
        | "k" | how many entries a row kept on average: the mean over the sparse layers |
        | "energy" | the share of the squared output gradients that the kept entries hold, over the sparse layers |

        A rule that fixes a density has it. With other rules it is that of the passes since the last call. The energy is
        that of the passes that were measured. Drawn entries count before they are scaled, so that with an unbiased rule
        it says how much of the gradient passed as it is, not how good the estimate is.

        A number that is not known is left out, and so is one that is not finite: if there was no such pass, or passes
        only of a compiled graph, or a gradient with infinity or NaN.

        Args:
            layers: Whether to add the density of each layer, and the energy of each one that measured it, as
                "density/NAME" and "energy/NAME". NAME is "model" if the model itself is the layer.
        """
        records = self._records()
        described = [self._since(layer, records.get(layer.name)) for layer in report(self._model).layers]
        kept = [layer.density * layer.out_features for layer in described if layer.status == "sparse"]
        energies = {name: self._energies[record] for name, record in records.items() if record in self._energies}
        found = {
            "density": ConversionReport(tuple(described)).density,
            "k": sum(kept) / len(kept) if kept else nan,
            "energy": _share(sum(e.kept for e in energies.values()), sum(e.whole for e in energies.values())),
        }
        if layers:
            found |= {f"density/{layer.name or 'model'}": layer.density for layer in described}
            found |= {f"energy/{name or 'model'}": _share(e.kept, e.whole) for name, e in energies.items()}
        for energy in self._energies.values():
            energy.kept = energy.whole = 0.0
        self._read = {record: (record.kept, record.seen) for record in records.values()}
        return {name: number for name, number in found.items() if isfinite(number)}

    def _records(self) -> dict[str, Record]:
        """Those of the converted layers, by name."""
        layers = {name: layer for name, layer in self._model.named_modules() if isinstance(layer, SparseLayer)}
        return {name: layer.policy.record for name, layer in layers.items() if layer.policy.record is not None}

    def _since(self, layer: LayerReport, record: Record | None) -> LayerReport:
        """The layer with the density since the last call, if its rule does not fix it."""
        if record is None or layer.rule is None or layer.status == "dense":
            return layer
        if layer.rule.density(layer.out_features) is not None:
            return layer
        kept, seen = self._read.get(record, (0, 0))
        return replace(layer, density=_share(record.kept - kept, record.seen - seen))


def _share(kept: float, whole: float) -> float:
    return kept / whole if whole else nan
