"""Convolutions: exact forward, the channels that the rule keeps backward, in every form in which torch's are called."""

import copy
import pickle
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import meprop
from cases import bits
from meprop import functional
from meprop.functional.conv import convolution_with_policy
from meprop.functional.geometry import Geometry, padded
from meprop.ops import reference
from meprop.policy import Policy
from meprop.record import Activity, Record
from meprop.rules import Rule

BATCH = meprop.TopK(3, scope="batch")
DENSE = {1: F.conv1d, 2: F.conv2d}
SPARSE = {1: functional.conv1d, 2: functional.conv2d}

# Spatial sizes, kernel, and torch's arguments: strides, paddings and dilations even and odd, with and without a rest.
GEOMETRIES = {
    "1d": ((11,), (3,), {}),
    "1d, all arguments": ((14,), (4,), {"stride": (2,), "padding": (3,), "dilation": (3,)}),
    "1d, same with an even kernel": ((9,), (4,), {"padding": "same"}),
    "2d": ((6, 7), (3, 3), {"padding": 1}),
    "2d, valid": ((6, 7), (3, 2), {"padding": "valid"}),
    "2d, same, uneven": ((5, 6), (2, 4), {"padding": "same", "dilation": (1, 3)}),
    "2d, all arguments": ((9, 8), (3, 2), {"stride": (2, 3), "padding": (2, 1), "dilation": (2, 1)}),
    "2d, same, one number for both": ((5, 6), (3, 3), {"padding": "same", "dilation": (2,), "stride": (1,)}),
    "2d, a stride that leaves a rest": ((8, 9), (3, 3), {"stride": 3}),
    "one position": ((3, 4), (3, 4), {}),
    "pointwise": ((4, 5), (1, 1), {}),
    "pointwise, 1d": ((6,), (1,), {"padding": "same"}),
    "kernel 1 with a stride": ((5, 5), (1, 1), {"stride": 2}),
    "kernel 1 with padding": ((4, 4), (1, 1), {"padding": 1}),
}


def make(sizes, kernel, examples=3, inputs=5, outputs=17, dtype=torch.float64, channels_last=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in [(examples, inputs, *sizes), (outputs, inputs, *kernel), (outputs,)]
    )
    if channels_last:
        x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def random_like(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)


def expected_gradients(x, weight, bias, rule, grad, **arguments):
    """By torch's own convolution in float64, from an output gradient with all zero that the rule leaves out."""
    select = reference.topk_rows if rule.scope == "example" else reference.topk_columns
    rows = grad.movedim(1, -1).flatten(0, -2)
    _, indices = select(rows, rule.count(len(weight)))
    kept = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, indices.long().expand(len(rows), -1), value=True)
    sparse = torch.where(kept, rows, 0).view(len(grad), *grad.shape[2:], len(weight)).movedim(-1, 1).double()
    x, weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    output = DENSE[weight.dim() - 2](x, weight, **arguments)
    return *torch.autograd.grad(output, (x, weight), sparse), grad.double().sum([0, *range(2, grad.dim())])


def check(x, weight, bias, rule, tolerance, grad=None, **arguments) -> None:
    dims = weight.dim() - 2
    output = SPARSE[dims](x, weight, bias, rule=rule, **arguments)
    assert torch.equal(bits(output), bits(DENSE[dims](x, weight, bias, **arguments)))
    grad = random_like(output) if grad is None else grad(output)
    gradients = torch.autograd.grad(output, (x, weight, bias), grad)
    expected = expected_gradients(x, weight, bias, rule, grad, **arguments)
    for tensor, gradient, exact in zip((x, weight, bias), gradients, expected, strict=True):
        assert (gradient.dtype, gradient.shape) == (tensor.dtype, tensor.shape)
        scale = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
        torch.testing.assert_close(gradient.double(), exact, rtol=tolerance, atol=tolerance * scale)


def channels(gradient: Tensor) -> list[int]:
    """The output channels of a weight's gradient that are not zero."""
    return gradient.to_dense().flatten(1).abs().sum(1).nonzero().flatten().tolist()


