"""Forward products in bfloat16: `compute_dtype` and autocast."""

import pytest
import torch

import meprop
from meprop import optim

SPARSE = meprop.TopK(4, scope="batch")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return meprop.nn.Linear(24, 40, rule=SPARSE, sparse_grad=True, compute_dtype=torch.bfloat16)


def forward(layer, seed=0):
    return layer(torch.randn(6, 24, generator=torch.Generator().manual_seed(seed)))


def expected(layer, seed=0):
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()).float()


def test_a_backward_pass_after_the_step_is_refused_as_by_torch(layer):
    optimizer = optim.Adam(layer.parameters(), lr=0.1)
    x = torch.randn(6, 24, requires_grad=True)
    loss = layer(x).pow(2).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("scope", ["example", "batch"])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_of_bfloat16_products_under_autocast_only(scope, autocast):
    torch.manual_seed(0)
    rule = meprop.TopK(5, scope=scope)
    x, weight, bias = torch.randn(6, 24), torch.randn(40, 24), torch.randn(40)
    grad = torch.randn(6, 40)
    found, wanted = ([t.clone().requires_grad_() for t in (x, weight, bias)] for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = meprop.functional.linear(*found, rule=rule, compute_dtype=torch.bfloat16)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    y.backward(grad.to(y.dtype))
    operands, wide = ([t.bfloat16() for t in wanted], grad.bfloat16()) if autocast else (wanted, grad)
    meprop.functional.linear(*operands, rule=rule).backward(wide)
    for one, other in zip(found, wanted, strict=True):
        assert one.grad.dtype == torch.float32
        assert torch.equal(one.grad, other.grad)


def test_without_gradients_and_with_everything_kept(layer):
    with torch.no_grad():
        assert torch.equal(forward(layer), expected(layer))
    dense = meprop.nn.Linear(24, 40, rule=meprop.TopK(40), compute_dtype=torch.bfloat16)
    y = forward(dense)
    assert torch.equal(y, expected(dense))
    y.sum().backward()
    assert dense.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_output_has_the_dtype_of_the_input(dtype):
    layer = meprop.nn.Linear(24, 40, rule=SPARSE, dtype=dtype, compute_dtype=torch.bfloat16)
    x = torch.randn(6, 24, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert layer.weight.grad.dtype == dtype


def test_a_weight_that_is_computed_gets_its_gradient():
    weight = torch.randn(40, 24, requires_grad=True)
    y = meprop.functional.linear(torch.randn(6, 24), weight * 2, rule=SPARSE, compute_dtype=torch.bfloat16)
    y.sum().backward()
    assert weight.grad is not None


def test_convert_gives_layers_the_dtype_and_revert_takes_it():
    model = torch.nn.Sequential(torch.nn.Linear(24, 200), torch.nn.LSTM(200, 200))
    meprop.convert(model, meprop.TopK(5), compute_dtype=torch.bfloat16, when="always")
    assert [layer.compute_dtype for layer in model] == [torch.bfloat16] * 2
    assert "compute_dtype=torch.bfloat16" in repr(model[0])
    meprop.revert(model)
    assert not hasattr(model[0], "compute_dtype")


def test_a_layer_that_stays_dense_forms_its_products_in_the_dtype(monkeypatch):
    monkeypatch.setattr("meprop.speed.measure", lambda *_: (1.0, 2.0))
    layer = torch.nn.Linear(24, 200)
    meprop.convert(layer, meprop.TopK(5), compute_dtype=torch.bfloat16)
    for seed in range(2):
        y = forward(layer, seed)
        assert torch.equal(y, expected(layer, seed))
        layer.weight.grad = None
        y.sum().backward()
        assert not layer.decision.sparse
        assert (layer.weight.grad != 0).all(dim=1).sum() == 200


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, "bfloat16"])
def test_another_compute_dtype_is_refused(dtype):
    for make in (
        lambda: meprop.nn.Linear(4, 4, rule=SPARSE, compute_dtype=dtype),
        lambda: meprop.convert(torch.nn.Linear(4, 4), SPARSE, compute_dtype=dtype),
        lambda: meprop.functional.linear(torch.ones(1, 4), torch.ones(4, 4), rule=SPARSE, compute_dtype=dtype),
    ):
        with pytest.raises(ValueError, match=r"compute_dtype=.*; it is torch\.bfloat16 or None"):
            make()


@pytest.mark.parametrize("autocast", [False, True])
def test_weights_without_version_or_memory_are_cast(autocast):
    dtype = None if autocast else torch.bfloat16
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer = meprop.nn.Linear(24, 40, rule=SPARSE, compute_dtype=dtype)
        torch.testing.assert_close(forward(layer).float(), expected(layer).float())
    layers = [meprop.nn.Linear(24, 40, rule=SPARSE, compute_dtype=dtype) for _ in range(2)]
    plain, x, (params, _) = torch.nn.Linear(24, 40), torch.randn(6, 24), torch.func.stack_module_state(layers)

    def of_all(layer, x, params):
        return torch.vmap(lambda params: torch.func.functional_call(layer, params, (x,)))(params)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if autocast:
            expected_of_all = of_all(plain, x, params)
        else:
            expected_of_all = of_all(plain, x.bfloat16(), {k: v.bfloat16() for k, v in params.items()}).float()
        found = of_all(layers[0], x, params)
    assert found.dtype == expected_of_all.dtype
    assert torch.equal(found, expected_of_all)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64])
@pytest.mark.parametrize("grad", [False, True])
def test_inputs_that_torch_does_not_cast_are_refused_as_by_torch(layer, dtype, grad):
    x = torch.ones(2, 24, dtype=dtype)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="dtype"):
        layer(x)
    with (
        torch.set_grad_enabled(grad),
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match="dtype"),
    ):
        layer(x)


def test_compiled_layers_form_their_forward_product_in_the_dtype():
    layer = meprop.nn.Linear(24, 40, rule=meprop.TopK(5), compute_dtype=torch.bfloat16)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.ones(6, 24))
    assert torch.equal(y, layer(torch.ones(6, 24)))
    y.sum().backward()
    compiled, layer.weight.grad = layer.weight.grad, None
    layer(torch.ones(6, 24)).sum().backward()
    torch.testing.assert_close(compiled, layer.weight.grad)


def test_compiled_layers_have_gradients_where_the_input_is_in_the_dtype():
    """With torch 2.11 they were zero."""
    torch._dynamo.reset()
    layer = meprop.nn.Linear(24, 40, rule=meprop.TopK(5), compute_dtype=torch.bfloat16).bfloat16()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.ones(6, 24).bfloat16()).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.count_nonzero() == 5 * 24


@pytest.mark.parametrize("kept", [4, 40])
def test_inputs_in_half_precision_go_with_float32_weights(kept):
    layer = meprop.nn.Linear(24, 40, rule=meprop.TopK(kept), compute_dtype=torch.bfloat16)
    x = torch.randn(3, 2, 24, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.float().pow(2).sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
