"""Tasks of users: what a file has to have, what is said of one that has not, and that such a run resumes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("lightning_fabric")

import meprop
from meprop.cli.main import main, parse
from meprop.training import checkpoint
from meprop.training.config import RunConfig, SimplifyConfig
from meprop.training.loop import Trainer, fit
from meprop.training.script import ScriptConfig, ScriptError, ScriptTask
from meprop.training.tasks import SCRIPT

CONFIG = RunConfig(epochs=3, k=5, accelerator="cpu")

FILE = """
import random
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
import meprop

x = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))
y = (x[:, 0] > 0).long()
calls = []

class Stream(IterableDataset):
    def __iter__(self):
        while True:
            yield {{"x": x[(i := random.randrange(80))], "y": y[i]}}

def make(seed{parameters}):
    calls.append((seed, {passed}))
    model = nn.Sequential(nn.Linear(6, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    batches = DataLoader(TensorDataset(x, y), 10, shuffle=True)
    def loss(model, batch):
        inputs, classes = batch
        return F.cross_entropy(model(inputs), classes)
    def evaluate(model):
        return 100 * (model(x).argmax(1) == y).float().mean().item()
    options = {{}}
{more}
    return meprop.Setup(model, optimizer, batches, loss, evaluate, **options)
"""


@pytest.fixture
def write(tmp_path):
    def written(more="", parameters="", passed="None"):
        path = tmp_path / "train.py"
        path.write_text(FILE.format(more="    " + more.replace("\n", "\n    "), parameters=parameters, passed=passed))
        return ScriptTask(ScriptConfig(f"{path}:make"))

    return written


SETUPS = {
    "a DataLoader that draws from the global generator": "",
    "a generator of the loader's own": """
batches = DataLoader(TensorDataset(x, y), 10, shuffle=True, generator=torch.Generator())""",
    "workers": "batches = DataLoader(TensorDataset(x, y), 10, shuffle=True, num_workers=1)",
    "a list": "batches = list(zip(x.split(10), y.split(10)))",
    "a stream of dicts": """
batches, options = DataLoader(Stream(), 10), {"steps_per_epoch": 7}
loss = lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"])""",
    "a schedule by step": "options['scheduler'] = lr_scheduler.CosineAnnealingLR(optimizer, 24)",
    "a schedule by epoch": """
options['scheduler'] = lr_scheduler.StepLR(optimizer, 1, 0.1)
options['scheduler_interval'] = 'epoch'""",
    "a plateau": """
options['scheduler'] = lr_scheduler.ReduceLROnPlateau(optimizer, 'max', 0.1, patience=0)
options['scheduler_interval'] = 'epoch'""",
    "a schedule of two": """
parts = [lr_scheduler.LinearLR(optimizer, 0.1, 1, 4), lr_scheduler.OneCycleLR(optimizer, 0.1, 21)]
options['scheduler'] = lr_scheduler.SequentialLR(optimizer, parts, [4])""",
    "our optimizer, in the backward pass": """
optimizer = meprop.optim.Adam(model.parameters(), 1e-2, in_backward=True)""",
    "several metrics": """
evaluate = lambda model: {"loss": 1, "accuracy": 50.0 + model(x).sum().item()}
options["metric"] = "accuracy" """,
}


@pytest.mark.parametrize("case", SETUPS)
def test_a_run_that_is_resumed_is_the_one_that_was_not_stopped(write, case, tmp_path):
    task = write(SETUPS[case])
    whole, stopped = (Trainer(task, CONFIG, CONFIG.rule(), 7) for _ in range(2))
    fit([whole], lambda trainer: None)
    for stop in range(1, 12):
        stopped.advance(1)
        if stop not in (3, 8, 11):  # in an epoch, at its end or just after it, and later in the next one
            continue
        checkpoint.save(tmp_path / "c.pt", stopped.state_dict(), {})
        resumed = Trainer(task, CONFIG, CONFIG.rule(), 7)
        checkpoint.resume(tmp_path / "c.pt", resumed, {}, ScriptConfig)
        fit([resumed], lambda trainer: None)
        for ours, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert [each.dev for each in whole.curve] == [each.dev for each in resumed.curve]
        rates = [[group["lr"] for group in each.optimizer.param_groups] for each in (whole, resumed)]
        assert rates[0] == rates[1]


def test_dense_and_sparse_start_alike_and_see_the_same_batches(write):
    task = write("def evaluate(model):\n    random.random()\n    return 0.0")
    dense, sparse = (Trainer(task, CONFIG, rule, 7) for rule in (None, CONFIG.rule()))
    for ours, theirs in zip(dense.model.parameters(), sparse.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    batches = [[], []]
    for trainer, seen in zip((dense, sparse), batches, strict=True):
        loss = trainer.setup.loss
        object.__setattr__(
            trainer.setup,
            "loss",
            lambda model, batch, loss=loss, seen=seen: seen.append(batch[0]) or loss(model, batch),
        )
    fit([dense, sparse], lambda trainer: None, turn=3)
    assert len(batches[0]) == 24
    assert all(map(torch.equal, *batches))


@pytest.mark.parametrize("parameters", [", epochs", ", *, epochs=1"])
def test_the_number_of_epochs_is_given_to_who_asks(write, parameters):
    task = write(parameters=parameters, passed="epochs")
    Trainer(task, CONFIG, None, 7)
    assert task._module.calls == [(7, 3)]


def test_schedules_are_stepped_when_they_are_to_be(write):
    by_epoch = Trainer(write(SETUPS["a schedule by epoch"]), CONFIG, None, 7)
    by_epoch.advance(9)
    assert by_epoch.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    by_step = Trainer(write(SETUPS["a schedule by step"]), CONFIG, None, 7)
    by_step.advance(8)
    assert 5e-3 < by_step.optimizer.param_groups[0]["lr"] < 1e-2
    fit([by_step], lambda trainer: None)
    assert by_step.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_evaluation_is_without_dropout_and_gradients_and_changes_no_random_number(write):
    more = """
def evaluate(model):
    torch.rand(5)
    assert not model.training and not torch.is_grad_enabled()
    return 1.0"""
    runs = [Trainer(write(each), CONFIG, None, 7) for each in (more, "evaluate = lambda model: 1.0")]
    fit(runs, lambda trainer: None)
    assert torch.equal(*(torch.cat([p.flatten() for p in each.model.parameters()]) for each in runs))


WRONG = {
    "raise KeyError('lr')": r"train.py, line \d+: make\(seed=7\) raised KeyError: 'lr'",
    "raise SystemExit('no data')": r"train.py, line \d+: make\(seed=7\) raised SystemExit: no data",
    "meprop.convert(model, meprop.TopK(5), when='always')": r"Setup\(model=...\) has sparse layers; give it dense",
    "batches = DataLoader(TensorDataset(x, y), 10, num_workers=1, persistent_workers=True)": "persistent_workers=True",
    "batches = DataLoader([{}['x'] if i else 0 for i in range(2)])": r"make\(seed=7\) raised KeyError: 'x'",
    "batches = DataLoader(type('Bad', (list,), {'__getitem__': lambda self, i: {}['x']})([1]))": (
        r"train.py, line \d+: the batches raised KeyError: 'x'"
    ),
    "options['scheduler'] = lr_scheduler.OneCycleLR(optimizer, 0.1, 10)": "a training step raised ValueError: Tried",
    "optimizer = torch.optim.LBFGS(model.parameters())": "a training step raised TypeError",
    "options['scheduler'] = lr_scheduler.ReduceLROnPlateau(optimizer, 'max')": "give scheduler_interval='epoch'",
    "options['scheduler'] = lr_scheduler.ReduceLROnPlateau(optimizer)": "mode='max'",
    "return model": r"make\(seed=7\) returned a value of type Sequential; it has to return a meprop.Setup",
    "return None": r"make\(seed=7\) returned nothing \(None\)",
    "model = 'net'": r"raised TypeError: Setup\(model=...\) is of type str; it is a torch.nn.Module",
    "optimizer = optimizer.step": r"Setup\(optimizer=...\) is of type method",
    "optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters())": "has none of the model's parameters",
    "batches = iter([1, 2])": "which is used up after one epoch",
    "batches = []": "has 0 batches in an epoch",
    "batches = DataLoader(Stream(), 10)": r"has no length; give Setup\(steps_per_epoch=...\)",
    "options['scheduler'] = 0.1": r"Setup\(scheduler=...\) is of type float",
    "options['scheduler'] = lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), 1.0), 1)": "another optimizer",
    "options['scheduler_interval'] = 'batch'": "'step' or 'epoch'",
    "options['example_inputs'] = x": "example_inputs=...\\) is of type Tensor",
    "loss = lambda model, batch: model(batch[0])": r"the loss returned a tensor of shape \(10, 2\)",
    "loss = lambda model, batch: 1.0": "the loss returned a value of type float",
    "loss = lambda model, batch: torch.zeros(())": r"the loss returned a tensor of shape \(\), without a gradient",
    "loss = lambda model, batch: model(batch)": r"train.py, line \d+: the loss raised TypeError",
    "loss = lambda model, batch: model(batch[0]).sum() * float('nan')": "the loss became nan in epoch 1, step 1",
    "evaluate = lambda model: model(x).mean()": r"evaluate returned a tensor of shape \(\), without a",
    "evaluate = lambda model: None": r"evaluate returned nothing \(None\) for 'score'",
    "evaluate = lambda model: {'loss': 1.0}": r"evaluate returned \['loss'\], without 'score'",
    "evaluate = lambda model: float('nan')": "dev score became nan in epoch 1",
    "options['test'] = lambda model: 1 / 0": r"train.py, line \d+: test raised ZeroDivisionError",
    "options['steps_per_epoch'] = 9": "ended after 8 of 9 batches of an epoch",
}


@pytest.mark.parametrize("more", WRONG)
def test_what_is_wrong_is_named_with_what_is_wanted(write, more):
    with pytest.raises((meprop.MepropError, ValueError), match=WRONG[more]):
        fit([Trainer(write(more), CONFIG, None, 7)], lambda trainer: None)


@pytest.mark.parametrize(
    "make",
    ["def make(*, seed):", "@functools.cache\ndef make(seed):", "class make:\n  def __new__(cls, seed):"],
)
def test_whatever_can_be_called_with_a_seed_makes_trainings(tmp_path, make):
    path = tmp_path / "my-train.py"
    path.write_text(f"import functools\n{FILE.format(more='', parameters='', passed='None')}\n_make = make\n{make}\n")
    path.open("a").write("    return _make(seed)\n")
    run = Trainer(ScriptTask(ScriptConfig(str(path))), CONFIG, None, 7)
    run.advance(1)
    assert run.step == 1


def test_runs_do_not_share_layers(write):
    task = write("model = globals().setdefault('_model', model)\noptimizer = torch.optim.SGD(model.parameters(), 0.1)")
    trainer = Trainer(task, CONFIG, None, 7)
    with pytest.raises(ScriptError, match="returned layers of an earlier call; each run needs a model of its own"):
        Trainer(task, CONFIG, CONFIG.rule(), 7)
    assert trainer.step == 0


def test_runs_that_share_a_loader_see_what_they_see_alone(write):
    more = """
import torch.utils.data as data
order = data.RandomSampler(x, True, 80, torch.Generator())
batches = globals().setdefault('_batches', DataLoader(TensorDataset(x, y), 10, sampler=order))"""
    alone = Trainer(write(more), CONFIG, None, 7)
    fit([alone], lambda trainer: None)
    task = write(more)
    fit(pair := [Trainer(task, CONFIG, None, 7) for _ in range(2)], lambda trainer: None, turn=3)
    assert all(each.curve[-1].loss == alone.curve[-1].loss for each in pair)


def test_a_number_of_numpy_is_a_quality(write):
    run = Trainer(write("import numpy\nevaluate = lambda model: numpy.float32(2.5)"), CONFIG, None, 7)
    fit([run], lambda trainer: None)
    assert type(run.curve[-1].dev["score"]) is float


def test_the_digest_is_of_the_file_that_was_imported(write, tmp_path):
    task = write()
    before = task.fingerprint
    (tmp_path / "train.py").write_text("")
    assert task.fingerprint == before


def test_the_settings_of_the_default_rule_do_not_hinder_another():
    assert isinstance(SCRIPT.training.rule("topk"), meprop.TopK)
    assert SCRIPT.training.rule("sampled").noise == 0.25
    with pytest.raises(ValueError, match=r"noise=0.5 is no setting of the rule 'topk'"):
        replace(SCRIPT.training, noise=0.5).rule("topk")


def test_to_simplify_needs_example_inputs(write):
    simplify = SimplifyConfig(of_mean=0.5, cycle=1)
    with pytest.raises(ValueError, match=r"needs Setup\(example_inputs"):
        Trainer(write(), CONFIG, CONFIG.rule(), 7, simplify)
    Trainer(write("options['example_inputs'] = (x[:1],)"), CONFIG, CONFIG.rule(), 7, simplify)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("nothing.py", r"nothing.py: there is no such file; give FILE.py:FUNCTION"),
        ("train.py:maek", "train.py has no function 'maek'; it has make; did you mean make"),
        ("random.py", "random.py has the name of the module random; give the file another name"),
        ("torch.py", "torch.py has the name of the module torch; give the file another name"),
        ("notes.txt:make", r"notes.txt: there is no such file; give FILE.py:FUNCTION"),
        ("broken.py", r"broken.py: the import of it raised SyntaxError"),
        ("absent.py", r"absent.py, line 1: the import of it raised ModuleNotFoundError"),
    ],
)
def test_a_file_that_is_none_of_a_task_is_refused(write, tmp_path, monkeypatch, script, message):
    write()
    for name in ("random.py", "torch.py", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "broken.py").write_text("def make(:")
    (tmp_path / "absent.py").write_text("import not_there_at_all")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, ScriptError), match=message):
        ScriptTask(ScriptConfig(script))


