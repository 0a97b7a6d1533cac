"""Boosted residual blocks: against literal loops in float64, and what boosting promises of memory and gradients."""

from __future__ import annotations

import copy
import gc
import json
import math
import pickle
import re
import runpy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import meprop
from meprop.boosting import Residual
from meprop.edges import alpha_of, cost_matrix, edge_of, gamma_of, log_exponential_loss

CLASSES, FEATURES = 3, 5


def problem(count: int = 230) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
    return x, (x[:, :2].sign().sum(dim=1) / 2 + 1).long()


def make_block(between=nn.ReLU) -> nn.Module:
    block = nn.Sequential(nn.Linear(FEATURES, 16), between(), nn.Linear(16, FEATURES)).double()
    nn.init.zeros_(block[-1].weight)
    nn.init.zeros_(block[-1].bias)
    return block


def make_head() -> nn.Module:
    return nn.Linear(FEATURES, CLASSES).double()


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


SETTINGS = {"optimizer": adam, "steps": 60, "check_every": 5, "batch_size": 23, "gamma": 0.02}


def boosted_of(**settings) -> meprop.Boosted:
    torch.manual_seed(0)
    blocks = [make_block() for _ in range(4)]
    return meprop.boost(blocks, make_head(), problem(), **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def boosted() -> meprop.Boosted:
    found = boosted_of()
    assert len(found.heads) == 4
    return found


# ---------------------------------------------------------------- the literal reference


def literal_costs(scores, target) -> list[list[float]]:
    found = []
    for s, y in zip(scores.tolist(), target.tolist(), strict=True):
        row = [0.0 if c == y else math.exp(s[c] - s[y]) for c in range(len(s))]
        row[y] = -sum(row)
        found.append(row)
    return found


def literal_edge(outputs, target, costs) -> float:
    gained = total = 0.0
    for o, y, cost in zip(outputs.tolist(), target.tolist(), costs, strict=True):
        gained -= sum(c * p for c, p in zip(cost, o, strict=True))
        total += sum(c for label, c in enumerate(cost) if label != y)
    return gained / total


def outputs_of(boosted: meprop.Boosted, x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs o_1 to o_T."""
    with torch.no_grad():
        return [boosted.truncated(each)(x.clone()).softmax(dim=1) for each in range(1, len(boosted.heads) + 1)]


def normalised() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))


class InPlace(nn.Module):
    """A block that changes its input, as torch's modules with inplace=True do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.SiLU(inplace=True), make_block()

    def forward(self, features):
        return self.second(self.first(features))


@pytest.mark.parametrize("block", [make_block, lambda: make_block(normalised), InPlace])
def test_records_are_those_of_literal_loops_over_the_final_model(block):
    """So features that are kept are those of the model, in evaluation mode."""
    torch.manual_seed(0)
    x, y = problem()
    boosted = meprop.boost([block() for _ in range(3)], make_head(), (x, y), **SETTINGS)
    assert len(boosted.heads) == 3
    scores, edge = torch.zeros(len(x), CLASSES), 0.0
    for record, outputs in zip(boosted.blocks, outputs_of(boosted, x), strict=True):
        before, edge = edge, literal_edge(outputs, y, literal_costs(scores, y))
        alpha = 0.5 * math.log((1 + edge) / (1 - edge))
        scores = alpha * outputs
        wrong = sum(
            max(range(CLASSES), key=o.__getitem__) != c for o, c in zip(outputs.tolist(), y.tolist(), strict=True)
        )
        assert record.edge == pytest.approx(edge, abs=1e-12)
        assert record.gamma == pytest.approx(math.sqrt((edge**2 - before**2) / (1 - before**2)), abs=1e-9)
        assert record.alpha == pytest.approx(alpha, abs=1e-12)
        assert record.error == pytest.approx(wrong / len(x), abs=1e-12)
        losses = F.cross_entropy(scores, y, reduction="none").exp() - 1
        assert record.loss == pytest.approx(float(losses.mean()), abs=1e-12)
        assert record.error <= record.loss


def test_the_sum_of_all_weak_classifiers_telescopes_to_the_output(boosted):
    x, _ = problem()
    before, total = torch.zeros(len(x), CLASSES, dtype=torch.float64), 0.0
    for record, outputs in zip(boosted.blocks, outputs_of(boosted, x), strict=True):
        after = record.alpha * outputs
        total, before = total + (after - before), after
    with torch.no_grad():
        output = boosted.model(x).softmax(dim=1)
    torch.testing.assert_close(total / boosted.blocks[-1].alpha, output, rtol=0, atol=1e-6)


def test_training_is_that_of_a_literal_loop_over_whole_models():
    torch.manual_seed(0)
    x, y = problem()
    blocks, head = [make_block(), make_block()], make_head()
    copies, own_head = copy.deepcopy(blocks), copy.deepcopy(head)
    generator = torch.Generator().manual_seed(4)
    settings = {"optimizer": adam, "steps": 13, "batch_size": 50, "refine_steps": 3}
    found = meprop.boost(blocks, head, (x, y), generator=generator, **settings)
    generator.manual_seed(4)
    order = iter([part for _ in range(6) for part in torch.randperm(len(x), generator=generator).split(50)])
    for depth in (1, 2):
        optimizer = adam([*copies[depth - 1].parameters(), *own_head.parameters()])
        model = nn.Sequential(*map(Residual, copies[:depth]), own_head)
        for _ in range(13):
            chosen = next(order)
            optimizer.zero_grad()
            cross_entropy = F.cross_entropy(model(x[chosen]), y[chosen], reduction="none")
            (cross_entropy.exp() - 1).mean().log().backward()
            optimizer.step()
    optimizer = adam(model.parameters())
    for _ in range(3):
        chosen = next(order)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    for ours, literal in zip(found.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, literal, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("count", "classes"), [(1, 2), (5, 3), (63, 10)])
def test_the_weighted_oracle_equals_its_collapsed_form(count, classes):
    generator = torch.Generator().manual_seed(classes)
    o, after = torch.randn(2, count, classes, generator=generator, dtype=torch.float64).mul(3).softmax(dim=2)
    y = torch.randint(classes, (count,), generator=generator)
    before, now = 0.7 * o, 1.9 * after
    h, weights = now - before, literal_costs(before, y)
    weighted = sum(
        weights[i][c] * math.exp(h[i, c] - h[i, y[i]]) for i in range(count) for c in range(classes) if c != y[i]
    )
    collapsed = math.exp(log_exponential_loss(now, y))
    assert weighted / count == pytest.approx(collapsed, rel=1e-12)
    assert float(F.cross_entropy(now, y, reduction="none").exp().sub(1).mean()) == pytest.approx(collapsed, rel=1e-12)


def test_with_two_classes_the_edge_is_the_mean_of_y_o_under_the_weights_of_boosting():
    generator = torch.Generator().manual_seed(3)
    before, o = torch.randn(2, 40, 2, generator=generator, dtype=torch.float64).softmax(dim=2)
    y = torch.randint(2, (40,), generator=generator)
    sign, score, answer = 2 * y - 1, 0.8 * (before[:, 1] - before[:, 0]), o[:, 1] - o[:, 0]
    weights = (-sign * score).exp() / (-sign * score).exp().sum()
    assert edge_of(o, cost_matrix(0.8 * before, y)) == pytest.approx(float((weights * sign * answer).sum()), abs=1e-12)


# ---------------------------------------------------------------- numbers at their limits


def test_edges_at_their_limits():
    y = torch.tensor([0, 2])
    even = cost_matrix(torch.zeros(2, 3), y)
    assert edge_of(F.one_hot(y, 3), even) == 1
    assert edge_of(F.one_hot(1 - y % 2, 3), even) == -0.5  # all weight on one of two wrong classes
    assert edge_of(torch.full((2, 3), 1 / 3), even) == pytest.approx(0, abs=1e-7)


def test_an_edge_is_at_most_one_however_sums_are_rounded():
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 60):
        y = torch.randint(10, (count,), generator=generator)
        costs = cost_matrix(torch.randn(count, 10, generator=generator, dtype=torch.float64), y)
        assert edge_of(F.one_hot(y, 10), costs) <= 1


def test_alpha_is_odd_and_finite_for_an_edge_of_one():
    assert math.tanh(alpha_of(0.3)) == pytest.approx(0.3)
    assert alpha_of(-0.3) == pytest.approx(-alpha_of(0.3))
    assert alpha_of(0.999) < alpha_of(1.0) == -alpha_of(-1.0) < 15
    assert math.isnan(alpha_of(math.nan))


def test_gamma_is_negative_where_the_edge_shrinks():
    assert gamma_of(0.5, 0.0) == 0.5
    assert gamma_of(0.8, 0.6) == pytest.approx(math.sqrt(0.28 / 0.64))
    assert gamma_of(0.6, 0.8) == pytest.approx(-math.sqrt(0.28 / 0.36))
    assert gamma_of(0.6, 0.6) == 0
    assert gamma_of(1.0, 1.0) == gamma_of(0.9, 1.0) == 0


def test_boosting_ends_when_nothing_is_left_to_gain():
    x = torch.tensor([[-200.0], [200.0]]).repeat(20, 1)
    y = (x[:, 0] > 0).long()
    head = nn.Linear(1, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        head.bias.zero_()
    blocks = [nn.Linear(1, 1) for _ in range(3)]
    for block in blocks:
        nn.init.zeros_(block.weight)
    found = meprop.boost(blocks, head, (x, y), optimizer=lambda p: torch.optim.SGD(p, lr=1e-9), steps=3)
    assert [(each.edge, each.gamma, each.kept) for each in found.blocks] == [(1, 1, True), (1, 0, False)]


def test_the_gradient_is_that_of_the_mean_of_exp_of_the_cross_entropy_divided_by_it():
    generator = torch.Generator().manual_seed(6)
    y = torch.randint(4, (7,), generator=generator)
    logits = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    mean = (F.cross_entropy(logits, y, reduction="none").exp() - 1).mean()
    (expected,) = torch.autograd.grad(mean, logits)
    found, *_ = torch.autograd.grad(log_exponential_loss(logits, y), logits)
    torch.testing.assert_close(found, expected / mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_loss_and_its_gradient_are_those_of_float64_however_large_the_logits(dtype):
    y = torch.tensor([0, 1, 2, 0])
    logits = torch.tensor([[1e4, -1e4, 0], [1e4, -1e4, 1e4], [-2, 1, 0.5], [0, 60, -60]], dtype=dtype)
    assert F.cross_entropy(logits.float(), y).exp().isinf()

    def loss_and_gradient(of):
        of = of.clone().requires_grad_()
        loss = log_exponential_loss(of, y)
        return loss.double(), torch.autograd.grad(loss, of)[0].double()

    torch.testing.assert_close(loss_and_gradient(logits), loss_and_gradient(logits.double()), rtol=1e-3, atol=1e-3)


def test_the_loss_keeps_its_digits_where_exp_of_the_cross_entropy_is_one():
    scores = torch.tensor([[40.0, 0.0, 0.0]])
    assert float(log_exponential_loss(scores, torch.tensor([0]))) == pytest.approx(math.log(2) - 40)


# ---------------------------------------------------------------- gradients and memory


def test_each_block_gets_a_gradient_in_its_own_updates_only():
    torch.manual_seed(0)
    blocks = [make_block() for _ in range(3)]
    passes = [0] * 3
    for number, block in enumerate(blocks):

        def count(_gradient, number=number):
            passes[number] += 1

        block[0].weight.register_hook(count)
    trained = []

    def make(parameters):
        trained.append([each.detach().clone() for block in blocks for each in block.parameters()])
        return adam(parameters)

    found = meprop.boost(blocks, make_head(), problem(), **{**SETTINGS, "optimizer": make})
    assert passes == [each.steps for each in found.blocks]
    first = [each for block in blocks[:1] for each in block.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(first, trained[2], strict=False))
    assert all(each.grad is None for each in found.model.parameters())


def live_bytes() -> int:
    gc.collect()
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in gc.get_objects()
        if type(each) in (torch.Tensor, nn.Parameter) and each.layout is torch.strided
    }
    return sum(storages.values())


def test_memory_grows_by_the_kept_parameters_only():
    torch.manual_seed(0)
    live, saved, saved_by_step = [], [], set()

    class Watched(torch.optim.Adam):
        first = True

        def step(self, closure=None):
            saved_by_step.add(sum(saved))
            saved.clear()
            super().step()
            if self.first:
                live.append(live_bytes())
            self.first = False

    def pack(tensor):
        saved.append(tensor.nbytes)
        return tensor

    def make_blocks():
        for _ in range(4):
            saved.clear()
            yield make_block()

    settings = {**SETTINGS, "optimizer": lambda p: Watched(p, lr=0.01), "gamma": 0.0}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = meprop.boost(make_blocks(), make_head(), problem(230), **settings)
    assert len(found.heads) == 4
    assert len(saved_by_step) == 1  # the activations of one block, whatever the depth
    of_block = sum(each.nbytes for each in found.truncated(1).parameters())
    assert {after - before for before, after in pairwise(live[1:])} == {of_block}


# ---------------------------------------------------------------- the stop rule


class Nothing(nn.Module):
    """A block that cannot learn."""

    def forward(self, features):
        return torch.zeros_like(features)


def test_a_block_that_does_not_gain_enough_is_refused_and_ends_it():
    made = []

    def make_blocks():
        for block in (make_block(), Nothing(), make_block()):
            made.append(block)
            yield block

    torch.manual_seed(0)
    found = meprop.boost(make_blocks(), make_head(), problem(), **{**SETTINGS, "gamma": 0.4})
    kept, refused = found.blocks
    assert kept.kept
    assert not refused.kept
    assert refused.steps == SETTINGS["steps"]
    assert refused.gamma <= 0.4
    assert len(made) == 2  # the third is not even asked for
    assert found.model[0].block is made[0]
    assert len(found.model) == 2
    assert found.model[1] is found.heads[0]
    assert found.stopped.startswith("after 60 steps block 2 has a gamma of ")
    assert found.stopped.endswith("which is not above 0.4")
    assert "refused" in str(found)


def test_a_block_is_accepted_as_soon_as_it_gains_enough(boosted):
    assert all(each.gamma > SETTINGS["gamma"] and each.edge > 0 for each in boosted.blocks)
    assert all(each.steps % 5 == 0 for each in boosted.blocks)
    assert boosted.blocks[0].steps < 60
    assert boosted.stopped == "all blocks are trained"


def test_an_edge_that_is_not_positive_is_refused():
    head = make_head()
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([30.0, 0.0, 0.0]))  # the class 0 alone, which a quarter have

    def still(parameters):
        return torch.optim.SGD(parameters, lr=1e-12)

    with pytest.raises(ValueError, match=r"after 9 steps block 1 has an edge of -0\.\d+, which is not positive.*give"):
        meprop.boost([make_block()], head, problem(), optimizer=still, steps=9)


class Diverged(nn.Linear):
    """A block whose training has failed."""

    def forward(self, features):
        return super().forward(features) * torch.nan


def test_a_block_that_returns_nan_is_refused():
    torch.manual_seed(0)
    blocks = [make_block(), Diverged(FEATURES, FEATURES).double()]
    found = meprop.boost(blocks, make_head(), problem(), **SETTINGS)
    assert found.stopped == "after 60 steps block 2 has an edge of nan, which is not positive"
    assert len(found.heads) == 1
    assert found.model(problem()[0]).isfinite().all()


# ---------------------------------------------------------------- how it is used


def test_gradients_that_a_block_and_a_head_come_with_are_left_aside():
    found = []
    for stale in (None, 1e6):
        torch.manual_seed(0)
        block, head = make_block(), make_head()
        for each in (*block.parameters(), *head.parameters()) if stale else ():
            each.grad = torch.full_like(each, stale)
        generator = torch.Generator().manual_seed(2)
        found.append(meprop.boost([block], head, problem(), generator=generator, **SETTINGS).blocks)
    assert found[0] == found[1]


def test_records_of_bfloat16_blocks_are_measured_in_more_digits():
    torch.manual_seed(0)
    x, y = problem()
    block, head = make_block().bfloat16(), make_head().bfloat16()
    found = meprop.boost([block], head, (x.bfloat16(), y), **SETTINGS)
    with torch.no_grad():
        outputs = found.model(x.bfloat16()).double().softmax(dim=1)
    assert found.blocks[0].edge == pytest.approx(literal_edge(outputs, y, literal_costs(0 * outputs, y)), abs=1e-9)


def test_blocks_that_back_propagate_sparsely_are_boosted_like_others():
    torch.manual_seed(0)
    blocks = nn.ModuleList(make_block() for _ in range(2))
    meprop.convert(blocks, meprop.TopK(2, scope="batch"), min_features=1, when="always")
    rows = []
    blocks[1][0].weight.register_hook(lambda gradient: rows.append(int(gradient.abs().sum(dim=1).count_nonzero())))
    found = meprop.boost(blocks, make_head(), problem(), **{**SETTINGS, "gamma": 0.0})
    assert len(found.heads) == 2
    assert max(rows) == 2  # of 16 hidden units
    plain = nn.Sequential(*(Residual(make_block()) for _ in range(2)), make_head())
    plain.load_state_dict(found.model.state_dict())
    x, _ = problem()
    assert torch.equal(plain(x), found.model(x))
    meprop.revert(found.model)
    assert type(found.model[0].block[0]) is nn.Linear


def test_data_may_be_tensors_a_loader_or_a_generator_and_are_left_as_they_are():
    x, y = problem()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=100)
    found = []
    for data in ((x, y), loader, iter(loader), [(x[:50], y[:50].int()), (x[50:], y[50:].int())]):
        torch.manual_seed(0)
        blocks, head, generator = [make_block(), make_block()], make_head(), torch.Generator().manual_seed(2)
        found.append(meprop.boost(blocks, head, data, generator=generator, **SETTINGS).blocks)
    assert found[1:] == found[:1] * 3
    assert torch.equal(x, problem()[0])


