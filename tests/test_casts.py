"""``copy_dtype=torch.bfloat16`` of the optimizers: weights in bfloat16 that are written by the step."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import meprop
from meprop import casts, optim
from meprop.ops import native

pytestmark = pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")

WIDTH = 1024  # a weight of 2^20 elements
OPTIMIZERS = {
    "sgd": lambda parameters, **options: optim.SGD(parameters, 0.1, momentum=0.9, **options),
    "adagrad": lambda parameters, **options: optim.Adagrad(parameters, 1e-2, **options),
    "adam": lambda parameters, **options: optim.Adam(parameters, 1e-3, weight_decay=0.01, **options),
    "adamw": lambda parameters, **options: optim.AdamW(parameters, 1e-3, **options),
}


ROWS, COLUMNS = meprop.TopK(0.05), meprop.TopK(0.05, scope="batch")


def model_of(rule=ROWS, sparse_grad=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))
    meprop.convert(model, rule, when="always", compute_dtype=torch.bfloat16, sparse_grad=sparse_grad)
    return model


def train(model, optimizer, steps=3, autocast=False):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn((4, WIDTH), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def stepped(**options):
    """A model after three steps, its large weight, and its optimizer."""
    model = model_of()
    optimizer = optim.Adam(model.parameters(), copy_dtype=torch.bfloat16, **options)
    train(model, optimizer)
    return model, model[0].weight, optimizer


def is_kept(weight):
    """Whether there is a copy for the next pass, which must then be the weight's."""
    first, second = (casts.cast(weight, torch.bfloat16) for _ in range(2))
    assert torch.equal(first, weight.detach().bfloat16())
    return first is second


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}, {"in_backward": True}])
@pytest.mark.parametrize("rule", [ROWS, meprop.Sampled(noise=0.25)])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_is_the_same_bit_for_bit(kind, rule, options):
    models = model_of(rule), model_of(rule)
    for model, more in zip(models, ({}, {"copy_dtype": torch.bfloat16}), strict=True):
        torch.manual_seed(5)
        train(model, OPTIMIZERS[kind](model.parameters(), **options, **more))
    for plain, kept in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(plain, kept)
    assert is_kept(models[1][0].weight)
    assert not is_kept(models[0][0].weight)


