"""The physical layer: a lane for each input, with a bank of weights, a bank of activations and one multiplier.

All lanes do the same at the same time. What they do is in `Orders`, whose signals they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from amaranth.hdl import Elaboratable, Module, Mux, Signal, Value, signed
from amaranth.lib.memory import Memory

from meprop.chip.design import Design
from meprop.chip.fixed import Format, rounded


class Product(IntEnum):
    """What the multipliers are used for. A product is there in the next cycle."""

    NOTHING = 0
    FORWARD = 1
    """Weight and activation."""
    SQUARE = 2
    """Error and error."""
    DERIVATIVE = 3
    """y and 1 - y, of the layer's outputs y."""
    DELTA = 4
    """Error and derivative."""
    UPDATE = 5
    """The delta that is propagated, and the activation."""
    BACKWARD = 6
    """The delta that is propagated, and the weight."""


class Shown(IntEnum):
    """What a lane shows to the rest of the core when it is chosen."""

    DELTA = 0
    WEIGHT = 1
    ACTIVATION = 2


def of_sum(form: Format, total: Value, fraction: int) -> Value:
    """The logic of `Format.of_sum`."""
    return saturated(form, rounded(total, fraction - form.fraction))


def saturated(form: Format, value: Value) -> Value:
    """The logic of `Format.saturated`."""
    low, high = value < form.lowest, value > form.highest
    return Mux(high, form.highest, Mux(low, form.lowest, value))[: form.word].as_signed()


class Orders:
    """What all lanes are told in a cycle. A write and what is read are there in the next cycle.

    Attributes:
        read: Read the weights of `read_row`, of the best ones if `of_best`.
        write: Write the weights of `write_row`: the updated ones, or if `restore` the best ones that were read.
        write_best: Copy the weights that were read to the best ones, at `write_row`.
        fetch: Read the activations of `vector`.
        product: What the multipliers are used for.
        delta: The delta that is propagated.
        word: What chosen lanes take in.
        chosen: Lanes, one bit each, that of the bias last: they show something, or take `word` in.
        take_weight: Chosen lanes take a weight, at `write_row`.
        take_activation: Chosen lanes take an activation, at `take_vector`.
        take_target: Chosen lanes take a target.
        take_output: Chosen lanes take an output of the net: its error is the sum of it and the negative target.
        clear: Forget errors.
        shown: What chosen lanes show.
    """

    def __init__(self, design: Design) -> None:
        rows, vectors = range(design.rows), range(len(design.widths))
        self.read = Signal()
        self.read_row = Signal(rows)
        self.write = Signal()
        self.restore = Signal()
        self.write_row = Signal(rows)
        self.write_best = Signal()
        self.fetch = Signal()
        self.vector = Signal(vectors)
        self.product = Signal(Product)
        self.delta = Signal(signed(design.word))
        self.word = Signal(signed(design.word))
        self.chosen = Signal(design.lanes + 1)
        self.take_weight = Signal()
        self.take_target = Signal()
        self.take_output = Signal()
        self.take_activation = Signal()
        self.take_vector = Signal(vectors)
        self.clear = Signal()
        self.shown = Signal(Shown)


class Bank(Elaboratable):
    """The weights of one lane, one for each neuron of each layer, and the best of them so far.

    Attributes:
        product: In: of the lane's multiplier, from which a weight's change comes.
        weight: Out: the weight that was read.
    """

    def __init__(self, design: Design, orders: Orders, place: int) -> None:
        self._design, self._orders, self._place = design, orders, place
        self.product = Signal(signed(2 * design.word))
        self.weight = Signal(signed(design.word))

    def elaborate(self, platform: object) -> Module:
        """Return the logic."""
        design, orders = self._design, self._orders
        m = Module()
        m.submodules.weights = weights = block_memory(design.word, design.rows)
        m.submodules.best = best = block_memory(design.word, design.rows)
        reading, writing = weights.read_port(), weights.write_port()
        best_reading, best_writing = best.read_port(), best.write_port()
        changed = self.weight - rounded(self.product, design.update_shift)
        taking = orders.take_weight & orders.chosen[self._place]
        m.d.comb += [
            reading.en.eq(orders.read),
            reading.addr.eq(orders.read_row),
            self.weight.eq(reading.data),
            best_reading.en.eq(orders.read),
            best_reading.addr.eq(orders.read_row),
            writing.en.eq(orders.write | taking),
            writing.addr.eq(orders.write_row),
            writing.data.eq(
                Mux(
                    orders.take_weight,
                    orders.word,
                    Mux(orders.restore, best_reading.data, saturated(design.weight, changed)),
                )
            ),
            best_writing.en.eq(orders.write_best),
            best_writing.addr.eq(orders.write_row),
            best_writing.data.eq(self.weight),
        ]
        return m


