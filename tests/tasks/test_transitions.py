"""The transition system against brute force on all small trees, and many sentences at once against one at a time."""

from itertools import product

import numpy as np
import pytest

from meprop.tasks.transitions import LEFT, RIGHT, ROOT, SHIFT, Configurations, oracle


class Literal:
    """One sentence's configuration, as the definition has it."""

    def __init__(self, length):
        self.stack, self.buffer, self.heads = [0], list(range(1, length + 1)), {}

    def allowed(self):
        words = len(self.stack) - 1
        return [bool(self.buffer), words >= 2, words >= 2, words == 1 and not self.buffer]

    def advance(self, kind):
        if kind == SHIFT:
            word = self.buffer.pop(0)
            self.stack.append(word)
        elif kind == LEFT:
            word = self.stack.pop(-2)
            self.heads[word] = self.stack[-1]
        else:
            word = self.stack.pop()
            self.heads[word] = self.stack[-1]
        return word

    def positions(self):
        def first(words, count):
            return (list(words) + [-1] * count)[:count]

        def left(parent, which):
            children = sorted(word for word, head in self.heads.items() if head == parent and word < parent)
            return first(children, 2)[which]

        def right(parent, which):
            children = sorted(word for word, head in self.heads.items() if head == parent and word > parent)
            return first(reversed(children), 2)[which]

        stack = first(reversed(self.stack), 3)
        s1, s2 = stack[:2]
        return [
            *stack,
            *first(self.buffer, 3),
            left(s1, 0), left(s2, 0), right(s1, 0), right(s2, 0),
            left(s1, 1), left(s2, 1), right(s1, 1), right(s2, 1),
            left(left(s1, 0), 0), left(left(s2, 0), 0), right(right(s1, 0), 0), right(right(s2, 0), 0),
        ]  # fmt: skip


def ancestors(heads, word):
    """The way from a word to the root, both included; None if it is a circle."""
    way = [word]
    while way[-1] != 0:
        way.append(heads[way[-1] - 1])
        if len(way) > len(heads) + 1:
            return None
    return way


def is_tree(heads):
    return list(heads).count(0) == 1 and all(ancestors(heads, word) for word in range(1, len(heads) + 1))


def is_projective(heads):
    """Each word between a word and its head descends from the head."""
    return all(
        head in ancestors(heads, between)
        for word, head in enumerate(heads, start=1)
        for between in range(min(word, head) + 1, max(word, head))
    )


def candidates(length):
    return list(product(range(length + 1), repeat=length))


def trees(length):
    return [heads for heads in candidates(length) if is_tree(heads)]


def outcomes(length):
    """The trees that all sequences of allowed transitions lead to."""
    results = []

    def follow(kinds):
        literal = Literal(length)
        for kind in kinds:
            literal.advance(kind)
        possible = [kind for kind, allowed in enumerate(literal.allowed()) if allowed]
        if not possible:
            assert len(kinds) == 2 * length
            results.append(tuple(literal.heads[word] for word in range(1, length + 1)))
        for kind in possible:
            follow([*kinds, kind])

    follow([])
    return results


LENGTHS = range(1, 6)


@pytest.mark.parametrize(("length", "count"), [(1, 1), (2, 2), (3, 9), (4, 64), (5, 625)])
def test_the_enumeration_is_complete(length, count):
    assert len(trees(length)) == count  # Cayley: n^(n-1)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_oracle_rebuilds_exactly_the_projective_trees(length):
    for heads in trees(length):
        steps = oracle(heads)
        if not is_projective(heads):
            assert steps is None, heads
            continue
        assert steps is not None, heads
        assert len(steps) == 2 * length
        literal = Literal(length)
        for kind, word in steps:
            assert literal.allowed()[kind]
            assert literal.advance(kind) == word
        assert tuple(literal.heads[word] for word in range(1, length + 1)) == heads


@pytest.mark.parametrize("length", LENGTHS)
def test_the_oracle_refuses_what_is_no_tree(length):
    for heads in candidates(length):
        assert is_tree(heads) or oracle(heads) is None, heads


@pytest.mark.parametrize("length", LENGTHS)
def test_the_transitions_reach_the_projective_trees_and_nothing_else(length):
    assert set(outcomes(length)) == {heads for heads in trees(length) if is_projective(heads)}


def test_arcs_come_as_early_as_they_can():
    #       the cat saw me: 2 -> 1, 3 -> 2, 3 -> 4
    assert oracle((2, 3, 0, 3)) == [
        (SHIFT, 1), (SHIFT, 2), (LEFT, 1), (SHIFT, 3), (LEFT, 2), (SHIFT, 4), (RIGHT, 4), (ROOT, 3)
    ]  # fmt: skip


def test_the_oracle_rebuilds_long_trees():
    random = np.random.default_rng(0)
    for length in range(6, 60):
        literal = Literal(length)
        while any(allowed := literal.allowed()):
            literal.advance(random.choice(np.flatnonzero(allowed)))
        heads = [literal.heads[word] for word in range(1, length + 1)]
        again = Literal(length)
        for kind, _ in oracle(heads):
            again.advance(kind)
        assert again.heads == literal.heads


def test_the_positions_of_a_configuration():
    configurations = Configurations(np.array([9]))
    rows = np.array([0])
    # Arcs 2 -> 1 and 3 -> 2, then 6 -> 5 and 6 -> 4, then 6 -> 7; words 8 and 9 are to come.
    for kind in (SHIFT, SHIFT, LEFT, SHIFT, LEFT, SHIFT, SHIFT, SHIFT, LEFT, LEFT, SHIFT, RIGHT):
        configurations.advance(rows, np.array([kind]))
    none = -1
    assert configurations.positions(rows).tolist() == [[
        6, 3, 0,  # the stack
        8, 9, none,  # the buffer
        4, 2, 7, none,  # leftmost children of 6 and 3, rightmost children
        5, none, none, none,  # the second ones
        none, 1, none, none,  # leftmost of leftmost, rightmost of rightmost
    ]]  # fmt: skip
    assert configurations.heads[0, 1:10].tolist() == [2, 3, none, 6, 6, none, 6, none, none]


def test_many_sentences_at_once_are_as_one_at_a_time():
    random = np.random.default_rng(0)
    lengths = np.array([1, 2, 3, 17, 40, 40, 5, 1, 12, 25] * 3)
    configurations = Configurations(lengths)
    literals = [Literal(length) for length in lengths]
    unfinished = set(range(len(lengths)))
    seen = set()
    while unfinished:
        rows = random.permutation(sorted(unfinished))[: random.integers(1, len(unfinished) + 1)]
        allowed = configurations.allowed(rows)
        assert allowed.tolist() == [literals[row].allowed() for row in rows]
        assert configurations.positions(rows).tolist() == [literals[row].positions() for row in rows]
        kinds = np.array([random.choice(np.flatnonzero(choice)) for choice in allowed])
        assert configurations.advance(rows, kinds).tolist() == [
            literals[row].advance(kind) for row, kind in zip(rows, kinds, strict=True)
        ]
        seen |= {tuple(np.array(literals[row].positions()) >= 0) for row in rows}
        unfinished -= {row for row in rows if not any(literals[row].allowed())}
    assert np.array(sorted(seen)).any(axis=0).all()  # each of the 18 was there at some time
    for row, literal in enumerate(literals):
        expected = [-1] * configurations.heads.shape[1]
        for word, head in literal.heads.items():
            expected[word] = head
        assert configurations.heads[row].tolist() == expected
        assert not configurations.allowed(np.array([row])).any()
