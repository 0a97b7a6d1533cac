"""What test_distributed.py runs in each of two processes: `python two_processes.py FOLDER RANK`.

A check is a function of the rank that `check` registers. Both processes run all of them, in this order. Each leaves a
file for every check in FOLDER: an empty one, or one with the traceback. test_distributed.py has a test for each entry
of the same registry.
"""

import contextlib
import copy
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import meprop
from cases import gradient
from meprop.distributed import (
    RowSparseState,
    SynchronizedTopK,
    _average,
    _Bucket,
    average_gradients,
    row_sparse_hook,
)
from meprop.errors import NotSupportedError
from meprop.selection import PlainTopK

CHECKS: dict[str, Callable[[int], None]] = {}


def check(function: Callable[[int], None]) -> Callable[[int], None]:
    assert function.__name__ not in CHECKS, f"there are two checks named {function.__name__}"
    CHECKS[function.__name__] = function
    return function


# ---------------------------------------------------------------- a model, its batches, and one process's gradients


def mlp(rule: meprop.Rule | None = None, dtype: torch.dtype = torch.float64, **options) -> nn.Sequential:
    """Layers of 40 and 30 features, which are converted, and an output layer, which is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)).to(dtype)
    if rule is not None:
        meprop.convert(model, rule, min_features=10, **{"when": "always", **options})
    return model


def parts(step: int = 0, sizes: tuple[int, int] = (6, 6), dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """The batch of each process at a step."""
    inputs_NI = torch.randn(sum(sizes), 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return inputs_NI.to(dtype).split(sizes)


def loss(outputs_NO: Tensor) -> Tensor:
    return (outputs_NO - 1).square().sum() / max(1, len(outputs_NO))


def one_process(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    """The backward pass of the mean of the parts' losses, all parts in one batch."""
    outputs = model(torch.cat(batch)).split([len(part) for part in batch])
    (sum(loss(part) for part in outputs) / len(batch)).backward()


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.to_dense() for parameter in model.parameters()]