# ---------------------------------------------------------------- the function


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("name", "channels_last"),
    [(name, last) for name in GEOMETRIES for last in (False, True) if not (last and "1d" in name)],
)
def test_gradients_equal_the_oracle(poisoned, name, dtype, channels_last):
    sizes, kernel, arguments = GEOMETRIES[name]
    x, weight, bias = make(sizes, kernel, dtype=dtype, channels_last=channels_last)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    check(x, weight, bias, BATCH, tolerance, **arguments)
    if name.startswith("pointwise"):
        check(x, weight, bias, meprop.TopK(3), tolerance, **arguments)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_gradients_of_any_shape_equal_the_oracle(data):
    dims = data.draw(st.sampled_from([1, 2]), "dims")

    def each(least, most, name):
        return tuple(data.draw(st.integers(least, most), name) for _ in range(dims))

    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]), "dtype")
    kernel, stride, dilation = each(1, 3, "kernel"), each(1, 3, "stride"), each(1, 2, "step")
    padding = each(0, 2, "pad")
    if (
        dtype == torch.float32
    ):  # torch's forward pass ends the process of windows that are all padding (oneDNN issue 5942)
        padding = tuple(min(pad, step * (size - 1)) for pad, step, size in zip(padding, dilation, kernel, strict=True))
    sizes = tuple(
        1 + step * (size - 1) + more for step, size, more in zip(dilation, kernel, each(0, 4, "more"), strict=True)
    )
    outputs = data.draw(st.integers(2, 40), "O")
    x, weight, bias = make(
        sizes,
        kernel,
        examples=data.draw(st.integers(0, 4), "N"),
        inputs=data.draw(st.integers(1, 6), "I"),
        outputs=outputs,
        dtype=dtype,
        channels_last=dims == 2 and data.draw(st.booleans(), "channels_last"),
    )
    rule = meprop.TopK(data.draw(st.integers(1, outputs - 1), "k"), scope="batch")
    tolerance = 1e-10 if x.dtype == torch.float64 else 1e-4
    check(x, weight, bias, rule, tolerance, stride=stride, padding=padding, dilation=dilation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["2d", "pointwise"])
def test_half_precision(name, dtype):
    sizes, kernel, arguments = GEOMETRIES[name]
    check(*make(sizes, kernel, dtype=dtype), BATCH, 4 * torch.finfo(dtype).eps, **arguments)


GRADIENTS = {
    "expanded": lambda output: torch.ones(()).to(output.dtype).expand(output.shape),
    "ties": lambda output: random_like(output).sign(),
    "zeros": torch.zeros_like,
    "transposed": lambda output: random_like(output).transpose(0, 1).contiguous().transpose(0, 1),
    "another memory format": lambda output: random_like(output).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", ["2d", "pointwise"])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_of_any_kind_and_layout(kind, name):
    sizes, kernel, arguments = GEOMETRIES[name]
    check(*make(sizes, kernel, dtype=torch.float32), BATCH, 1e-5, grad=GRADIENTS[kind], **arguments)


@pytest.mark.parametrize("channels_last", [False, True])
def test_nan_is_never_hidden(channels_last):
    x, weight, _ = make((4, 4), (3, 3), dtype=torch.float32, channels_last=channels_last)
    output = functional.conv2d(x, weight, rule=meprop.TopK(1, scope="batch"))
    grad = random_like(output).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    grad[1, 9, 0, 1] = float("nan")
    (grad_weight,) = torch.autograd.grad(output, weight, grad)
    assert channels(grad_weight.nan_to_num(1.0)) == [9]
    assert grad_weight[9].isnan().any()


@pytest.mark.parametrize("k", [17, 1.0])
def test_keeping_everything_is_torch_bit_for_bit(k):
    x, weight, bias = make((6, 7), (3, 3), dtype=torch.float32)
    outputs = (
        functional.conv2d(x, weight, bias, padding=1, rule=meprop.TopK(k, scope="batch")),
        F.conv2d(x, weight, bias, padding=1),
    )
    ours, theirs = (torch.autograd.grad(output, (x, weight, bias), random_like(output)) for output in outputs)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(ours, theirs, strict=True))


