"""Every layer, with every rule, in every way of running a model: its gradients are those of the literal layer.

What is feared is that a mode silently goes dense. So in each the rows of the weights' gradients are counted too.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import literal
import meprop

WIDTH, K, STEPS, BATCH, INPUTS = 40, 3, 2, 2, 6  # K in each of all rows are still fewer than WIDTH

# ---------------------------------------------------------------- layers


class First(nn.Module):
    """A layer of one or three inputs, all the same, and the first of its outputs."""

    def __init__(self, layer: nn.Module, inputs: int = 1) -> None:
        super().__init__()
        self.layer, self.inputs = layer, inputs

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(*[x] * self.inputs)
        return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class Case:
    """A layer whose weights make WIDTH features, or several blocks of WIDTH.

    Attributes:
        make: A plain one.
        literal: Its output from (layer, input, rule).
        inputs: Features of its input.
        rows: Of the output gradient, when a rule chooses for each.
        choices: Into how many choices for the whole batch a pass falls.
        rules: The names of those that it takes.
        transposed: Whether its weight is [I, O].
        not_compiled: What torch.compile says that it cannot compile whole; by parts it does.
    """

    make: Callable[[], First]
    literal: Callable[[nn.Module, Tensor, meprop.Rule], Tensor]
    inputs: int = INPUTS
    rows: int = STEPS * BATCH
    choices: int = 1
    rules: tuple[str, ...] = ("example", "batch", "row-sparse", "global")
    transposed: bool = False
    not_compiled: str | None = None


LAYERS = {
    "Linear": Case(
        lambda: First(nn.Linear(INPUTS, WIDTH)),
        lambda layer, x, rule: literal.linear(x, layer.weight, layer.bias, rule),
        rules=("example", "batch", "row-sparse", "global", "drawn"),
    ),
    "Conv1D": Case(
        lambda: First(Conv1D(WIDTH, INPUTS)),
        lambda layer, x, rule: literal.linear(x, layer.weight.t(), layer.bias, rule),
        rules=("example", "batch", "global"),
        transposed=True,
    ),
    "Conv1d": Case(  # of STEPS examples, with BATCH channels and INPUTS positions
        lambda: First(nn.Conv1d(BATCH, WIDTH, 3, padding=1)),
        literal.convolution,
        rules=("batch", "row-sparse", "global"),
    ),
    "pointwise Conv1d": Case(lambda: First(nn.Conv1d(BATCH, WIDTH, 1)), literal.convolution, rows=STEPS * INPUTS),
    "LSTM": Case(
        lambda: First(nn.LSTM(INPUTS, WIDTH)),
        literal.lstm,
        choices=STEPS,
        rules=("example", "batch", "global"),
        not_compiled="does not support RNN, GRU, or LSTM",
    ),
    "MultiheadAttention": Case(
        lambda: First(nn.MultiheadAttention(WIDTH, 4), inputs=3),
        lambda layer, x, rule: literal.attention(layer, (x, x, x), rule),
        inputs=WIDTH,
    ),
}
RULES = {
    "example": (meprop.TopK(K), False),
    "batch": (meprop.TopK(K, scope="batch"), False),
    "row-sparse": (meprop.TopK(K, scope="batch"), True),
    "global": (meprop.TopK(K, scope="global"), False),
    "drawn": (meprop.Sampled(K, exact_sum=False), False),
}


def make(case: Case, rule: str) -> tuple[First, Tensor]:
    """A converted layer, and its input."""
    torch.manual_seed(0)
    model, x = case.make(), torch.randn(STEPS, BATCH, case.inputs)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    keep, sparse_grad = RULES[rule]
    meprop.convert(model, keep, min_features=1, when="always", sparse_grad=sparse_grad)
    return model, x


def loss(output: Tensor) -> Tensor:
    torch.manual_seed(1)
    return (output.float() * torch.randn(output.shape)).sum()


# ---------------------------------------------------------------- modes: from layer and input to gradients


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def eager(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    loss(model(x)).backward()
    return gradients(model)


def compiled(model: nn.Module, x: Tensor, fullgraph: bool = False) -> dict[str, Tensor]:
    torch._dynamo.reset()
    loss(torch.compile(model, backend="aot_eager", fullgraph=fullgraph)(x)).backward()
    return gradients(model)


def compiled_whole(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return compiled(model, x, fullgraph=True)


def autocast_bf16(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    with torch.autocast("cpu", dtype=dtype):
        output = model(x)
    assert output.dtype == dtype
    loss(output).backward()
    return gradients(model)


def autocast_fp16(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return autocast_bf16(model, x, torch.float16)


def checkpoint_reentrant(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    loss(checkpoint(model, x.requires_grad_(), use_reentrant=True)).backward()
    return gradients(model)


def checkpoint_not_reentrant(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    loss(checkpoint(model, x, use_reentrant=False)).backward()
    return gradients(model)


def accumulated(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The whole loss in three parts: powers of two, so that nothing is rounded."""
    for share in (0.5, 0.25, 0.25):
        (share * loss(model(x))).backward()
    return gradients(model)


