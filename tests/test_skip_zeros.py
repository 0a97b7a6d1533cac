"""Layers that leave zeros of their input out of the forward product."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import meprop
from meprop import ops, speed
from meprop.cli import main
from meprop.functional.linear import ForwardShape
from meprop.ops.native import reason_missing

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason="there are no native kernels here")

RULE = meprop.TopK(5)


@pytest.fixture(autouse=True)
def _measured(monkeypatch, tmp_path):
    """Leaving out zeros is as fast as dense at half of the entries, unless a test says otherwise."""
    monkeypatch.setenv("MEPROP_CACHE", str(tmp_path))
    monkeypatch.setattr(speed, "measure", lambda kept, shape: (100.0, {0.1: 20.0, 0.4: 80.0}.get(kept, 50.0)))
    speed._most_nonzeros.cache_clear()
    yield
    speed._most_nonzeros.cache_clear()


@pytest.fixture
def products(monkeypatch):
    """The arguments of each product that may leave out zeros."""
    found = []
    monkeypatch.setattr(ops, "linear_forward", lambda *args: found.append(args) or F.linear(*args[:3]))
    return found


def tensors(*shape: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 24, generator=generator).relu() * (torch.rand(*shape, 24, generator=generator) < 0.5)
    weight, bias = torch.randn(40, 24, generator=generator), torch.randn(40, generator=generator)
    return x.to(dtype), weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(64,), (4, 16), (2, 2, 16)])
def test_outputs_are_torchs_up_to_rounding_and_gradients_are_the_same_bits(shape, dtype):
    x, weight, bias = tensors(*shape, dtype=dtype)
    inputs = x.requires_grad_(), weight, bias
    y = meprop.functional.linear(*inputs, rule=RULE, skip_zeros=True)
    expected = meprop.functional.linear(*inputs, rule=RULE)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected)
    grad = torch.randn(y.shape).to(dtype)
    found, wanted = (torch.autograd.grad(each, inputs, grad) for each in (y, expected))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("autocast", [False, True])
def test_products_in_bfloat16(autocast, products):
    x, weight, bias = tensors(64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = meprop.functional.linear(x, weight, bias, rule=RULE, compute_dtype=torch.bfloat16, skip_zeros=True)
    assert [each.dtype for each in products[0][:3]] == [torch.bfloat16] * 3
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)


def test_zeros_are_left_out_by_native_code():
    x, weight, bias = tensors(64)
    x[:, 3] = 0
    with torch.no_grad():
        weight[:, 3] = float("nan")  # which shows it
    assert meprop.functional.linear(x, weight, bias, rule=RULE, skip_zeros=True).isfinite().all()
    assert meprop.functional.linear(x, weight, bias, rule=RULE).isnan().all()


def test_from_which_share_on_is_measured_once_for_numbers_of_rows_that_are_alike(products, monkeypatch):
    asked = []
    monkeypatch.setattr(speed, "measure", lambda share, shape: asked.append((share, shape)) or (1.0, 2 * share))
    x, weight, bias = tensors(1000)
    for rows in (64, 64, 100, 127, 33, 31, 1, 128, 1000):
        meprop.functional.linear(x[:rows], weight, bias, rule=RULE, skip_zeros=True)
    rows = [64, 64, 32, 32, 128, 128, 256, 256]
    assert [(share, shape.rows) for share, shape in asked] == list(zip([0.1, 0.4] * 4, rows, strict=True))
    assert [len(each[0]) for each in products] == [64, 64, 100, 127, 33, 128, 1000]
    assert all(each[3] == pytest.approx(0.5 / 1.05) for each in products)
    speed._most_nonzeros.cache_clear()  # another process reads it from the disk
    meprop.functional.linear(x[:64], weight, bias, rule=RULE, skip_zeros=True)
    assert len(asked) == 8


@pytest.mark.parametrize(
    ("few", "many", "most"),
    [
        (0.2, 0.8, 0.1 + (1 / 1.05 - 0.2) * 0.5),
        (0.1, 0.2, 1.0),
        (0.5, 0.5, 0.4),
        (0.6, 0.5, 0.4),
        (1.3, 1.2, 0.0),
        (1.1, 1.7, 0.1 + (1 / 1.05 - 1.1) * 0.5),
        (2.0, 2.3, 0.0),
    ],
)
def test_the_largest_share_is_on_a_line(few, many, most, monkeypatch):
    monkeypatch.setattr(speed, "measure", lambda kept, shape: (100.0, 100 * {0.1: few, 0.4: many}[kept]))
    shape = ForwardShape(64, 24, 40, torch.float32)
    assert speed.most_nonzeros(shape) == pytest.approx(max(0.0, most))


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_measured(transposed):
    shape = ForwardShape(64, 24, 40, torch.bfloat16, transposed)
    dense, skipping = shape.passes(0.25)
    y = dense()
    assert y.shape == (64, 40)
    torch.testing.assert_close(skipping(), y)
    x, weight = skipping.args[:2]
    assert (x != 0).float().mean() == pytest.approx(0.25, abs=0.05)
    assert weight.is_contiguous() is not transposed
    assert ("transposed" in str(shape)) is transposed


def test_a_weight_that_lies_in_memory_as_its_transpose(products):
    x, weight, bias = tensors(64)
    weight = weight.detach().t().contiguous().requires_grad_()
    meprop.functional.linear(x, weight.t(), bias, rule=RULE, skip_zeros=True)
    assert len(products) == 1


def test_passes_without_gradients_are_torchs(products):
    layer = meprop.nn.Linear(24, 40, rule=RULE, skip_zeros=True)
    x = tensors(64)[0]
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not products
    layer(x)
    assert len(products) == 1


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_layers_that_keep_everything_and_layers_measured_to_be_dense_leave_out_zeros_too(compute_dtype, products):
    x = tensors(64)[0]
    for rule in (meprop.TopK(40), RULE):
        model = nn.Sequential(nn.Linear(24, 40))
        report = meprop.convert(model, rule, min_features=1, skip_zeros=True, compute_dtype=compute_dtype)
        assert "zeros of the input may be left out: '0'" in str(report)
        model[0].decision = speed.Decision(False, 64, 1.0, 2.0)
        before = len(products)
        y = model(x)
        assert len(products) == before + 1
        found = torch.autograd.grad(y.sum(), model[0].weight)[0]
        torch.testing.assert_close(found, torch.ones(64, 40).t() @ x)


def test_convert_and_the_attribute():
    model = nn.Sequential(nn.Linear(24, 200), nn.ReLU(), nn.Linear(200, 200))
    meprop.convert(model, RULE, skip_zeros=True)
    assert [model[0].skip_zeros, model[2].skip_zeros] == [True, True]
    assert "skip_zeros=True" in repr(model[0])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[2].skip_zeros
    model[0].skip_zeros = False
    assert "skip_zeros" not in repr(model[0])
    meprop.convert(model, RULE)
    assert not model[2].skip_zeros


@pytest.mark.parametrize("wrong", [1, None, "yes"])
def test_what_is_not_a_bool_is_refused(wrong):
    x, weight, bias = tensors(64)
    calls = [
        lambda: meprop.functional.linear(x, weight, bias, rule=RULE, skip_zeros=wrong),
        lambda: meprop.nn.Linear(24, 40, rule=RULE, skip_zeros=wrong),
        lambda: meprop.convert(nn.Linear(24, 200), RULE, skip_zeros=wrong),
        lambda: setattr(meprop.nn.Linear(24, 40, rule=RULE), "skip_zeros", wrong),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"skip_zeros=.*must be True or False"):
            call()


def test_activation_checkpointing():
    layer = meprop.nn.Linear(24, 40, rule=RULE, skip_zeros=True)
    x = tensors(64)[0].requires_grad_()
    found, wanted = (
        torch.autograd.grad(y.sin().sum(), [x, layer.weight])
        for y in (checkpoint(layer, x, use_reentrant=False), layer(x))
    )
    assert all(map(torch.equal, found, wanted))


def test_torch_compile_takes_torchs_own_product():
    torch._dynamo.reset()
    layer = meprop.nn.Linear(24, 40, rule=RULE, skip_zeros=True)
    x = tensors(64)[0]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias))
    y.sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv2d(4, 40, 3), (64, 4, 6, 6)), (nn.Linear(24, 40).double(), (64, 24)), (nn.Linear(24, 40), (31, 24))],
    ids=["convolution", "float64", "few rows"],
)
def test_a_dense_pass_that_leaves_out_nothing_is_torchs_own(layer, shape, products):
    model = nn.Sequential(copy.deepcopy(layer))
    meprop.convert(model, meprop.TopK(0.1, scope="batch"), min_features=1, skip_zeros=True)
    model[0].decision = speed.Decision(False, 64, 1.0, 2.0)
    x = torch.randn(shape, dtype=layer.weight.dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)  # which our own refuses
    grad.sum().backward()
    torch.func.vmap(model)(x[:, None])
    assert not products


def test_without_native_code_nothing_is_measured(products, monkeypatch):
    of_layer = sys.modules["meprop.functional.linear"]  # the package has a function of this name
    monkeypatch.setattr(of_layer, "reason_missing", lambda: "there is no compiler")
    monkeypatch.setattr(speed, "most_nonzeros", lambda shape: pytest.fail("measured"))
    layer = meprop.nn.Linear(24, 40, rule=RULE, skip_zeros=True)
    x = tensors(64)[0]
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not products


def test_a_transform_of_a_dense_layer_is_torchs_own(products):
    layer = meprop.nn.Linear(24, 40, rule=meprop.TopK(40), skip_zeros=True)
    x = tensors(64)[0]
    torch.func.grad(lambda weight: F.linear(x, weight).sum() + layer(x).sum())(torch.randn(40, 24))
    torch.func.jacrev(lambda x: layer(x).sum(dim=0))(x)
    assert not products


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 40, 3), nn.LSTM(24, 40), nn.MultiheadAttention(40, 4)], ids=repr)
def test_other_kinds_of_layers_do_not_get_the_option(layer):
    model = nn.Sequential(copy.deepcopy(layer))
    report = meprop.convert(model, meprop.TopK(0.1, scope="batch"), min_features=1, skip_zeros=True)
    assert report.skipping == ()
    assert not model[0].skip_zeros
    with pytest.raises(meprop.NotSupportedError, match="linear layers have this option"):
        model[0].skip_zeros = True


WRITTEN_MEANWHILE = """
import threading, torch
from meprop import ops
x = torch.zeros(4096, 1024)
x[:, ::64] = 1
few, many, weight = x.clone(), torch.ones_like(x), torch.randn(8, 1024)
done = threading.Event()
def write():
    while not done.is_set():
        x.copy_(many)
        x.copy_(few)
