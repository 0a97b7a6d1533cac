"""Experiments as files: what is refused, what the shipped ones say, and when a finished run counts."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("typeguard")
pytest.importorskip("lightning_fabric")

import torch

import meprop
from meprop import experiments
from meprop.bench import layers
from meprop.errors import DataError
from meprop.experiments import Published, Records
from meprop.reporting import pages
from meprop.reporting import reproduce as report
from meprop.training import tasks, tracking
from meprop.training.config import SimplifyConfig
from meprop.training.records import EpochRecord, Run, Seconds
from tiny import TinyConfig, TinyTask

TASKS = {"tiny": TinyConfig}
GOOD = """
title = "A table"
seeds = [0, 1]
[task]
name = "tiny"
dropout = 0.1
[training]
epochs = 2
[variants.dense]
rule = "dense"
published = { epochs = 3, test = 97.5 }
[variants.topk-5]
rule = "topk"
k = 5
task.hidden = [128, 128]
[variants.small]
rule = "dense"
against = "dense"
[variants.dense-2]
rule = "dense"
[variants.random]
rule = "random"
k = 0.1
[variants.simplified]
rule = "topk"
k = 7
simplify.threshold = 0.3
"""


def write(folder, text=GOOD):
    path = folder / "table.toml"
    path.write_text(text)
    return str(path)


@pytest.fixture
def experiment(tmp_path):
    return experiments.load(write(tmp_path), TASKS)


def test_an_experiment_says_all_of_its_runs(experiment):
    assert (experiment.name, experiment.title, experiment.seeds) == ("table", "A table", (0, 1))
    dense, topk, small, _, random, simplified = experiment.variants
    assert dense.task == TinyConfig(dropout=0.1)
    assert dense.training.epochs == 2
    assert dense.published == Published(epochs=3, test=97.5)
    runs = [variant.trainer(TinyTask(variant.task), 3) for variant in experiment.variants]
    assert [run.name for run in runs] == ["dense", "topk", "dense", "dense", "random", "simplified"]
    assert {run.seed for run in runs} == {3}
    assert runs[1].config == topk.training
    assert simplified.simplify == SimplifyConfig(threshold=0.3)
    assert (topk.simplify, topk.settings().get("simplify")) == (None, None)
    assert simplified.settings()["simplify"]["threshold"] == runs[-1].simplifier.threshold == 0.3
    assert topk.task == TinyConfig(dropout=0.1, hidden=(128, 128))
    assert repr(runs[1].rule) == "TopK(k=5, scope='example')"
    assert repr(runs[4].rule) == "RandomK(k=0.1, scope='example')"
    assert (topk.against, small.against, random.against) == ("dense", "dense", "dense-2")


def test_a_dense_variant_leaves_aside_what_rules_share(tmp_path):
    shared = """epochs = 2
lr_end = 0.01
schedule = "geometric"
exact_sum = false
compute_dtype = "bfloat16"
"""
    own = 'training.lr = 0.1\ntraining.precision = "bf16-mixed"\n'
    content = GOOD.partition("[variants.topk-5]")[0].replace("epochs = 2\n", shared)
    sparse = '[variants.sampled]\nrule = "sampled"\nk = 0.1\ntraining.lr = 0.1\n'
    dense, sampled = experiments.load(write(tmp_path, content + own + sparse), TASKS).variants
    assert (dense.training.lr, dense.training.lr_end, dense.training.precision) == (0.1, 0.01, "bf16-mixed")
    assert (dense.training.exact_sum, dense.training.compute_dtype) == (None, "float32")
    assert (sampled.training.exact_sum, sampled.training.compute_dtype) == (False, "bfloat16")
    with pytest.raises(ValueError, match=r"\[variants\.dense\] --exact-sum: --rule dense keeps everything"):
        experiments.load(write(tmp_path, content + own + "training.exact_sum = false\n" + sparse), TASKS)


def test_a_noise_that_variants_share_is_that_of_those_without_a_k(tmp_path):
    variants = """[variants.noise]
