"""The ways of doing a training step that `meprop bench step` times.

Here is what they are, what is wrong with one, and what it has to move.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import compress, cycle
from time import perf_counter
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meprop
from meprop import optim
from meprop.bench.perceptron import Batch
from meprop.ops.optimizer import is_large
from meprop.report import LayerReport
from meprop.rules import Rule

OptimizerName = Literal["sgd", "momentum", "adagrad", "adam", "adamw"]
PHASES = ("forward", "backward", "optimizer")
"""Of a step; what is left of it is Python's and the clock's."""
BASELINES = ("dense fp32", "dense bf16", "dense fp32 compiled")

_SEED = 0
_LR = 1e-3  # of the steps that are compared
# Of gradients, to their norm. In bfloat16 other entries are kept of nearly equal ones, and, per example, more in each
# layer on the way back: by the first of seven 0.6, while what is unrelated differs by more than 1.
_TOLERANCE, _NARROW_TOLERANCE, _TOLERANCE_OF_OTHERS = 0.01, 0.3, 0.8
_DRAWS, _NOISE_TOLERANCE = 32, 2.0  # of a mean of so many draws, to the noise that is left in it


class _Optimizer(NamedTuple):
    name: str
    moments: int
    """Tensors of the weights' shape that it keeps."""
    options: dict[str, Any]


_OPTIMIZERS: dict[OptimizerName, _Optimizer] = {
    "sgd": _Optimizer("SGD", 0, {}),
    "momentum": _Optimizer("SGD", 1, {"momentum": 0.9}),
    "adagrad": _Optimizer("Adagrad", 1, {}),
    "adam": _Optimizer("Adam", 2, {}),
    "adamw": _Optimizer("AdamW", 2, {}),
}
_MOVES_ALL = ("momentum", "adam", "adamw")
"""Those that move weights without a gradient."""


@dataclass(frozen=True)
class Way:
    """A way of doing the step.

    Attributes:
        name: Of the row.
        rule: What is selected; None: it is dense.
        bf16: Whether products are formed in bfloat16: all by autocast if dense, else the forward ones by compute_dtype,
            with weights that the optimizer has written by copy_dtype.
        sparse_rows: Of `meprop.optim`, where gradients are row-sparse; None: they are dense.
        in_backward: Whether the backward pass updates the weights.
        fuse: Whether dropout is computed in one pass with the activation before it.
        skip_zeros: Whether forward products leave out zeros of their input, where that is faster.
        compiled: Whether the model is compiled by torch.compile.
        state_dtype: What the optimizer of a sparse way keeps its moments in; None: float32.
    """

    name: str
    rule: Rule | None = None
    bf16: bool = False
    sparse_rows: optim.SparseRows | None = None
    in_backward: bool = False
    fuse: bool = False
    skip_zeros: bool = False
    compiled: bool = False
    state_dtype: torch.dtype | None = None

    @property
    def oracle_rule(self) -> Rule | None:
        """The rule of the oracle that this way is held against.

        It is None, a dense oracle, for a rule that draws. Gradients that differ in the last bit may draw other entries
        with the same random numbers, and then more from layer to layer. The mean of many draws has to be the dense
        gradient.
        """
        return None if isinstance(self.rule, meprop.Sampled) else self.rule

    @property
    def narrow_dtype(self) -> torch.dtype | None:
        """That of the forward products of a sparse way. None for float32."""
        return torch.bfloat16 if self.bf16 else None

    @property
    def is_narrow(self) -> bool:
        """Whether products have fewer bits than those of float32."""
        return self.bf16

    @property
    def chooses_otherwise(self) -> bool:
        """Whether other entries than the oracle's may be chosen, because those that compete are rounded."""
        return self.bf16 and self.rule is not None and self.rule.scope == "example"


