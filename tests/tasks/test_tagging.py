"""Words become the numbers that they should, batches hold each of them once, and padding counts nowhere."""

import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("lightning_fabric")

from meprop import TopK
from meprop.errors import DataError
from meprop.tasks import tagging
from meprop.tasks.tagging import PADDING, TaggingConfig, TaggingTask, describe
from meprop.training.config import TrainingConfig
from meprop.training.loop import Trainer, fit

WORDS = {"the": "DT", "a": "DT", "dog": "NN", "cat": "NN", "barks": "VBZ", "sleeps": "VBZ", "Rex": "NNP", "42": "CD"}


def write(path: Path, sentences: list[list[tuple[str, str]]]) -> None:
    """Write words with their XPOS tags; the universal tag is the first letter, each head the word before."""
    blocks = (
        "".join(f"{i + 1}\t{form}\t_\t{tag[0]}\t{tag}\t_\t{i}\tdep\t_\t_\n" for i, (form, tag) in enumerate(sentence))
        for sentence in sentences
    )
    path.write_text("\n".join(blocks), encoding="utf-8")


def sentences(count: int, seed: int) -> list[list[tuple[str, str]]]:
    draw = random.Random(seed)
    return [draw.choices(list(WORDS.items()), k=draw.randint(1, 9)) for _ in range(count)]


@pytest.fixture
def folder(tmp_path):
    """A treebank of 61 training sentences, of which the first has words that occur once, and one that occurs twice."""
    first = [("Once", "RB"), ("upon", "IN"), ("time", "NN"), ("twice", "RB"), ("twice", "RB")]
    write(tmp_path / "train.conllu", [first, *sentences(60, 0)])
    write(tmp_path / "dev.conllu", [[("the", "DT"), ("Xyzzy-9", "NNP")], *sentences(10, 1)])
    write(tmp_path / "test.conllu", [[("wow", "UH")], *sentences(13, 2)])
    return tmp_path


def make(folder: Path, **changes: object) -> TaggingTask:
    small = {"data_dir": folder, "hidden": 24, "batch_size": 8, "dropout": 0.0, "input_dropout": 0.0}
    return TaggingTask(TaggingConfig(**(small | changes)))


def epoch(task: TaggingTask, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(task.train_batches(torch.Generator().manual_seed(seed)))


def taken_apart(batches) -> Counter:
    """The sentences of batches, each a tuple of its words' indices and tags, with how often it occurs."""
    found = Counter()
    for inputs, tags in batches:
        for i, length in enumerate((tags != PADDING).sum(0).tolist()):
            assert (tags[length:, i] == PADDING).all()
            words = torch.cat([inputs[:length, i], tags[:length, i, None]], dim=1)
            found[tuple(map(tuple, words.tolist()))] += 1
    return found


def expected(task: TaggingTask) -> Counter:
    """The same of the training sentences, one by one."""

    def word(form: str, i: int, tag: str) -> tuple[int, ...]:
        values = zip(task.vocabulary, describe(form, i == 0), strict=True)
        return (*(index[value] for index, value in values), task.tags.index(tag))

    return Counter(tuple(map(word, s.forms, range(len(s.forms)), s.xpos)) for s in task.data.train)


def words_of(sentences: Counter) -> list[tuple[int, ...]]:
    return [word for sentence in sentences.elements() for word in sentence]


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("form", "first", "description"),
    [
        ("running", False, ("running", "run", "ng", "ing", "ning", "none", "none", "x")),
        ("Running", True, ("running", "run", "ng", "ing", "ning", "initial, first word", "none", "Xx")),
        ("Running", False, ("running", "run", "ng", "ing", "ning", "initial", "none", "Xx")),
        ("I", False, ("i", "i", "i", "i", "i", "initial", "none", "X")),
        ("U.S.", False, ("u.s.", "u.s", "s.", ".s.", "u.s.", "all", "none", "X.X.")),
        ("McDonald's", False, ("mcdonald's", "mcd", "'s", "d's", "ld's", "some", "none", "XxXx'x")),
        ("eBay", True, ("ebay", "eba", "ay", "bay", "ebay", "some", "none", "xXx")),
        ("1999", False, ("0000", "000", "00", "000", "0000", "none", "all", "d")),
        ("3,500.75", False, ("0,000.00", "0,0", "00", ".00", "0.00", "none", "with signs", "d,d.d")),
        ("B2B", False, ("b0b", "b0b", "0b", "b0b", "b0b", "all", "with letters", "XdX")),
        ("...", True, ("...", "...", "..", "...", "...", "none", "none", ".")),
        ("été", False, ("été", "été", "té", "été", "été", "none", "none", "x")),
        ("東京", False, ("東京", "東京", "東京", "東京", "東京", "none", "none", "x")),
    ],
)
def test_describe(form, first, description):
    assert describe(form, first) == description


