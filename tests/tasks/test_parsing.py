"""What the parser sees, learns and is scored by, against hand-made cases and against one sentence at a time."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tasks.test_transitions import Literal, ancestors

pytest.importorskip("lightning_fabric")

from meprop.errors import DataError
from meprop.tasks import parsing
from meprop.tasks.parsing import ParsingConfig, ParsingTask, Sentences, Vocabulary, load, parse, scores
from meprop.tasks.transitions import LEFT, RIGHT, ROOT, SHIFT, oracle
from meprop.tasks.treebank import Sentence
from meprop.training.config import TrainingConfig
from meprop.training.loop import Trainer, fit


def sentence(*words: str) -> Sentence:
    """From "form UPOS XPOS head deprel" for each word."""
    forms, upos, xpos, heads, deprels = zip(*(word.split() for word in words), strict=True)
    return Sentence(forms, upos, xpos, tuple(map(int, heads)), deprels)


SAW = sentence(
    "the DET DT 2 det",
    "cat NOUN NN 3 nsubj",
    "saw VERB VBD 0 root",
    "me PRON PRP 3 obj",
    ". PUNCT . 3 punct",
)
YES = sentence("yes INTJ UH 0 root")
CROSSED = sentence("a X FW 3 dep", "b X FW 4 dep", "c X FW 4 dep", "d X FW 0 root")


def random_sentences(count: int, longest: int = 12) -> list[Sentence]:
    """Sentences of random projective trees; a tag says where the head is, a word more: it can be learned."""
    random = np.random.default_rng(count)
    result = []
    for length in random.integers(1, longest + 1, count):
        literal = Literal(length)
        while any(allowed := literal.allowed()):
            literal.advance(random.choice(np.flatnonzero(allowed)))
        words = []
        for word, head in sorted(literal.heads.items()):
            side = "R" if head == 0 else "A" if head > word else "B"
            deprel = "root" if head == 0 else f"{'pre' if head > word else 'post'}{':sub' * int(random.integers(2))}"
            words.append(f"w{random.integers(20)} {side} {side}{abs(head - word) % 3} {head} {deprel}")
        result.append(sentence(*words))
    return result


def write(folder: Path, train: list[Sentence], dev: list[Sentence], test: list[Sentence]) -> Path:
    folder.mkdir(exist_ok=True)
    for split, sentences in (("train", train), ("dev", dev), ("test", test)):
        blocks = []
        for s in sentences:
            columns = zip(s.forms, s.upos, s.xpos, s.heads, s.deprels, strict=True)
            lines = [
                f"{number}\t{form}\t_\t{upos}\t{xpos}\t_\t{head}\t{deprel}\t_\t_\n"
                for number, (form, upos, xpos, head, deprel) in enumerate(columns, start=1)
            ]
            blocks.append("".join(lines))
        (folder / f"x-{split}.conllu").write_text("\n".join(blocks) + "\n")
    return folder


def config(folder: Path, **changes: object) -> ParsingConfig:
    return ParsingConfig(**({"data_dir": folder, "hidden": (128, 128), "batch_size": 50} | changes))


@pytest.fixture
def task(tmp_path):
    return ParsingTask(config(write(tmp_path, random_sentences(60), random_sentences(20), random_sentences(21))))


# ---------------------------------------------------------------- data


def test_the_48_features_of_a_configuration(tmp_path):
    data = load(config(write(tmp_path, [SAW, SAW], [SAW], [SAW])))
    words, tags, relations = data.vocabulary.words, data.vocabulary.tags, data.vocabulary.relations

    def features(forms, xpos, deprels):
        named = {None: "nothing", "ROOT": "root"}
        row = []
        for symbols, column in ((words, forms), (tags, xpos), (relations, deprels)):
            row += [getattr(symbols, named[s]) if s in named else symbols[s] for s in column]
        return row

    # the, cat, LEFT, saw, LEFT, me, RIGHT and "." are done: the stack is "ROOT saw .", and the buffer empty.
    assert data.features[2 * 8].tolist() == features(
        [".", "saw", "ROOT", *3 * [None], None, "cat", None, "me", *4 * [None], None, "the", None, None],
        [".", "VBD", "ROOT", *3 * [None], None, "NN", None, "PRP", *4 * [None], None, "DT", None, None],
        [None, "nsubj", None, "obj", *4 * [None], None, "det", None, None],
    )
    assert data.features[0].tolist() == features(
        ["ROOT", None, None, "the", "cat", "saw", *12 * [None]],
        ["ROOT", None, None, "DT", "NN", "VBD", *12 * [None]],
        12 * [None],
    )
    transitions = [(data.vocabulary.kinds[target], data.vocabulary.given[target]) for target in data.targets[::2]]
    assert transitions == [
        (SHIFT, relations.nothing), (SHIFT, relations.nothing), (LEFT, relations["det"]),
        (SHIFT, relations.nothing), (LEFT, relations["nsubj"]),
        (SHIFT, relations.nothing), (RIGHT, relations["obj"]),
        (SHIFT, relations.nothing), (RIGHT, relations["punct"]), (ROOT, relations["root"]),
    ]  # fmt: skip
    assert (data.features.dtype, data.targets.dtype) == (torch.int32, torch.int64)


def test_words_tags_and_relations_have_numbers_of_their_own():
    vocabulary = Vocabulary([SAW, YES, SAW, YES], "xpos")
    numbers = []
    for symbols, known in (
        (vocabulary.words, [*SAW.forms, "yes"]),
        (vocabulary.tags, [*SAW.xpos, "UH"]),
        (vocabulary.relations, SAW.deprels),
    ):
        numbers += [symbols.nothing, symbols.root, symbols.unknown, *(symbols[symbol] for symbol in known)]
    assert sorted(numbers) == list(range(vocabulary.relations.end))
    in_order = [vocabulary.words[form] for form in sorted([*SAW.forms, "yes"])]
    assert in_order == sorted(in_order)  # in each process the same, unlike a set's order


class LiteralFeatures(Literal):
    """A configuration, and the features of it, as the definition has it."""

    def __init__(self, sentence, vocabulary):
        super().__init__(len(sentence.forms))
        self.sentence, self.vocabulary, self.relations = sentence, vocabulary, {}

    def advance(self, kind, relation):
        word = super().advance(kind)
        if kind != SHIFT:
            self.relations[word] = relation

    def features(self):
        def numbers(symbols, column, positions):
            return [symbols.nothing if p < 0 else symbols.root if p == 0 else symbols[column[p - 1]] for p in positions]

        vocabulary, positions = self.vocabulary, self.positions()
        return [
            *numbers(vocabulary.words, self.sentence.forms, positions),
            *numbers(vocabulary.tags, self.sentence.xpos, positions),
            *(self.relations.get(position, vocabulary.relations.nothing) for position in positions[6:]),
        ]


def test_the_examples_are_those_of_one_sentence_at_a_time(task):
    data = task.data
    expected = []
    for sentence in random_sentences(60):
        literal = LiteralFeatures(sentence, data.vocabulary)
        for kind, word in oracle(sentence.heads):
            relation = data.vocabulary.relations.nothing
            if kind != SHIFT:
                relation = data.vocabulary.relations[sentence.deprels[word - 1].split(":")[0]]
            expected.append((literal.features(), kind, relation))
            literal.advance(kind, relation)
    found = zip(
        data.features.tolist(),
        data.vocabulary.kinds[data.targets].tolist(),
        data.vocabulary.given[data.targets].tolist(),
        strict=True,
    )
    assert sorted(found) == sorted(expected)


def test_trees_that_are_not_projective_are_left_out_counted_and_said(tmp_path):
    data = load(config(write(tmp_path, [CROSSED, SAW, CROSSED, YES, SAW], [CROSSED], [SAW])))
    assert len(data.targets) == 10 + 2 + 10
    assert "22 transitions from 3 training sentences (2 more are not projective and left out)" in str(data)
    assert "1 development, 1 test sentences; 5 words, 6 tags, 5 relations" in str(data)
    assert data.vocabulary.words["a"] == data.vocabulary.words.unknown
    assert len(data.dev[0].lengths) == 1  # what is scored is everything


def test_only_the_universal_part_of_a_relation_counts(tmp_path):
    clause = sentence("see VERB VB 0 root", "who PRON WP 3 nsubj", "came VERB VBD 1 acl:relcl")
    noun = sentence("I PRON PRP 2 nsubj:pass", "left VERB VBD 0 root", "it PRON PRP 2 acl")
    relations = load(config(write(tmp_path, [clause, noun], [SAW], [noun]))).vocabulary.relations
    assert len(relations) == 3
    assert relations["acl:relcl"] == relations.unknown != relations["acl"]


def test_what_training_did_not_show_and_words_that_it_showed_once_are_unknown(tmp_path):
    known = sentence("the DET DT 2 det", "the NOUN NN 0 root", "once ADV RB 2 advmod")
    other = sentence("the DET DT 2 det", "dog NOUN NNS 0 root", "once ADV RB 2 vocative")
    data = load(config(write(tmp_path, [known], [other], [other])))
    words, tags, relations = data.vocabulary.words, data.vocabulary.tags, data.vocabulary.relations
    assert data.dev[0].words[0].tolist() == [words.root, words["the"], words.unknown, words.unknown, words.nothing]
    assert data.dev[0].tags[0].tolist() == [tags.root, tags["DT"], tags.unknown, tags["RB"], tags.nothing]
    assert data.dev[0].relations[0, 1:4].tolist() == [relations["det"], relations["root"], relations.unknown]
    assert relations.unknown not in data.vocabulary.given  # so it is wrong whatever the parser says
    assert (data.features == words.unknown).any()  # there is something to learn from


@pytest.mark.parametrize(("tags", "expected"), [("xpos", SAW.xpos), ("upos", SAW.upos)])
def test_the_tags_are_those_of_the_column(tmp_path, tags, expected):
    data = load(config(write(tmp_path, [SAW], [SAW], [SAW]), tags=tags))
    assert data.dev[0].tags[0, 1:6].tolist() == [data.vocabulary.tags[tag] for tag in expected]
    assert len(data.vocabulary.tags) == len(set(expected))


@pytest.mark.parametrize("train", [[CROSSED], [YES, YES], [YES, CROSSED]])
def test_a_treebank_that_teaches_nothing_is_refused(tmp_path, train):
    count = len(train)
    with pytest.raises(DataError, match=rf"{tmp_path}: none of the {count} training .*projective tree.*Use a"):
        load(config(write(tmp_path, train, [SAW], [SAW])))


@pytest.mark.parametrize(("tags", "other"), [("xpos", "upos"), ("upos", "xpos")])
def test_a_treebank_without_the_tags_is_refused(tmp_path, tags, other):
    bare = sentence(*("w _ X 2 dep", "w _ X 0 root") if tags == "upos" else ("w X _ 2 dep", "w X _ 0 root"))
    folder = write(tmp_path, [bare], [bare], [bare])
    with pytest.raises(DataError, match=rf"{tmp_path}: .* no {tags} tags.*--tags {other}"):
        load(config(folder, tags=tags))
    load(config(folder, tags=other))


@pytest.mark.parametrize("split", ["development", "test"])
@pytest.mark.parametrize(
    ("word", "message"),
    [("yes INTJ _ 0 root", "have no xpos tags.*--tags upos"), ("! PUNCT . 0 root", "nothing but punctuation.*Use a")],
)
def test_sentences_that_cannot_be_parsed_or_scored_are_refused(tmp_path, split, word, message):
    dev, test = ([sentence(word)] if split == name else [SAW] for name in ("development", "test"))
    with pytest.raises(DataError, match=rf"{tmp_path}: the {split} sentences .*{message}"):
        load(config(write(tmp_path, [SAW], dev, test)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tags", "pos"),
        ("embedding", 0),
        ("hidden", (500, 0)),
        ("activation", "cube"),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", float("nan")),
        ("batch_size", 0),
    ],
)
def test_config_refuses(field, value):
    with pytest.raises(ValueError, match=rf"{field} is {re.escape(str(value))}: .*must be"):
        ParsingConfig(**{field: value})


def test_real_ewt(real_treebank):
    data = load(ParsingConfig())
    assert "392214 transitions from 12256 training sentences (288 more are not projective" in str(data)
    assert [int(split.lengths.sum()) for (split,) in (data.dev, data.test)] == [25147, 25094]
    assert [len(split.lengths) for (split,) in (data.dev, data.test)] == [2001, 2077]


# ---------------------------------------------------------------- parsing and scores


class Chance(nn.Module):
    """A model that likes transitions at random, also those that are not allowed, or all of them the same."""

    def __init__(self, transitions, constant):
        super().__init__()
        self.transitions = nn.Parameter(torch.zeros(transitions))
        self.constant = constant

    def forward(self, features):
        liking = self.transitions + torch.randn(len(features), len(self.transitions))
        return liking if self.constant is None else torch.full_like(liking, self.constant)


@pytest.mark.parametrize("constant", [None, -math.inf, math.inf, math.nan])
def test_every_outcome_is_a_tree_with_one_root(tmp_path, constant):
    sentences = [*random_sentences(200, 30), YES, SAW, CROSSED]
    data = load(config(write(tmp_path, [SAW], sentences, [YES])))
    torch.manual_seed(0)
    heads, relations = parse(Chance(len(data.vocabulary.kinds), constant), data.dev[0], data.vocabulary)
    for row, parsed in enumerate(sentences):
        length = len(parsed.forms)
        tree = heads[row, 1 : length + 1].tolist()
        assert tree.count(0) == 1
        assert all(ancestors(tree, word) for word in range(1, length + 1))
        is_root = relations[row, 1 : length + 1] == data.vocabulary.relations["root"]
        assert is_root.tolist() == [head == 0 for head in tree]
        outside = np.delete(heads[row], np.arange(1, length + 1))
        assert (outside == -1).all()


def test_parsing_is_that_of_one_sentence_at_a_time(task):
    torch.manual_seed(0)
    model, vocabulary = task.build_model().double().eval(), task.data.vocabulary
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # decided at every step
        heads, relations = parse(model, task.data.dev[0], vocabulary)
        for row, sentence in enumerate(random_sentences(20)):
            literal = LiteralFeatures(sentence, vocabulary)
            while any(allowed := literal.allowed()):
                logits = model(torch.tensor([literal.features()]))[0].tolist()
                best = max(
                    (number for number, kind in enumerate(vocabulary.kinds) if allowed[kind]), key=logits.__getitem__
                )
                literal.advance(vocabulary.kinds[best], vocabulary.given[best])
            for word in range(1, len(sentence.forms) + 1):
                assert (heads[row, word], relations[row, word]) == (literal.heads[word], literal.relations[word])
    assert len(set(relations[heads > 0].tolist())) == 2  # not all the same


def test_scores_count_words_with_and_without_punctuation():
    other = sentence("go VERB VB 0 root", "! PUNCT . 1 discourse", "- SYM SYM 1 punct")
    vocabulary = Vocabulary([SAW, other], "xpos")
    gold = Sentences([SAW, other], vocabulary)
    relation = vocabulary.relations
    # Right head and relation: the, saw, ".", go, "-". Right head only: cat, "!". Wrong head, right relation: me.
    heads = gold.heads.copy()
    heads[0, 4] = 2
    relations = gold.relations.copy()
    relations[0, 2] = relation["obj"]
    relations[1, 2] = relation["punct"]
    assert scores([(gold, heads, relations)]) == {
        "uas": pytest.approx(100 * 7 / 8),
        "las": pytest.approx(100 * 5 / 8),
        "uas_nopunct": pytest.approx(100 * 5 / 6),  # "." and "!" are punctuation; "-", a symbol, is not
        "las_nopunct": pytest.approx(100 * 4 / 6),
    }
    perfect = dict.fromkeys(("uas", "las", "uas_nopunct", "las_nopunct"), 100.0)
    assert scores([(gold, gold.heads, gold.relations)]) == perfect


# ---------------------------------------------------------------- task


def test_the_model_is_plain_torch_of_the_configured_shape(tmp_path):
    task = ParsingTask(config(write(tmp_path, [SAW], [SAW], [SAW]), embedding=7, hidden=(16, 12), dropout=0.5))
    model = task.build_model()
    assert [type(layer) for layer in model] == [
        nn.Embedding, nn.Flatten, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear
    ]  # fmt: skip
    widths = [(layer.in_features, layer.out_features) for layer in model if isinstance(layer, nn.Linear)]
    # To shift; to the left or right with 4 relations; to the root with one.
    assert widths == [(48 * 7, 16), (16, 12), (12, 1 + 2 * 4 + 1)]


def test_a_model_without_dropout_has_no_layers_for_it(tmp_path):
    model = ParsingTask(config(write(tmp_path, [SAW], [SAW], [SAW]), hidden=(16,), dropout=0.0)).build_model()
    assert [type(layer) for layer in model] == [nn.Embedding, nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]


def test_the_activation_is_the_configured_one(tmp_path):
    model = ParsingTask(config(write(tmp_path, [SAW], [SAW], [SAW]), activation="tanh")).build_model()
    assert [type(layer) for layer in model if isinstance(layer, nn.ReLU | nn.Tanh)] == [nn.Tanh, nn.Tanh]


def test_embeddings_start_small_and_hidden_layers_by_he(task):
    torch.manual_seed(0)
    embedding, _, hidden, *_ = task.build_model()
    assert embedding.weight.std().item() == pytest.approx(0.1, rel=0.1)
    assert hidden.weight.std().item() == pytest.approx(math.sqrt(2 / hidden.in_features), rel=0.1)
    assert not hidden.bias.any()


@pytest.mark.parametrize(
    ("train", "dev", "test"),
    [
        ("UH root", "UH root", "UH dep"),
        ("UH root", "XX root", "UH root"),
        ("XX root", "UH root", "UH root"),  # other features
        ("UH dep", "UH root", "UH root"),  # other targets
    ],
    ids=["test", "dev", "features", "targets"],
)
def test_the_fingerprint_changes_with_the_data(tmp_path, train, dev, test):
    def fingerprint(folder, *kinds):
        splits = [[sentence(f"yes INTJ {tag} 0 {relation}")] for tag, relation in map(str.split, kinds)]
        splits[0] += [SAW, sentence("no INTJ UH 0 dep"), sentence("no INTJ XX 0 root")]  # symbols stay the same
        return ParsingTask(config(write(tmp_path / folder, *splits))).fingerprint

    assert fingerprint("a", train, dev, test) != fingerprint("b", "UH root", "UH root", "UH root")


def test_an_epoch_shows_each_transition_once_in_the_generators_order(task):
    def epoch(seed):
        return list(task.train_batches(torch.Generator().manual_seed(seed)))

    def examples(features, targets):
        return sorted([*row, target] for row, target in zip(features.tolist(), targets.tolist(), strict=True))

    batches = epoch(0)
    count = len(task.data.targets)
    assert len(batches) == task.steps_per_epoch == math.ceil(count / 50)
    assert [len(targets) for _, targets in batches[:-1]] == [50] * (count // 50)
    features, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    assert examples(features, targets) == examples(task.data.features, task.data.targets)
    assert not torch.equal(features, task.data.features)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, epoch(0), strict=True))
    assert not torch.equal(features, torch.cat([features for features, _ in epoch(1)]))


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_is_without_dropout_and_leaves_mode_and_random_state_alone(task, training):
    model = task.build_model().train(training)
    state = torch.get_rng_state()
    for split, sentences in (("dev", task.data.dev[0]), ("test", task.data.test[0])):
        result = task.evaluate(model, split)
        assert all(layer.training == training for layer in model)
        expected = scores([(sentences, *parse(model.eval(), sentences, task.data.vocabulary))])
        model.train(training)
        assert result == expected
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sparse", [False, True])
def test_it_trains_dense_and_sparse(task, sparse):
    training = TrainingConfig(epochs=6, k=10, lr=5e-3, accelerator="cpu")
    trainer = Trainer(task, training, training.rule() if sparse else None, 0)
    untrained = task.evaluate(trainer.model, "dev")[task.metric]
    (run,) = fit([trainer], lambda trainer: None)
    assert run.curve[-1]["loss"] < run.curve[0]["loss"] / 2
    assert run.dev[task.metric] > untrained + 25
    assert [layer["status"] for layer in run.layers] == (["sparse", "sparse", "dense"] if sparse else [])


def test_locate_names_the_folder(tmp_path):
    assert parsing.locate(write(tmp_path, [SAW], [SAW], [SAW])) == tmp_path
