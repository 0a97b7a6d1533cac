"""Clipping by norm, against torch's."""

import math

import pytest
import torch

from meprop import optim
from optimizer_cases import ROWS, WIDTH, parameters, sparse


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_by_norm_is_torchs(norm_type, max_norm):
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    values = torch.arange(3.0, dtype=torch.float64)[:, None].expand(3, WIDTH)
    ours[0].grad = torch.sparse_coo_tensor(torch.tensor([[5, 2, 5]]), values, (ROWS, WIDTH))
    ours[1].grad = torch.ones(ROWS, dtype=torch.float64)
    theirs[0].grad, theirs[1].grad = ours[0].grad.to_dense(), ours[1].grad.clone()
    norm = optim.clip_grad_norm_(iter(ours), max_norm, norm_type)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type))
    assert ours[0].grad.layout == torch.sparse_coo
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(one.grad.to_dense(), other.grad)
    ours[1].grad[0] = math.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        optim.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("dense", [False, True])
def test_a_single_parameter_is_clipped(dense):
    parameter = torch.nn.Parameter(torch.ones(ROWS, WIDTH))
    grad = sparse(torch.full((2, WIDTH), 3.0), [4, 9])
    parameter.grad = grad.to_dense() if dense else grad
    before = parameter.grad.to_dense().clone()
    norm = optim.clip_grad_norm_(parameter, 1.0)
    torch.testing.assert_close(norm, before.norm())
    torch.testing.assert_close(parameter.grad.to_dense(), before / (norm + 1e-6))


@pytest.mark.parametrize("foreach", [None, False, True])
def test_torchs_implementation_can_be_chosen(foreach, monkeypatch):
    clip, found = torch.nn.utils.clip_grad_norm_, []

    def noted(parameters, max_norm, norm_type, error_if_nonfinite, foreach=None):
        found.append(foreach)
        return clip(parameters, max_norm, norm_type, error_if_nonfinite, foreach)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)
    params = parameters(torch.float32)
    params[0].grad = sparse(torch.ones(2, WIDTH), [4, 9])
    optim.clip_grad_norm_(params, 1.0, foreach=foreach)
    assert found == [foreach]


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_clipping_takes_gradients_without_rows(norm_type):
    params = parameters(torch.float32)[:2]
    params[0].grad, params[1].grad = sparse(torch.empty(0, WIDTH), []), torch.full((ROWS,), 2.0)
    expected = torch.linalg.vector_norm(params[1].grad, norm_type)
    torch.testing.assert_close(optim.clip_grad_norm_(params, 1.0, norm_type), expected)
    params[1].grad = None
    assert optim.clip_grad_norm_(params, 1.0, norm_type) == 0
