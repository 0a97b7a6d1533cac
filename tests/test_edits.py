"""An edit of a weight is seen by the next product, however it is made: the output is torch's, bit for bit."""

from copy import deepcopy

import numpy as np
import pytest
import torch

import meprop
from meprop import optim

ROWS, WIDTH = 96, 40


def shared_memory(layer):
    weight = layer.weight.share_memory_()
    elsewhere = torch.empty(0).set_(weight.untyped_storage(), 0, weight.shape)  # as another process has it
    elsewhere[41:47] = 0


def other_values(layer):
    return {name: torch.randn_like(value) for name, value in layer.state_dict().items()}


def under_no_grad(layer):
    with torch.no_grad():
        layer.weight[3].mul_(2)


def swapped(layer):
    layer.weight.grad = None
    torch.utils.swap_tensors(layer.weight, torch.nn.Parameter(torch.randn_like(layer.weight)))


def step_of(module, name, **options):
    """A step that changes one entry, or one row of a row-sparse gradient."""

    def step(layer):
        optimizer = getattr(module, name)([layer.weight], lr=0.5, **options)
        grad = torch.zeros_like(layer.weight)
        if module is optim:
            index, values = torch.tensor([[41]]), torch.ones(1, *layer.weight.shape[1:])
            grad = torch.sparse_coo_tensor(index, values, layer.weight.shape, check_invariants=True)
        else:
            grad[41, 5] = 1.0
        layer.weight.grad = grad
        optimizer.step()

    return step


EDITS = {
    "data, some rows": lambda layer: layer.weight.data[41:47].zero_(),
    "data, one entry": lambda layer: layer.weight.data[41, 5].fill_(7.0),
    "data, all": lambda layer: layer.weight.data.mul_(1.5),
    "other data": lambda layer: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
    "detach": lambda layer: layer.weight.detach()[41:47].zero_(),
    "numpy": lambda layer: np.copyto(layer.weight.detach().numpy()[41:47], 0.0),
    "shared memory": shared_memory,
    "no_grad": under_no_grad,
    "load_state_dict": lambda layer: layer.load_state_dict(other_values(layer)),
    "assigned by load_state_dict": lambda layer: layer.load_state_dict(other_values(layer), assign=True),
    "another parameter": lambda layer: setattr(layer, "weight", torch.nn.Parameter(torch.randn_like(layer.weight))),
    "swap_tensors": swapped,
    "torch's step": step_of(torch.optim, "SGD"),
    "torch's for-each step": step_of(torch.optim, "Adam", foreach=True),
    "torch's fused step": step_of(torch.optim, "SGD", fused=True),
    "torch's fused step, Adam": step_of(torch.optim, "Adam", fused=True),
    "our row-sparse step": step_of(optim, "SGD"),
    "our row-sparse step, Adam": step_of(optim, "Adam", sparse_rows="decay"),
}

SPARSE, ALL = {"rule": meprop.TopK(4, scope="batch")}, {"rule": meprop.TopK(ROWS, scope="batch")}
BFLOAT16, ROW_SPARSE = {"compute_dtype": torch.bfloat16}, {"sparse_grad": True}
LAYERS = {
    "linear": (lambda **options: meprop.nn.Linear(WIDTH, ROWS, **options), (6, WIDTH)),
    "convolution": (lambda **options: meprop.nn.Conv2d(WIDTH, ROWS, 3, **options), (2, WIDTH, 5, 5)),
}
PRODUCTS = {
    "autocast": (True, SPARSE),
    "autocast, nothing to leave out": (True, ALL),
    "autocast, row-sparse": (True, SPARSE | ROW_SPARSE),
    "compute_dtype": (False, SPARSE | BFLOAT16),
    "compute_dtype, nothing to leave out": (False, ALL | BFLOAT16),
    "compute_dtype, row-sparse": (False, SPARSE | ROW_SPARSE | BFLOAT16),
}


@pytest.mark.parametrize("grad", [True, False], ids=["training", "no_grad"])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", LAYERS)
def test_an_edited_weight_gives_torchs_output(kind, edit, product, grad):
    torch.manual_seed(0)
    (make, shape), (autocast, options) = LAYERS[kind], PRODUCTS[product]
    layer, x = make(**options), torch.randn(shape)

    def forward(module, x):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return module(x)

    before = forward(layer, x).detach()
    EDITS[edit](layer)
    found = forward(layer, x)
    plain = deepcopy(layer)
    meprop.revert(plain)
    expected = forward(plain, x) if autocast else plain.bfloat16()(x.bfloat16()).float()
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)