def assert_gradients(model: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    for found, wanted in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(found, wanted, **tolerance)
        assert wanted.any()


def unified(k: float = 4) -> meprop.TopK:
    return meprop.TopK(k, scope="batch")


def nonzero_rows(weight: Tensor) -> list[int]:
    return weight.grad.to_dense().flatten(1).abs().sum(dim=1).nonzero().flatten().tolist()


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of each tensor that Python gives to all_reduce: hooks and rules, not DDP itself."""
    sizes, original = [], dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        sizes.append(tensor.nbytes)
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield sizes
    finally:
        dist.all_reduce = original


# ---------------------------------------------------------------- the rule


@check
def all_keep_what_one_process_would(rank: int) -> None:
    for kind in ("normal", "ties", "zeros", "some nan", "all nan", "some inf", "mostly zero"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for rows, cut, k in ((8, 4, 5), (7, 2, 0.1), (5, 5, 1), (0, 0, 3), (6, 3, 40)):
                whole = gradient(kind, rows, 33, dtype)
                part = whole[:cut] if rank == 0 else whole[cut:]  # (5, 5, 1): nothing for the second
                found, expected = SynchronizedTopK(k).select(part), meprop.TopK(k, scope="batch").select(whole)
                assert torch.equal(found.indices, expected.indices), (kind, dtype, rows, k)
                torch.testing.assert_close(found.values, part[:, expected.indices], rtol=0, atol=0, equal_nan=True)


@check
def a_rule_may_have_a_group(rank: int) -> None:
    both, alone = dist.new_group([0, 1]), [dist.new_group([0]), dist.new_group([1])]
    grad = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 0.0]])[rank : rank + 1] + torch.tensor([0.0, 0.0, 2.5])
    assert SynchronizedTopK(1, both).select(grad).indices.tolist() == [2]
    assert SynchronizedTopK(1, alone[rank]).select(grad).indices.tolist() == [0 if rank == 0 else 2]
    assert SynchronizedTopK(1, alone[rank]).as_topk(3) == PlainTopK(1, "batch")
    rule = SynchronizedTopK(1, both)
    assert rule._group_of_several() is both
    assert copy.deepcopy(mlp(rule))[0].rule is rule
    with pytest.raises(meprop.NotSupportedError, match="cannot be pickled"):
        pickle.dumps(rule)
    with pytest.raises(TypeError, match="group=-100; it is a process group that this process is in"):
        SynchronizedTopK(1, alone[1 - rank])  # what new_group gives to others


# ---------------------------------------------------------------- DistributedDataParallel

WRAPPINGS = [
    {},
    {"gradient_as_bucket_view": True},
    {"find_unused_parameters": True},
    {"static_graph": True, "gradient_as_bucket_view": True},
    {"bucket_cap_mb": 0.001},  # many buckets
]


@check
def gradients_are_those_of_one_process(rank: int) -> None:
    pairs = [(meprop.TopK(4), meprop.TopK(4)), (SynchronizedTopK(4), unified()), (SynchronizedTopK(0.1), unified(0.1))]
    for rule, single in pairs:
        for sizes in ((6, 6), (5, 2), (4, 0)):
            expected = mlp(single)
            one_process(expected, parts(sizes=sizes))
            for options in WRAPPINGS:
                for hook in (False, True):
                    model = DistributedDataParallel(mlp(rule), **options)
                    if hook:
                        model.register_comm_hook(RowSparseState(), row_sparse_hook)
                    loss(model(parts(sizes=sizes)[rank])).backward()
                    assert_gradients(model, expected)
                    if rule.scope == "batch":
                        assert len(nonzero_rows(model.module[0].weight)) <= rule.count(40)


@check
def the_hook_changes_no_bit_and_sends_k_rows(rank: int) -> None:
    model, plain = (DistributedDataParallel(mlp(SynchronizedTopK(4))) for _ in range(2))
    state = RowSparseState()
    model.register_comm_hook(state, row_sparse_hook)
    with counted() as sizes:
        loss(model(parts()[rank])).backward()
    loss(plain(parts()[rank])).backward()
    for found, expected in zip(gradients(model), gradients(plain), strict=True):
        assert torch.equal(found, expected)
    scores, masks = 8 * (40 + 30), 40 + 30 + 5
    rows = 8 * (4 * 12 + 4 * 40 + 5 * 30 + 40 + 30 + 5)  # k rows of two layers, the whole of the third, and biases
    assert sum(sizes) == scores + masks + rows
    assert state.bytes_sent == masks + rows
    assert state.bytes_dense == 8 * sum(parameter.numel() for parameter in model.parameters())


@check
def accumulated_gradients_send_the_rows_of_all_batches(rank: int) -> None:
    expected = mlp(unified())
    for step in range(3):
        one_process(expected, parts(step))
    for view in (False, True):
        model = DistributedDataParallel(mlp(SynchronizedTopK(4)), gradient_as_bucket_view=view)
        state = RowSparseState()
        model.register_comm_hook(state, row_sparse_hook)
        with model.no_sync():
            for step in range(2):
                loss(model(parts(step)[rank])).backward()
        loss(model(parts(2)[rank])).backward()
        assert_gradients(model, expected)
        rows = [nonzero_rows(model.module[layer].weight) for layer in (0, 2)]
        assert 4 < len(rows[0]) <= 12  # the union of three choices
        whole = 5 * 30 + 40 + 30 + 5
        assert state.bytes_sent == 75 + 8 * (12 * len(rows[0]) + 40 * len(rows[1]) + whole)


@check
def processes_that_choose_on_their_own_are_averaged_rightly(rank: int) -> None:
    """Nothing is lost where the rows differ, or more than them has a gradient: the hook sends what either has."""
    expected = [mlp(unified()) for _ in range(2)]
    for model, part in zip(expected, parts(), strict=True):
        (loss(model(part)) + model[2].weight.square().sum()).backward()
    assert nonzero_rows(expected[0][0].weight) != nonzero_rows(expected[1][0].weight)
    model = DistributedDataParallel(mlp(unified()))
    model.register_comm_hook(RowSparseState(), row_sparse_hook)
    (loss(model(parts()[rank])) + model.module[2].weight.square().sum()).backward()
    for found, *wanted in zip(gradients(model), *map(gradients, expected), strict=True):
        torch.testing.assert_close(found, sum(wanted) / 2)


class Branches(nn.Module):
    """A shared layer, and two of which a call uses one, or, in the end, none."""

    def __init__(self, rule: meprop.Rule) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.branches = nn.Linear(12, 12), nn.ModuleList(nn.Linear(12, 30) for _ in range(3))
        self.double()
        meprop.convert(self, rule, min_features=10, when="always", filter=lambda name, _: name == "shared")

    def forward(self, inputs_NI: Tensor, branch: int) -> Tensor:
        return self.branches[branch](self.shared(self.shared(inputs_NI).relu()))


@check
def shared_layers_and_parameters_that_are_not_used(rank: int) -> None:
    single = Branches(unified())
    outputs = [single.shared(single.shared(torch.cat(parts())).relu())]
    (sum(loss(single.branches[r](part)) for r, part in enumerate(outputs[0].split(6))) / 2).backward()
    for options in (
        {"find_unused_parameters": True},
        {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    ):
        model = DistributedDataParallel(Branches(SynchronizedTopK(4)), bucket_cap_mb=0.001, **options)
        model.register_comm_hook(RowSparseState(), row_sparse_hook)
        for _ in range(2):  # buckets are made anew after the first
            model.zero_grad()
            loss(model(parts()[rank], rank)).backward()
            for found, expected in zip(model.module.parameters(), single.parameters(), strict=True):
                assert (found.grad is None) == (expected.grad is None)
                if expected.grad is not None:
                    torch.testing.assert_close(found.grad, expected.grad)


class Optional(nn.Module):
    """The layer before the converted one is not always used; of several processes some may use it."""

    def __init__(self, rule: meprop.Rule, *, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.body, self.head = nn.Embedding(9, 12, sparse=sparse), nn.Linear(12, 40), nn.Linear(40, 3)
        self.extra = nn.Linear(12, 12)
        self.double()
        meprop.convert(self, rule, min_features=10, when="always", filter=lambda name, _: name == "body")

    def forward(self, words_N: Tensor, use_extra: bool) -> Tensor:
        inputs_NI = self.words(words_N)
        return self.head(self.body(self.extra(inputs_NI) if use_extra else inputs_NI).relu())


@check
def a_bucket_that_one_process_has_earlier_does_not_keep_others_from_choosing(rank: int) -> None:
    words = torch.tensor([[1, 2, 3], [3, 4, 8]])
    for sparse in (False, True):
        single = Optional(unified(), sparse=sparse)
        inputs = single.words(words)
        outputs = single.head(single.body(torch.cat([single.extra(inputs[0]), inputs[1]])).relu())
        (sum(map(loss, outputs.split(3))) / 2).backward()
        options = {"find_unused_parameters": True, "bucket_cap_mb": 0.0001}
        model = DistributedDataParallel(Optional(SynchronizedTopK(4), sparse=sparse), **options)
        model.register_comm_hook(RowSparseState(), row_sparse_hook)
        for _ in range(3):
            model.zero_grad()
            loss(model(words[rank], rank == 0)).backward()
            assert_gradients(model, single)


@check
def groups_of_our_own_have_the_time_out_of_the_first(rank: int) -> None:
    group = dist.new_group(timeout=timedelta(seconds=1))
    state = RowSparseState(group)
    assert state.group is group
    assert state.mask_group is not group
    choosing = SynchronizedTopK(1)._group_of_several()
    assert choosing is not dist.group.WORLD
    assert choosing is SynchronizedTopK(2)._group_of_several()
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            dist.all_reduce(torch.ones(1), group=state.mask_group)
    dist.barrier()


@check
def what_a_failed_backward_pass_left_is_not_sent(rank: int) -> None:
    expected = mlp(unified())
    one_process(expected, parts())
    model, state = DistributedDataParallel(mlp(SynchronizedTopK(4))), RowSparseState()
    model.register_comm_hook(state, row_sparse_hook)
    left = _Bucket(torch.ones(3), [torch.ones(3)], torch.empty(0, dtype=torch.uint8), None, torch.futures.Future())
    state.waiting.append(left)
    loss(model(parts()[rank])).backward()
    assert_gradients(model, expected)
    assert not left.averaged.done()


@check
def an_error_behind_the_hook_ends_the_backward_pass(rank: int) -> None:
    state, marks = RowSparseState(), torch.ones(4, dtype=torch.uint8)
    with torch.inference_mode():
        not_to_be_written = torch.zeros(4, 3)
    bucket = _Bucket(torch.zeros(12), [not_to_be_written], marks, None, torch.futures.Future())
    _average(state, bucket)
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        bucket.averaged.wait()


@check
def half_the_bytes_in_half_precision(rank: int) -> None:
    expected = mlp(unified())
    one_process(expected, parts())
    model = DistributedDataParallel(mlp(SynchronizedTopK(4)))
    model.register_comm_hook(RowSparseState(), fp16_compress_wrapper(row_sparse_hook))
    with counted() as sizes:
        loss(model(parts()[rank])).backward()
    assert_gradients(model, expected, rtol=0.02, atol=0.02)
    assert sizes[-1] == 2 * (4 * 12 + 4 * 40 + 5 * 30 + 40 + 30 + 5)


@check
def nothing_but_zeros(rank: int) -> None:
    model = DistributedDataParallel(nn.Linear(12, 40, bias=False))
    state = RowSparseState()
    model.register_comm_hook(state, row_sparse_hook)
    (0 * model(torch.ones(2, 12))).sum().backward()
    assert not model.module.weight.grad.any()
    assert state.bytes_sent == 40


@check
def embeddings_and_odd_shapes(rank: int) -> None:
    class Odd(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.words = nn.Embedding(20, 3, sparse=sparse)
            self.scale, self.conv = nn.Parameter(torch.tensor(2.0)), nn.Conv1d(3, 4, 2)
            self.empty = nn.Parameter(torch.empty(4, 0))

        def forward(self, words_NT: Tensor) -> Tensor:
            return self.conv(self.scale * self.words(words_NT).transpose(1, 2)) + self.empty.sum()

    words = torch.tensor([[1, 2, 3], [3, 4, 4]])[rank : rank + 1]
    for sparse in (False, True):
        found = []
        for hook in (False, True):
            model = DistributedDataParallel(Odd(sparse))
            if hook:
                model.register_comm_hook(RowSparseState(), row_sparse_hook)
            model(words).square().sum().backward()
            found.append(gradients(model))
        for plain, hooked in zip(*found, strict=True):
            torch.testing.assert_close(plain, hooked, rtol=0, atol=0)


@check
def training_is_that_of_one_process(rank: int) -> None:
    for make in (lambda p: meprop.optim.Adam(p, lr=0.01), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)):
        single, model = mlp(unified(0.2)), DistributedDataParallel(mlp(SynchronizedTopK(0.2)))
        model.register_comm_hook(RowSparseState(), row_sparse_hook)
        optimizers = make(single.parameters()), make(model.parameters())
        for step in range(6):
            for optimizer in optimizers:
                optimizer.zero_grad()
            one_process(single, parts(step))
            loss(model(parts(step)[rank])).backward()
            for optimizer in optimizers:
                optimizer.step()
        for found, expected in zip(model.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(found, expected)


@check
def states_in_bfloat16_are_rounded_alike_whatever_the_seeds_are(rank: int) -> None:
    model = DistributedDataParallel(mlp(SynchronizedTopK(0.2), torch.float32))
    optimizer = meprop.optim.Adam(model.parameters(), lr=0.01, state_dtype=torch.bfloat16)
    torch.manual_seed(rank)
    for step in range(4):
        optimizer.zero_grad()
        loss(model(parts(step, dtype=torch.float32)[rank])).backward()
        torch.rand(3 + rank)
        optimizer.step()
    for parameter in model.parameters():
        for tensor in (parameter.detach(), optimizer.state[parameter]["exp_avg"].float()):
            others = [torch.empty_like(tensor) for _ in range(2)]
            dist.all_gather(others, tensor)
            assert torch.equal(*others)
        assert optimizer.state[parameter]["exp_avg"].dtype == torch.bfloat16


@check
def states_in_bfloat16_of_a_share_of_the_parameters(rank: int) -> None:
    """ZeRO: each process has the states of its parameters. Weights and a checkpoint are as without it."""
    trained = []
    for state in (None, "saved"):
        model = DistributedDataParallel(mlp(unified(0.2), torch.float32))
        optimizer = ZeroRedundancyOptimizer(model.parameters(), meprop.optim.Adam, lr=0.01, state_dtype=torch.bfloat16)
        for step in range(4):
            optimizer.zero_grad()
            loss(model(parts(step, dtype=torch.float32)[rank])).backward()
            optimizer.step()
            if state is not None and step == 1:
                optimizer.consolidate_state_dict(0)
                saved = [optimizer.state_dict() if rank == 0 else None]
                dist.broadcast_object_list(saved, 0)
                optimizer = ZeroRedundancyOptimizer(
                    model.parameters(), meprop.optim.Adam, lr=0.01, state_dtype=torch.bfloat16
                )
                optimizer.load_state_dict(saved[0])
        states = list(optimizer.optim.state.values())
        assert {each["exp_avg"].dtype for each in states} == {torch.bfloat16}
        assert 0 < len(states) < len(list(model.parameters()))
        trained.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*trained, strict=True))


@check
def checkpointing_and_compiling(rank: int) -> None:
    expected = mlp(unified())
    one_process(expected, parts())
    model = DistributedDataParallel(Checkpointed(mlp(SynchronizedTopK(4))))
    model.register_comm_hook(RowSparseState(), row_sparse_hook)
    loss(model(parts()[rank])).backward()
    assert_gradients(model, expected)

    model = DistributedDataParallel(mlp(SynchronizedTopK(4)))
    loss(torch.compile(model, backend="aot_eager")(parts()[rank])).backward()
    assert_gradients(model, expected)
    with pytest.raises(Exception, match="leave out fullgraph=True"):
        torch.compile(mlp(SynchronizedTopK(4)), backend="aot_eager", fullgraph=True)(parts()[rank])


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_NI: Tensor) -> Tensor:
        for layer in self.model:
            inputs_NI = checkpoint(layer, inputs_NI, use_reentrant=False)
        return inputs_NI


def convnet(rule: meprop.Rule | None = None, **options) -> nn.Sequential:
    """Images of [3, 4, 4]: a wide kernel, a pointwise one, and a linear layer that is not converted."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 30, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(30 * 16, 5)),
    ).double()
    if rule is not None:
        meprop.convert(model, rule, min_features=20, **{"when": "always", **options})
    return model


