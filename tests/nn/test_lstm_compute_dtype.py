"""LSTMs whose weights are bfloat16 in all products: `compute_dtype`, and autocast."""

import copy
import itertools
import pickle

import pytest
import torch
from tests.cases import SEQUENCES as SIZES
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import meprop
from grids import covering
from meprop import functional, ops, speed
from meprop.ops import native
from meprop.selection import Entries, PlainTopK, Selection, everything

BFLOAT16 = torch.bfloat16
KEY = torch.tensor(0x1234_5678_9ABC_DEF)
CHOICES = {
    "top-k": PlainTopK(4, "example"),
    "top-k of a step": PlainTopK(3, "batch"),
    "largest": Entries("largest", 3),
    "energy": Entries("energy", share=0.9),
    "noise": Entries("noise", share=0.25, key=KEY),
    "exact sum": Entries("noise", share=0.25, exact_sum=True, key=KEY),
    "everything in some steps": Entries("noise", share=2.0, exact_sum=True, key=KEY, ceiling=0.12),
    "most are drawn": Entries("drawn", 70, key=KEY),
}
# Inputs and units: fewer than a panel has, some panels and a rest in each width of a panel, and none of the inputs.
WIDTHS = [(6, 19), (0, 5), (70, 131), (33, 72)]


def refuses(_: Tensor) -> Selection:
    raise AssertionError("what is described is not asked for")


def rounded(layer: meprop.nn.LSTM) -> meprop.nn.LSTM:
    """The same layer without the option, whose weights are rounded before."""
    twin = copy.deepcopy(layer)
    twin.compute_dtype = None
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.startswith("weight"):
                parameter.copy_(parameter.bfloat16())
    return twin


def gradients(layer: torch.nn.LSTM, x: Tensor | PackedSequence) -> list[Tensor]:
    """Output, states, and the gradients of input and parameters."""
    output, states = layer(x)
    rows = output.data if isinstance(output, PackedSequence) else output
    torch.manual_seed(3)
    loss = sum((tensor * torch.randn_like(tensor)).sum() for tensor in (rows, *states))
    source = x.data if isinstance(x, PackedSequence) else x
    return [rows, *states, *torch.autograd.grad(loss, [source, *layer.parameters()])]


def close(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:
            assert one is other
            continue
        largest = float(other.detach().abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * largest)


# ---------------------------------------------------------------- native code


@pytest.mark.parametrize(
    ("sizes", "widths", "reverse", "bias", "choice"),
    covering(SIZES, WIDTHS, [False, True], [False, True], CHOICES),
    ids=str,
)
def test_native_code_computes_with_bfloat16_as_the_reference_does(
    level, poisoned, sizes, widths, reverse, bias, choice
):
    torch.manual_seed(0)
    (inputs, units), batch_sizes = widths, torch.tensor(SIZES[sizes])
    rows, batch = int(batch_sizes.sum()), int(batch_sizes[0])
    x, narrow = torch.randn(rows, inputs), [torch.randn(4 * units, n) / (4 * n or 1) ** 0.5 for n in widths]
    narrow = [weight.bfloat16() for weight in narrow]
    wide = [weight.float() for weight in narrow]
    rest = torch.randn(4 * units) if bias else None, (torch.randn(batch, units), None), batch_sizes, reverse
    assert ops.lstm_forward.explain(x, *narrow, *rest) == ("native", {})
    found, expected = ops.lstm_forward(x, *narrow, *rest), ops.lstm_forward.literally(x, *wide, *rest)
    close(list(found), list(expected))

    kept = CHOICES[choice]
    if isinstance(kept, PlainTopK):
        select = meprop.InBlocks(meprop.TopK(kept.k, scope=kept.scope), 4).select
    else:
        select = refuses
    grads = torch.randn(rows, units) * torch.randn(rows, 1).exp(), torch.randn(batch, units), None
    arguments = batch_sizes, reverse, grads, kept, select, (True,) * 6
    assert ops.lstm_backward.explain(found[:3], x, *narrow, *arguments) == ("native", {})
    found_grads = ops.lstm_backward(found[:3], x, *narrow, *arguments)
    close(list(found_grads), list(ops.lstm_backward.literally(found[:3], x, *wide, *arguments)))


def test_the_number_of_threads_changes_no_bit(level, threads):
    torch.manual_seed(0)
    x, sizes = torch.randn(170, 130), torch.tensor([130, 33, 7])
    weights = [torch.randn(2000, n).bfloat16() / 16 for n in (130, 500)]
    found: list[tuple[Tensor | None, ...]] = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        trace = ops.lstm_forward(x, *weights, None, (None, None), sizes, False)
        rest = sizes, False, (torch.ones(170, 500), None, None), PlainTopK(9, "example"), refuses, (True,) * 6
        found.append((*trace, *ops.lstm_backward(trace[:3], x, *weights, *rest)))
    for each in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(each, found[0], strict=True))