def scaled(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler.scale(loss(model(x))).backward()
    scaler.unscale_(optimizer)
    return gradients(model)


def functional_call(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    parameters = {name: each.detach().clone().requires_grad_() for name, each in model.named_parameters()}
    output = torch.func.functional_call(model, parameters, (x,))
    return dict(zip(parameters, torch.autograd.grad(loss(output), list(parameters.values())), strict=True))


def averaged(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The moving average of a model that does not move trains on as it would."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for _ in range(2):
        average.update_parameters(model)
    return eager(average.module, x)


def deep_copied(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return eager(copy.deepcopy(model), x)


def pickled(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return eager(pickle.loads(pickle.dumps(model)), x)


MODES = [
    *(eager, compiled, compiled_whole, autocast_bf16, autocast_fp16, checkpoint_reentrant, checkpoint_not_reentrant),
    *(accumulated, scaled, functional_call, averaged, deep_copied, pickled),
]
LEFT_OUT = [
    ("drawn", accumulated),  # each part of the loss draws anew
    ("MultiheadAttention", "global", autocast_bf16),  # rounding decides which of two nearly equal entries is kept
]


def is_slow(layer: str, rule: str, mode: Callable[..., object]) -> bool:
    """Whether it is compiled by parts, though a whole graph is compiled too, or another rule by the same parts."""
    refused = rule == "row-sparse" or (LAYERS[layer].not_compiled and rule == LAYERS[layer].rules[0])
    return mode is compiled and not refused


COMBINATIONS = [
    pytest.param(
        *(layer, rule, mode),
        id=f"{layer}-{rule}-{mode.__name__}",
        marks=[pytest.mark.slow] * is_slow(layer, rule, mode),
    )
    for layer, case in LAYERS.items()
    for rule in case.rules
    for mode in MODES
    if (rule, mode) not in LEFT_OUT and (layer, rule, mode) not in LEFT_OUT
]


@pytest.mark.parametrize(("layer", "rule", "mode"), COMBINATIONS)
def test_gradients_are_sparse_and_those_of_the_literal_layer(layer, rule, mode):
    case = LAYERS[layer]
    model, x = make(case, rule)
    if mode is compiled_whole and (refused := "sparse_grad=True" if rule == "row-sparse" else case.not_compiled):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=refused):
            mode(model, x)
        return
    found = mode(model, x)

    twin, x = make(case, rule)
    half = {autocast_bf16: torch.bfloat16, autocast_fp16: torch.float16}.get(mode)
    with torch.autocast("cpu", dtype=half, enabled=half is not None):
        output = case.literal(twin.layer, x, RULES[rule][0])
    loss(output).backward()
    eps = torch.finfo(half or torch.float32).eps
    for name, expected in gradients(twin).items():
        gradient = found[name]
        if rule == "row-sparse" and expected.dim() > 1:
            assert gradient.layout == torch.sparse_coo
            gradient = gradient.to_dense()
        torch.testing.assert_close(gradient, expected, rtol=16 * eps, atol=16 * eps * float(expected.abs().max()))
        if gradient.dim() > 1:
            assert_rows_are_few(gradient.t() if case.transposed else gradient.flatten(1), rule, case)


def assert_rows_are_few(gradient: Tensor, rule: str, case: Case) -> None:
    """K rows of each block for each choice, which may coincide."""
    rows = (gradient.view(-1, WIDTH, gradient.shape[1]).abs().sum(dim=2) > 0).sum(dim=1)
    most = K * (case.choices if rule in ("batch", "row-sparse") else case.rows)
    assert (rows >= 1).all()
    assert (rows <= most).all()
    assert most < WIDTH
    if most == K and gradient.shape[0] % WIDTH == 0:
        assert (rows == K).all()
