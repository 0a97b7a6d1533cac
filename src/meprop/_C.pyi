"""The compiled kernels. Addresses, sizes and leading dimensions are plain integers; see csrc/kernels.h."""

def levels() -> list[str]: ...
def level() -> str: ...
def use_level(name: str, /) -> None: ...
def topk_rows(
    dtype: int,
    grad: int,
    grad_ld: int,
    rows: int,
    width: int,
    k: int,
    values: int,
    indices: int,
    threads: int,
    /,
) -> None: ...