@check
def convolutions_choose_their_channels_together(rank: int) -> None:
    for sizes, memory_format in (((3, 3), torch.contiguous_format), ((4, 0), torch.channels_last)):
        images = torch.randn(sum(sizes), 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
        batch = images.to(memory_format=memory_format).split(sizes)
        expected = convnet(unified()).to(memory_format=memory_format)
        one_process(expected, batch)
        for sparse_grad in (False, True):
            model = convnet(SynchronizedTopK(4), sparse_grad=sparse_grad).to(memory_format=memory_format)
            state, wrapped = RowSparseState(), model
            if not sparse_grad:
                wrapped = DistributedDataParallel(model)
                wrapped.register_comm_hook(state, row_sparse_hook)
            with counted() as counts:
                loss(wrapped(batch[rank])).backward()
            assert counts[:2] == [8 * 30, 8 * 40]  # the scores, of the last layer first
            sent = average_gradients(model.parameters()) if sparse_grad else state.bytes_sent
            assert_gradients(model, expected)
            assert [len(nonzero_rows(model[layer].weight)) for layer in (0, 2)] == [4, 4]
            whole = 5 * 30 * 16 + 40 + 30 + 5
            masks = 6 + 40 + 30 if sparse_grad else 40 + 30 + 5
            assert sent == masks + 8 * (4 * 3 * 9 + 4 * 40 + whole)


@check
def lstms_choose_on_their_own(rank: int) -> None:
    def tagger() -> nn.LSTM:
        torch.manual_seed(0)
        return meprop.nn.LSTM(12, 20, rule=meprop.TopK(3)).double()

    sequences = torch.randn(4, 6, 12, generator=torch.Generator().manual_seed(0)).double()
    single, model = tagger(), DistributedDataParallel(tagger())
    model.register_comm_hook(RowSparseState(), row_sparse_hook)
    single(sequences)[0].square().mean().backward()
    model(sequences[:, 3 * rank : 3 * rank + 3])[0].square().mean().backward()
    assert_gradients(model, single)


# ---------------------------------------------------------------- row-sparse gradients, without a wrapper


@check
def row_sparse_gradients_are_averaged_by_rows(rank: int) -> None:
    single, model = mlp(unified(), sparse_grad=True), mlp(SynchronizedTopK(4), sparse_grad=True)
    optimizers = [meprop.optim.Adam(each.parameters(), lr=0.01, sparse_rows="decay") for each in (single, model)]
    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        one_process(single, parts(step))
        loss(model(parts(step)[rank])).backward()
        with counted() as sizes:
            sent = average_gradients(model.parameters())
        assert model[0].weight.grad.layout == torch.sparse_coo
        assert model[0].weight.grad._values().shape == (4, 12)
        assert_gradients(model, single)
        assert sum(sizes) == sent == 6 + 40 + 30 + 8 * (4 * 12 + 4 * 40 + 5 * 30 + 40 + 30 + 5)
        for optimizer in optimizers:
            optimizer.step()
    for found, expected in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


@check
def what_some_have_no_gradient_for_counts_as_zeros(rank: int) -> None:
    torch.manual_seed(0)
    words, frozen = nn.Embedding(9, 2, sparse=True).double(), nn.Parameter(torch.ones(2), requires_grad=False)
    mixed, bias, scale = nn.Embedding(9, 2, sparse=True), nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor(1.0))
    unused = nn.Parameter(torch.ones(2))
    frozen.grad = torch.full((2,), float(rank))  # left from before
    if rank == 0:
        words(torch.tensor([7, 1, 7])).sum().backward()  # not coalesced
        (mixed(torch.tensor([2])).sum() + bias.sum()).backward()
    else:
        (scale + mixed(torch.tensor([3])).sum() + mixed.weight.sum()).backward()  # which makes it dense
    average_gradients(iter([words.weight, frozen, mixed.weight, bias, scale, unused]))
    assert words.weight.grad.is_sparse
    assert words.weight.grad.is_coalesced()
    expected = torch.zeros(9, 2).double()
    expected[1], expected[7] = 0.5, 1.0
    assert torch.equal(words.weight.grad.to_dense(), expected)
    assert nonzero_rows(words.weight) == [1, 7]
    expected = torch.full((9, 2), 0.5)
    expected[2:4] = 1.0
    assert torch.equal(mixed.weight.grad.to_dense(), expected)
    assert torch.equal(bias.grad, torch.full((3,), 0.5))
    assert scale.grad == 0.5
    assert unused.grad is None
    assert torch.equal(frozen.grad, torch.full((2,), float(rank)))
    assert average_gradients([]) == 0