def ways(
    k: float,
    noise: float,
    *,
    dropout: bool = False,
    compiled: bool = False,
    state_dtype: torch.dtype | None = None,
) -> list[Way]:
    """Return the baselines, then the sparse ways, each in fp32 and bf16.

    Args:
        k: The count, or share, that top-k keeps of each hidden layer's output gradient.
        noise: The budget of `meprop.Sampled`.
        dropout: Whether the model has dropout, so that there are ways with `fuse`.
        compiled: Whether the compiled baseline is one of them.
        state_dtype: What the optimizers of the sparse ways keep their moments in; None: float32.
    """
    names = BASELINES if compiled else BASELINES[:2]
    baselines = [Way(name, bf16="bf16" in name, compiled="compiled" in name) for name in names]
    found: list[Way] = []
    sampled = meprop.Sampled(noise=noise)
    modes: tuple[optim.SparseRows, ...] = ("exact", "decay")
    for bf16 in (False, True):
        precision = "bf16" if bf16 else "fp32"
        for fuse in (False, True) if dropout else (False,):
            name = f"sampled {precision}{' fused' if fuse else ''}"
            found += [
                Way(name, sampled, bf16, fuse=fuse),
                Way(f"{name} in backward", sampled, bf16, in_backward=True, fuse=fuse),
            ]
        rows = meprop.Sampled(noise=noise, exact_sum=False)
        found += [Way(f"sampled rows {precision} {mode}", rows, bf16, mode) for mode in modes]
        in_backward = Way(f"sampled rows {precision} decay in backward", rows, bf16, "decay", in_backward=True)
        found += [in_backward, replace(in_backward, name=f"{in_backward.name}, skip zeros", skip_zeros=True)]
        found.append(Way(f"per example {precision}", meprop.TopK(k, scope="example"), bf16))
        unified = meprop.TopK(k, scope="batch")
        found += [Way(f"unified {precision} {mode}", unified, bf16, mode) for mode in modes]
    return [*baselines, *(replace(way, state_dtype=state_dtype) for way in found)]


class Steps(Protocol):
    """What is checked of a way of doing the step."""

    network: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def way(self) -> Way:
        """It."""
        ...

    def loss(self, x: Tensor, classes: Tensor) -> Tensor:
        """Return the loss of a batch."""
        ...


def kept_share(network: nn.Module) -> float:
    """Return the share of the hidden layers' output gradients that was kept, on average."""
    hidden = meprop.report(network).layers[:-1]
    return sum(layer.density * layer.out_features for layer in hidden) / sum(layer.out_features for layer in hidden)