def test_a_generator_repeats_the_order_and_the_head_is_copied():
    heads, found = [], []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        block, head = make_block(), make_head()
        before = head.weight.clone()
        generator = torch.Generator().manual_seed(seed)
        found.append(meprop.boost([block], head, problem(), generator=generator, **SETTINGS).blocks)
        heads.append(torch.equal(head.weight, before))
    assert found[0] == found[1] != found[2]
    assert all(heads)


def test_refining_trains_all_blocks_end_to_end(boosted):
    refined = boosted_of(refine_steps=40)
    assert refined.blocks == boosted.blocks
    x, y = problem()
    with torch.no_grad():
        losses = [float(F.cross_entropy(each.model(x), y)) for each in (boosted, refined)]
    assert losses[1] < losses[0]
    pairs = zip(boosted.model.parameters(), refined.model.parameters(), strict=True)
    assert not any(torch.equal(one, other) for one, other in pairs)
    assert not refined.model.training


def test_images_keep_their_shape():
    x, y = torch.randn(30, 2, 4, 4), torch.arange(30) % 2
    block = nn.Conv2d(2, 2, 3, padding=1)
    head = nn.Sequential(nn.Flatten(), nn.Linear(32, 2))
    found = meprop.boost([block], head, (x, y), steps=30, gamma=0.0)
    assert found.model(x).shape == (30, 2)


