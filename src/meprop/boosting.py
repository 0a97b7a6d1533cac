"""boost: residual blocks that are trained one after another, on the features of those before, by boosting.

Source: Huang, Ash, Langford and Schapire, "Learning Deep ResNet Blocks Sequentially using Boosting Theory" (ICML 2018,
arXiv 1706.04964). docs/recipes/boost.md says where this departs from it.

Notation. g_t are the features after t blocks: g_{t+1} = f_t(g_t) + g_t. On them is an auxiliary classifier of K classes
with the outputs o_t = softmax(head(g_t)), with o_0 = 0 and alpha_0 = 0. A block and its head are the weak classifier
h_t = alpha_{t+1} o_{t+1} - alpha_t o_t. The sum of all h_t telescopes to alpha_T o_T: the last head decides alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from math import exp
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meprop.edges import alpha_of, cost_matrix, edge_of, gamma_of, log_exponential_loss
from meprop.errors import check_counts
from meprop.table import text_table

__all__ = ["Boosted", "BoostedBlock", "Residual", "boost"]

_CHUNK = 1000
"""How many examples go through a block at once where nothing is trained."""

# ---------------------------------------------------------------- the result


class Residual(nn.Module):
    """g -> block(g) + g.

    Args:
        block: A module whose output has the shape of its input.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, features: Tensor) -> Tensor:
        """Return the block's output plus its input."""
        return self.block(features) + features


@dataclass(frozen=True)
class BoostedBlock:
    """What was measured of one block, on all training examples, in evaluation mode.

    Attributes:
        steps: How many updates trained it.
        edge: The edge of its classifier.
        gamma: What it has gained over the block before, see `gamma_of`.
        alpha: The weight of its classifier.
        loss: The mean of exp(cross_entropy) - 1 of the scores alpha o, which bounds `error`.
        error: The share of training examples that its classifier gets wrong.
        kept: Whether it is part of the model.
    """

    steps: int
    edge: float
    gamma: float
    alpha: float
    loss: float
    error: float
    kept: bool


@dataclass(frozen=True)
class Boosted:
    """What `boost` returns; `print` shows a table.

    Attributes:
        model: The kept blocks, each in a `Residual`, and the last one's head: inputs to logits ``[N, K]``. It is in
            evaluation mode.
        heads: The head of each kept block.
        blocks: A record of each block that was trained. The last one may have been refused.
        stopped: Why no further block was trained.
    """

    model: nn.Sequential
    heads: tuple[nn.Module, ...]
    blocks: tuple[BoostedBlock, ...]
    stopped: str

    def truncated(self, blocks: int) -> nn.Sequential:
        """Return the model of the first blocks with the head that was trained on them. It shares their parameters.

        Args:
            blocks: From 1 to the number of kept blocks.

        Raises:
            ValueError: There are not so many.
        """
        if not 1 <= blocks <= len(self.heads):
            raise ValueError(f"blocks={blocks}; it must be from 1 to {len(self.heads)}, the number of kept blocks")
        return nn.Sequential(*islice(self.model.children(), blocks), self.heads[blocks - 1])

    def __str__(self) -> str:
        head = ("block", "steps", "edge", "gamma", "alpha", "loss", "error", "")
        rows = [
            (
                str(number),
                str(each.steps),
                *(f"{value:.4f}" for value in (each.edge, each.gamma, each.alpha, each.loss)),
                f"{each.error:.2%}",
                "" if each.kept else "refused",
            )
            for number, each in enumerate(self.blocks, 1)
        ]
        return f"{text_table([head, *rows])}\nstopped: {self.stopped}"


# ---------------------------------------------------------------- training


