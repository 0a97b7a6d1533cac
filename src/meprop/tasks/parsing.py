"""Dependency parsing: which word each word of a sentence hangs on, and by what relation.

A greedy transition-based parser after Chen and Manning (2014), as in the meProp paper
(https://arxiv.org/abs/1706.06197, section 4): 48 features of the parser's configuration, embedded with 50 numbers each,
and two hidden layers of 500. The paper's Penn Treebank is licensed; this reads any treebank of Universal Dependencies,
by default English EWT.

Of a relation only the universal part counts, the one before a colon (`acl` of `acl:relcl`), in training as in scores:
so it is in the CoNLL 2018 shared task's LAS. Part-of-speech tags are given, not predicted.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from meprop.errors import DataError
from meprop.tasks import treebank
from meprop.tasks.arrays import Sentences, TagColumn, Vocabulary, tags_of
from meprop.tasks.transitions import SHIFT, Configurations, oracle
from meprop.tasks.treebank import Sentence
from meprop.training.task import DataTask

Activation = Literal["relu", "tanh"]

BUDGET = 2**23
"""Words that are turned into arrays, or parsed, together, padding included: less than a gigabyte."""

locate = treebank.locate


@dataclass(frozen=True)
class ParsingConfig:
    """What to train on, and the network.

    Raises:
        ValueError: a setting is out of range; the message says what was got and what is allowed.
    """

    data_dir: Path | None = None
    """Folder of a treebank's CoNLL-U files. Default: English EWT in $MEPROP_DATA, then the cache, then a download."""
    tags: TagColumn = "xpos"
    """Which tags of the treebank the parser sees: the language's own (XPOS), or the universal ones (UPOS)."""
    embedding: int = 50
    """Numbers that stand for a word, a tag or a relation."""
    hidden: tuple[int, ...] = (500, 500)
    """Widths of the hidden layers."""
    activation: Activation = "relu"
    """Of the hidden units."""
    dropout: float = 0.3
    """Probability of dropping a hidden unit, after each hidden layer; the paper's table 4 has 0.5, on five times the
    data."""
    batch_size: int = 2_000
    """Transitions per training step; the paper's 10,000 of five times the data make about as many steps."""

    def __post_init__(self) -> None:
        if self.tags not in get_args(TagColumn):
            raise ValueError(f"tags is {self.tags}: it must be {' or '.join(get_args(TagColumn))}")
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation is {self.activation}: it must be {' or '.join(get_args(Activation))}")
        if self.embedding < 1:
            raise ValueError(f"embedding is {self.embedding}: it must be at least 1")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden is {self.hidden}: each width must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}: it must be at least 0 and below 1")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: it must be at least 1")


# ---------------------------------------------------------------- data: transitions to learn from


@dataclass(frozen=True)
class ParsingData:
    """The transitions to learn from, and the sentences to parse."""

    features: Tensor
    """What the parser sees before each transition ``[M, 48]``, int32."""
    targets: Tensor
    """The transition to do then ``[M]``, int64."""
    dev: list[Sentences]
    """In groups, see `treebank.grouped`."""
    test: list[Sentences]
    vocabulary: Vocabulary
    trees: int
    """Training trees."""
    left_out: int
    """Training trees that are left out, since no transitions build them."""

    def __str__(self) -> str:
        vocabulary = self.vocabulary
        dev, test = (sum(len(group.lengths) for group in groups) for groups in (self.dev, self.test))
        return (
            f"{len(self.targets)} transitions from {self.trees} training sentences ({self.left_out} more are not "
            f"projective and left out), {dev} development, {test} test sentences; "
            f"{len(vocabulary.words)} words, {len(vocabulary.tags)} tags, {len(vocabulary.relations)} relations"
        )


