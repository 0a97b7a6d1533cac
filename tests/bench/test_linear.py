from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from bench.fake import fixed
from meprop import cli, ops
from meprop.bench import linear, measure, oracle, roofline
from meprop.bench.linear import Case, CaseResult, Linear, LinearBench, default_cases
from meprop.bench.measure import Ratio, Times
from meprop.bench.roofline import Limits, Roofline, Work
from meprop.cli.bench import RunBench
from meprop.reporting import bench_linear as report
from meprop.reporting import pages
from meprop.selection import RowSelection

TINY = [f"{kind}-{dtype}-8x16x40-k{k}" for kind in ("example", "batch") for dtype in ("fp32", "bf16") for k in (2, 8)]
TINY += ["topk-fp32-8x40-k3"]
BEGIN, END = pages.markers(Linear().section)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(roofline, "_SQUARE", 64)
    monkeypatch.setattr(roofline, "_SECONDS", 0.0)
    monkeypatch.setattr(roofline, "_COPY_SECONDS", 0.0)


def bench(*options, cases=TINY):
    return cli.main(["bench", "linear", "--seconds", "0.001", "--cases", *cases, *options])


def result(folder="runs/bench-linear"):
    return json.loads((Path(folder) / "result.json").read_text())


# ---------------------------------------------------------------- the grid


def test_the_default_grid_has_the_shapes_and_densities_that_were_promised():
    names = {case.name for case in default_cases()}
    assert {
        "example-fp32-512x2048x2048-k82", "example-fp32-1024x4096x4096-k164", "example-fp32-2048x768x3072-k123",
        "example-fp32-2048x3072x768-k31", "example-fp32-512x2048x2048-k20", "example-fp32-64x512x512-k20",
        "example-fp32-32x784x500-k20", "example-bf16-512x2048x2048-k82", "batch-fp32-512x2048x2048-k82",
        "batch-bf16-512x2048x2048-k82", "topk-fp32-512x2048-k82", "topk-fp32-64x500-k20", "topk-fp32-4096x3072-k123",
    } <= names  # fmt: skip
    for kind in ("example", "batch"):
        for dtype in ("fp32", "bf16"):
            kept = sorted(case.k for case in default_cases() if case.name.startswith(f"{kind}-{dtype}-512x2048x2048-"))
            assert kept == [20, 41, 82, 164, 328, 655, 1311]  # 1, 2, 4, ... 64%
    assert len(names) == len(default_cases())


@pytest.mark.parametrize("case", default_cases(), ids=lambda case: case.name)
def test_a_case_is_found_by_its_name(case):
    assert Case.parse(case.name) == case
    assert Linear.choose([case.name]) == [case]


