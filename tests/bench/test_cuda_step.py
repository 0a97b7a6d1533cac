"""bench step --device cuda, with a CPU in the place of the card: ways, checks, ratios, floors, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")

import meprop
from bench.fake import FakeCard, FakeRows
from meprop import cli, nn
from meprop.bench import cuda, cuda_step, cuda_ways
from meprop.bench.cuda_step import CudaStep
from meprop.bench.measure import Ratio, Times
from meprop.bench.perceptron import Model, start
from meprop.errors import NotSupportedError
from meprop.reporting import pages

SMALL = Model((20, 140, 130, 3), 48)
LIMITS = cuda.Limits({"fp32": 1e9, "bf16": 2e9})
SPARSE = [
    *(f"unified {precision} {mode}" for precision in ("bf16", "autocast") for mode in ("exact", "decay", "lazy")),
    "rows bf16", "rows autocast",
]  # fmt: skip


@pytest.fixture(autouse=True)
def card(monkeypatch, tmp_path, threads):
    """The card that is found."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    found = FakeCard()
    monkeypatch.setattr(cuda.Card, "find", classmethod(lambda cls: found))
    for name, value in {"_SQUARE": 64, "_SECONDS": 0.0, "_COPY_SECONDS": 0.0}.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(cuda_ways, "rule_of_rows", FakeRows)
    return found


def run_case(card, train_steps=20):
    return cuda_step.run_case(SMALL, cuda_ways.ways(0.1), train_steps, 0.0, LIMITS, card)


def fixed(monkeypatch, seconds):
    """Lets the device say how long a side takes: its 20th percentile and its median."""
    monkeypatch.setattr(
        FakeCard,
        "time",
        lambda self, sides, budget: {name: Times(0, *seconds.get(name, (1, 1)), 9, 9) for name in sides},
    )


def test_the_ways_are_what_they_are_called():
    every = cuda_ways.ways(0.1)
    assert sorted(way.name for way in every) == sorted([*cuda_ways.BASELINES, *SPARSE])
    begin = start(SMALL, 0)
    for way in every:
        stepper = cuda_ways.CardStepper(way, begin.network, begin.batches[0])
        stepper.run()
        hidden = stepper.network[0]
        assert (hidden.weight.dtype == torch.bfloat16) == (" bf16" in way.name)
        loss = stepper.loss(*begin.batches[0])
        assert loss.dtype == torch.float32
        loss.backward()
        assert (hidden.weight.grad.layout == torch.sparse_coo) == way.name.startswith("unified")
        assert isinstance(hidden, nn.Linear) == (not way.name.startswith("dense"))
        if way.sparse_rows is None:
            assert stepper.optimizer.defaults["fused"]
        else:
            assert stepper.optimizer.sparse_rows == way.name.split()[-1]


@pytest.mark.parametrize("train_steps", [0, 20])
def test_all_ways_are_right_and_timed(card, train_steps):
    result = run_case(card, train_steps)
    assert {one.name: one.wrong for one in result.ways} == dict.fromkeys([one.name for one in result.ways])
    for one in result.ways:
        assert one.times["eager"].p20 > 0
        assert one.uncaptured is None
        assert one.share == one.roofline.floor / one.times["graph"].p20
    kept = {one.name: one.kept for one in result.ways}
    assert kept["dense bf16"] == 1
    assert kept["unified bf16 exact"] == pytest.approx(0.1, abs=0.01)
    assert kept["rows autocast"] == pytest.approx(1 / 3, abs=0.01)


def test_weights_stay_what_they_are():
    begin = start(SMALL, 5)
    for way in cuda_ways.ways(0.1):
        stepper = cuda_ways.CardStepper(way, begin.network, begin.batches[0])
        stepper.run()
        for parameter, before in zip(stepper.network.parameters(), begin.network.parameters(), strict=True):
            assert torch.equal(parameter, before.to(parameter.dtype))


def test_ratios_are_of_graphs_where_both_have_one(monkeypatch, card):
    seconds = {f"{name} graph": (2.0, 1.0) for name in cuda_ways.BASELINES}
    seconds |= {f"{name} eager": (6.0, 3.0) for name in cuda_ways.BASELINES}
    seconds |= {"rows bf16 graph": (0.5, 0.5), "rows bf16 eager": (3.0, 3.0), "unified bf16 exact eager": (3.0, 1.0)}
    fixed(monkeypatch, seconds)

    def capture(_card, call):
        if call.__self__.way.name == "unified bf16 exact":
            raise cuda.CaptureError("it waits for the device")
        return call

    monkeypatch.setattr(type(card), "capture", capture)
    result = run_case(card)
    line = "no graph of unified bf16 exact: it waits for the device"
    assert CudaStep().table([result]).endswith(f"\n{line}")
    assert CudaStep().blocks([result])[-1] == f"- {line}"
    found = {one.name: one for one in result.ways}
    assert found["rows bf16"].ratios == dict.fromkeys(cuda_ways.BASELINES, Ratio(4.0, 2.0))
    assert found["unified bf16 exact"].ratios == dict.fromkeys(cuda_ways.BASELINES, Ratio(2.0, 3.0))
    assert found["dense tf32"].ratios["dense bf16"] == Ratio(1.0, 1.0)


# ---------------------------------------------------------------- what is wrong


