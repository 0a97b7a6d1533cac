"""The handlers of torch's operations."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils import rnn

from meprop.pruning.handlers import NOTHING, BatchSize, Call, Sizes, Value, handles, layer, values_in

_RANK_UNKNOWN = "count it from the last one, or give example_inputs"

# ---- entry by entry


@handles(
    *(torch.nn.ReLU, torch.nn.ReLU6, torch.nn.LeakyReLU, torch.nn.RReLU, torch.nn.ELU, torch.nn.SELU, torch.nn.CELU),
    *(torch.nn.GELU, torch.nn.SiLU, torch.nn.Mish, torch.nn.Softplus, torch.nn.Softsign, torch.nn.Threshold),
    *(torch.nn.Tanh, torch.nn.Sigmoid, torch.nn.LogSigmoid, torch.nn.Hardtanh, torch.nn.Hardsigmoid),
    *(torch.nn.Hardswish, torch.nn.Hardshrink, torch.nn.Softshrink, torch.nn.Tanhshrink),
    *(torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.AlphaDropout, torch.nn.Identity),
    *(torch.relu, torch.relu_, torch.tanh, torch.sigmoid, torch.abs, torch.neg, torch.square, operator.neg),
    *(F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus, F.softsign),
    *(F.tanh, F.sigmoid, F.logsigmoid, F.hardtanh, F.hardsigmoid, F.hardswish, F.dropout, F.dropout1d, F.dropout2d),
    *("relu", "relu_", "tanh", "sigmoid", "abs", "neg", "square", "contiguous", "clone", "float"),
)
def elementwise(call: Call) -> Value:
    """Passes on the units of a tensor whose entries are changed one by one."""
    followed = [value for value in call.values if value.groups]
    if len(followed) == 1 and followed[0] is call.x and not call.x.states:
        return call.x
    return call.not_understood()


@handles(
    *(operator.add, operator.sub, operator.mul, operator.iadd, operator.isub, operator.imul),
    *(torch.add, torch.sub, torch.mul, "add", "add_", "sub", "sub_", "mul", "mul_"),
)
def combine(call: Call) -> Value:
    """Joins the units of two tensors, or passes on those of a tensor that meets a number."""
    followed = [value for value in call.values if value.groups]
    if any(value.states for value in followed):
        return call.not_understood()
    if len(followed) == len(call.values) == 1:
        return followed[0]
    if len(followed) == 2 and _same_place(*followed):
        call.join(*followed)
        same_rank = followed[0].rank == followed[1].rank
        return replace(followed[0], rank=followed[0].rank if same_rank else None)
    return call.not_understood()


def _same_place(one: Value, other: Value) -> bool:
    """Whether two values have their units in the same dimension."""
    same_rank = one.rank is None or other.rank is None or one.rank == other.rank
    return same_rank and (one.dim, one.flattened) == (other.dim, other.flattened)


@handles(operator.truediv, operator.itruediv, torch.div)
def divide(call: Call) -> Value:
    """Passes on the units of a tensor that is divided by a number."""
    return elementwise(call) if isinstance(call.argument(1), int | float) else call.not_understood()


# ---- layers


@handles(torch.nn.Conv1d, torch.nn.Conv2d)
def convolution(call: Call) -> Value:
    """Refuses a convolution in groups."""
    if call.module.groups == 1:
        return layer(call)
    made = Value(call.made(), 1 - call.module.weight.dim())
    call.refuse([call.x, made], f"{call.name} is a convolution in groups")
    return made


@handles(torch.nn.LSTM)
def lstm(call: Call) -> Any:
    """Follows output and last states. Refuses initial states, which would have to be cut with the units."""
    if call.module.proj_size > 0:
        return call.not_understood()
    x = call.refuse(call.x, f"{call.name} reads channels") if call.x.flattened else call.read(-1)
    made = call.lay_out_layer(x.groups)
    call.finder.keep_apart(made, "the units of an LSTM")
    last = Value(made, rank=call.rank, states=True)
    if len(call.values) > 1:
        call.refuse(call.values[1:], f"{call.name} gets it as an initial state")
        call.refuse(last, "it gets initial states, which have its width")
    return Value(made[-2 if call.module.bidirectional else -1 :], rank=call.rank), (last, last)


def _resize_batch_norm(norm: torch.nn.BatchNorm1d | torch.nn.BatchNorm2d) -> None:
    norm.num_features = len(next(each for each in (norm.weight, norm.running_mean) if each is not None))


@handles(torch.nn.BatchNorm1d, resize=_resize_batch_norm)
def batch_norm_1d(call: Call) -> Value:
    """Cuts normalisation of dimension 1, whether it has features or the channels of sequences."""
    x, rank = call.x, call.rank
    if x.groups and rank != 1 - x.dim:
        unknown = "takes 2-D and 3-D inputs differently: give example_inputs"
        x = call.refuse(x, f"{call.name} (BatchNorm1d) {unknown if rank is None else f'gets {rank}-D input'}")
    return _normalise(call, x)


@handles(torch.nn.BatchNorm2d, resize=_resize_batch_norm)
def batch_norm_2d(call: Call) -> Value:
    """Cuts normalisation of the channels of images."""
    return _normalise(call, call.read(-3))


def _normalise(call: Call, x: Value) -> Value:
    tensors = ("weight", "bias", "running_mean", "running_var")
    call.lay_out({name: {0: x.groups} for name in tensors if getattr(call.module, name) is not None})
    return x


@handles(torch.nn.LayerNorm)
def layer_norm(call: Call) -> Value:
    """Refuses layer normalisation, which combines the units of a row."""
    return call.not_understood("whose mean and variance depend on the number of units")


# ---- channels and their positions


@handles(
    *(torch.nn.MaxPool1d, torch.nn.AvgPool1d, torch.nn.AdaptiveAvgPool1d, torch.nn.AdaptiveMaxPool1d),
    *(F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d),
)
def pool_1d(call: Call) -> Value:
    """Passes on channels whose positions are pooled."""
    return _pool(call, -2)


@handles(
    *(torch.nn.MaxPool2d, torch.nn.AvgPool2d, torch.nn.AdaptiveAvgPool2d, torch.nn.AdaptiveMaxPool2d),
    *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
)
def pool_2d(call: Call) -> Value:
    """Passes on channels whose positions are pooled."""
    return _pool(call, -3)


def _pool(call: Call, dim: int) -> Value:
    if call.kwargs.get("return_indices") or getattr(call.module, "return_indices", False):
        return call.not_understood()
    if call.x.groups and call.x.dim != dim:
        return call.refuse(call.x, f"{call.name} pools along the dimension of its units")
    return call.x


@handles(torch.nn.Flatten)
def flatten_module(call: Call) -> Value:
    """Turns channels into blocks of features."""
    return _flatten(call, call.module.start_dim, call.module.end_dim)


@handles(torch.flatten, "flatten")
def flatten(call: Call) -> Value:
    """Turns channels into blocks of features."""
    if not call.args:
        return call.not_understood()
    return _flatten(call, call.argument(1, "start_dim", default=0), call.argument(2, "end_dim", default=-1))


def _flatten(call: Call, start: Any, end: Any) -> Value:
    x = call.x
    if x.dim < -1 and x.rank is None:
        return call.refuse(x, f"{call.name} flattens it, or another dimension: give example_inputs")
    if x.dim == -1 or x.states or (x.place(start), x.place(end)) != (x.dim, -1):
        return call.refuse(x, f"{call.name} flattens it otherwise than from the channels on")
    return Value(x.groups, rank=None if x.rank is None else x.rank + x.dim + 1, flattened=True)


@handles("view", "reshape")
def view(call: Call) -> Value:
    """Understands `x.view(x.size(0), -1)`, which flattens. Other sizes may contain numbers of units."""
    x, sizes = call.x, call.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
        sizes = sizes[0]
    if x.dim < -1 and x.rank is None:
        return call.refuse(x, f"{call.name} flattens it, or another dimension: give example_inputs")
    batch = sizes[0] if len(sizes) == 2 and sizes[1] == -1 else None
    if x.dim < -1 and x.place(1) == x.dim and isinstance(batch, BatchSize) and batch.of is x:
        return Value(x.groups, rank=2, flattened=True)
    return call.not_understood()


@handles(torch.mean, torch.sum, torch.amax, torch.amin, "mean", "sum", "amax", "amin")
def reduce(call: Call) -> Value:
    """Passes units on where other dimensions are reduced, such as the positions of a channel."""
    x, dims = call.x, call.argument(1, "dim", "axis", default=())  # torch also takes NumPy's names
    places = [x.place(dim) for dim in (dims if isinstance(dims, list | tuple) else [dims])]
    if not x.groups or x.states:
        return call.not_understood()
    if x.rank is None and None in places:
        return call.refuse(x, f"{call.name} is over its units, or another dimension: {_RANK_UNKNOWN}")
    if not places or None in places or x.dim in places:
        return call.refuse(x, f"{call.name} is over its units")
    if call.argument(2, "keepdim", "keepdims"):
        # Where the batch may be gone, a copy: its size is not that of `x`.
        return replace(x) if x.rank is None or -x.rank in places else x
    behind = sum(place > x.dim for place in places if place is not None)
    return replace(x, dim=x.dim + behind, rank=None if x.rank is None else x.rank - len(places))


# ---- sizes, parts, sequences


@handles("size")
def size(call: Call) -> Any:
    """Returns all sizes or one."""
    if not call.x.groups:
        return NOTHING
    dim = call.argument(1, "dim")
    return Sizes(call.x) if dim is None else _size(call, call.x, dim)


def _size(call: Call, x: Value, dim: Any) -> Value | BatchSize:
    place = x.place(dim)
    if place is None and x.rank is None and not x.states:
        return call.refuse(x, f"the size of its units' dimension is read, or that of another: {_RANK_UNKNOWN}")
    if place is None or place == x.dim or x.states:
        return call.refuse(x, "the size of its units' dimension is read, or several sizes are")
    return BatchSize(x) if place == -(x.rank or 0) else NOTHING


@handles(getattr)
def attribute(call: Call) -> Any:
    """Returns sizes and passes units on, of tensors and of packed sequences."""
    name = call.args[1]
    if name == "shape" and call.x.groups:
        return Sizes(call.x)
    if name in ("batch_sizes", "sorted_indices", "unsorted_indices", "device", "dtype"):  # these have no entries
        return NOTHING
    call = replace(call, name=repr(f".{name}"))
    return elementwise(call) if name == "data" else call.not_understood()


@handles(operator.getitem)
def item(call: Call) -> Any:
    """Takes one of several results, a size, or the last state of one layer and direction of an LSTM."""
    of, index = call.args
    if isinstance(of, tuple):
        return of[index]
    if isinstance(of, Sizes):
        return _size(call, of.of, index)
    if call.x.states and isinstance(index, int):
        return Value((call.x.groups[index],), rank=call.x.rank and call.x.rank - 1)
    return call.not_understood()


@handles(torch.cat)
def cat(call: Call) -> Value:
    """Puts units side by side, along their dimension."""
    dim = call.argument(1, "dim", "axis", default=0)
    parts = list(values_in(call.argument(0, "tensors")))
    joinable = all(part.groups and not part.states and not part.flattened for part in parts)
    if joinable and {(part.dim, part.place(dim)) for part in parts} == {(parts[0].dim, parts[0].dim)}:
        return replace(parts[0], groups=tuple(group for part in parts for group in part.groups))
    if any(part.groups and part.place(dim) is None and part.rank is None for part in parts):
        return call.refuse(parts, f"{call.name} joins its units, or along another dimension: {_RANK_UNKNOWN}")
    return call.not_understood()


@handles(rnn.pack_padded_sequence)
def pack(call: Call) -> Value:
    """Passes units on. Batch and time become one dimension, so that the rank is another one."""
    return replace(elementwise(call), rank=None)


@handles(rnn.pad_packed_sequence)
def unpack(call: Call) -> tuple[Value, Value]:
    """Passes units on, beside the lengths of the sequences."""
    return replace(elementwise(call), rank=None), NOTHING