def boost(
    blocks: Iterable[nn.Module],
    head: nn.Module,
    data: Sequence[Tensor] | Iterable[Sequence[Tensor]],
    *,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] = torch.optim.Adam,
    steps: int = 1000,
    check_every: int = 200,
    batch_size: int = 100,
    gamma: float = 0.0,
    refine_steps: int = 0,
    generator: torch.Generator | None = None,
) -> Boosted:
    """Trains residual blocks one after another, each on the features of those before it (BoostResNet).

    A block f_t and a classifier on f_t(g_t) + g_t minimise `meprop.edges.log_exponential_loss` of a batch's logits in
    each update. Blocks before it are not run again: their features are kept, and no gradient reaches them. Memory for
    activations, gradients and the optimizer's state is that of one block, whatever the depth.

    The weak-learning condition decides. A block is trained until its `meprop.edges.gamma_of` is above `gamma`, and its
    edge is positive. If they are not after `steps` updates, the block is refused and boosting ends.

    Blocks are trained in place, on the device of the first one. `meprop.convert` makes them back-propagate sparsely, as
    any module. A block does best that returns zeros at first, as with a last layer of zeros: its classifier then starts
    where the one before it ended.

    Args:
        blocks: The blocks, read one at a time, so that a generator need not make them all. Each returns the shape that
            it gets.
        head: The first classifier, features to logits ``[N, K]``, such as a Linear. It is copied. Each further one
            starts as a copy of the one before.
        data: Inputs ``[N, ...]``, which are finite, and classes ``[N]``, which are integers. Or batches of such pairs,
            such as a DataLoader. They are read once, into memory. What they draw at random stays as it was drawn.
        optimizer: Makes the optimizer of a list of parameters, once for each block.
        steps: The most updates that a block gets.
        check_every: After how many updates the condition is looked at, on all examples. A block that wins much before
            the first look leaves less to the next one: where the second block is refused, look more often.
        batch_size: Examples in an update. Each example comes once before any comes again.
        gamma: What a block's gain must be above, from 0 to below 1. The edges of different blocks are measured under
            different costs: docs/recipes/boost.md says when gains are hard to make.
        refine_steps: Updates of the whole model with cross entropy after boosting, end to end. The records of blocks
            are those of before.
        generator: Draws the order of examples, on the CPU. None for torch's own.

    Returns:
        The model and a record of each block.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or data, head or a block does not fit. Or the first block is refused.

    Example:
        >>> import torch, meprop
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(500, 2)
        >>> y = (x.prod(dim=1) > 0).long()  # no linear classifier can tell
        >>> block = torch.nn.Sequential(torch.nn.Linear(2, 256), torch.nn.ReLU(), torch.nn.Linear(256, 2))
        >>> boosted = meprop.boost([block], torch.nn.Linear(2, 2), (x, y), steps=200)
        >>> bool((boosted.model(x).argmax(dim=1) == y).float().mean() > 0.9)
        True
    """
    check_counts(steps=(steps, 1), check_every=(check_every, 1), batch_size=(batch_size, 1))
    check_counts(refine_steps=(refine_steps, 0))
    _check_kinds(blocks, head, optimizer, gamma, generator)
    inputs, target = _pair(data)
    order = _order(len(target), batch_size, generator)
    how = _How(optimizer, steps, check_every, gamma, order)
    model, heads, records = nn.Sequential(), list[nn.Module](), list[BoostedBlock]()
    state, stopped = None, "all blocks are trained"
    for number, block in enumerate(blocks, 1):
        _check_block(block, number, model)
        state = state or _State.first(block, head, inputs, target)
        weak = nn.Sequential(Residual(block), deepcopy(heads[-1] if heads else head).to(state.target.device))
        state.check_form(block, number)
        record, outputs_NK = how.train(weak, state)
        records.append(record)
        if not record.kept:
            stopped = how.why_refused(record, number)
            break
        state.advance(weak[0], outputs_NK, record)
        model.append(weak[0])
        heads.append(weak[1])
    if state is None:
        raise ValueError("there are no blocks; give at least one module")
    if not heads:
        raise ValueError(f"{stopped}. No block is left: give more steps, a lower gamma or another learning rate")
    model.append(heads[-1])
    if refine_steps:
        _refine(model, inputs, state.target, optimizer, islice(order, refine_steps))
    return Boosted(model.eval(), tuple(heads), tuple(records), stopped)


