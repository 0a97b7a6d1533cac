"""The hidden layers of a task: what is recorded, checked, timed and shown."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

pytest.importorskip("tyro")
pytest.importorskip("lightning_fabric")

import meprop
from meprop import cli, ops
from meprop.bench import layers, recorded
from meprop.bench.layers import LayersBench
from meprop.reporting import pages
from meprop.training import tasks
from meprop.training.config import ScriptTraining, TrainingConfig
from meprop.training.script import ScriptConfig
from tiny import TinyConfig, TinyTask

TRAINING = TrainingConfig(epochs=1, k=5, schedule="constant", accelerator="cpu")


class Sequences(TinyTask):
    """Packed sequences of different lengths through an LSTM: its input and output are no plain tensors."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(6, 10)
            self.lstm = nn.LSTM(10, 128)
            self.head = nn.Linear(128, 2)

        def forward(self, inputs_NI):
            words = self.embed(inputs_NI)
            output, _ = self.lstm(pack_sequence([words[:6], words[6:9], words[9:]]))
            return self.head(pad_packed_sequence(output)[0].sum(0))

    def build_model(self):
        return self.Model()

    def loss(self, model, batch):
        inputs_NI, classes_N = batch
        return nn.functional.cross_entropy(model(inputs_NI), classes_N[:3])


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path, threads):
    torch.set_num_threads(1)  # so little work is slowed by a second thread that must wait for a busy core
    entry = tasks.TaskEntry(TinyConfig, TinyTask, lambda folder: None, str, TrainingConfig(k=5))
    monkeypatch.setattr(tasks, "table", lambda: {"tiny": entry})
    monkeypatch.chdir(tmp_path)


def bench(*options):
    return cli.main(["bench", "layers", "tiny", "--hidden", "128", "150", "--seconds", "0.001", *options])


def result():
    return json.loads(Path("runs/bench-layers-tiny/result.json").read_text())


def run(task, training=TRAINING):
    return layers.run(task, training, 5, 2, 0.001, {})


def test_each_hidden_layer_all_together_and_the_step_are_timed(capsys):
    assert bench() == 0
    content = result()
    assert set(content) == {field.name for field in dataclasses.fields(LayersBench)} | {"sha256"}
    assert content["machine"]["threads"] == 1
    assert (content["config"]["k"], content["config"]["task"]["hidden"]) == (5, [128, 150])
    names = ["0", "3", "hidden layers together", "whole step"]  # the output layer is narrow and stays dense
    assert [row["name"] for row in content["layers"]] == names
    assert [row["rows"] for row in content["layers"]] == [10, 10, None, None]
    for row in content["layers"]:
        assert row["wrong"] is None
        assert set(row["times"]) == {"dense", "sparse"}
        assert row["ratio"]["p20"] > 0
    shown = capsys.readouterr().out
    for text in ("10 x 6 x 128", "10 x 128 x 150", "3.9%", "3.3%", "hidden layers together", "whole step"):
        assert text in shown


def test_threads_are_those_that_were_asked_for(monkeypatch, capsys):
    def run(*_):
        raise meprop.MepropError(f"with {torch.get_num_threads()} threads")

    monkeypatch.setattr(layers, "run", run)
    assert bench("--threads", "2") == 1
    assert "with 2 threads" in capsys.readouterr().err
    assert torch.get_num_threads() == 1


def test_times_are_per_batch(monkeypatch):
    times = {"dense": layers.Times(4.0, 8.0, 12.0, 16.0, 9), "sparse": layers.Times(4.0, 4.0, 8.0, 16.0, 9)}
    monkeypatch.setattr(layers, "interleaved", lambda sides, seconds: {side: times[side] for side in sides})
    (row, *_) = layers.run(TinyTask(), TRAINING, 5, 4, 1.0, {}).layers
    assert row.times["dense"] == layers.Times(1.0, 2.0, 3.0, 4.0, 9)
    assert row.ratio == layers.Ratio(2.0, 1.5)


def test_what_is_recorded_is_what_training_sees():
    """The gradients of a replayed layer are those that the whole model's backward pass gives its parameters."""
    task = TinyTask(TinyConfig(hidden=(128, 150), dropout=0.0))
    dense = layers.Trainer(task, TRAINING, None, 0)
    model = dense.model
    batches = [batch for batch, _ in zip(task.train_batches(torch.Generator().manual_seed(0)), range(3), strict=False)]
    calls = recorded.recorded_calls(dense, ["0", "3"], batches)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    for name in ("0", "3"):
        layer = model.get_submodule(name)
        backward = recorded.backward_of(layer, calls[name])
        for batch, gradients in zip(batches, backward(), strict=True):
            expected = torch.autograd.grad(task.loss(model, batch), list(layer.parameters()))
            for parameter, gradient in zip(("weight", "bias"), expected, strict=True):
                torch.testing.assert_close(gradients[parameter], gradient)
            # The first layer's input is data: training needs no gradient of it.
            assert ("input" in gradients) == (name == "3")