class Constant(nn.Module):
    """Gives every word the same tag, and keeps what it was asked."""

    def __init__(self, tag: int, num_tags: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(F.one_hot(torch.tensor(tag), num_tags).float())
        self.asked: list[torch.Tensor] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.asked.append(inputs)
        return self.bias.expand(*inputs.shape[:2], -1)


def test_a_word_that_training_lacks_is_unknown_and_its_known_features_are_not(folder):
    write(folder / "dev.conllu", [[("the", "DT"), ("Catbarks", "NN")]])
    task = make(folder)
    model = Constant(0, len(task.tags))
    task.evaluate(model, "dev")
    (the, unknown) = model.asked[0][:, 0].tolist()
    assert tagging.UNKNOWN not in the
    values = ("catbarks", "cat", "ks", "rks", "arks", "initial", "none", "Xx")
    indices = [index.get(value, tagging.UNKNOWN) for index, value in zip(task.vocabulary, values, strict=True)]
    assert unknown == indices
    assert [index == tagging.UNKNOWN for index in unknown] == [True, *[False] * 7]


def test_each_value_has_an_index_of_its_own(folder):
    task = make(folder)
    for column, index in enumerate(task.vocabulary):
        values = {describe(w, i == 0)[column] for s in task.data.train for i, w in enumerate(s.forms)}
        assert index.keys() == values
        assert sorted(index.values()) == list(range(1, len(values) + 1))  # 0 is the unknown's


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("batch_size", [1, 8, 61, 1000])
def test_an_epoch_shows_each_sentence_once_and_as_it_is(folder, batch_size):
    task = make(folder, unknown=0.0, batch_size=batch_size)
    batches = epoch(task)
    assert len(batches) == task.steps_per_epoch == -(-61 // batch_size)
    assert sorted(tags.shape[1] for _, tags in batches)[1:] == [batch_size] * (len(batches) - 1)  # one is smaller
    assert taken_apart(batches) == expected(task)


def test_a_batch_has_sentences_of_about_the_same_length_and_the_next_has_any(folder):
    batches = epoch(make(folder))
    lengths = sorted(len(sentence.forms) for sentence in make(folder).data.train)
    longest = [max(lengths[i : i + 8]) for i in range(0, 61, 8)]
    shown = [len(tags) for _, tags in batches]
    assert sorted(shown) == longest
    assert shown != longest


def test_sentences_of_one_length_meet_others_in_each_epoch(folder):
    task = make(folder, unknown=0.0)
    first, second = ({frozenset(taken_apart([batch])) for batch in epoch(task, seed)} for seed in (0, 1))
    assert first != second


def test_batches_depend_on_the_generator_alone(folder):
    task = make(folder)
    torch.manual_seed(1)
    first = epoch(task)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, other = epoch(task), epoch(task, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))
    assert [tags.shape for _, tags in first] != [tags.shape for _, tags in other]


def test_only_what_occurs_once_is_shown_as_unknown(folder):
    task = make(folder, unknown=1.0)
    counts = [Counter(column) for column in zip(*words_of(expected(task)), strict=True)]
    hidden = Counter()
    for sentence, times in expected(task).items():
        seen = ([tagging.UNKNOWN if counts[c][i] == 1 else i for c, i in enumerate(word[:8])] for word in sentence)
        hidden[tuple((*word, tag) for word, (*_, tag) in zip(seen, sentence, strict=True))] += times
    assert hidden != expected(task)
    assert taken_apart(epoch(task)) == hidden


def test_what_occurs_once_is_shown_as_unknown_as_often_as_configured(folder):
    task = make(folder, unknown=0.25)
    once = task.vocabulary[0]["once"]
    shown = sum(any((inputs[..., 0] == once).any() for inputs, _ in epoch(task, seed)) for seed in range(200))
    assert 0.65 < shown / 200 < 0.85


# ---------------------------------------------------------------- model


def test_the_default_network_is_the_papers(folder):
    model = TaggingTask(TaggingConfig(data_dir=folder)).build_model()
    assert (model.words.embedding_dim, model.features.embedding_dim) == (50, 20)
    assert type(model.lstm) is nn.LSTM
    assert (model.lstm.input_size, model.lstm.hidden_size, model.lstm.num_layers) == (190, 500, 1)
    assert type(model.output) is nn.Linear
    assert model.output.in_features == 500


def test_each_value_of_each_feature_has_an_embedding_of_its_own(folder):
    task = make(folder)
    model = task.build_model()
    sizes = [1 + len(index) for index in task.vocabulary]
    assert model.words.num_embeddings == sizes[0]
    looked_up = set()
    model.features.register_forward_pre_hook(lambda _, args: looked_up.update(args[0].flatten(0, 1).unbind()))
    for column in range(1, 8):
        for value in range(sizes[column]):
            inputs = torch.zeros(1, 1, 8, dtype=torch.long)
            inputs[..., column] = value
            model(inputs)
    rows = {(column, int(i)) for row in looked_up for column, i in enumerate(row)}
    assert len({row for _, row in rows}) == len(rows) == sum(sizes[1:]) == model.features.num_embeddings


def test_padding_does_not_change_a_sentences_scores(folder):
    task = make(folder)
    model = task.build_model().eval()
    for inputs, tags in epoch(make(folder, batch_size=61)):
        scores = model(inputs)
        assert scores.shape == (*tags.shape, len(task.tags))
        for i, length in enumerate((tags != PADDING).sum(0).tolist()):
            torch.testing.assert_close(scores[:length, i], model(inputs[:length, i : i + 1])[:, 0])


def test_padding_adds_nothing_to_the_loss_and_the_gradients(folder):
    task = make(folder)
    model = task.build_model()

    def gradients(batches):
        model.zero_grad()
        loss = sum(task.loss(model, (x, y)) * (y != PADDING).sum() for x, y in batches)
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    [(inputs, tags)] = epoch(make(folder, batch_size=61))
    lengths = (tags != PADDING).sum(0).tolist()
    alone = [(inputs[:n, i : i + 1], tags[:n, i : i + 1]) for i, n in enumerate(lengths)]
    torch.testing.assert_close(gradients([(inputs, tags)]), gradients(alone), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("split", ["dev", "test"])
@pytest.mark.parametrize("tag", ["NN", "UH"])
@pytest.mark.parametrize("training", [True, False])
def test_evaluate_counts_every_word_once(folder, monkeypatch, split, tag, training):
    monkeypatch.setattr(tagging, "EVALUATION_BATCH", 4)
    task = make(folder)
    model = Constant(task.tags.index(tag), len(task.tags)).train(training)
    state = torch.get_rng_state()
    result = task.evaluate(model, split)
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), state)
    tags = [t for sentence in getattr(task.data, split) for t in sentence.xpos]
    share = tags.count(tag) / len(tags)
    log_sum = model.bias.exp().sum().log().item()
    assert result == {"accuracy": pytest.approx(100 * share), "loss": pytest.approx(log_sum - share, rel=1e-5)}


