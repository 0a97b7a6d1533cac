"""The whole training step of a wide perceptron on a GPU, captured in a CUDA graph: dense and sparse in turns.

Three hidden layers of 8,192 units, 1,024 random examples, weights in bfloat16, Adam. Dense is torch's fused Adam.
`python benchmarks/gpu_step.py` prints a line for each way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import meprop
from meprop import optim

WIDTH, BATCH, CLASSES, ROUNDS = 8192, 1024, 10, 30
UNIFIED, ROWS = meprop.TopK(0.04, scope="batch"), meprop.Sampled(1 / 3, scope="rows")
WAYS = {
    "dense": (None, None),
    "unified 4%, lazy": (UNIFIED, "lazy"),
    "unified 4%, decay": (UNIFIED, "decay"),
    "rows, a third": (ROWS, None),
}


def captured_step(
    network: nn.Module, rule: meprop.Rule | None, sparse_rows: optim.SparseRows | None
) -> Callable[[], None]:
    """The replay of a graph of one step of a copy of the network. It keeps the memory that the graph reads."""
    model = copy.deepcopy(network)
    if rule is not None:
        meprop.convert(model, rule, sparse_grad=sparse_rows is not None, when="always")
    if sparse_rows is None:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, capturable=True, fused=True)
    else:
        optimizer = optim.Adam(model.parameters(), lr=1e-5, capturable=True, sparse_rows=sparse_rows)
    x = torch.randn(BATCH, WIDTH, device="cuda", dtype=torch.bfloat16)
    classes = torch.randint(0, CLASSES, (BATCH,), device="cuda")

    def step() -> None:
        F.cross_entropy(model(x).float(), classes).backward()
        optimizer.step()
        optimizer.zero_grad()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(_alive: object = step) -> None:  # a graph does not keep what it reads: weights and batch
        graph.replay()

    return replay


def milliseconds(replay: Callable[[], None]) -> float:
    """The time of one replay on the card."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def main() -> None:
    """Times all ways in turns, and prints the 20th percentile and the median of each."""
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    network = nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES)).to("cuda", torch.bfloat16)
    replays = {name: captured_step(network, *way) for name, way in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name, replay in replays.items():
            times[name].append(milliseconds(replay))
    dense = sorted(times["dense"])
    for name, spent in times.items():
        spent.sort()
        p20, p50 = (spent[round(share * (ROUNDS - 1))] for share in (0.2, 0.5))
        ratio = dense[round(0.2 * (ROUNDS - 1))] / p20
        print(f"{name:18} {p20:.3f} ms (median {p50:.3f}), {ratio:.2f}x")


if __name__ == "__main__":
    main()
