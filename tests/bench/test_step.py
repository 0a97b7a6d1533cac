"""bench step: each way of the step is checked, parts and ratios are those of its times, the record says all."""

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch

import meprop

pytest.importorskip("tyro")

from matplotlib.figure import Figure

from meprop import cli, nn, ops
from meprop.bench import perceptron, step, ways
from meprop.bench.measure import Ratio, Times
from meprop.reporting import bench_step

SMALL = perceptron.Model((6, 140, 130, 3), 5)
DROPPED = replace(SMALL, dropout=0.2, batch=100)  # large enough for one pass of activation and dropout
WAYS = ways.ways(0.1, 0.25)


def run_case(model=SMALL, optimizer="sgd", which=WAYS, train_steps=0, seconds=0.001):
    return step.run_case(model, optimizer, which, train_steps, seconds)


def named(*names):
    """The baselines, and these ways."""
    return [way for way in WAYS if way.rule is None or way.name in names]


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)  # so little work is slowed by a second thread that must wait for a busy core


def test_models_are_named_by_widths_and_batch():
    assert perceptron.Model.parse("784-500-10@10") == perceptron.Model((784, 500, 10), 10)
    assert perceptron.Model.parse(SMALL.name) == SMALL
    assert perceptron.Model.parse(DROPPED.name, 0.2) == DROPPED
    for name in ("784-500-10", "784-x-10@5", "784-10@5", "784-0-10@5", "784-500-10@0", "@5"):
        with pytest.raises(ValueError, match="model"):
            perceptron.Model.parse(name)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adagrad", "adam", "adamw"])
def test_all_ways_are_timed_with_each_optimizer(optimizer):
    result = run_case(optimizer=optimizer)
    assert [one.way for one in result.ways] == WAYS
    for one in result.ways:
        assert one.wrong is None
        assert sum(times.best for times in one.phases.values()) <= one.step.p80
        assert all(times.best > 0 for times in one.phases.values())
        assert all(times.calls == one.step.calls for times in one.phases.values())


def test_ratios_are_of_the_baselines_to_each_way(monkeypatch):
    seconds = {way.name: (4.0, 2.0) for way in WAYS}
    seconds |= {"dense fp32": (8.0, 8.0), "dense bf16": (6.0, 1.0)}

    def interleaved(sides, budget):
        assert budget == 0.5 * len(sides)
        for _ in range(3):
            for run in sides.values():
                run()
        return {name: Times(0.0, *seconds[name], 9.0, 9) for name in sides}

    monkeypatch.setattr(step, "interleaved", interleaved)
    found = {one.name: one for one in run_case(seconds=0.5).ways}
    assert found["per example fp32"].ratios == {"dense fp32": Ratio(2.0, 4.0), "dense bf16": Ratio(1.5, 0.5)}
    assert found["dense fp32"].ratios == {"dense fp32": Ratio(1.0, 1.0), "dense bf16": Ratio(0.75, 0.125)}
    assert all(times.calls == 2 for one in found.values() for times in one.phases.values())  # the first is not timed


@pytest.fixture(autouse=True)
def _every_parameter_is_large(monkeypatch):
    """So that the backward pass updates it with `in_backward`."""
    monkeypatch.setattr(ops.optimizer, "_SMALLEST_WHOLE", 1)


