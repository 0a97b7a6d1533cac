"""The worked examples of CONTRIBUTING.md run, and do what they say."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import literal
import meprop
from meprop import ops
from meprop.nn.base import unregister

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.fixture
def defined(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the page's blocks define, one after the other; what they register is taken back."""
    page = ModuleType("contributing")
    monkeypatch.setitem(sys.modules, page.__name__, page)  # where dataclasses look for it
    names = vars(page)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3  # a rule, a backend, a layer
    try:
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
        yield names
    finally:
        if "dense" in names:
            ops.remove(names["dense"])
        for each in meprop.nn.base.descriptors():
            if each.plain is nn.RNNCell:
                unregister(each)


def test_the_rule_the_backend_and_the_layer_work_together(defined):
    rule = defined["AboveShare"](0.8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.RNNCell(6, 40))
    x, h = torch.randn(3, 6), torch.randn(3, 40)
    weights = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    report = meprop.convert(model, rule, min_features=40, when="always")
    assert [(layer.kind, layer.status) for layer in report.layers] == [("RNNCell", "sparse")]
    assert ops.linear_backward.explain(rule.select(x), x, None, None, needs_bias=True, row_sparse=False)[0] == "dense"

    model[0](x, h).square().sum().backward()
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    output = literal.linear(x, weight_ih, bias_ih, rule) + literal.linear(h, weight_hh, bias_hh, rule)
    output.tanh().square().sum().backward()
    for found, expected in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    assert (model[0].weight_ih.grad == 0).all(dim=1).any()  # a feature that no row kept


def test_without_them_everything_is_as_before():
    assert [each.name for each in (ops.backend("native"), ops.backend("reference"))] == ["native", "reference"]
    with pytest.raises(ValueError, match="no backend 'dense'"):
        ops.backend("dense")
    assert meprop.nn.base.descriptor_of(nn.RNNCell(2, 3)) is None
