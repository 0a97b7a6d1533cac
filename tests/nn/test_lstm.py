"""LSTM: torch's own in every form of input, and its sparse gradients against step-by-step autograd."""

import copy
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from tests.cases import SEQUENCES as SIZES
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import literal
import meprop
from grids import covering
from literal import KeepAll, KeepOfGradient
from meprop import functional, speed
from meprop.functional.lstm import lstm_with_policy
from meprop.policy import Policy
from meprop.record import Activity
from meprop.rules import Rule
from meprop.selection import ColumnSelection, PlainTopK

INPUTS, UNITS = 6, 19
LENGTHS = [5, 7, 1, 7, 3]  # not sorted, with equals


class KeepAllByTopK(KeepAll):
    def as_topk(self, features: int) -> PlainTopK:
        return PlainTopK(features, "example")


EVERYTHING = {"select": KeepAll(), "top-k": KeepAllByTopK()}


def make(dtype: torch.dtype = torch.float64, rule: Rule | None = None, **options) -> meprop.nn.LSTM:
    torch.manual_seed(0)
    return meprop.nn.LSTM(INPUTS, UNITS, dtype=dtype, rule=rule or meprop.TopK(4), **options)


def plain(layer: meprop.nn.LSTM) -> torch.nn.LSTM:
    twin = copy.deepcopy(layer)
    meprop.revert(twin)
    assert type(twin) is torch.nn.LSTM
    return twin


def random_input(form: str, batch_first: bool, dtype: torch.dtype) -> Tensor | PackedSequence:
    torch.manual_seed(1)
    x = torch.randn(max(LENGTHS), len(LENGTHS), INPUTS, dtype=dtype)
    if form == "unbatched":
        return x[:, 0].clone().requires_grad_()
    x = x.transpose(0, 1).contiguous() if batch_first else x
    x.requires_grad_()
    if form == "packed":
        return pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=batch_first, enforce_sorted=False)
    return x