def test_the_ways_are_what_they_are_called():
    every = ways.ways(0.1, 0.5, dropout=True, compiled=True)
    assert len({way.name for way in every}) == len(every) == 25
    network = DROPPED.build()
    batches = [(torch.randn(100, 6), torch.randint(0, 3, (100,)))]
    for way in every:
        one = ways.Stepper(way, network, "adam", batches)
        assert (one._model is not one.network) == way.compiled == ("compiled" in way.name)
        if way.compiled:
            continue
        loss = one.loss(*batches[0])
        loss.backward()
        hidden = one.network[0]
        assert ("activation_dropout" in graph_of(loss)) == way.fuse == ("fused" in way.name)
        assert (hidden.weight.grad is None) == ("in backward" in way.name)
        is_sparse = hidden.weight.grad is not None and hidden.weight.grad.layout == torch.sparse_coo
        if not way.name.startswith("sampled rows"):  # above the ceiling its gradient is dense
            assert is_sparse == (way.sparse_rows is not None)
        assert getattr(one.optimizer, "sparse_rows", "exact") == (way.sparse_rows or "exact")
        if way.rule is not None:
            assert (hidden.compute_dtype is not None) == ("bf16" in way.name)
            assert hidden.skip_zeros == way.skip_zeros == ("skip zeros" in way.name)
            assert hidden.sparse_grad == (way.sparse_rows is not None) == ("exact" in way.name or "decay" in way.name)
            expected = {
                "sampled rows": meprop.Sampled(noise=0.5, exact_sum=False),
                "sampled": meprop.Sampled(noise=0.5),
                "per example": meprop.TopK(0.1),
                "unified": meprop.TopK(0.1, scope="batch"),
            }
            assert hidden.rule == next(rule for name, rule in expected.items() if way.name.startswith(name))


def graph_of(loss):
    """The names of the nodes of its graph."""
    nodes, names = [loss.grad_fn], ""
    while nodes:
        node = nodes.pop()
        names += f" {node.name()}".replace("_ActivationDropout", "activation_dropout")
        nodes += [following for following, _ in node.next_functions if following is not None]
    return names


def test_ways_with_dropout_are_right():
    result = run_case(DROPPED, "adam", ways.ways(0.1, 0.25, dropout=True), 20)
    assert [one.wrong for one in result.ways] == [None] * 24
    assert "dropout 0.2" in result.name


def test_the_compiled_model_is_a_baseline(monkeypatch):
    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiling(model, backend="aot_eager"))  # without a compiler
    result = run_case(which=[way for way in ways.ways(0.1, 0.25, compiled=True) if way.rule is None])
    assert [one.name for one in result.ways] == [*ways.BASELINES]
    assert all(one.wrong is None and [*one.ratios] == [*ways.BASELINES] for one in result.ways)
    assert "against dense fp32 compiled" in step.Step().table([result])


def test_a_compiled_model_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(meprop.errors.MepropError, match=r"--compiled: .* no-such-compiler is not there"):
        step.Step(compiled=True).prepare()


# ---------------------------------------------------------------- weights and data


def test_without_training_data_are_random():
    begin = perceptron.start(SMALL, 0)
    torch.manual_seed(0)
    expected = SMALL.build()
    assert begin.data == "random data"
    assert all(map(torch.equal, begin.network.parameters(), expected.parameters()))
    assert len({x.sum().item() for x, _ in begin.batches}) == 8


def losses(begin, model):
    untrained = perceptron.start(model, 0).network
    return [
        sum(torch.nn.functional.cross_entropy(network.eval()(x), classes).item() for x, classes in begin.batches) / 8
        for network in (untrained, begin.network)
    ]


def test_images_are_learnt_where_they_are_found(small_mnist, monkeypatch):
    monkeypatch.setenv("MEPROP_DATA", str(small_mnist))
    model = perceptron.Model((20, 140, 3), 16)
    begin = perceptron.start(model, 40)
    assert begin.data == "MNIST"
    assert all(x.shape == (16, 20) and x[:, 16:].eq(0).all() and x[:, :16].any(1).all() for x, _ in begin.batches)
    before, after = losses(begin, model)
    assert after < 0.8 * before


@pytest.mark.parametrize("model", [SMALL, perceptron.Model((20, 140, 2), 5), perceptron.Model((20, 140, 3), 500)])
def test_points_are_learnt_where_images_do_not_fit(small_mnist, monkeypatch, model):
    monkeypatch.setenv("MEPROP_DATA", str(small_mnist))
    begin = perceptron.start(model, 60)
    assert begin.data == "points around random centres"
    before, after = losses(begin, model)
    assert after < 0.6 * before


