"""bfloat16 copies of weights: up to date whatever changes the weight, and kept where nothing does."""

import copy
import gc

import numpy as np
import pytest
import torch

import meprop
from meprop import copies, optim
from meprop.ops import reference

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


def made_anew(layer):
    """Whether the next product casts the whole weight."""
    kept = copies.current(layer.weight)
    version = None if kept is None else kept._version
    forward(layer)
    return kept is None or copies.of(layer.weight) is not kept or kept._version != version


def test_a_copy_is_made_once_and_kept(layer):
    assert torch.equal(forward(layer), expected(layer))
    first = copies.of(layer.weight)
    forward(layer, 1).sum().backward()
    assert copies.of(layer.weight) is first
    assert not made_anew(layer)


EDITS = {
    "in place": lambda weight: weight.mul_(2),
    "one entry": lambda weight: weight[3].fill_(7),
    "copy": lambda weight: weight.copy_(torch.ones_like(weight)),
    "other memory": lambda weight: setattr(weight, "data", torch.full_like(weight, 3.0)),
    "data": lambda weight: weight.data.mul_(1.5),
    "data of all rows but the first": lambda weight: weight.data[1:].mul_(1.5),
    "numpy": lambda weight: np.multiply(weight.detach().numpy(), 1.5, out=weight.detach().numpy()),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_weight_is_seen(layer, edit):
    forward(layer)
    with torch.no_grad():
        edit(layer.weight)
    assert torch.equal(forward(layer), expected(layer))


def test_other_memory_under_a_weight_is_seen_though_the_values_agree(layer):
    first = copies.of(layer.weight)
    layer.weight.data = layer.weight.data.clone()
    assert copies.current(layer.weight) is None
    assert copies.of(layer.weight) is first  # written anew, in place
    assert copies.current(layer.weight) is first


def test_another_shape_of_the_same_memory_is_seen(layer):
    copies.of(layer.weight)
    layer.weight.data = layer.weight.data[:3]
    assert copies.current(layer.weight) is None
    assert torch.equal(copies.of(layer.weight), layer.weight.bfloat16())


class OwnTensor(torch.Tensor):
    pass


def test_plain_float32_leaves_alone_have_copies_and_in_bfloat16_alone():
    weight = torch.nn.Parameter(torch.ones(4, 6))
    for served in (weight, torch.ones(4, 6), torch.ones(3)):
        assert copies.serves(served, torch.bfloat16)
        assert not copies.of(served).requires_grad
    assert not copies.serves(weight, torch.float16)
    assert not copies.serves(weight, torch.float32)
    for other in (weight.double().detach(), weight * 2, weight.t().detach(), torch.ones(4, 6).as_subclass(OwnTensor)):
        assert not copies.serves(other, torch.bfloat16)
    with torch.inference_mode():
        assert not copies.serves(torch.ones(4, 6), torch.bfloat16)
    served = []
    torch.func.vmap(lambda row: served.append(copies.serves(row, torch.bfloat16)) or row)(torch.ones(4, 6))
    assert served == [False]


def test_a_forgotten_copy_is_made_anew(layer):
    first = copies.of(layer.weight)
    copies.forget(layer.weight)
    copies.forget(layer.weight)  # nothing to do
    assert copies.current(layer.weight) is None
    assert copies.of(layer.weight) is not first


def test_load_state_dict_is_seen(layer):
    forward(layer)
    layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})
    assert torch.equal(forward(layer), expected(layer))


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_into_a_fresh_layer(layer, assign):
    forward(layer)
    other = meprop.nn.Linear(24, 40, rule=SPARSE, compute_dtype=torch.bfloat16)
    forward(other)
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert torch.equal(forward(other), expected(layer))


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_torchs_optimizers_are_seen(layer, name):
    optimizer = getattr(torch.optim, name)(layer.parameters(), lr=0.5)
    for seed in range(3):
        forward(layer, seed).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(forward(layer, seed), expected(layer, seed))


@pytest.mark.skipif(not meprop.backend_info()["native"], reason="needs the compiled extension")
@pytest.mark.parametrize("sparse_rows", ["exact", "decay", "lazy"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_our_optimizers_write_the_copy_together_with_the_weight(layer, name, sparse_rows):
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(optim, name)(layer.parameters(), lr=0.1, sparse_rows=sparse_rows, **options)
    for seed in range(5):
        forward(layer, seed).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not made_anew(layer)
        assert torch.equal(copies.of(layer.weight), layer.weight.bfloat16())
        assert torch.equal(forward(layer, seed), expected(layer, seed))


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"capturable": True}])
def test_a_dense_step_of_a_weight_with_a_copy_is_torchs(layer, options):
    """To the bit where torch does it, with these options; and in any memory layout where we do, without."""
    twin = torch.nn.Parameter(layer.weight.detach().clone())
    ours, torchs = optim.Adam([layer.weight], **options), torch.optim.Adam([twin], fused=True, **options)
    for seed in range(3):
        copies.of(layer.weight)
        layer.weight.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(seed)).t()
        twin.grad = layer.weight.grad.contiguous()
        if options:
            layer.weight.grad = twin.grad.clone()
        ours.step()
        torchs.step()
        torch.testing.assert_close(layer.weight, twin, rtol=0 if options else 1e-6, atol=0 if options else 1e-7)
    assert torch.equal(copies.of(layer.weight), layer.weight.bfloat16())


