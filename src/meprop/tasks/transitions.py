"""The arc-standard transition system: how a parser builds a tree word by word (Nivre, 2004), and what it looks at.

Words are known by their positions in the sentence: 1 to n; 0 is the root. A configuration is a stack, a buffer of the
words to come, and the arcs so far. It begins with the root on the stack, and each transition does one of four things:

    SHIFT   the first word of the buffer goes on the stack
    LEFT    the second word of the stack gets the top as its head, and leaves
    RIGHT   the top gets the second as its head, and leaves
    ROOT    the last word gets the root as its head: the tree is complete

ROOT is the RIGHT of other descriptions where the second is the root. Allowed only at the end, it makes every outcome a
tree with exactly one word under the root, after exactly 2n transitions.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHIFT, LEFT, RIGHT, ROOT = range(4)

POSITIONS = 18
"""How many words `Configurations.positions` looks at."""
CHILDREN = 12
"""How many of them, the last ones, have a head already."""

Integers = NDArray[np.integer[Any]]


def oracle(heads: Sequence[int]) -> list[tuple[int, int]] | None:
    """Return the transitions that build a tree; where several orders do, arcs come as early as they can.

    Args:
        heads: of word 1, word 2, ...; 0 is the root.

    Returns:
        Kinds and the words that they are about: the one shifted, or the one that gets its head. None if no transitions
        build the tree: it is not projective (arcs cross), or no tree with one word under the root.
    """
    heads = (-2, *heads)
    waiting = Counter(heads)  # children that have no head yet
    stack, following = [-1, 0], 1  # below the root, nothing
    transitions: list[tuple[int, int]] = []
    while len(stack) > 2 or following < len(heads):
        second, top = stack[-2:]
        if second > 0 and heads[second] == top:
            kind, word = LEFT, stack.pop(-2)
        elif heads[top] == second and not waiting[top] and (second > 0 or following == len(heads)):
            kind, word = RIGHT if second else ROOT, stack.pop()
        elif following < len(heads):
            kind, word = SHIFT, following
            stack.append(word)
            following += 1
        else:
            return None
        if kind != SHIFT:
            waiting[heads[word]] -= 1
        transitions.append((kind, word))
    return transitions


class Configurations:
    """The configurations of many sentences at once, all of them advanced by the same calls.

    Methods take `rows`, the numbers of the sentences that they are about, and arrays with an entry for each.

    Args:
        lengths: words in each sentence ``[S]``, at least 1.

    Attributes:
        heads: the head of each position ``[S, W]``; -1 where there is none yet. W is the longest length plus 2.
    """

    def __init__(self, lengths: Integers) -> None:
        # The last column belongs to no word. Position -1, which says "nothing", leads there, so that the children of
        # nothing are nothing without asking.
        shape = (len(lengths), int(lengths.max()) + 2)
        self.heads = np.full(shape, -1, np.int32)
        self._lengths = lengths
        self._next = np.ones(len(lengths), np.int32)  # the first word of the buffer
        self._stack = np.full((shape[0], shape[1] + 1), -1, np.int32)  # below the root, two of nothing
        self._stack[:, 2] = 0
        self._top = np.full(len(lengths), 2)
        # The outermost child on each side, and the one next to it.
        self._left, self._left2, self._right, self._right2 = (np.full(shape, -1, np.int32) for _ in range(4))

    def positions(self, rows: Integers) -> NDArray[np.int32]:
        """Return the words that decide the next transition, after Chen and Manning (2014).

        Returns:
            ``[R, 18]``, -1 where there is no such word: the top three of the stack (s1, s2, s3) and the first three of
            the buffer; then of s1 and s2 each the leftmost child, the rightmost, the second leftmost, the second
            rightmost, the leftmost of the leftmost and the rightmost of the rightmost. A left child is one that stands
            to the left of its head.
        """
        row = rows[:, None]
        stack = self._stack[row, self._top[row] - np.arange(3)]
        coming = self._next[row] + np.arange(3, dtype=np.int32)
        buffer = np.where(coming <= self._lengths[row], coming, -1)
        parents = stack[:, :2]
        left, right = self._left[row, parents], self._right[row, parents]
        second = (self._left2[row, parents], self._right2[row, parents])
        outer = (self._left[row, left], self._right[row, right])
        return np.concatenate((stack, buffer, left, right, *second, *outer), axis=1)

    def allowed(self, rows: Integers) -> NDArray[np.bool_]:
        """Return which kinds of transitions are possible ``[R, 4]``: at least one, until the tree is complete."""
        words = self._top[rows] - 2  # on the stack, without the root
        more = self._next[rows] <= self._lengths[rows]
        return np.stack((more, words > 1, words > 1, (words == 1) & ~more), axis=1)

    def advance(self, rows: Integers, kinds: Integers) -> NDArray[np.int32]:
        """Do one transition, an allowed one, in each of the sentences.

        Returns:
            The word that it was about ``[R]``: the one shifted, or the one that got its head.
        """
        top, second = self._stack[rows, self._top[rows]], self._stack[rows, self._top[rows] - 1]
        words = np.select([kinds == SHIFT, kinds == LEFT], [self._next[rows], second], top)

        shift = rows[kinds == SHIFT]
        self._top[shift] += 1
        self._stack[shift, self._top[shift]] = self._next[shift]
        self._next[shift] += 1

        for nearest, next_to_it, of in (
            (self._left, self._left2, kinds == LEFT),
            (self._right, self._right2, (kinds == RIGHT) | (kinds == ROOT)),
        ):
            row, word, head = rows[of], words[of], np.where(kinds == LEFT, top, second)[of]
            self.heads[row, word] = head
            next_to_it[row, head] = nearest[row, head]  # children come from the inside out
            nearest[row, head] = word
            self._top[row] -= 1
            self._stack[row, self._top[row]] = head
        return words
