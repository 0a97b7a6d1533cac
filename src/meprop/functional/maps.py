"""The sparse backward pass of a convolution with a rule that chooses from the whole output gradient.

It keeps maps: what one example and one output channel have of the output gradient.
"""

from __future__ import annotations

from torch import Tensor

from meprop import ops
from meprop.errors import NotSupportedError
from meprop.functional.common import needs_known_shapes
from meprop.functional.geometry import Geometry
from meprop.policy import Policy
from meprop.selection import is_everything


def gradients_of_maps(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool, bool], policy: Policy
) -> ops.Gradients:
    """The gradients of input, weight and bias, with the maps whose norms the rule keeps.

    The rule sees the norms [N, O] of the maps of grad [N, O, *T]. It sees the maps themselves nowhere.
    """
    of_x, of_weight = needs[:2]
    moves = (geometry.stride, geometry.padding, geometry.dilation)
    if needs_known_shapes(grad):
        entries = policy.rule.as_entries(grad.shape[1], grad.device)
        if entries is None:
            raise NotSupportedError(
                f"{policy.rule} for maps of a convolution under torch.compile, which cannot tell how many it keeps; "
                "use meprop.TopK or meprop.Sampled, or do not compile this layer"
            )
        gradients = ops.entries_of_maps_backward(entries, grad, x, weight, moves, (of_x, of_weight))
    else:
        maps_of = grad.contiguous()  # both operations want the positions of a map side by side
        norms_NO = ops.map_norms(maps_of)
        kept = policy.select(policy.rule, norms_NO)
        if (energy := policy.energy_of(norms_NO)) is not None:
            energy.add(norms_NO, kept)  # the square of a map's norm is its sum of squares
        if policy.activity is not None:
            policy.activity.count(kept)
        if is_everything(kept):
            return geometry.gradients(grad, x, weight, needs)
        gradients = ops.maps_backward(ops.kept_maps(kept, norms_NO), maps_of, x, weight, moves, (of_x, of_weight))
    return *gradients, grad.sum(dim=[0, *range(2, grad.dim())]) if needs[2] else None
