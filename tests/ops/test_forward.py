"""Forward products that leave out zeros of the input, at every instruction-set level."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import GRADIENTS, LAYOUTS, NATIVE_DTYPES, bits, gradient
from meprop import ops
from meprop.ops import native

# (rows N, inputs I, outputs O): edges, widths around vectors, squares and panels, and so many inputs that copies are
# narrow at each level.
SHAPES = [
    *((0, 5, 7), (1, 1, 1), (3, 0, 5), (4, 6, 0), (5, 3, 1), (7, 65, 64), (13, 130, 40), (10, 300, 129), (64, 37, 33)),
    *((9, 16, 128), (33, 96, 257), (40, 2100, 130), (9, 4200, 70), (3, 33000, 9)),
]


def problem(shape, dtype, kind="mostly zero", seed=0):
    rows, inputs, outputs = shape
    x = gradient(kind, rows, inputs, dtype, seed)
    weight = gradient("normal", outputs, inputs, dtype, seed + 1)
    return x, weight, gradient("normal", 1, outputs, dtype, seed + 2)[0]


def skipping(x, weight, bias, most=1.0):
    """By native code, which must not decline."""
    assert most == 0 or ops.linear_forward.explain(x, weight, bias, most)[0] == "native"
    return ops.linear_forward(x, weight, bias, most)


def assert_is_product(y, x, weight, bias):
    """Whether y is the product up to rounding in float32, and to that of the result."""
    wide = x.double(), weight.double(), None if bias is None else bias.double()
    expected = F.linear(*wide)
    sizes = F.linear(wide[0].abs(), wide[1].abs(), None if bias is None else wide[2].abs())
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    rounding = 2.0**-8 * expected.abs() if x.dtype == torch.bfloat16 else 0.0
    bound = sizes * (x.shape[1] + 2) * 2.0**-23 + rounding + 1e-44
    finite = expected.isfinite() & (sizes < 3e38)
    assert y.isnan().sum() == 0
    assert ((y.double() - expected).abs() <= bound)[finite].all()


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product(level, poisoned, shape, with_bias, dtype):
    x, weight, bias = problem(shape, dtype)
    bias = bias if with_bias else None
    assert_is_product(skipping(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in GRADIENTS if "nan" not in kind and "inf" not in kind])
def test_inputs_of_every_kind(level, poisoned, kind, dtype):
    x, weight, bias = problem((19, 70, 45), dtype, kind)
    assert_is_product(skipping(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_what_is_not_finite_in_the_input_stays_so(level, dtype):
    x, weight, bias = problem((6, 40, 33), dtype)
    x[1, 3], x[2, 39], x[4] = float("nan"), float("inf"), float("nan")
    y = skipping(x, weight, bias)
    assert y[[1, 4]].isnan().all()
    assert y[2].isinf().all()
    assert_is_product(y[[0, 3, 5]], x[[0, 3, 5]], weight, bias)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_zeros_meet_no_weight(level, dtype):
    x, weight, bias = problem((6, 40, 33), dtype)
    x[:, 7], x[:, 8] = 0.0, -0.0
    expected = skipping(x, weight, bias)
    weight[:, 7:9] = float("nan")
    assert torch.equal(bits(skipping(x, weight, bias)), bits(expected))
    assert F.linear(x, weight, bias).isnan().all()


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("of_weight", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
def test_any_memory_layout(level, poisoned, of_x, of_weight, dtype):
    x, weight, bias = problem((11, 70, 52), dtype)
    expected = skipping(x, weight, bias)
    assert torch.equal(bits(skipping(LAYOUTS[of_x](x), LAYOUTS[of_weight](weight), bias)), bits(expected))
    transposed = weight.t().contiguous().t()
    assert torch.equal(bits(skipping(x, transposed, bias[:, None].repeat(1, 2)[:, 0])), bits(expected))


@pytest.mark.parametrize("level", native.levels()[:1], indirect=True)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_sums_are_formed_by_ascending_input(level, dtype):
    assert level == "scalar"
    x, weight, bias = problem((4, 60, 5), dtype)
    y = skipping(x, weight, bias)
    for n, row in enumerate(x.float()):
        for o, of_output in enumerate(weight.float()):
            total = bias[o].float()
            for i in range(60):
                if row[i] != 0:
                    total = total + row[i] * of_output[i]
            assert y[n, o] == total.to(dtype)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(200, 300, 260), (1, 4000, 500), (70, 2100, 130)])
def test_the_same_bits_with_any_number_of_threads(level, threads, shape, dtype):
    x, weight, bias = problem(shape, dtype)
    torch.set_num_threads(1)
    expected = skipping(x, weight, bias)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert torch.equal(bits(skipping(x, weight, bias)), bits(expected))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(level, data):
    shape = tuple(data.draw(st.integers(0, 140), name) for name in ("rows", "inputs", "outputs"))
    dtype = data.draw(st.sampled_from(NATIVE_DTYPES))
    x, weight, bias = problem(shape, dtype, seed=data.draw(st.integers(0, 99)))
    x = x * (torch.rand(x.shape) < data.draw(st.floats(0, 1)))
    assert_is_product(skipping(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_an_input_with_more_entries_is_torchs(level, monkeypatch, dtype):
    x, weight, bias = problem((20, 50, 30), dtype, "normal")
    x[:, ::2] = 0
    weight[:, 0] = float("nan")  # which shows whether zeros meet it
    for most, skips in [(0.0, False), (0.49, False), (0.5, True), (1.0, True)]:
        y = skipping(x, weight, bias, most)
        assert bool(y.isnan().all()) is not skips
        if not skips:
            assert torch.equal(bits(y), bits(F.linear(x, weight, bias)))


def test_what_native_code_declines_is_torchs():
    x, weight, bias = (tensor.double() for tensor in problem((5, 6, 7), torch.float32))
    assert ops.linear_forward.explain(x, weight, bias, 1.0)[0] == "reference"
    assert torch.equal(ops.linear_forward(x, weight, bias, 1.0), F.linear(x, weight, bias))
    x, weight, bias = x.float(), weight.float(), bias.float()
    assert ops.linear_forward.explain(x, weight, bias, 0.0)[0] == "reference"
    for arguments in [(x, weight[:, :5], None), (x, weight, bias[:6]), (x, weight.bfloat16(), None)]:
        assert ops.linear_forward.explain(*arguments, 1.0)[0] == "reference"
        with pytest.raises(RuntimeError):
            ops.linear_forward(*arguments, 1.0)


def test_a_graph_is_torchs():
    torch._dynamo.reset()
    x, weight, bias = problem((40, 30, 20), torch.float32)
    compiled = torch.compile(lambda *tensors: ops.linear_forward(*tensors, 1.0), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, bias), F.linear(x, weight, bias))