@dataclass
class _State:
    """What the blocks so far leave to the next one."""

    features: Tensor
    target: Tensor
    costs: Tensor
    edge: float = 0.0

    @classmethod
    def first(cls, block: nn.Module, head: nn.Module, inputs: Tensor, target: Tensor) -> _State:
        """Before any block: the inputs, on the block's device, and equal costs."""
        device = next(block.parameters(), inputs).device
        features = inputs.to(device, copy=True)
        shape = _outputs(deepcopy(head).to(device), features[:2]).shape
        if len(shape) != 2 or shape[1] <= max(1, int(target.max())):
            raise ValueError(
                f"head gives outputs of shape {list(shape)} for {len(features[:2])} examples; it must give [N, K], "
                f"with K of 2 or more and above the largest class in data, {int(target.max())}"
            )
        target = target.to(device)
        return cls(features, target, cost_matrix(features.new_zeros(len(target), shape[1]), target))

    def check_form(self, block: nn.Module, number: int) -> None:
        """Checks that the block returns the shape and the dtype that it gets."""
        given, returned = self.features[:2], _outputs(block, self.features[:2])
        if (given.shape, given.dtype) != (returned.shape, returned.dtype):
            raise ValueError(
                f"block {number} returns {returned.dtype} of shape {list(returned.shape)} for {given.dtype} of shape "
                f"{list(given.shape)}; both must be the same, as its output is added to its input"
            )

    def advance(self, residual: nn.Module, outputs_NK: Tensor, record: BoostedBlock) -> None:
        """Puts a block's features in the place of those before it, and its costs and edge likewise."""
        residual.eval()
        with torch.no_grad():
            for chunk in self.features.split(_CHUNK):
                chunk.copy_(residual(chunk))
        self.costs = cost_matrix(record.alpha * outputs_NK, self.target)
        self.edge = record.edge


@dataclass(frozen=True)
class _How:
    """How each block is trained, see `boost`; `order` gives the examples of each update."""

    optimizer: Callable[[list[nn.Parameter]], Optimizer]
    steps: int
    check_every: int
    gamma: float
    order: Iterator[Tensor]

    def train(self, weak: nn.Sequential, state: _State) -> tuple[BoostedBlock, Tensor]:
        """Trains a block and its head until they are accepted, or out of steps. Returns their outputs o, too."""
        updates = _optimizer_of(self.optimizer, weak)
        done = 0
        while True:
            more = min(self.check_every, self.steps - done)
            for chosen in islice(self.order, more):
                rows = chosen.to(state.target.device)
                loss = log_exponential_loss(weak.train()(state.features[rows]), state.target[rows])
                loss.backward()
                updates.step()
                updates.zero_grad()
            done += more
            record, outputs_NK = self._measure(weak, state, done)
            if record.kept or done == self.steps:
                return record, outputs_NK

    def accepts(self, edge: float, before: float) -> bool:
        """Whether an edge satisfies the weak-learning condition; NaN does not."""
        return edge > 0 and gamma_of(edge, before) > self.gamma

    def _measure(self, weak: nn.Sequential, state: _State, steps: int) -> tuple[BoostedBlock, Tensor]:
        outputs_NK = _outputs(weak, state.features).softmax(dim=1, dtype=torch.float64)
        edge = edge_of(outputs_NK, state.costs)
        alpha = alpha_of(edge)
        record = BoostedBlock(
            steps=steps,
            edge=edge,
            gamma=gamma_of(edge, state.edge),
            alpha=alpha,
            loss=exp(log_exponential_loss(alpha * outputs_NK, state.target)),
            error=float((outputs_NK.argmax(dim=1) != state.target).double().mean()),
            kept=self.accepts(edge, state.edge),
        )
        return record, outputs_NK

    def why_refused(self, record: BoostedBlock, number: int) -> str:
        """Why a block is not part of the model."""
        found = f"after {record.steps} steps block {number} has"
        if not record.edge > 0:
            return f"{found} an edge of {record.edge:.4g}, which is not positive"
        return f"{found} a gamma of {record.gamma:.4g}, which is not above {self.gamma}"


def _optimizer_of(make: Callable[[list[nn.Parameter]], Optimizer], module: nn.Module) -> Optimizer:
    optimizer: Any = make([each for each in module.parameters() if each.requires_grad])
    if not isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer returns a {kind}; it must return a torch.optim.Optimizer of the parameters it gets")
    optimizer.zero_grad()  # of gradients that the module came with
    return optimizer


