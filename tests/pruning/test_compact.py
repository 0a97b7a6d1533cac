"""The compact model is a plain one: it can be saved and exported."""

import pytest
import torch
from torch import Tensor, nn

import meprop
from prunable import CASES, RULE, WIDTH, make


def simplified(name: str) -> tuple[nn.Module, meprop.Simplifier, Tensor]:
    model, x = make(CASES[name], torch.float32)
    simplifier = meprop.Simplifier(model, 0.3, check_every=1, example_inputs=(x,))
    model(x).square().sum().backward()
    simplifier.step()
    model.zero_grad()
    return simplifier.compact().eval(), simplifier, x


@pytest.mark.parametrize("name", CASES)
def test_the_compact_model_is_saved_as_safetensors(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, simplifier, x = simplified(name)
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    loaded = simplifier.compact().eval()
    for parameter in loaded.parameters():
        parameter.data.zero_()
    safetensors.load_model(loaded, str(tmp_path / "model.safetensors"))
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("lstm", "stacked, bidirectional lstm")])
def test_the_compact_model_is_exported(name):
    """By torch.export; packed sequences are none of its types."""
    model, _, x = simplified(name)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("lstm", "stacked, bidirectional lstm")])
def test_the_compact_model_is_exported_to_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, _, x = simplified(name)
    torch.onnx.export(model, (x,), str(tmp_path / "model.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), rtol=0, atol=1e-5)


def test_a_compact_lstm_is_exported(tmp_path):
    """By torch.export, and where its packages are there to ONNX: one that gets tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), Last(nn.LSTM(5, WIDTH)), nn.Linear(WIDTH, 3))
    x = torch.randn(4, 3, 6)
    meprop.convert(model, RULE, min_features=10, when="always")
    simplifier = meprop.Simplifier(model, 0.3, check_every=1)
    model(x).square().sum().backward()
    simplifier.step()
    compact = simplifier.compact().eval()
    assert compact[1].lstm.hidden_size < WIDTH
    exported = torch.export.export(compact, (x,)).module()
    torch.testing.assert_close(exported(x), compact(x), rtol=0, atol=1e-6)
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(compact, (x,), str(tmp_path / "model.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), compact(x).detach(), rtol=0, atol=1e-5)


class Last(nn.Module):
    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]
