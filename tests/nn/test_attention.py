"""MultiheadAttention: torch's own with every argument, and sparse in each of its projections."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import literal
import meprop
from literal import KeepAll
from meprop import speed

E, HEADS, TARGETS, SOURCES, BATCH = 12, 3, 4, 6, 2


def make(rule: meprop.Rule, **options) -> meprop.nn.MultiheadAttention:
    torch.manual_seed(0)
    layer = meprop.nn.MultiheadAttention(E, HEADS, rule=rule, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def plain(layer: meprop.nn.MultiheadAttention) -> nn.MultiheadAttention:
    twin = copy.deepcopy(layer)
    meprop.revert(twin)
    assert type(twin) is nn.MultiheadAttention
    return twin


def random_inputs(form: str, layer: nn.MultiheadAttention) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value: "self" is one tensor, "cross" has one for key and value, "three" none in common."""
    torch.manual_seed(1)

    def one(length: int, width: int) -> Tensor:
        shape = (BATCH, length, width) if layer.batch_first else (length, BATCH, width)
        return torch.randn((length, width) if form == "single" else shape, dtype=torch.float64).requires_grad_()

    query = one(TARGETS, E)
    if form == "self":
        return query, query, query
    if form == "cross":
        key = one(SOURCES, E)
        return query, key, key
    return query, one(SOURCES, layer.kdim), one(SOURCES, layer.vdim)


def random_mask(kind: str, *shape: int) -> Tensor | None:
    torch.manual_seed(2)
    if kind == "none":
        return None
    if kind == "causal":
        return torch.ones(shape[-2:], dtype=torch.bool).triu(1)
    if kind == "float":
        return torch.randn(shape, dtype=torch.float64)
    mask = torch.rand(shape) < 0.3
    mask[..., 0] = False  # or a row without any key is NaN
    return mask


def run(layer: nn.MultiheadAttention, inputs: tuple[Tensor, ...], **arguments) -> list[Tensor]:
    """Output, weights if there are, and the gradients of a random loss with respect to everything."""
    outputs = [output for output in layer(*inputs, **arguments) if output is not None]
    torch.manual_seed(3)
    loss = sum((output * torch.randn(output.shape, dtype=torch.float64)).sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, [*dict.fromkeys(inputs), *layer.parameters()])]


# Each value of each argument, with several of each other one.
ARGUMENTS = [
    # form, attn_mask, key_padding_mask, need_weights, average, options
    ("self", "none", "none", False, True, {}),
    ("self", "none", "none", True, True, {"batch_first": True}),
    ("self", "causal", "none", False, True, {"batch_first": True}),
    ("self", "causal", "none", True, False, {}),
    ("self", "causal", "bool", False, True, {"bias": False}),
    ("self", "bool", "bool", False, True, {"batch_first": True, "add_zero_attn": True}),
    ("self", "bool", "none", True, True, {"add_bias_kv": True}),
    ("self", "of heads", "float", False, True, {"add_bias_kv": True, "add_zero_attn": True}),
    ("self", "of heads", "none", True, False, {"batch_first": True, "bias": False}),
    ("cross", "none", "none", True, True, {"batch_first": True}),
    ("cross", "float", "none", False, True, {"add_bias_kv": True, "batch_first": True}),
    ("cross", "none", "bool", False, True, {"bias": False}),
    ("cross", "float", "float", True, False, {"add_zero_attn": True}),
    ("three", "bool", "bool", True, True, {"bias": False, "batch_first": True}),
    ("three", "none", "none", False, True, {"kdim": 5, "vdim": 7}),
    ("three", "of heads", "none", True, True, {"kdim": 5, "vdim": 7, "bias": False, "add_bias_kv": True}),
    ("three", "float", "float", False, True, {"vdim": 7, "batch_first": True, "add_zero_attn": True}),
    ("single", "none", "none", True, True, {}),
    ("single", "float", "float", False, True, {"batch_first": True, "add_bias_kv": True}),
    ("single", "of heads", "none", True, False, {"kdim": 5, "add_zero_attn": True}),
]


