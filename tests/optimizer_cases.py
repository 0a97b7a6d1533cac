"""The optimizers that tests/optim compares with torch's, and the parameters and gradients that they train with."""

import io

import pytest
import torch

from meprop import optim

ROWS, WIDTH = 37, 19

KINDS = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd-l2": ("SGD", {"lr": 0.1, "weight_decay": 0.01}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "dampened": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "maximize": ("SGD", {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    "adam": ("Adam", {"lr": 0.01}),
    "adam-l2": ("Adam", {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-5}),
    "amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "adam-maximize": ("Adam", {"lr": 0.01, "maximize": True}),
    "adamw": ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    "adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.1}),
    "adagrad-l2": ("Adagrad", {"lr": 0.1, "weight_decay": 0.01, "eps": 1e-3}),
}

SGD = {"lr": 0.1, "dampening": 0.0, "weight_decay": 0.1, "momentum": 0.0, "nesterov": False}
MOMENTUM = {"lr": 0.1, "dampening": 0.2, "weight_decay": 0.0, "momentum": 0.9, "nesterov": True}
ADAM = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
# The steps of rows: the operation, the states that rows may miss steps of, and the options.
OPS = {
    "sgd": ("sgd_rows", (), SGD),
    "momentum": ("sgd_rows", ("momentum_buffer",), MOMENTUM),
    "adam": ("adam_rows", ("exp_avg", "exp_avg_sq"), {**ADAM, "decoupled": False}),
    "adamw": ("adam_rows", ("exp_avg", "exp_avg_sq"), {**ADAM, "decoupled": True}),
    "adagrad": ("adagrad_rows", ("sum",), {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.1}),
}


def do_step(operation, op, tensors, gradient, **more):
    """One of `OPS` on a parameter and its states, by this implementation, with the options and what else it takes."""
    name, _, options = OPS[op]
    no_state = [None] if op == "sgd" or name == "adam_rows" else []  # neither a buffer nor AMSGrad's
    number = [12.0] if name == "adam_rows" else []
    operation(*tensors, *no_state, gradient, *number, **options, **more)


TOLERANCE = {torch.float32: {"rtol": 2e-4, "atol": 2e-5}, torch.float64: {"rtol": 1e-9, "atol": 1e-11}}


def saved(*objects):
    """The objects after `torch.save` and `torch.load`."""
    file = io.BytesIO()
    torch.save(objects, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def make(kind, params, **more):
    name, options = KINDS[kind]
    return getattr(optim, name)(params, **options, **more)


def make_torch(kind, params, **more):
    name, options = KINDS[kind]
    return getattr(torch.optim, name)(params, **options, **more)


def needs_late_state(optimizer):
    """Skips the test where torch's own Adagrad makes no state for what it was not made with, as in torch 2.11."""
    if isinstance(optimizer, torch.optim.Adagrad):
        weight = torch.nn.Parameter(torch.ones(1))
        theirs = torch.optim.Adagrad([torch.nn.Parameter(torch.ones(1))])
        theirs.add_param_group({"params": [weight]})
        weight.grad = torch.ones(1)
        try:
            theirs.step()
        except KeyError:
            pytest.skip("torch.optim.Adagrad has no state for groups that are added later")


def parameters(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((ROWS, WIDTH), (ROWS,), (5, 3))
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def sparse(values, indices, rows=ROWS):
    shape = (rows, *values.shape[1:])
    return torch.sparse_coo_tensor(torch.tensor(indices, dtype=torch.long)[None], values, shape, is_coalesced=True)


def gradients(step, dtype):
    """Of the three parameters: the first's is row-sparse but in every seventh step, the second has none at times."""
    generator = torch.Generator().manual_seed(1000 + step)
    first = torch.randn((ROWS, WIDTH), generator=generator, dtype=dtype)
    if step % 7 != 3:
        with_gradient = torch.randperm(ROWS, generator=generator)[: step % 5].sort().values
        first = sparse(first[with_gradient], with_gradient.tolist())
    second = None if step % 11 == 5 else torch.randn(ROWS, generator=generator, dtype=dtype)
    return [first, second, torch.randn((5, 3), generator=generator, dtype=dtype)]


def train(optimizer, params, steps, dense=False):
    dtype = params[0].dtype
    for step in steps:
        for parameter, grad in zip(params, gradients(step, dtype), strict=False):
            parameter.grad = grad.to_dense() if dense and grad is not None else grad
        optimizer.step()


def assert_alike(found, expected, dtype):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE[dtype])
