"""The sweep over model families in a small form. `make sweep` runs it whole (docs/models.md)."""

import pytest
import torch
from torch import nn

import meprop
from sweep import oracle
from sweep.families import TIMM, TRANSFORMERS, dtypes

FEW = [
    "BertForMaskedLM",
    "GPT2LMHeadModel",  # Conv1D
    "T5ForConditionalGeneration",
    "SiglipVisionModel",  # torch's attention
    "Wav2Vec2ForCTC",  # convolutions
    "EncodecModel",  # an LSTM
]


@pytest.mark.parametrize("name", FEW)
def test_a_step_of_a_model_has_the_gradients_of_its_literal_twin(name):
    model, inputs = TRANSFORMERS[name]()
    result = oracle.examine(model, inputs, dtypes(name, model))
    assert not result.failures
    assert not result.unseen
    assert result.sparse > 0
    assert result.whole.keys() == result.part.keys() == {torch.float64, torch.float32}


def test_the_sweep_has_as_many_families_as_it_promises():
    assert len(TRANSFORMERS) >= 30
    assert len(TIMM) >= 30


class Reader(nn.Module):
    """Calls one of its layers, and reads the weight of the other one."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.read.weight)


def test_a_layer_whose_weight_is_read_past_it_is_found():
    assert oracle.examine(Reader(), {"x": torch.randn(4, 6)}, [torch.float64]).unseen == ["read"]


def test_a_wrong_gradient_is_found(monkeypatch):
    monkeypatch.setattr(oracle.Largest, "select", lambda self, grad_NO: meprop.TopK(1).select(grad_NO))
    result = oracle.examine(nn.Linear(6, 8), {"input": torch.randn(4, 6)}, [torch.float64])
    assert [failure.partition(":")[0] for failure in result.failures] == [
        f"k < n, {scope}, float64" for scope in ("example", "batch", "global")
    ]


def test_an_error_is_named_once():
    result = oracle.Result()
    oracle._compare(result, result.whole, "", lambda: 1 / 0, (0.0, {}), torch.float64)
    oracle._compare(result, result.whole, "", lambda: 1 / 0, (0.0, {}), torch.float64)
    assert result.failures == ["ZeroDivisionError: division by zero"]
