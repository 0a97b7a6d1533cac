from collections.abc import Sequence

__file__: str

def run_yosys(argv: Sequence[str]) -> int: ...
