"""bench step: each way of the step is checked, parts and ratios are those of its times, the record says all."""

import json
from dataclasses import replace

import pytest
import torch

import meprop

pytest.importorskip("tyro")

from matplotlib.figure import Figure

from meprop import cli, nn
from meprop.bench import step
from meprop.bench.measure import Ratio, Times
from meprop.reporting import bench_step

SMALL = step.Model((6, 140, 130, 3), 5)


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)  # so little work is slowed by a second thread that must wait for a busy core


def test_models_are_named_by_widths_and_batch():
    assert step.Model.parse("784-500-10@10") == step.Model((784, 500, 10), 10)
    assert step.Model.parse(SMALL.name) == SMALL
    for name in ("784-500-10", "784-x-10@5", "784-10@5", "784-0-10@5", "784-500-10@0", "@5"):
        with pytest.raises(ValueError, match="model"):
            step.Model.parse(name)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adagrad", "adam", "adamw"])
def test_all_ways_are_timed_with_each_optimizer(optimizer):
    result = step.run_case(SMALL, optimizer, 0.1, 0.001)
    assert [one.way for one in result.ways] == step.ways()
    for one in result.ways:
        assert one.wrong is None
        assert sum(times.best for times in one.phases.values()) <= one.step.p80
        assert all(times.best > 0 for times in one.phases.values())
        assert all(times.calls == one.step.calls for times in one.phases.values())


def test_ratios_are_of_the_baselines_to_each_way(monkeypatch):
    seconds = {way.name: (4.0, 2.0) for way in step.ways()}
    seconds |= {"dense fp32": (8.0, 8.0), "dense bf16": (6.0, 1.0)}

    def interleaved(sides, budget):
        assert budget == 0.5 * len(sides)
        for _ in range(3):
            for run in sides.values():
                run()
        return {name: Times(0.0, *seconds[name], 9.0, 9) for name in sides}

    monkeypatch.setattr(step, "interleaved", interleaved)
    ways = {one.name: one for one in step.run_case(SMALL, "sgd", 0.1, 0.5).ways}
    assert ways["per example fp32"].ratios == {"dense fp32": Ratio(2.0, 4.0), "dense bf16": Ratio(1.5, 0.5)}
    assert ways["dense fp32"].ratios == {"dense fp32": Ratio(1.0, 1.0), "dense bf16": Ratio(0.75, 0.125)}
    assert all(times.calls == 2 for one in ways.values() for times in one.phases.values())  # the first is not timed


def test_the_ways_are_what_they_are_called():
    ways = {way.name: way for way in step.ways()}
    assert len(ways) == 10
    batches = [(torch.randn(5, 6), torch.randint(0, 3, (5,)))]
    for name, way in ways.items():
        one = step._Step(way, SMALL, SMALL.build().state_dict(), "adam", 0.1, batches)
        one.loss(*batches[0]).backward()
        hidden = one.model[0]
        assert (hidden.weight.grad.layout == torch.sparse_coo) == name.endswith(("exact", "decay", "lazy"))
        assert getattr(one._optimizer, "sparse_rows", "exact") == (way.sparse_rows or "exact")
        if way.scope is not None:
            assert (hidden.compute_dtype is not None) == ("bf16" in name)
            assert hidden.rule.scope == way.scope


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_wrong_is_not_timed(monkeypatch, what):
    right = nn.linear.linear_with_policy

    def wrong(x, weight, bias, policy):
        if x.dtype == torch.float64:  # the oracle
            return right(x, weight, bias, policy)
        if what == "gradient" and policy.sparse_grad:
            policy = replace(policy, rule=meprop.RandomK(policy.rule.k, scope="batch"))
        return right(x, weight, bias, policy) * (2 if what == "loss" else 1)

    monkeypatch.setattr(nn.linear, "linear_with_policy", wrong)
    result = step.run_case(SMALL, "adam", 0.1, 0.001)
    found = {one.way.name: one for one in result.ways}
    assert found["dense fp32"].wrong is None
    assert what in found["unified fp32 lazy"].wrong
    assert found["unified fp32 lazy"].step is None
    assert (found["per example fp32"].wrong is not None) == (what == "loss")
    assert "WRONG: unified fp32 lazy" in step.Step().table([result])


