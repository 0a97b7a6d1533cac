"""Part-of-speech tagging of a treebank: an LSTM that reads a sentence word by word and gives each word its tag.

The network is the meProp paper's (https://arxiv.org/abs/1706.06197, section 4): a word embedding of 50 and seven
features of 20 go into one LSTM layer of 500, whose outputs go into a linear layer over the tags. The paper does not
name its features; these are ours. Its treebank cannot be downloaded: see `meprop.tasks.treebank`.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, groupby
from pathlib import Path
from reprlib import repr as quote  # cuts what is long
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from meprop.errors import DataError
from meprop.tasks import treebank
from meprop.tasks.treebank import Sentence, Treebank
from meprop.training.task import DataTask

UNKNOWN = 0  # the index of all words, or all values of a feature, that the training sentences do not have
PADDING = -100  # the tag after a sentence's end; cross_entropy leaves it out
EVALUATION_BATCH = 128
BUDGET = 2**15  # words that the network reads at once, padding included: less than a gigabyte in training

locate = treebank.locate


@dataclass(frozen=True)
class TaggingConfig:
    """What to train on, and the network.

    Raises:
        ValueError: a setting is out of range; the message says what was got and what is allowed.
    """

    data_dir: Path | None = None
    """Folder of a CoNLL-U treebank. Default: UD English EWT in $MEPROP_DATA, then the cache, then a download."""
    tag: Literal["xpos", "upos"] = "xpos"
    """What to predict: the treebank's own tags (for English those of the Penn Treebank), or the universal ones."""
    word_size: int = 50
    """Size of the word embedding."""
    feature_size: int = 20
    """Size of the embedding of each of the seven features."""
    hidden: int = 500
    """Size of the LSTM's state."""
    dropout: float = 0.5
    """Probability of dropping an output of the LSTM."""
    input_dropout: float = 0.2
    """Probability of dropping an input of the LSTM."""
    unknown: float = 0.5
    """Probability of showing a word, or value of a feature, that occurs only once as unknown, to train that too."""
    batch_size: int = 32
    """Sentences per training step, of about the same length; 1 is the paper's."""

    def __post_init__(self) -> None:
        for name in ("word_size", "feature_size", "hidden", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        for name in ("dropout", "input_dropout"):
            if not 0.0 <= (value := getattr(self, name)) < 1.0:
                raise ValueError(f"{name} is {value}: it must be at least 0 and below 1")
        if not 0.0 <= self.unknown <= 1.0:
            raise ValueError(f"unknown is {self.unknown}: it must be from 0 to 1")


def load(config: TaggingConfig) -> Treebank:
    """Find, or download, the treebank and read it; see `meprop.tasks.treebank.load`."""
    return treebank.load(config.data_dir, trees=False)


# ---------------------------------------------------------------- words


@cache
def describe(form: str, first: bool) -> tuple[str, ...]:
    """Return what the network is told of a word: the word itself, in lower case, and the values of seven features.

    Args:
        form: the word.
        first: whether the sentence begins with it; a capital says less there.
    """
    word = re.sub(r"\d", "0", form.lower())
    return (word, word[:3], word[-2:], word[-3:], word[-4:], _capitals(form, first), _digits(form), _shape(form))


def _capitals(form: str, first: bool) -> str:
    capitals = [char.isupper() for char in form]
    if not any(capitals):
        return "none"
    if capitals[0] and not any(capitals[1:]):
        return "initial, first word" if first else "initial"
    return "all" if form.isupper() else "some"


def _digits(form: str) -> str:
    if not re.search(r"\d", form):
        return "none"
    if form.isdigit():
        return "all"
    return "with letters" if any(char.isalpha() for char in form) else "with signs"


def _shape(form: str) -> str:
    """Return X for a run of capitals, x for one of other letters, d for one of digits, other characters once each."""
    kinds = ("X" if char.isupper() else "x" if char.isalpha() else "d" if char.isdigit() else char for char in form)
    return "".join(kind for kind, _ in groupby(kinds))


Vocabulary = list[dict[str, int]]
"""For the words, and for each feature, the index of each value in the training sentences, from 1."""


@dataclass(frozen=True)
class Words:
    """The words of all sentences of a split, one sentence after the other."""

    inputs: Tensor
    """Indices ``[N, 8]``, int64: of the word and its features."""
    tags: Tensor
    """``[N]``, int64."""
    lengths: list[int]
    """Words in each sentence."""


def _describe_all(sentences: Sequence[Sentence]) -> list[tuple[str, ...]]:
    return [describe(form, i == 0) for sentence in sentences for i, form in enumerate(sentence.forms)]


def _vocabulary(sentences: Sequence[Sentence]) -> Vocabulary:
    columns = zip(*_describe_all(sentences), strict=True)
    return [{value: i for i, value in enumerate(dict.fromkeys(column), start=1)} for column in columns]


def _encode(sentences: Sequence[Sentence], vocabulary: Vocabulary) -> Tensor:
    """Return the indices ``[N, 8]`` of all words of the sentences."""
    columns = zip(*_describe_all(sentences), strict=True)
    encoded = [
        [indices.get(value, UNKNOWN) for value in column] for column, indices in zip(columns, vocabulary, strict=True)
    ]
    return torch.tensor(encoded).T.contiguous()


# ---------------------------------------------------------------- model


class Tagger(nn.Module):
    """From indices of words and features ``[T, B, 8]``, time first, to scores of the tags ``[T, B, tags]``.

    Args:
        sizes: number of indices of the words, and of each feature.
        num_tags: number of tags.
        config: sizes and dropout.
    """

    feature_offsets: Tensor

    def __init__(self, sizes: Sequence[int], num_tags: int, config: TaggingConfig) -> None:
        super().__init__()
        num_words, *num_values = sizes
        self.words = nn.Embedding(num_words, config.word_size)
        self.features = nn.Embedding(sum(num_values), config.feature_size)  # of all features, one after the other
        offsets = torch.tensor([0, *accumulate(num_values[:-1])])
        self.register_buffer("feature_offsets", offsets, persistent=False)
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.lstm = nn.LSTM(config.word_size + len(num_values) * config.feature_size, config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.hidden, num_tags)
        for table in (self.words, self.features):  # torch's std of 1 is noise that rare words keep: 2 points less
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, inputs_TBF: Tensor) -> Tensor:
        """Return the scores; what follows a sentence's end in a batch does not change those before it."""
        words = self.words(inputs_TBF[..., 0])
        features = self.features(inputs_TBF[..., 1:] + self.feature_offsets)
        embedded = torch.cat([words, features.flatten(-2)], dim=-1)
        states, _ = self.lstm(self.input_dropout(embedded))
        return self.output(self.dropout(states))