@pytest.mark.parametrize("command", ["train", "compare", "simplify"])
def test_the_commands_take_a_file_where_they_take_a_task(write, tmp_path, monkeypatch, command, capsys):
    write("options['example_inputs'] = (x[:1],)")
    monkeypatch.chdir(tmp_path)
    options = ["--epochs", "2", "--accelerator", "cpu", "--when", "always", "--out", "out"]
    options += ["--cycle", "1", "--seconds", "0.01"] if command == "simplify" else []
    assert main([command, "train.py:make", *options]) == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["task"] == "script"
    assert all(run["dev"].keys() == {"score"} and run["test"] == {} for run in result["runs"])
    assert main([command, "train.py", *options, "--resume"]) == 2  # another script, by its name
    assert "script was 'train.py:make', now 'train.py'" in capsys.readouterr().err
    assert main([command, "train.py:make", "--lr", "0.1"]) == 2  # the file has its own optimizer


@pytest.mark.parametrize(
    ("command", "before", "after"),
    [
        ("advise", ["--json", "--seconds", "5"], []),
        ("train", ["--epochs", "2"], []),
        ("train", ["--out", "old.py"], []),
        ("train", ["--overwrite"], ["--epochs", "3"]),
        ("compare", ["--rule", "topk", "sampled"], ["--epochs", "3"]),
        ("tune", ["--budget=5min", "--out=old.py"], []),
        ("simplify", ["--seeds", "0", "1"], []),
    ],
)
@pytest.mark.parametrize("script", ["train.py", "my files/train.py:make"])
def test_options_may_stand_before_the_file(command, before, after, script):
    assert parse([command, *before, script, *after]) == parse([command, script, *before, *after])
    assert parse([command, *before, script, *after]).task == ScriptConfig(script)