writer = threading.Thread(target=write)
writer.start()
for _ in range(100):
    assert ops.linear_forward(x, weight, None, 1.0).shape == (4096, 8)
done.set()
writer.join()
"""


def test_an_input_that_is_written_to_meanwhile_gives_some_number():
    """In a process of its own, which breaks where entries are counted and then written without a bound."""
    subprocess.run([sys.executable, "-c", WRITTEN_MEANWHILE], check=True, timeout=300)


def test_a_model_trains_alike():
    def losses(skip_zeros: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 3))
        meprop.convert(model, meprop.Sampled(0.1), skip_zeros=skip_zeros)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        x, labels, found = torch.randn(64, 24), torch.randint(0, 3, (64,)), []
        for _ in range(30):
            loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    found, wanted = losses(True), losses(False)
    assert found[-1] < 0.5 * found[0]
    assert found[:5] == pytest.approx(wanted[:5], rel=1e-3)


def test_the_command_line(small_mnist, tmp_path, products, no_drawing, capsys):
    common = ["--data-dir", str(small_mnist), "--epochs", "1", "--batch-size", "40", "--dev-size", "20"]
    assert main(["train", "mnist", *common, "--skip-zeros", "--out", str(tmp_path / "run")]) in (0, None)
    assert products
    before = len(products)
    assert main(["train", "mnist", *common, "--rule", "dense", "--skip-zeros"]) not in (0, None)
    assert "--skip-zeros: --rule dense keeps everything" in capsys.readouterr().err
    assert len(products) == before