rule = "sampled"
[variants.own-noise]
rule = "sampled"
training.noise = 0.5
[variants.own-k]
rule = "topk"
k = 7
"""
    shared = 'epochs = 2\nnoise = 0.25\nnoise_start = 0.75\nnoise_of = "model"\n'
    content = GOOD.partition("[variants.topk-5]")[0].replace("epochs = 2\n", shared) + variants
    dense, noise, own_noise, own_k = experiments.load(write(tmp_path, content), TASKS).variants
    assert [v.training.noise for v in (dense, noise, own_noise, own_k)] == [None, 0.25, 0.5, None]
    assert [v.training.noise_start for v in (dense, noise, own_noise, own_k)] == [None, 0.75, 0.75, None]
    assert (noise.training.noise_of, own_k.training.noise_of, own_k.training.k) == ("model", "layer", 7)
    with pytest.raises(ValueError, match=r"\[variants\.own-k\] rule is 'topk'; a noise decides how many, instead of k"):
        experiments.load(write(tmp_path, content + "training.noise = 0.5\n"), TASKS)


def test_what_is_compared_is_trained_in_turns(experiment):
    groups = [[variant.name for variant in group] for group in experiment.groups()]
    assert groups == [["dense", "topk-5", "small"], ["dense-2", "random", "simplified"]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title =", "titel =", r"titel: there is no such key; there are title, seeds, task, training, variants"),
        ('title = "A table"', "", r"title is missing"),
        ("seeds = [0, 1]", "seeds = []", r"--seeds must be one or more"),
        ("seeds = [0, 1]", 'seeds = ["0"]', r"seeds is \['0'\]; it must be tuple\[int, \.\.\.\]"),
        ('name = "tiny"', 'name = "mnits"', r"\[task\] name is 'mnits'; the tasks are tiny"),
        ("epochs = 2", "epoch = 2", r"\[training\] epoch: there is no such key; there are epochs, budget_seconds"),
        ("epochs = 2", "seeds = [3]", r"\[training\] seeds: there is no such key"),
        ("epochs = 2", "epochs = true", r"\[training\] epochs is True; it must be int"),
        ("epochs = 2", "lr = '1e-3'", r"\[training\] lr is '1e-3'; it must be float"),
        ("epochs = 2", "epochs = 0", r"\[variants\.dense\] --epochs must be at least 1, got 0"),
        (
            "epochs = 2",
            "scope = 'row'",
            r"\[training\] scope is 'row'; it must be Literal\['example', 'batch', 'global', 'rows'\]",
        ),
        ("dropout = 0.1", "drop = 0.1", r"\[task\] drop: there is no such key; there are hidden, dropout"),
        ("dropout = 0.1", "dropout = 1.5", r"\[variants\.dense\] dropout is 1\.5"),
        ("dropout = 0.1", "data_dir = '/x'", r"\[task\] data_dir: there is no such key"),
        ("task.hidden = [128, 128]", "task.hidden = 128", r"\[variants\.topk-5\] task hidden is 128; it must be tuple"),
        ("seeds = [0, 1]", 'seeds = [0, "1"]', r"seeds is \[0, '1'\]; it must be tuple"),
        ("seeds = [0, 1]", "seeds = [0, 18446744073709551616]", r"seeds is beyond 64 bits"),
        ('name = "tiny"', 'name = ["tiny"]', r"\[task\] name is \['tiny'\]; the tasks are tiny"),
        ("k = 5", f"k = 1{400 * '0'}", r"\[variants\.topk-5\] k is beyond 64 bits"),
        ("task.hidden = [128, 128]", "task.hidden = [128, 1.5]", r"task hidden is \[128, 1\.5\]; it must be tuple"),
        ('[variants.random]\nrule = "random"\nk = 0.1', "[variants]\nrandom = 3", r"variants is .*; it must be dict"),
        ("task.hidden = [128, 128]", "task.hidden = [1, true]", r"\[variants\.topk-5\] task hidden is \[1, True\]"),
        ("simplify.threshold", "simplify.level", r"\[variants\.simplified\] simplify level: there is no such key"),
        ("simplify.threshold = 0.3", "simplify.cycle = 0", r"\[variants\.simplified\] --cycle must be at least 1"),
        (
            "task.hidden = [128, 128]\n[variants.small]\n",
            "[variants.small]\nsimplify = {}\n",
            r"small\] simplify: what",
        ),
        ("k = 5", "", r"\[variants\.topk-5\] rule is 'topk'; give its k"),
        ("k = 5", "k = 0", r"\[variants\.topk-5\] k=0 keeps nothing"),
        ('against = "dense"', "k = 5", r"\[variants\.small\] rule is 'dense'; dense has no k"),
        ('against = "dense"', "training.noise = 0.1", r"\[variants\.small\] --noise: --rule dense keeps everything"),
        ('against = "dense"', 'against = "random"', r"against is 'random'; it must be a variant above"),
        ('rule = "random"', 'rule = "rand"', r"\[variants\.random\] rule is 'rand'; it must be"),
        ("[variants.small]", '[variants."a/b"]', r"'a/b': a name has letters"),
        ("test = 97.5", "accuracy = 97.5", r"published accuracy: there is no such key; there are epochs, dev, test"),
        ("[variants.dense-2]", "[variants.dense]", r"\(at line \d+"),
    ],
)
def test_a_wrong_file_is_refused_with_file_and_key(tmp_path, old, new, message):
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ValueError, match=rf"table\.toml: .*{message}"):
        experiments.load(path, TASKS)


def test_an_unknown_experiment_is_refused_with_those_that_are_there():
    with pytest.raises(ValueError, match=r"'table-9': there are figure-4, .*table-1-mnist-adagrad, .*path of a \.toml"):
        experiments.load("table-9", TASKS)
    with pytest.raises(ValueError, match=r"nowhere\.toml: there is no such file"):
        experiments.load("nowhere.toml", TASKS)


@pytest.mark.parametrize("name", experiments.built_in())
def test_each_shipped_experiment_is_of_existing_settings_and_has_the_papers_figures(name):
    experiment = experiments.load(name, {task: entry.config for task, entry in tasks.table().items()})
    assert len(experiment.seeds) >= 3
    for variant in experiment.variants:  # of those that simplify, the paper has figures for some
        if name.startswith("ours-"):
            assert variant.published == Published()
        elif not name.startswith("simplify-"):
            assert variant.published.test is not None
    assert all(variant.rule == "dense" or variant.against is not None for variant in experiment.variants)


def test_the_shipped_experiments_cover_the_paper():
    names = set(experiments.built_in())
    tasks = ("mnist", "tagging", "parsing")
    assert {f"table-1-{task}-{optimizer}" for task in tasks for optimizer in ("adam", "adagrad")} < names
    assert {*(f"table-4-{task}" for task in tasks), "table-5", "table-6", "figure-4"} < names
    assert {f"ours-{task}" for task in tasks} < names


def test_the_variants_of_meprop_keep_the_same():
    """The mean over steps and hidden layers, of what the rule of each step keeps."""
    variants = experiments.load("ours-variants", {"mnist": tasks.table()["mnist"].config}).variants
    sparse = [variant for variant in variants if variant.rule != "dense"]
    assert len(sparse) == 11
    for variant in sparse:
        model = torch.nn.Sequential(*(torch.nn.Linear(500, 500) for _ in variant.task.hidden))
        variant.training.convert(model, variant.training.rule(variant.rule))
        schedule, kept = variant.training.rule_schedule(model, 1000), []
        for _ in range(1000 if schedule is not None else 1):
            kept += [layer.rule.count(500) for layer in model]
            if schedule is not None:
                schedule.step()
        assert sum(kept) / len(kept) == pytest.approx(20, rel=0.01), variant.name


def test_the_page_has_a_section_for_each_experiment_and_task():
    page = Path(__file__).parents[1] / "docs" / "paper.md"
    others = ("simplify", "convolution", "entries", "performance", "recipes/digits", "recipes/variants")
    all_pages = [page, *(page.parent / f"{name}.md" for name in others)]
    assert sorted(name for each in all_pages for name in report.experiments_of(each)) == experiments.built_in()
    for name in ("mnist", "tagging", "parsing"):  # the paper's
        entry = tasks.table()[name]
        pages.check_section(page, layers.of_task(entry.config(), entry.training).section)


# ---------------------------------------------------------------- records


def run(seed=0, rule="topk"):
    metrics = {"accuracy": 90.0}
    curve = [asdict(EpochRecord(epoch, 0.1, metrics, metrics, 1.0)) for epoch in (1, 2)]
    return Run(rule, seed, 2, metrics, metrics, asdict(Seconds(1, 2, 3, 6)), 5, 0.04, curve)


def test_a_record_is_read_back_as_long_as_the_settings_are_the_same(experiment, tmp_path):
    records, topk = Records(tmp_path / "results"), experiment.variant("topk-5")
    assert records.read(topk, 0) is None
    assert records.all(topk) == {}
    for seed in (10, 9):
        records.write(topk, run(seed), TinyTask(), ["dense"])
    assert list(records.all(topk)) == [9, 10]
    assert records.all(topk)[9].runs == [run(9)]
    content = json.loads(records.path(topk, 9).read_text())
    assert set(content) == {"task", "config", "machine", "versions", "commit", "runs", "sha256"}
    assert content["config"]["settings"]["hidden"] == [128, 128]
    assert content["config"]["settings"]["epochs"] == 2

    moved = replace(topk, task=replace(topk.task, data_dir=tmp_path), published=Published())
    assert records.read(moved, 9) is not None  # neither changes the outcome
    changed = replace(topk, training=replace(topk.training, epochs=3, k=6))
    assert records.read(changed, 9) is None
    with pytest.raises(
        ValueError, match=r"topk-5-seed9\.json was made with .* \(epochs was 2, now 3, k was 5, now 6\)"
    ):
        records.check(replace(experiment, variants=(changed,)))


def test_a_run_on_other_data_does_not_count_once_the_data_are_known(experiment, tmp_path):
    records, dense = Records(tmp_path), experiment.variant("dense")
    records.write(dense, run(rule="dense"), TinyTask(), [])
    records.check(experiment)
    assert replace(records, data={"dense": TinyTask.fingerprint}).read(dense, 0) is not None
    other = replace(records, data={"dense": "another"})
    assert other.read(dense, 0) is None
    with pytest.raises(ValueError, match=r"dense-seed0\.json was made with .*data was '1a2b3c', now 'another'"):
        other.check(experiment)


def test_k_says_nothing_about_a_dense_run(experiment, tmp_path):
    records, dense = Records(tmp_path), experiment.variant("dense")
    records.write(dense, run(rule="dense"), TinyTask(), [])
    assert records.read(replace(dense, training=replace(dense.training, k=7, scope="batch")), 0) is not None


def test_an_option_that_came_later_had_its_default_then(experiment, tmp_path):
    records, dense = Records(tmp_path), experiment.variant("dense")
    records.write(dense, run(rule="dense"), TinyTask(), [])
    path = records.path(dense, 0)
    content = tracking.read_content(path)
    del content["config"]["settings"]["precision"]
    path.write_text(json.dumps(content))
    assert records.read(dense, 0) is not None
    later = replace(dense, training=replace(dense.training, precision="bf16-mixed"))
    with pytest.raises(ValueError, match="precision was '32-true', now 'bf16-mixed'"):
        records.check(replace(experiment, variants=(later,)))


def test_so_had_an_option_of_simplifying(experiment, tmp_path):
    records, simplified = Records(tmp_path), experiment.variant("simplified")
    records.write(simplified, run(), TinyTask(), [])
    path = records.path(simplified, 0)
    content = tracking.read_content(path)
    del content["config"]["settings"]["simplify"]["max_removal"]
    path.write_text(json.dumps(content))
    assert records.read(simplified, 0) is not None
    later = replace(simplified, simplify=replace(simplified.simplify, max_removal=0.5))
    assert records.read(later, 0) is None


def test_names_that_begin_alike_are_not_mixed_up(experiment, tmp_path):
    records, dense, other = Records(tmp_path), experiment.variant("dense"), experiment.variant("dense-2")
    records.write(other, run(rule="dense"), TinyTask(), [])
    assert records.all(dense) == {}
    nested = replace(dense, name="dense-seed1")
    records.write(nested, run(rule="dense"), TinyTask(), [])
    assert records.all(dense) == {}


def test_a_damaged_record_is_named_with_a_remedy(experiment, tmp_path):
    records, dense = Records(tmp_path), experiment.variant("dense")
    for content in ("", "{}", '{"runs": [{"rule": 1}]}', "[1]", "3", '{"runs": 3}', '{"runs": [3]}', "[" * 100_000):
        records.path(dense, 0).write_text(content)
        with pytest.raises(DataError, match=re.escape(f"{records.path(dense, 0)} is damaged") + ".*delete it"):
            records.read(dense, 0)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("runs", []),
        ("runs", [asdict(run()), asdict(run())]),
        ("runs", [asdict(replace(run(), curve=[]))]),
        ("config", {}),
        ("config", {"settings": {}, "metric": "accuracy"}),
        ("config", {"settings": {}, "metric": "uas", "beside": []}),
        ("config", {"settings": 3, "metric": "accuracy", "beside": []}),
        ("config", {"settings": {}, "metric": "accuracy", "beside": ["dense", 1]}),
        ("machine", {}),
        ("versions", None),
    ],
)
def test_a_record_that_lacks_a_part_is_damaged_too(experiment, tmp_path, part, value):
    records, dense = Records(tmp_path), experiment.variant("dense")
    records.write(dense, run(rule="dense"), TinyTask(), [])
    path = records.path(dense, 0)
    path.write_text(json.dumps({**tracking.read_content(path), part: value}))
    for ask in (lambda: records.read(dense, 0), lambda: records.check(experiment)):
        with pytest.raises(DataError, match=r"dense-seed0\.json is damaged"):
            ask()


def test_the_selected_epoch_is_the_first_of_the_best_on_dev_whatever_the_test():
    def record(epoch, dev, test):
        return asdict(EpochRecord(epoch, 0.1, {"accuracy": dev}, {"accuracy": test}, 1.0))

    curve = [record(1, 90, 99), record(2, 95, 91), record(3, 95, 98), record(4, 94, 97)]
    assert replace(run(), curve=curve).selected("accuracy").epoch == 2


def test_the_shipped_experiments_are_part_of_the_package():
    """A wheel then has them, with or without a compiler."""
    assert Path(meprop.__file__).parent in experiments.FOLDER.parents
    assert len(experiments.built_in()) == len(list(experiments.FOLDER.iterdir())) > 20