def test_the_model_is_a_plain_module_that_pickles(boosted):
    x, _ = problem()
    assert torch.equal(pickle.loads(pickle.dumps(boosted.model))(x), boosted.model(x))


def test_the_model_can_be_cut_to_any_number_of_blocks(boosted):
    assert [len(boosted.truncated(each)) for each in (1, 4)] == [2, 5]
    for blocks in (0, 5):
        with pytest.raises(ValueError, match=f"blocks={blocks}; it must be from 1 to 4"):
            boosted.truncated(blocks)


def test_the_snippet_of_the_page_runs(capsys):
    page = Path(__file__).parents[1] / "docs" / "recipes" / "boost.md"
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (300,), generator=generator)
    images = torch.rand(300, 784, generator=generator) / 2 + F.one_hot(labels, 784)
    names = {"torch": torch, "meprop": meprop, "images": images, "labels": labels}
    quick = snippet.replace("range(10)", "range(2)").replace("1200", "4").replace("6000", "4")
    exec(compile(quick, str(page), "exec"), names)
    assert names["model"](images).shape == (300, 10)
    assert "stopped: all blocks are trained" in capsys.readouterr().out


# ---------------------------------------------------------------- bad input


class Widening(nn.Linear):
    """A layer that returns the dtype of its weights, whatever it is given."""

    def forward(self, features):
        return super().forward(features.to(self.weight.dtype))


