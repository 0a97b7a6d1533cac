"""Activations with dropout: native against the literal reference, and the reference against torch's autograd."""

from itertools import product

import pytest
import torch

from cases import NATIVE_DTYPES, bits
from meprop import ops
from meprop.ops import activation as family
from meprop.ops import native

pytestmark = pytest.mark.usefixtures("threads")  # restores them

ACTIVATIONS = list(family.FUNCTIONS)
PROBABILITIES = [0.1, 0.5, 0.97, 1 - 1e-9, 1e-9]
SIZES = [0, 1, 7, 63, 64, 65, 128, 1000, 17_000]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7}

# What a tensor [*, 2, 3, 4] of the right number of entries can lie like in memory.
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "expanded": lambda x: x[..., :1].expand(x.shape),
    "negative bit": lambda x: torch.complex(x.float(), -x.float()).conj().imag if x.dtype == torch.float32 else x,
}


def contents(size, dtype):
    x = 3 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    for place, value in enumerate((float("nan"), float("inf"), 0.0, -0.0, 50.0, -50.0, 1e-30, -1e-30, 1e15, -1e15)):
        x[place * 5 : place * 5 + 2] = value
    return x.to(dtype)


def gradient_of(run, grad, x, words, activation, p, stride):
    return run(grad, x if family.needs_input(activation) else None, words, activation, p, stride)


def close(found, expected, factor, p):
    """Errors are relative to the results, and to what a kept entry of `factor` is multiplied by."""
    assert torch.equal(found.isfinite(), expected.isfinite())  # NaN in one may be infinity in the other
    tolerance = TOLERANCE[found.dtype] * (
        expected.abs() + factor.nan_to_num().abs() * 65536 / (65536 - family.dropped_of(p))
    )
    assert ((found - expected).abs() <= tolerance)[expected.isfinite()].all()


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_native_is_the_reference(level, poisoned, activation, dtype):
    for case, (size, _) in enumerate(product(SIZES, range(2))):
        x, key = contents(size, dtype), 2**61 + 12345 * case
        p = PROBABILITIES[case % 5]
        torch.set_num_threads(1 + case % 3)
        (y, words), (expected, expected_words) = (
            run(x, activation, p, key) for run in (native.backend.activation_dropout, ops.activation_dropout.literally)
        )
        assert torch.equal(words, expected_words)
        close(y, expected, x, p)
        grad = contents(size, dtype).flip(0)
        found, wanted = (
            gradient_of(run, grad, x, words, activation, p, (1,))
            for run in (native.backend.activation_dropout_gradient, ops.activation_dropout_gradient.literally)
        )
        close(found, wanted, grad, p)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_native_is_the_reference_for_every_layout(level, activation, layout):
    x = LAYOUTS[layout](contents(5 * 24, torch.float32).nan_to_num(posinf=1.0).view(5, 2, 3, 4))
    (y, words), (expected, expected_words) = (
        run(x, activation, 0.4, 99) for run in (native.backend.activation_dropout, ops.activation_dropout.literally)
    )
    assert torch.equal(words, expected_words)
    assert y.stride() == expected.stride() == torch.empty_like(x).stride()
    close(y, expected, x, 0.4)
    for grad in (torch.randn(5, 2, 3, 4), torch.randn(4, 3, 2, 5).permute(3, 2, 1, 0), torch.ones(()).expand(x.shape)):
        found, wanted = (
            gradient_of(run, grad, x, words, activation, 0.4, y.stride())
            for run in (native.backend.activation_dropout_gradient, ops.activation_dropout_gradient.literally)
        )
        close(found, wanted, grad, 0.4)


def test_random_words_are_those_of_philox():
    """The known answer of the generator's authors for zeros."""
    assert [int(word) for word in family._philox(0, torch.tensor(0))] == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]


def test_the_same_bits_for_every_level_and_number_of_threads():
    x = torch.randn(100_003)
    found = []
    for name in native.levels():
        native.use_level(name)
        for team in (1, 2, 3, 5):
            torch.set_num_threads(team)
            y, words = ops.activation_dropout(x, "relu", 0.3, 7)
            found.append((bits(y), words))
    native.use_level(native.levels()[-1])
    assert all(torch.equal(y, found[0][0]) and torch.equal(words, found[0][1]) for y, words in found)