def test_options_may_stand_before_the_name_of_a_task():
    assert parse(["compare", "--epochs", "2", "digits", "--seeds", "0"]) == parse(
        ["compare", "digits", "--epochs", "2", "--seeds", "0"]
    )
    assert parse(["train", "--out", "digits", "mnist"]) == parse(["train", "mnist", "--out", "digits"])


def test_a_file_beside_the_name_of_a_task_is_refused(capsys):
    assert main(["train", "mnist", "train.py:make"]) == 2
    assert "train.py:make" in capsys.readouterr().err


def test_a_file_may_change_the_working_directory(write, tmp_path, monkeypatch):
    write("import os; os.chdir('/')")
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "train.py:make", "--epochs", "1", "--accelerator", "cpu", "--out", "out"]) == 0
    assert {"result.json", "curves.png"} <= {each.name for each in (tmp_path / "out").iterdir()}


def test_scores_that_are_no_percents_are_said_to_need_another_margin(write, tmp_path, monkeypatch, capsys):
    write("evaluate = lambda model: 0.5")
    monkeypatch.chdir(tmp_path)
    options = ["compare", "train.py:make", "--epochs", "1", "--accelerator", "cpu", "--overwrite", "--out", "out"]
    said = "score is within 1, and --margin is 0.2: give a smaller margin"
    assert main(options) == 0
    assert said in capsys.readouterr().err
    assert main([*options, "--margin", "0.01"]) == 0
    assert said not in capsys.readouterr().err


