"""Bad input of public functions: an error that says what was got and what is allowed, or torch's own error.

Bad input of the classes that have test files of their own is in those files.
"""

import re

import pytest
import torch

import meprop
from meprop import NotSupportedError, distributed, ops, optim, pruning, selection
from meprop import functional as F
from meprop.selection import Entries, PlainTopK

TOP, BATCH = meprop.TopK(2), meprop.TopK(2, scope="batch")
GRAD, COMPLEX = torch.arange(24.0).view(4, 6), torch.ones(4, 6, dtype=torch.complex64)
X, W, NOT = torch.ones(4, 3), torch.ones(6, 3), [[1.0]]
IMAGE, KERNEL = torch.ones(2, 3, 4, 4), torch.ones(6, 3, 3, 3)
STEPS, W_IH, W_HH = torch.ones(5, 2, 3), torch.ones(24, 3), torch.ones(24, 6)
PLAIN, INT_COLUMNS = PlainTopK(2, "example"), torch.tensor([0, 1], dtype=torch.int32)
INT_ROWS = INT_COLUMNS.expand(4, 2)
LINEAR, LSTM = meprop.nn.Linear(3, 6, rule=TOP), meprop.nn.LSTM(3, 4, rule=TOP)
MODEL = torch.nn.Sequential(meprop.nn.Linear(3, 6, rule=TOP))


def key(*numbers):
    return torch.tensor(numbers)


def rows(values=GRAD[:, :2], indices=INT_ROWS, width=6, **options):
    return meprop.RowSelection(values, indices, width, **options)


def columns(values=GRAD[:, :2], indices=INT_COLUMNS, width=6, **options):
    return meprop.ColumnSelection(values, indices, width, **options)


def keep(*, grad=GRAD, **options):
    return ops.keep_entries(grad, Entries(**({"keep": "drawn", "k": 2, "key": key(3)} | options)))


def lstm(x=STEPS, hx=None, weight_ih=W_IH, weight_hh=W_HH, **options):
    return F.lstm(x, hx, weight_ih, weight_hh, rule=TOP, **options)


def lstm_op(weight_ih=W_IH, bias=None, initial=(None, None)):
    return ops.lstm_forward(torch.ones(5, 3), weight_ih, W_HH, bias, initial, key(3, 2), False)


def backward(choice=PLAIN, grad=GRAD, weight=W, x=X):
    return ops.linear_backward(choice, grad, weight, x, True, False)


def maps(channels, dtype=torch.float32, padding=1):
    kept = ops.Maps(key(0, 2, 2), channels, torch.ones(2, dtype=dtype), False)
    grad = torch.ones(2, 6, 4, 4, dtype=dtype)
    moves = (1, 1), (padding, padding), (1, 1)
    return ops.maps_backward(kept, grad, IMAGE.to(dtype), KERNEL.to(dtype), moves, (True, True))


def updated(indices, dtype=torch.float32):
    gradient = ops.GradientRows(indices, torch.ones(2, 3, dtype=dtype))
    return ops.adagrad_rows(W.to(dtype), W.to(dtype), gradient, lr=0.1, eps=0.1, weight_decay=0)