def test_what_is_wrong_is_not_timed(monkeypatch, card):
    right = nn.linear.linear_with_policy

    def wrong(x, weight, bias, policy):
        if x.dtype != torch.float64 and policy.sparse_grad:  # float64: the oracle
            policy = replace(policy, rule=meprop.RandomK(policy.rule.k, scope="batch"))
        return right(x, weight, bias, policy)

    monkeypatch.setattr(nn.linear, "linear_with_policy", wrong)
    result = run_case(card)
    for one in result.ways:
        assert (one.wrong is not None) == (one.way.sparse_rows is not None), one.name
        assert bool(one.times) == (one.wrong is None)
    assert "WRONG: unified bf16 lazy: the gradient of" in CudaStep().table([result])


def test_an_error_of_one_way_leaves_the_others(monkeypatch, card):
    def select(self, grad):
        raise NotSupportedError("no rows here")

    monkeypatch.setattr(FakeRows, "select", select)
    found = {one.name: one.wrong for one in run_case(card).ways}
    assert found.pop("rows bf16") == found.pop("rows autocast") == "NotSupportedError: no rows here"
    assert set(found.values()) == {None}


def test_a_wrong_baseline_leaves_its_ratios_out(monkeypatch, card):
    differs = cuda_step.differs
    monkeypatch.setattr(
        cuda_step,
        "differs",
        lambda stepper, *rest: "off" if stepper.way.name == "dense bf16" else differs(stepper, *rest),
    )
    result = run_case(card)
    assert result.ways[0].wrong == "off"
    assert all("dense bf16" not in one.ratios for one in result.ways)
    assert "WRONG: dense bf16: off" in CudaStep().table([result])


# ---------------------------------------------------------------- what it cannot avoid


def test_work_is_counted():
    found = {way.name: cuda_ways.work_of(way, SMALL) for way in cuda_ways.ways(0.1)}
    weights, biases = (20 * 140, 140 * 130, 130 * 3), 140 + 130 + 3
    every, later, columns = sum(weights) + biases, sum(weights[1:]), (20 * 14, 140 * 13, 130 * 3)
    activations = 2 * 48 * (20 + 140 + 130 + 3)
    dense = 48 * (sum(weights) + weights[0] + 2 * later)
    assert {found[name].multiply_adds for name in cuda_ways.BASELINES} == {dense}
    assert found["dense bf16"].memory_bytes == 2 * (every + later + 2 * every + 6 * every + activations)
    assert found["dense tf32"].memory_bytes == 2 * found["dense bf16"].memory_bytes
    assert found["dense autocast"].memory_bytes == 4 * 9 * every + 2 * later + 2 * activations
    kept = sum(columns) + biases
    unified = 48 * (sum(weights) + columns[0] + 2 * sum(columns[1:]))
    assert found["unified bf16 lazy"].multiply_adds == unified
    assert found["unified bf16 lazy"].memory_bytes == 2 * (every + sum(columns[1:]) + 8 * kept + activations)
    exact = found["unified bf16 exact"].memory_bytes - found["unified bf16 decay"].memory_bytes
    assert exact == 2 * 6 * (every - kept)
    rows = 48 * sum(weights) + 16 * (weights[0] + 2 * weights[1]) + 48 * 2 * weights[2]
    assert found["rows autocast"].multiply_adds == rows
    assert found["rows autocast"].memory_bytes == found["dense autocast"].memory_bytes


# ---------------------------------------------------------------- the command


def run(*options):
    required = ("--device", "cuda", "--models", SMALL.name, "--train-steps", "3", "--k", "0.1", "--seconds", "0.001")
    return cli.main(["bench", "step", *required, *options])


def test_the_command_writes_record_and_section(capsys):
    page = Path("gpu.md")
    begin, end = pages.markers(CudaStep().section)
    page.write_text(f"{begin}\n{end}\n")
    assert run("--ways", "unified*lazy", "rows bf16", "--page", "gpu.md") == 0
    content = json.loads(Path("runs/bench-step/result.json").read_text())
    assert content["card"]["name"] == "a card"
    assert content["config"]["device"] == "cuda"
    (case,) = content["cases"]
    assert case["data"] == "points around random centres"
    names = [one["way"]["name"] for one in case["ways"]]
    assert names == [*cuda_ways.BASELINES, "unified bf16 lazy", "rows bf16", "unified autocast lazy"]
    text = page.read_text()
    assert "k = 0.1, steps of training before = 3" in text
    assert "a card, 80 GiB" in text
    assert text.count("| rows bf16 |") == 1
    assert "against dense autocast" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dropout", "0.1"), "--dropout"),
        (("--optimizers", "sgd"), "--optimizers"),
        (("--compiled",), "--compiled"),
        (("--noise", "0.5"), "--noise"),
        (("--keep-memory",), "--keep-memory"),
        (("--state-dtype", "bfloat16"), "--state-dtype"),
        (("--ways", "sampled*"), "--ways sampled*: no such way on a card; the ways are unified bf16 exact,"),
        (("--models",), "--models"),
        (("--models", "784"), "784: a model is named like"),
        (("--seconds", "0"), "--seconds"),
        (("--train-steps", "-1"), "--train-steps"),
    ],
)
def test_a_wrong_request_is_refused_before_any_work(capsys, options, message):
    assert run(*options) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_the_models_of_the_card_are_its_own():
    assert {Model.parse(name).batch for name in CudaStep().models} == {1024, 100, 1000}