def test_points_overlap():
    torch.manual_seed(0)
    model = perceptron.Model((200, 140, 10), 2000)
    (x, classes), (_, others) = islice(perceptron._points(model), 2)
    assert not classes.equal(others)
    centres = torch.stack([x[classes == one].mean(0) for one in range(10)])  # nearly, each of 200 points
    nearest = torch.cdist(x, centres).argmin(1)
    assert 0.9 < (nearest == classes).float().mean() < 0.9999


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_wrong_is_not_timed(monkeypatch, what):
    right = nn.linear.linear_with_policy

    def wrong(x, weight, bias, policy):
        if x.dtype == torch.float64:  # the oracle
            return right(x, weight, bias, policy)
        if what == "gradient" and policy.rule.scope == "batch":
            policy = replace(policy, rule=meprop.RandomK(policy.rule.k, scope="batch"))
        return right(x, weight, bias, policy) * (2 if what == "loss" else 1)

    monkeypatch.setattr(nn.linear, "linear_with_policy", wrong)
    result = run_case(optimizer="adam", which=named("per example fp32", "unified fp32 decay"))
    found = {one.way.name: one for one in result.ways}
    assert found["dense fp32"].wrong is None
    assert what in found["unified fp32 decay"].wrong
    assert found["unified fp32 decay"].step is None
    assert (found["per example fp32"].wrong is not None) == (what == "loss")
    assert "WRONG: unified fp32 decay" in step.Step().table([result])


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_a_biased_draw_is_wrong(monkeypatch, scale):
    as_entries = meprop.Sampled.as_entries
    monkeypatch.setattr(meprop.Sampled, "as_entries", lambda self, width, device: None)  # so that select is called

    def biased(self, grad):
        kept = ops.keep_entries(grad, as_entries(self, grad.shape[1], grad.device))
        return replace(kept, values=kept.values * scale)

    monkeypatch.setattr(meprop.Sampled, "select", biased)
    for one in run_case(which=named("sampled fp32", "sampled bf16")).ways:
        assert (one.wrong is not None) == (one.way.rule is not None)


def test_another_update_in_the_backward_pass_is_wrong(monkeypatch):
    class Other(meprop.optim.SGD):
        def __init__(self, parameters, *, lr, in_backward, **options):
            super().__init__(parameters, lr=lr * 2 if in_backward else lr, in_backward=in_backward, **options)

    monkeypatch.setattr(meprop.optim, "SGD", Other)
    for one in run_case(which=[way for way in WAYS if way.in_backward or way.rule is None]).ways:
        assert (one.wrong == "its weights after a step differ from those of the separate step") == one.way.in_backward


# ---------------------------------------------------------------- what has to move


def test_what_has_to_move():
    weights = 6 * 140 + 140 * 130 + 130 * 3 + 140 + 130 + 3
    activations = 5 * (6 + 140 + 130 + 3)
    later = 140 * 130 + 130 * 3  # weights that the gradients of inputs need
    of_rows = 6 * 14 + 140 * 13 + 130 * 3 + 140 + 130 + 3
    read, write = -(weights - 273) / 2, (weights - 273) / 2  # of copies in bfloat16, which biases do not have
    expected = {
        "dense fp32": (weights + activations, later + weights + activations, 7 * weights),
        "dense bf16": (weights + activations / 2, later / 2 + weights + activations / 2, 7 * weights),
        "sampled fp32": (weights + activations, later + weights + activations, 7 * weights),
        "sampled bf16 in backward": (weights + read + activations, 6 * weights + write + activations, 0),
        "unified fp32 exact": (
            weights + activations,
            140 * 13 + 130 * 3 + of_rows + activations,
            of_rows + 6 * weights,
        ),
        "unified bf16 decay": (
            weights + read + activations,
            140 * 13 + 130 * 3 + of_rows + activations,
            7 * of_rows + (of_rows - 273) / 2,
        ),
    }
    found = {one.name: one for one in run_case(optimizer="adam", which=named(*expected)).ways}
    for name, elements in expected.items():
        assert [4 * each for each in elements] == [found[name].least_bytes[phase] for phase in ways.PHASES]
    layers = meprop.report(SMALL.build()).layers
    for optimizer, moments in {"sgd": 0, "momentum": 1, "adagrad": 1, "adam": 2, "adamw": 2}.items():
        least = ways.least_bytes(ways.Way("dense fp32"), layers, [140, 130, 3], optimizer, 5)
        assert least["optimizer"] == 4 * weights * (3 + 2 * moments)