def load(config: ParsingConfig) -> ParsingData:
    """Find, or download, the treebank, and turn its training trees into transitions.

    Raises:
        DataError: see `treebank.load`; or the treebank lacks what is needed to learn from it, or to score.
    """
    bank = treebank.load(config.data_dir)
    derived = [(sentence, steps) for sentence in bank.train if (steps := oracle(sentence.heads)) is not None]
    train = [sentence for sentence, _ in derived]
    folder = locate(config.data_dir)
    if all(len(sentence.forms) == 1 for sentence in train):
        raise DataError(
            f"{folder}: none of the {len(bank.train)} training sentences has several words and a "
            "projective tree, so there is nothing to learn from. Use a treebank that has some."
        )
    for split, sentences in (("training", train), ("development", bank.dev), ("test", bank.test)):
        if all(tag == "_" for sentence in sentences for tag in tags_of(sentence, config.tags)):
            raise DataError(
                f"{folder}: the {split} sentences have no {config.tags} tags. "
                f"Use --tags {'upos' if config.tags == 'xpos' else 'xpos'}, or a treebank that has them."
            )
        if all(tag == "PUNCT" for sentence in sentences for tag in sentence.upos):
            raise DataError(
                f"{folder}: the {split} sentences are nothing but punctuation (the universal tag PUNCT). "
                "Use a treebank that has other words."
            )
    vocabulary = Vocabulary(train, config.tags)
    examples = [
        _examples(Sentences([train[i] for i in group], vocabulary), [derived[i][1] for i in group], vocabulary)
        for group in _groups(train)
    ]
    features, targets = (torch.cat(parts) for parts in zip(*examples, strict=True))
    return ParsingData(
        features=features,
        targets=targets,
        dev=[Sentences([bank.dev[i] for i in group], vocabulary) for group in _groups(bank.dev)],
        test=[Sentences([bank.test[i] for i in group], vocabulary) for group in _groups(bank.test)],
        vocabulary=vocabulary,
        trees=len(train),
        left_out=len(bank.train) - len(train),
    )


def _groups(sentences: Sequence[Sentence]) -> list[list[int]]:
    return treebank.grouped([len(sentence.forms) for sentence in sentences], BUDGET)


def _examples(
    sentences: Sentences, derivations: Iterable[list[tuple[int, int]]], vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """Return the features before each transition of each sentence ``[M, 48]``, and the transitions ``[M]``."""
    numbers = {pair: i for i, pair in enumerate(zip(vocabulary.kinds, vocabulary.given, strict=True))}
    targets_SN = np.full((len(sentences.lengths), 2 * sentences.lengths.max()), -1)
    for row, steps in enumerate(derivations):
        targets_SN[row, : len(steps)] = [
            numbers[kind, vocabulary.relations.nothing if kind == SHIFT else sentences.relations[row, word]]
            for kind, word in steps
        ]
    configurations = Configurations(sentences.lengths)
    features: list[NDArray[np.int32]] = []
    targets: list[NDArray[np.int64]] = []
    for targets_S in targets_SN.T:
        rows = np.flatnonzero(targets_S >= 0)
        features.append(sentences.features(rows, configurations, sentences.relations))
        targets.append(targets_S[rows])
        configurations.advance(rows, vocabulary.kinds[targets[-1]])
    return torch.from_numpy(np.concatenate(features)), torch.from_numpy(np.concatenate(targets))


# ---------------------------------------------------------------- model and metric


class ParsingTask(DataTask):
    """Data, model and metric of parsing, for the training loop.

    Args:
        config: what to train on, and the network.

    Raises:
        DataError: see `load`.
    """

    name = "parsing"
    metric = "uas"

    def __init__(self, config: ParsingConfig) -> None:
        self.config = config
        self.data = load(config)

    @property
    def fingerprint(self) -> str:
        """A digest of the transitions to learn from and the sentences to parse."""
        data = self.data
        digest = hashlib.blake2b(str(data).encode(), digest_size=6)
        of_sentences = [array for group in (*data.dev, *data.test) for array in vars(group).values()]
        for array in (data.features.numpy(), data.targets.numpy(), *of_sentences):
            digest.update(array.data)
        return digest.hexdigest()

    def build_model(self) -> nn.Sequential:
        """Return a new network ``[N, 48] -> [N, T]`` of plain torch layers.

        Embeddings start small, and hidden layers by He et al. (2015): an epoch has few steps, and from torch's own
        start the first of them would be lost.
        """
        embedding = nn.Embedding(self.data.vocabulary.relations.end, self.config.embedding)
        nn.init.normal_(embedding.weight, std=0.1)
        layers: list[nn.Module] = [embedding, nn.Flatten()]
        width = self.data.features.shape[1] * self.config.embedding
        for hidden in self.config.hidden:
            linear = nn.Linear(width, hidden)
            nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU() if self.config.activation == "relu" else nn.Tanh()]
            if self.config.dropout > 0:
                layers.append(nn.Dropout(self.config.dropout))
            width = hidden
        return nn.Sequential(*layers, nn.Linear(width, len(self.data.vocabulary.kinds)))

    @property
    def example_inputs(self) -> tuple[Tensor]:
        """The features of the first transition ``[1, 48]``."""
        return (self.data.features[:1],)

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch, a smaller last one included."""
        return math.ceil(len(self.data.targets) / self.config.batch_size)

    def train_batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch of batches, features ``[B, 48]`` and targets ``[B]``, in an order drawn from a generator.

        Args:
            generator: on the CPU.
        """
        order = torch.randperm(len(self.data.targets), generator=generator)
        for start in range(0, len(order), self.config.batch_size):
            index = order[start : start + self.config.batch_size]
            yield self.data.features[index], self.data.targets[index]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy of a batch that is on the model's device."""
        features, targets = batch
        return F.cross_entropy(model(features), targets)

    def evaluate(self, model: nn.Module, split: Literal["dev", "test"]) -> dict[str, float]:
        """Parse a split greedily, in evaluation mode, and return the attachment scores: see `scores`."""
        groups = self.data.dev if split == "dev" else self.data.test
        training = model.training
        model.eval()
        try:
            parsed = [(group, *parse(model, group, self.data.vocabulary)) for group in groups]
        finally:
            model.train(training)
        return scores(parsed)