def random_states(layer: torch.nn.LSTM, form: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    shape = (count, UNITS) if form == "unbatched" else (count, len(LENGTHS), UNITS)
    dtype = layer.weight_ih_l0.dtype
    return torch.randn(shape, dtype=dtype).requires_grad_(), torch.randn(shape, dtype=dtype).requires_grad_()


def run(layer: torch.nn.LSTM, x: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """Output, states, then the gradients of a random loss with respect to everything that can have one."""
    output, states = layer(x, hx)
    rows = output.data if isinstance(output, PackedSequence) else output
    torch.manual_seed(3)
    loss = sum((tensor * torch.randn_like(tensor)).sum() for tensor in (rows, *states))
    source = x.data if isinstance(x, PackedSequence) else x
    wanted = [source, *(hx or ()), *layer.parameters()]
    return [rows, *states, *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize(
    ("num_layers", "bidirectional", "batch_first", "bias", "form", "given_states", "dtype", "rule"),
    covering(
        *([1, 2], [False, True], [False, True], [True, False], ["padded", "packed", "unbatched"], [False, True]),
        *([torch.float64, torch.float32], EVERYTHING),
        strength=3,
    ),
    ids=str,
)
def test_with_everything_kept_it_is_torchs(
    num_layers, bidirectional, batch_first, bias, form, given_states, dtype, rule, poisoned
):
    options = {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
    layer = make(dtype, EVERYTHING[rule], **options)
    x = random_input(form, batch_first, dtype)
    hx = random_states(layer, form) if given_states else None
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for actual, expected in zip(run(layer, x, hx), run(plain(layer), x, hx), strict=True):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_dropout_between_layers_is_torchs():
    layer = make(rule=KeepAll(), num_layers=3, dropout=0.5)
    twin = plain(layer)
    x = random_input("padded", False, torch.float64)
    layer.eval(), twin.eval()
    torch.testing.assert_close(layer(x)[0], twin(x)[0])
    layer.train()
    twin.train()
    torch.manual_seed(4)
    first, second = layer(x)[0], layer(x)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    torch.testing.assert_close(first, twin(x)[0])


# ---------------------------------------------------------------- sparse gradients


def step_by_step(
    x: Tensor, hx: tuple[Tensor, Tensor], weights: list[Tensor], sizes: list[int], reverse: bool, rule: Rule
) -> list[Tensor]:
    """An LSTM of one layer, step by step and gate by gate, differentiated by autograd. The biases are outside of what
    is selected. x is packed [N, I]; returns packed output and last states.
    """
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    h, c = hx
    starts = list(itertools.accumulate(sizes, initial=0))
    outputs: list[Tensor | None] = [None] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        n = sizes[t]
        product = x[starts[t] : starts[t + 1]] @ weight_ih.t() + h[:n] @ weight_hh.t()
        gates = [KeepOfGradient.apply(gate, rule) for gate in product.chunk(4, dim=1)]
        i, f, g, o = (gate + bias for gate, bias in zip(gates, (bias_ih + bias_hh).chunk(4), strict=True))
        new_c = f.sigmoid() * c[:n] + i.sigmoid() * g.tanh()
        new_h = o.sigmoid() * new_c.tanh()
        outputs[t] = new_h
        h, c = torch.cat([new_h, h[n:]]), torch.cat([new_c, c[n:]])
    return [torch.cat(outputs), h, c]


RULES = [
    *(meprop.TopK(k) for k in (1, 5, UNITS - 1, 0.5)),
    meprop.TopK(4, scope="batch"),
    meprop.TopK(3, scope="global"),
    meprop.TopK(energy=0.9),
    meprop.TopK(2, scope="global", exact_sum=True),
]


# The second has whole panels of columns, and is no multiple of any vector.
WIDTHS = [(INPUTS, UNITS), (70, 131)]


@pytest.mark.parametrize(("sizes", "widths", "reverse", "rule"), covering(SIZES, WIDTHS, [False, True], RULES), ids=str)
def test_sparse_gradients_are_those_of_a_literal_lstm(level, poisoned, sizes, widths, reverse, rule):
    check_against_step_by_step(SIZES[sizes], *widths, reverse, rule, torch.float32)


@pytest.mark.parametrize(("sizes", "reverse", "rule"), covering(SIZES, [False, True], RULES), ids=str)
def test_the_oracle_is_a_literal_lstm(poisoned, sizes, reverse, rule):
    check_against_step_by_step(SIZES[sizes], INPUTS, UNITS, reverse, rule, torch.float64)


@pytest.mark.parametrize("scope", ["example", "batch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_units_are_kept_in_each_of_several_blocks(dtype, scope):
    rule = meprop.InBlocks(meprop.TopK(2, scope=scope), 4)
    check_against_step_by_step(SIZES["ragged"], INPUTS, 20, False, rule, dtype)


def check_against_step_by_step(
    sizes: list[int], inputs: int, units: int, reverse: bool, rule: Rule, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    shapes = [(sum(sizes), inputs), *[(sizes[0], units)] * 2]
    shapes += [(4 * units, inputs), (4 * units, units), (4 * units,), (4 * units,)]
    scale = 1 / (inputs + units) ** 0.5
    exact = [(scale * torch.randn(shape, dtype=torch.float64)).requires_grad_() for shape in shapes]
    given = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]

    expected = step_by_step(exact[0], (exact[1], exact[2]), exact[3:], sizes, reverse, rule)
    x, h0, c0, *weights = given
    batch_sizes = torch.tensor(sizes)
    output, states = functional.lstm(x, (h0, c0), *weights, rule=rule, batch_sizes=batch_sizes, reverse=reverse)
    actual = [output, *states]
    grads = [torch.randn_like(tensor) for tensor in expected]
    expected += torch.autograd.grad(expected, exact, grads)
    actual += torch.autograd.grad(actual, given, [grad.to(dtype) for grad in grads])
    tolerance = 1e-11 if dtype == torch.float64 else 3e-5
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


def gradients_of(
    lstm: Callable[..., tuple[Tensor, object]], x: Tensor, weights: list[Tensor], grad: Tensor
) -> list[Tensor]:
    return list(torch.autograd.grad(lstm(x, None, *weights)[0], [x, *weights], grad))


def paper_sized(steps: int = 6, batch: int = 33) -> tuple[Tensor, list[Tensor], Tensor]:
    torch.manual_seed(0)
    layer = torch.nn.LSTM(INPUTS, 500)
    return (
        torch.randn(steps, batch, INPUTS, requires_grad=True),
        list(layer.parameters()),
        torch.randn(steps, batch, 500),
    )


@pytest.mark.parametrize("scope", ["example", "batch"])
@pytest.mark.parametrize("batch", [1, 7, 130])
def test_the_number_of_threads_changes_no_bit(level, threads, scope, batch):
    x, weights, grad = paper_sized(steps=3, batch=batch)
    weights = [weight.detach() for weight in weights]
    rows = x.detach().flatten(0, 1)
    sizes = torch.full((len(x),), batch)
    rule = meprop.TopK(20, scope=scope)

    def results(count: int) -> list[Tensor]:
        torch.set_num_threads(count)
        trace = meprop.ops.lstm_forward(rows, *weights[:3], (None, None), sizes, False)
        arguments = (trace[:3], rows, *weights[:2], sizes, False, (grad.flatten(0, 1), None, None))
        return [
            *trace,
            *meprop.ops.lstm_backward(*arguments, rule.as_topk(500), meprop.InBlocks(rule, 4).select, (True,) * 6),
        ]

    once = results(1)
    for count in (2, 3, 7):
        for one, other in zip(once, results(count), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scope", ["example", "batch"])
def test_of_equal_gradients_the_lower_units_are_kept(level, dtype, scope):
    """Units that are all alike have gradients that are all alike."""
    x = torch.ones(3, 2, INPUTS, dtype=dtype)
    weights = [torch.full((4 * UNITS, width), 0.01, dtype=dtype, requires_grad=True) for width in (INPUTS, UNITS)]
    rule = meprop.TopK(3, scope=scope)
    output, _ = functional.lstm(x, None, *weights, rule=rule)
    grad, _ = torch.autograd.grad(output, weights, torch.ones_like(output))
    kept = grad.view(4, UNITS, INPUTS).abs().sum(dim=2) > 0
    assert kept[:, :3].all()
    assert not kept[:, 3:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_nan_is_not_hidden_and_stays_in_its_sequence(level, dtype):
    torch.manual_seed(0)
    layer = make(dtype)
    x = torch.randn(4, 3, INPUTS, dtype=dtype, requires_grad=True)
    output, _ = layer(x)
    grad = torch.full_like(output, 1e-3)
    grad[2, 1, 7] = float("nan")
    grad_x, grad_weight = torch.autograd.grad(output, [x, layer.weight_hh_l0], grad)
    assert grad_x[:3, 1].isnan().all()
    assert not grad_x[3].isnan().any()
    assert not grad_x[:, [0, 2]].isnan().any()
    assert grad_weight.isnan().any()

    x = x.detach().clone()
    x[1, 2, 0] = float("nan")
    output, _ = layer(x)
    assert output[1:, 2].isnan().all()
    assert not output[:, :2].isnan().any()
    assert not output[0].isnan().any()


def test_large_inputs_saturate_as_torchs(level):
    layer = make(torch.float32, KeepAllByTopK())
    scales = torch.tensor([0.0, 1e-30, 1e-6, 1e-3, 1.0, 10.0, 1e2, 1e4, 1e30])
    x = (torch.randn(1, 63, INPUTS) * scales.repeat(7)[:, None]).requires_grad_()
    for one, other in zip(run(layer, x, None), run(plain(layer), x, None), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_bias_gets_the_whole_gradient(level):
    x, weights, grad = paper_sized(steps=1)
    rule = meprop.TopK(5)
    dense = torch.nn.LSTM(INPUTS, 500)
    dense.load_state_dict(dict(zip(dense.state_dict(), weights, strict=True)))
    expected = torch.autograd.grad(dense(x)[0], list(dense.parameters()), grad)
    actual = gradients_of(lambda *a: functional.lstm(*a, rule=rule), x, weights, grad)[1:]
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual[3], actual[2])
    assert actual[2].data_ptr() != actual[3].data_ptr()
    assert (actual[0].abs().sum(dim=1) > 0).sum() <= 4 * 33 * 5 < (expected[0].abs().sum(dim=1) > 0).sum()


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "x"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_is_frozen_gets_no_gradient_and_changes_none(frozen, dtype, poisoned):
    def gradients(freeze: bool) -> dict[str, Tensor | None]:
        layer = make(dtype)
        x = torch.randn(4, 3, INPUTS, dtype=dtype, requires_grad=True)
        tensors = {"x": x, **dict(layer.named_parameters())}
        if freeze:
            tensors[frozen].requires_grad_(False)
        layer(x)[0].pow(2).sum().backward()
        return {name: tensor.grad for name, tensor in tensors.items()}

    partial, whole = gradients(True), gradients(False)
    assert partial.pop(frozen) is None
    for name, grad in partial.items():
        assert grad is not None
        assert torch.equal(grad, whole[name])


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_a_frozen_layer_passes_on_to_its_states_what_the_rule_keeps(form):
    layer = make().requires_grad_(False)
    x = random_input(form, False, torch.float64)
    x = PackedSequence(x.data.detach(), *x[1:]) if form == "packed" else x.detach()
    found = []
    for each in (layer, make(), plain(layer)):  # the second is not frozen, the third dense
        hx = random_states(layer, form)
        output, _ = each(x, hx)
        rows = output.data if form == "packed" else output
        found.append(torch.autograd.grad(rows.square().sum(), hx))
    for one, other, dense in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert not torch.allclose(one, dense)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("needed", [0, 1], ids=["h0", "c0"])
def test_one_of_the_states_alone_gets_its_gradient(needed, dtype):
    layer, x = make(dtype), random_input("padded", False, dtype)
    both, alone = random_states(layer, "padded"), [state.detach() for state in random_states(layer, "padded")]
    alone[needed].requires_grad_()
    expected = torch.autograd.grad(layer(x, both)[0].square().sum(), both)[needed]
    (found,) = torch.autograd.grad(layer(x, tuple(alone))[0].square().sum(), alone[needed])
    assert torch.equal(found, expected)
    assert found.any()


def test_layouts_of_inputs_and_gradients(level, poisoned):
    """Gradients that are expanded, transposed or absent, and inputs that are not contiguous."""
    layer = make(torch.float32)
    base = torch.randn(3, INPUTS, 4, requires_grad=True)
    expected = run(layer, base.permute(2, 0, 1).contiguous(), None)
    for one, other in zip(run(layer, base.permute(2, 0, 1), None), expected, strict=True):
        assert torch.equal(one, other)
    (from_sum,) = torch.autograd.grad(layer(base.permute(2, 0, 1))[0].sum(), base)
    output, (_h, c) = layer(base.permute(2, 0, 1))
    (whole,) = torch.autograd.grad(output, base, torch.ones_like(output), retain_graph=True)
    assert torch.equal(from_sum, whole)
    zeros = torch.zeros_like(output)
    (with_zeros,) = torch.autograd.grad((output, c), base, (zeros, torch.ones_like(c)), retain_graph=True)
    (from_cells,) = torch.autograd.grad(c.sum(), base)  # no gradient of the output at all
    assert torch.equal(from_cells, with_zeros)
    assert from_cells.any()


# ---------------------------------------------------------------- as a module


def test_without_gradients_or_with_all_kept_it_is_torchs_own():
    x = random_input("padded", False, torch.float32)
    layer = make(torch.float32)
    with torch.no_grad():
        assert torch.equal(layer(x)[0], plain(layer)(x)[0])
    layer = make(torch.float32, meprop.TopK(UNITS))
    for one, other in zip(run(layer, x, None), run(plain(layer), x, None), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32(dtype):
    layer = make(torch.float32)
    x = random_input("padded", False, torch.float32)
    half = copy.deepcopy(layer).to(dtype)
    widened = copy.deepcopy(half).float()
    output, (h, c) = half(x.to(dtype))
    assert output.dtype == h.dtype == c.dtype == dtype
    exact, _ = widened(x.to(dtype).float())
    assert torch.equal(output, exact.to(dtype))
    output.sum().backward()
    assert half.weight_hh_l0.grad.dtype == dtype


@pytest.mark.parametrize("rule", [KeepAll(), meprop.TopK(4)], ids=["all", "top-k"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_the_literal_lstm(dtype, rule):
    layer = make(torch.float32, rule)
    x = random_input("padded", False, torch.float32)
    results = []
    for forward in (lambda: layer(x)[0], lambda: literal.lstm(layer, x, rule)):
        with torch.autocast("cpu", dtype=dtype):
            output = forward()
        assert output.dtype == dtype
        gradients = torch.autograd.grad(output.float().square().sum(), [x, *layer.parameters()])
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        results.append([output, *gradients])
    eps = torch.finfo(dtype).eps
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=16 * eps, atol=16 * eps * float(other.detach().abs().max()))
    assert bool((results[0][2] == 0).any()) == isinstance(rule, meprop.TopK)


def torch_lacks_autocast_of_lstms(dtype: torch.dtype) -> bool:
    """On a CPU without AVX-512, torch's own library has no LSTM in half precision."""
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            torch.nn.LSTM(2, 3)(torch.zeros(1, 1, 2))
    except RuntimeError as error:
        if "could not create a primitive descriptor" in str(error):
            return True
        raise
    return False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_torchs_where_torch_has_it(dtype):
    if torch_lacks_autocast_of_lstms(dtype):
        pytest.skip(f"torch has no LSTM in {dtype} under autocast on this CPU")
    layer = make(torch.float32)
    x = random_input("padded", False, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        actual, expected = layer(x)[0], plain(layer)(x)[0]
    assert actual.dtype == expected.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


def test_state_dict_pickle_and_copies():
    layer = make(num_layers=2, bidirectional=True)
    reference = torch.nn.LSTM(INPUTS, UNITS, num_layers=2, bidirectional=True, dtype=torch.float64)
    assert list(layer.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(layer.state_dict())
    layer.load_state_dict(reference.state_dict())
    x = random_input("padded", False, torch.float64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.rule == layer.rule
        for one, two in zip(run(layer, x, None), run(other, x, None), strict=True):
            assert torch.equal(one, two)
    assert "rule=TopK(k=4" in repr(layer)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("when", ["always", "auto"])
def test_checkpointing_gives_the_same_gradients(monkeypatch, tmp_path, when, use_reentrant):
    monkeypatch.setenv("MEPROP_CACHE", str(tmp_path))
    monkeypatch.setattr(speed, "_LEAST_GAIN", 0.0)  # any measurement will do, but it must take place
    layer = plain(make(torch.float32))
    meprop.convert(layer, meprop.TopK(4), min_features=1, when=when)
    x = random_input("padded", False, torch.float32)
    layer(x)[0].pow(2).sum().backward()
    expected = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    layer.decision = None
    checkpoint(lambda x: layer(x)[0], x, use_reentrant=use_reentrant).pow(2).sum().backward()
    assert (layer.decision is not None) == (when == "auto")
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)  # reentrant, the first forward pass is torch's own


def test_compiled_models_call_it_as_it_is():
    layer = make(torch.float32)
    model = torch.nn.ModuleDict({"lstm": layer})

    def forward(x: Tensor) -> Tensor:
        return model["lstm"](2 * x)[0] + 1

    x = random_input("padded", False, torch.float32)
    forward(x).pow(2).sum().backward()
    expected = layer.weight_hh_l0.grad.clone()
    assert (expected == 0).any()
    layer.zero_grad()
    torch.compile(forward, backend="aot_eager")(x).pow(2).sum().backward()
    torch.testing.assert_close(layer.weight_hh_l0.grad, expected)


def test_parametrized_weights_are_used():
    layer = make(torch.float32)
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    x = random_input("padded", False, torch.float32)
    layer(x)[0].sum().backward()
    assert layer.parametrizations.weight_hh_l0.original0.grad is not None


def test_second_derivatives_are_refused():
    x = random_input("padded", False, torch.float32)
    with pytest.raises(meprop.errors.NotSupportedError, match="create_graph"):
        torch.autograd.grad(make(torch.float32)(x)[0].sum(), x, create_graph=True)


def test_refusals():
    layer = make(torch.float32)
    with pytest.raises(meprop.errors.NotSupportedError, match="proj_size=3"):
        meprop.nn.LSTM(4, 8, proj_size=3, rule=meprop.TopK(2))
    with pytest.raises(TypeError, match="rule=3"):
        meprop.nn.LSTM(4, 8, rule=3)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\)"):
        layer(torch.randn(3, 2, INPUTS + 1))
    with pytest.raises(ValueError, match="dtype"):
        layer(torch.randn(3, 2, INPUTS, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"hidden\[1\]"):
        layer(torch.randn(3, 2, INPUTS), (torch.zeros(1, 2, UNITS), torch.zeros(1, 3, UNITS)))
    weights = list(layer.parameters())
    rule = meprop.TopK(2)
    with pytest.raises(ValueError, match="weight_ih is"):
        functional.lstm(torch.randn(3, 2, INPUTS - 1), None, *weights, rule=rule)
    with pytest.raises(ValueError, match="x is"):
        functional.lstm(torch.randn(3, INPUTS), None, *weights, rule=rule)
    with pytest.raises(ValueError, match="at least one"):
        functional.lstm(torch.randn(0, 2, INPUTS), None, *weights, rule=rule)
    for sizes in ([2, 3], [4, 2], [3, 2, 0], []):
        with pytest.raises(ValueError, match="batch_sizes"):
            functional.lstm(torch.randn(5, INPUTS), None, *weights, rule=rule, batch_sizes=torch.tensor(sizes))
    with pytest.raises(TypeError, match="rule="):
        functional.lstm(torch.randn(3, 2, INPUTS), None, *weights, rule=None)
    state = torch.zeros(2, UNITS)
    for hx in ((state,), (state,) * 3, state):
        with pytest.raises(ValueError, match="hx is"):
            functional.lstm(torch.randn(3, 2, INPUTS), hx, *weights, rule=rule)
    for x, others in (
        (torch.ones(3, 2, INPUTS, dtype=torch.int64), weights),
        (torch.randn(3, 2, INPUTS), [weight.double() for weight in weights]),
        (torch.randn(3, 2, INPUTS), [weight.to("meta") for weight in weights]),
        (torch.randn(3, 2, INPUTS), [*weights[:3], weights[3].to("meta")]),
    ):
        with pytest.raises(ValueError, match="one dtype and on one device"):
            functional.lstm(x, None, *others, rule=rule)
    with pytest.raises(ValueError, match="one dtype"):
        functional.lstm(torch.randn(3, 2, INPUTS), (state.double(), state.double()), *weights, rule=rule)
    with pytest.raises(ValueError, match="2D or 3D"):
        layer(torch.randn(1, 3, 2, INPUTS))
    with pytest.raises(RuntimeError, match="2-D"):
        layer(torch.randn(3, INPUTS), (torch.zeros(1, 1, UNITS), torch.zeros(1, 1, UNITS)))


RULES_BY_GRADIENT = [
    meprop.Sampled(),
    meprop.Sampled(0.5),
    meprop.Sampled(exact_sum=True),
    meprop.Sampled(0.5, scope="batch"),
    meprop.Sampled(0.5, scope="example"),
    meprop.TopK(2, scope="global"),
    meprop.TopK(energy=0.9),
]


@pytest.mark.parametrize("rule", RULES_BY_GRADIENT, ids=str)
def test_tensors_without_contents_get_gradients_of_the_right_shapes(rule):
    weights = [each.detach().to("meta").requires_grad_() for each in make(torch.float32).parameters()]
    x = torch.randn(3, 2, INPUTS, device="meta", requires_grad=True)
    output, states = functional.lstm(x, None, *weights, rule=rule)
    assert output.shape == (3, 2, UNITS)
    found = torch.autograd.grad(sum(each.sum() for each in (output, *states)), [x, *weights])
    assert [(each.shape, each.device.type) for each in found] == [(each.shape, "meta") for each in (x, *weights)]


@pytest.mark.parametrize("case", ["one direction", "batch_first", "bidirectional", "unbatched"])
def test_an_output_can_be_detached_in_place_where_that_of_torch_can(case):
    options = {} if case in ("one direction", "unbatched") else {case: True}
    x = torch.randn((3, INPUTS) if case == "unbatched" else (3, 2, INPUTS))
    plain = torch.nn.LSTM(INPUTS, UNITS, **options)
    layer = copy.deepcopy(plain)
    meprop.convert(layer, meprop.TopK(2), when="always", min_features=1)

    def detaches(lstm: torch.nn.Module) -> bool:
        try:
            return not lstm(x)[0].detach_().requires_grad
        except RuntimeError:
            return False

    assert detaches(layer) or not detaches(plain)


@pytest.mark.parametrize("sizes", [torch.tensor([4, 4, 3, 3, 2, 2])[::2], torch.tensor([64]).expand(5)], ids=str)
def test_batch_sizes_of_any_memory_layout(sizes):
    layer = make(torch.float32)
    x = torch.randn(int(sizes.sum()), INPUTS, requires_grad=True)
    results = []
    for same in (sizes, sizes.contiguous()):
        output, _ = functional.lstm(x, None, *layer.parameters(), rule=layer.rule, batch_sizes=same)
        results.append([output, *torch.autograd.grad(output.sum(), [x, *layer.parameters()])])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_another_default_device_does_not_matter():
    layer, x = make(torch.float32), random_input("padded", False, torch.float32)
    expected = layer(x)[0]
    torch.set_default_device("meta")
    try:
        assert torch.equal(layer(x)[0], expected)
    finally:
        torch.set_default_device(None)


def test_column_rules_of_ones_own_are_asked_at_each_step():
    """A rule without a fused kernel goes rule -> selection -> ops, gate by gate."""
    asked: list[tuple[int, ...]] = []

    class First(Rule):
        def count(self, features: int) -> int:
            return 2

        def select(self, grad_output_NO: Tensor) -> ColumnSelection:
            asked.append(tuple(grad_output_NO.shape))
            return ColumnSelection(grad_output_NO[:, :2], torch.tensor([0, 1], dtype=torch.int32), UNITS)

    layer = make(torch.float32, First())
    layer(torch.randn(3, 2, INPUTS))[0].sum().backward()
    assert asked == [(2, UNITS)] * 12
    rows = layer.weight_ih_l0.grad.view(4, UNITS, INPUTS).abs().sum(dim=2) > 0
    assert rows[:, :2].all()
    assert not rows[:, 2:].any()


# ---------------------------------------------------------------- counting what is selected


def count_hits(
    sizes: list[int], inputs: Tensor, units: int, reverse: bool, rule: Rule, grad: Tensor
) -> tuple[Activity, Tensor]:
    """What is counted, and the kept gates' gradients [4, H, N]: with one input for each row, that of its weight."""
    torch.manual_seed(0)
    activity = Activity.of_units(units)
    weights = [(torch.randn(4 * units, n, dtype=inputs.dtype) / 4).requires_grad_() for n in (len(inputs), units)]
    batch_sizes = torch.tensor(sizes)
    output, _ = lstm_with_policy(inputs, None, (*weights, None, None), batch_sizes, reverse, Policy(rule), activity)
    kept, _ = torch.autograd.grad(output, weights, grad)
    return activity, kept.view(4, units, -1)


SELECTED = [*(rule for rule in RULES if not rule.exact_sum), meprop.TopK(1.0)]  # what all rows share is not


@pytest.mark.parametrize(
    ("name", "units", "dtype", "reverse", "rule"),
    covering(SIZES, [UNITS, 131], [torch.float64, torch.float32], [False, True], SELECTED),
    ids=str,
)
def test_a_unit_is_hit_where_any_of_its_gates_is(level, threads, name, units, dtype, reverse, rule):
    sizes = SIZES[name]
    rows = sum(sizes)
    grad = torch.randn(rows, units, generator=torch.Generator().manual_seed(1), dtype=dtype)
    grad[::3] = 0  # a last time step without a gradient selects zeros
    for count in (1, 3):
        torch.set_num_threads(count)
        activity, kept = count_hits(sizes, torch.eye(rows, dtype=dtype), units, reverse, rule, grad)
        assert torch.equal(activity.hits, (kept != 0).any(dim=0).sum(dim=1))
        assert activity.examples == rows


@pytest.mark.parametrize("rule", [meprop.TopK(4), meprop.CompensatedTopK(4), meprop.TopK(40)], ids=str)
def test_each_layer_and_direction_counts_and_computes_the_same(rule):
    layer = make(torch.float32, rule, num_layers=2, bidirectional=True)
    x = random_input("packed", False, torch.float32)
    expected = run(layer, x, None)
    layer.activity = tuple(Activity.of_units(UNITS) for _ in range(4))
    for one, other in zip(run(layer, x, None), expected, strict=True):
        torch.testing.assert_close(one, other)
    for activity in layer.activity:
        assert activity.examples == sum(LENGTHS)
        assert 0 < activity.hits.max() <= sum(LENGTHS)
        if rule.k < UNITS:
            assert activity.hits.sum() < sum(LENGTHS) * UNITS


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("rule", [meprop.TopK(3), meprop.TopK(3, scope="global"), meprop.Sampled()], ids=str)
def test_without_contents_and_in_torch_export_it_is_torchs_own(rule, grad):
    layer = meprop.nn.LSTM(6, 8, rule=rule)
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        fake = meprop.nn.LSTM(6, 8, rule=rule)
        output = fake(torch.randn(2, 4, 6))[0]
        assert output.shape == (2, 4, 8)
        if grad:
            output.sum().backward()
            assert fake.weight_hh_l0.grad.shape == (32, 8)
    meta, x = copy.deepcopy(layer).to("meta"), torch.randn(2, 4, 6)
    with torch.set_grad_enabled(grad):
        output = meta(x.to("meta"))[0]
        assert output.shape == (2, 4, 8)
        exported = torch.export.export(layer, (x,))
        torch.testing.assert_close(exported.module()(x)[0], layer(x)[0])
    if grad:
        output.sum().backward()
        assert meta.weight_hh_l0.grad.shape == (32, 8)