def test_a_model_that_cannot_be_saved_is_refused_before_it_is_trained(write, tmp_path, monkeypatch, capsys):
    write("model.register_forward_hook(lambda *_: None)\noptions['example_inputs'] = (x[:1],)")
    monkeypatch.chdir(tmp_path)
    assert main(["simplify", "train.py:make", "--epochs", "1", "--accelerator", "cpu", "--cycle", "1"]) == 2
    assert "the model cannot be saved" in capsys.readouterr().err


def test_advise_takes_a_file_too(write, tmp_path, monkeypatch, capsys):
    write("print('not JSON')")
    monkeypatch.chdir(tmp_path)
    assert main(["advise", "train.py:make", "--seconds", "0.2", "--threads", "1"]) == 0
    assert "A dense step takes" in capsys.readouterr().out
    assert main(["advise", "train.py:make", "--seconds", "0.2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bound"] >= 1


def test_the_file_that_init_writes_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine.py"]) == 0
    text = (tmp_path / "mine.py").read_text()
    start, end = text.index("    # def clip"), text.index("    def loss")
    (tmp_path / "mine.py").write_text(text[:start] + text[start:end].replace("    # ", "    ") + text[end:])
    setup = ScriptTask(ScriptConfig("mine.py")).make(0, RunConfig(epochs=2))
    setup.loss(setup.model, next(iter(setup.batches))).backward()
    setup.optimizer.step()
    assert sum(each.grad.square().sum() for each in setup.model.parameters()) <= 1.0001  # clipped
    assert 0 <= setup.evaluate(setup.model)["accuracy"] <= 100
    assert main(["init", "mine.py"]) == 2
    assert "mine.py exists; give another name" in capsys.readouterr().err
    assert main(["init", "mine.txt"]) == 2