@torch.no_grad()
def parse(
    model: nn.Module, sentences: Sentences, vocabulary: Vocabulary
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Do the transition that the model finds best among the allowed ones, in all sentences at once, to the end.

    Returns:
        Heads and relations ``[S, W]``: of every sentence a tree with one word under the root.
    """
    device = next(model.parameters()).device
    configurations = Configurations(sentences.lengths)
    relations = np.full_like(sentences.relations, vocabulary.relations.nothing)
    for step in range(2 * int(sentences.lengths.max())):
        rows = np.flatnonzero(step < 2 * sentences.lengths)
        features = torch.from_numpy(sentences.features(rows, configurations, relations))
        logits = model(features.to(device)).float().cpu().numpy()
        allowed = configurations.allowed(rows)[:, vocabulary.kinds]
        best = np.where(allowed, np.nan_to_num(logits), -np.inf).argmax(axis=1)  # an allowed one, even of all -inf
        words = configurations.advance(rows, vocabulary.kinds[best])
        relations[rows, words] = vocabulary.given[best]
    return configurations.heads, relations


def scores(parsed: Sequence[tuple[Sentences, NDArray[np.int32], NDArray[np.int32]]]) -> dict[str, float]:
    """Return the attachment scores of trees, in percent.

    ``uas`` is the share of words with the right head, ``las`` of those with the right head and relation: all words, as
    in the CoNLL 2018 shared task. ``uas_nopunct`` and ``las_nopunct`` leave out punctuation, which is, as usual, what
    has the tag of punctuation in the treebank (PUNCT of the universal ones), whatever its relation. A treebank without
    universal tags has no such words.

    Args:
        parsed: groups of sentences, each with the heads and the relations ``[S, W]`` that `parse` found.
    """
    columns: list[NDArray[np.bool_]] = []
    for sentences, heads, relations in parsed:
        right_head = heads == sentences.heads
        right_both = right_head & (relations == sentences.relations)
        columns.append(np.stack((right_head, right_both, ~sentences.punctuation))[:, sentences.heads >= 0])
    right_head, right_both, other = np.concatenate(columns, axis=1)
    return {
        "uas": 100 * float(right_head.mean()),
        "las": 100 * float(right_both.mean()),
        "uas_nopunct": 100 * float(right_head[other].mean()),
        "las_nopunct": 100 * float(right_both[other].mean()),
    }