def test_narrow_moments_have_half_the_bytes():
    narrow = ways.ways(0.1, 0.25, state_dtype=torch.bfloat16)
    assert {way.state_dtype for way in narrow if way.rule is None} == {None}
    network, x = SMALL.build(), torch.randn(5, 6)
    found = []
    for way in next(way for way in WAYS if way.name == "sampled fp32"), narrow[2]:
        assert way.name == "sampled fp32"
        stepper = ways.Stepper(way, network, "adam", [(x, torch.tensor([0, 1, 2, 0, 1]))])
        stepper.run()
        found.append((stepper.least_bytes["optimizer"], stepper.optimizer.state[stepper.network[0].weight]["exp_avg"]))
    (wide, _), (half, moments) = found
    assert half * 7 == wide * 5  # two moments of four bytes are read and written, and now two of two
    assert moments.dtype is torch.bfloat16


def test_rows_without_an_entry_do_not_have_to_move():
    """Of a batch in which only some units get an entry, the gradients have the rows of these units only."""
    way = next(way for way in WAYS if way.name == "sampled rows fp32 decay")
    network = SMALL.build()
    with torch.no_grad():
        network[0].bias[20:], network[2].bias[30:] = -1e3, -1e3  # units that are off, whatever the batch
    x, classes = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    stepper = ways.Stepper(way, network, "adam", [(x, classes)])
    stepper.run()
    least = stepper.least_bytes
    assert 0 < least["optimizer"] <= 4 * 7 * (6 * 20 + 140 * 30 + 130 * 3 + 140 + 130 + 3)
    assert all(parameter.grad is None for parameter in stepper.network.parameters())
    dense = ways.Stepper(ways.Way("dense fp32"), network, "adam", [(x, classes)]).least_bytes
    assert least["backward"] < dense["backward"]


def test_shares_are_of_a_copy_of_as_many_bytes(monkeypatch):
    monkeypatch.setattr(step, "copy_seconds", lambda count: count / 1e9)
    result = run_case(which=WAYS[:4])
    for one in result.ways:
        moving = [phase for phase in ways.PHASES if one.least_bytes[phase] > 0]
        assert moving == (["forward", "backward"] if one.way.in_backward else [*ways.PHASES])
        for phase in moving:
            assert one.shares[phase] == pytest.approx(one.least_bytes[phase] / 1e9 / one.phases[phase].p20)
        shown = step.Step().table([replace(result, ways=[one])])
        assert shown.endswith("/ -") == one.way.in_backward


def test_what_was_kept_is_shown():
    found = {one.name: one for one in run_case(which=named("unified bf16 exact", "sampled fp32")).ways}
    assert found["dense bf16"].kept == 1
    assert found["unified bf16 exact"].kept == pytest.approx(0.1, abs=0.01)
    assert 0 < found["sampled fp32"].kept <= 1


# ---------------------------------------------------------------- the command


def run(*options):
    return cli.main(
        ["bench", "step", "--models", SMALL.name, "--seconds", "0.001", "--train-steps", "3", "--k", "0.1", *options]
    )


