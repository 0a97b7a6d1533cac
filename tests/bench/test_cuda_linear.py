"""bench linear --device cuda, with a CPU in the place of the card: sides, checks, ratios, record and table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")

import meprop
from bench.fake import FakeCard, FakeRows
from meprop import cli, ops
from meprop.bench import cuda, cuda_linear, oracle, problem
from meprop.bench.cuda_linear import CudaLinear
from meprop.bench.linear import Case
from meprop.bench.measure import Times
from meprop.bench.roofline import Work
from meprop.reporting import pages
from meprop.selection import ColumnSelection, RowSelection

TINY = [
    *(f"{kind}-{dtype}-8x16x40-k4" for kind in ("example", "batch") for dtype in ("fp32", "bf16")),
    "rows-bf16-9x16x40-k3",
    "topk-bf16-8x40-k3",
]
LIMITS = cuda.Limits({"fp32": 1e9, "bf16": 2e9})


@pytest.fixture(autouse=True)
def card(monkeypatch, tmp_path):
    """The card that is found."""
    monkeypatch.chdir(tmp_path)
    found = FakeCard()
    monkeypatch.setattr(cuda.Card, "find", classmethod(lambda cls: found))
    for name, value in {"_SQUARE": 64, "_SECONDS": 0.0, "_COPY_SECONDS": 0.0}.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(problem, "rule_of_rows", FakeRows)
    return found


def bench(*options, cases=TINY):
    return cli.main(["bench", "linear", "--device", "cuda", "--seconds", "0.001", "--cases", *cases, *options])


def result():
    return json.loads(Path("runs/bench-linear/result.json").read_text())


def run_case(name, card):
    return cuda_linear.run_case(Case.parse(name), 0.0, LIMITS, card)


# ---------------------------------------------------------------- the command


def test_the_record_has_all_that_is_needed_to_judge_it(capsys):
    page = Path("gpu.md")
    begin, end = pages.markers(CudaLinear().section)
    page.write_text(f"{begin}\n{end}\n")
    assert bench("--page", "gpu.md") == 0
    content = result()
    assert content["card"] == {"name": "a card", "memory_gib": 80.0, "l2_mib": 1.0, "driver": "1.2", "cuda": "13.0"}
    assert content["config"]["device"] == "cuda"
    assert content["versions"]["torch"] == str(torch.__version__)
    assert set(content["limits"]["multiply_adds"]) == {"fp32", "bf16"}
    assert [case["name"] for case in content["cases"]] == TINY
    for case in content["cases"]:
        kind = case["case"]["kind"]
        sides = {"torch"} if kind == "topk" else {"dense_bf16", "dense_tf32"}
        sides |= {"sparse"} | ({"sparse_dense_form"} if kind == "batch" else set())
        assert case["wrong"] is None
        assert set(case["times"]) == {f"{side} {mode}" for side in sides for mode in ("eager", "graph")}
        assert all(0 < times["best"] <= times["p20"] <= times["p50"] for times in case["times"].values())
        assert set(case["roofline"]["seconds"]) == {"arithmetic", "memory"}
    shown, text = capsys.readouterr().out, page.read_text()
    for name in TINY:
        assert name in shown
        assert f"| {name} |" in text
    assert "a card, 80 GiB, 1 MiB of L2, driver 1.2, CUDA 13.0" in text


def test_without_a_card_it_is_refused_before_any_work(monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "linear", "--device", "cuda", "--out", "runs/none"]) == 1
    assert "--device cuda: torch" in (said := capsys.readouterr().err)
    assert "finds no CUDA device; use --device cpu" in said
    assert not Path("runs/none").exists()


def test_whole_rows_are_for_a_card(capsys):
    assert cli.main(["bench", "linear", "--cases", "rows-bf16-9x16x40-k3"]) == 2
    assert "whole rows are timed with --device cuda only" in capsys.readouterr().err


def test_patterns_choose_among_the_cases_of_the_card():
    assert CudaLinear.choose(["*"]) == cuda_linear.default_cases()
    assert [case.name for case in CudaLinear.choose(["rows-*-k1365", "batch-bf16-2x3x4-k1"])] == [
        "rows-bf16-4096x1024x4096-k1365", "batch-bf16-2x3x4-k1"
    ]  # fmt: skip


@pytest.mark.parametrize("case", cuda_linear.default_cases(), ids=lambda case: case.name)
def test_a_case_is_found_by_its_name(case):
    assert Case.parse(case.name) == case


@pytest.mark.parametrize(("name", "message"), [("rows-bf16-8x16x40-k9", "at most 8"), ("rows-bf16-8x40-k1", "N x I")])
def test_impossible_rows_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        Case.parse(name)


# ---------------------------------------------------------------- times and ratios


def fixed(monkeypatch, seconds):
    monkeypatch.setattr(
        FakeCard,
        "time",
        lambda self, sides, budget: {name: Times(0, *seconds.get(name, (1, 1)), 9, 9) for name in sides},
    )


def test_each_ratio_is_of_the_sides_that_its_name_says(monkeypatch, card):
    times = {"sparse": 2.0, "sparse_dense_form": 4.0, "dense_bf16": 8.0, "dense_tf32": 16.0, "torch": 32.0}
    seconds = {f"{side} graph": (p20, 1.0) for side, p20 in times.items()}
    seconds |= {f"{side} eager": (10 * p20 + 1, 2.0) for side, p20 in times.items()}
    fixed(monkeypatch, seconds)
    of_batch = run_case("batch-bf16-8x16x40-k4", card)
    expected = {"dense": 4.0, "eager": 81 / 21, "other_dtype": 8.0, "dense_form": 2.0}
    assert {name: ratio.p20 for name, ratio in of_batch.ratios.items()} == expected
    assert of_batch.ratios["dense"].p50 == 1.0
    of_fp32 = run_case("example-fp32-8x16x40-k4", card)
    assert {name: ratio.p20 for name, ratio in of_fp32.ratios.items()} == {
        "dense": 8.0, "eager": 161 / 21, "other_dtype": 4.0
    }  # fmt: skip
    of_topk = run_case("topk-bf16-8x40-k4", card)
    assert {name: ratio.p20 for name, ratio in of_topk.ratios.items()} == {"dense": 16.0, "eager": 321 / 21}


def test_what_cannot_be_captured_is_compared_as_it_is(monkeypatch, card):
    fixed(monkeypatch, {"sparse eager": (2.0, 2.0), "torch eager": (6.0, 6.0), "torch graph": (4.0, 4.0)})
    select = meprop.TopK.select

    def waiting(self, grad):
        if FakeCard.capturing:
            raise RuntimeError("it waits for the device")
        return select(self, grad)

    monkeypatch.setattr(meprop.TopK, "select", waiting)
    found = run_case("topk-bf16-8x40-k4", card)
    assert found.uncaptured == {"sparse": "it waits for the device"}
    assert "sparse graph" not in found.times
    assert found.ratios["dense"] == found.ratios["eager"]
    assert found.ratios["dense"].p20 == 3.0
    table = CudaLinear().table([found])
    assert "3.00x (eager)" in table
    assert table.endswith("\nno graph of topk-bf16-8x40-k4 (sparse): it waits for the device")
    assert CudaLinear().blocks([found])[1] == "- no graph of topk-bf16-8x40-k4 (sparse): it waits for the device"


def test_operands_are_copied_beyond_the_cache(card):
    work = cuda_linear.work_of(Case.parse("topk-bf16-8x40-k4")).memory_bytes
    assert run_case("topk-bf16-8x40-k4", card).copies == 4 * 1024 // work + 1 > 1
    assert run_case("topk-bf16-8x40-k4", replace(card, l2_bytes=0)).copies == 1


def test_work_is_counted():
    n, i, o = 2, 7, 5
    batch = cuda_linear.work_of(Case("batch", "bf16", n, i, o, 3))
    assert batch == Work(2 * n * 3 * i, 0, 2 * (n * o + o + n * i + n * i + 3 * i + 3 * i))
    example = cuda_linear.work_of(Case("example", "fp32", n, i, o, 3))
    assert example == Work(2 * n * 3 * i, 0, 4 * (n * o + o + n * i + n * i + o * i + o * i))
    rows = cuda_linear.work_of(Case("rows", "bf16", n, i, o, 1))
    assert rows == Work(2 * 1 * i * o, 0, 2 * (n * o + o + 1 * i + n * i + o * i + o * i))
    assert cuda_linear.work_of(Case("topk", "bf16", n, 0, o, 3)) == Work(0, 0, n * (o * 2 + 3 * 6))


def test_the_floor_is_the_larger_part(monkeypatch, card):
    monkeypatch.setattr(cuda, "copy_seconds", lambda count, card: count * 1e-9)
    found = cuda.roofline(Work(10**9, 0, 10), "bf16", LIMITS, card)
    assert (found.bound, found.floor) == ("arithmetic", 0.5)
    found = cuda.roofline(Work(10, 0, 10**9), "fp32", LIMITS, card)
    assert (found.bound, found.floor) == ("memory", 1.0)


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(("position", "name"), [(0, "input"), (1, "weight"), (2, "bias")])
@pytest.mark.parametrize("case", ["batch-bf16-8x16x40-k4", "example-fp32-8x16x40-k4", "rows-bf16-9x16x40-k3"])
def test_a_wrong_product_is_not_timed(monkeypatch, card, case, position, name):
    real = ops.backward_with

    def backward(*args, **options):
        gradients = list(real(*args, **options))
        gradient = gradients[position]
        (gradient.coalesce().values() if gradient.is_sparse else gradient).view(-1)[-1] += 4
        return tuple(gradients)

    assert run_case(case, card).wrong is None
    monkeypatch.setattr(ops, "backward_with", backward)
    found = run_case(case, card)
    assert f"the gradient of the {name} differs" in found.wrong
    assert not found.times


def test_partial_sums_may_be_rounded_and_no_term_may_be_missing():
    torch.manual_seed(0)
    grad, x, weight = (torch.randn(size).bfloat16() for size in ((256, 328), (256, 64), (328, 64)))
    expected = ColumnSelection(grad, torch.arange(328, dtype=torch.int32), 328)

    def differ(columns):
        parts = [grad[:, part] @ weight[part] for part in torch.arange(columns).chunk(4)]  # each in bfloat16
        return oracle.gradients_differ({"input": sum(parts)}, expected, grad, x, weight, on_card=True)

    assert differ(328) is None
    assert differ(327) == "the gradient of the input differs from the oracle's"


@pytest.mark.parametrize("case", ["topk-bf16-8x40-k3", "example-bf16-8x16x40-k3"])
def test_a_wrong_selection_is_not_timed(monkeypatch, card, case):
    def first_k(grad, k):
        return RowSelection(grad[:, :k], torch.arange(k, dtype=torch.int32).expand(len(grad), k), grad.shape[1])

    monkeypatch.setattr(ops, "topk_rows", first_k)
    assert "indices" in run_case(case, card).wrong


def test_rows_are_whole_and_scaled_up():
    torch.manual_seed(0)
    grad = (torch.randn(9, 5).sign() * (1 + torch.rand(9, 5))).bfloat16()
    kept = FakeRows(1 / 3).select(grad)
    assert cuda_linear.rows_differ(kept, grad, 3) is None
    assert "3 rows, not 4" in cuda_linear.rows_differ(kept, grad, 4)
    assert "scaled down" in cuda_linear.rows_differ(replace(kept, values=kept.values * 0.25), grad, 3)
    cut = kept.values.clone()
    cut[0] = 0
    assert "other entries" in cuda_linear.rows_differ(replace(kept, values=cut), grad, 3)


def test_an_error_of_one_case_leaves_the_others(monkeypatch, capsys):
    monkeypatch.setattr(torch, "topk", lambda *args: (_ for _ in ()).throw(RuntimeError("out of memory")))
    assert bench(cases=["topk-bf16-8x40-k3", "batch-bf16-8x16x40-k4"]) == 1
    wrong, right = result()["cases"]
    assert wrong["wrong"] == "RuntimeError: out of memory"
    assert right["ratios"]["dense"]["p20"] > 0
    assert "WRONG: topk-bf16-8x40-k3: RuntimeError: out of memory" in capsys.readouterr().out