class Halves(meprop.Rule):
    """A rule of somebody's own: every other channel, halved; of the batch, or of each position."""

    def __init__(self, columns):
        self.columns = columns

    def count(self, features):
        return features // 2

    def select(self, grad_output_NO):
        rows, width = grad_output_NO.shape
        indices = torch.arange(0, width - 1, 2, dtype=torch.int32)
        values = grad_output_NO[:, indices.long()] / 2
        if self.columns:
            return meprop.ColumnSelection(values, indices, width)
        return meprop.RowSelection(values, indices.expand(rows, -1), width)


@pytest.mark.parametrize(("name", "columns"), [("2d", True), ("pointwise", True), ("pointwise", False)])
def test_a_rule_of_ones_own_is_multiplied_like_topk(name, columns):
    sizes, kernel, arguments = GEOMETRIES[name]
    x, weight, bias = make(sizes, kernel)
    output = functional.conv2d(x, weight, bias, rule=Halves(columns), **arguments)
    grad = random_like(output)
    kept = grad.clone() / 2
    kept[:, 1::2] = 0
    kept[:, 16] = 0
    ours = torch.autograd.grad(output, (x, weight, bias), grad)
    exact = torch.autograd.grad(F.conv2d(x, weight, bias, **arguments), (x, weight), kept)
    for a, b in zip(ours, (*exact, grad.sum((0, 2, 3))), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["2d", "pointwise"])
def test_channels_are_kept_in_each_of_several_blocks(name):
    sizes, kernel, arguments = GEOMETRIES[name]
    x, weight, bias = make(sizes, kernel, outputs=20)
    rule = meprop.InBlocks(meprop.TopK(2, scope="batch"), 4)
    output = functional.conv2d(x, weight, bias, rule=rule, **arguments)
    grad = random_like(output)
    rows = grad.movedim(1, -1)
    kept = rule.select(rows.flatten(0, -2)).to_dense().view(rows.shape).movedim(-1, 1)
    ours = torch.autograd.grad(output, (x, weight), grad)
    exact = torch.autograd.grad(F.conv2d(x, weight, bias, **arguments), (x, weight), kept)
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.tensor(channels(ours[1])).div(5, rounding_mode="floor").bincount().tolist() == [2] * 4


def test_a_choice_at_each_position_is_for_pointwise_convolutions():
    x, weight, bias = make((6, 7), (3, 3))
    for arguments in ({}, {"padding": 1}, {"stride": 2}):
        with pytest.raises(meprop.NotSupportedError, match=r"TopK\(k=3, scope='example'\).*position.*scope='batch'"):
            functional.conv2d(x, weight, bias, rule=meprop.TopK(3), **arguments)
    with pytest.raises(meprop.NotSupportedError, match="pointwise"):
        functional.conv2d(x, weight, bias, rule=Halves(columns=False)).sum().backward()


@pytest.mark.parametrize("name", ["2d", "pointwise", "1d"])
def test_a_row_sparse_gradient_is_the_dense_one_without_its_zero_rows(name):
    sizes, kernel, arguments = GEOMETRIES[name]
    for dtype in (torch.float64, torch.float32):
        x, weight, bias = make(sizes, kernel, dtype=dtype)
        gradients = []
        for sparse_grad in (False, True):
            output = SPARSE[len(sizes)](x, weight, bias, rule=BATCH, sparse_grad=sparse_grad, **arguments)
            gradients.append(torch.autograd.grad(output, weight, random_like(output))[0])
        dense, sparse = gradients
        assert sparse.layout == torch.sparse_coo
        assert sparse.is_coalesced()
        assert sparse._indices().tolist() == [channels(dense)]
        assert sparse._values().shape == (3, *weight.shape[1:])
        assert torch.equal(sparse.to_dense(), dense)
    with pytest.raises(ValueError, match="scope='batch'"):
        functional.conv2d(x, weight, rule=meprop.TopK(3), sparse_grad=True)


