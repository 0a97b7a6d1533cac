"""How much of the gradients a run propagates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from meprop.nn.base import SparseLayer
from meprop.record import Record
from meprop.training.records import EpochRecord


def records(model: nn.Module) -> dict[str, Record]:
    """Return what the sparse layers have measured and counted, by their names."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, SparseLayer))
    return {name: layer.policy.record for name, layer in layers if layer.policy.record is not None}


def count_entries(model: nn.Module) -> tuple[int, int]:
    """Return how many entries were kept, and of how many, since the model was converted.

    They are those of the layers where the gradient decides.
    """
    found = records(model).values()
    return sum(record.kept for record in found), sum(record.seen for record in found)


def density(
    layers: Sequence[dict[str, Any]], curve: Sequence[EpochRecord], dense_share: float, first_k: float = 1.0
) -> float | None:
    """Return the share of the entries that sparse layers propagate, from their reports or from the epochs.

    Args:
        layers: The reports of the sparse layers.
        curve: The epochs.
        dense_share: The share of the training that is dense.
        first_k: k in the first of the other steps, as a multiple of that in the reports, to which it goes linearly.

    Returns:
        1 if there are no such layers; None if neither the rule nor the epochs say.
    """
    if not layers:
        return 1.0
    if any(layer["k"] is None for layer in layers):
        densities = [record.density for record in curve if record.density is not None]
        if not densities:
            return None
        found = sum(densities) / len(densities)
    else:
        kept = sum(_mean_kept(layer["k"], first_k * layer["k"], layer["out_features"]) for layer in layers)
        found = kept / sum(layer["out_features"] for layer in layers)
    return dense_share + (1 - dense_share) * found


def _mean_kept(last: float, first: float, features: int) -> float:
    """The mean of what k keeps on its way from first to last, of which last is below the number of features."""
    low, high = sorted((first, last))
    if high <= features:
        return (low + high) / 2
    return features - (features - low) ** 2 / (2 * (high - low))  # a part of the way keeps all features