def test_rows_of_weights_that_lie_apart_or_overlap_are_read(level):
    torch.manual_seed(0)
    x, sizes = torch.randn(12, 24), torch.tensor([6, 6])
    whole = torch.randn(96, 48).bfloat16()
    for weights in ((whole[:, :24], whole[:, 24:]), (whole[:, :24], whole[:, :1].expand(96, 24))):
        rest = None, (None, None), sizes, False
        found = ops.lstm_forward(x, *weights, *rest)
        close(list(found), list(ops.lstm_forward.literally(x, *(weight.float() for weight in weights), *rest)))


def test_nan_in_a_weight_is_not_hidden(level):
    for batch in (1, 6):  # the weights are read in place, or packed
        x, sizes = torch.ones(2 * batch, 24), torch.tensor([batch, batch])
        weights = [torch.ones(96, 24, dtype=BFLOAT16) for _ in range(2)]
        weights[1][5, 7] = float("nan")
        h, *_ = ops.lstm_forward(x, *weights, None, (None, None), sizes, False)
        assert h[2 * batch :].isnan().any(dim=1).all()
        weights[1][5, 7], weights[0][5, 7] = 1, float("nan")
        h, *_ = ops.lstm_forward(x, *weights, None, (None, None), sizes, False)
        assert h[batch : 2 * batch, 5].isnan().all()
        assert not h[batch : 2 * batch, :5].isnan().any()


def test_weights_of_two_dtypes_go_to_the_reference():
    x, sizes = torch.ones(3, 4), torch.tensor([3])
    weights = torch.ones(20, 4, dtype=BFLOAT16), torch.ones(20, 5)
    backend, reasons = ops.lstm_forward.explain(x, *weights, None, (None, None), sizes, False)
    assert backend == "reference"
    if native.reason_missing() is None:
        assert "weights of one dtype" in reasons["native"]
    found = ops.lstm_forward(x, *weights, None, (None, None), sizes, False)
    assert {each.dtype for each in found} == {torch.float32}


# ---------------------------------------------------------------- the layer and the function

