"""The shapes, contents and dtypes that every backend is tested on."""

import torch
from torch import Tensor

# (rows N, output features O, kept k): one of each edge, odd widths, widths around every vector length, the paper's.
SELECTIONS = [
    (0, 7, 3),
    (1, 1, 1),
    (1, 5, 5),
    (3, 16, 15),
    (4, 17, 1),
    (5, 33, 32),
    (7, 63, 8),
    (2, 1000, 1),
    (9, 257, 40),
    (10, 500, 20),
    (64, 500, 20),
    (33, 1031, 41),
]

NATIVE_DTYPES = [torch.float32, torch.bfloat16]
ALL_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _normal(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _with(value: float, share: float, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return _normal(shape, generator).masked_fill(torch.rand(shape, generator=generator) < share, value)


# What an output gradient can look like, from its shape and a generator.
GRADIENTS = {
    "normal": _normal,
    "ties": lambda shape, generator: torch.randint(-2, 3, shape, generator=generator).double(),
    "zeros": lambda shape, generator: torch.zeros(shape, dtype=torch.float64),
    "constant": lambda shape, generator: torch.full(shape, -0.25, dtype=torch.float64),
    "mostly zero": lambda shape, generator: _with(0.0, 0.95, shape, generator),
    "some nan": lambda shape, generator: _with(float("nan"), 0.2, shape, generator),
    "all nan": lambda shape, generator: torch.full(shape, float("nan"), dtype=torch.float64),
    "some inf": lambda shape, generator: _with(-float("inf"), 0.2, shape, generator),
    "rows of all scales": lambda shape, generator: (
        _normal(shape, generator) * torch.exp(8 * _normal((shape[0], 1), generator))
    ),
    "denormal": lambda shape, generator: _normal(shape, generator) * 1e-40,
    "one huge": lambda shape, generator: torch.where(
        torch.arange(shape[1]) == shape[1] // 2, 3e38, _normal(shape, generator)
    ),
}


def gradient(kind: str, rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """An output gradient [rows, width] of the named kind, rounded to `dtype`."""
    return GRADIENTS[kind]((rows, width), torch.Generator().manual_seed(seed)).to(dtype)


# How a matrix can lie in memory: each takes a matrix and returns an equal one.
def _strided(matrix: Tensor) -> Tensor:
    wide = matrix.new_full((matrix.shape[0], 2 * matrix.shape[1] + 3), float("nan"))
    wide[:, 1 : 1 + matrix.shape[1]] = matrix
    return wide[:, 1 : 1 + matrix.shape[1]]


def _every_other(matrix: Tensor) -> Tensor:
    wide = matrix.new_full((matrix.shape[0], 2 * matrix.shape[1]), float("nan"))
    wide[:, ::2] = matrix
    return wide[:, ::2]


def _overlapping(matrix: Tensor) -> Tensor:
    """Equal only if all rows are equal: for those the leading dimension is 0."""
    same = matrix.shape[0] > 0 and bool((matrix == matrix[:1]).all())
    return matrix[:1].expand(matrix.shape) if same else matrix


LAYOUTS = {
    "rows on top of one another": _overlapping,
    "contiguous": lambda matrix: matrix.contiguous(),
    "transposed": lambda matrix: matrix.t().contiguous().t(),
    "part of a wider one": _strided,
    "every other column": _every_other,
}


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns, so that NaN equals NaN and 0.0 does not equal -0.0."""
    tensor = tensor.masked_fill(tensor.isnan(), float("nan"))  # any NaN will do
    return tensor.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])


# The numbers of rows of each time step of packed sequences.
SEQUENCES = {
    "ragged": [5, 5, 4, 2, 1, 1],
    "equal": [3, 3, 3],
    "one": [1, 1, 1, 1],
    "single step": [4],
    "wide": [70, 33, 33],
}
