"""Profiles of torch show what a backward pass of ours consists of, and graphs do not depend on them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.profiler import ProfilerActivity, profile

import meprop

LINEAR, CONVOLUTION, LSTM = "meprop.linear.backward", "meprop.convolution.backward", "meprop.lstm.backward"
EXAMPLE, BATCH, WHOLE = meprop.TopK(3), meprop.TopK(3, "batch"), meprop.TopK(3, "global")


def of_linear(rule: meprop.Rule) -> Tensor:
    return meprop.nn.Linear(5, 13, rule=rule)(torch.randn(7, 5, requires_grad=True))


def of_convolution(rule: meprop.Rule) -> Tensor:
    return meprop.nn.Conv1d(3, 11, 3, rule=rule)(torch.randn(2, 3, 9))


def of_lstm(rule: meprop.Rule) -> Tensor:
    return meprop.nn.LSTM(4, 9, rule=rule)(torch.randn(5, 3, 4))[0]


def labels(run: Callable[[], object]) -> list[tuple[str, list[str]]]:
    """The labels of ours in the order of time, each with those of ours around it."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    ours = [event for event in profiled.events() if event.name.startswith("meprop.")]
    found = []
    for event in sorted(ours, key=lambda each: each.time_range.start):
        around, parent = [], event.cpu_parent
        while parent is not None:
            around += [parent.name] if parent.name.startswith("meprop.") else []
            parent = parent.cpu_parent
        found.append((event.name, around))
    return found


@pytest.mark.parametrize(
    ("output", "rule", "layer", "operations"),
    [
        (of_linear, EXAMPLE, LINEAR, ["linear_backward"]),
        (of_linear, WHOLE, LINEAR, ["entries_backward"]),
        (of_linear, meprop.RandomK(3), LINEAR, ["select", "linear_backward"]),
        (of_linear, meprop.Sampled(3, scope="example"), LINEAR, ["select", "linear_backward"]),
        (of_convolution, BATCH, CONVOLUTION, ["topk_channels"]),
        (of_convolution, WHOLE, CONVOLUTION, ["map_norms", "select", "maps_backward"]),
        (of_convolution, meprop.RandomK(3, "batch"), CONVOLUTION, ["select"]),
        (of_lstm, EXAMPLE, LSTM, ["lstm_backward"]),
    ],
)
def test_a_profile_shows_the_layer_and_within_it_the_choice_and_the_products(output, rule, layer, operations):
    torch.manual_seed(0)
    loss = output(rule).square().sum()
    first, *others = labels(loss.backward)
    assert first == (layer, [])
    outer = [(name, around) for name, around in others if around == [layer]]
    assert [name for name, _ in outer] == [f"meprop.{operation}" for operation in operations]


def test_a_pass_in_one_go_of_dropout_is_shown():
    x = torch.randn(100, 100, requires_grad=True)
    result = meprop.functional.activation_dropout(x)
    names = [name for name, _ in labels(result.sum().backward)]
    assert names == ["meprop.activation_dropout.backward", "meprop.activation_dropout_gradient"]


def test_no_label_is_made_without_a_profiler(monkeypatch):
    loss = of_linear(EXAMPLE).sum()
    monkeypatch.setattr(profiler, "record_function", lambda name: pytest.fail(f"{name} is labelled"))
    loss.backward()


def test_a_profiler_changes_no_compiled_graph():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 200), nn.ReLU(), nn.Linear(200, 150))
    meprop.convert(model, EXAMPLE, when="always")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 6)
    compiled(x).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert not any(name.endswith(".backward") for name, _ in labels(lambda: compiled(x).sum().backward()))


def test_what_a_rule_does_is_within_its_choice():
    found = labels(of_linear(meprop.RandomK(3)).square().sum().backward)
    assert ("meprop.topk_rows", ["meprop.select", LINEAR]) in found


def test_an_lstm_shows_the_choice_of_each_time_step():
    found = labels(of_lstm(meprop.RandomK(3)).square().sum().backward)
    assert [around for name, around in found if name == "meprop.select"] == [["meprop.lstm_backward", LSTM]] * 5
