"""Activations with dropout in one pass: the function, the module, and a Sequential that finds them."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import meprop
from meprop import ops
from meprop.functional import activation as family
from meprop.functional import activation_dropout
from meprop.ops.activation import FUNCTIONS, dropped_of

SIZE = (10, 1000)  # large enough for the pass
ACTIVATIONS = list(FUNCTIONS)
MODULES = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "tanh": nn.Tanh,
}


def seeded(run):
    torch.manual_seed(3)
    return run()


def scale_of(p):
    return 65536 / (65536 - dropped_of(p))


def kept(p, shape=SIZE):
    """What `seeded` keeps, as it is for every activation."""
    return seeded(lambda: activation_dropout(torch.ones(shape), "identity", p)) != 0


# ---------------------------------------------------------------- the function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_are_those_of_torch_for_what_is_kept(activation, dtype):
    x = torch.randn(SIZE).to(dtype).requires_grad_()
    grad = torch.randn(SIZE).to(dtype)
    y = seeded(lambda: activation_dropout(x, activation, 0.3))
    expected = FUNCTIONS[activation](x.float()) * kept(0.3) * scale_of(0.3)
    close = partial(torch.testing.assert_close, atol=2e-6 if dtype == torch.float32 else 0.04, rtol=2**-7)
    close(y.float(), expected)
    assert y.dtype == dtype
    y.backward(grad)
    (wanted,) = torch.autograd.grad(expected, x, grad.float())
    close(x.grad.float(), wanted.float())
    assert seeded(lambda: activation_dropout(x.detach(), activation, 0.3)).equal(y)  # without a gradient


def test_a_seed_repeats_it_for_every_number_of_threads_and_draws_anew_without(threads):
    x = torch.randn(300, 300)
    found = []
    for team in (1, 2, 3):
        torch.set_num_threads(team)
        found.append(seeded(lambda: activation_dropout(x)))
    assert all(each.equal(found[0]) for each in found)
    assert not activation_dropout(x).equal(found[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_again_what_it_drew(reentrant):
    x = torch.randn(SIZE, requires_grad=True)
    plain, again = (
        seeded(lambda run=run: torch.autograd.grad(run(x).square().sum(), x)[0] if run else None)
        for run in (
            lambda x: activation_dropout(x * 2, "gelu"),
            None if reentrant else lambda x: checkpoint(activation_dropout, x * 2, "gelu", use_reentrant=False),
        )
    )
    if reentrant:  # which has no torch.autograd.grad
        seeded(lambda: checkpoint(activation_dropout, x * 2, "gelu", use_reentrant=True).square().sum().backward())
        again = x.grad
    assert again.equal(plain)


FOLLOWERS = {
    "add_": lambda y: y.add_(1.0),
    "mul_": lambda y: y.mul_(0.5),
    "relu_": lambda y: y.relu_(),
    "masked assignment": lambda y: y.masked_fill_(y > 1, 0.0),
    "row": lambda y: y[0].zero_(),
}


@pytest.mark.parametrize("follower", FOLLOWERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_operations_in_place_may_follow(activation, follower):
    x = torch.randn(SIZE, requires_grad=True)
    y = seeded(lambda: activation_dropout(x, activation))
    FOLLOWERS[follower](y)
    expected = FUNCTIONS[activation](x) * kept(0.5) * 2
    FOLLOWERS[follower](expected)
    for result in (y, expected):
        result.pow(2).sum().backward()
        result.grad_of_x, x.grad = x.grad, None
    torch.testing.assert_close(y.grad_of_x, expected.grad_of_x, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gradient_of_the_gradient(activation):
    x = torch.randn(SIZE, requires_grad=True)
    twice = []
    for y in (
        seeded(lambda: activation_dropout(x, activation)),
        FUNCTIONS[activation](x) * kept(0.5) * 2,
    ):
        (first,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        twice.append(torch.autograd.grad(first.pow(2).sum(), x)[0])
    torch.testing.assert_close(*twice, atol=2e-3, rtol=1e-4)


def test_several_output_gradients_at_once():
    x, grads = torch.randn(SIZE, requires_grad=True), torch.randn(3, *SIZE)
    y = seeded(lambda: activation_dropout(x, "gelu"))
    (together,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = torch.stack([torch.autograd.grad(y, x, grad, retain_graph=True)[0] for grad in grads])
    torch.testing.assert_close(together, one_by_one, atol=2e-6, rtol=1e-5)


LAYOUTS = {
    "transposed": lambda: torch.randn(1000, 10).t(),
    "channels last": lambda: torch.randn(4, 6, 20, 20).contiguous(memory_format=torch.channels_last),
    "part": lambda: torch.randn(20, 2000)[5:15, 100:1100],
    "expanded": lambda: torch.randn(10, 1).expand(10, 1000),
    "one dimension": lambda: torch.randn(9000),
    "no entries": lambda: torch.randn(0, 500),
    "a scalar": lambda: torch.randn(()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_layouts(activation, layout, monkeypatch):
    monkeypatch.setattr(family, "_LEAST_ENTRIES", 0)
    x = LAYOUTS[layout]().requires_grad_()
    y = activation_dropout(x, activation, 0.4)
    y_of_torch = F.dropout(FUNCTIONS[activation](x), 0.4)
    assert y.stride() == y_of_torch.stride()
    factors = (y / FUNCTIONS[activation](x)).detach().nan_to_num()
    is_kept = factors > 0.5
    grad = torch.randn(y.shape)
    (found,) = torch.autograd.grad(y, x, grad)
    (expected,) = torch.autograd.grad(FUNCTIONS[activation](x) * is_kept * scale_of(0.4), x, grad)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- what is left to torch


class Subclass(torch.Tensor):
    pass


LEFT_TO_TORCH = {
    "evaluation": (lambda: torch.randn(SIZE), 0.3, False),
    "p = 0": (lambda: torch.randn(SIZE), 0, True),
    "p = 1": (lambda: torch.randn(SIZE), 1, True),
    "float64": (lambda: torch.randn(SIZE).double(), 0.3, True),
    "float16": (lambda: torch.randn(SIZE).half(), 0.3, True),
    "small": (lambda: torch.randn(10, 100), 0.3, True),
    "subclass": (lambda: torch.randn(SIZE).as_subclass(Subclass), 0.3, True),
    "meta": (lambda: torch.randn(SIZE, device="meta"), 0.3, True),
}


@pytest.mark.parametrize("case", LEFT_TO_TORCH)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_left_to_torch_with_its_own_random_numbers(activation, case):
    make, p, training = LEFT_TO_TORCH[case]
    x = make().requires_grad_()
    y, expected = (
        seeded(run)
        for run in (
            lambda: activation_dropout(x, activation, p, training),
            lambda: F.dropout(FUNCTIONS[activation](x), p, training),
        )
    )
    assert type(y) is type(expected)
    assert (y.shape, y.dtype, y.device) == (expected.shape, expected.dtype, expected.device)
    assert y.is_meta or torch.equal(y, expected)
    assert y.requires_grad


def test_transforms_and_graphs_are_left_to_torch():
    x = torch.randn(SIZE)
    run = partial(activation_dropout, activation="gelu", p=0.3)
    assert torch.func.vmap(run, randomness="different")(x).shape == SIZE
    assert torch.func.grad(lambda x: run(x).sum())(x).shape == SIZE
    primal, tangent = torch.func.jvp(run, (x,), (torch.ones_like(x),))
    assert ((primal == 0) == (tangent == 0)).all()
    with torch.autograd.forward_ad.dual_level():
        dual = run(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.autograd.forward_ad.unpack_dual(dual).tangent is not None
    traced = torch.jit.trace(meprop.nn.ActivationDropout("gelu", 0.3), x, check_trace=False)
    assert "aten::dropout" in str(traced.graph)
    with torch._subclasses.FakeTensorMode():
        assert run(torch.empty(SIZE)).shape == SIZE


def test_make_fx_draws_in_its_graph():
    x = torch.randn(SIZE, requires_grad=True)
    run = nn.Sequential(nn.ReLU(), nn.Dropout(0.3))
    meprop.fusing.fuse(run)
    forward = make_fx(run)(x)
    both = make_fx(lambda x: torch.autograd.grad(run(x).sum(), x))(x)
    for graph in (forward, both):
        assert "dropout" in graph.code or "bernoulli" in graph.code
        assert not torch.equal(*(torch.stack([*graph(x)]) for _ in range(2)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_another_default_device_does_not_matter(activation):
    def run():
        x = torch.linspace(-3, 3, 10_000, device="cpu").view(SIZE[::-1]).t().requires_grad_()
        y = seeded(lambda: activation_dropout(x, activation, 0.3))
        return y.detach(), *torch.autograd.grad(y, x, torch.ones(SIZE, device="cpu"))

    expected = run()
    with torch.device("meta"):
        found = run()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_compiled_module_is_torchs_own():
    torch._dynamo.reset()
    x = torch.randn(SIZE, requires_grad=True)
    module = meprop.nn.ActivationDropout("relu", 0.3)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    y.sum().backward()
    factors = x.grad[x > 0].unique()
    torch.testing.assert_close(factors, torch.tensor([0.0, 1 / 0.7]))
    assert (compiled.eval()(x) == F.relu(x)).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast_gives_the_dtype_of_torch(activation):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(SIZE).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert activation_dropout(x, activation).dtype == F.dropout(FUNCTIONS[activation](x), 0.5).dtype


@pytest.mark.parametrize("make", [activation_dropout, lambda _, *options: meprop.nn.ActivationDropout(*options)])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("rulu", 0.5), ValueError, "activation='rulu'; .* did you mean relu"),
        ((None, 0.5), ValueError, "activation=None"),
        (("relu", 1.5), ValueError, r"p=1.5; .* from 0 to 1"),
        (("relu", float("nan")), ValueError, "p=nan"),
        (("relu", "0.5"), TypeError, "p='0.5' is of type str"),
        (("relu", True), TypeError, "p=True is of type bool"),
    ],
)
def test_errors(make, options, error, message):
    with pytest.raises(error, match=message):
        make(torch.randn(SIZE), *options)


# ---------------------------------------------------------------- the module


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_module(activation):
    module = meprop.nn.ActivationDropout(activation, 0.3)
    x = torch.randn(SIZE)
    assert torch.equal(seeded(lambda: module(x)), seeded(lambda: activation_dropout(x, activation, 0.3)))
    assert not module.state_dict()
    assert repr(module) == f"ActivationDropout({activation!r}, p=0.3)"
    assert torch.equal(pickle.loads(pickle.dumps(module)).eval()(x), FUNCTIONS[activation](x))
    assert torch.equal(copy.deepcopy(module).eval()(x), FUNCTIONS[activation](x))
    scripted = torch.jit.script(module)
    assert (scripted(x) == 0).float().mean() > 0.2
    assert torch.equal(scripted.eval()(x), FUNCTIONS[activation](x))
    names = {str(node.target) for node in torch.fx.symbolic_trace(module).graph.nodes}
    assert any("dropout" in name for name in names)


# ---------------------------------------------------------------- convert(fuse=True)


def network(p=0.3, **options):
    return nn.Sequential(
        nn.Linear(20, 200),
        nn.ReLU(**options),
        nn.Dropout(p, **options),
        nn.Sequential(nn.Linear(200, 160), nn.GELU(approximate="tanh"), nn.Dropout(p)),
        nn.Dropout(p),
        nn.Linear(160, 4),
    )


def fused(model):
    return meprop.convert(model, meprop.TopK(8), when="always", fuse=True)


def test_convert_fuses_and_revert_takes_it_back():
    model = network()
    before, kinds = copy.deepcopy(model.state_dict()), [type(each) for each in model.modules()]
    report = fused(model)
    assert report.fused == ("1 + 2", "4", "3.1 + 3.2")
    assert "one pass for activation and dropout: 1 + 2, 4, 3.1 + 3.2" in str(report)
    assert meprop.report(model).fused == report.fused
    assert [name for name, _ in model.named_modules()] == [name for name, _ in network().named_modules()]
    assert list(model.state_dict()) == list(before)
    assert isinstance(model, nn.Sequential)
    assert meprop.convert(model, meprop.TopK(9)).fused == report.fused  # which fuses nothing, and undoes nothing
    meprop.revert(model)
    assert [type(each) for each in model.modules()] == kinds
    assert meprop.report(model).fused == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_fused_model_is_its_modules_one_after_the_other(inplace):
    model = (
        network(inplace=inplace)
        if inplace is False
        else nn.Sequential(nn.Linear(20, 200), nn.ReLU(inplace=True), nn.Dropout(0.3, inplace=True), nn.Linear(200, 4))
    )
    fused(model)
    x, results = torch.randn(100, 20), []

    def by_hand(part, x):
        if isinstance(part, nn.Sequential):
            modules = list(part)
            while modules:
                first = modules.pop(0)
                if isinstance(first, nn.ReLU | nn.GELU) and modules:
                    x = activation_dropout(x, "relu" if isinstance(first, nn.ReLU) else "gelu_tanh", modules.pop(0).p)
                elif isinstance(first, nn.Dropout):
                    x = activation_dropout(x, "identity", first.p)
                else:
                    x = by_hand(first, x)
            return x
        return part(x)

    for run in (model, partial(by_hand, model)):
        y = seeded(lambda run=run: run(x))
        y.square().sum().backward()
        results.append([y.detach(), *(each.grad for each in model.parameters())])
        model.zero_grad()
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_evaluation_is_torchs_own_bit_for_bit():
    model = network().eval()
    plain, x = copy.deepcopy(model), torch.randn(100, 20)
    fused(model)
    assert torch.equal(model(x), plain(x))
    model.train()
    assert not torch.equal(model(x), model(x))


CHANGES = {
    "p": lambda model: setattr(model[2], "p", 0.8),
    "a tensor as p": lambda model: setattr(model[2], "p", torch.tensor(0.8)),
    "p of 0": lambda model: setattr(model[2], "p", 0.0),
    "the dropout alone in evaluation mode": lambda model: model[2].eval(),
    "no dropout": lambda model: model.__setitem__(2, nn.Identity()),
    "another activation": lambda model: model.__setitem__(1, nn.Tanh()),
    "a module between": lambda model: model.insert(2, nn.Identity()),
    "a deleted module": lambda model: model.__delitem__(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_modules_hold(change):
    """The share of what is not 0 behind the first Linear, and its mean."""
    model = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Dropout(0.3), nn.Identity())
    meprop.convert(nn.ModuleList([model, nn.Linear(4, 200)]), meprop.TopK(8), when="always", fuse=True)
    plain = nn.Sequential(*model)
    CHANGES[change](model)
    CHANGES[change](plain)
    x = torch.ones(300, 300)
    found, expected = model(x), plain(x)
    assert abs((found != 0).float().mean() - (expected != 0).float().mean()) < 0.02
    torch.testing.assert_close(found.unique(), expected.unique(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [nn.ReLU, nn.Dropout])
def test_another_forward_pass_of_torchs_class_runs(monkeypatch, kind):
    model = nn.Sequential(nn.ReLU(), nn.Dropout(0.3))
    meprop.fusing.fuse(model)
    monkeypatch.setattr(kind, "forward", lambda self, x: x * 0)
    assert not model(torch.ones(SIZE)).any()


def test_hooks_of_a_pair_see_what_its_modules_return():
    model, x = network(), torch.randn(100, 20)
    fused(model)
    seen = []
    handle = model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    assert meprop.report(model).fused == ("2", "4", "3.1 + 3.2")
    model(x)
    assert torch.equal(seen[0], F.relu(model[0](x)))
    handle.remove()
    assert meprop.report(model).fused == ("1 + 2", "4", "3.1 + 3.2")
    model(x)
    assert len(seen) == 1
    with nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module))):
        model(x)
    assert {nn.ReLU, nn.Dropout} <= {*seen[1:]}


def test_copies_parts_and_graphs_of_a_fused_model():
    model, x = network(), torch.randn(100, 20)
    fused(model)
    expected = seeded(lambda: model(x))
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model[:]):
        assert torch.equal(seeded(lambda each=each: each(x)), expected)
    plain = seeded(lambda: nn.Sequential(*model[:3])(x))
    graph = torch.fx.symbolic_trace(model[:3])
    assert torch.equal(seeded(lambda: graph(x)), plain)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert compiled(x).requires_grad
    meprop.revert(model)
    fused(plain := model)
    scripted = torch.jit.script(plain.eval())
    assert torch.equal(scripted(x), plain(x))


class Named(nn.Sequential):
    """A class that is not torch's."""


