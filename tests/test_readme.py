"""The snippets of README.md and of docs/simplify.md run, one after the other, and keep what they say."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import meprop

ROOT = Path(__file__).parents[1]


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def test_the_snippets_of_the_readme_run(capsys: pytest.CaptureFixture[str]):
    names = {"x": torch.randn(4, 6), "weight": torch.randn(8, 6), "bias": torch.zeros(8)}
    blocks = snippets("README.md")
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    table = re.search(r"^```\n(layer  kind.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert table is not None
    assert table[1] in capsys.readouterr().out


RULES = {"the page's": None, "README's, of a share": "meprop.TopK(0.04)", "README's, of a count": "meprop.TopK(20)"}


@pytest.mark.parametrize(
    "rule",
    [pytest.param(rule, id=name, marks=[pytest.mark.slow] if "count" in name else []) for name, rule in RULES.items()],
)
def test_the_snippet_of_the_simplifier_keeps_accuracy_or_warns_with_the_numbers(rule):
    torch.manual_seed(0)
    x = torch.randn(3000, 64)
    target = (x @ torch.randn(64, 10)).argmax(1)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    batches = [torch.randint(2000, (32,)) for _ in range(1400)]
    names = {
        "torch": torch,
        "meprop": meprop,
        "model": model,
        "batches": batches,
        "loss": lambda model, batch: nn.functional.cross_entropy(model(x[batch]), target[batch]),
    }
    (block,) = snippets("docs/simplify.md")[:1]
    if rule is not None:
        block = re.sub(r"meprop\.convert\(model, .*\)\n", f"meprop.convert(model, {rule})\n", block)
        assert rule in block
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(block, "docs/simplify.md", "exec"), names)
    said = [str(each.message) for each in caught if "nearly all units" in str(each.message)]
    small = names["small"]
    widths, accuracy = [small[0].out_features, small[2].out_features], (small(x[2000:]).argmax(1) == target[2000:])
    assert type(small[0]) is nn.Linear
    assert bool(said) == (rule == "meprop.TopK(0.04)")
    assert not said or re.search(r"keeps 3\.9% of the units, .* 20 of 512 units now, and 1 of 26 later", said[0])
    if not said:
        assert min(widths) > 30
        assert accuracy.float().mean() > 0.8, widths