# ---------------------------------------------------------------- task


class TaggingTask(DataTask):
    """Data, model and metric of part-of-speech tagging, for the training loop.

    A batch is the sentences' indices ``[T, B, 8]`` and their tags ``[T, B]``, which are `PADDING` after a sentence's
    end. Sentences of about the same length, padded, are the fastest form for torch's LSTM on CPUs, faster than packed
    ones.

    Args:
        config: what to train on, and the network.

    Raises:
        DataError: see `load`; or a word has no tag.
    """

    name = "tagging"
    metric = "accuracy"

    def __init__(self, config: TaggingConfig) -> None:
        self.config = config
        self.data = load(config)
        splits = {"train": self.data.train, "dev": self.data.dev, "test": self.data.test}
        for sentence in chain(*splits.values()):
            self._check_tags(sentence)
        # Tags that only dev or test have are outputs too: nothing trains them, and their words count as wrong.
        self.tags = sorted(set(chain.from_iterable(map(self._tags, chain(*splits.values())))))
        self.vocabulary = _vocabulary(self.data.train)
        self._words = {split: self._number(sentences) for split, sentences in splits.items()}
        columns = self._words["train"].inputs.T
        self._once = torch.stack([torch.bincount(column)[column] == 1 for column in columns], dim=1)

    def _tags(self, sentence: Sentence) -> tuple[str, ...]:
        return sentence.xpos if self.config.tag == "xpos" else sentence.upos

    def _check_tags(self, sentence: Sentence) -> None:
        if "_" in (tags := self._tags(sentence)):
            word = tags.index("_")
            raise DataError(
                f"{sentence.path}: line {sentence.lines[word]} has no {self.config.tag.upper()} tag, only '_', for "
                f"the word {quote(sentence.forms[word])}. "
                f"Use --tag {'upos' if self.config.tag == 'xpos' else 'xpos'}, or a treebank that has these tags."
            )

    def _number(self, sentences: Sequence[Sentence]) -> Words:
        index = {tag: i for i, tag in enumerate(self.tags)}
        tags = torch.tensor([index[tag] for sentence in sentences for tag in self._tags(sentence)])
        return Words(_encode(sentences, self.vocabulary), tags, [len(sentence.forms) for sentence in sentences])

    @property
    def fingerprint(self) -> str:
        """A digest of the sentences."""
        return hashlib.blake2b(repr(self.data).encode(), digest_size=6).hexdigest()

    def build_model(self) -> Tagger:
        """Return a new network of plain torch layers."""
        return Tagger([1 + len(indices) for indices in self.vocabulary], len(self.tags), self.config)

    @property
    def example_inputs(self) -> tuple[Tensor]:
        """A sentence of one word ``[1, 1, 8]``."""
        return (self._words["train"].inputs[:1, None],)

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch, a smaller one included."""
        return math.ceil(len(self.data.train) / self.config.batch_size)

    def train_batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch of batches, in an order drawn from a generator, and with words drawn to be unknown.

        Args:
            generator: on the CPU.
        """
        words, size = self._words["train"], self.config.batch_size
        lengths = torch.tensor(words.lengths)
        order = torch.randperm(len(lengths), generator=generator)
        batches = order[lengths[order].argsort(stable=True)].split(size)
        unseen = self._once & (torch.rand(self._once.shape, generator=generator) < self.config.unknown)
        inputs = words.inputs.masked_fill(unseen, UNKNOWN).split(words.lengths)
        tags = words.tags.split(words.lengths)
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield _pad(inputs, tags, batches[i].tolist())

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy of the words of a batch that is on the model's device."""
        inputs, tags = batch
        if tags.numel() <= BUDGET:
            return F.cross_entropy(model(inputs).flatten(0, 1), tags.flatten())
        # Part by part, as long sentences need. The backward pass computes each part again, so that one is in memory.
        lengths = (tags != PADDING).sum(0)
        sums: list[Tensor] = []
        for part in treebank.grouped(lengths.tolist(), BUDGET):
            longest = int(lengths[part].max())
            cut = inputs[:longest, part], tags[:longest, part]
            sums.append(cast(Tensor, checkpoint(_summed_loss, model, *cut, use_reentrant=False)))
        return torch.stack(sums).sum() / lengths.sum()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Literal["dev", "test"]) -> dict[str, float]:
        """Return ``accuracy`` in percent and ``loss``, the mean cross-entropy, of the words; in evaluation mode."""
        words = self._words[split]
        inputs, tags = words.inputs.split(words.lengths), words.tags.split(words.lengths)
        by_length = torch.tensor(words.lengths).argsort(stable=True).split(EVALUATION_BATCH)
        device = next(model.parameters()).device
        correct = loss = 0.0
        training = model.training
        model.eval()
        try:
            for sentences in chain.from_iterable(_parts(words, batch.tolist()) for batch in by_length):
                batch_inputs, batch_tags = (tensor.to(device) for tensor in _pad(inputs, tags, sentences))
                scores = model(batch_inputs).float()
                correct += (scores.argmax(-1) == batch_tags).sum().item()
                loss += F.cross_entropy(scores.flatten(0, 1), batch_tags.flatten(), reduction="sum").item()
        finally:
            model.train(training)
        return {"accuracy": 100 * correct / len(words.tags), "loss": loss / len(words.tags)}


def _summed_loss(model: nn.Module, inputs: Tensor, tags: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), tags.flatten(), reduction="sum")


def _parts(words: Words, batch: list[int]) -> list[list[int]]:
    """Return a batch in parts that can be read at once."""
    parts = treebank.grouped([words.lengths[i] for i in batch], BUDGET)
    return [[batch[i] for i in part] for part in parts]


def _pad(inputs: Sequence[Tensor], tags: Sequence[Tensor], sentences: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the batch of these sentences."""
    return (
        pad_sequence([inputs[i] for i in sentences], padding_value=UNKNOWN),
        pad_sequence([tags[i] for i in sentences], padding_value=PADDING),
    )