def test_evaluate_is_in_evaluation_mode(folder):
    task = make(folder, dropout=0.9, input_dropout=0.9)
    model = task.build_model()
    assert task.evaluate(model, "test") == task.evaluate(model, "test")
    assert model.lstm.training


def test_the_tag_column_is_the_configured_one(folder):
    assert make(folder).tags == ["CD", "DT", "IN", "NN", "NNP", "RB", "UH", "VBZ"]  # UH is in the test file only
    assert make(folder, tag="upos").tags == ["C", "D", "I", "N", "R", "U", "V"]


@pytest.mark.parametrize(("split", "tag", "other"), [("train", "xpos", "upos"), ("dev", "upos", "xpos")])
def test_a_word_without_a_tag_is_named_with_its_file_and_line(folder, split, tag, other):
    path = folder / f"{split}.conllu"
    write(path, [[("a", "DT")], [("a", "DT"), ("dog" * 100, "??")]])
    text = path.read_text().replace("\t??\t" if tag == "xpos" else "\t?\t", "\t_\t")
    path.write_text(f"# text = a\n{text}".replace("\n2\t", "\n2-2" + 9 * "\t_" + "\n2\t"))
    with pytest.raises(DataError) as caught:
        make(folder, tag=tag)
    message = str(caught.value)
    assert message.startswith(f"{path}: line 6 has no {tag.upper()} tag, only '_', for the word 'dogdog")
    assert f"--tag {other}" in message
    assert len(message) < len(str(path)) + 200
    make(folder, tag=other)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("rule", [None, TopK(4)])
