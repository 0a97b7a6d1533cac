"""The backward pass of a convolution of which some maps of the output gradient are kept.

A map is what one image and one output channel have of the output gradient. Shapes: output gradient [N, O, *T], weight
[O, I, *K], input x [N, I, *S].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from meprop.ops import native
from meprop.ops.entries import keep_entries
from meprop.ops.products import check_order
from meprop.ops.registry import Operator, operation
from meprop.ops.topk import memory_format
from meprop.selection import Entries, RowSelection, Selection, WholeRows, is_everything

Moves = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Stride, padding and dilation of a convolution, each with a number for each spatial dimension."""

MapGradients = tuple[Tensor | None, Tensor | None]
"""The gradients of input and weight. A gradient that is not wanted is None."""


@operation()
def map_norms(grad: Tensor, /) -> Tensor:
    """The norm of each map of grad [N, O, *T], as [N, O] in float32, or in float64 for float64 tensors.

    Squares are summed in float64. A map with NaN has the norm NaN.
    """
    norms_NO = torch.linalg.vector_norm(grad.flatten(2).double(), dim=2)
    return norms_NO.to(torch.promote_types(grad.dtype, torch.float32))


@native.backend.implements(map_norms, native.declines)
def _native_map_norms(grad: Tensor) -> Tensor:
    grad = grad.resolve_neg().contiguous()
    norms_NO = torch.empty(grad.shape[:2])
    maps, positions = norms_NO.numel(), grad.shape[2:].numel()
    code, threads = native.DTYPE_CODES[grad.dtype], torch.get_num_threads()
    native.extension().map_norms(code, grad.data_ptr(), maps, positions, norms_NO.data_ptr(), threads)
    return norms_NO


class Maps(NamedTuple):
    """Maps of an output gradient that are kept, each times a factor.

    Attributes:
        starts: The place of each image's first map [N + 1], int64.
        channels: The output channels of the maps [E], int32, ascending in each image.
        factors: The factors of the maps [E], in the dtype of the norms.
        exact_sum: Whether all images get in addition the mean over the images of what is left out.
    """

    starts: Tensor
    channels: Tensor
    factors: Tensor
    exact_sum: bool

    @property
    def images(self) -> Tensor:
        """The image of each map [E], int64."""
        return torch.arange(len(self.starts) - 1, device=self.starts.device).repeat_interleave(self.starts.diff())


def kept_maps(kept: Selection, norms: Tensor) -> Maps:
    """The maps that are kept, if a rule keeps this of their norms [N, O].

    A map whose norm becomes another value is scaled by the ratio of both. If a selection has a part that all rows
    share, whatever it is, all images share what is left out.

    Raises:
        ValueError: The selection is not one of such norms.
    """
    if isinstance(kept, WholeRows):
        raise ValueError("whole rows of the norms of maps; a rule that chooses these has scope 'rows'")
    if norms.shape != (kept.rows, kept.width):
        raise ValueError(f"a selection of [{kept.rows}, {kept.width}] norms does not go with norms {list(norms.shape)}")
    starts = kept.starts if isinstance(kept, RowSelection) else None
    indices, values = kept.indices, kept.values
    if starts is None:
        starts = torch.arange(kept.rows + 1, device=values.device) * indices.shape[-1]
        indices, values = indices.expand(values.shape).flatten(), values.flatten()
    maps = Maps(starts, indices, values, kept.shared is not None)
    ratios = values / norms[maps.images, indices]
    return maps._replace(factors=torch.where(ratios.isnan(), 1.0, ratios))  # of norms that are zero or not finite


@operation(tensor_at=1)
def maps_backward(
    maps: Maps, grad: Tensor, x: Tensor, weight: Tensor, moves: Moves, needs: tuple[bool, bool], /
) -> MapGradients:
    """The backward pass of a convolution with some maps in place of its output gradient.

    With `maps.exact_sum` all images get in addition the mean over the images of what is left out, which is grad less
    the maps. So the sum over the batch is that of grad. Sums are formed in float32, or in float64 for float64 tensors.

    Args:
        maps: What is kept.
        grad: Output gradient [N, O, *T].
        x: Input [N, I, *S]. It only tells the shape and the memory format if the weight's gradient is not wanted.
        weight: Weight [O, I, *K].
        moves: How the convolution moves over its input.
        needs: Whether the gradients of input and weight are wanted.

    Returns:
        The gradients of input and weight, in the memory formats of both.

    Raises:
        ValueError: The shapes do not fit.
        IndexError: The channels of an image do not ascend, or are not output channels.
    """
    _check(maps, grad, x, weight, moves)
    check_order(RowSelection(maps.factors, maps.channels, len(weight), starts=maps.starts))
    dtype, places = torch.promote_types(grad.dtype, torch.float32), (maps.images, maps.channels.long())
    factors = maps.factors.view(-1, *[1] * (grad.dim() - 2))
    sparse = torch.zeros_like(grad, dtype=dtype)
    sparse[places] = grad[places].to(dtype) * factors
    if maps.exact_sum:
        left_out = grad.to(torch.float64, copy=True)
        left_out[places] = torch.where(factors == 1, 0.0, left_out[places] * (1 - factors))
        sparse += (left_out.sum(dim=0) / max(1, len(grad))).to(dtype)
    stride, padding, dilation = moves
    zeros = [0] * len(stride)
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        sparse, x.to(dtype), weight.to(dtype), None, stride, padding, dilation, False, zeros, 1, (*needs, False)
    )
    return _like(of_x, x), _like(of_weight, weight)