def test_packed_sequences_through_an_lstm():
    rows = {row.name: row for row in run(Sequences()).layers}
    assert list(rows) == ["lstm", "whole step"]
    assert rows["lstm"].wrong is None
    assert rows["lstm"].rows == 10
    assert rows["lstm"].layer is not None
    assert rows["lstm"].layer.kind == "LSTM"


@pytest.mark.parametrize("options", [{"scope": "batch"}, {"scope": "global"}, {"noise": 0.25}, {"noise": 3.0}])
def test_other_selections_are_checked_and_timed_too(options):
    found = run(TinyTask(), dataclasses.replace(TRAINING, **options))
    assert found.wrong == []
    assert found.layers[0].ratio is not None
    assert 0 < found.layers[0].layer.density <= 1  # by the gradient, where it is not k


def test_a_wrong_draw_is_found(monkeypatch):
    select = layers.oracle.select
    monkeypatch.setattr(layers.oracle, "select", lambda _, grad_NO: select(meprop.Sampled(noise=0.3), grad_NO))
    found = run(TinyTask(), dataclasses.replace(TRAINING, noise=0.1))
    assert "differ from the oracle's" in found.layers[0].wrong


def test_dropout_of_the_sparse_model_can_be_fused(monkeypatch):
    convert, fused = meprop.convert, []
    monkeypatch.setattr(
        meprop, "convert", lambda *args, **options: fused.append(options["fuse"]) or convert(*args, **options)
    )
    bench("--fuse", "--out", "fused")
    assert fused == [True]
    assert json.loads(Path("fused/result.json").read_text())["config"]["fuse"] is True
    bench("--out", "plain")
    assert fused == [True, False]


def test_the_noise_is_an_option_and_is_on_the_page():
    Path("page.md").write_text("\n".join(pages.markers("bench layers tiny")))
    assert bench("--noise", "0.5", "--page", "page.md") == 0
    assert result()["config"]["noise"] == 0.5
    page = Path("page.md").read_text()
    assert "noise = 0.5" in page
    assert "k = " not in page


@pytest.mark.parametrize(("position", "name"), [(1, "weight"), (2, "bias")])
def test_a_wrong_product_is_not_timed_and_fails(monkeypatch, capsys, position, name):
    real = ops.backward_with

    def off_by_a_little(*args, **options):
        gradients = list(real(*args, **options))
        gradients[position].view(-1)[-1] += 0.1
        return tuple(gradients)

    monkeypatch.setattr(ops, "backward_with", off_by_a_little)
    Path("page.md").write_text("\n".join(pages.markers("bench layers tiny")))
    assert bench("--page", "page.md") == 1
    assert [row["name"] for row in result()["layers"]] == ["0", "3"]
    assert all(f"the gradient of the {name} differs" in row["wrong"] and not row["times"] for row in result()["layers"])
    shown = capsys.readouterr()
    assert "wrong, and not timed: 0, 3" in shown.err
    assert shown.out.count("WRONG") == 4  # in the table, and why
    assert Path("page.md").read_text().count("WRONG") == 2


def test_a_model_without_hidden_layers_is_refused():
    with (
        pytest.warns(meprop.NoEffectWarning),
        pytest.raises(meprop.MepropError, match=r"(?s)no hidden layer to time.*narrow: 2 output features"),
    ):
        run(TinyTask(TinyConfig(hidden=())))


def test_a_wrong_output_is_found(monkeypatch):
    real = meprop.nn.Linear.forward
    monkeypatch.setattr(meprop.nn.Linear, "forward", lambda layer, x: real(layer, x) + 0.01)
    assert run(TinyTask()).layers[0].wrong == "its output differs from the dense layer's"