def test_the_training_loop_trains_it(folder, rule):
    task = make(folder, dropout=0.1, hidden=128)
    config = TrainingConfig(epochs=6, lr=1e-2, accelerator="cpu")
    [run] = fit([Trainer(task, config, rule, 0)], lambda trainer: None)
    assert run.dev[task.metric] > 90
    assert run.curve[-1]["loss"] < run.curve[0]["loss"] / 3


def test_one_sentence_at_a_time(folder):
    trainer = Trainer(make(folder, batch_size=1), TrainingConfig(accelerator="cpu"), None, 0)
    trainer.advance(100)
    assert (trainer.epoch, trainer.step) == (0, 61) or trainer.epoch == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("word_size", 0),
        ("feature_size", 0),
        ("hidden", 0),
        ("dropout", 1.0),
        ("dropout", float("nan")),
        ("input_dropout", -0.1),
        ("unknown", 1.1),
        ("unknown", float("nan")),
        ("batch_size", 0),
    ],
)
def test_config_refuses(field, value):
    with pytest.raises(ValueError, match=rf"{field} is .*must be"):
        TaggingConfig(**{field: value})


def test_the_extremes_are_allowed():
    lowest = TaggingConfig(dropout=0.0, input_dropout=0.0, unknown=0.0, batch_size=1)
    assert (lowest.dropout, lowest.input_dropout, lowest.unknown, lowest.batch_size) == (0.0, 0.0, 0.0, 1)
    assert TaggingConfig(unknown=1.0).unknown == 1.0


def test_real_ewt(real_treebank):
    task = TaggingTask(TaggingConfig())
    assert len(task.tags) >= 49
    batches = epoch(task)
    assert len(batches) == task.steps_per_epoch == 392
    assert sum((tags != PADDING).sum().item() for _, tags in batches) == 204577
    assert sum(tags.numel() for _, tags in batches) < 1.02 * 204577


def test_a_treebank_without_trees_is_learned_from_all_the_same(folder):
    with_trees = epoch(make(folder))
    for path in folder.glob("*.conllu"):
        path.write_text(re.sub(r"\t\d+\tdep\t", "\t_\t_\t", path.read_text()))
    for (inputs, tags), (other_inputs, other_tags) in zip(with_trees, epoch(make(folder)), strict=True):
        assert torch.equal(tags, other_tags)
        assert torch.equal(inputs, other_inputs)
