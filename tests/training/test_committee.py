"""A committee answers by the mean of its members' probabilities, and each member reads the data in its own way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("pooch")

from interrupted import Stop, write_mnist
from meprop import cli
from meprop.errors import DataError
from meprop.training import tracking
from meprop.training.committee import Member, errors, errors_of, read_member

RUNS = {
    "narrow": ("digits", "--rule", "dense", "--digit-width", "2", "--hidden", "20"),
    "deep": ("digits", "--hidden", "130", "140", "--seeds", "3", "--dev-size", "0"),
    "plain": ("mnist", "--hidden", "150", "--rule", "topk", "--precision", "bf16-mixed"),
}
TRAIN = ("--dev-size", "10", "--epochs", "1", "--batch-size", "20", "--accelerator", "cpu")


# ---------------------------------------------------------------- errors


def test_errors_are_those_of_a_loop_over_images():
    generator = torch.Generator().manual_seed(0)
    members = torch.rand(4, 57, 5, generator=generator, dtype=torch.float64).softmax(2)
    labels = torch.randint(5, (57,), generator=generator)

    def wrong(answers):
        return 100 * sum(answer != label for answer, label in zip(answers, labels.tolist(), strict=True)) / 57

    alone = [wrong([max(range(5), key=lambda c, row=row: row[c]) for row in each.tolist()]) for each in members]
    means = [[sum(float(each[n, c]) for each in members) / 4 for c in range(5)] for n in range(57)]
    together = wrong([max(range(5), key=lambda c, row=row: row[c]) for row in means])
    found = errors(members, labels)
    assert found.members == pytest.approx(alone)
    assert found.mean == pytest.approx(sum(alone) / 4)
    assert found.committee == pytest.approx(together)
    assert found.ratio == pytest.approx(together / found.mean)


def test_members_that_err_on_other_images_do_not_err_together():
    right, wrong = [0.9, 0.1], [0.4, 0.6]
    members = torch.tensor([[right, wrong, right], [wrong, right, right]])
    found = errors(members, torch.zeros(3, dtype=torch.long))
    assert found.members == pytest.approx([100 / 3, 100 / 3])
    assert (found.committee, found.ratio) == (0, 0)


def test_there_is_no_ratio_where_no_member_errs():
    found = errors(torch.tensor([[[0.9, 0.1]], [[0.8, 0.2]]]), torch.tensor([0]))
    assert (found.mean, found.committee, found.ratio) == (0, 0, None)


def test_a_committee_has_two_members_on_the_same_images():
    member = Member(Path("one"), {}, torch.rand(4, 3), torch.tensor([0, 1, 2, 0]), "a")
    others = (torch.rand(4, 3), "b"), (torch.rand(4, 5), "a")
    with pytest.raises(ValueError, match="two members or more, got 1"):
        errors_of([member])
    for probabilities, data in others:
        with pytest.raises(ValueError, match="two is a run on other data than one"):
            errors_of([member, Member(Path("two"), {}, probabilities, member.labels, data)])


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("data"), 53, packed=False)


def train(folder, data, *options):
    # The options of a run come last: they hold where both are given.
    return cli.main(["train", options[0], "--data-dir", str(data), *TRAIN, *options[1:], "--out", str(folder)])


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name, options in RUNS.items():
        assert train(folder / name, data, *options) == 0
    return {name: folder / name for name in RUNS}


def recorded_error(folder):
    (run,) = json.loads((folder / "result.json").read_text())["runs"]
    return 100 - run["test"]["accuracy"]


@pytest.mark.parametrize("name", RUNS)
def test_a_member_errs_as_its_run_did(runs, name):
    member = read_member(runs[name])
    assert member.probabilities.shape == (30, 3)
    assert member.probabilities.dtype == torch.float64
    torch.testing.assert_close(member.probabilities.sum(1), torch.ones(30, dtype=torch.float64))
    found = errors(member.probabilities[None], member.labels)
    assert found.members == pytest.approx([recorded_error(runs[name])])


def test_the_command_shows_and_writes_the_errors(runs, tmp_path, capsys):
    folders, out = [*map(str, runs.values())], tmp_path / "new" / "committee.json"
    assert cli.main(["committee", *folders, "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    expected = errors_of([read_member(folder) for folder in runs.values()])
    assert [line.split()[0] for line in said[1:6]] == [*folders, "mean", "committee"]
    assert said[5].split() == ["committee", f"{expected.committee:.2f}"]
    record = tracking.read_content(out)  # which compares the digest
    assert record["test"]["members"] == pytest.approx([recorded_error(folder) for folder in runs.values()])
    assert record["test"]["committee"] == expected.committee
    assert [member["seed"] for member in record["members"]] == [0, 3, 0]
    assert record["members"][0]["digit_width"] == 2
    assert {"machine", "versions", "commit"} <= record.keys()

    before = out.read_bytes()
    assert cli.main(["committee", *folders[:2], "--out", str(out)]) == 2
    assert "exists; give another --out, or --overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert cli.main(["committee", *folders[:2], "--out", str(out), "--overwrite"]) == 0
    assert len(tracking.read_content(out)["members"]) == 2


def test_the_command_refuses_what_is_no_committee(runs, tmp_path, capsys):
    first = str(runs["deep"])
    for folders, message in (
        ([first], "two members or more, got 1"),
        ([first, first], "a run is given twice"),
        ([first, str(tmp_path)], "has no checkpoint.pt: give folders of meprop train"),
    ):
        assert cli.main(["committee", *folders]) == 2
        assert message in capsys.readouterr().err


def test_members_on_other_images_with_the_same_labels_are_refused(runs, data, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(data, other)
    images = bytearray((other / "t10k-images-idx3-ubyte").read_bytes())
    images[-1] ^= 1
    (other / "t10k-images-idx3-ubyte").write_bytes(images)
    assert train(tmp_path / "run", other, *RUNS["narrow"]) == 0
    members = [read_member(runs["plain"]), read_member(tmp_path / "run")]
    with pytest.raises(ValueError, match="is a run on other data than"):
        errors_of(members)
    shutil.rmtree(other)
    with pytest.raises(
        DataError, match=r"the data of .*run: .* is not a folder.* Or give their folder with --data-dir"
    ):
        read_member(tmp_path / "run")


def test_files_of_the_runs_and_folders_are_not_replaced(runs, tmp_path, capsys):
    folders = [str(runs["plain"]), str(runs["deep"])]
    for out, message in (
        (runs["plain"] / "result.json", "is of a run; give another file"),
        (runs["deep"] / ".." / "deep" / "checkpoint.pt", "is of a run; give another file"),
        (tmp_path, "is a folder; give another file"),
    ):
        assert cli.main(["committee", *folders, "--out", str(out), "--overwrite"]) == 2
        assert message in capsys.readouterr().err
    assert recorded_error(runs["plain"]) >= 0


def test_other_data_are_refused(runs, data, tmp_path):
    other = write_mnist(tmp_path, 50, packed=False)
    with pytest.raises(ValueError, match="a run on other data than those that are read now: give theirs with --data"):
        read_member(runs["deep"], other)
    assert read_member(runs["deep"], data).labels.shape == (30,)


def test_a_run_that_is_not_finished_is_refused(data, tmp_path, monkeypatch):
    for saves, message in (1, "has no result.json"), (2, "is not finished: go on with it by meprop train --resume"):
        folder = tmp_path / str(saves)
        with monkeypatch.context() as patch:
            Stop(patch, saves)
            assert train(folder, data, "digits", "--epochs", "3", "--hidden", "150") == 130
        with pytest.raises(ValueError, match=message):
            read_member(folder)


def test_a_run_of_another_task_is_refused(runs, tmp_path):
    result = tracking.read_content(runs["plain"] / "result.json")
    tracking.write_result(tmp_path / "result.json", tracking.Result.of({**result, "task": "tagging"}))
    (tmp_path / "checkpoint.pt").write_bytes((runs["plain"] / "checkpoint.pt").read_bytes())
    with pytest.raises(ValueError, match="is a run of the task tagging: a committee has runs of mnist and digits"):
        read_member(tmp_path)


def test_a_damaged_run_is_refused_and_left_alone(runs, tmp_path):
    for name in ("result.json", "checkpoint.pt"):
        (tmp_path / name).write_bytes((runs["plain"] / name).read_bytes())
    damaged = bytearray((tmp_path / "checkpoint.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(damaged)
    with pytest.raises(DataError, match="is damaged or not a checkpoint"):
        read_member(tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == damaged