@pytest.mark.parametrize("name", ["2d", "pointwise"])
@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_what_needs_no_gradient_is_not_computed(monkeypatch, name, needed):
    sizes, kernel, arguments = GEOMETRIES[name]
    tensors = make(sizes, kernel, dtype=torch.float32)
    for tensor, needs in zip(tensors, needed, strict=True):
        tensor.requires_grad_(needs)
    asked = []
    convolve, multiply = Geometry.gradients, meprop.ops.backward_with

    def record_convolution(self, grad, x, weight, needs):
        asked.append(needs[:2])
        return convolve(self, grad, x, weight, needs)

    def record_product(choice, grad, weight, x, *others):
        asked.append((weight is not None, x is not None))
        return multiply(choice, grad, weight, x, *others)

    monkeypatch.setattr(Geometry, "gradients", record_convolution)
    monkeypatch.setattr(meprop.ops, "backward_with", record_product)
    output = functional.conv2d(*tensors, rule=BATCH, **arguments)
    if needed[:2] == (True, False):
        assert output.grad_fn.saved_tensors[0] is None  # the input of a frozen layer is not kept in memory
    grad = random_like(output)
    output.backward(grad)
    assert asked == ([needed[:2]] if any(needed[:2]) else [])  # a bias alone is left to torch
    for tensor, needs, exact in zip(
        tensors, needed, expected_gradients(*tensors, BATCH, grad, **arguments), strict=True
    ):
        assert (tensor.grad is None) == (not needs)
        if needs:
            torch.testing.assert_close(tensor.grad.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["2d", "pointwise", "1d"])