class Stepper:
    """One way of doing the step, again and again.

    Args:
        way: It.
        network: A dense network; the steps are those of a copy.
        optimizer: With what.
        batches: Of the steps, in turns.
        lr: The learning rate. One of 0 costs the same, and lets the gradients stay what they are.
    """

    def __init__(
        self, way: Way, network: nn.Module, optimizer: OptimizerName, batches: Sequence[Batch], lr: float = 0.0
    ) -> None:
        self.way = way
        self.network = deepcopy(network)
        self.optimizer: torch.optim.Optimizer
        self.phases: list[tuple[float, ...]] = []
        self._optimizer_name: OptimizerName = optimizer
        self._rows, self._different_batches = len(batches[0][0]), len(batches)
        self._batches = cycle(batches)
        name, _, options = _OPTIMIZERS[optimizer]
        if way.rule is None:
            self._model: Any = torch.compile(self.network) if way.compiled else self.network
            self.optimizer = getattr(torch.optim, name)(self.network.parameters(), lr=lr, fused=True, **options)
            return
        meprop.convert(
            self.network,
            way.rule,
            sparse_grad=way.sparse_rows is not None,
            compute_dtype=way.narrow_dtype,
            when="always",
            fuse=way.fuse,
            skip_zeros=way.skip_zeros,
        )
        self._model = self.network
        self.optimizer = getattr(optim, name)(
            self.network.parameters(),
            lr=lr,
            sparse_rows=way.sparse_rows or "exact",
            in_backward=way.in_backward,
            copy_dtype=way.narrow_dtype,
            state_dtype=way.state_dtype,
            **options,
        )

    @property
    def kept(self) -> float:
        """The share of the hidden layers' output gradients that was kept, on average."""
        return kept_share(self.network)

    @property
    def least_bytes(self) -> dict[str, int]:
        """What each phase of the step has to move at least."""
        layers = meprop.report(self.network).layers
        return least_bytes(self.way, layers, self._gradient_rows(), self._optimizer_name, self._rows)

    def _gradient_rows(self) -> list[int]:
        """The number of rows that each weight's gradient has, on average over the batches."""
        layers = [module for module in self.network.modules() if isinstance(module, nn.Linear)]
        if self.way.sparse_rows is None:
            return [layer.out_features for layer in layers]
        counts = [0] * len(layers)
        for _ in range(self._different_batches):
            loss = self.loss(*next(self._batches))
            gradients = torch.autograd.grad(loss, [layer.weight for layer in layers])  # which updates nothing
            for number, grad in enumerate(gradients):
                counts[number] += grad._nnz() if grad.is_sparse else len(grad)  # pyright: ignore[reportPrivateUsage]
        return [round(count / self._different_batches) for count in counts]

    def loss(self, x: Tensor, classes: Tensor) -> Tensor:
        """Return the loss of a batch."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.way.bf16 and self.way.rule is None):
            return F.cross_entropy(self._model(x), classes)

    def run(self) -> None:
        """Do one step, and note how long its phases took."""
        x, classes = next(self._batches)
        start = perf_counter()
        loss = self.loss(x, classes)
        forward = perf_counter()
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        backward = perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.phases.append((forward - start, backward - forward, perf_counter() - backward))


# ---------------------------------------------------------------- is it right?

Oracle = tuple[Tensor, list[Tensor]]
"""Loss and gradients of a batch."""


def oracle(network: nn.Module, rule: Rule | None, batch: Batch) -> Oracle:
    """Return loss and gradients in float64, where the reference serves. Dropout is off."""
    exact = without_dropout(deepcopy(network).double())
    if rule is not None:
        meprop.convert(exact, rule, when="always")
    x, classes = batch
    loss = F.cross_entropy(exact(x.double()), classes)
    loss.backward()  # pyright: ignore[reportUnknownMemberType]
    return loss.detach(), [parameter.grad for parameter in exact.parameters() if parameter.grad is not None]


def without_dropout(network: nn.Module) -> nn.Module:
    """Turn dropout off, and nothing else."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return network


def what_is_wrong(way: Way, network: nn.Module, optimizer: OptimizerName, batch: Batch, expected: Oracle) -> str | None:
    """Return in words what is wrong with a way; None if nothing is.

    Loss and gradients are compared with the oracle's, with dropout off. Where the backward pass updates the weights, a
    step must leave the same weights as one that does both after each other.
    """
    separate = replace(way, in_backward=False)
    wrong = differs(Stepper(separate, without_dropout(deepcopy(network)), optimizer, [batch]), batch, expected)
    if wrong is not None or not way.in_backward:
        return wrong
    moved: list[list[Tensor]] = []
    for each in (separate, way):
        stepper = Stepper(each, network, optimizer, [batch], _LR)
        torch.manual_seed(_SEED)
        stepper.run()
        moved.append(list(stepper.network.parameters()))
    if not all(map(torch.equal, *moved)):
        return "its weights after a step differ from those of the separate step"
    return None