def test_the_weights_stay_what_they_are_while_the_step_is_timed():
    task = TinyTask()
    trainer = layers.Trainer(task, TRAINING, None, 0)
    trainer.advance(3)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    layers._steps(trainer, list(task.train_batches(torch.Generator())))()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_page_gets_the_table(capsys):
    begin, end = pages.markers("bench layers tiny")
    Path("page.md").write_text(f"Before.\n{begin}\nold\n{end}\nAfter.\n")
    assert bench("--page", "page.md") == 0
    text = Path("page.md").read_text()
    assert text.startswith(f"Before.\n{begin}\n")
    assert text.endswith(f"{end}\nAfter.\n")
    assert "| 3 | Linear | 10 x 128 x 150 | 3.3% |" in text
    assert "hidden = [128, 150], dropout = 0.3, k = 5" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seconds", "0"], "--seconds must be"),
        (["--steps", "-1"], "--steps must be"),
        (["--batches", "0"], "--batches must be"),
        (["--threads", "-1"], "--threads must be"),
        (["--k", "0"], "k=0 keeps nothing"),
        (["--page", "missing.md"], "missing.md"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_written(capsys, options, message):
    assert bench(*options) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_an_earlier_result_is_replaced_only_if_asked(capsys):
    assert bench() == 0
    assert bench() == 2
    assert "--overwrite" in capsys.readouterr().err
    assert bench("--overwrite") == 0


def test_training_before_the_recording_is_with_the_tasks_own_learning_rate(monkeypatch):
    entry = tasks.table()["tiny"]._replace(training=TrainingConfig(k=7, lr=0.02, scope="batch", optimizer="sgd"))
    monkeypatch.setattr(tasks, "table", lambda: {"tiny": entry})
    found = []
    monkeypatch.setattr(layers, "run", lambda task, training, *others: found.append(training) or 1 / 0)
    assert bench() == 70  # the fault is ours
    chosen = TrainingConfig(1, k=7, lr=0.02, scope="batch", optimizer="sgd", schedule="constant", accelerator="cpu")
    assert found == [chosen]


# ---------------------------------------------------------------- the user's own task

SCRIPT = """
import torch
from torch import nn
import meprop

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.images = nn.Conv2d(16, 128, 3, padding=1)
        self.frozen, self.unused, self.twice = nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 128)
        self.head = nn.Linear(128, 2)

    def forward(self, images, scale):
        x = self.images(images).relu().mean((2, 3))
        with torch.no_grad():
            kept = self.frozen(x)
        return self.head(self.twice(self.twice(x + kept) * scale))

def make(seed):
    model, x = Model(), torch.randn(40, 16, 4, 5)
    batches = [{"images": each, "scale": 2.0} for each in x.split(10)]
    def loss(model, batch):
        return model(**batch).square().mean()
    return meprop.Setup(model, torch.optim.AdamW(model.parameters()), BATCHES, loss, lambda model: 0.0)
"""


@pytest.fixture
def of_script():
    def bench(*options, batches="batches"):
        Path("mine.py").write_text(SCRIPT.replace("BATCHES", batches))
        return cli.main(["bench", "layers", "mine.py:make", "--seconds", "0.001", *options])

    return bench


def test_layers_of_a_users_model_are_timed_on_its_own_batches(of_script, capsys):
    assert of_script("--noise", "None", "--k", "5", "--scope", "batch") == 0
    found = json.loads(Path("runs/bench-layers-mine-make/result.json").read_text())
    rows = {row["name"]: row["rows"] for row in found["layers"]}
    # A layer without a gradient, or that is not called, has nothing to time.
    assert rows == {"images": 10 * 4 * 5, "twice": 20, "hidden layers together": None, "whole step": None}
    assert all(row["ratio"]["p20"] > 0 for row in found["layers"])
    assert (found["config"]["task"], found["config"]["k"]) == ({"script": "mine.py:make"}, 5)
    assert "optimizer" not in found["config"]
    assert found["config"]["out"] == "runs/bench-layers-mine-make"
    assert "200 x 16 x 128" in capsys.readouterr().out


def test_each_function_of_a_users_file_has_a_folder():
    folders = {
        name: layers.of_task(ScriptConfig(name), ScriptTraining()).folder for name in ("mine.py", "b.py", "b.py:made")
    }
    assert folders == {
        "mine.py": "bench-layers-mine-make", "b.py": "bench-layers-b-make", "b.py:made": "bench-layers-b-made"
    }  # fmt: skip


def test_a_users_task_keeps_its_optimizer(of_script, capsys):
    assert of_script("--optimizer", "sgd") == 2
    assert "--optimizer" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["0", "3"])
def test_an_error_of_a_users_batches_names_its_line(of_script, capsys, steps):
    assert of_script("--steps", steps, batches="type('B', (), {'__len__': lambda s: 4, '__iter__': lambda s: 1 / 0})()")
    assert "mine.py, line 24: the batches raised ZeroDivisionError" in capsys.readouterr().err


def test_a_users_page_says_what_was_measured(of_script):
    Path("page.md").write_text("\n".join(pages.markers("bench layers script")))
    assert of_script("--page", "page.md") == 0
    assert "script = mine.py:make, noise = 0.25" in Path("page.md").read_text()
