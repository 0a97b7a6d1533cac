"""A long sentence costs what it has words, whatever lies beside it, and ordinary data are read as they always were."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("lightning_fabric")

import meprop
from meprop.tasks import parsing, tagging
from meprop.tasks.treebank import grouped

LENGTHS = [[1], [5], [1, 1, 1], [3, 1, 2], [1, 9, 1, 1], [4, 4, 4, 4], [10, 1, 10, 2, 3], [2] * 50 + [100]]


@pytest.mark.parametrize("budget", [1, 2, 5, 12, 1000])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_groups_hold_each_sentence_once_within_the_budget(lengths, budget):
    groups = grouped(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget
    if len(lengths) * max(lengths) <= budget:
        assert groups == [list(range(len(lengths)))]


def write(folder, *, long, ordinary=60):
    """A treebank of short sentences, and one of so many words in each file."""
    for split in ("train", "dev", "test"):
        blocks = []
        for length in (*(1 + i % 7 for i in range(ordinary)), *((long,) if long else ())):
            words = [f"w{(i * i + length) % 11}\t_\tT{(i + length) % 3}\tX{(i + length) % 4}" for i in range(length)]
            heads = ["0" if i == 0 else str(i) for i in range(length)]
            lines = zip(words, heads, strict=True)
            blocks.append("".join(f"{i}\t{word}\t_\t{head}\tdep\t_\t_\n" for i, (word, head) in enumerate(lines, 1)))
        (folder / f"{split}.conllu").write_text("\n".join(blocks))
    return folder


TASKS = {
    "tagging": (tagging, lambda folder: tagging.TaggingTask(tagging.TaggingConfig(folder, hidden=24, batch_size=16))),
    "parsing": (parsing, lambda folder: parsing.ParsingTask(parsing.ParsingConfig(folder, hidden=(16,)))),
}


@pytest.mark.parametrize("name", TASKS)
def test_the_scores_do_not_depend_on_the_budget(tmp_path, monkeypatch, name):
    module, make = TASKS[name]
    folder = write(tmp_path, long=40)
    task = make(folder)
    model = task.build_model().double()
    whole = task.evaluate(model, "dev")
    for budget in (1, 50, 200):
        monkeypatch.setattr(module, "BUDGET", budget)
        assert make(folder).evaluate(model, "dev") == pytest.approx(whole, rel=1e-6)  # sums in float32


def test_the_transitions_do_not_depend_on_the_budget(tmp_path, monkeypatch):
    _, make = TASKS["parsing"]
    folder = write(tmp_path, long=40)

    def examples():
        data = make(folder).data
        return sorted(torch.cat([data.features, data.targets[:, None]], dim=1).tolist())

    whole = examples()
    monkeypatch.setattr(parsing, "BUDGET", 50)
    assert examples() == whole


@pytest.mark.parametrize("rule", [None, meprop.TopK(3)])
@pytest.mark.parametrize("budget", [1, 50, 200])
def test_a_step_in_parts_has_the_gradient_of_the_whole_batch(tmp_path, monkeypatch, budget, rule):
    task = TASKS["tagging"][1](write(tmp_path, long=40))
    model = task.build_model().double()
    for layer in (model.dropout, model.input_dropout):
        layer.p = 0.0
    if rule is not None:
        meprop.convert(model, rule, when="always", min_features=1)

    def gradients(batch):
        model.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    for batch in list(task.train_batches(torch.Generator().manual_seed(0))):
        whole = gradients(batch)
        with monkeypatch.context() as patch:
            patch.setattr(tagging, "BUDGET", budget)
            torch.testing.assert_close(gradients(batch), whole, rtol=1e-9, atol=1e-12)


def test_dropout_of_a_step_in_parts_is_the_same_when_it_is_computed_again(tmp_path, monkeypatch):
    task = TASKS["tagging"][1](write(tmp_path, long=40))
    monkeypatch.setattr(tagging, "BUDGET", 50)
    model = task.build_model()
    (batch, *_) = [each for each in task.train_batches(torch.Generator().manual_seed(0)) if each[1].numel() > 50]

    def gradient(checkpointed):
        if not checkpointed:
            monkeypatch.setattr(tagging, "checkpoint", lambda function, *inputs, use_reentrant: function(*inputs))
        model.zero_grad()
        torch.manual_seed(3)
        task.loss(model, batch).backward()
        return model.output.weight.grad.clone()

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.slow  # the sentence is read word by word
@pytest.mark.parametrize("name", TASKS)
def test_a_sentence_of_5000_words_fits_in_one_gigabyte(tmp_path, name):
    folder = write(tmp_path, long=5_000, ordinary=3_000)
    command = [
        "train",
        name,
        "--data-dir",
        str(folder),
        "--epochs",
        "1",
        "--hidden",
        "500",
        "--out",
        str(tmp_path / "o"),
    ]
    code = (
        "import resource, sys; from meprop.cli import main; code = main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 2**20