RULES = [meprop.TopK(4), meprop.TopK(4, scope="batch"), meprop.CompensatedTopK(4), meprop.Sampled(noise=0.25)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_layer_computes_with_rounded_weights_in_both_passes(rule, dtype):
    options = {"num_layers": 2, "bidirectional": True, "dtype": dtype}
    torch.manual_seed(0)
    layer = meprop.nn.LSTM(6, 19, rule=rule, compute_dtype=BFLOAT16, **options)
    exact = copy.deepcopy(layer)
    exact.compute_dtype = None
    x = torch.randn(7, 5, 6, dtype=dtype, requires_grad=True)
    for given in (x, pack_padded_sequence(x, torch.tensor([5, 7, 1, 7, 3]), enforce_sorted=False)):
        results = []
        for each in (layer, rounded(layer), exact):
            torch.manual_seed(5)  # of the draws
            results.append(gradients(each, given))
        found, expected, unrounded = results
        assert {each.dtype for each in found} == {dtype}
        close(found, expected)
        assert not torch.allclose(found[0], unrounded[0], rtol=1e-4, atol=1e-5)


def test_the_function_rounds_the_weights_alone():
    torch.manual_seed(0)
    x, weights = torch.randn(4, 3, 6), [torch.randn(80, n).requires_grad_() for n in (6, 20)]
    biases = [torch.randn(80).requires_grad_() for _ in range(2)]
    rule = meprop.TopK(5)
    found, _ = functional.lstm(x, None, *weights, *biases, rule=rule, compute_dtype=BFLOAT16)
    narrow = [weight.detach().bfloat16().float().requires_grad_() for weight in weights]
    expected, _ = functional.lstm(x, None, *narrow, *biases, rule=rule)
    close([found, *torch.autograd.grad(found.sum(), weights)], [expected, *torch.autograd.grad(expected.sum(), narrow)])


@pytest.mark.parametrize("compute_dtype", [None, BFLOAT16])
def test_autocast_gives_native_code_the_weights_in_bfloat16(monkeypatch, compute_dtype):
    seen: list[torch.dtype] = []
    forward, backward = ops.lstm_forward, ops.lstm_backward
    monkeypatch.setattr(ops, "lstm_forward", lambda *each: (seen.extend(w.dtype for w in each[1:3]), forward(*each))[1])
    monkeypatch.setattr(
        ops, "lstm_backward", lambda *each: (seen.extend(w.dtype for w in each[2:4]), backward(*each))[1]
    )
    torch.manual_seed(0)
    layer = meprop.nn.LSTM(6, 19, rule=meprop.TopK(4), compute_dtype=compute_dtype)
    x = torch.randn(7, 5, 6, requires_grad=True)
    with torch.autocast("cpu", BFLOAT16):
        output, _ = layer(x)
    output.sum().backward()
    assert output.dtype == BFLOAT16
    assert seen == [BFLOAT16] * 4
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}


