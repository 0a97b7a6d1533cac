"""The compiled kernels. Addresses, sizes, leading dimensions and flags are plain integers; see csrc/drivers.h.

Raises:
    ValueError: a size, leading dimension, k, number of threads, dtype or scope code is out of range.
    IndexError: a given selection's indices do not ascend, or are not within the output features.
    MemoryError: there is not enough memory for scratch.
"""

def levels() -> list[str]: ...
def level() -> str: ...
def use_level(name: str, /) -> None: ...
def topk(
    dtype: int,
    scope: int,
    grad: int,
    grad_ld: int,
    rows: int,
    outputs: int,
    k: int,
    values: int,
    indices: int,
    threads: int,
    /,
) -> None: ...
def column_scores(
    dtype: int, scope: int, grad: int, grad_ld: int, rows: int, outputs: int, scores: int, threads: int, /
) -> None: ...
def linear_backward(
    dtype: int,
    scope: int,
    grad: int,
    grad_ld: int,
    rows: int,
    outputs: int,
    k: int,
    values: int,
    indices: int,
    threads: int,
    inputs: int,
    weight: int,
    weight_ld: int,
    x: int,
    x_ld: int,
    grad_input: int,
    grad_weight: int,
    grad_bias: int,
    select: int,
    weight_rows_only: int,
    /,
) -> None: ...
def lstm_forward(
    rows: int,
    steps: int,
    sizes: int,
    reverse: int,
    units: int,
    inputs: int,
    weight_ih: int,
    weight_ih_ld: int,
    weight_hh: int,
    weight_hh_ld: int,
    x: int,
    x_ld: int,
    bias: int,
    from_zeros: int,
    h: int,
    c: int,
    gates: int,
    last_h: int,
    last_c: int,
    threads: int,
    /,
) -> None: ...
def lstm_backward(
    rows: int,
    steps: int,
    sizes: int,
    reverse: int,
    scope: int,
    units: int,
    inputs: int,
    k: int,
    weight_ih: int,
    weight_ih_ld: int,
    weight_hh: int,
    weight_hh_ld: int,
    x: int,
    x_ld: int,
    h: int,
    c: int,
    gates: int,
    grad_output: int,
    grad_last_h: int,
    grad_last_c: int,
    grad_x: int,
    grad_weight_ih: int,
    grad_weight_hh: int,
    grad_bias: int,
    grad_h0: int,
    grad_c0: int,
    hits: int,
    threads: int,
    /,
) -> None: ...