def test_a_compiled_step_leaves_the_copy_to_be_made_anew(layer):
    optimizer = optim.SGD([layer.weight], lr=1.0)
    copies.of(layer.weight)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.ones(40, 24)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for number in (1, 2):
        step()
        torch.testing.assert_close(layer.weight, before - number)
    assert torch.equal(copies.of(layer.weight), layer.weight.bfloat16())


def test_a_frozen_weight_keeps_its_copy(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, fused=True)
    layer.weight.requires_grad_(False)
    forward(layer).sum().backward()
    optimizer.step()
    assert not made_anew(layer)


def test_an_optimizer_that_is_not_fused_leaves_other_copies_as_they_are(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    forward(layer)
    optimizer.step()  # without gradients
    assert not made_anew(layer)


def test_after_a_change_by_another_our_optimizers_leave_the_copy_to_be_made_anew(layer):
    optimizer = optim.Adam(layer.parameters(), lr=0.1, sparse_rows="lazy")
    forward(layer).pow(2).sum().backward()
    with torch.no_grad():
        layer.weight.mul_(-1)
    optimizer.step()
    assert torch.equal(forward(layer), expected(layer))


def test_a_backward_pass_after_the_step_is_refused_as_by_torch(layer):
    optimizer = optim.Adam(layer.parameters(), lr=0.1)
    x = torch.randn(6, 24, requires_grad=True)
    loss = layer(x).pow(2).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_layers_that_share_a_weight_share_its_copy(layer):
    other = meprop.nn.Linear(24, 40, rule=SPARSE, compute_dtype=torch.bfloat16)
    other.weight = layer.weight
    forward(layer)
    assert not made_anew(other)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(forward(other), expected(other))


def test_autocast_uses_the_copy_and_gives_what_torch_gives(layer):
    x = torch.randn(6, 24)
    for sparse_layer in (layer, meprop.nn.Linear(24, 40, rule=meprop.TopK(40))):
        with torch.autocast("cpu", torch.bfloat16):
            y = sparse_layer(x)
            wanted = torch.nn.functional.linear(x, sparse_layer.weight, sparse_layer.bias)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, wanted)
    assert torch.equal(copies.of(layer.weight), layer.weight.bfloat16())


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
def test_other_weights_are_cast_without_a_copy(dtype):
    layer = meprop.nn.Linear(24, 40, rule=SPARSE, dtype=dtype, compute_dtype=torch.bfloat16)
    assert not copies.serves(layer.weight, torch.bfloat16)
    x = torch.randn(6, 24, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert layer.weight.grad.dtype == dtype


def test_a_weight_that_is_computed_gets_no_copy():
    weight = torch.randn(40, 24, requires_grad=True)
    y = meprop.functional.linear(torch.randn(6, 24), weight * 2, rule=SPARSE, compute_dtype=torch.bfloat16)
    y.sum().backward()
    assert weight.grad is not None


def test_copies_die_with_their_weights_and_are_neither_saved_nor_copied():
    layer = meprop.nn.Linear(24, 40, rule=SPARSE, compute_dtype=torch.bfloat16)
    forward(layer)
    before = len(copies._copies)
    twin = copy.deepcopy(layer)
    assert len(copies._copies) == before
    assert twin.compute_dtype == torch.bfloat16
    assert list(layer.state_dict()) == ["weight", "bias"]
    del layer, twin
    gc.collect()
    assert len(copies._copies) < before


def test_convert_gives_linear_layers_the_dtype_and_revert_takes_it():
    model = torch.nn.Sequential(torch.nn.Linear(24, 200), torch.nn.LSTM(200, 200))
    meprop.convert(model, meprop.TopK(5), compute_dtype=torch.bfloat16, when="always")
    assert [layer.compute_dtype for layer in model] == [torch.bfloat16, None]
    assert "compute_dtype=torch.bfloat16" in repr(model[0])
    model[0](torch.randn(3, 24))
    assert copies.current(model[0].weight) is not None
    meprop.revert(model)
    assert not hasattr(model[0], "compute_dtype")
    assert copies.current(model[0].weight) is None


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


# ---------------------------------------------------------------- faults of a cold review


@pytest.mark.parametrize("module", [torch.optim, optim])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fused_optimizers_are_seen_though_they_raise_no_version(layer, name, module):
    options = {"weight_decay": 0.0} if name == "AdamW" else {}
    optimizer = getattr(module, name)(layer.parameters(), lr=0.5, fused=True, **options)
    forward(layer)
    layer.weight.grad = torch.zeros(40, 24)
    layer.weight.grad[0, 1] = 1.0  # no entry that is looked at each time
    optimizer.step()
    assert torch.equal(forward(layer), expected(layer))
    assert torch.equal(copies.of(layer.weight), layer.weight.bfloat16())


def test_a_copy_that_inference_mode_made_can_be_written_and_trained_with(layer):
    with torch.inference_mode():
        assert torch.equal(forward(layer), expected(layer))
    optimizer = optim.Adam(layer.parameters(), lr=0.1)
    forward(layer).pow(2).sum().backward()
    optimizer.step()
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(forward(layer), expected(layer))
    with torch.no_grad():
        layer.weight.mul_(2)
    with torch.inference_mode():
        assert torch.equal(forward(layer), expected(layer))


@pytest.mark.parametrize("autocast", [False, True])
def test_weights_without_version_or_memory_are_cast(autocast):
    dtype = None if autocast else torch.bfloat16
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer = meprop.nn.Linear(24, 40, rule=SPARSE, compute_dtype=dtype)
        torch.testing.assert_close(forward(layer).float(), expected(layer).float())
    layers = [meprop.nn.Linear(24, 40, rule=SPARSE, compute_dtype=dtype) for _ in range(2)]
    x, (params, _) = torch.randn(6, 24), torch.func.stack_module_state(layers)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = torch.vmap(lambda params: torch.func.functional_call(layers[0], params, (x,)))(params)
        for one, layer in zip(found, layers, strict=True):
            torch.testing.assert_close(one, layer(x), rtol=0.02, atol=0.02)  # rounded alone or in a batch


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


@pytest.mark.parametrize("backend", ["dispatched", "reference"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, -1, -0x400000])
def test_a_weight_of_nan_is_its_own_copy(layer, bits, backend, monkeypatch):
    if backend == "reference":
        monkeypatch.setattr(copies, "copy_agrees", reference.copy_agrees)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(bits, dtype=torch.int32).view(torch.float32).expand(40, 24))
    forward(layer)
    assert not made_anew(layer)


