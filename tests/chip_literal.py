"""The net in fixed point by its definition: integers of Python, one at a time, and no code of the library."""

from __future__ import annotations

import math


def half_up(integer, bits):
    """floor(integer / 2^bits + 1/2)"""
    return math.floor((2 * integer + 2**bits) // (2 * 2**bits))


def saturated(integer, word):
    return max(-(2 ** (word - 1)), min(2 ** (word - 1) - 1, integer))


def word_of(real, word, fraction):
    return saturated(math.floor(real * 2**fraction + 0.5), word)


def sigmoid(z, word):
    """z has word - 1 bits behind the point, and the result word - 2; 512 segments over [0, 16)."""
    size = min(abs(z), 16 * 2 ** (word - 1) - 1)
    segment = 2 ** (word - 1) // 32  # in units of z
    node = size // segment

    def at(number):
        return word_of(1 / (1 + math.exp(-number / 32)), word, word - 2)

    rise = half_up((at(node + 1) - at(node)) * (size % segment), int(math.log2(segment)))
    return at(node) + rise if z >= 0 else 2 ** (word - 2) - at(node) - rise


class LiteralNet:
    """`weights[layer][neuron]` are the weights of its inputs, and its bias, all as integers."""

    def __init__(self, word, fraction, keep, rate_bits, weights):
        self.word, self.fraction, self.keep, self.rate_bits, self.weights = word, fraction, keep, rate_bits, weights

    def forward(self, inputs):
        vectors = [[word_of(x, self.word, self.word - 2) for x in inputs]]
        for layer in self.weights:
            below, above = vectors[-1], []
            for *row, bias in layer:
                exact = bias * 2 ** (self.word - 2)
                for weight, x in zip(row, below, strict=True):
                    exact += weight * x
                z = saturated(half_up(exact, self.fraction + self.word - 2 - (self.word - 1)), self.word + 4)
                above.append(sigmoid(z, self.word))
            vectors.append(above)
        return vectors

    def learn(self, inputs, target):
        """Returns the sum of squared errors."""
        word, fraction = self.word, self.fraction
        vectors = self.forward(inputs)
        errors = [saturated(y - word_of(t, word, word - 2), word) for y, t in zip(vectors[-1], target, strict=True)]
        total = sum(e * e for e in errors)
        for number in reversed(range(len(self.weights))):
            layer, below, above = self.weights[number], vectors[number], vectors[number + 1]
            deltas = []
            for e, y in zip(errors, above, strict=True):
                derivative = saturated(half_up(y * (2 ** (word - 2) - y), word - 4), word)
                deltas.append(saturated(half_up(e * derivative, word - 2), word))
            kept = sorted(range(len(deltas)), key=lambda j: (-abs(deltas[j]), j))[: self.keep(len(deltas))]
            errors = []
            for i in range(len(below)):
                exact = sum(layer[j][i] * deltas[j] for j in kept)
                errors.append(saturated(half_up(exact, fraction + word - (word - 2)), word))
            for j in kept:
                for i, x in enumerate([*below, 2 ** (word - 2)]):
                    change = half_up(deltas[j] * x, (word - 2) + word + self.rate_bits - fraction)
                    layer[j][i] = saturated(layer[j][i] - change, word)
        return total
