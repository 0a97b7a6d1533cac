"""Forward products that leave out zeros of the input, beside torch's own, as a Markdown table.

    python benchmarks/skip_zeros.py                          # a minute on one thread
    python benchmarks/skip_zeros.py --rows 64 --threads 2

The inputs are random. Each row has its nonzero entries at other places. Times are lower quartiles of calls in turns.
"""

from __future__ import annotations

import argparse
from statistics import quantiles

import torch

from meprop import ops, timing
from meprop.functional.linear import ForwardShape
from meprop.machine import keep_freed_memory
from meprop.reporting.pages import markdown_table

WEIGHTS = ((500, 1000), (1000, 2000), (4096, 1024), (1024, 4096), (4000, 5000))  # [O, I]
SHARES = (0.05, 0.1, 0.2, 0.4)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200, help="N, the rows of the input")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each weight, share and dtype")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    print(f"{ops.backend_info()['isa']}, threads: {options.threads}, rows: {options.rows}; times in ms")
    rows: list[tuple[str, ...]] = [("weight", "dtype", "torch", *(f"{share:.0%} not zero" for share in SHARES))]
    for outputs, inputs in WEIGHTS:
        for name, dtype in DTYPES.items():
            shape = ForwardShape(options.rows, inputs, outputs, dtype, "cpu")
            sides = {f"{share}": shape.passes(share)[1] for share in SHARES}
            sides["torch"] = shape.passes(1.0)[0]
            spent = timing.interleaved(sides, options.seconds * len(SHARES), least=7)
            ms = {side: 1e3 * quantiles(calls, n=4)[0] for side, calls in spent.items()}
            cells = (f"{ms[f'{share}']:.2f} ({ms['torch'] / ms[f'{share}']:.1f}x)" for share in SHARES)
            rows.append((f"{outputs} x {inputs}", name, f"{ms['torch']:.2f}", *cells))
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