def test_unbatched_input(name):
    sizes, kernel, arguments = GEOMETRIES[name]
    x, weight, bias = make(sizes, kernel, examples=1)
    results = []
    for each in (x, x[0]):
        output = SPARSE[len(sizes)](each, weight, bias, rule=BATCH, **arguments)
        gradients = torch.autograd.grad(output, (x, weight, bias), random_like(output))
        results.append([output.reshape(-1), *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for k in (3, 17):  # with 17 everything is kept, and the call is torch's
        for requires_grad in (False, True):
            for autocast in (False, True):
                with torch.set_grad_enabled(requires_grad), torch.autocast("cpu", enabled=autocast):
                    rule = meprop.TopK(k, scope="batch")
                    ours = SPARSE[len(sizes)](x[0], weight, bias, rule=rule, **arguments)
                    assert torch.equal(bits(ours), bits(DENSE[len(sizes)](x[0], weight, bias, **arguments)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["2d", "pointwise", "kernel 1 with a stride"])
def test_the_memory_format_is_kept(name, frozen):
    sizes, kernel, arguments = GEOMETRIES[name]
    x, weight, bias = make(sizes, kernel, dtype=torch.float32, channels_last=True)
    weight = weight.detach().contiguous().requires_grad_(not frozen)
    output = functional.conv2d(x, weight, bias, rule=BATCH, **arguments)
    grad = random_like(output).contiguous(memory_format=torch.channels_last)
    (grad_x,) = torch.autograd.grad(output, x, grad)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert grad_x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("scope", ["batch", "example"])
def test_a_pointwise_gradient_has_the_strides_of_its_weight(scope):
    """Which DistributedDataParallel asks for, also in dimensions of one entry."""
    x = torch.randn(3, 5, 4, 5)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        layer = meprop.nn.Conv2d(5, 17, 1, rule=meprop.TopK(3, scope=scope)).to(memory_format=memory_format)
        layer(x).square().sum().backward()
        assert layer.weight.grad.stride() == layer.weight.stride()
    assert layer.weight.stride() == (5, 1, 5, 5)
    sliced = torch.randn(17, 9, 1, 1)[:, ::2].requires_grad_()
    functional.conv2d(x, sliced, rule=meprop.TopK(3, scope=scope)).square().sum().backward()
    assert sliced.grad.shape == sliced.shape


@pytest.mark.parametrize("name", ["2d", "pointwise"])
def test_the_same_inputs_give_the_same_bits(name):
    sizes, kernel, arguments = GEOMETRIES[name]

    def gradients():
        x, weight, bias = make(sizes, kernel, examples=9, inputs=20, outputs=70, dtype=torch.float32)
        output = functional.conv2d(x, weight, bias, rule=meprop.TopK(7, scope="batch"), **arguments)
        return [bits(gradient) for gradient in torch.autograd.grad(output, (x, weight, bias), random_like(output))]

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("name", ["2d", "pointwise"])
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters(name, sparse_grad):
    sizes, kernel, arguments = GEOMETRIES[name]
    x, weight, bias = make(sizes, kernel, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = functional.conv2d(x, weight, bias, rule=BATCH, sparse_grad=sparse_grad, **arguments)
        assert torch.equal(bits(output), bits(F.conv2d(x, weight, bias, **arguments)))
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert {tensor.grad.dtype for tensor in (x, weight, bias)} == {torch.float32}
    assert len(channels(weight.grad)) == 3
    assert weight.grad.is_sparse == sparse_grad


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compute_dtype_is_that_of_the_forward_product_alone(requires_grad):
    x, weight, bias = make((6, 7), (3, 3), dtype=torch.float32)
    for tensor in (x, weight, bias):
        tensor.requires_grad_(requires_grad)
    output = functional.conv2d(x, weight, bias, rule=BATCH, compute_dtype=torch.bfloat16)
    narrow = F.conv2d(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).float()
    assert torch.equal(output, narrow)
    if requires_grad:
        grad = random_like(output)
        gradients = torch.autograd.grad(output, (x, weight, bias), grad)
        for gradient, exact in zip(gradients, expected_gradients(x, weight, bias, BATCH, grad), strict=True):
            torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("k", [3, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["2d", "pointwise"])
def test_compute_dtype_takes_inputs_of_another_dtype_than_the_weights(name, dtype, k):
    sizes, kernel, arguments = GEOMETRIES[name]
    x, weight, bias = make(sizes, kernel, dtype=torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    rule = meprop.TopK(k, scope="batch")
    output = functional.conv2d(x, weight, bias, rule=rule, compute_dtype=torch.bfloat16, **arguments)
    assert output.dtype == dtype
    grad = random_like(output)
    gradients = torch.autograd.grad(output, (x, weight, bias), grad)
    exact = expected_gradients(x, weight, bias, rule, grad, **arguments)
    for tensor, gradient, expected in zip((x, weight, bias), gradients, exact, strict=True):
        assert gradient.dtype == tensor.dtype
        tolerance = 4 * torch.finfo(tensor.dtype).eps + 1e-5
        torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(
    ("name", "channels_last", "backend"),
    [
        *product(("2d", "pointwise"), (False, True), ("aot_eager",)),
        *(("2d", False, "inductor"), ("2d", True, "inductor")),
    ],
)
def test_compiled_gradients_are_as_sparse_as_eager_ones(name, backend, channels_last):
    torch._dynamo.reset()
    sizes, kernel, arguments = GEOMETRIES[name]

    def loss(x, weight, bias):
        return functional.conv2d(x, weight, bias, rule=BATCH, **arguments).sin().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        tensors = make(sizes, kernel, dtype=torch.float32, channels_last=channels_last)
        results.append(torch.autograd.grad(function(*tensors), tensors))
    assert len(channels(results[0][1])) == 3
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_compile_refuses_sparse_gradients():
    torch._dynamo.reset()
    x, weight, bias = make((6, 7), (3, 3))

    def run(x):
        return functional.conv2d(x, weight, bias, rule=BATCH, sparse_grad=True)

    with pytest.raises((meprop.NotSupportedError, torch._dynamo.exc.Unsupported), match="sparse_grad=True"):
        torch.compile(run, fullgraph=True, backend="aot_eager")(x)


def test_what_is_not_supported_raises_by_name():
    x, weight, bias = make((6, 7), (3, 3))
    with pytest.raises(meprop.NotSupportedError, match=r"create_graph=True.*revert"):
        torch.autograd.grad(functional.conv2d(x, weight, rule=BATCH).sum(), x, create_graph=True)
    with pytest.raises(meprop.NotSupportedError, match="groups=5"):
        functional.conv2d(x, weight[:, :1], bias, groups=5, rule=BATCH)
    with pytest.raises(TypeError, match=r"rule=3.*meprop\.TopK"):
        functional.conv2d(x, weight, rule=3)
    with pytest.raises(TypeError, match="complex64"):
        functional.conv2d(x, weight.to(torch.complex64), rule=BATCH)
    with pytest.raises(ValueError, match=r"weight is \[17, 5, 3, 3\]; that of a conv1d has 3"):
        functional.conv1d(x, weight, rule=BATCH)
    with pytest.raises(ValueError, match="padding='same' with stride"):
        functional.conv2d(x, weight, padding="same", stride=2, rule=BATCH)
    with pytest.raises(ValueError, match="padding='full'"):
        functional.conv2d(x, weight, padding="full", rule=BATCH)


@pytest.mark.parametrize(("name", "scope"), [("2d", "batch"), ("pointwise", "batch"), ("pointwise", "example")])
@pytest.mark.parametrize("k", [3, 40])
def test_an_example_hits_a_channel_where_any_of_its_positions_does(name, k, scope):
    """Also with k above the number of channels, where everything is selected."""
    sizes, kernel, arguments = GEOMETRIES[name]
    rule, activity = meprop.TopK(k, scope=scope), Activity.of_units(17)
    x, weight, bias = make(sizes, kernel, dtype=torch.float32)
    stride = (1, 1)
    x_, geometry = padded(x, weight.shape[2:], stride, arguments.get("padding", 0), stride)
    results = []
    for counts in ((), (activity,)):
        policy = Policy(rule, record=Record(activities=counts))
        output = convolution_with_policy(x_, weight, bias, geometry, policy)
        grad = random_like(output).relu() * (torch.arange(17) % 4 > 0).view(-1, 1, 1)
        grad[0, 5:] = 0
        results.append(torch.autograd.grad(output, (x, weight, bias), grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    selected = rule.select(grad.movedim(1, -1).flatten(0, -2)).to_dense().view(3, -1, 17)
    assert torch.equal(activity.hits, (selected != 0).any(dim=1).sum(dim=0))
    assert 0 < activity.hits.sum() < 3 * 17
    assert activity.examples == 3


# ---------------------------------------------------------------- the layers

LAYERS = {
    "1d": (nn.Conv1d, meprop.nn.Conv1d, (5, 17, 3), {"padding": 2, "stride": 2}, (2, 5, 9)),
    "2d": (nn.Conv2d, meprop.nn.Conv2d, (5, 17, 3), {"padding": "same", "bias": False}, (2, 5, 6, 7)),
    **{
        mode: (nn.Conv2d, meprop.nn.Conv2d, (5, 17, (3, 2)), {"padding": (2, 1), "padding_mode": mode}, (2, 5, 6, 7))
        for mode in ("reflect", "replicate", "circular")
    },
    "circular, same": (
        nn.Conv1d,
        meprop.nn.Conv1d,
        (5, 17, 4),
        {"padding": "same", "padding_mode": "circular"},
        (5, 9),
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_torchs_in_all_but_the_backward_pass(name):
    plain, sparse, sizes, options, shape = LAYERS[name]
    torch.manual_seed(0)
    theirs = plain(*sizes, **options)
    torch.manual_seed(0)
    ours = sparse(*sizes, **options, rule=BATCH)
    assert isinstance(ours, plain)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))
    x = torch.randn(shape, requires_grad=True)
    assert torch.equal(ours(x), theirs(x))
    grad = random_like(ours(x))
    rows = grad.unsqueeze(0) if x.dim() == ours.weight.dim() - 1 else grad
    _, indices = reference.topk_channels(rows, 3)
    mask = torch.zeros(17).index_fill_(0, indices.long(), 1.0).view(-1, *[1] * (ours.weight.dim() - 2))
    expected = torch.autograd.grad(theirs(x), (x, theirs.weight), grad * mask)
    for one, other in zip(torch.autograd.grad(ours(x), (x, ours.weight), grad), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert repr(ours) == repr(theirs)[:-1] + ", rule=TopK(k=3, scope='batch'))"


def test_the_rule_and_the_form_of_a_layer_are_checked():
    with pytest.raises(TypeError, match="rule"):
        meprop.nn.Conv2d(3, 20, 3)
    with pytest.raises(TypeError, match=r"rule=0\.05"):
        meprop.nn.Conv2d(3, 20, 3, rule=0.05)
    with pytest.raises(meprop.NotSupportedError, match=r"groups=3.*torch\.nn\.Conv2d"):
        meprop.nn.Conv2d(3, 21, 3, groups=3, rule=BATCH)
    for options in ({"kernel_size": 3}, {"kernel_size": 1, "stride": 2}, {"kernel_size": 1, "padding": 1}):
        with pytest.raises(meprop.NotSupportedError, match="scope='batch'"):
            meprop.nn.Conv1d(3, 20, **options, rule=meprop.TopK(3))
    meprop.nn.Conv1d(3, 20, 1, padding="same", rule=meprop.TopK(3))
    with pytest.raises(ValueError, match="compute_dtype"):
        meprop.nn.Conv2d(3, 20, 3, rule=BATCH, compute_dtype=torch.float16)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_keep_rule_and_gradient(duplicate):
    layer = meprop.nn.Conv2d(3, 20, 3, rule=BATCH)
    twin, x = duplicate(layer), torch.randn(2, 3, 5, 5)
    for each in (layer, twin):
        each(x).square().sum().backward()
    assert twin.rule == BATCH
    assert len(channels(twin.weight.grad)) == 3
    assert torch.equal(layer.weight.grad, twin.weight.grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(use_reentrant):
    layer, x = meprop.nn.Conv2d(3, 20, 3, rule=BATCH), torch.randn(2, 3, 5, 5, requires_grad=True)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        layer.zero_grad()
        run(x).square().sum().backward()
        gradients.append(layer.weight.grad)
    assert len(channels(gradients[0])) == 3
    assert torch.equal(*gradients)


@pytest.mark.parametrize("sparse_rows", ["exact", "decay"])
def test_row_sparse_gradients_train_as_dense_ones_do(sparse_rows):
    """With the optimizer that leaves sleeping rows alone, only the kept channels move."""
    runs = []
    for sparse_grad in (False, True):
        torch.manual_seed(0)
        layer = meprop.nn.Conv2d(3, 20, 3, rule=BATCH, sparse_grad=sparse_grad)
        optimizer = meprop.optim.Adam(layer.parameters(), lr=1e-2, sparse_rows=sparse_rows)
        for seed in range(3):
            x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            before = layer.weight.detach().clone()
            optimizer.step()
            moved = channels(layer.weight.detach() - before)
            assert len(moved) == 3 or not (sparse_grad and sparse_rows == "decay")
        runs.append(layer.weight.detach())
    if sparse_rows == "exact":
        torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)


class Nothing(meprop.Rule):
    scope = "batch"

    def select(self, grad_output_NO):
        none = torch.zeros(0, dtype=torch.int32)
        return meprop.ColumnSelection(grad_output_NO[:, :0], none, grad_output_NO.shape[1])


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_a_rule_may_keep_no_channel(kernel, sparse_grad):
    layer = meprop.nn.Conv2d(2, 5, kernel, rule=Nothing(), sparse_grad=sparse_grad)
    layer.activity = Activity.of_units(5)
    x = torch.randn(3, 2, 4, 4, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert not x.grad.any()
    assert not layer.weight.grad.to_dense().any()
    assert torch.equal(layer.bias.grad, torch.full((5,), float(output[:, 0].numel())))
    assert layer.activity.examples == 3
    assert not layer.activity.hits.any()


def test_a_rule_that_the_layer_cannot_have_is_refused_when_it_is_set():
    layer = meprop.nn.Conv2d(2, 5, 3, rule=BATCH)
    with pytest.raises(meprop.NotSupportedError, match=r"position.*scope='batch'"):
        layer.rule = meprop.TopK(3)
    assert layer.rule == BATCH


def test_a_watched_pointwise_convolution_asks_its_rule_once():
    """A rule that draws would else use up random numbers for a selection that nobody takes."""

    class Counted(Rule):
        asked = 0

        def select(self, grad_output_NO):
            self.asked += 1
            return meprop.RandomK(2).select(grad_output_NO)

    rule, activity = Counted(), Activity.of_units(17)
    layer = meprop.nn.Conv2d(3, 17, 1, rule=rule)
    layer.activity = activity
    layer(torch.randn(2, 3, 4, 4)).sum().backward()
    assert rule.asked == 1
    assert activity.examples == 2
