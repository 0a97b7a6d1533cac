"""``in_backward=True``: the backward pass updates the parameters, as the separate step would, bit for bit."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import meprop
from meprop import deferred, ops, optim
from meprop.errors import NotSupportedError
from meprop.ops import native
from optimizer_cases import KINDS, make, saved


@pytest.fixture(autouse=True)
def _products_of_small_weights(monkeypatch):
    """Lets small weights be updated by products that are not formed."""
    monkeypatch.setattr(ops.optimizer, "_SMALLEST_WHOLE", 1)


class Net(nn.Module):
    """Gradients of every kind: dense, of entries, row-sparse, of a weight that is used twice, and none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 12, sparse=True)
        self.plain = nn.Linear(12, 24)
        self.norm = nn.BatchNorm1d(24)
        self.sampled = meprop.nn.Linear(24, 40, rule=meprop.Sampled(noise=0.5))
        self.topk = meprop.nn.Linear(40, 33, rule=meprop.TopK(0.2, scope="global"))
        self.paper = meprop.nn.Linear(33, 33, rule=meprop.TopK(5, scope="example"), bias=False)
        self.unified = meprop.nn.Linear(33, 24, rule=meprop.TopK(5, scope="batch"))
        self.rows = meprop.nn.Linear(24, 24, rule=meprop.TopK(5, scope="batch"), sparse_grad=True)
        self.unused = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        x = self.norm(self.plain(self.embedding(x))).relu()
        x = self.topk(self.sampled(x).relu()).relu()
        x = self.paper(self.paper(x).relu()).relu()
        return self.rows(self.unified(x).relu()) * self.scale


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(11, (16,), generator=generator), torch.randn(16, 24, generator=generator)


def loss_of(model, step):
    x, y = batch(step)
    torch.manual_seed(step)  # entries are drawn
    return (model(x) - y).square().mean()


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def assert_equal(one, other):
    """Of two pairs of a model and its optimizer: all weights and all states are the same bits."""
    for first, second in zip(one[0].state_dict().values(), other[0].state_dict().values(), strict=True):
        assert torch.equal(first, second)
    states = [optimizer.state_dict() for _, optimizer in (one, other)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, state in states[0]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1]["state"][index][name])), name


def pair(kind="adam", in_backward=True, change=lambda model: model, **options):
    model = change(Net())
    return model, make(kind, model.parameters(), in_backward=in_backward, **options)


CHANGES = {"float32": lambda model: model, "float64": nn.Module.double, "bfloat16": nn.Module.bfloat16}