NOT_FUSED = {
    "no dropout": lambda: nn.Sequential(nn.Linear(4, 200), nn.ReLU()),
    "not in a Sequential": lambda: nn.TransformerEncoderLayer(128, 2, 128),
    "another class": lambda: Named(nn.Linear(4, 200), nn.ReLU(), nn.Dropout(0.1)),
    "another dropout": lambda: nn.Sequential(nn.Linear(4, 200), nn.ReLU(), nn.AlphaDropout(0.1)),
}


@pytest.mark.parametrize("case", NOT_FUSED)
def test_nothing_to_fuse_is_a_warning(case):
    model = NOT_FUSED[case]()
    with pytest.warns(meprop.NoEffectWarning, match="fuse=True changed nothing"):
        report = fused(model)
    assert report.fused == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        meprop.convert(model, meprop.TopK(8), when="always")


def test_fuse_is_a_bool():
    with pytest.raises(TypeError, match="fuse='no' is of type str"):
        meprop.convert(network(), fuse="no")


def test_the_pass_is_used(monkeypatch):
    """And only where it is meant to be."""
    calls = []
    run = ops.activation_dropout
    monkeypatch.setattr(ops, "activation_dropout", lambda *args: calls.append(args[1:3]) or run(*args))
    model = network()
    fused(model)
    model(torch.randn(100, 20))
    assert calls == [("relu", 0.3), ("gelu_tanh", 0.3), ("identity", 0.3)]
    model(torch.randn(10, 20))  # small
    model.eval()(torch.randn(100, 20))
    assert len(calls) == 3