def test_patterns_choose_from_the_grid_and_names_go_beyond_it():
    assert Linear.choose(["*"]) == default_cases()
    assert [case.name for case in Linear.choose(["topk-fp32-64*", "batch-bf16-3x4x5-k2", "topk-fp32-64x500-k20"])] == [
        "topk-fp32-64x500-k20", "batch-bf16-3x4x5-k2"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nonsense", "no such case"),
        ("example-fp32-8x16x40-k41", "k at most 40"),
        ("example-fp32-8x16x40-k0", "k at most 40"),
        ("example-fp32-0x16x40-k4", "at least 1"),
        ("example-fp32-8x40-k4", "N x I x O"),
        ("topk-fp32-8x16x40-k4", "topk is N x O"),
    ],
)
def test_impossible_cases_are_refused_before_anything_is_written(capsys, pattern, message):
    assert bench(cases=[pattern]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


# ---------------------------------------------------------------- the command


def test_the_record_has_all_that_is_needed_to_judge_it(capsys):
    threads = torch.get_num_threads()
    assert bench("--threads", "1") == 0
    assert torch.get_num_threads() == threads
    content = result()
    assert set(content) == {field.name for field in dataclasses.fields(LinearBench)} | {"sha256"}
    assert content["machine"]["threads"] == 1
    assert content["config"]["seconds"] == 0.001
    assert content["limits"]["multiply_adds"]["fp32"] > 0
    assert [case["name"] for case in content["cases"]] == TINY
    sides = {"dense_fp32", "dense_bf16", "sparse", "converted"}
    for case in content["cases"]:
        kind = case["case"]["kind"]
        form = {"sparse_dense_form"} if kind == "batch" else set()
        assert case["wrong"] is None
        assert set(case["times"]) == ({"torch", "sparse"} if kind == "topk" else sides | form)
        for times in case["times"].values():
            assert 0 < times["best"] <= times["p20"] <= times["p50"] <= times["p80"]
            assert times["calls"] >= 9
        bounds = case["roofline"]["seconds"]
        assert bounds[case["roofline"]["bound"]] == max(bounds.values())
    assert Path("runs/bench-linear/curves.png").exists()
    shown = capsys.readouterr().out
    assert all(name in shown for name in TINY)


@pytest.mark.parametrize(
    ("name", "ratios"),
    [
        ("example-fp32-8x16x40-k4", {"dense": 2.0, "other_dtype": 3.0, "converted": 0.5}),
        ("example-bf16-8x16x40-k4", {"dense": 3.0, "other_dtype": 2.0, "converted": 0.75}),
        ("batch-fp32-8x16x40-k4", {"dense": 2.0, "other_dtype": 3.0, "converted": 0.5, "dense_form": 4.0}),
        ("topk-fp32-8x40-k4", {"dense": 5.0}),
    ],
)
def test_each_ratio_is_of_the_sides_that_its_name_says(monkeypatch, name, ratios):
    seconds = {"sparse": 2.0, "dense_fp32": 4.0, "dense_bf16": 6.0, "converted": 8.0, "sparse_dense_form": 1.0}
    fixed(monkeypatch, linear, {side: (p20, 1.0) for side, p20 in {**seconds, "torch": 10.0}.items()})
    limits = Limits({"fp32": 8.0, "bf16": 8.0}, 1e12)  # so slow that arithmetic bounds
    result = linear.run_case(Case.parse(name), 0.0, limits)
    assert {each: ratio.p20 for each, ratio in result.ratios.items()} == ratios
    assert {ratio.p50 for ratio in result.ratios.values()} == {1.0}
    if not name.startswith("topk"):
        assert result.roofline.bound == "arithmetic"
        assert result.share == 2 * 8 * 16 * 4 / 8.0 / 2.0  # two products over the limit, over the 2 s of sparse


def test_twice_as_fast_is_a_ratio_of_two():
    dense, sparse = Times(1.0, 4.0, 9.0, 10.0, 9), Times(1.0, 2.0, 3.0, 10.0, 9)
    assert Ratio.of(dense, sparse) == Ratio(p20=2.0, p50=3.0)


def test_an_earlier_result_is_replaced_only_if_asked(capsys):
    assert bench(cases=TINY[:1]) == 0
    assert bench(cases=TINY[:1]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert bench("--overwrite", cases=TINY[-1:]) == 0
    assert [case["name"] for case in result()["cases"]] == TINY[-1:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seconds", "0"], "--seconds must be"),
        (["--seconds", "nan"], "--seconds must be"),
        (["--threads", "-1"], "--threads must be"),
        (["--page", "missing.md"], "missing.md"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_written(capsys, options, message):
    assert cli.main(["bench", "linear", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_help_explains_every_option(capsys):
    assert cli.main(["bench", "linear", "--help"]) == 0
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for field in [*dataclasses.fields(Linear), *dataclasses.fields(RunBench)[1:]]:
        explanation = shown.split(f"--{field.name} ", 1)[1].split(" --", 1)[0]
        assert "(default:" in shown.split(f"--{field.name} ", 1)[1], field.name
        assert len(explanation.split()) > 3, field.name


# ---------------------------------------------------------------- the check against the oracle


def off_by_a_little(position):
    """The real backward pass, one element of one gradient off by more than rounding explains."""
    real = ops.backward_with

    def backward(*args, **options):
        gradients = list(real(*args, **options))
        gradient = gradients[position]
        (gradient.coalesce().values() if gradient.is_sparse else gradient).view(-1)[-1] += 0.1
        return tuple(gradients)

    return backward


@pytest.mark.parametrize(("position", "name"), [(0, "input"), (1, "weight"), (2, "bias")])
@pytest.mark.parametrize("kind", ["example", "batch"])
def test_a_wrong_product_shows_no_ratio_and_fails(monkeypatch, capsys, kind, position, name):
    monkeypatch.setattr(ops, "backward_with", off_by_a_little(position))
    page = Path("page.md")
    page.write_text(f"{BEGIN}\n{END}\n")
    assert bench("--page", "page.md", cases=[f"{kind}-fp32-8x16x40-k4", "topk-fp32-8x40-k3"]) == 1
    wrong, right = result()["cases"]
    assert f"the gradient of the {name} differs" in wrong["wrong"]
    assert not wrong["times"]
    assert not wrong["ratios"]
    assert right["ratios"]["dense"]["p20"] > 0
    shown = capsys.readouterr()
    assert f"{kind}-fp32-8x16x40-k4" in shown.err.splitlines()[-1]
    for text in (shown.out, page.read_text()):
        (line,) = [line for line in text.splitlines() if "8x16x40" in line and not line.startswith("WRONG")]
        assert "WRONG" in line
        assert not re.search(r"\d\.\d+x", line)


@pytest.mark.parametrize("case", ["topk-fp32-8x40-k3", "example-fp32-8x16x40-k3"])
def test_a_wrong_selection_shows_no_ratio_and_fails(monkeypatch, case):
    def first_k(grad, k):
        return RowSelection(grad[:, :k], torch.arange(k, dtype=torch.int32).expand(len(grad), k), grad.shape[1])

    monkeypatch.setattr(ops, "topk_rows", first_k)
    assert bench(cases=[case]) == 1
    assert "indices" in result()["cases"][0]["wrong"]


def test_the_products_of_another_selection_are_wrong(monkeypatch):
    """The fused backward pass makes a selection of its own, which must be the oracle's too."""
    real = ops.backward_with

    def one_less(topk, *args, **options):
        return real(topk._replace(k=topk.k - 1), *args, **options)

    monkeypatch.setattr(ops, "backward_with", one_less)
    assert bench(cases=["example-bf16-8x16x40-k4"]) == 1


def test_a_pass_that_varies_is_wrong(monkeypatch):
    """As one whose threads race: right when checked, wrong a little later."""
    wrong, right, calls = off_by_a_little(1), ops.backward_with, []

    def now_and_then(*args, **options):
        calls.append(1)
        return (wrong if len(calls) % 4 == 0 else right)(*args, **options)

    monkeypatch.setattr(ops, "backward_with", now_and_then)
    assert bench(cases=["example-fp32-8x16x40-k4"]) == 1
    assert "when repeated" in result()["cases"][0]["wrong"]


def test_a_nan_beside_the_checked_columns_is_found(monkeypatch):
    monkeypatch.setattr(oracle, "_CHECKED_COLUMNS", 0)
    real = ops.backward_with

    def with_nan(*args, **options):
        grad_x, *others = real(*args, **options)
        grad_x[0, 0] = float("nan")
        return grad_x, *others

    monkeypatch.setattr(ops, "backward_with", with_nan)
    assert bench(cases=["example-fp32-8x16x40-k4"]) == 1


# ---------------------------------------------------------------- timing, counting


def test_percentiles():
    times = Times.of([float(value) for value in range(100, -1, -1)])
    assert dataclasses.astuple(times) == (0, 20, 50, 80, 101)


def test_each_side_is_called_nine_times_at_least():
    times = measure.interleaved({name: lambda: None for name in "abc"}, 0.0)
    assert {name: time.calls for name, time in times.items()} == dict.fromkeys("abc", 9)


def test_the_budget_is_spent():
    assert measure.interleaved({"a": lambda: None}, 0.02)["a"].calls > 100


def test_work_is_counted():
    indices = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
    selection = RowSelection(torch.ones(2, 2), indices, 5)  # 3 of 5 rows of the weight are read
    work = linear._backward_work(Case("example", "fp32", 2, 7, 5, 2), selection)
    assert work == Work(2 * 2 * 2 * 7, 2 * 2 * 2 * 7 * 4, 4 * (10 + 5 + (2 + 2 + 3 + 5) * 7))
    assert linear._backward_work(Case("batch", "bf16", 2, 7, 5, 2), selection).cache_bytes == 0


@pytest.mark.parametrize(
    ("work", "bound"),
    [(Work(10**12, 1, 1), "arithmetic"), (Work(1, 10**12, 1), "cache"), (Work(1, 1, 10**7), "memory")],
)
def test_the_slowest_part_bounds(work, bound):
    found = roofline.roofline(work, "fp32", Limits({"fp32": 1e11, "bf16": 1e11}, 1e11))
    assert found.bound == bound
    assert found.floor == max(found.seconds.values())


def test_an_earlier_builds_decision_is_not_taken_over(monkeypatch, tmp_path):
    monkeypatch.setenv("MEPROP_CACHE", str(tmp_path / "cache"))
    assert bench(cases=["example-fp32-8x16x200-k4"]) == 0
    assert not (tmp_path / "cache").exists()
    assert result()["cases"][0]["converted"].startswith(("sparse", "dense"))


# ---------------------------------------------------------------- what is shown


def test_break_even_lies_on_the_straight_line_of_logarithmic_axes():
    assert report.break_even([(0.04, 4.0), (0.16, 1.0), (0.64, 0.25)]) == pytest.approx(0.16)
    assert report.break_even([(0.01, 4.0), (0.04, 2.0), (0.16, 0.5)]) == pytest.approx(0.08)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [((4.0, 2.0), "break-even beyond 16%"), ((0.9, 0.5), "break-even below 4%"), ((2.0, 0.5), "break-even at 8%")],
)
def test_a_curve_says_where_it_stops_paying(ratios, verdict):
    assert report.Curve("example", "fp32", "", list(zip((0.04, 0.16), ratios, strict=True))).verdict() == verdict


def found(name, dense, sparse, wrong=None):
    case = Case.parse(name)
    assert case is not None
    if wrong is not None:
        return CaseResult(name, case, wrong)
    sides = {"dense_fp32": dense, "dense_bf16": 2 * dense, "sparse": sparse, "converted": sparse}
    times = {side: Times(seconds, seconds, seconds, seconds, 9) for side, seconds in sides.items()}
    ratios = {side: Ratio.of(times["dense_fp32"], times["sparse"]) for side in ("dense", "converted", "other_dtype")}
    bound = Roofline(Work(1, 1, 1), {"arithmetic": 1e-4, "cache": 2e-4, "memory": 1e-5}, "cache")
    return CaseResult(name, case, None, times, ratios, bound, 2e-4 / sparse, "sparse: always")


def record(*cases):
    machine = {"cpu": "a processor", "threads": 2}
    limits = Limits({"fp32": 1e11, "bf16": 2e11}, 3e11)
    backends, versions = {"isa": "avx2"}, {"torch": "2", "meprop": "0"}
    return LinearBench("bench-linear", {}, machine, versions, None, backends, None, limits, list(cases))


def test_the_table_has_ratio_and_bound():
    (_, row) = Linear().table([found("example-fp32-8x16x100-k4", 4e-3, 1e-3)]).splitlines()
    shown = "example-fp32-8x16x100-k4 4.0% 4 / 4 / 4 1 / 1 / 1 4.00x 4.00x 4.00x 4.00x cache 20%"
    assert " ".join(row.split()) == shown


def test_curves_leave_out_what_is_wrong():
    results = [found(f"example-fp32-8x16x100-k{k}", 4e-3, k * 1e-3) for k in (8, 2, 4)]
    results += [found("example-fp32-8x16x100-k1", 0, 0, wrong="differs"), found("batch-fp32-8x16x100-k1", 1, 1)]
    (curve,) = report.curves(results)
    assert curve.points == [(0.02, 2.0), (0.04, 1.0), (0.08, 0.5)]


def test_the_figure_shows_each_curve_with_its_break_even(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(report, "Figure", lambda **options: made.append(Figure(**options)) or made[-1])
    results = [found(f"example-fp32-8x16x100-k{k}", 4e-3, k * 1e-3) for k in (2, 8)]
    results += [found(f"batch-fp32-8x16x100-k{k}", 4e-3, 1e-3) for k in (2, 8)]
    assert Linear().draw(record(*results), tmp_path / "curves.png")
    (axes,) = made[0].axes
    lines = {line.get_label(): line for line in axes.lines}
    labels = ["ideal: n / k", "per example, fp32: break-even at 4%", "unified, fp32: break-even beyond 8%"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == labels
    points = [lines[label].get_xydata().tolist() for label in labels]
    assert points == [[[0.02, 50.0], [0.08, 12.5]], [[0.02, 2.0], [0.08, 0.5]], [[0.02, 4.0], [0.08, 4.0]]]
    crosses = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "X"]
    assert crosses == [[[pytest.approx(0.04), 1]]]
    assert lines[labels[1]].get_color() != lines[labels[2]].get_color()
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["2%", "8%"]
    assert not Linear().draw(record(*results[:1]), tmp_path / "none.png")  # one density is no curve
    assert not (tmp_path / "none.png").exists()


def test_the_page_keeps_what_was_written_by_hand(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(f"# Title\n\nBefore.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    results = [found(f"example-fp32-8x16x100-k{k}", 4e-3, k * 1e-3) for k in (2, 8)]
    for _ in range(2):  # writing again changes nothing
        Linear().write_page(record(*results), page)
        text = page.read_text()
        assert text.startswith(f"# Title\n\nBefore.\n\n{BEGIN}\n")
        assert text.endswith(f"\n{END}\n\nAfter.\n")
        assert "old" not in text
        assert text.count("| example-fp32-8x16x100-k2 | 2.0% |") == 1
    assert "break-even at 4%" in text
    assert "![Ratio over density](performance-linear.png)" in text
    assert (tmp_path / "performance-linear.png").exists()


def test_a_page_without_the_section_is_left_alone(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(f"{END}\n{BEGIN}\n")
    with pytest.raises(ValueError, match="bench linear: begin"):
        Linear().write_page(record(found("example-fp32-8x16x100-k4", 4e-3, 1e-3)), page)
    assert page.read_text() == f"{END}\n{BEGIN}\n"