X, Y = problem()
BLOCK = make_block()
BAD = {
    "blocks of no kind": ({"blocks": 3}, TypeError, "blocks is of type int; it must be modules"),
    "no blocks": ({"blocks": []}, ValueError, "there are no blocks; give at least one module"),
    "a block of no kind": ({"blocks": [torch.relu]}, TypeError, "block 1 is of type builtin.*; it must be a torch.nn"),
    "a block twice": (
        {"blocks": [BLOCK, BLOCK], "steps": 60},
        ValueError,
        "block 2 has parameters of a block before it.*make a new one",
    ),
    "a block of another shape": (
        {"blocks": [nn.Linear(5, 4).double()]},
        ValueError,
        r"block 1 returns torch.float64 of shape \[2, 4\] for torch.float64 of shape \[2, 5\]; both must be the same",
    ),
    "a block of another dtype": (
        {"data": (X.half(), Y), "blocks": [Widening(5, 5)], "head": Widening(5, 3)},
        ValueError,
        r"block 1 returns torch.float32 of shape \[2, 5\] for torch.float16 of shape \[2, 5\]; both must be the same",
    ),
    "a head of no kind": ({"head": torch.relu}, TypeError, "head is of type builtin.*; it must be a torch.nn.Module"),
    "too few classes": (
        {"head": nn.Linear(5, 2).double()},
        ValueError,
        r"head gives outputs of shape \[2, 2\] .* with K of 2 or more and above the largest class in data, 2",
    ),
    "one class": (
        {"head": nn.Linear(5, 1).double(), "data": (X, torch.zeros_like(Y))},
        ValueError,
        r"head gives outputs of shape \[2, 1\] for 2 examples; it must give \[N, K\], with K of 2 or more",
    ),
    "data of no kind": ({"data": 3}, TypeError, "data is of type int; data is inputs"),
    "one tensor": ({"data": X}, TypeError, "data has a batch that is not a pair of tensors, but a Tensor; data is"),
    "a pair of lists": ({"data": [([1], [2])]}, TypeError, "data has a batch that is not a pair of tensors"),
    "no data": ({"data": []}, ValueError, "data is empty; give at least one example"),
    "no examples": ({"data": (X[:0], Y[:0])}, ValueError, "data is empty"),
    "another number": ({"data": (X, Y[:5])}, ValueError, "data has 230 inputs for 5 classes; give one class for each"),
    "classes as floats": ({"data": (X, Y.double())}, ValueError, r"classes of shape \[230\] and torch.float64; give"),
    "one-hot classes": ({"data": (X, F.one_hot(Y))}, ValueError, r"classes of shape \[230, 3\] and torch.int64; give"),
    "nan": ({"data": (X.clone().fill_diagonal_(math.nan), Y)}, ValueError, "data has inputs that are NaN or infinite"),
    "a negative class": ({"data": (X, Y - 1)}, ValueError, "data has the class -1; classes are numbered from 0"),
    "an optimizer itself": (
        {"optimizer": adam(BLOCK.parameters())},
        TypeError,
        "optimizer is of type Adam; it must be",
    ),
    "no optimizer": (
        {"optimizer": list},
        TypeError,
        "optimizer returns a list; it must return a torch.optim.Optimizer",
    ),
    "no steps": ({"steps": 0}, ValueError, "steps=0; it must be at least 1"),
    "half a step": ({"check_every": 0.5}, TypeError, "check_every=0.5 is of type float; it is an int"),
    "no batch": ({"batch_size": 0}, ValueError, "batch_size=0; it must be at least 1"),
    "negative refinement": ({"refine_steps": -1}, ValueError, "refine_steps=-1; it must be at least 0"),
    "gamma of one": ({"gamma": 1}, ValueError, "gamma=1; it must be from 0 to below 1"),
    "gamma of nan": ({"gamma": math.nan}, ValueError, "gamma=nan; it must be"),
    "gamma as a flag": ({"gamma": True}, TypeError, "gamma is of type bool; it must be a number"),
    "a seed": ({"generator": 3}, TypeError, "generator is of type int; it must be a torch.Generator, or None"),
}


