"""Two units of the core beside its lanes: the sigmoid, and the selection of the largest deltas."""

from __future__ import annotations

from collections.abc import Sequence

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, Value, signed
from amaranth.lib.memory import Memory

from meprop.chip.design import Design
from meprop.chip.fixed import SEGMENTS, Sigmoid, rounded


class SigmoidUnit(Elaboratable):
    """The logic of `Sigmoid`: a result each cycle, two cycles after its argument.

    Attributes:
        argument: In.
        value: Out.
    """

    def __init__(self, design: Design) -> None:
        self._design = design
        self.argument = Signal(signed(design.argument.word))
        self.value = Signal(signed(design.word))

    def elaborate(self, platform: object) -> Module:
        """Return the logic."""
        table, one = Sigmoid(self._design.argument, self._design.value), self._design.value.one
        start_bits, rise_bits = one.bit_length(), int(table.rises.max()).bit_length()
        entries = [int(start) | int(rise) << start_bits for start, rise in zip(table.starts, table.rises, strict=True)]
        m = Module()
        m.submodules.table = memory = Memory(
            shape=start_bits + rise_bits, depth=SEGMENTS, init=entries, attrs={"ram_style": "block"}
        )
        looking_up = memory.read_port()
        magnitude = Signal(self._design.argument.word - 1)
        size, negative, place = abs(self.argument), Signal(), Signal(table.within)
        highest = self._design.argument.highest
        m.d.comb += [
            magnitude.eq(Mux(size > highest, highest, size)),
            looking_up.addr.eq(magnitude >> table.within),
        ]
        m.d.sync += [place.eq(magnitude), negative.eq(self.argument < 0)]
        start, rise = looking_up.data[:start_bits], looking_up.data[start_bits:]
        positive = start + rounded(rise * place, table.within)
        m.d.sync += self.value.eq(Mux(negative, one - positive, positive))
        return m


class Selector(Elaboratable):
    """Finds the k largest magnitudes bit by bit, then hands them out one by one.

    A candidate whose bit is 0 is dropped where enough others have a 1. Where too few have one, those are among the
    largest, and the others go on. After the lowest bit the remaining candidates are equal. The lower ones of them fill
    up the count.

    Attributes:
        start: In: begin with `candidates`, one bit for each lane, and keep `count` of them, all if `all`.
        narrow: In: look at the next bit, from the highest to the lowest.
        take: In: `pick` is done.
        pick: Out: one bit for the lane to be handled next.
        index: Out: its number.
    """

    def __init__(self, magnitudes: Sequence[Value]) -> None:
        self._magnitudes = magnitudes
        lanes = len(magnitudes)
        self.start = Signal()
        self.all = Signal()
        self.narrow = Signal()
        self.take = Signal()
        self.candidates = Signal(lanes)
        self.count = Signal(range(lanes + 1))
        self.pick = Signal(lanes)
        self.index = Signal(range(lanes))

    def elaborate(self, platform: object) -> Module:
        """Return the logic."""
        lanes, word = len(self._magnitudes), len(self._magnitudes[0])
        m = Module()
        surely = Signal(lanes)
        maybe = Signal(lanes)
        missing = Signal(range(lanes + 1))
        bit = Signal(word)
        ones = Signal(lanes)
        m.d.comb += ones.eq(maybe & Cat(*((each & bit).any() for each in self._magnitudes)))
        found = Signal(range(lanes + 1))
        m.d.comb += found.eq(sum_of_bits(ones))
        with m.If(self.start):
            m.d.sync += [
                surely.eq(Mux(self.all, self.candidates, 0)),
                maybe.eq(self.candidates),
                missing.eq(self.count),
                bit.eq(1 << (word - 1)),
            ]
        with m.If(self.narrow):
            m.d.sync += bit.eq(bit >> 1)
            with m.If(found >= missing):
                m.d.sync += maybe.eq(ones)
            with m.Else():
                m.d.sync += [surely.eq(surely | ones), maybe.eq(maybe & ~ones), missing.eq(missing - found)]
        source = Signal(lanes)
        m.d.comb += [
            source.eq(Mux(surely.any(), surely, maybe)),
            self.pick.eq(source & -source),
            self.index.eq(index_of(self.pick)),
        ]
        with m.If(self.take):
            m.d.sync += [surely.eq(surely & ~self.pick), maybe.eq(maybe & ~self.pick)]
        return m


def sum_of_bits(bits: Value) -> Value:
    """How many bits are 1, by a tree of adders."""
    terms: list[Value] = [bits[place] for place in range(len(bits))]
    while len(terms) > 1:
        pairs = [terms[place : place + 2] for place in range(0, len(terms), 2)]
        terms = [pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
    return terms[0]


def index_of(one_hot: Value) -> Value:
    """The number of the only bit that is 1."""
    places = range(len(one_hot))
    bits = max(1, (len(one_hot) - 1).bit_length())
    return Cat(*(Cat(*(one_hot[place] for place in places if place >> bit & 1)).any() for bit in range(bits)))