class Lane(Elaboratable):
    """One input of the physical layer, which is one neuron of the layer below.

    Attributes:
        product: Out: of the multiplier.
        magnitude: Out: of the delta of the neuron.
        shown: Out: what the lane shows; 0 if it is not chosen.
    """

    def __init__(self, design: Design, orders: Orders, place: int) -> None:
        self._design, self._orders, self._place = design, orders, place
        self.product = Signal(signed(2 * design.word))
        self.magnitude = Signal(design.word)
        self.shown = Signal(design.word)

    def elaborate(self, platform: object) -> Module:
        """Return the logic."""
        design, orders, word = self._design, self._orders, signed(self._design.word)
        m = Module()
        m.submodules.bank = bank = Bank(design, orders, self._place)
        m.submodules.activations = activations = block_memory(design.word, len(design.widths))
        fetching, taking = activations.read_port(), activations.write_port()
        chosen = orders.chosen[self._place]
        activation = Signal(word)
        error = Signal(word)
        derivative = Signal(word)
        delta = Signal(word)
        error_sum = Signal(signed(design.sum_bits))
        finer = design.weight.fraction + design.delta.fraction
        before = Signal(Product)
        m.d.comb += [
            fetching.en.eq(orders.fetch),
            fetching.addr.eq(orders.vector),
            activation.eq(fetching.data),
            taking.en.eq(orders.take_activation & chosen),
            taking.addr.eq(orders.take_vector),
            taking.data.eq(orders.word),
            error.eq(of_sum(design.value, error_sum, finer)),
            bank.product.eq(self.product),
            self.magnitude.eq(abs(delta)),
        ]
        left = Signal(word)
        right = Signal(word)
        with m.Switch(orders.product):
            with m.Case(Product.FORWARD):
                m.d.comb += [left.eq(bank.weight), right.eq(activation)]
            with m.Case(Product.SQUARE):
                m.d.comb += [left.eq(error), right.eq(error)]
            with m.Case(Product.DERIVATIVE):
                m.d.comb += [left.eq(activation), right.eq(design.value.one - activation)]
            with m.Case(Product.DELTA):
                m.d.comb += [left.eq(error), right.eq(derivative)]
            with m.Case(Product.UPDATE):
                m.d.comb += [left.eq(activation), right.eq(orders.delta)]
            with m.Case(Product.BACKWARD):
                m.d.comb += [left.eq(bank.weight), right.eq(orders.delta)]
        m.d.sync += [self.product.eq(left * right), before.eq(orders.product)]
        with m.Switch(before):
            with m.Case(Product.DERIVATIVE):
                m.d.sync += derivative.eq(of_sum(design.delta, self.product, 2 * design.value.fraction))
            with m.Case(Product.DELTA):
                exact = design.value.fraction + design.delta.fraction
                m.d.sync += [delta.eq(of_sum(design.delta, self.product, exact)), error_sum.eq(0)]
            with m.Case(Product.BACKWARD):
                m.d.sync += error_sum.eq(error_sum + self.product)
        with m.If(orders.clear):
            m.d.sync += error_sum.eq(0)
        with m.If(chosen & orders.take_target):
            m.d.sync += error_sum.eq(-(orders.word << (finer - design.value.fraction)))
        with m.If(chosen & orders.take_output):
            m.d.sync += error_sum.eq(error_sum + (orders.word << (finer - design.value.fraction)))
        with m.If(chosen), m.Switch(orders.shown):
            with m.Case(Shown.DELTA):
                m.d.comb += self.shown.eq(delta)
            with m.Case(Shown.WEIGHT):
                m.d.comb += self.shown.eq(bank.weight)
            with m.Case(Shown.ACTIVATION):
                m.d.comb += self.shown.eq(activation)
        return m


class Bias(Elaboratable):
    """The lane of the biases: its activation is 1, so that it needs no multiplier.

    Attributes:
        product: Out: as a lane's.
        shown: Out: the bias that was read, if the lane is chosen.
    """

    def __init__(self, design: Design, orders: Orders) -> None:
        self._design, self._orders = design, orders
        self.product = Signal(signed(2 * design.word))
        self.shown = Signal(design.word)

    def elaborate(self, platform: object) -> Module:
        """Return the logic."""
        design, orders = self._design, self._orders
        m = Module()
        m.submodules.bank = bank = Bank(design, orders, design.lanes)
        factor = Signal(signed(design.word))
        with m.Switch(orders.product):
            with m.Case(Product.FORWARD):
                m.d.comb += factor.eq(bank.weight)
            with m.Case(Product.UPDATE):
                m.d.comb += factor.eq(orders.delta)
        m.d.sync += self.product.eq(factor << design.value.fraction)
        m.d.comb += [
            bank.product.eq(self.product),
            self.shown.eq(Mux(orders.chosen[design.lanes], bank.weight, 0)),
        ]
        return m


class AdderTree(Elaboratable):
    """Sums the products of all lanes, with a register after each level of adders.

    Attributes:
        total: Out: the sum, `levels` cycles after its terms.
        levels: Of adders.
    """

    def __init__(self, terms: Sequence[Value]) -> None:
        self._terms = terms
        self.levels = levels_of(len(terms))
        self.total = Signal(signed(max(len(each) for each in terms) + self.levels))

    def elaborate(self, platform: object) -> Module:
        """Return the logic."""
        m = Module()
        terms = list(self._terms)
        for level in range(self.levels):
            pairs = [terms[place : place + 2] for place in range(0, len(terms), 2)]
            terms = [Signal(signed(len(self._terms[0]) + level + 1), name=f"level{level}") for _ in pairs]
            m.d.sync += [sum_.eq(sum(pair[1:], pair[0])) for sum_, pair in zip(terms, pairs, strict=True)]
        m.d.comb += self.total.eq(terms[0])
        return m


def levels_of(terms: int) -> int:
    """How many levels of adders sum so many terms."""
    return (terms - 1).bit_length()


def block_memory(word: int, depth: int) -> Memory:
    """A memory of signed words in block RAM, even where it is small, so that more layers need no more logic."""
    return Memory(shape=signed(word), depth=depth, init=[], attrs={"ram_style": "block"})