@pytest.mark.parametrize("mode", ["exact", "decay", "lazy"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_separate_step_bit_for_bit(kind, mode):
    inside, outside = (pair(kind, each, sparse_rows=mode) for each in (True, False))
    for each in (inside, outside):
        train(*each, range(5))
    assert_equal(inside, outside)


class RowNet(nn.Module):
    """Row-sparse gradients of entries, one of a weight that is used twice and one of an output that gets no entry."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.sampled = meprop.nn.Linear(24, 40, rule=meprop.Sampled(noise=0.5, exact_sum=False), sparse_grad=True)
        self.topk = meprop.nn.Linear(40, 33, rule=meprop.TopK(0.05, scope="global"), sparse_grad=True)
        self.twice = meprop.nn.Linear(33, 33, rule=meprop.TopK(0.05, scope="global"), bias=False, sparse_grad=True)
        self.unused = meprop.nn.Linear(24, 24, rule=meprop.TopK(0.05, scope="global"), sparse_grad=True)
        self.last = nn.Linear(33, 24)

    def forward(self, x):
        hidden = self.twice(self.twice(self.topk(self.sampled(x).relu()).relu()).relu()).relu()
        return self.last(hidden) + self.unused(x) * 0


def train_rows(model, optimizer, steps):
    for step in steps:
        _, x = batch(step)
        torch.manual_seed(step)
        optimizer.zero_grad()
        (model(x) - x.flip(0)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}, {"copy_dtype": torch.bfloat16}])
@pytest.mark.parametrize("mode", ["exact", "decay", "lazy"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_row_sparse_gradients_it_is_the_separate_step_bit_for_bit(kind, mode, options):
    if "state_dtype" in options and kind == "amsgrad":
        pytest.skip("there is no such step")
    models = RowNet(), RowNet()
    both = [
        (model, make(kind, model.parameters(), in_backward=each, sparse_rows=mode, **options))
        for model, each in zip(models, (True, False), strict=True)
    ]
    for each in both:
        train_rows(*each, range(5))
    assert_equal(*both)


@pytest.mark.parametrize("mode", ["exact", "decay", "lazy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_sparse_gradient_without_a_row_is_that_of_the_separate_step(kind, mode):
    both = []
    for in_backward in (True, False):
        model = RowNet()
        optimizer = make(kind, model.parameters(), in_backward=in_backward, sparse_rows=mode)
        train_rows(model, optimizer, range(2))
        optimizer.zero_grad()
        _, x = batch(2)
        torch.manual_seed(2)
        (model(x).sum() * 0).backward()  # nothing is drawn of an output gradient of zeros
        optimizer.step()
        both.append((model, optimizer))
    assert_equal(*both)


@pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("mode", ["exact", "decay", "lazy"])
def test_row_sparse_gradients_are_not_formed(monkeypatch, mode):
    counts = taken(monkeypatch)
    model = RowNet()
    train_rows(model, optim.Adam(model.parameters(), in_backward=True, sparse_rows=mode), range(1))
    assert counts == {"taken": 3, "formed": 2}  # the weight that is used twice


@pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")
@pytest.mark.parametrize(
    ("rule", "examples", "with_gradient", "is_taken"),
    [
        (meprop.TopK(1, scope="global"), 40, 40, False),
        (meprop.TopK(1, scope="global"), 40, 4, True),
        (meprop.TopK(2), 40, 4, False),  # of each example
        (meprop.TopK(2), 4, 4, True),
        (meprop.TopK(10), 4, 4, True),
        (meprop.TopK(13), 4, 4, False),  # more than two entries a row
        (meprop.TopK(13, scope="global"), 4, 4, False),
    ],
)
def test_the_gradient_of_a_large_input_is_formed_unless_few_examples_have_entries(
    monkeypatch, rule, examples, with_gradient, is_taken
):
    monkeypatch.setattr(deferred, "_LARGEST_INPUT", 4 * 24 * 4)  # that of four examples
    monkeypatch.setattr(deferred, "_MOST_ENTRIES", 2)
    counts = taken(monkeypatch)
    torch.manual_seed(0)
    layer = meprop.nn.Linear(24, 24, rule=rule)
    optimizer = optim.Adam(layer.parameters(), in_backward=True)
    output = layer(torch.randn(examples, 24))[:with_gradient]
    (output * (1 + torch.rand(with_gradient, 24))).sum().backward()
    optimizer.step()
    assert counts == {"taken": is_taken, "formed": 0}


OPTIONS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["momentum", "adamw", "adagrad"])
def test_it_is_that_of_the_implementation_that_is_chosen(kind, options):
    models = [nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    both = [
        (model, make(kind, model.parameters(), in_backward=each, **OPTIONS[options]))
        for model, each in zip(models, (True, False), strict=True)
    ]
    for model, optimizer in both:
        for step in range(4):
            optimizer.zero_grad()
            (model(batch(step)[1]) - 1).square().mean().backward()
            optimizer.step()
    assert_equal(*both)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_is_the_separate_step_in_other_dtypes(dtype):
    both = [pair("adam", each, lambda model: model.to(dtype)) for each in (True, False)]
    for model, optimizer in both:
        for step in range(4):
            optimizer.zero_grad()
            x, _ = batch(step)
            torch.manual_seed(step)
            model(x).square().mean().backward()
            optimizer.step()
    assert_equal(*both)


def taken(monkeypatch):
    """Counts the updates by products that are not formed, and the products that are."""
    counts = {"taken": 0, "formed": 0}
    step, form = optim.Adam._step_of_product, ops.GradientProduct.formed

    def counting_step(*args):
        counts["taken"] += step(*args)
        return counts["taken"] > 0

    def counting_form(product):
        counts["formed"] += 1
        return form(product)

    monkeypatch.setattr(optim.Adam, "_step_of_product", counting_step)
    monkeypatch.setattr(ops.GradientProduct, "formed", counting_form)
    return counts


def no_change(model, loss):
    return loss


def a_penalty(model, loss):
    return loss + 0.1 * model.sampled.weight.square().sum() + model.topk.weight.sum()


def a_penalty_before(model, loss):
    return model.topk.weight.square().sum() + loss


def a_hook(model, loss):
    model.sampled.weight.register_hook(lambda grad: grad * 2)
    return loss


def a_hook_of_anothers(model, loss):
    model.seen = []
    model.sampled.weight.register_post_accumulate_grad_hook(lambda weight: model.seen.append(weight.grad))
    return loss


def a_gradient_before(model, loss):
    model.sampled.weight.grad = torch.ones_like(model.sampled.weight)
    return loss


def a_sparse_gradient_before(model, loss):
    model.sampled.weight.grad = torch.eye(40, 24).to_sparse(1)
    return loss


def a_transposed_weight(model, loss):
    return loss + (model.sampled.weight.t() @ torch.ones(40)).sum()


USES = {
    no_change: 2,
    a_penalty: 0,
    a_penalty_before: 1,
    a_hook: 1,
    a_hook_of_anothers: 1,
    a_gradient_before: 1,
    a_sparse_gradient_before: 1,
    a_transposed_weight: 1,
}


@pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("use", USES)
def test_a_product_is_formed_where_the_weight_has_other_gradients(monkeypatch, use):
    """`Net` has two layers whose products are taken, and one that is used twice."""
    counts = taken(monkeypatch)
    both = [pair(in_backward=each) for each in (True, False)]
    for model, optimizer in both:
        optimizer.zero_grad()
        use(model, loss_of(model, 0)).backward()
        optimizer.step()
    assert_equal(*both)
    assert counts["taken"] == USES[use]


@pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}, {"fused": True}, {"foreach": False}])
def test_a_product_is_formed_for_the_implementations_that_need_it(monkeypatch, options):
    counts = taken(monkeypatch)
    both = [(model := Net(), optim.Adam(model.parameters(), in_backward=each, **options)) for each in (True, False)]
    for each in both:
        each[0].embedding.requires_grad_(False)
        each[0].rows.policy = replace(each[0].rows.policy, sparse_grad=False)
        train(*each, range(3))
    assert_equal(*both)
    assert (counts["taken"] > 0) == (not options)


def test_no_gradient_stays_and_the_weights_move_in_the_backward_pass():
    model, optimizer = pair()
    before = copy.deepcopy(model.state_dict())
    loss_of(model, 0).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    after = copy.deepcopy(model.state_dict())
    assert not torch.equal(after["sampled.weight"], before["sampled.weight"])
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, after[name]), name


def test_the_learning_rate_of_the_backward_pass_counts_with_groups_and_schedulers():
    def run(in_backward):
        model = Net()
        first, *others = model.children()
        groups = [{"params": first.parameters(), "lr": 0.3}]
        optimizer = optim.SGD(groups, lr=0.1, momentum=0.9, in_backward=in_backward)
        for each in others:
            optimizer.add_param_group({"params": each.parameters(), "weight_decay": 0.01})
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
            scheduler.step()
        return model, optimizer

    assert_equal(run(True), run(False))


def loaded(model, optimizer):
    other = pair(in_backward=optimizer.in_backward)
    other[0].load_state_dict(model.state_dict())
    other[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other


def loaded_in_the_other(model, optimizer):
    other = pair(in_backward=not optimizer.in_backward)
    other[0].load_state_dict(model.state_dict())
    other[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other


def thawed(model, optimizer):
    model.plain.requires_grad_(False)
    train(model, optimizer, range(3, 5))
    model.plain.requires_grad_(True)
    train(model, optimizer, range(5, 7))
    return model, optimizer


def with_groups_of_their_own(model, optimizer):
    (group,) = optimizer.param_groups
    optimizer.param_groups[:] = [
        {**group, "params": group["params"][:5], "lr": 0.5},
        {**group, "params": group["params"][5:], "lr": 0.25},
    ]
    return model, optimizer


def reverted_and_converted(model, optimizer):
    meprop.revert(model)
    train(model, optimizer, range(3, 5))
    meprop.convert(model, meprop.TopK(4), when="always", min_features=1)
    return model, optimizer


def edited(model, optimizer):
    with torch.no_grad():
        model.plain.weight.mul_(0.5)
    model.topk.weight.data = model.topk.weight.data.clone()
    return model, optimizer


LIVES = {
    "deep-copied": lambda model, optimizer: copy.deepcopy((model, optimizer)),
    "pickled": saved,
    "a state that is loaded": loaded,
    "a state of the other way": loaded_in_the_other,
    "frozen and thawed": thawed,
    "reverted and converted": reverted_and_converted,
    "edited": edited,
    "other groups": with_groups_of_their_own,
}


@pytest.mark.parametrize("life", LIVES)
def test_it_goes_on_after(life):
    both = [pair(in_backward=each) for each in (True, False)]
    for each in both:
        train(*each, range(3))
    both = [LIVES[life](*each) for each in both]
    for each in both:
        train(*each, range(7, 9))
    assert_equal(*both)


def test_a_copy_trains_by_its_own_optimizer_only():
    model, optimizer = pair()
    copied = copy.deepcopy(model)
    loss_of(copied, 0).backward()
    assert copied.plain.weight.grad is not None
    del optimizer
    gc.collect()
    loss_of(model, 0).backward()
    assert model.plain.weight.grad is not None


def test_the_optimizer_and_its_parameters_are_not_kept_alive():
    model, optimizer = pair()
    train(model, optimizer, range(2))
    alive = weakref.ref(optimizer), weakref.ref(model.plain.weight)
    del optimizer, model
    gc.collect()
    assert [each() for each in alive] == [None, None]


def test_a_new_optimizer_takes_the_place_of_a_dropped_one():
    model, optimizer = pair()
    optimizer = optim.SGD(model.parameters(), lr=0.0, in_backward=True)
    before = model.plain.weight.detach().clone()
    train(model, optimizer, range(1))
    assert torch.equal(model.plain.weight, before)


def test_a_gradient_that_is_given_by_hand_is_taken_by_step():
    model, optimizer = pair("sgd")
    before = model.plain.weight.detach().clone()
    model.plain.weight.grad = torch.ones_like(model.plain.weight)
    optimizer.step()
    torch.testing.assert_close(model.plain.weight.detach(), before - 0.1)
    assert model.plain.weight.grad is None


def test_a_closure_has_the_backward_pass_in_it():
    both = [pair(in_backward=each) for each in (True, False)]
    for model, optimizer in both:
        for step in range(3):
            optimizer.zero_grad()

            def closure(model=model, step=step):
                loss = loss_of(model, step)
                loss.backward()
                return loss

            assert optimizer.step(closure) > 0
    assert_equal(*both)


def test_hooks_of_steps_run_once():
    model, optimizer = pair()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, range(2))
    assert calls == ["before", "after"] * 2


def test_gradients_that_are_asked_for_are_given_and_update_nothing():
    model, _ = pair()
    before = copy.deepcopy(model.state_dict())
    found = torch.autograd.grad(loss_of(model, 0), [model.plain.weight, model.sampled.weight, model.paper.weight])
    plain, _ = pair(in_backward=False)
    expected = torch.autograd.grad(loss_of(plain, 0), [plain.plain.weight, plain.sampled.weight, plain.paper.weight])
    assert all(torch.equal(*each) for each in zip(found, expected, strict=True))
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_only_the_named_inputs_are_updated():
    model, _ = pair()
    before = copy.deepcopy(model.state_dict())
    loss_of(model, 0).backward(inputs=[model.topk.weight])
    moved = [name for name, value in model.named_parameters() if not torch.equal(before[name], value)]
    assert moved == ["topk.weight"]


def twice(model, _):
    loss_of(model, 0).backward()
    loss_of(model, 1).backward()


def once_more(model, optimizer):
    loss_of(model, 0).backward()
    model.plain.weight.grad = torch.ones_like(model.plain.weight)
    optimizer.step()


def of_a_graph(model, _):
    x, y = batch(0)
    (model.plain(model.embedding(x))[:, :24] - y).square().mean().backward(create_graph=True)


def with_another(model, optimizer):
    other = optim.SGD(model.parameters(), lr=0.1, in_backward=True)
    train(model, optimizer, range(1))
    del other


def scaled(model, optimizer):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)


def clipped(model, _):
    loss_of(model, 0).backward()
    optim.clip_grad_norm_(model.parameters(), 1.0)


def in_processes(model, _):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        loss_of(model, 0).backward()


def in_one_wrapped_process(model, optimizer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 1)
        twice(model, optimizer)


REFUSED = {
    "several processes": (in_processes, "without in_backward"),
    "one process": (in_one_wrapped_process, "DistributedDataParallel sets each gradient twice"),
    "accumulation": (twice, "Call step"),
    "a gradient by hand after an update": (once_more, "without in_backward"),
    "create_graph": (of_a_graph, "without in_backward"),
    "two optimizers": (with_another, "one optimizer only"),
    "a scaler": (scaled, "bfloat16"),
    "clipping": (clipped, "register_hook"),
}


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
@pytest.mark.parametrize("what", REFUSED)
def test_what_it_cannot_do_is_refused_with_the_remedy(what):
    act, remedy = REFUSED[what]
    with pytest.raises(NotSupportedError, match=remedy):
        act(*pair())


def test_accumulation_is_refused_before_it_changes_anything():
    model, _ = pair()
    loss_of(model, 0).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotSupportedError, match="second gradient"):
        loss_of(model, 1).backward()
    assert all(each.grad is None or each.grad.any() for each in model.parameters())  # none is a placeholder
    for name, value in model.named_parameters():
        assert torch.equal(before[name], value), name


WRONG = {
    "an option that is none": (lambda p: optim.Adam(p, in_backward=1), TypeError, "True or False"),
    "differentiable": (lambda p: optim.SGD(p, in_backward=True, differentiable=True), ValueError, "leave one"),
    "a group's own": (lambda p: optim.SGD([{"params": p, "in_backward": True}]), ValueError, "one optimizer for each"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_options_say_what_is_right(what):
    make_one, error, message = WRONG[what]
    with pytest.raises(error, match=message):
        make_one([nn.Parameter(torch.ones(2))])


def test_what_is_frozen_after_the_forward_pass_is_not_updated():
    both = [pair(in_backward=each) for each in (True, False)]
    for model, optimizer in both:
        loss = loss_of(model, 0)
        model.topk.requires_grad_(False)
        loss.backward()
        optimizer.step()
        assert model.topk.weight not in optimizer.state
        model.topk.requires_grad_(True)
        train(model, optimizer, range(2))
    assert_equal(*both)


def test_zero_grad_and_step_go_on_after_a_backward_pass_that_fails():
    model, optimizer = pair()

    def fail(_):
        raise ValueError("in the middle")

    loss = loss_of(model, 0)
    handle = model.topk.weight.register_hook(fail)
    with pytest.raises(ValueError, match="in the middle"):
        loss.backward()
    handle.remove()
    steps = [optimizer.state[layer.weight].get("step") for layer in (model.rows, model.topk, model.plain)]
    assert steps == [1, None, None]
    optimizer.zero_grad()
    optimizer.step()
    inside = model, optimizer
    outside = pair(in_backward=False)
    outside[0].load_state_dict(model.state_dict())
    outside[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (inside, outside):
        train(*each, range(3))
    assert_equal(inside, outside)


def test_a_weight_in_several_reentrant_checkpoints_is_refused():
    layer = meprop.nn.Linear(24, 24, rule=meprop.TopK(4))
    optimizer = optim.Adam(layer.parameters(), in_backward=True)
    x = batch(0)[1].requires_grad_()
    for reentrant in (False, True):
        loss = checkpoint(layer, checkpoint(layer, x, use_reentrant=reentrant), use_reentrant=reentrant).sum()
        if not reentrant:
            loss.backward()
            optimizer.step()
    with pytest.raises(NotSupportedError, match="without in_backward"):
        loss.backward()


def test_an_update_of_a_weight_that_the_graph_still_needs_is_noticed():
    """As with any change in place: autograd refuses the weight of another version."""
    layer = nn.Linear(4, 4, bias=False)
    optimizer = optim.SGD(layer.parameters(), lr=0.1, in_backward=True)
    x = torch.randn(3, 4, requires_grad=True)
    loss = nn.functional.linear(layer(x), layer.weight.detach()).sum() + layer(x.detach()).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_the_same(backend):
    def run(in_backward):
        torch.manual_seed(0)
        sparse = meprop.nn.Linear(24, 24, rule=meprop.TopK(0.2, scope="global"))
        model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), sparse, nn.Linear(24, 24))
        optimizer = optim.Adam(model.parameters(), in_backward=in_backward)
        compiled = torch.compile(model, backend=backend)
        for step in range(3):
            optimizer.zero_grad()
            compiled(batch(step)[1]).square().mean().backward()
            optimizer.step()
        return model, optimizer

    assert_equal(run(True), run(False))


def test_a_compiled_loop_does_not_compile_the_update_of_each_parameter():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(4)))
    optimizer = optim.Adam(model.parameters(), in_backward=True)

    def step(x):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    torch.compile(step, backend="eager")(batch(0)[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert all(optimizer.state[each]["step"] == 1 for each in model.parameters())


def test_a_simplifier_cuts_what_is_updated():
    def run(in_backward):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 24))
        meprop.convert(model, meprop.TopK(2, scope="example"), when="always", min_features=1)
        optimizer = optim.Adam(model.parameters(), in_backward=in_backward)
        simplifier = meprop.Simplifier(model, threshold=0.02, optimizer=optimizer, check_every=4)
        for step in range(12):
            optimizer.zero_grad()
            (model(batch(step)[1]) - 1).square().mean().backward()
            optimizer.step()
            simplifier.step()
        assert model[0].weight.shape[0] < 64
        return model, optimizer

    assert_equal(run(True), run(False))


def test_small_parameters_are_left_to_the_step(monkeypatch):
    monkeypatch.setattr(ops.optimizer, "_SMALLEST_WHOLE", 12)
    small, large = nn.Linear(11, 1), nn.Linear(12, 1)
    plain = copy.deepcopy((small, large))
    for layers, in_backward in (((small, large), True), (plain, False)):
        params = [each for layer in layers for each in layer.parameters()]
        optimizer = optim.Adam(params, lr=0.1, in_backward=in_backward)
        for _ in range(2):
            sum(layer(torch.ones(3, layer.in_features)).square().sum() for layer in layers).backward()
            assert [each.grad is None for each in params] == [False, False, in_backward, False]
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(ours.weight, theirs.weight) for ours, theirs in zip((small, large), plain, strict=True))
