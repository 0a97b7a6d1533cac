"""bench conv: what is timed is right, what is wrong is not timed, and the record says what was done."""

import json
from dataclasses import asdict

import pytest
import torch

from bench.fake import fixed
from meprop import cli, functional
from meprop.bench import conv
from meprop.bench.measure import Ratio

SMALL = conv.Case("batch", 2, 2, 3, 40, 5, 3, 5, channels_last=True)


def test_names_are_read_back_and_choose():
    for case in conv.default_cases():
        assert conv.Case.parse(case.name) == case
    assert all(case.channels_last for case in conv.Conv.choose(["*-last"]))
    assert conv.Conv.choose([SMALL.name]) == [SMALL]
    for name in (
        "linear",
        "batch-conv2d-0x3x40-size5-kernel3-k5",
        "batch-conv2d-2x3x40-size5-kernel2-k5",
        "batch-conv2d-2x3x40-size5-kernel3-k41",
        "example-conv2d-2x3x40-size5-kernel3-k5",
        "global-conv2d-2x3x40-size5-kernel1-k5",
        "batch-conv1d-2x3x40-size5-kernel3-k5-last",
    ):
        with pytest.raises(ValueError, match="case"):
            conv.Conv.choose([name])


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        conv.Case("batch", 1, 2, 3, 40, 9, 5, 5),
        conv.Case("example", 2, 2, 3, 40, 4, 1, 5),
        conv.Case("global", 2, 5, 3, 40, 4, 3, 5, channels_last=True),
        conv.Case("global", 1, 5, 3, 40, 9, 3, 5),
    ],
)
def test_a_case_is_timed_with_both_of_torchs_and_a_ratio_to_each(monkeypatch, case):
    seconds = {"sparse": (2.0, 4.0), "dense_fp32": (4.0, 5.0), "dense_bf16": (1.0, 4.0)}
    fixed(monkeypatch, conv, seconds)
    result = conv.run_case(case, seconds=0.01)
    assert result.wrong is None
    assert set(result.times) == {"sparse", "dense_fp32", "dense_bf16"}
    assert result.ratios == {"dense_fp32": Ratio(2.0, 1.25), "dense_bf16": Ratio(0.5, 1.0)}
    assert conv.Conv().outcome(result) == f"{case.name}: 2.00x"
    assert conv.Conv().cells(result)[-4:] == [
        "4e+03 / 5e+03 / 9e+03",
        "2.00x (1.25x)",
        "1e+03 / 4e+03 / 9e+03",
        "0.50x (1.00x)",
    ]


@pytest.mark.parametrize("what", ["output", "gradient"])
def test_a_wrong_case_is_not_timed(monkeypatch, what):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, output):
            return output * (1.1 if what == "output" else 1)

        @staticmethod
        def backward(ctx, grad):
            return 1.1 * grad

    monkeypatch.setitem(conv._SPARSE, 2, lambda *args, **options: Wrong.apply(functional.conv2d(*args, **options)))
    result = conv.run_case(SMALL, seconds=0.01)
    assert what in result.wrong
    assert not result.times
    assert "WRONG" in conv.Conv().table([result])


def test_the_command_writes_its_record_and_its_section_of_a_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench conv: begin -->\n<!-- bench conv: end -->\nafter\n")
    options = ["--cases", SMALL.name, "--seconds", "0.01", "--out", str(tmp_path / "out"), "--page", str(page)]
    assert cli.main(["bench", "conv", *options]) == 0
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["task"] == "bench-conv"
    assert record["cases"][0]["case"] == asdict(SMALL)
    assert "2 x 3 x 40, 5 x 5, kernel 3 x 3" in page.read_text()
    assert page.read_text().endswith("end -->\nafter\n")
    assert "channels last" in capsys.readouterr().out
    assert cli.main(["bench", "conv", "--seconds", "-1"]) == 2
