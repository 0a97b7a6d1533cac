"""Models of Hugging Face's transformers: Conv1D, and which layers of a model are converted."""

import copy

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

import meprop
from literal import KeepAll
from meprop import speed

TOKENS = torch.randint(0, 300, (2, 10), generator=torch.Generator().manual_seed(0))


def gpt2(**options) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    config = {"vocab_size": 300, "n_positions": 16, "n_embd": 128, "n_layer": 1, "n_head": 4}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, **dropout, **options))


def bert(**options) -> transformers.BertForMaskedLM:
    torch.manual_seed(0)
    config = {"vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config |= {"intermediate_size": 256, "max_position_embeddings": 16}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(transformers.BertConfig(**config, **dropout, **options))


@pytest.mark.parametrize("make", [gpt2, bert])
@pytest.mark.parametrize("rule", [KeepAll(), meprop.TopK(1.0)], ids=["sparse path", "k = n"])
@pytest.mark.filterwarnings("ignore::meprop.NoEffectWarning")  # of k = n
def test_with_everything_kept_loss_and_gradients_are_those_of_the_plain_model(make, rule):
    model = make().double()
    twin = copy.deepcopy(model)
    meprop.convert(model, rule, when="always")
    losses = []
    for each in (model, twin):
        loss = each(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [gpt2, bert])
@pytest.mark.parametrize("tied", [True, False])
def test_all_layers_of_a_model_are_sparse_but_its_output(make, tied):
    model = make(tie_word_embeddings=tied)
    report = meprop.convert(model, meprop.TopK(5, scope="batch"), when="always")
    *hidden, head = report.layers
    assert {layer.status for layer in hidden} == {"sparse"}
    assert head.reason.startswith("its weight is tied to Embedding" if tied else "it gives the model's outputs")
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for layer in hidden:
        module = model.get_submodule(layer.name)
        features = module.weight.grad.abs().sum(dim=0 if isinstance(module, Conv1D) else 1)
        assert int((features > 0).sum()) == 5, layer.name
    assert len(hidden) == (4 if make is gpt2 else 7)


def test_an_output_layer_is_converted_by_itself_or_by_nobody():
    model = gpt2(tie_word_embeddings=False)
    meprop.convert(model.lm_head, meprop.TopK(5), when="always")
    wrapped = torch.nn.ModuleDict({"inner": gpt2(tie_word_embeddings=False), "given": model})
    report = meprop.convert(wrapped, meprop.TopK(6), when="always")
    found = {layer.name: layer.k for layer in report.layers if "lm_head" in layer.name}
    assert found == {"inner.lm_head": None, "given.lm_head": 5}


def test_query_key_and_value_in_one_layer_can_be_told_apart():
    model = gpt2()
    rule = meprop.TopK(5, scope="batch")
    meprop.convert(model, rule, when="always")
    apart = lambda name, _: name.endswith("c_attn")  # noqa: E731
    meprop.convert(model, meprop.InBlocks(rule, 3), filter=apart, when="always")
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    attention = model.transformer.h[0].attn
    kept = (attention.c_attn.weight.grad.abs().sum(dim=0) > 0).view(3, 128).sum(dim=1)
    assert kept.tolist() == [5, 5, 5]
    assert attention.c_proj.rule == rule


def test_conv1d_is_the_same_object_and_back():
    plain = Conv1D(200, 30)
    weight, before, x = plain.weight, repr(plain), torch.randn(4, 5, 30)
    expected = plain(x)
    report = meprop.convert(plain, meprop.TopK(10), when="always")
    assert (report.layers[0].kind, report.layers[0].in_features, report.layers[0].out_features) == ("Conv1D", 30, 200)
    assert torch.equal(plain(x), expected)
    assert plain.weight is weight
    assert repr(plain) == "Conv1D(nf=200, nx=30, rule=TopK(k=10, scope='example'))"
    meprop.revert(plain)
    assert type(plain) is Conv1D
    assert vars(plain).keys() == vars(Conv1D(200, 30)).keys()
    assert repr(plain) == before


def test_conv1d_by_hand_is_checked():
    from meprop.nn import huggingface

    made = huggingface.Conv1D(200, 30, rule=meprop.TopK(10))
    assert (made.when, tuple(made.weight.shape)) == ("always", (30, 200))
    with pytest.raises(TypeError, match=r"rule=0\.05"):
        huggingface.Conv1D(200, 30, rule=0.05)


def test_conv1d_cannot_be_row_sparse_and_says_so():
    model = torch.nn.Sequential(Conv1D(200, 30), torch.nn.Linear(200, 200))
    report = meprop.convert(model, meprop.TopK(5, scope="batch"), sparse_grad=True)
    assert [each.status for each in report.layers] == ["dense", "sparse"]
    assert "columns, not rows" in report.layers[0].reason


def test_conv1d_is_measured_as_it_lies_in_memory(monkeypatch):
    shapes = []
    monkeypatch.setattr(speed, "decide", lambda _, shape: shapes.append(shape) or speed.Decision(True, 4, 2.0, 1.0))
    converted = Conv1D(200, 30)
    meprop.convert(converted, meprop.TopK(5))
    converted(torch.randn(4, 30)).sum().backward()
    assert str(shapes[0]) == "4x30x200 wb transposed"
    dense, sparse = shapes[0].passes(meprop.TopK(5))
    assert [gradient.shape for gradient in dense()] == [gradient.shape for gradient in sparse()] == [(200, 30), (200,)]


def test_compute_dtype_is_that_of_conv1ds_forward_product():
    layer, x = Conv1D(200, 30), torch.randn(6, 30)
    exact = layer(x)
    meprop.convert(layer, meprop.TopK(5), compute_dtype=torch.bfloat16)
    narrow = layer(x)
    assert narrow.dtype == torch.float32
    assert 0 < (exact - narrow).abs().max() < 0.02
