"""Training steps on a GPU: gradients, modes, optimizers, captured graphs, and no wait for the host."""

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import literal
import meprop
from meprop import optim

COLUMNS, ROWS = meprop.TopK(0.2, scope="batch"), meprop.Sampled(0.3, scope="rows")
LITERAL = [COLUMNS, meprop.TopK(0.2), meprop.TopK(0.2, scope="global"), meprop.CompensatedTopK(0.2)]
EVERY = [*LITERAL, ROWS, meprop.Sampled(), meprop.Sampled(0.1), meprop.RandomK(0.2)]
NO_WAIT = [COLUMNS, ROWS]

on_a_card = pytest.mark.cuda


def network(device: torch.device, dtype: torch.dtype = torch.float32, width: int = 96) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*layers).to(device, dtype)


def batch(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(128, 64, generator=generator).to(device, dtype)
    return x, torch.randint(0, 10, (128,), generator=generator).to(device)


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of a step that was made three times before, and what the step returns in it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def gradients(model: nn.Module, x: Tensor, classes: Tensor) -> list[Tensor]:
    torch.manual_seed(5)
    F.cross_entropy(model(x).float(), classes).backward()
    found = [parameter.grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize("rule", LITERAL, ids=repr)
def test_gradients_are_those_of_the_literal_layer(rule, device):
    layer = meprop.nn.Linear(40, 30, rule=rule).double()
    x, to = torch.randn(50, 40, dtype=torch.float64), torch.randn(50, 30).double()
    expected = torch.autograd.grad(literal.linear(x, layer.weight, layer.bias, rule), list(layer.parameters()), to)
    there = copy.deepcopy(layer).float().to(device)
    found = torch.autograd.grad(there(x.float().to(device)), list(there.parameters()), to.float().to(device))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", EVERY, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_seed_gives_the_same_bits(rule, dtype, device):
    model = network(device, dtype)
    meprop.convert(model, rule, min_features=8, when="always")
    one, other = (gradients(model, *batch(device, dtype)) for _ in range(2))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(one, other, strict=True))


@on_a_card
def test_the_mean_of_drawn_rows_is_the_gradient(device):
    grad = (torch.randn(40, 30) * torch.randn(40, 1).exp()).to(device)
    torch.manual_seed(0)
    draws = torch.stack([ROWS.select(grad).to_dense() for _ in range(1500)])
    error = draws.std(dim=0) / 1500**0.5
    off = ((draws.mean(dim=0) - grad) / error)[error > 1e-3 * grad.abs().amax()]
    assert off.numel() > 50
    assert off.abs().max() < 6


@pytest.mark.parametrize("rule", [COLUMNS, ROWS, meprop.TopK(0.25, scope="global")], ids=repr)
@pytest.mark.parametrize("last", [False, True], ids=["", "channels_last"])
def test_convolutions(rule, last, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2)).to(device)
    x = torch.randn(12, 3, 11, 11).to(device)
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    dense = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    meprop.convert(model, rule, min_features=4, when="always")
    found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(found[-1], dense[-1], rtol=1e-3, atol=1e-3)  # the last bias gets the whole gradient
    assert all(each.isfinite().all() and each.any() for each in found)
    assert not torch.allclose(found[0], dense[0])


@pytest.mark.parametrize("rule", [COLUMNS, meprop.TopK(0.2), meprop.Sampled(noise=0.25)], ids=repr)
def test_an_lstm_and_attention(rule, device):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.LSTM(24, 32), nn.MultiheadAttention(32, 4)]).to(device)
    meprop.convert(model, rule, min_features=4, when="always")
    output, _ = model[0](torch.randn(7, 5, 24, device=device))
    model[1](output, output, output)[0].square().sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in model.parameters())