def _like(gradient: Tensor | None, tensor: Tensor) -> Tensor | None:
    """The gradient in the dtype and the memory format of its tensor."""
    return None if gradient is None else gradient.to(tensor.dtype).contiguous(memory_format=memory_format(tensor))


def _native_declines(
    maps: Maps, grad: Tensor, x: Tensor, weight: Tensor, _moves: Moves, _needs: tuple[bool, bool]
) -> str | None:
    if grad.dim() not in (3, 4):
        return f"native kernels convolve in one or two spatial dimensions, not in {grad.dim() - 2}"
    return (
        native.declines(grad, x, weight)
        or native.declines(maps.starts, dtypes=native.INT64)
        or native.declines(maps.channels, dtypes=native.INT32)
    )


@native.backend.implements(maps_backward, _native_declines)
def _native_maps_backward(
    maps: Maps, grad: Tensor, x: Tensor, weight: Tensor, moves: Moves, needs: tuple[bool, bool]
) -> MapGradients:
    _check(maps, grad, x, weight, moves)
    last, dtype = memory_format(x) == torch.channels_last, grad.dtype
    grad, of = grad.resolve_neg().contiguous(), weight.resolve_neg().to(dtype).contiguous()
    x = x.resolve_neg().to(dtype).contiguous(memory_format=memory_format(x))
    of_x = torch.empty_like(x) if needs[0] else None
    of_weight = torch.empty(weight.shape, dtype=dtype) if needs[1] else None
    starts, channels, factors = maps.starts.contiguous(), maps.channels.contiguous(), maps.factors.float().contiguous()
    sizes = zip(x.shape[2:], grad.shape[2:], weight.shape[2:], *moves, strict=True)
    # One spatial dimension is the second of two.
    two = [(1, 1, 1, 1, 0, 1), *sizes][-2:]
    native.extension().maps_backward(
        native.DTYPE_CODES[dtype],
        *(len(x), x.shape[1], len(weight)),
        *(number for pair in zip(*two, strict=True) for number in pair),
        *(grad.data_ptr(), len(channels), starts.data_ptr(), channels.data_ptr(), factors.data_ptr(), maps.exact_sum),
        *(last, of.data_ptr(), x.data_ptr(), native.address(of_x), native.address(of_weight)),
        torch.get_num_threads(),
    )
    return of_x, _like(of_weight, weight)


def _check(maps: Maps, grad: Tensor, x: Tensor, weight: Tensor, moves: Moves) -> None:
    """Raises a ValueError for tensors that would be read or written beyond their end."""
    entries, sizes = len(maps.channels), [grad.shape[2:], x.shape[2:], weight.shape[2:], *moves]
    fits = grad.shape[:2] == (len(x), len(weight)) and x.shape[1] == weight.shape[1]
    fits = fits and len(maps.starts) == len(grad) + 1 and len(maps.factors) == entries
    fits = fits and {len(each) for each in sizes} == {grad.dim() - 2}
    fits = fits and all(
        kernel > 0 < stride and positions == (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for positions, size, kernel, stride, padding, dilation in zip(*sizes, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{entries} maps of {len(maps.starts) - 1} images do not go with an output gradient {list(grad.shape)}, an "
            f"input {list(x.shape)} and a weight {list(weight.shape)}, with stride, padding and dilation {moves}"
        )


# ---------------------------------------------------------------- entries of the norms, for torch.compile


def _flat(
    entries: Entries, grad: Tensor, x: Tensor, weight: Tensor, moves: Moves, needs: tuple[bool, bool]
) -> tuple[object, ...]:
    return grad, x, weight, *moves, *needs, *entries


def _whole(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, *rest: Any
) -> tuple[Entries, Tensor, Tensor, Tensor, Moves, tuple[bool, bool]]:
    moves = (tuple(stride), tuple(padding), tuple(dilation))
    return Entries(*rest[2:]), grad, x, weight, moves, rest[:2]


def _fake(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    needs = rest[3:5]
    of_x, of_weight = (
        torch.empty(each.shape, dtype=each.dtype, device=each.device, memory_format=memory_format(each))
        if needed
        else grad.new_empty(0)
        for each, needed in zip((x, weight), needs, strict=True)
    )
    return of_x, of_weight


def _wanted(
    found: tuple[Tensor, Tensor],
    _entries: Entries,
    _grad: Tensor,
    _x: Tensor,
    _weight: Tensor,
    _moves: Moves,
    needs: tuple[bool, bool],
) -> MapGradients:
    return found[0] if needs[0] else None, found[1] if needs[1] else None


@operation(
    operator=Operator(
        "(Tensor grad, Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, bool needs_x, "
        "bool needs_weight, str keep, int k, float share, bool exact_sum, Tensor? key, float ceiling) "
        "-> (Tensor, Tensor)",
        _fake,
        _flat,
        _whole,
    ),
    tensor_at=1,
    result=_wanted,
)
def entries_of_maps_backward(
    entries: Entries, grad: Tensor, x: Tensor, weight: Tensor, moves: Moves, needs: tuple[bool, bool], /
) -> tuple[Tensor, ...]:
    """`maps_backward` with `keep_entries` of the norms, in one operation with results of known shapes.

    An implementation returns an empty tensor for a gradient that is not wanted.
    """
    norms_NO = map_norms(grad)
    kept = keep_entries(norms_NO, entries)
    multiply = maps_backward.literally if is_everything(kept) else maps_backward  # the former is dense, by torch
    found = multiply(kept_maps(kept, norms_NO), grad, x, weight, moves, needs)
    return tuple(grad.new_empty(0) if each is None else each for each in found)