@pytest.mark.parametrize(("form", "attn_mask", "key_padding_mask", "need_weights", "average", "options"), ARGUMENTS)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_with_everything_kept_it_is_torchs(form, attn_mask, key_padding_mask, need_weights, average, options):
    layer = make(KeepAll(), **options)
    inputs = random_inputs(form, layer)
    sources, batch = TARGETS if form == "self" else SOURCES, () if form == "single" else (BATCH,)
    pairs = (TARGETS, sources)
    if attn_mask == "of heads":
        mask = random_mask("float", HEADS * (1 if form == "single" else BATCH), *pairs)
    else:
        mask = random_mask(attn_mask, *pairs)
    arguments = {
        "attn_mask": mask,
        "key_padding_mask": random_mask(key_padding_mask, *batch, sources),
        "need_weights": need_weights,
        "average_attn_weights": average,
        "is_causal": attn_mask == "causal",
    }
    found, expected = run(layer, inputs, **arguments), run(plain(layer), inputs, **arguments)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_is_torchs(need_weights):
    layer = make(KeepAll(), dropout=0.5)
    twin, inputs, found = plain(layer), random_inputs("self", layer), []
    for each in (layer, twin):
        torch.manual_seed(4)
        found.append(run(each, inputs, need_weights=need_weights))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert (layer(*inputs)[0] - layer(*inputs)[0]).abs().max() > 0.01


@pytest.mark.parametrize("scope", ["example", "batch"])
@pytest.mark.parametrize(
    ("form", "options"), [("self", {}), ("cross", {}), ("three", {}), ("three", {"kdim": 5, "vdim": 7})]
)
def test_sparse_gradients_are_those_of_literal_attention(form, options, scope):
    layer = make(meprop.TopK(2, scope=scope), **options)
    inputs = random_inputs(form, layer)
    found = run(layer, inputs, need_weights=False)
    output = literal.attention(layer, inputs, layer.rule)
    torch.manual_seed(3)
    loss = (output * torch.randn(output.shape, dtype=torch.float64)).sum()
    expected = [output, *torch.autograd.grad(loss, [*dict.fromkeys(inputs), *layer.parameters()])]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    rows = [
        int((g[part].abs().sum(1) > 0).sum()) for g in found if g.dim() == 2 for part in torch.arange(len(g)).split(E)
    ]
    assert rows == [2] * 4 if scope == "batch" else all(2 <= count <= E for count in rows)