def test_compiled_layers_form_their_forward_product_in_the_dtype():
    layer = meprop.nn.Linear(24, 40, rule=meprop.TopK(5), compute_dtype=torch.bfloat16)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.ones(6, 24))
    assert torch.equal(y, layer(torch.ones(6, 24)))
    y.sum().backward()
    compiled, layer.weight.grad = layer.weight.grad, None
    layer(torch.ones(6, 24)).sum().backward()
    torch.testing.assert_close(compiled, layer.weight.grad)


@pytest.mark.parametrize("kept", [4, 40])
def test_inputs_in_half_precision_go_with_float32_weights(kept):
    layer = meprop.nn.Linear(24, 40, rule=meprop.TopK(kept), compute_dtype=torch.bfloat16)
    x = torch.randn(3, 2, 24, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.float().pow(2).sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


@pytest.mark.skipif(not meprop.backend_info()["native"], reason="needs the compiled extension")
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_our_optimizers_write_the_copy_of_a_weight_with_a_dense_gradient_too(name):
    layers = [meprop.nn.Linear(24, 40, rule=meprop.TopK(4), compute_dtype=torch.bfloat16) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    options = {"momentum": 0.9, "maximize": True} if name == "SGD" else {"maximize": True}
    ours = getattr(optim, name)(layers[0].parameters(), lr=0.01, sparse_rows="decay", **options)
    torchs = getattr(torch.optim, name)(layers[1].parameters(), lr=0.01, **options)
    for seed in range(10):
        for layer, optimizer in zip(layers, (ours, torchs), strict=True):
            optimizer.zero_grad()
            forward(layer, seed).pow(2).sum().backward()
        layers[1].weight.grad = layers[0].weight.grad.clone()
        for optimizer in (ours, torchs):
            optimizer.step()
        assert copies.current(layers[0].weight) is not None
        assert torch.equal(copies.of(layers[0].weight), layers[0].weight.bfloat16())
        torch.testing.assert_close(layers[0].weight, layers[1].weight, rtol=1e-4, atol=1e-6)
    assert ours.state[layers[0].weight].keys() == torchs.state[layers[1].weight].keys()
    ours.param_groups[0]["fused"] = False  # who asks for another implementation gets it
    before = layers[0].weight.detach().clone()
    ours.step()
    assert not torch.equal(layers[0].weight, before)
    assert copies.current(layers[0].weight) is None
    forward(layers[0])
    torchs_fused = torch.optim.Adam(layers[0].parameters(), lr=0.01, fused=True)
    forward(layers[0]).sum().backward()
    torchs_fused.step()  # after ours: no trace of it is left
    assert copies.current(layers[0].weight) is None
