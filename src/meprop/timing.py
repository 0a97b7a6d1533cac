"""Timing several ways of doing one thing in turns, so that what disturbs one of them disturbs all."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable, Mapping
from time import perf_counter


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    least: int,
    most: int | None = None,
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Calls all sides once a round, each round in a new order, until the time is spent.

    The order is drawn from a generator of its own: it is the same on every run, and Python's and torch's random states
    stay as they are. A first round is not timed, because first calls allocate. What a side returns is freed after its
    clock has stopped.

    Args:
        sides: What to time, by name.
        seconds: To spend on all sides together, without the first round.
        least: Rounds that are made in any case, however long they take.
        most: Rounds after which the time need not be spent; None: there is no such number.
        synchronize: Waits until the device is idle; called before a clock starts and before it stops. It is
            ``torch.cuda.synchronize`` for sides that run on a GPU.

    Returns:
        The seconds of each timed call, by the side's name.

    Example:
        >>> spent = interleaved({"add": lambda: 1 + 1, "power": lambda: 2**9}, 0.0, least=5)
        >>> {name: len(calls) for name, calls in spent.items()}
        {'add': 5, 'power': 5}
    """
    for run in sides.values():
        run()
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for order in rounds(sides, seconds, least=least, most=most):
        for name in order:
            run = sides[name]
            synchronize()
            start = perf_counter()
            result = run()
            synchronize()
            spent[name].append(perf_counter() - start)
            del result
    return spent


def rounds(names: Iterable[str], seconds: float, *, least: int, most: int | None = None) -> Generator[list[str]]:
    """Yields the names, each time in a new order, until the time is spent. What is timed happens in between.

    The orders are those of a generator of its own. They are the same on every run.

    Args:
        names: Of the sides.
        seconds: To spend on all rounds together.
        least: Rounds that are made in any case, however long they take.
        most: Rounds after which the time need not be spent; None: there is no such number.
    """
    shuffle = random.Random(0).shuffle
    order, made, end = list(names), 0, perf_counter() + seconds
    while made < least or (perf_counter() < end and (most is None or made < most)):
        shuffle(order)
        yield list(order)
        made += 1