@on_a_card
@pytest.mark.parametrize("rule", EVERY, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_with_a_scaler(rule, dtype, device):
    model = network(device)
    meprop.convert(model, rule, min_features=8, when="always")
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cuda")
    x, classes = batch(device)
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", dtype):
            loss = F.cross_entropy(model(x), classes)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@on_a_card
@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("rule", NO_WAIT, ids=repr)
def test_a_step_does_not_wait_for_the_host(rule, sparse_grad, device):
    """A wait raises an error in this mode, but for those of thrust, which only a capture finds."""
    if sparse_grad and rule is ROWS:
        pytest.skip("whole rows leave no rows of a weight out")
    model = network(device)
    meprop.convert(model, rule, min_features=8, when="always", sparse_grad=sparse_grad)
    optimizer = optim.Adam(model.parameters()) if sparse_grad else torch.optim.Adam(model.parameters(), fused=True)
    x, classes = batch(device)

    def step() -> None:
        F.cross_entropy(model(x), classes).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_card
@pytest.mark.parametrize("rule", NO_WAIT, ids=repr)
def test_a_whole_step_is_captured(rule, device):
    model = network(device)
    meprop.convert(model, rule, min_features=8, when="always")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True, capturable=True)
    x, classes = batch(device)

    def step() -> Tensor:
        loss = F.cross_entropy(model(x), classes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    graph, loss = captured(step)
    losses = []
    for _ in range(60):
        graph.replay()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@on_a_card
@pytest.mark.parametrize("sparse_rows", ["exact", "decay", "lazy"])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_captured_step_of_row_sparse_gradients_counts_on(name, sparse_rows, device):
    """The corrections of Adam's moments follow the number of the step, which a graph reads on the card."""
    after = []
    for capturable in (False, True):
        model, (x, classes) = network(device), batch(device)
        meprop.convert(model, COLUMNS, min_features=8, when="always", sparse_grad=True)
        options = {"lr": 0.01, "sparse_rows": sparse_rows, "capturable": capturable}
        optimizer = getattr(optim, name)(model.parameters(), **options)

        def step(model=model, optimizer=optimizer, x=x, classes=classes) -> None:
            F.cross_entropy(model(x), classes).backward()
            optimizer.step()
            optimizer.zero_grad()

        if capturable:
            graph, _ = captured(step)
            for _ in range(9):
                graph.replay()
        else:
            for _ in range(3 + 9):
                step()
        after.append(model[0].weight.detach().clone())
    torch.testing.assert_close(*after, rtol=1e-3, atol=1e-4)


@on_a_card
def test_what_is_captured_is_what_runs(device):
    model, (x, classes) = network(device), batch(device)
    meprop.convert(model, COLUMNS, min_features=8, when="always")
    eager = gradients(model, x, classes)
    parameters = list(model.parameters())
    graph, found = captured(lambda: torch.autograd.grad(F.cross_entropy(model(x), classes), parameters))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))


@on_a_card
@pytest.mark.parametrize("rule", [COLUMNS, ROWS], ids=repr)
def test_a_compiled_model(rule, device):
    torch._dynamo.reset()
    model, (x, classes) = network(device), batch(device)
    meprop.convert(model, rule, min_features=8, when="always")
    eager = gradients(model, x, classes)
    compiled = gradients(torch.compile(model, fullgraph=True), x, classes)
    for one, other in zip(compiled, eager, strict=True):
        assert one.isfinite().all()
        if rule is COLUMNS:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sparse_rows", ["exact", "decay", "lazy"])
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW"])
def test_optimizers_are_those_of_the_cpu(name, sparse_rows, device):
    options = {"momentum": 0.9} if name == "SGD" else {}
    after = []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model = nn.Linear(64, 50)
        model = model.to(place)
        meprop.convert(model, meprop.TopK(3, scope="batch"), min_features=8, when="always", sparse_grad=True)
        optimizer = getattr(optim, name)(model.parameters(), lr=0.01, sparse_rows=sparse_rows, **options)
        generator = torch.Generator().manual_seed(2)
        for _ in range(6):
            x, to = torch.randn(20, 64, generator=generator), torch.randn(20, 50, generator=generator)
            model(x.to(place)).backward(to.to(place))
            optimizer.step()
            optimizer.zero_grad()
        after.append(model.weight.detach().cpu())
    torch.testing.assert_close(*after, rtol=1e-4, atol=1e-5)


@on_a_card
def test_layers_decide_by_what_is_measured_on_the_card(device, tmp_path, monkeypatch):
    monkeypatch.setenv("MEPROP_CACHE", str(tmp_path))
    model = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048)).to(device)
    meprop.convert(model, meprop.TopK(0.04), when="auto")
    model(torch.randn(512, 2048, device=device)).sum().backward()
    layers = meprop.report(model).layers
    assert all("measured" in layer.reason for layer in layers), layers


@on_a_card
@pytest.mark.parametrize("rule", [COLUMNS, ROWS], ids=repr)
def test_one_process_with_nccl(rule, device, tmp_path):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    os.environ.setdefault("NCCL_P2P_DISABLE", "1")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model, (x, classes) = network(device), batch(device)
        meprop.convert(model, rule, min_features=8, when="always")
        alone = gradients(model, x, classes)
        together = gradients(DistributedDataParallel(model, device_ids=[0]), x, classes)
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("rule", [COLUMNS, ROWS], ids=repr)
def test_units_are_counted_and_removed(rule, device):
    model, (x, classes) = network(device), batch(device)
    meprop.convert(model, rule, min_features=8, when="always")
    simplifier = meprop.Simplifier(model, 0.05, example_inputs=[x])
    for _ in range(3):
        F.cross_entropy(model(x), classes).backward()
    simplifier.compact()
    assert model(x).isfinite().all()


@pytest.mark.parametrize("rule", [COLUMNS, ROWS, meprop.Sampled()], ids=repr)
def test_a_meter_reads_density_and_energy(rule, device):
    model, (x, classes) = network(device), batch(device)
    meprop.convert(model, rule, min_features=8, when="always")
    meter = meprop.Meter(model)
    with meter.measuring():
        F.cross_entropy(model(x), classes).backward()
    found = meter.read()
    assert 0 < found["density"] <= 1, found
    assert 0 < found["energy"] <= 1, found