@pytest.mark.parametrize(("changed", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_says_what_was_got_and_what_is_allowed(changed, error, message):
    torch.manual_seed(0)
    given = {"blocks": [make_block()], "head": make_head(), "data": (X, Y), "steps": 2, **changed}
    with pytest.raises(error, match=message):
        meprop.boost(**given)


def test_the_benchmark_that_trains_end_to_end_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "boost.py"))
    train_end_to_end, names = script["run_end_to_end"], script["run_end_to_end"].__globals__
    monkeypatch.setitem(names, "RESULTS", tmp_path)
    monkeypatch.setitem(names, "SETTINGS", {**names["SETTINGS"], "check_every": 100, "batch_size": 10})
    images = torch.rand(200, 784, generator=torch.Generator().manual_seed(3))
    labels = (images[:, :392].mean(dim=1) > images[:, 392:].mean(dim=1)).long()
    data = SimpleNamespace(train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    boosted = tmp_path / "boosted-dense-seed0.json"
    boosted.write_text(json.dumps({"blocks": [{"kept": True, "steps": 200}, {"kept": True, "steps": 120}]}))
    train_end_to_end(3, 0, data)  # says that there are no three blocks, and goes on
    assert list(tmp_path.iterdir()) == [boosted]
    record, saved = tmp_path / "end-to-end-2-seed0.json", tmp_path / "end-to-end-2-seed0.pt"

    train_end_to_end(2, 0, data)
    whole = json.loads(record.read_text())
    record.unlink()
    assert not saved.exists()

    measure, looks = names["accuracy"], iter(range(1))

    def stop_at_the_second_look(*arguments):
        next(looks)
        return measure(*arguments)

    monkeypatch.setitem(names, "accuracy", stop_at_the_second_look)
    with pytest.raises(StopIteration):  # after the last of the 320 updates
        train_end_to_end(2, 0, data)
    monkeypatch.setitem(names, "accuracy", measure)
    assert not record.exists()
    assert torch.load(saved)["done"] == 300
    train_end_to_end(2, 0, data)
    assert json.loads(record.read_text()) == whole
    assert not saved.exists()