@check
def a_group_averages_on_its_own(rank: int) -> None:
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    weight, bias = nn.Embedding(9, 2, sparse=True).weight, nn.Parameter(torch.ones(3))
    nn.functional.embedding(torch.tensor([rank, 5]), weight, sparse=True).sum().backward()
    bias.grad = torch.full((3,), 1.0 + rank)
    average_gradients([weight, bias], alone)
    assert nonzero_rows(weight) == [rank, 5]
    assert torch.equal(weight.grad._values(), torch.ones(2, 2))
    assert torch.equal(bias.grad, torch.full((3,), 1.0 + rank))


@check
def only_gradients_that_are_understood_are_averaged(rank: int) -> None:
    coo = nn.Parameter(torch.zeros(3, 4))
    coo.grad = torch.eye(3, 4).to_sparse()
    model = fully_shard(nn.Linear(4, 4))
    model(torch.ones(1, 4)).sum().backward()
    for parameter, name in ((coo, "sparse_coo"), (model.weight, "DTensor")):
        with pytest.raises(meprop.NotSupportedError, match=name):
            average_gradients([parameter])


@check
def row_sparse_gradients_in_wrappers_are_refused(rank: int) -> None:
    model = DistributedDataParallel(mlp(SynchronizedTopK(4), sparse_grad=True))
    with pytest.raises(
        meprop.NotSupportedError, match=r"in DistributedDataParallel.*row_sparse_hook.*average_gradients"
    ):
        model(parts()[rank])
    sharded = fully_shard(mlp(SynchronizedTopK(4), sparse_grad=True))
    with pytest.raises(NotImplementedError, match="Sparse"):  # torch's
        loss(sharded(parts()[rank])).backward()