@pytest.mark.parametrize("p", [0.001, 0.1, 1 / 3, 0.5, 0.9, 0.999])
def test_shares_and_means_are_within_standard_errors(p):
    size = 1 << 20
    y, _ = ops.activation_dropout(torch.ones(size), "identity", p, 1234)
    kept = (y != 0).double()
    error = (p * (1 - p) / size) ** 0.5
    assert abs(kept.mean().item() - (1 - p)) < 5 * error + 2**-16
    assert abs(y.double().mean().item() - 1) < 5 * error / (1 - p)
    # Neighbours, and what is half a block or a block apart, are independent.
    for apart in (1, 2, 4, 8, 32, 64, 128):
        together = (kept[apart:] * kept[:-apart]).mean().item()
        assert abs(together - kept.mean().item() ** 2) < 8 * error


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_mean_over_draws_is_the_activation(activation):
    x, p, draws = torch.linspace(-3, 3, 640), 0.3, 2000
    mean = sum(ops.activation_dropout(x, activation, p, key)[0].double() for key in range(draws)) / draws
    y = family.FUNCTIONS[activation](x).double()
    assert ((mean - y).abs() <= 5 * y.abs() * (p / (1 - p) / draws) ** 0.5 + 1e-6).all()


def test_probabilities_are_within_a_65536th():
    for p in [*torch.rand(1000, dtype=torch.float64).tolist(), 1e-12, 1 - 1e-12]:
        assert abs(family.dropped_of(p) / 65536 - p) <= 2**-16
        assert 0 <= family.dropped_of(p) < 65536


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_is_exact_for_what_is_drawn(activation):
    """In float64, against torch's autograd through the literal forward pass, and against finite differences."""
    x = torch.randn(70, dtype=torch.float64, requires_grad=True)
    scale = 65536 / (65536 - family.dropped_of(0.3))

    class Literal(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y, words = ops.activation_dropout.literally(x.detach(), activation, 0.3, 5)
            ctx.save_for_backward(x if family.needs_input(activation) else None, words)
            return y

        @staticmethod
        def backward(ctx, grad):
            saved = ctx.saved_tensors
            return ops.activation_dropout_gradient.literally(grad, *saved, activation, 0.3, (1,))

    kept = ops.activation_dropout.literally(torch.ones_like(x), "identity", 0.3, 5)[0] != 0
    grad = torch.randn_like(x)
    (expected,) = torch.autograd.grad(family.FUNCTIONS[activation](x) * kept * scale, x, grad)
    (found,) = torch.autograd.grad(Literal.apply(x), x, grad)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(Literal.apply, (x,))
    assert torch.autograd.gradgradcheck(Literal.apply, (x,))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_stays_so(level, activation):
    """As in torch, what is dropped is multiplied by 0. The gradient of ReLU is 0 where its bit is 0."""
    x = torch.full((640,), float("nan"))
    y, words = ops.activation_dropout(x, activation, 0.5, 3)
    assert y.isnan().all()
    x = torch.linspace(-2, 2, 640)
    y, words = ops.activation_dropout(x, activation, 0.5, 3)
    grad = gradient_of(ops.activation_dropout_gradient, x / 0, x, words, activation, 0.5, (1,))
    assert torch.equal(grad.isfinite(), torch.zeros(640, dtype=torch.bool) if activation != "relu" else y == 0)


@pytest.mark.parametrize(
    ("wrong", "at"), [(2, 0), (-1, 0), (5, 1), (-1, 1), (1 << 16, 3), (-1, 4), (0, 9), (-2, 9)], ids=str
)
def test_native_arguments_are_checked_before_memory_is_read(wrong, at):
    x, y, words = torch.randn(64), torch.full((64,), 7.0), torch.zeros(1, dtype=torch.int64)
    for name in ("drop", "drop_gradient"):
        arguments = [0, 1, 5, 100, 64, x.data_ptr(), y.data_ptr(), x.data_ptr(), words.data_ptr(), 1]
        arguments[at] = wrong
        with pytest.raises(ValueError, match=r"out of range|unknown"):
            getattr(native.extension(), name)(*arguments, 1.0)
        assert (y == 7).all()
