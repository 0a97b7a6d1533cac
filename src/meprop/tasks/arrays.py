"""A treebank in numbers: what stands for words, tags, relations and transitions, and sentences as arrays of that."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meprop.tasks.transitions import CHILDREN, LEFT, RIGHT, ROOT, SHIFT, Configurations, Integers
from meprop.tasks.treebank import Sentence

TagColumn = Literal["xpos", "upos"]


class Symbols:
    """Numbers for words, for tags or for relations; those of all three together index one table of embeddings.

    Args:
        first: the smallest number.
        known: the symbols that get a number of their own.
    """

    def __init__(self, first: int, known: Iterable[str]) -> None:
        self.nothing, self.root, self.unknown = range(first, first + 3)
        self._numbers = {symbol: number for number, symbol in enumerate(sorted(set(known)), start=first + 3)}
        self.end = first + 3 + len(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, symbol: str) -> int:
        return self._numbers.get(symbol, self.unknown)


class Vocabulary:
    """What the numbers in the data stand for.

    Words that occur only once in training have no number of their own: they teach the parser what to make of unknown
    ones.

    Args:
        sentences: the training sentences.
        tag_column: which tags to use.

    Attributes:
        kinds: what each transition does ``[T]``: shift, left, right or root.
        given: the relation that each transition gives to a word ``[T]``.
    """

    def __init__(self, sentences: Sequence[Sentence], tag_column: TagColumn) -> None:
        self.tag_column: TagColumn = tag_column
        counts = Counter(form for sentence in sentences for form in sentence.forms)
        self.words = Symbols(0, (form for form, count in counts.items() if count > 1))
        self.tags = Symbols(self.words.end, (tag for sentence in sentences for tag in tags_of(sentence, tag_column)))
        arcs = {
            (relation, head > 0)
            for sentence in sentences
            for relation, head in zip(relations_of(sentence), sentence.heads, strict=True)
        }
        self.relations = Symbols(self.tags.end, (relation for relation, _ in arcs))
        between_words = sorted(self.relations[relation] for relation, has_parent in arcs if has_parent)
        from_root = sorted(self.relations[relation] for relation, has_parent in arcs if not has_parent)
        transitions = [
            (SHIFT, self.relations.nothing),
            *((kind, relation) for kind in (LEFT, RIGHT) for relation in between_words),
            *((ROOT, relation) for relation in from_root),
        ]
        self.kinds, self.given = np.array(transitions, np.int32).T


class Sentences:
    """Sentences as arrays ``[S, W]``: in column 0 the root, then the words, then nothing, in the last column always.

    Attributes:
        lengths: words in each sentence ``[S]``.
        words, tags, relations: int32, by the vocabulary.
        heads: int32; -1 where there is no word.
        punctuation: where the universal tag is PUNCT.
    """

    def __init__(self, sentences: Sequence[Sentence], vocabulary: Vocabulary) -> None:
        self.lengths = np.array([len(sentence.forms) for sentence in sentences], np.int32)
        shape = (len(sentences), int(self.lengths.max()) + 2)
        column = np.arange(shape[1])
        is_word = (column > 0) & (column <= self.lengths[:, None])

        def numbered(symbols: Symbols, of: Callable[[Sentence], Iterable[str]]) -> NDArray[np.int32]:
            numbers = np.full(shape, symbols.nothing, np.int32)
            numbers[:, 0] = symbols.root
            numbers[is_word] = [symbols[symbol] for sentence in sentences for symbol in of(sentence)]
            return numbers

        self.words = numbered(vocabulary.words, lambda sentence: sentence.forms)
        self.tags = numbered(vocabulary.tags, lambda sentence: tags_of(sentence, vocabulary.tag_column))
        self.relations = numbered(vocabulary.relations, relations_of)
        self.heads = np.full(shape, -1, np.int32)
        self.heads[is_word] = [head for sentence in sentences for head in sentence.heads]
        self.punctuation = np.zeros(shape, np.bool_)
        self.punctuation[is_word] = [tag == "PUNCT" for sentence in sentences for tag in sentence.upos]

    def features(
        self, rows: Integers, configurations: Configurations, relations: NDArray[np.int32]
    ) -> NDArray[np.int32]:
        """Return what the parser sees ``[R, 48]``: 18 words, their tags, and the relations of the last 12.

        Args:
            rows: the numbers of the sentences ``[R]``.
            configurations: those of all sentences.
            relations: of all words ``[S, W]``; those of words without a head so far are not looked at.
        """
        row, positions = rows[:, None], configurations.positions(rows)
        children = positions[:, -CHILDREN:]
        return np.concatenate((self.words[row, positions], self.tags[row, positions], relations[row, children]), axis=1)


def tags_of(sentence: Sentence, column: TagColumn) -> tuple[str, ...]:
    """Return the tag of each word."""
    return sentence.xpos if column == "xpos" else sentence.upos


def relations_of(sentence: Sentence) -> list[str]:
    """Return the universal part of each word's relation."""
    return [deprel.partition(":")[0] for deprel in sentence.deprels]
