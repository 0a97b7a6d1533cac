"""The core: one physical layer, used again for every layer, forward and backward, and the control that does so.

It takes a stream of words and gives a stream of words. A command is a word, `Command`, and what follows it.
"""

from __future__ import annotations

from enum import IntEnum

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value, signed

from meprop.chip.design import Design
from meprop.chip.lane import AdderTree, Bias, Lane, Orders, Product, Shown, of_sum
from meprop.chip.units import Selector, SigmoidUnit

__all__ = ["Command", "Core"]


class Command(IntEnum):
    """What the core does, with the words that it takes and gives then. Any other word is no command and is skipped."""

    LOAD = 0
    """Takes all weights: of each row those of the lanes, and the bias. Places without an input take 0. Gives none."""
    TRAIN = 1
    """Takes inputs and targets, trains on them, and gives the sum of the squared errors before that."""
    VALIDATE = 2
    """Takes inputs and targets, and gives the outputs and the sum of their squared errors, which the core adds up."""
    JUDGE = 3
    """Keeps the weights if the errors of all validations since the last judgement are the smallest so far. Gives the
    number of judgements since those of the kept weights. At `patience` the port `stop` is 1."""
    RESTORE = 4
    """Goes back to the kept weights, if any were kept. Gives the same number."""
    READ = 5
    """Gives all weights, in the order of LOAD."""