@pytest.mark.parametrize("sparse_rows", ["exact", "decay", "lazy"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_with_row_sparse_gradients_is_the_same_bit_for_bit(kind, sparse_rows):
    models = model_of(COLUMNS, sparse_grad=True), model_of(COLUMNS, sparse_grad=True)
    for model, more in zip(models, ({}, {"copy_dtype": torch.bfloat16}), strict=True):
        optimizer = OPTIMIZERS[kind](model.parameters(), sparse_rows=sparse_rows, **more)
        train(model, optimizer)
        with torch.no_grad():
            model[0].weight[::3] *= 2  # rows without a gradient in the next step, too
        train(model, optimizer)
    for plain, kept in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(plain, kept)
    assert is_kept(models[1][0].weight)


def test_autocast():
    models = model_of(), model_of()
    for model, more in zip(models, ({}, {"copy_dtype": torch.bfloat16}), strict=True):
        train(model, optim.Adam(model.parameters(), **more), autocast=True)
    for plain, kept in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(plain, kept)
    assert is_kept(models[1][0].weight)


def edits():
    def by_no_grad(weight):
        with torch.no_grad():
            weight[3, 5] += 1

    def of_data(weight):
        weight.data.mul_(0.5)

    def of_numpy(weight):
        weight.detach().numpy()[:] += 1

    def exchanged(weight):
        weight.data = weight.data * 3

    def narrowed(weight):
        weight.data = weight.data[:, :7].contiguous()

    def transposed(weight):
        weight.data = weight.data.t()

    return by_no_grad, of_data, of_numpy, exchanged, narrowed, transposed


@pytest.mark.parametrize("edit", edits(), ids=lambda edit: edit.__name__)
def test_a_changed_weight_is_cast(edit):
    _, weight, _ = stepped()
    assert is_kept(weight)
    edit(weight)
    assert not is_kept(weight)


@pytest.mark.parametrize("edit", edits()[:4], ids=lambda edit: edit.__name__)
def test_a_step_after_a_change_keeps_a_new_copy(edit):
    model, weight, optimizer = stepped()
    edit(weight)
    train(model, optimizer, steps=1)
    assert is_kept(weight)


def test_loaded_weights_are_cast():
    model, weight, _ = stepped()
    model.load_state_dict(model_of().state_dict())
    assert not is_kept(weight)


def test_a_pass_without_gradients_sees_every_change():
    model, weight, _ = stepped()
    x = torch.randn(2, WIDTH)
    weight.data[0, 0] += 1000  # torch counts no change, and the places compared are others
    expected = torch.nn.functional.linear(x.bfloat16(), weight.detach().bfloat16(), model[0].bias.detach().bfloat16())
    with torch.no_grad():
        assert torch.equal(model[0](x), expected.float())


def test_copies_are_of_weights_that_a_layer_casts():
    weight = nn.Parameter(torch.ones(WIDTH, WIDTH))
    optimizer = optim.Adam([weight], copy_dtype=torch.bfloat16)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert casts.kept(weight, torch.bfloat16) is None


def test_a_graph_of_make_fx_casts():
    model, weight, _ = stepped()
    x = torch.randn(2, WIDTH)
    graph = make_fx(model)(x)
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(graph(x), model(x))


def test_fake_weights_are_cast():
    with FakeTensorMode():
        model = model_of(COLUMNS)
        train(model, optim.SGD(model.parameters(), 0.1, copy_dtype=torch.bfloat16))
        assert casts.kept(model[0].weight, torch.bfloat16) is None


def test_weights_on_other_devices_have_no_copy():
    weight = torch.empty(WIDTH, WIDTH, device="meta")
    casts.cast(weight, torch.bfloat16)
    assert casts.kept(weight, torch.bfloat16) is None


def test_a_step_between_forward_and_backward_pass_is_noticed():
    model, _, optimizer = stepped()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.ones(2, WIDTH, requires_grad=True)).float().sum()
    train(model, optimizer, steps=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_copy_that_no_layer_uses_is_dropped():
    model, weight, optimizer = stepped()
    assert casts.kept(weight, torch.bfloat16) is None  # no pass since the last step
    train(model, optimizer)
    meprop.revert(model)
    train(model, optimizer, steps=1)
    assert weight not in casts._copies
    meprop.convert(model, ROWS, when="always", compute_dtype=torch.bfloat16)
    train(model, optimizer)
    assert is_kept(weight)


def test_small_weights_have_no_copy():
    model, _, _ = stepped()
    assert casts.kept(model[2].weight, torch.bfloat16) is None


def test_an_lstm():
    results = []
    for options in ({}, {"copy_dtype": torch.bfloat16}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LSTM(8, 512))
        meprop.convert(model, meprop.Sampled(noise=0.25), when="always", compute_dtype=torch.bfloat16)
        optimizer = optim.Adam(model.parameters(), **options)
        for _ in range(3):
            torch.manual_seed(1)
            model(torch.randn(4, 2, 8))[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(list(model.parameters()))
        weight = model[0].weight_hh_l0
        assert is_kept(weight) is bool(options)
        plain = copy.deepcopy(model)
        for each in weight, plain[0].weight_hh_l0:
            each.data[0, 0] += 1000  # torch counts no change, and a pass without gradients sees it all the same
        with torch.no_grad():
            x = torch.randn(4, 2, 8)
            assert torch.equal(model(x)[0], plain(x)[0])
    assert all(map(torch.equal, *results))


def test_a_convolution():
    results = []
    for options in ({}, {"copy_dtype": torch.bfloat16}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(128, 1024, 3))
        meprop.convert(model, COLUMNS, when="always", compute_dtype=torch.bfloat16)
        optimizer = optim.SGD(model.parameters(), 0.1, **options)
        for _ in range(3):
            torch.manual_seed(1)
            model(torch.randn(1, 128, 4, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(list(model.parameters()))
        assert is_kept(model[0].weight) is bool(options)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_casts(fullgraph):
    torch._dynamo.reset()
    plain, kept = model_of(), model_of()
    train(plain, optim.Adam(plain.parameters()))
    compiled = torch.compile(kept, fullgraph=fullgraph, backend="aot_eager")
    train(compiled, optim.Adam(kept.parameters(), copy_dtype=torch.bfloat16))
    for one, other in zip(plain.parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_copied_model_and_a_copied_optimizer():
    model, _, optimizer = stepped()
    other = copy.deepcopy(model)
    assert not is_kept(other[0].weight)
    assert copy.deepcopy(optimizer).copy_dtype is torch.bfloat16
    assert "copy" not in "".join(map(str, itertools.chain(*optimizer.state_dict()["state"].values())))


def test_an_optimizer_of_ones_own_that_writes_no_copy():
    class Own(optim.SGD):
        def _update(self, parameter, rows, step, group):
            parameter -= rows.values

    model, weight, _ = stepped()
    assert is_kept(weight)
    train(model, Own(model.parameters(), copy_dtype=torch.bfloat16), steps=1)
    assert not is_kept(weight)


def test_torch_does_the_steps_that_its_user_gives_it():
    _, weight, _ = stepped(fused=True)
    assert not is_kept(weight)


@pytest.mark.parametrize(("value", "error"), [(torch.float16, ValueError), ("bfloat16", TypeError)])
def test_the_argument_is_checked(value, error):
    with pytest.raises(error, match=r"copy_dtype=.*torch\.bfloat16 or None"):
        optim.Adam([nn.Parameter(torch.ones(2))], copy_dtype=value)


def test_a_group_has_none_of_its_own():
    optimizer = optim.Adam([nn.Parameter(torch.ones(2))], copy_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="copy_dtype=None in a parameter group"):
        optimizer.add_param_group({"params": [], "copy_dtype": None})