# ---------------------------------------------------------------- FSDP


def full_gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.full_tensor() for parameter in model.parameters()]


def sharded_mlp(rule: meprop.Rule, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    model = mlp(rule, dtype)
    for layer in model[::2]:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


@check
def fully_shard_trains_as_one_process(rank: int) -> None:
    for rule, single_rule in ((meprop.TopK(4), meprop.TopK(4)), (SynchronizedTopK(4), unified())):
        for optimizer_class in (meprop.optim.Adam, meprop.optim.SGD, meprop.optim.Adagrad, torch.optim.AdamW):
            single, model = mlp(single_rule), sharded_mlp(rule)
            optimizers = [optimizer_class(each.parameters(), lr=0.05) for each in (single, model)]
            for step in range(3):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                one_process(single, parts(step))
                loss(model(parts(step)[rank])).backward()
                for found, expected in zip(full_gradients(model), gradients(single), strict=True):
                    torch.testing.assert_close(found, expected)
                for optimizer in optimizers:
                    optimizer.step()
            for found, expected in zip(model.parameters(), single.parameters(), strict=True):
                assert isinstance(found, DTensor)
                torch.testing.assert_close(found.full_tensor(), expected)


@check
def states_in_bfloat16_of_sharded_parameters_are_refused(rank: int) -> None:
    with pytest.raises(NotSupportedError, match=r"torch\.bfloat16 and a parameter of type DTensor"):
        meprop.optim.Adam(sharded_mlp(unified(), torch.float32).parameters(), state_dtype=torch.bfloat16)


@check
def fully_shard_in_mixed_precision(rank: int) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for rule in (meprop.TopK(4), SynchronizedTopK(4)):
        model, single = sharded_mlp(rule, torch.float32, mp_policy=policy), mlp(rule, torch.bfloat16)
        loss(model(parts(dtype=torch.float32)[rank]).float()).backward()
        loss(single(parts(dtype=torch.bfloat16)[rank]).float()).backward()  # of this part alone, with the rule
        average_gradients(single.parameters())
        for found, expected in zip(full_gradients(model), gradients(single), strict=True):
            torch.testing.assert_close(found, expected.float(), rtol=0.02, atol=0.02)
        assert rule.scope == "example" or int(full_gradients(model)[0].any(dim=1).sum()) <= 4


@check
def the_older_fsdp(rank: int) -> None:
    for rule, single_rule in ((meprop.TopK(4), meprop.TopK(4)), (SynchronizedTopK(4), unified())):
        single = mlp(single_rule)
        one_process(single, parts())
        for use_orig_params in (False, True):
            model = FullyShardedDataParallel(mlp(rule), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
            optimizer = meprop.optim.SGD(model.parameters(), lr=1.0)
            loss(model(parts()[rank])).backward()
            optimizer.step()
            with FullyShardedDataParallel.summon_full_params(model):
                found = torch.cat([parameter.flatten() for parameter in model.parameters()])
            expected = [(parameter - parameter.grad).flatten() for parameter in single.parameters()]
            torch.testing.assert_close(found[: sum(map(len, expected))], torch.cat(expected))


@check
def tensor_parallel_weights_are_refused(rank: int) -> None:
    mesh = dist.init_device_mesh("cpu", (2,))
    weight, x = distribute_tensor(torch.randn(40, 12), mesh), distribute_tensor(torch.randn(3, 12), mesh)
    with pytest.raises(meprop.NotSupportedError, match="the weight is a DTensor"):
        meprop.functional.linear(x, weight.requires_grad_(), rule=meprop.TopK(3))


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=60), world_size=2, rank=rank)
    for name, function in CHECKS.items():
        error = ""
        try:
            function(rank)
        except Exception:
            error = traceback.format_exc()
        (folder / f"{name}-{rank}").write_text(error)
        if error:
            break
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