def differs(stepper: Steps, batch: Batch, expected: Oracle) -> str | None:
    """Return in words how loss and gradients differ from the oracle's; None if they do not. Dropout has to be off."""
    (exact, gradients), way = expected, stepper.way
    relative, absolute = (0.05, 1e-3) if way.is_narrow else (1e-5, 1e-6)
    if not torch.allclose(stepper.loss(*batch).double(), exact, relative, absolute):
        return "its loss differs from the oracle's"
    torch.manual_seed(_SEED)
    if way.oracle_rule == way.rule:
        found = _gradients(stepper, batch, 1)
        noise = [0.0] * len(found)
    else:
        halves = [_gradients(stepper, batch, _DRAWS // 2) for _ in range(2)]
        found = [(one + other) / 2 for one, other in zip(*halves, strict=True)]
        noise = [float((one - other).norm()) / 2 for one, other in zip(*halves, strict=True)]  # that of the mean
    tolerance = _NARROW_TOLERANCE if way.is_narrow else _TOLERANCE
    if way.chooses_otherwise:
        tolerance = _TOLERANCE_OF_OTHERS
    names = [name for name, _ in stepper.network.named_parameters()]
    for name, grad, right, left in zip(names, found, gradients, noise, strict=True):
        if not (grad - right).norm() <= tolerance * right.norm() + _NOISE_TOLERANCE * left:
            return f"the gradient of {name} differs from the oracle's"
    return None


def _gradients(stepper: Steps, batch: Batch, passes: int) -> list[Tensor]:
    """The mean of the gradients of some passes."""
    for _ in range(passes):
        stepper.loss(*batch).backward()  # pyright: ignore[reportUnknownMemberType]
    found = [
        torch.full_like(parameter, torch.nan) if parameter.grad is None else parameter.grad.to_dense() / passes
        for parameter in stepper.network.parameters()
    ]
    stepper.optimizer.zero_grad()
    return found


# ---------------------------------------------------------------- what has to move


def least_bytes(
    way: Way, layers: Sequence[LayerReport], rows: Sequence[int], optimizer: OptimizerName, batch: int
) -> dict[str, int]:
    """Return the bytes that each phase cannot avoid reading or writing, if nothing stays in a cache between phases.

    The forward pass reads the weights. The backward pass reads those of all layers but the first, and writes the
    gradients. The optimizer reads the gradients, and reads and writes weights and moments. An update in the backward
    pass does that there, without gradients. Small parameters, which the step updates, count there too. Both passes
    touch the activations once. Row-sparse gradients have these rows only. A weight with a copy in bfloat16 is read from
    that in the forward pass. The optimizer writes it.

    Args:
        way: Of doing the step.
        layers: The linear layers.
        rows: The number of rows that the gradient of each one's weight has.
        optimizer: The optimizer.
        batch: The number of examples.
    """
    size = 4  # of a weight, a gradient, a moment
    kept = [count * layer.in_features for count, layer in zip(rows, layers, strict=True)]
    every = size * sum((layer.in_features + 1) * layer.out_features for layer in layers)
    gradients = size * (sum(kept) + sum(layer.out_features for layer in layers))
    is_autocast = way.bf16 and way.rule is None
    activations = batch * (sum(layer.out_features for layer in layers) + layers[0].in_features)
    activations *= 2 if is_autocast else size
    for_inputs = (2 if is_autocast else size) * sum(kept[1:])
    moved = every if way.sparse_rows is None or (way.sparse_rows == "exact" and optimizer in _MOVES_ALL) else gradients
    of_moments = _OPTIMIZERS[optimizer].moments * (1.0 if way.state_dtype is None else 0.5)
    update = round(2 * moved * (1 + of_moments))
    forward = every + activations
    if way.bf16 and way.rule is not None:
        elements = [layer.in_features * layer.out_features for layer in layers]
        with_copy = [is_large(count) for count in elements]
        forward -= 2 * sum(compress(elements, with_copy))
        update += 2 * sum(compress(elements if moved == every else kept, with_copy))
    if way.in_backward:
        return {"forward": forward, "backward": update + activations, "optimizer": 0}
    return {
        "forward": forward,
        "backward": for_inputs + gradients + activations,
        "optimizer": gradients + update,
    }