ERRORS = {
    "select: list": (lambda: TOP.select(NOT), TypeError, "of type list"),
    "select: None": (lambda: meprop.Sampled().select(None), TypeError, "of type NoneType"),
    "select: complex": (lambda: TOP.select(COMPLEX), TypeError, "not torch.complex64"),
    "select: bool": (lambda: TOP.select(GRAD.bool()), TypeError, "not torch.bool"),
    "select: 8 bits": (lambda: TOP.select(GRAD.to(torch.float8_e4m3fn)), TypeError, "not torch.float8_e4m3fn"),
    "select: sparse": (lambda: TOP.select(GRAD.to_sparse()), TypeError, "torch.sparse_coo; call to_dense()"),
    "select: no features": (lambda: meprop.Sampled().select(GRAD[:, :0]), ValueError, "not [4, 0]"),
    "energy: meta": (lambda: meprop.TopK(energy=0.5).select(GRAD.to("meta")), NotSupportedError, "meta device"),
    "TopK: exact_sum": (lambda: meprop.TopK(2, exact_sum="no"), TypeError, "exact_sum='no'"),
    "energy: exact_sum": (lambda: meprop.TopK(energy=0.5, exact_sum=1), TypeError, "exact_sum=1"),
    "RandomK: exact_sum": (lambda: meprop.RandomK(2, exact_sum="no"), TypeError, "exact_sum='no'"),
    "Sampled: exact_sum": (lambda: meprop.Sampled(exact_sum="no"), TypeError, "exact_sum='no'"),
    "Sampled: ceiling": (lambda: meprop.Sampled(ceiling=True), ValueError, "ceiling=True is a bool"),
    "rows: values": (lambda: rows([1.0]), TypeError, "values is of type list"),
    "rows: indices": (lambda: rows(indices=[1]), TypeError, "indices is of type list"),
    "rows: starts": (lambda: rows(starts=[0, 2]), TypeError, "starts is of type list"),
    "rows: width": (lambda: rows(width="6"), ValueError, "width='6'"),
    "columns: width": (lambda: columns(width=-6), ValueError, "width=-6"),
    "columns: shared": (lambda: columns(shared=[1.0]), TypeError, "shared is of type list"),
    "columns: devices": (lambda: columns(GRAD[:, :2].to("meta")), ValueError, "values are on meta"),
    "linear: x": (lambda: F.linear(NOT, W, rule=TOP), TypeError, "x is of type list"),
    "linear: weight": (lambda: F.linear(X, None, rule=TOP), TypeError, "weight is of type NoneType"),
    "linear: bias": (lambda: F.linear(X, W, 1.0, rule=TOP), TypeError, "bias is of type float"),
    "linear: weight [I]": (lambda: F.linear(X, W[0], rule=TOP), ValueError, "weight is [3]"),
    "linear: weight [2, O, I]": (lambda: F.linear(X, W.expand(2, 6, 3), rule=TOP), ValueError, "weight is [2, 6, 3]"),
    "linear: bias [N, O]": (lambda: F.linear(X, W, GRAD, rule=TOP), ValueError, "bias [4, 6]"),
    "linear: bias [1]": (lambda: F.linear(X, W, torch.ones(1), rule=TOP), ValueError, "bias [1]"),
    "linear: class": (lambda: F.linear(X, W, rule=meprop.TopK), TypeError, "must be a rule"),
    "conv2d: input": (lambda: F.conv2d(NOT, KERNEL, rule=BATCH), TypeError, "input is of type list"),
    "conv2d: weight": (lambda: F.conv2d(IMAGE, NOT, rule=BATCH), TypeError, "weight is of type list"),
    "conv2d: stride": (lambda: F.conv2d(IMAGE, KERNEL, stride=1.5, rule=BATCH), TypeError, "not 1.5"),
    "conv2d: groups": (lambda: F.conv2d(IMAGE, KERNEL, groups="1", rule=BATCH), NotSupportedError, "groups='1'"),
    "lstm: x": (lambda: lstm(NOT), TypeError, "x is of type list"),
    "lstm: weight": (lambda: lstm(weight_hh=None), TypeError, "weight_hh is of type NoneType"),
    "lstm: hx": (lambda: lstm(hx=(None, None)), ValueError, "hx is a tuple of two tensors"),
    "lstm: no units": (lambda: lstm(weight_hh=torch.ones(0, 0)), ValueError, "weight_hh is [0, 0]"),
    "lstm: reverse": (lambda: lstm(reverse="no"), TypeError, "reverse='no'"),
    "lstm: batch_sizes": (lambda: lstm(X, batch_sizes=[2, 2]), ValueError, "batch_sizes is [2, 2]"),
    "layer: decision": (lambda: setattr(LINEAR, "decision", "dense"), TypeError, "decision='dense'"),
    "layer: activity": (lambda: setattr(LINEAR, "activity", 3), TypeError, "activity=3"),
    "schedule: state": (
        lambda: meprop.RuleSchedule(MODEL, lambda _, rule: rule).load_state_dict(None),
        ValueError,
        "None",
    ),
    "anneal: start": (lambda: meprop.anneal("a", 1.0, 0.5), TypeError, "start='a'"),
    "anneal: NaN": (lambda: meprop.anneal(0.1, 1.0, float("nan")), ValueError, "share=nan"),
    "convert: model": (lambda: meprop.convert(None, TOP), TypeError, "model is of type NoneType"),
    "convert: rule": (lambda: meprop.convert(LINEAR, 3), TypeError, "rule=3"),
    "convert: filter": (lambda: meprop.convert(LINEAR, TOP, filter=3), TypeError, "filter=3"),
    "convert: when": (lambda: meprop.convert(LINEAR, TOP, when="never"), ValueError, "when='never'"),
    "report: model": (lambda: meprop.report(3), TypeError, "model is of type int"),
    "revert: model": (lambda: meprop.revert(3), TypeError, "model is of type int"),
    "share_noise: total": (lambda: meprop.share_noise(MODEL, -1.0), ValueError, "total=-1.0"),
    "schedule: model": (lambda: meprop.RuleSchedule(3, lambda _, rule: rule), TypeError, "model is of type int"),
    "schedule: rule_at": (lambda: meprop.RuleSchedule(MODEL, 3), TypeError, "rule_at=3"),
    "in_blocks: rule": (lambda: meprop.rules.in_blocks(3, 2), TypeError, "rule=3"),
    "in_blocks: blocks": (lambda: meprop.rules.in_blocks(TOP, 0), ValueError, "blocks=0"),
    "PerProduct: rule": (lambda: meprop.PerProduct(input=3, weight=TOP), TypeError, "input=3"),
    "side by side: 3": (lambda: selection.side_by_side([3]), TypeError, "is a int"),
    "side by side: none": (lambda: selection.side_by_side([]), ValueError, "not none"),
    "handles: nothing": (lambda: pruning.handles(), ValueError, "handles() names no operation"),
    "handles: 3": (lambda: pruning.handles(3), TypeError, "handles(3)"),
    "handles: resize": (lambda: pruning.handles("method", resize=3), TypeError, "resize=3"),
    "handles: handler": (lambda: pruning.handles("method")(3), TypeError, "is 3; it is a function of a Call"),
    "remove_handler: 3": (lambda: pruning.remove_handler("relu", 3), KeyError, "3 has no handler"),
    "register: a descriptor": (lambda: meprop.nn.base.register(3), TypeError, "register(3)"),
    "register: a backend": (lambda: ops.register(3), TypeError, "register(3)"),
    "remove: a backend": (lambda: ops.remove(3), ValueError, "3 cannot be removed"),
    "average_gradients: [3]": (lambda: distributed.average_gradients([W, 3]), TypeError, "parameters has 3"),
    "average_gradients: 3": (lambda: distributed.average_gradients(3), TypeError, "parameters=3"),
    "RowSparseState: 3": (lambda: distributed.RowSparseState(3), TypeError, "process_group=3"),
    "draw_rows: k > O": (lambda: ops.draw_rows(GRAD, 9, key(3)), ValueError, "k=9"),
    "draw_columns: k = 0": (lambda: ops.draw_columns(GRAD, 0, key(3)), ValueError, "k=0"),
    "kept_maps: norms": (lambda: ops.kept_maps(rows(), GRAD[:3]), ValueError, "norms [3, 6]"),
    "maps: channels twice": (lambda: maps(key(1, 1).int()), IndexError, "must ascend"),
    "maps: float64": (lambda: maps(key(1, 1).int(), torch.float64), IndexError, "must ascend"),
    "maps: moves": (lambda: maps(key(0, 1).int(), padding=2), ValueError, "do not go with"),
    "rows: twice": (lambda: updated(key(1, 1)), IndexError, "must ascend"),
    "rows: twice, float64": (lambda: updated(key(1, 1), torch.float64), IndexError, "must ascend"),
    "ops: k = 0": (lambda: ops.topk_rows(GRAD.double(), 0), ValueError, "k=0"),
    "ops: k = -1": (lambda: ops.topk_columns(GRAD, -1), ValueError, "k=-1"),
    "ops: k > O": (lambda: ops.topk_channels(GRAD, 9), ValueError, "k=9"),
    "ops: a vector": (lambda: ops.topk_rows(GRAD[0], 2), ValueError, "gradient [6]"),
    "ops: weight [5, I]": (lambda: backward(weight=W[:5]), ValueError, "weight [5, 3]"),
    "ops: float64": (lambda: backward(grad=GRAD.double(), weight=W[:5].double()), ValueError, "weight [5, 3]"),
    "ops: input": (lambda: backward(x=X[:3]), ValueError, "input [3, 3]"),
    "ops: a column": (lambda: backward(columns(indices=INT_COLUMNS + 5)), IndexError, "within the output features"),
    "entries: keep": (lambda: keep(keep="all"), ValueError, "keep='all'"),
    "entries: k": (lambda: keep(k=-3), ValueError, "k=-3"),
    "entries: share": (lambda: keep(keep="energy", share=float("nan")), ValueError, "share=nan"),
    "entries: no key": (lambda: keep(key=None), ValueError, "key=None"),
    "entries: no key, float64": (lambda: keep(grad=GRAD.double(), key=None), ValueError, "key=None"),
    "entries: two keys": (lambda: keep(key=key(1, 2)), ValueError, "one int64"),
    "entries: float key": (lambda: keep(key=torch.tensor(0.3)), ValueError, "one int64"),
    "LSTM op: weight": (lambda: lstm_op(torch.ones(24, 4)), ValueError, "weight_ih is [24, 4]; it is [24, 3]"),
    "LSTM op: bias": (lambda: lstm_op(bias=torch.ones(7)), ValueError, "bias is [7]; it is [24]"),
    "LSTM op: state": (lambda: lstm_op(initial=(torch.ones(1, 6), None)), ValueError, "h0 is [1, 6]; it is [3, 6]"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_says_what_was_got(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("indices", [[0, 9], [-1, 2], [2, 10**12], [-(2**63), 0]], ids=str)
@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("use", ["SGD", "Adagrad", "Adam", "AdamW", "clip"])
def test_rows_that_are_not_there_are_refused_before_torch_reads_them(use, coalesced, indices):
    parameter = torch.nn.Parameter(torch.ones(6, 3))
    parameter.grad = torch.sparse_coo_tensor(
        torch.tensor([indices]), torch.ones(2, 3), (6, 3), is_coalesced=coalesced, check_invariants=False
    )
    step = getattr(optim, use)([parameter]).step if use != "clip" else lambda: optim.clip_grad_norm_([parameter], 1.0)
    with pytest.raises(IndexError, match=r"shape \[6, 3\] has the index"):
        step()
    assert torch.equal(parameter, torch.ones(6, 3))


def test_rows_out_of_order_are_put_in_order_whatever_the_gradient_says():
    found = []
    for coalesced in (False, True):
        parameter = torch.nn.Parameter(torch.ones(6, 3))
        parameter.grad = torch.sparse_coo_tensor(
            torch.tensor([[4, 1]]), GRAD[:2, :3], (6, 3), is_coalesced=coalesced, check_invariants=False
        )
        optim.SGD([parameter], lr=1.0).step()
        found.append(parameter.detach())
    assert torch.equal(*found)


# A layer, the same of torch, and an input that torch's refuses.
LAYERS = {
    "Linear: None": (LINEAR, torch.nn.Linear(3, 6), None),
    "Linear: list": (LINEAR, torch.nn.Linear(3, 6), NOT),
    "Linear: width": (LINEAR, torch.nn.Linear(3, 6), torch.ones(4, 5)),
    "Linear: dtype": (LINEAR, torch.nn.Linear(3, 6), X.int()),
    "Linear: device": (LINEAR, torch.nn.Linear(3, 6), X.to("meta")),
    "Conv2d: None": (meprop.nn.Conv2d(3, 6, 3, rule=BATCH), torch.nn.Conv2d(3, 6, 3), None),
    "Conv2d: dimensions": (meprop.nn.Conv2d(3, 6, 3, rule=BATCH), torch.nn.Conv2d(3, 6, 3), X),
    "Conv2d: too small": (meprop.nn.Conv2d(3, 6, 3, rule=BATCH), torch.nn.Conv2d(3, 6, 3), IMAGE[..., :2]),
    "LSTM: dimensions": (LSTM, torch.nn.LSTM(3, 4), torch.ones(3)),
    "LSTM: no steps": (LSTM, torch.nn.LSTM(3, 4), STEPS[:0]),
    "LSTM: width": (LSTM, torch.nn.LSTM(3, 4), torch.ones(5, 2, 9)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_refuses_what_torchs_does_with_the_same_error(case):
    layer, plain, input = LAYERS[case]
    with pytest.raises(Exception) as of_torch:  # noqa: PT011  (whatever torch raises)
        plain(input)
    with pytest.raises(of_torch.type):
        layer(input)


# Output gradients that look odd, and are served.
ODD = {
    "no rows": GRAD[:0],
    "one entry": GRAD[:1, :1],
    "NaN": GRAD * float("nan"),
    "infinite": GRAD / 0,
    "huge": GRAD * 1e37,
    "expanded": GRAD[:1].expand(4, 6),
    "transposed": GRAD.t(),
    "every other column": GRAD[:, ::2],
    "float16": GRAD.half(),
    "negative view": torch._neg_view(GRAD),
}


@pytest.mark.parametrize("scope", ["example", "batch", "global"])
@pytest.mark.parametrize("case", ODD)
def test_odd_gradients_give_the_literal_selection(case, scope):
    grad = ODD[case]
    k = min(2, grad.shape[1])
    magnitudes = grad.double().abs().nan_to_num(nan=float("inf"))
    if scope == "batch":
        kept = magnitudes.sum(0).sort(descending=True, stable=True).indices[:k].expand(len(grad), k)
        expected = torch.zeros_like(magnitudes, dtype=torch.bool).scatter_(1, kept, True)
    elif scope == "example":
        kept = magnitudes.sort(dim=1, descending=True, stable=True).indices[:, :k]
        expected = torch.zeros_like(magnitudes, dtype=torch.bool).scatter_(1, kept, True)
    else:
        kept = magnitudes.flatten().sort(descending=True, stable=True).indices[: k * len(grad)]
        expected = torch.zeros(grad.numel(), dtype=torch.bool).scatter_(0, kept, True).view(grad.shape)
    found = meprop.TopK(k, scope=scope).select(grad).to_dense()
    torch.testing.assert_close(found, torch.where(expected, grad, 0), rtol=0, atol=0, equal_nan=True)