@torch.no_grad()
def _outputs(module: nn.Module, features: Tensor) -> Tensor:
    module.eval()
    return torch.cat([module(chunk.clone()) for chunk in features.split(_CHUNK)])  # it may work in place


def _refine(
    model: nn.Module,
    inputs: Tensor,
    target: Tensor,
    optimizer: Callable[[list[nn.Parameter]], Optimizer],
    order: Iterable[Tensor],
) -> None:
    """Trains the whole model with cross entropy."""
    updates = _optimizer_of(optimizer, model.train())
    for chosen in order:
        logits_BK = model(inputs[chosen.to(inputs.device)].to(target.device))
        loss = nn.functional.cross_entropy(logits_BK, target[chosen.to(target.device)])
        loss.backward()
        updates.step()
        updates.zero_grad()


def _order(count: int, batch_size: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """The examples of each update, without end: all in a new order each time."""
    while True:
        yield from torch.randperm(count, generator=generator).split(batch_size)


# ---------------------------------------------------------------- what is given


def _pair(data: Any) -> tuple[Tensor, Tensor]:
    """Inputs and classes, whether given as two tensors or as batches."""
    allowed = "data is inputs [N, ...] and classes [N], two tensors, or batches of such pairs, such as a DataLoader"
    if not isinstance(data, Iterable):
        raise TypeError(f"data is of type {type(data).__name__}; {allowed}")
    parts: list[Any] = list(data)
    batches = [parts] if len(parts) == 2 and all(isinstance(each, Tensor) for each in parts) else parts
    for batch in batches:
        if not isinstance(batch, Sequence) or [isinstance(each, Tensor) for each in batch] != [True, True]:
            raise TypeError(f"data has a batch that is not a pair of tensors, but a {type(batch).__name__}; {allowed}")
        inputs, target = batch
        if target.dim() != 1 or target.is_floating_point() or target.dtype == torch.bool:
            raise ValueError(f"data has classes of shape {list(target.shape)} and {target.dtype}; give integers [N]")
        if len(inputs) != len(target):
            raise ValueError(f"data has {len(inputs)} inputs for {len(target)} classes; give one class for each input")
    if not any(len(target) for _, target in batches):
        raise ValueError("data is empty; give at least one example")
    inputs, target = (each[0] if len(each) == 1 else torch.cat(each) for each in zip(*batches, strict=True))
    if int(target.min()) < 0:
        raise ValueError(f"data has the class {int(target.min())}; classes are numbered from 0")
    if not inputs.isfinite().all():
        raise ValueError("data has inputs that are NaN or infinite; give finite ones")
    return inputs.detach(), target.long()


def _check_kinds(blocks: Any, head: Any, optimizer: Any, gamma: Any, generator: Any) -> None:
    wanted = {
        "blocks": (blocks, isinstance(blocks, Iterable), "modules, such as a list or a generator of them"),
        "head": (head, isinstance(head, nn.Module), "a torch.nn.Module from features to logits"),
        "optimizer": (optimizer, callable(optimizer), "a function of parameters, such as torch.optim.SGD"),
        "gamma": (gamma, isinstance(gamma, int | float) and not isinstance(gamma, bool), "a number from 0 to below 1"),
        "generator": (generator, isinstance(generator, torch.Generator | None), "a torch.Generator, or None"),
    }
    for name, (value, fits, allowed) in wanted.items():
        if not fits:
            raise TypeError(f"{name} is of type {type(value).__name__}; it must be {allowed}")
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma={gamma}; it must be from 0 to below 1")


def _check_block(block: Any, number: int, before: nn.Module) -> None:
    if not isinstance(block, nn.Module):
        raise TypeError(f"block {number} is of type {type(block).__name__}; it must be a torch.nn.Module")
    trained = {id(each) for each in before.parameters()}
    if any(id(each) in trained for each in block.parameters()):
        raise ValueError(f"block {number} has parameters of a block before it, which stays as it is; make a new one")