def test_a_frozen_layer_passes_on_what_the_rule_keeps():
    layer = make(meprop.TopK(2)).requires_grad_(False)
    inputs, found = random_inputs("self", layer), []
    for output in (layer(*inputs, need_weights=False)[0], literal.attention(layer, inputs, layer.rule)):
        torch.manual_seed(3)
        found.append(torch.autograd.grad((output * torch.randn(output.shape)).sum(), inputs[0])[0])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)
    assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_left_to_torch():
    """Which takes them without gradients only, and says so."""
    layer = meprop.nn.MultiheadAttention(E, 4, rule=meprop.TopK(2), batch_first=True).eval()
    nested = torch.nested.nested_tensor([torch.randn(length, E) for length in (4, 2)])
    for each in (layer, plain(layer)):
        with pytest.raises(AssertionError, match="NestedTensor"):
            each(nested, nested, nested, need_weights=False)
    with torch.no_grad():
        found, expected = (each(nested, nested, nested, need_weights=False)[0] for each in (layer, plain(layer)))
    for one, other in zip(found.unbind(), expected.unbind(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", ["self", "cross"])
def test_row_sparse_gradients_are_the_dense_ones(form):
    layer = make(meprop.TopK(2, scope="batch"))
    inputs = random_inputs(form, layer)
    dense = run(layer, inputs)
    layer.sparse_grad = True
    found = run(layer, inputs)
    assert sum(gradient.layout == torch.sparse_coo for gradient in found) == 2  # in_proj_weight and out_proj.weight
    for one, other in zip(found, dense, strict=True):
        torch.testing.assert_close(one.to_dense(), other)
    layer.in_proj_weight.grad, start = found[-4], layer.in_proj_weight.detach().clone()
    meprop.optim.SGD(layer.parameters(), lr=0.5).step()
    torch.testing.assert_close(layer.in_proj_weight.detach(), start - 0.5 * dense[-4])


def test_where_nothing_is_left_out_torchs_own_forward_runs(monkeypatch):
    layer, calls = make(meprop.TopK(2), batch_first=True), []
    original = F.multi_head_attention_forward  # which only torch's own forward pass calls
    monkeypatch.setattr(
        F, "multi_head_attention_forward", lambda *args, **options: calls.append(1) or original(*args, **options)
    )
    inputs = random_inputs("self", layer)
    layer(*inputs)
    assert not calls
    with torch.no_grad():
        layer(*inputs)
    layer.rule = meprop.TopK(E)
    layer(*inputs)
    layer.rule = meprop.TopK(2)
    layer.requires_grad_(False)
    layer(*(x.detach() for x in inputs))
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(4, 2, 11)}, r"query is \[4, 2, 11\].*\[4, 2, 12\]"),
        ({"query": torch.zeros(12)}, r"query is \[12\]; it is \[L, B, E\]"),
        ({"key": torch.zeros(6, 3, 12)}, r"key is \[6, 3, 12\].*\[6, 2, 12\]"),
        ({"value": torch.zeros(5, 2, 12)}, r"value is \[5, 2, 12\].*\[6, 2, 12\]"),
        ({"key_padding_mask": torch.zeros(6, 2)}, r"key_padding_mask is \[6, 2\].*\[2, 6\]"),
        ({"attn_mask": torch.zeros(1, 6)}, r"attn_mask is \[1, 6\].*\[4, 6\] or \[6, 4, 6\]"),
        ({"is_causal": True}, "is_causal=True is a hint about attn_mask"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    layer = make(meprop.TopK(2)).float()
    arguments = {"query": torch.zeros(4, 2, 12), "key": torch.zeros(6, 2, 12), "value": torch.zeros(6, 2, 12)}
    with pytest.raises(ValueError, match=message):
        layer(**(arguments | change))
    with pytest.raises(TypeError, match=r"attn_mask is of dtype torch\.int64"):
        layer(**arguments, attn_mask=torch.zeros(4, 6, dtype=torch.int64))


def test_the_rule_is_checked_and_shown():
    with pytest.raises(TypeError, match=r"rule=0\.05"):
        make(0.05)
    with pytest.raises(ValueError, match="sparse_grad=True"):
        make(meprop.TopK(2), sparse_grad=True)
    assert "rule=TopK(k=2, scope='example')" in repr(make(meprop.TopK(2)))


@pytest.mark.parametrize("faster", [False, True])
def test_it_decides_once_for_all_projections_also_when_checkpointed(monkeypatch, faster):
    """A layer that is called twice decides between the two passes that are run again."""
    asked = []
    monkeypatch.setattr(speed, "decide", lambda *args: asked.append(args) or speed.Decision(faster, 8, 1.0, 1.0))
    layer = nn.MultiheadAttention(128, 4)
    meprop.convert(layer, meprop.TopK(2, scope="batch"))
    x = torch.randn(4, 2, 128, requires_grad=True)
    for _ in range(2):
        y = checkpoint(lambda y: layer(y, y, y, need_weights=False)[0], x, use_reentrant=False)
        checkpoint(lambda y: layer(y, y, y, need_weights=False)[0], y, use_reentrant=False).sum().backward()
    ((rule, shape),) = asked
    assert (rule, shape.rows, shape.inputs, shape.outputs) == (layer.rule, 8, 128, 128)
    layer.zero_grad()
    layer(x, x, x)[0].square().sum().backward()
    assert int((layer.in_proj_weight.grad.abs().sum(1) > 0).sum()) == (6 if faster else 384)


# ---------------------------------------------------------------- in a transformer


def transformer() -> nn.Transformer:
    torch.manual_seed(0)
    return nn.Transformer(128, 4, 1, 1, 256, dropout=0.0, batch_first=True)


def test_a_transformers_projections_are_all_sparse():
    model, rule = transformer(), meprop.TopK(0.05, scope="batch")
    report = meprop.convert(model, rule, when="always")
    names = ["encoder.layers.0.self_attn", "encoder.layers.0.linear1", "encoder.layers.0.linear2"]
    names += [f"decoder.layers.0.{part}" for part in ("self_attn", "multihead_attn", "linear1", "linear2")]
    assert [(layer.name, layer.status) for layer in report.layers] == [(name, "sparse") for name in names]
    assert (report.layers[0].kind, report.layers[0].in_features, report.layers[0].k) == ("MultiheadAttention", 128, 6)
    causal = nn.Transformer.generate_square_subsequent_mask(3)
    model(torch.randn(2, 5, 128), torch.randn(2, 3, 128), tgt_mask=causal, tgt_is_causal=True).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            rows = int((parameter.grad.abs().sum(1) > 0).sum())
            assert rows == (18 if "in_proj" in name else 13 if "linear1" in name else 6), name


def test_evaluation_without_gradients_is_torchs_and_training_goes_on():
    model, x = transformer().encoder, torch.randn(2, 5, 128)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = model.eval()(x, src_key_padding_mask=padding)  # nested tensors, on torch's fast path
        meprop.convert(model, meprop.TopK(0.05), when="always")
        assert torch.equal(model(x, src_key_padding_mask=padding), expected)
    model.train()(x, src_key_padding_mask=padding).square().sum().backward()
    rows = int((model.layers[0].linear1.weight.grad != 0).any(dim=1).sum())
    assert 0 < rows < 256


def test_conversion_keeps_identity_and_revert_leaves_no_trace():
    model, untouched = transformer(), transformer()
    modules, parameters = list(model.modules()), list(model.parameters())
    meprop.convert(model, meprop.TopK(0.05), when="always")
    assert isinstance(model.encoder.layers[0].self_attn, meprop.nn.MultiheadAttention)
    assert list(model.state_dict()) == list(untouched.state_dict())
    meprop.revert(model)
    assert all(one is other for one, other in zip(modules, model.modules(), strict=True))
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    for module, same in zip(model.modules(), untouched.modules(), strict=True):
        assert type(module) is type(same)
        assert vars(module).keys() == vars(same).keys()


def test_what_stays_dense_says_why():
    class OwnForward(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"own": OwnForward(128, 4), "narrow": nn.MultiheadAttention(64, 4)})
    model["refused"], model["odd"] = nn.MultiheadAttention(132, 4), nn.Linear(128, 130)
    model["sparse"] = nn.Linear(128, 129)
    rule = meprop.InBlocks(meprop.TopK(5), 3)
    report = meprop.convert(model, rule, filter=lambda name, _: name != "refused", when="always")
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert "subclass of MultiheadAttention" in reasons["own"]
    assert "64 output features" in reasons["narrow"]
    assert "filter" in reasons["refused"]
    assert "130 output features are not 3 equal blocks" in reasons["odd"]
    assert [layer.status for layer in report.layers] == ["dense"] * 4 + ["sparse"]


def test_a_simplifier_leaves_attention_alone_and_says_so():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention, self.head = nn.Linear(7, 128), nn.MultiheadAttention(128, 4), nn.Linear(128, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    model = Model()
    meprop.convert(model, meprop.TopK(5), when="always")
    with pytest.warns(meprop.NoEffectWarning, match="nothing can be pruned"):
        report = meprop.Simplifier(model).report()
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert "'attention' (MultiheadAttention) reads it" in reasons["first"]
    assert reasons["attention"] == "only linear layers, convolutions and LSTMs are"