def test_the_command_writes_record_figure_and_section(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench step: begin -->\n<!-- bench step: end -->\nafter\n")
    assert run("--optimizers", "adam", "sgd", "--ways", "unified*", "--page", "page.md") == 0
    content = json.loads((tmp_path / "runs/bench-step/result.json").read_text())
    assert [(case["model"]["batch"], case["optimizer"]) for case in content["cases"]] == [(5, "adam"), (5, "sgd")]
    assert content["config"]["k"] == 0.1
    assert content["cases"][0]["data"] == "points around random centres"
    for figure in (tmp_path / step.FIGURE, tmp_path / "runs/bench-step" / step.FIGURE):
        assert figure.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert f"![Parts of the step]({step.FIGURE})" in text
    assert text.count("| dense fp32 |") == 2
    assert "steps of training before = 3" in text
    assert "against dense bf16" in capsys.readouterr().out


def test_ways_are_chosen_by_patterns():
    chosen = [way.name for way in step.Step(ways=("sampled fp32", "unified*decay")).chosen()]
    assert chosen == ["dense fp32", "dense bf16", "sampled fp32", "unified fp32 decay", "unified bf16 decay"]
    assert step.Step().chosen() == ways.ways(0.04, 0.25)
    assert any(way.fuse for way in step.Step(dropout=0.1).chosen())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--models", "784"), "784: a model is named like"),
        (("--k", "0"), "k=0"),
        (("--seconds", "0"), "--seconds"),
        (("--models",), "--models and --optimizers"),
        (("--dropout", "1"), "--dropout"),
        (("--train-steps", "-1"), "--train-steps"),
        (("--noise", "0"), "noise"),
        (("--state-dtype", "bfloat16", "--optimizers", "adam", "sgd"), "--optimizers sgd, which keeps nothing"),
        (("--ways", "sampeld*"), "--ways sampeld*: no such way; the ways are sampled fp32,"),
        (("--page", "nowhere.md"), "--page nowhere.md"),
    ],
)
def test_a_wrong_request_is_refused_before_any_work(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert run(*options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("wrong", [["dense fp32"], [way.name for way in WAYS]])
def test_a_wrong_baseline_leaves_its_ratios_out(wrong, monkeypatch, tmp_path):
    right = step.what_is_wrong
    monkeypatch.setattr(
        step, "what_is_wrong", lambda way, *others: "broken" if way.name in wrong else right(way, *others)
    )
    result = run_case()
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
    assert len(axes.patches) == len(ways.PHASES) * len(right)
    assert all("dense fp32" not in one.ratios for one in result.ways)


def test_the_figure_stacks_the_parts_of_each_step(monkeypatch, tmp_path):
    def way(name, *parts, ratio):
        phases = {phase: Times(p, p, p, p, 9) for phase, p in zip(ways.PHASES, parts, strict=True)}
        whole = Times(*[sum(parts)] * 4, 9)
        return step.WayResult(ways.Way(name), None, whole, phases, {"dense fp32": Ratio(ratio, ratio)})

    found = [way("dense fp32", 1e-3, 4e-3, 3e-3, ratio=1.0), way("sparse", 1e-3, 2e-3, 1e-3, ratio=2.0)]
    result = step.CaseResult(SMALL, "adam", "MNIST", [*found, step.WayResult(ways.Way("broken"), "differs")])
    made = []
    monkeypatch.setattr(bench_step, "Figure", lambda **options: made.append(Figure(**options)) or made[-1])
    bench_step.draw(step.StepBench("bench-step", {}, {}, {}, None, {}, None, [result, result]), tmp_path / "step.png")
    first, second = made[0].axes
    for axes in (first, second):
        assert axes.get_title() == f"{SMALL.name}, adam, MNIST"
        assert [text.get_text() for text in axes.get_yticklabels()] == ["dense fp32", "sparse"]
        bars = [(round(bar.get_x(), 6), round(bar.get_width(), 6)) for bar in axes.patches]
        assert bars == [(0, 1), (0, 1), (1, 4), (1, 2), (5, 3), (3, 1)]  # milliseconds: a part of both, then the next
        assert [(text.get_text(), text.xy[0]) for text in axes.texts] == [("1.0x", 8.0), ("2.0x", 4.0)]
        assert axes.get_xlim()[1] > 8
    assert [text.get_text() for text in first.get_legend().get_texts()] == list(ways.PHASES)