def run(*options):
    return cli.main(["bench", "step", "--models", SMALL.name, "--seconds", "0.001", *options])


def test_the_command_writes_record_figure_and_section(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench step: begin -->\n<!-- bench step: end -->\nafter\n")
    assert run("--optimizers", "adam", "sgd", "--page", "page.md") == 0
    content = json.loads((tmp_path / "runs/bench-step/result.json").read_text())
    assert [(case["model"]["batch"], case["optimizer"]) for case in content["cases"]] == [(5, "adam"), (5, "sgd")]
    assert content["config"]["k"] == 0.04
    for figure in (tmp_path / step.FIGURE, tmp_path / "runs/bench-step" / step.FIGURE):
        assert figure.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert f"![Parts of the step]({step.FIGURE})" in text
    assert text.count("| dense fp32 |") == 2
    assert "against dense bf16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--models", "784"), "784: a model is named like"),
        (("--k", "0"), "k=0"),
        (("--seconds", "0"), "--seconds"),
        (("--models",), "--models and --optimizers"),
        (("--page", "nowhere.md"), "--page nowhere.md"),
    ],
)
def test_a_wrong_request_is_refused_before_any_work(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert run(*options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("wrong", [["dense fp32"], [way.name for way in step.ways()]])
def test_a_wrong_baseline_leaves_its_ratios_out(wrong, monkeypatch, tmp_path):
    right = step._Step.what_is_wrong
    monkeypatch.setattr(
        step._Step, "what_is_wrong", lambda self, oracle: "broken" if self.way.name in wrong else right(self, oracle)
    )
    result = step.run_case(SMALL, "sgd", 0.1, 0.001)
    bench = step.StepBench("bench-step", {}, {}, {}, None, {}, None, [result])
    assert "WRONG: dense fp32: broken" in step.Step().table([result])
    made = []
    monkeypatch.setattr(bench_step, "Figure", lambda **options: made.append(Figure(**options)) or made[-1])
    bench_step.draw(bench, tmp_path / "step.png")
    (axes,) = made[0].axes
    right = [one for one in result.ways if one.wrong is None]
    labels = [text.get_text() for text in axes.get_yticklabels()] if right else []  # without bars they are numbers
    assert labels == [one.name for one in right]
    assert [text.get_text() for text in axes.texts] == [""] * len(right)  # no baseline, no ratio
    assert len(axes.patches) == len(step.PHASES) * len(right)
    assert all("dense fp32" not in one.ratios for one in result.ways)


def test_the_figure_stacks_the_parts_of_each_step(monkeypatch, tmp_path):
    def way(name, *parts, ratio):
        phases = {phase: Times(p, p, p, p, 9) for phase, p in zip(step.PHASES, parts, strict=True)}
        whole = Times(*[sum(parts)] * 4, 9)
        return step.WayResult(step.Way(name), None, whole, phases, {"dense fp32": Ratio(ratio, ratio)})

    ways = [way("dense fp32", 1e-3, 4e-3, 3e-3, ratio=1.0), way("sparse", 1e-3, 2e-3, 1e-3, ratio=2.0)]
    result = step.CaseResult(SMALL, "adam", [*ways, step.WayResult(step.Way("broken"), "differs")])
    made = []
    monkeypatch.setattr(bench_step, "Figure", lambda **options: made.append(Figure(**options)) or made[-1])
    bench_step.draw(step.StepBench("bench-step", {}, {}, {}, None, {}, None, [result, result]), tmp_path / "step.png")
    first, second = made[0].axes
    for axes in (first, second):
        assert axes.get_title() == f"{SMALL.name}, adam"
        assert [text.get_text() for text in axes.get_yticklabels()] == ["dense fp32", "sparse"]
        bars = [(round(bar.get_x(), 6), round(bar.get_width(), 6)) for bar in axes.patches]
        assert bars == [(0, 1), (0, 1), (1, 4), (1, 2), (5, 3), (3, 1)]  # milliseconds: a part of both, then the next
        assert [(text.get_text(), text.xy[0]) for text in axes.texts] == [("1.0x", 8.0), ("2.0x", 4.0)]
        assert axes.get_xlim()[1] > 8
    assert [text.get_text() for text in first.get_legend().get_texts()] == list(step.PHASES)
