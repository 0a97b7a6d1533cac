"""Every kind of state comes back as it was; what has no form is refused."""

from __future__ import annotations

import json
import random
from collections import Counter, OrderedDict
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from meprop.training import encoding


def round_trip(value):
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encoding.flatten(value, tensors))
    return encoding.restore(json.loads(text), safetensors.torch.load(safetensors.torch.save(tensors)))


def same(a, b):
    """Whether both are the same, bit for bit, type for type."""
    if isinstance(a, torch.Tensor | np.ndarray):
        array = [torch.as_tensor(each) for each in (a, b)]
        bits = [each.contiguous().flatten().view(torch.uint8) for each in array]
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a) and all(map(same, a, b))
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip
MATRIX = torch.arange(12.0).reshape(3, 4)
VALUES = [
    None, True, False, 0, -1, 2**64 - 1, -(2**200), 1, 1.0, -0.0, 0.1, 1e-310, 5e-324, 1.7976931348623157e308,
    float("inf"), float("-inf"), float("nan"), "", "tensor", "\0\n\u2028\ud800", [], (), {}, [[]], ((),), [()],
    {0: 1, "0": 2, None: 3, (1, "a"): 4, 1.5: 5, True: 6}, {"tensor": "0"}, {"dict": []}, {"state": {0: {"step": 1}}},
    random.Random(3).getstate(), np.random.RandomState(3).get_state(), np.random.default_rng(3).bit_generator.state,
    np.arange(6).reshape(2, 3).T, np.zeros((0, 2), np.float32), torch.get_rng_state(),
    MATRIX, MATRIX.T, MATRIX[:, 1], MATRIX[0, 0], torch.zeros(0, 3), torch.tensor(float("nan")),
    {"tied": [MATRIX, MATRIX]}, OrderedDict(a=1),
    *(torch.ones(3).to(dtype) for dtype in DTYPES),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=[f"{place}-{type(each).__name__}" for place, each in enumerate(VALUES)])
def test_state_comes_back_as_it_was(value):
    assert same(value if type(value) is not OrderedDict else dict(value), round_trip(value))


def test_what_is_saved_is_no_view_of_what_lives_on():
    tensors: dict[str, torch.Tensor] = {}
    live = torch.zeros(3)
    encoding.flatten([live], tensors)
    live += 1
    assert not tensors["0"].any()


@pytest.mark.parametrize(
    "value",
    [
        {1, 2}, b"bytes", 1j, Decimal(1), Path("a"), object(), lambda: 0, Counter(a=1), np.float64(1), np.int64(1),
        torch.Size([1]), torch.float32, torch.eye(3).to_sparse(), torch.zeros(2, dtype=torch.complex128),
        np.array(["a"]), np.array([None]),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
@pytest.mark.parametrize("within", [lambda value: value, lambda value: {"a": [(value,)]}])
def test_what_has_no_form_is_refused(value, within):
    with pytest.raises(TypeError):
        round_trip(within(value))
