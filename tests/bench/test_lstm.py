"""bench lstm: what is timed is right, what is wrong is not timed, and the record says what was done."""

import json
from dataclasses import asdict

import pytest
import torch

from meprop import cli, functional
from meprop.bench import lstm
from meprop.bench.measure import Ratio, Times

SMALL = lstm.Case("example", "fp32", 4, 3, 6, 40, 5)


def test_names_are_read_back_and_choose():
    for case in lstm.default_cases():
        assert lstm.Case.parse(case.name) == case
    assert lstm.Lstm.choose(["batch-bf16-25x32x190x99-k20"]) == [lstm.Case("batch", "bf16", 25, 32, 190, 99, 20)]
    assert {case.k for case in lstm.Lstm.choose(["*-k5"])} == {5}
    assert lstm.Lstm.choose(["*", "*-k5"]) == lstm.default_cases()
    for name in ("linear", "example-fp32-0x1x1x4-k2", "batch-bf16-1x1x1x4-k5", "batch-1x1x1x4-k2"):
        with pytest.raises(ValueError, match="case"):
            lstm.Lstm.choose([name])


@pytest.mark.parametrize("scope", ["example", "batch"])
def test_both_passes_of_a_case_are_timed_and_have_a_ratio(monkeypatch, scope):
    budgets = []
    of_pass = iter([(3.0, 1.0), (8.0, 2.0)])  # dense and sparse: forward, then backward

    def interleaved(sides, seconds):
        budgets.append(seconds)
        return {
            side: Times(0.0, p20, 2 * p20, 9.0, 9) for side, p20 in zip(("dense", "sparse"), next(of_pass), strict=True)
        }

    monkeypatch.setattr(lstm, "interleaved", interleaved)
    result = lstm.run_case(lstm.Case(scope, "fp32", 4, 3, 6, 40, 5), seconds=0.01)
    assert result.wrong is None
    assert set(result.times) == {f"{name} {side}" for name in ("forward", "backward") for side in ("dense", "sparse")}
    assert (result.forward, result.backward) == (Ratio(3.0, 3.0), Ratio(4.0, 4.0))
    assert result.times["backward dense"].p20 == 8.0
    assert budgets == [0.01, 0.01]


@pytest.mark.parametrize(("weights", "compute_dtype"), [("fp32", None), ("bf16", torch.bfloat16)])
def test_the_sparse_layer_has_the_weights_of_the_case(monkeypatch, weights, compute_dtype):
    right, found = functional.lstm, set()

    def watched(*args, **options):
        found.add(options["compute_dtype"])
        return right(*args, **options)

    monkeypatch.setattr(functional, "lstm", watched)
    result = lstm.run_case(lstm.Case("example", weights, 4, 3, 6, 40, 5), seconds=0.001)
    assert (result.wrong, found) == (None, {compute_dtype})
    assert weights in lstm.Lstm().table([result])


@pytest.mark.parametrize("what", ["output", "gradient"])
def test_a_wrong_case_is_not_timed(monkeypatch, what):
    right = functional.lstm

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, output):
            return output * (1.1 if what == "output" else 1)

        @staticmethod
        def backward(ctx, grad):
            return 1.1 * grad

    def wrong(*args, **options):
        output, states = right(*args, **options)
        return Wrong.apply(output), states

    monkeypatch.setattr(functional, "lstm", wrong)
    result = lstm.run_case(SMALL, seconds=0.01)
    assert what in result.wrong
    assert not result.times
    assert "WRONG" in lstm.Lstm().table([result])


def test_the_command_writes_its_record_and_its_section_of_a_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench lstm: begin -->\n<!-- bench lstm: end -->\nafter\n")
    options = ["--cases", SMALL.name, "--seconds", "0.01", "--out", str(tmp_path / "out"), "--page", str(page)]
    assert cli.main(["bench", "lstm", *options]) == 0
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["task"] == "bench-lstm"
    assert record["cases"][0]["case"] == asdict(SMALL)
    assert record["config"]["seconds"] == 0.01
    assert "4 x 3 x 6 x 40" in page.read_text()
    assert page.read_text().endswith("end -->\nafter\n")
    assert "4 x 3 x 6 x 40" in capsys.readouterr().out
    assert cli.main(["bench", "lstm", *options]) == 2  # the folder is taken
    assert cli.main(["bench", "lstm", "--seconds", "-1"]) == 2
