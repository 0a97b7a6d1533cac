"""`meprop report`: what the page says is what the results say, and nothing in a result can do harm."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("scipy")
pytest.importorskip("tyro")

from meprop import cli, rules
from meprop.cli.main import parse
from meprop.errors import DataError
from meprop.reporting import page
from meprop.reporting.page import write_report
from meprop.reporting.page.colors import NIGHT, WHITE, contrast, legible
from meprop.reporting.page.series import COLORS, OF_RULE, OWN_COLORS, judged, series_of
from meprop.reporting.page.sources import read, read_all
from meprop.tasks.mnist import MnistConfig
from meprop.training import tracking
from meprop.training.command import command_of
from meprop.training.config import OF_RULES, TrainingConfig
from meprop.training.verdict import judge_all
from reported import TRAINING, Page, config, runs, write

ROOT = Path(__file__).parents[2]


@pytest.fixture
def compared(tmp_path):
    return write(tmp_path / "compare", runs())


# ---------------------------------------------------------------- what it says


def test_the_verdict_is_that_of_compare_with_its_numbers(compared):
    (verdict,) = judge_all(runs(), "accuracy")
    found = Page(compared)
    assert found.texts["article"][0].split()[:2] == [verdict.word, "sampled"]
    assert found.has(verdict.why[1:])
    assert found.has(f"Time to {verdict.target:.2f} {verdict.to_target.value:.2f}x")
    assert found.has(f"{verdict.dev.value:+.2f} 95%: {verdict.dev.low:+.2f} to {verdict.dev.high:+.2f}")
    assert found.has(f"Speed of a step {verdict.step.value:.2f}x")


def test_each_rule_of_a_comparison_has_its_verdict_colour_and_name(tmp_path):
    found = Page(write(tmp_path / "a", runs(rules=("sampled:noise=0.5", "sampled:noise=1", "topk"))))
    heads = [text.split()[1] for text in found.texts["h3"][:3]]
    assert heads == ["sampled:noise=0.5", "sampled:noise=1", "topk"]
    colors = re.findall(r"--series-(\d): (#\w+);", found.html)[:4]
    assert [place for place, _ in colors] == ["0", "1", "2", "3"]
    assert len({color for _, color in colors}) == 4


def test_runs_of_equal_seconds_are_judged_by_that_budget(tmp_path):
    found = runs(spent=60.0, speed=1.5, epochs=6)
    verdicts = [asdict(each) for each in judge_all(found, "accuracy", budget="seconds")]
    said = Page(write(tmp_path / "a", found, verdicts=verdicts))
    assert said.texts["article"][0].split()[0] == verdicts[0]["word"]
    assert said.has(verdicts[0]["why"][1:])


def test_the_curves_have_all_epochs_of_all_seeds_and_their_mean(compared):
    rows = Page(compared).table("epoch")
    assert len(rows) == 2 * (3 + 1) * 6
    for rule in ("dense", "sampled"):
        for epoch in range(1, 7):
            ours = [run.curve[epoch - 1] for run in runs() if run.rule == rule]
            found = {row[1]: row for row in rows if row[0] == rule and row[2] == str(epoch)}
            assert float(found["2"][4]) == pytest.approx(ours[2]["dev"]["accuracy"], abs=6e-4)
            assert float(found["mean"][4]) == pytest.approx(sum(r["dev"]["accuracy"] for r in ours) / 3, abs=6e-4)
            assert float(found["mean"][3]) == pytest.approx(sum(r["seconds"] for r in ours) / 3, abs=6e-3)


def test_what_is_not_finished_is_shown_and_left_out_of_means_and_verdicts(tmp_path):
    found = runs()
    late = replace(found[-1], epochs=2, curve=found[-1].curve[:2])
    said = Page(write(tmp_path / "a", found[:-1], running=[late]))
    assert said.has("sampled, seed 2, after 2 of its evaluations.")
    (verdict,) = judge_all([run for run in found if run.seed < 2], "accuracy")
    assert said.has(verdict.why[1:])
    rows = [row for row in said.table("epoch") if row[0] == "sampled"]
    assert [row[1] for row in rows].count("2, not finished") == 2
    assert [row[1] for row in rows].count("mean") == 6
    begun = Page(write(tmp_path / "b", [], running=[replace(late, dev={}, test={}, curve=[])]))
    assert begun.has("sampled, seed 2, after 0 of its evaluations.")


def test_the_parts_of_a_step_are_those_of_an_epoch(compared):
    for label, *seconds in Page(compared).table("forward, s"):
        ours = [run for run in runs() if run.rule == label]
        means = [sum(run.seconds[each] / run.epochs for run in ours) / 3 for each in ours[0].seconds]
        assert [float(each) for each in seconds] == pytest.approx(means, abs=6e-4)


def test_layers_of_one_kind_are_a_line_with_rule_density_and_reason(compared):
    rows = Page(compared).table("reason")
    assert rows == [
        [
            "sampled",
            "layers.*.mlp.up",
            "3",
            "Linear",
            "512 → 512",
            "sparse",
            "3.0",
            "noise 0.25, scope global",
            "always",
        ],
        ["sampled", "head", "1", "Linear", "512 → 10", "dense", "100.0", "", "narrow: 10 output features"],
    ]


def test_a_density_that_does_not_change_is_a_sentence_and_another_is_a_chart(tmp_path):
    fixed = [replace(run, density=0.04, curve=replace(run).curve) for run in runs(rules=("topk",))]
    for run in fixed:
        for record in run.curve:
            record.pop("density", None)
    said = Page(write(tmp_path / "a", fixed))
    assert said.has("topk keeps 4.0% in all epochs.")
    assert 'data-chart="density"' not in said.html
    assert 'data-chart="density"' in Page(write(tmp_path / "b", runs())).html


def test_widths_of_simplified_runs_are_where_they_change(tmp_path):
    steps = [(100, False, 64), (200, False, 64), (300, False, 64), (400, True, 40), (500, True, 40), (600, False, 40)]
    checks = [{"step": step, "prunes": prunes, "widths": {"0": width}} for step, prunes, width in steps]
    model = {"rule": "simplified", "seed": 0, "width": 40.0, "parameters": 81234, "first_step": 2e-3}
    model |= {"last_step": 1e-3, "inference": {"p20": 4e-4, "p50": 5e-4}}
    found = [replace(run, checks=checks if run.rule == "simplified" else []) for run in runs(1, ("simplified",))]
    said = Page(write(tmp_path / "a", found, settings=config(simplify={}), models=[model]))
    assert [row[2:] for row in said.table("removes units")] == [
        ["100", "64", "no"],
        ["300", "64", "no"],
        ["400", "40", "yes"],
        ["500", "40", "yes"],
        ["600", "40", "no"],
    ]
    assert said.table("inference, ms") == [["simplified", "0", "40.0", "81.2", "2.00", "1.00", "0.400"]]


def test_the_activity_is_that_of_the_units_that_are_left(tmp_path):
    checks = [{"step": 100, "prunes": True, "widths": {"0": 3, "1": 1}}]
    own = {"checks": checks, "activity": {"0": [0.5, None, 0.25, 1.0], "1": [None, 0.125]}}
    found = [replace(run, **own) if run.rule == "simplified" else run for run in runs(1, ("simplified",))]
    rows = Page(write(tmp_path / "a", found, settings=config(simplify={}))).table("units before it, %")
    of_first, of_second = ([row[1:] for row in rows if row[0] == f"layer {name}"] for name in "01")
    assert [row[1] for row in of_first] == [f"{5.0 * step}" for step in range(21)]
    assert [of_first[at][2] for at in (0, 10, 20)] == ["100.00", "50.00", "25.00"]
    assert {row[2] for row in of_second} == {"12.50"}
    earlier = [replace(run, activity={}) for run in found]
    assert 'data-chart="activity"' not in Page(write(tmp_path / "b", earlier, settings=config(simplify={}))).html


def test_what_else_the_machine_did_is_shown_for_each_rule(tmp_path):
    shares = {"dense": [(0.01, 0.1), (0.0, 0.0), (0.0, 0.254)], "sampled": [(0.0, 0.03)] * 3}
    found = [
        replace(run, disturbance=dict(zip(("stolen", "others"), shares[run.rule][run.seed], strict=True)))
        for run in runs()
    ]
    head = "taken by other processes, %"
    rows = [["dense", "0 to 1", "0 to 25"], ["sampled", "0", "3"]]
    assert Page(write(tmp_path / "a", found)).table(head) == rows
    of_earlier = [run if run.rule == "dense" else replace(run, disturbance=None) for run in found]
    assert Page(write(tmp_path / "b", of_earlier)).table(head) == rows[:1]
    assert not Page(write(tmp_path / "c", runs())).has(head)


def test_single_runs_of_the_same_settings_are_compared_and_others_are_not(tmp_path):
    settings = {"rule": "topk", "k": 20, "epochs": 6, "data": "1a2b3c"}
    paths = []
    for run in runs(2, ("topk",)):
        own = {**settings, **({"rule": "dense"} if run.rule == "dense" else {})}
        record = {"settings": own, "metric": "accuracy", "beside": []}
        paths.append(write(tmp_path / "figure-4", [run], f"{run.rule}-20-seed{run.seed}.json", settings=record))
    said = Page(*paths)
    assert said.has(judge_all(runs(2, ("topk",)), "accuracy")[0].why[1:])
    assert said.has("meprop reproduce figure-4")
    other = {"settings": {**settings, "epochs": 7}, "metric": "accuracy", "beside": []}
    said = Page(*paths[:2], write(tmp_path / "figure-4", runs(1, ("topk",))[1:], "x-seed0.json", settings=other))
    assert said.has("There are no dense runs of the same settings and seeds")


# ---------------------------------------------------------------- results side by side


def test_results_that_differ_only_in_their_rules_have_no_banner(tmp_path):
    other = config(training=TrainingConfig(epochs=6, k=40), rule="topk")
    paths = [write(tmp_path / "a", runs()), write(tmp_path / "b", runs(rules=("topk",)), settings=other)]
    assert "banner" not in {attributes.get("class") for _, attributes in Page(*paths).attributes}


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"settings": config(data="ffffff")}, "digest of the data: 1a2b3c in {0}/a; ffffff in {0}/b"),
        ({"settings": config(training=TrainingConfig(epochs=6, lr=0.01))}, "lr: 0.001 in {0}/a; 0.01 in {0}/b"),
        ({"settings": config(MnistConfig(hidden=(64,)))}, "hidden: [500, 500] in {0}/a; [64] in {0}/b"),
        ({"settings": config(seconds=60.0)}, None),
        ({"machine": {"cpu": "another", "threads": 1}}, "cpu: AMD EPYC in {0}/a; another in {0}/b"),
        ({"task": "tagging"}, "task: mnist in {0}/a; tagging in {0}/b"),
    ],
)
def test_a_banner_names_what_differs(tmp_path, others, said):
    found = Page(write(tmp_path / "a", runs()), write(tmp_path / "b", runs(), **others))
    if said is None:  # an option that the other result does not have
        assert not found.has("These results differ")
    else:
        assert found.has("These results differ in more than their rules")
        assert found.has(said.format(tmp_path.name))


def test_results_with_the_same_names_stay_apart(tmp_path):
    paths = [write(tmp_path / each / "compare", runs()) for each in ("first", "second", "third/second")]
    labels = [row[0] for row in Page(*paths).table("seeds")]
    assert len(set(labels)) == 6
    assert labels[1] == "dense, compare, second"


def test_an_option_that_was_none_yet_has_its_default(tmp_path):
    """Runs from before an option are the same series as those that have its default, and not as others."""
    before, default, other = config(), config(), config(training=replace(TRAINING, optimizer="sgd"))
    del before["training"]["optimizer"]
    dense, *_, sparse = runs(2)
    paths = [
        write(tmp_path / "a", [run], f"{at}.json", settings=settings)
        for at, (run, settings) in enumerate([(dense, before), (replace(sparse, seed=0), default), (sparse, other)])
    ]
    assert len(judged(series_of(read_all(paths[:2])))) == 1
    assert not judged(series_of(read_all(paths[::2])))
    assert Page(*paths).has("optimizer: adam in")


# ---------------------------------------------------------------- names are untrusted, and the page needs nothing

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\ud800{{ 7 * 7 }}"


def test_names_in_a_result_are_text(tmp_path):
    layers = [{**runs()[-1].layers[0], "name": EVIL, "reason": EVIL}]
    found = [replace(run, rule=EVIL, layers=layers) if run.rule != "dense" else run for run in runs()]
    usual = Page(write(tmp_path / "a", runs()))
    settings = config(out=EVIL, **{EVIL: EVIL})
    said = Page(write(tmp_path / "b", found, task=EVIL, settings=settings, machine={"cpu": EVIL, EVIL: EVIL}))
    assert said.elements["script"] == usual.elements["script"]
    assert said.elements["img"] == 0
    assert not any(name.startswith("on") for _, attributes in said.attributes for name in attributes)
    assert EVIL.replace("\ud800", "?") in said.texts["h1"][0]


def test_the_page_asks_for_nothing_and_allows_only_its_own_scripts(compared):
    found = Page(compared)
    assert not {"link", "img", "iframe", "object"} & found.elements.keys()
    assert not any({"src", "href"} & attributes.keys() for _, attributes in found.attributes)
    (policy,) = (a["content"] for tag, a in found.attributes if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert len(re.findall(r"'sha256-[^']+'", policy)) == 3
    assert len(found.html) < 700_000


def test_the_result_can_be_taken_out_of_the_page(compared, tmp_path):
    found = Page(compared)
    (text,) = (text for text in found.texts["script"] if text.startswith("{"))
    (tmp_path / "again.json").write_text(text)
    assert tracking.read_content(tmp_path / "again.json") == tracking.read_content(compared)  # its digest is right


def test_rules_have_the_colours_of_figures():
    of_rules = {name: rule.color for name, rule in rules.named().items() if rule.color}
    assert {name: color for name, color in OWN_COLORS.items() if name in of_rules} == of_rules
    assert len(set(OWN_COLORS.values())) == len(OWN_COLORS)


@pytest.mark.parametrize("background", [WHITE, NIGHT])
@pytest.mark.parametrize("color", [*COLORS, "#000000", "#FFFFFF", "#808080"])
def test_colours_can_be_told_from_the_ground(color, background):
    of = [[int(each[at : at + 2], 16) for at in (1, 3, 5)] for each in (legible(color, background), background)]
    assert contrast(*of) >= 3


def test_the_grounds_are_those_of_the_style():
    style = (Path(page.__file__).parent / "page.css").read_text()
    assert re.findall(r"--surface: (#\w+);", style) == [WHITE, NIGHT, NIGHT]


def test_vendored_scripts_have_their_licences():
    folder = Path(page.__file__).parent / "vendor"
    licences = (folder / "LICENSES.txt").read_text()
    for script in folder.glob("*.js"):
        version = re.search(r"v([\d.]+) Copyright", script.read_text()[:200])[1]
        assert re.search(rf"{version} .*{re.escape(script.name)}", licences), script


# ---------------------------------------------------------------- the command that repeats it


@pytest.mark.parametrize(
    "arguments",
    [
        "compare mnist",
        "compare mnist --rule sampled --noise 0.25 --hidden 64 64 --seeds 0 1 2 --margin 0.5 --exact-sum False",
        "compare mnist --k 0.05 --scope batch --sparse-rows exact --data-dir 'my data' --fuse --tensorboard",
        "train parsing --rule dense --epochs 2 --checkpoint-every 100",
        "simplify tagging --threshold 0.1 --seconds 1",
        "simplify mnist --k 20 --channels 8 16",
        "compare train.py:make --epochs 3 --noise None --rule topk",
    ],
)
def test_the_command_asks_for_the_same(tmp_path, arguments):
    asked = parse(shlex.split(arguments))
    settings = {**tracking.plain(asked), "data": "1a2b3c"}
    task = "train" if "train.py" in arguments else arguments.split()[1]
    found = tracking.describe(task, settings, runs())
    name, *options = shlex.split(found.command)
    assert name == "meprop"
    assert parse(options) == asked
    said = Page(write(tmp_path / "a", runs(), task=task, settings=settings, command=found.command))
    assert said.has(found.command)


def test_a_run_of_an_experiment_has_the_command_of_the_experiment(tmp_path):
    settings = {"settings": {"rule": "dense"}}
    assert command_of("mnist", settings) is None
    for folder in ("ours-variants", "mine"):
        record = write(tmp_path / folder, runs(1)[:1], "dense-seed0.json", settings=settings)
        assert Page(record).has("meprop reproduce ours-variants") == (folder == "ours-variants")


# ---------------------------------------------------------------- files


def test_the_page_lies_beside_the_first_result_and_is_replaced(compared, capsys):
    for _ in range(2):
        assert cli.main(["report", str(compared.parent)]) == 0
        assert capsys.readouterr().out == f"written: {compared.parent / 'report.html'}\n"
    assert sorted(path.name for path in compared.parent.iterdir()) == ["report.html", "result.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the folder of a result"),
        (["empty"], "empty holds no result.json; give a folder that"),
        (["nowhere"], "nowhere does not exist; give a folder that"),
        (["compare", "-o", "empty"], "--out empty is a folder; give a file, such as empty/report.html"),
        (["compare", "-o", "notes.html"], "notes.html is no page of meprop report; give another --out, or --overwrite"),
        (["compare", "-o", "nowhere/a.html"], "--out nowhere/a.html: there is no folder nowhere"),
    ],
)
def test_wrong_requests_are_refused_and_nothing_is_touched(compared, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.html").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "notes.html").read_text() == "mine"
    assert cli.main(["report", "compare", "-o", "notes.html", "--overwrite"]) == 0


def changed(content, keys, value):
    """The content with another value at a place; `...` for none."""
    found = copy.deepcopy(content)
    *path, last = keys
    of = found
    for key in path:
        of = of[key]
    if value is ...:
        del of[last]
    else:
        of[last] = value
    return found


def places(content, at=()):
    """The places in nested data, of lists the first."""
    inner = (
        content.items() if isinstance(content, dict) else enumerate(content[:1]) if isinstance(content, list) else ()
    )
    for key, value in inner:
        yield (*at, key)
        yield from places(value, (*at, key))


def test_a_damaged_result_is_named_and_never_a_fault(tmp_path):
    checks = [{"step": 1, "prunes": True, "widths": {"0": 4}}, {"step": 2, "prunes": True, "widths": {"0": 3}}]
    model = {"rule": "topk", "seed": 0, "width": 1.0, "parameters": 1, "first_step": 1.0, "last_step": 1.0}
    own = {"checks": checks, "activity": {"0": [None, 0.5, 1.0]}, "disturbance": {"stolen": 0.0, "others": 0.1}}
    found = [replace(run, **own) for run in runs(1, epochs=1)]
    verdicts = [asdict(each) for each in judge_all(found, "accuracy")]
    models = [{**model, "inference": {"p20": 1.0}}]
    path = write(tmp_path, found, verdicts=verdicts, models=models, settings=config(simplify={"threshold": 0.1}))
    content = tracking.read_content(path)
    said: list[str] = []
    for keys in places(content):
        for value in (..., None, "text", -1):
            path.write_text(json.dumps(changed(content, keys, value)))
            try:
                page.rendered([read(path)])
            except DataError as error:
                said.append(str(error))
    assert len(said) > 100
    assert all(each.startswith(f"{path} is damaged or not a result of") for each in said)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"runs": []}', "\x80", '{"sha256": "0"}'])
def test_what_is_no_result_is_named(tmp_path, text):
    (tmp_path / "result.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"result\.json is damaged or not a result of meprop train, compare"):
        write_report([tmp_path])


def test_fifty_runs_are_a_page_in_three_seconds(tmp_path):
    paths = [
        write(tmp_path / "many", [run], f"{run.rule}-seed{run.seed}.json", settings=config())
        for run in runs(25, epochs=20)
    ]
    start = time.process_time()
    write_report(paths)
    assert time.process_time() - start < 3


def test_the_command_draws_without_torch(tmp_path, monkeypatch):
    """The import of torch takes more time than the page of fifty runs."""
    paths = [write(tmp_path / run.rule, [run]) for run in runs(1)]
    before = config()
    del before["training"]["optimizer"]  # to know what it was takes the options, and they need torch
    old = write(tmp_path / "old", runs(1), settings=before)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "torch.py").write_text("raise ImportError('torch is imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    done = _of_command("report", *map(str, paths))
    assert (done.returncode, done.stdout) == (0, f"written: {paths[0].with_name('report.html')}\n"), done.stderr
    assert "torch is imported" in _of_command("report", str(paths[0]), str(old)).stderr
    monkeypatch.delenv("PYTHONPATH")
    assert _of_command("report", str(paths[0]), str(old)).returncode == 0


def _of_command(*arguments):
    return subprocess.run([sys.executable, "-m", "meprop", *arguments], capture_output=True, text=True, check=False)


def test_committed_results_of_experiments_can_be_shown(tmp_path):
    paths = sorted((ROOT / "benchmarks" / "results" / "simplify-mnist").glob("*.json"))
    assert paths
    assert write_report(paths, tmp_path / "page.html").stat().st_size > 500_000


def test_settings_that_dense_runs_refuse_do_not_keep_sparse_runs_from_their_dense_ones():
    assert set(OF_RULES) - OF_RULE == {"compute_dtype"}  # which makes it another comparison