def test_autocast_of_another_dtype_does_not_round_to_bfloat16():
    torch.manual_seed(0)
    layer = meprop.nn.LSTM(6, 19, rule=meprop.TopK(4), compute_dtype=BFLOAT16)
    x, found = torch.randn(7, 5, 6), []
    for compute_dtype in (BFLOAT16, None):
        layer.compute_dtype = compute_dtype
        with torch.autocast("cpu", torch.float16):
            found.append(layer(x)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("autocast", [False, True])
def test_passes_without_gradients_round_as_well(autocast):
    torch.manual_seed(0)
    x = torch.randn(7, 5, 6)
    layer = meprop.nn.LSTM(6, 19, rule=meprop.TopK(4), compute_dtype=None if autocast else BFLOAT16)
    with torch.autocast("cpu", BFLOAT16, enabled=autocast):
        with torch.no_grad():
            inferred = layer(x)[0]
        assert torch.equal(inferred, layer(x)[0])


def test_a_layer_that_is_torchs_own_does_not_round(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(7, 5, 6)
    dense = meprop.nn.LSTM(6, 19, rule=meprop.TopK(19), compute_dtype=BFLOAT16)
    plain = copy.deepcopy(dense)
    meprop.revert(plain)
    assert torch.equal(dense(x)[0], plain(x)[0])
    monkeypatch.setattr(speed, "measure", lambda *_: (1.0, 2.0))
    meprop.convert(plain, meprop.TopK(4), compute_dtype=BFLOAT16, min_features=1)
    assert torch.equal(plain(x)[0], dense(x)[0])
    assert not plain.decision.sparse


def test_a_traced_graph_is_torchs_own_and_takes_sequences_of_any_length():
    layer = meprop.nn.LSTM(5, 40, rule=meprop.TopK(4), compute_dtype=BFLOAT16)
    plain = copy.deepcopy(layer)
    meprop.revert(plain)
    traced = torch.jit.trace(layer, torch.randn(6, 3, 5), check_trace=False)  # the layer itself rounds
    longer = torch.randn(9, 3, 5)
    assert torch.equal(traced(longer)[0], plain(longer)[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_changes_no_bit(use_reentrant):
    torch.manual_seed(0)
    layer = meprop.nn.LSTM(6, 19, rule=meprop.TopK(4), compute_dtype=BFLOAT16)
    x = torch.randn(7, 5, 6, requires_grad=True)
    outputs = layer(x)[0], checkpoint(lambda x: layer(x)[0], x, use_reentrant=use_reentrant)
    for one, other in itertools.pairwise([output, *_backward(output, layer)] for output in outputs):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _backward(output: Tensor, layer: torch.nn.Module) -> list[Tensor]:
    layer.zero_grad()
    output.square().sum().backward()
    return [parameter.grad.clone() for parameter in layer.parameters()]


def test_what_is_measured_is_the_layer_as_it_will_run(monkeypatch):
    shapes = []
    monkeypatch.setattr(speed, "decide", lambda rule, shape: shapes.append(shape) or speed.Decision(True, 35, 2.0, 1.0))
    layer, x = torch.nn.LSTM(6, 19), torch.randn(7, 5, 6)
    for compute_dtype in (None, BFLOAT16):
        meprop.convert(layer, meprop.TopK(4), compute_dtype=compute_dtype, min_features=1)
        layer(x)
    assert [shape.compute_dtype for shape in shapes] == [None, BFLOAT16]
    assert [shape.dtype for shape in shapes] == [torch.float32] * 2
    assert len(set(map(str, shapes))) == 2
    layer.decision = None
    with torch.autocast("cpu", BFLOAT16):
        layer(x)
    assert (shapes[-1].dtype, shapes[-1].compute_dtype) == (BFLOAT16, None)
    seen: list[torch.dtype] = []
    forward = ops.lstm_forward
    monkeypatch.setattr(ops, "lstm_forward", lambda *each: (seen.append(each[2].dtype), forward(*each))[1])
    _, sparse = shapes[1].passes(meprop.TopK(4))
    sparse()
    assert seen == [BFLOAT16]


def test_the_option_is_saved_shown_and_taken_back():
    layer = meprop.nn.LSTM(6, 19, rule=meprop.TopK(4), compute_dtype=BFLOAT16)
    x = torch.randn(7, 5, 6)
    loaded = pickle.loads(pickle.dumps(layer))
    assert loaded.compute_dtype == copy.deepcopy(layer).compute_dtype == BFLOAT16
    assert torch.equal(loaded(x)[0], layer(x)[0])
    assert "compute_dtype=torch.bfloat16" in repr(layer)
    plain = torch.nn.LSTM(6, 19)
    assert list(layer.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(layer.state_dict())
    meprop.convert(plain, meprop.TopK(4), compute_dtype=BFLOAT16, when="always", min_features=1)
    assert torch.equal(plain(x)[0], layer(x)[0])
    meprop.revert(plain)
    assert not hasattr(plain, "compute_dtype")


def test_rules_of_ones_own_get_the_gradients_of_the_rounded_pass():
    class Everything(meprop.Rule):
        def select(self, grad_NO: Tensor) -> Selection:
            return everything(grad_NO)

        def keeps_all(self, features: int) -> bool:
            return False

    torch.manual_seed(0)
    layer = meprop.nn.LSTM(6, 19, rule=Everything(), compute_dtype=BFLOAT16)
    dense = rounded(layer)
    meprop.revert(dense)
    x = torch.randn(7, 5, 6, requires_grad=True)
    close(gradients(layer, x), gradients(dense, x))


@pytest.mark.parametrize("wrong", [torch.float16, torch.float32, "bfloat16"], ids=str)
def test_another_dtype_is_refused(wrong):
    weights = torch.ones(20, 4), torch.ones(20, 5)
    for make in (
        lambda: meprop.nn.LSTM(4, 5, rule=meprop.TopK(2), compute_dtype=wrong),
        lambda: functional.lstm(torch.ones(3, 2, 4), None, *weights, rule=meprop.TopK(2), compute_dtype=wrong),
    ):
        with pytest.raises(ValueError, match=r"compute_dtype=.*; it is torch\.bfloat16 or None"):
            make()