class Core(Elaboratable):
    """The core of a design. All ports belong to the clock domain "sync".

    A word passes in a cycle in which its stream is both valid and ready.

    Args:
        design: What it is made for.

    Attributes:
        taken: In: a word for the core.
        taken_valid: In.
        taken_ready: Out.
        given: Out: a word of the core.
        given_valid: Out.
        given_ready: In.
        patience: In: judgements without a smaller error, after which `stop` is 1.
        stop: Out.
    """

    ERRORS_BITS = 20
    """At most 2^20 patterns are validated before a judgement."""

    def __init__(self, design: Design) -> None:
        self.design = design
        self.taken = Signal(signed(design.word))
        self.taken_valid = Signal()
        self.taken_ready = Signal()
        self.given = Signal(signed(design.sum_bits))
        self.given_valid = Signal()
        self.given_ready = Signal()
        self.patience = Signal(8, init=20)
        self.stop = Signal()
        self.orders = orders = Orders(design)
        self._lanes = [Lane(design, orders, place) for place in range(design.lanes)]
        self._bias = Bias(design, orders)
        self._tree = AdderTree([*(lane.product for lane in self._lanes), self._bias.product])
        self._sigmoid = SigmoidUnit(design)
        self.selector = Selector([lane.magnitude for lane in self._lanes])
        # Where the control is: the layer, its first row of weights, a row, and a place in a vector.
        self.layer = Signal(range(design.layers + 1))
        self._base = Signal(range(design.rows))
        self._row = Signal(range(design.rows))
        self._place = Signal(range(design.lanes + 1))
        self._done = Signal(range(design.lanes + 1))
        self._command = Signal(3)
        # What passes through the pipeline.
        self._forward = Signal()
        self._picked = Signal()
        self._written = Signal()
        self._copied = Signal()
        self._left = Signal(range(max(design.lanes, design.word) + 1))
        self._shown = Signal(signed(design.word))
        self._error = Signal(design.sum_bits)
        self._has_error = Signal()
        errors = design.sum_bits + self.ERRORS_BITS
        self._errors = Signal(errors)
        self._best = Signal(errors)
        self._kept = Signal()
        self._since = Signal(8)

    @property
    def ports(self) -> list[Signal]:
        """The ports, without clock and reset."""
        taken = [self.taken, self.taken_valid, self.taken_ready]
        return [*taken, self.given, self.given_valid, self.given_ready, self.patience, self.stop]

    def elaborate(self, platform: object) -> Module:
        """Return the logic."""
        m = Module()
        m.submodules += [*self._lanes, self._bias, self._tree, self._sigmoid, self.selector]
        self._wire_pipeline(m)
        with m.FSM(init="COMMAND"):
            self._take_command(m)
            self._take_pattern(m)
            self._go_forward(m)
            self._go_backward(m)
            self._reply(m)
            self._move_weights(m)
        return m

    @property
    def _is_last(self) -> Value:
        return self.layer == self.design.layers

    @property
    def _is_training(self) -> Value:
        return self._command == Command.TRAIN

    def _of_layer(self, hidden: int, last: int) -> Value:
        """A constant of the layer that is worked at."""
        bits = max(hidden, last).bit_length()
        return Mux(self._is_last, Const(last, bits), Const(hidden, bits))

    def _choose(self, place: Value) -> Value:
        """The bit of a lane."""
        return (Const(1, self.design.lanes + 1) << place)[: self.design.lanes + 1]

    def _wire_pipeline(self, m: Module) -> None:
        """What happens in every state: products, what comes out of the sigmoid, and updates of weights."""
        design, orders, tree = self.design, self.orders, self._tree
        shown = Signal(design.word)
        m.d.comb += [
            shown.eq(any_of([*(lane.shown for lane in self._lanes), self._bias.shown])),
            self._shown.eq(shown),
            orders.read_row.eq(self._row),
            orders.write_row.eq(Mux(orders.take_weight, self._row, self._written_row(m))),
            self.stop.eq(self._since >= self.patience),
        ]
        with m.If(self._picked):  # a delta: its weights are read, and it is multiplied with the activations
            m.d.comb += [orders.product.eq(Product.UPDATE), orders.read.eq(1)]
        with m.Elif(self._written & (self.layer != 0)):  # and in the next cycle with the weights
            m.d.comb += orders.product.eq(Product.BACKWARD)
        with m.Elif(self._forward):
            m.d.comb += orders.product.eq(Product.FORWARD)
        m.d.comb += orders.write.eq(self._written | (self._copied & orders.restore))
        m.d.comb += orders.write_best.eq(self._copied & ~orders.restore)
        m.d.sync += [self._forward.eq(0), self._picked.eq(0), self._written.eq(self._picked), self._copied.eq(0)]

        summed = Signal(tree.levels + 1)
        squared = Signal(tree.levels + 1)
        m.d.sync += summed.eq(Cat(orders.product == Product.FORWARD, summed))
        m.d.sync += squared.eq(Cat(orders.product == Product.SQUARE, squared))
        fraction = design.weight.fraction + design.value.fraction
        activated = Signal(3)
        m.d.sync += self._sigmoid.argument.eq(of_sum(design.argument, tree.total, fraction))
        m.d.sync += activated.eq(Cat(summed[-1], activated))
        with m.If(activated[-1]):
            m.d.comb += [
                orders.word.eq(self._sigmoid.value),
                orders.chosen.eq(self._choose(self._done)),
                orders.take_activation.eq(1),
                orders.take_vector.eq(self.layer + 1),
                orders.take_output.eq(self._is_last),
            ]
            m.d.sync += self._done.eq(self._done + 1)
        with m.If(squared[-1]):
            m.d.sync += [self._error.eq(tree.total), self._has_error.eq(1)]

    def _written_row(self, m: Module) -> Signal:
        """The row that was read in the last cycle."""
        row = Signal(range(self.design.rows))
        m.d.sync += row.eq(self._row)
        return row

    def _take_command(self, m: Module) -> None:
        with m.State("COMMAND"):
            m.d.comb += [self.taken_ready.eq(1), self.orders.clear.eq(1)]
            m.d.sync += [self._command.eq(self.taken), self._has_error.eq(0)]
            m.d.sync += [each.eq(0) for each in (self.layer, self._base, self._row, self._place)]
            with m.If(self.taken_valid), m.Switch(self.taken):
                for command, state in {
                    Command.LOAD: "LOAD",
                    Command.TRAIN: "INPUTS",
                    Command.VALIDATE: "INPUTS",
                    Command.JUDGE: "JUDGE",
                    Command.RESTORE: "RESTORE",
                    Command.READ: "READ",
                }.items():
                    with m.Case(command):
                        m.next = state

    def _take_pattern(self, m: Module) -> None:
        orders, place = self.orders, self._place
        for state, count, then in (
            ("INPUTS", self.design.inputs, "TARGETS"),
            ("TARGETS", self.design.outputs, "FETCH"),
        ):
            with m.State(state):
                m.d.comb += [
                    self.taken_ready.eq(1),
                    orders.word.eq(self.taken),
                    orders.chosen.eq(Mux(self.taken_valid, self._choose(place), 0)),
                    (orders.take_activation if state == "INPUTS" else orders.take_target).eq(1),
                ]
                with m.If(self.taken_valid):
                    self._count(m, count, then)

    def _count(self, m: Module, count: int, then: str) -> None:
        """Go on to the next place, or after so many of them to another state, at the first place."""
        with m.If(self._place == count - 1):
            m.d.sync += self._place.eq(0)
            m.next = then
        with m.Else():
            m.d.sync += self._place.eq(self._place + 1)

    def _count_row(self, m: Module, then: str) -> None:
        """Go on to the next place of a row; after the last one to the next row and a state; after all rows, be done."""
        self._count(m, self.design.lanes + 1, then)
        with m.If(self._place == self.design.lanes):
            m.d.sync += self._row.eq(self._row + 1)
            with m.If(self._row == self.design.rows - 1):
                m.next = "COMMAND"

    def _go_forward(self, m: Module) -> None:
        design, orders = self.design, self.orders
        width = self._of_layer(design.neurons, design.outputs)
        with m.State("FETCH"):
            m.d.comb += [orders.fetch.eq(1), orders.vector.eq(self.layer)]
            m.d.sync += [self._row.eq(self._base), self._done.eq(0), self._left.eq(width)]
            m.next = "FORWARD"
        with m.State("FORWARD"):  # a neuron each cycle
            m.d.comb += orders.read.eq(1)
            m.d.sync += [self._forward.eq(1), self._row.eq(self._row + 1), self._left.eq(self._left - 1)]
            with m.If(self._left == 1):
                m.next = "DRAIN"
        with m.State("DRAIN"), m.If(orders.take_activation & (self._done == width - 1)):
            with m.If(self._is_last):
                m.next = "SQUARE"
            with m.Else():
                m.d.sync += [self.layer.eq(self.layer + 1), self._base.eq(self._base + design.neurons)]
                m.next = "FETCH"
        with m.State("SQUARE"):
            m.d.comb += [
                orders.product.eq(Product.SQUARE),
                orders.fetch.eq(1),
                orders.vector.eq(design.layers + 1),
            ]
            m.next = "OUTPUTS"
            with m.If(self._is_training):
                m.next = "DERIVATIVE"

    def _go_backward(self, m: Module) -> None:
        design, orders, selector = self.design, self.orders, self.selector
        hidden, last = design.kept(design.neurons), design.kept(design.outputs)
        all_of = self._of_layer(int(hidden == design.neurons), int(last == design.outputs))
        kept = self._of_layer(hidden, last)
        m.d.comb += [
            selector.candidates.eq(self._of_layer((1 << design.neurons) - 1, (1 << design.outputs) - 1)),
            selector.count.eq(kept),
            selector.all.eq(all_of),
        ]
        with m.State("DERIVATIVE"):
            m.d.comb += orders.product.eq(Product.DERIVATIVE)
            m.next = "BELOW"
        with m.State("BELOW"):
            m.d.comb += [orders.fetch.eq(1), orders.vector.eq(self.layer)]
            m.next = "DELTA"
        with m.State("DELTA"):
            m.d.comb += orders.product.eq(Product.DELTA)
            m.next = "START"
        with m.State("START"):
            m.d.comb += selector.start.eq(1)
            m.d.sync += self._left.eq(Mux(all_of, kept, design.word))
            m.next = "SELECT"
            with m.If(all_of):
                m.next = "PICK"
        with m.State("SELECT"):  # a bit each cycle
            m.d.comb += selector.narrow.eq(1)
            m.d.sync += self._left.eq(self._left - 1)
            with m.If(self._left == 1):
                m.d.sync += self._left.eq(kept)
                m.next = "PICK"
        with m.State("PICK"):  # a delta each cycle in the lowest layer, every other cycle elsewhere
            m.d.comb += [orders.chosen.eq(selector.pick), orders.shown.eq(Shown.DELTA), selector.take.eq(1)]
            m.d.sync += [
                orders.delta.eq(self._shown),
                self._row.eq(self._base + selector.index),
                self._picked.eq(1),
                self._left.eq(self._left - 1),
            ]
            with m.If(self.layer != 0):
                m.next = "HOLD"
            with m.Elif(self._left == 1):
                m.next = "SETTLE"
        with m.State("HOLD"):
            m.next = "PICK"
            with m.If(self._left == 0):
                m.next = "SETTLE"
        with m.State("SETTLE"):
            with m.If(self.layer == 0):
                m.next = "REPLY"
            with m.Else():
                m.d.sync += [self.layer.eq(self.layer - 1), self._base.eq(self._base - design.neurons)]
                m.next = "DERIVATIVE"

    def _reply(self, m: Module) -> None:
        with m.State("OUTPUTS"):
            self._show(m, Shown.ACTIVATION)
            with m.If(self.given_ready):
                self._count(m, self.design.outputs, "REPLY")
        with m.State("REPLY"):
            m.d.comb += [self.given.eq(self._error), self.given_valid.eq(self._has_error)]
            with m.If(self.given_ready & self._has_error):
                with m.If(~self._is_training):
                    m.d.sync += self._errors.eq(self._errors + self._error)
                m.next = "COMMAND"
        with m.State("ANSWER"):
            m.d.comb += [self.given.eq(self._since), self.given_valid.eq(1)]
            with m.If(self.given_ready):
                m.next = "COMMAND"

    def _show(self, m: Module, what: Shown) -> None:
        """Give what the lane at the current place shows."""
        m.d.comb += [
            self.orders.chosen.eq(self._choose(self._place)),
            self.orders.shown.eq(what),
            self.given.eq(self._shown),
            self.given_valid.eq(1),
        ]

    def _move_weights(self, m: Module) -> None:
        design, orders = self.design, self.orders
        with m.State("LOAD"):
            m.d.comb += [
                self.taken_ready.eq(1),
                orders.word.eq(self.taken),
                orders.chosen.eq(self._choose(self._place)),
                orders.take_weight.eq(self.taken_valid),
            ]
            with m.If(self.taken_valid):
                self._count_row(m, "LOAD")
        with m.State("READ"):
            m.d.comb += orders.read.eq(1)
            m.next = "SHOW"
        with m.State("SHOW"):
            self._show(m, Shown.WEIGHT)
            with m.If(self.given_ready):
                self._count_row(m, "READ")
        with m.State("JUDGE"):
            m.d.sync += [self._errors.eq(0), self._since.eq(self._since + (self._since != 255))]
            m.next = "ANSWER"
            with m.If(~self._kept | (self._errors < self._best)):
                m.d.sync += [self._best.eq(self._errors), self._kept.eq(1), self._since.eq(0)]
                m.next = "COPY"
        with m.State("RESTORE"):
            m.next = "ANSWER"
            with m.If(self._kept):
                m.next = "COPY"
        with m.State("COPY"):
            m.d.comb += orders.read.eq(1)
            m.d.sync += [self._copied.eq(1), self._row.eq(self._row + 1)]
            with m.If(self._row == design.rows - 1):
                m.next = "ANSWER"
        m.d.comb += orders.restore.eq(self._command == Command.RESTORE)


def any_of(words: list[Signal]) -> Value:
    """The bitwise or of words, by a tree."""
    terms: list[Value] = list(words)
    while len(terms) > 1:
        terms = [terms[place] | terms[-1 - place] for place in range((len(terms) + 1) // 2)]
    return terms[0]
