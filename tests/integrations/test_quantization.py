"""Torch's eager quantization, which looks layers up by their exact type, takes converted models as plain ones."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.ao.quantization import (
    convert,
    default_dynamic_qconfig,
    fuse_modules,
    fuse_modules_qat,
    get_default_qat_qconfig,
    get_default_qconfig,
    get_default_qconfig_mapping,
    prepare,
    prepare_qat,
    quantize_dynamic,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import meprop

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.relu = nn.Conv2d(3, 128, 3), nn.BatchNorm2d(128), nn.ReLU()
        self.linear, self.lstm = nn.Linear(128, 128), nn.LSTM(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.relu(self.norm(self.conv(x)))
        return self.lstm(self.linear(maps.mean((2, 3)))[None])[0]


def with_qconfig(model: nn.Module, qconfig: object) -> nn.Module:
    model.qconfig = qconfig
    return model


CALLS = {
    "dynamic": lambda model: quantize_dynamic(model),
    "dynamic, linear": lambda model: quantize_dynamic(model, {nn.Linear}),
    "dynamic, by name": lambda model: quantize_dynamic(model, {"linear": default_dynamic_qconfig}),
    "static": lambda model: convert(prepare(with_qconfig(model.eval(), get_default_qconfig("fbgemm")))),
    "training": lambda model: prepare_qat(with_qconfig(model.train(), get_default_qat_qconfig("fbgemm"))),
    "fused": lambda model: fuse_modules(model.eval(), [["conv", "norm", "relu"]]),
    "fused for training": lambda model: fuse_modules_qat(model.train(), ["conv", "norm", "relu"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_converted_model_is_quantized_like_a_plain_one(name):
    plain, converted = Model(), Model()
    meprop.convert(converted, meprop.TopK(5, scope="batch"), when="always")
    before = copy.deepcopy(converted)
    expected, found = CALLS[name](plain), CALLS[name](converted)
    wanted = {key: type(module) for key, module in expected.named_modules()}
    if "fused" in name:  # what is not fused stays converted
        assert type(found.linear) is meprop.nn.Linear
        meprop.revert(found)
    assert {key: type(module) for key, module in found.named_modules()} == wanted
    assert [type(module) for module in converted.modules()] == [type(module) for module in before.modules()]
    if name.startswith("dynamic"):
        x = torch.randn(2, 3, 5, 5)
        assert torch.equal(expected(x), found(x))


def test_quantization_in_place_says_that_training_is_dense_from_now_on():
    model = nn.Sequential(nn.Linear(8, 200))
    meprop.convert(model, meprop.TopK(5), when="always")
    with pytest.warns(UserWarning, match="made 1 converted layers plain: they are dense from now on"):
        prepare_qat(with_qconfig(model.train(), get_default_qat_qconfig("fbgemm")), inplace=True)
    assert meprop.report(model).layers[0].status == "dense"


def test_torchs_fusion_of_convolution_and_normalisation_takes_converted_layers():
    model = Model().eval()
    meprop.convert(model, meprop.TopK(5, scope="batch"), when="always")
    fused, x = torch.nn.utils.fusion.fuse_conv_bn_eval(model.conv, model.norm), torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(fused(x), model.norm(model.conv(x)))


@pytest.mark.parametrize("prepare_by", [prepare_fx, prepare_qat_fx])
def test_graph_mode_finds_converted_layers_and_makes_those_of_the_model_itself_plain(prepare_by):
    model, x = nn.Sequential(nn.Linear(8, 200)), torch.randn(3, 8)
    meprop.convert(model, meprop.TopK(5), when="always")
    prepared = prepare_by(model.train(prepare_by is prepare_qat_fx), get_default_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    assert type(model[0]) is nn.Linear
    assert "quantize_per_tensor" in convert_fx(prepared.eval()).code


MAKES = {
    "converted": "layer = nn.Linear(8, 200); meprop.convert(layer, RULE)",
    "made": "layer = meprop.nn.Linear(8, 200, rule=RULE)",
    "lazy": "layer = nn.LazyLinear(200); meprop.convert(layer, RULE); layer(torch.ones(1, 8))",
    "unpickled": "layer = pickle.loads(pickle.loads(sys.stdin.buffer.read()))",
}


@pytest.mark.parametrize(
    "made", ["converted", *(pytest.param(each, marks=pytest.mark.slow) for each in MAKES if each != "converted")]
)
def test_torch_is_changed_by_the_first_layer_of_ours_and_by_no_import(made):
    program = f"""
import pickle, sys
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
def functions():
    modules = [sys.modules["torch.ao.quantization." + name] for name in ("quantize", "fuse_modules")]
    return [dict(vars(module)) for module in modules]
before = functions()
import meprop, meprop.optim, meprop.pruning
RULE = meprop.TopK(5)
assert functions() == before
{MAKES[made]}
assert type(layer) is meprop.nn.Linear
assert functions() != before
print(type(quantize_dynamic(nn.Sequential(layer))[0]).__module__)
"""
    layer = meprop.nn.Linear(8, 200, rule=meprop.TopK(5))
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        input=pickle.dumps(pickle.dumps(layer)),
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout.decode().strip() == "torch.ao.nn.quantized.dynamic.modules.linear"
