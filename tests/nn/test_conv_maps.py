"""Convolutions with rules that choose from the whole gradient, which keep maps of an example and a channel."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import meprop
from meprop import functional
from meprop.record import Activity
from meprop.speed import Decision

GLOBAL = meprop.TopK(3, scope="global")
RULES = [
    GLOBAL,
    meprop.TopK(energy=0.7),
    meprop.RandomK(3, scope="global"),
    meprop.Sampled(noise=0.5),
    meprop.Sampled(3),
    meprop.Sampled(3, exact_sum=False),
    meprop.CompensatedTopK(3, scope="global"),
    meprop.InBlocks(meprop.TopK(1, scope="global"), 4),
]
FORMS = {
    "2d": (nn.Conv2d, (3, 20, 3), {"padding": 1}, (4, 3, 6, 7)),
    "2d, all moves": (nn.Conv2d, (3, 20, (3, 2)), {"stride": (2, 1), "dilation": (1, 2), "padding": 2}, (4, 3, 6, 7)),
    "1d": (nn.Conv1d, (3, 20, 4), {"padding": "same"}, (5, 3, 9)),
    "kernel 1 with a stride": (nn.Conv1d, (3, 20, 1), {"stride": 2}, (5, 3, 9)),
    "reflected": (nn.Conv2d, (3, 20, 3), {"padding": 1, "padding_mode": "reflect"}, (4, 3, 6, 7)),
}


def make(name: str, rule: meprop.Rule) -> tuple[nn.Module, nn.Module, Tensor]:
    """A converted layer, torch's own of the same parameters, and an input."""
    plain, sizes, options, shape = FORMS[name]
    torch.manual_seed(0)
    theirs = plain(*sizes, **options)
    ours = copy.deepcopy(theirs)
    meprop.convert(ours, rule, min_features=1, when="always")
    return ours, theirs, torch.randn(shape)


def gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(layer(x), (x, *layer.parameters()), grad.to(layer(x).dtype)))


def tailed(output: Tensor) -> Tensor:
    """An output gradient whose maps have different norms."""
    generator = torch.Generator().manual_seed(2)
    scale = (
        torch.randn(output.shape[:2], generator=generator)
        .mul(2)
        .exp()
        .view(*output.shape[:2], *[1] * (output.dim() - 2))
    )
    return torch.randn(output.shape, generator=generator) * scale


def masked(grad: Tensor, rule: meprop.Rule) -> Tensor:
    """What the rule keeps of a gradient, by the norms of its maps."""
    torch.manual_seed(1)
    norms = torch.linalg.vector_norm(grad.flatten(2), dim=2)
    kept = rule.select(norms)
    bare = kept if kept.shared is None else copy.copy(kept)
    if kept.shared is not None:
        object.__setattr__(bare, "shared", None)
    factors = (bare.to_dense() / norms).view(*norms.shape, *[1] * (grad.dim() - 2))
    sparse = grad * factors
    return sparse if kept.shared is None else sparse + (grad - sparse).mean(dim=0)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_gradients_are_those_of_the_masked_gradient(poisoned, rule, name):
    ours, theirs, x = make(name, rule)
    assert torch.equal(ours(x), theirs(x))
    grad = tailed(theirs(x))
    found = gradients(ours, x, grad)
    expected = gradients(theirs, x, masked(grad, rule))
    expected[2] = gradients(theirs, x, grad)[2]  # the bias gets the whole gradient
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    density = ours.policy.record.density
    assert 0 < density <= 0.5


def test_a_dense_step_is_torch_bit_for_bit():
    ours, theirs, x = make("2d", meprop.Sampled(noise=0.001))
    grad = torch.ones_like(theirs(x))
    assert all(torch.equal(*pair) for pair in zip(gradients(ours, x, grad), gradients(theirs, x, grad), strict=True))
    assert (ours.policy.record.passes, ours.policy.record.dense_passes) == (1, 1)


@pytest.mark.parametrize("rule", [GLOBAL, meprop.Sampled(noise=0.5)], ids=str)
def test_channels_last_stays_and_gives_the_same_maps(rule):
    ours, _, x = make("2d", rule)
    grad = tailed(ours(x))
    expected = gradients(ours, x, grad)
    last = {"memory_format": torch.channels_last}
    found = gradients(ours.to(**last), x.contiguous(**last), grad.contiguous(**last))
    assert found[0].is_contiguous(**last)
    assert found[1].stride() == ours.weight.stride()
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(use_reentrant):
    ours, _, x = make("2d", meprop.Sampled(noise=0.5))
    grad = tailed(ours(x))
    found = []
    for run in (ours, lambda x: checkpoint(ours, x, use_reentrant=use_reentrant)):
        ours.zero_grad()
        torch.manual_seed(1)
        run(x.clone().requires_grad_()).backward(grad)
        found.append(ours.weight.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("rule", [GLOBAL, meprop.Sampled(3), meprop.TopK(energy=0.7)], ids=str)
@pytest.mark.parametrize("name", ["2d", "1d"])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_compiled_gradients_are_the_eager_ones(name, rule):
    ours, _, x = make(name, rule)
    grad = tailed(ours(x))
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    found = []
    for each in (ours, compiled):
        each_x = x.clone().requires_grad_()
        output = each(each_x)
        torch.manual_seed(1)
        found.append(torch.autograd.grad(output, (each_x, ours.weight, ours.bias), grad))
    if isinstance(rule, meprop.Sampled):  # a graph draws its key elsewhere
        assert all(one.shape == other.shape for one, other in zip(*found, strict=True))
        return
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_rule_that_a_graph_cannot_have_is_refused_by_name():
    ours, _, x = make("2d", meprop.RandomK(3, scope="global"))
    torch._dynamo.reset()
    with pytest.raises((meprop.NotSupportedError, torch._dynamo.exc.Unsupported)):
        torch.compile(ours, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()
    output = torch.compile(ours, backend="aot_eager")(x)  # by parts: the layer itself is not compiled
    output.sum().backward()
    assert ours.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    ours, _, x = make("2d", GLOBAL)
    with torch.autocast("cpu", dtype=dtype):
        output = ours(x)
    assert output.dtype == dtype
    grad = tailed(output).to(dtype)
    output.backward(grad)
    expected = gradients(nn.Conv2d(3, 20, 3, padding=1), x.to(dtype).float(), masked(grad.float(), GLOBAL))[1]
    assert ours.weight.grad.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.weight.grad, expected, rtol=4 * eps, atol=4 * eps * float(expected.abs().max()))


@pytest.mark.parametrize("frozen", ["weight", "input"])
def test_what_needs_no_gradient_gets_none(frozen):
    ours, _, x = make("2d", GLOBAL)
    grad = tailed(ours(x))
    of_x, of_weight, _ = gradients(ours, x, grad)
    ours.weight.requires_grad_(frozen != "weight")
    x.requires_grad_(frozen != "input")
    output = ours(x)
    if frozen == "weight":
        assert output.grad_fn.saved_tensors[0] is None
    output.backward(grad)
    found, expected = (x.grad, of_x) if frozen == "weight" else (ours.weight.grad, of_weight)
    assert torch.equal(found, expected)
    assert (ours.weight.grad if frozen == "weight" else x.grad) is None


@pytest.mark.parametrize(
    "rule", [GLOBAL, meprop.Sampled(noise=0.5), meprop.CompensatedTopK(3, scope="global")], ids=str
)
def test_an_empty_batch(rule):
    ours, _, x = make("2d", rule)
    x = x[:0].requires_grad_()
    ours(x).sum().backward()
    assert x.grad.shape == x.shape
    assert not ours.weight.grad.any()


def test_a_map_with_nan_is_kept_first():
    ours, _, x = make("2d", meprop.TopK(1, scope="global"))
    grad = tailed(ours(x))
    grad[2, 7, 0, 0] = float("nan")
    found = gradients(ours, x, grad)
    assert found[1].isfinite().flatten(1).all(dim=1).logical_not().nonzero().tolist() == [[7]]


def test_an_example_hits_a_channel_if_its_map_is_kept_and_not_zero():
    ours, _, x = make("2d", GLOBAL)
    grad = tailed(ours(x))
    grad[0], grad[1, 3:] = 0, 0
    grad[1, :3] *= 1e-6
    ours.activity = Activity.of_units(20)
    gradients(ours, x, grad)
    assert ours.activity.examples == 4
    kept = GLOBAL.select(torch.linalg.vector_norm(grad.flatten(2), dim=2)).to_dense()
    assert torch.equal(ours.activity.hits, (kept != 0).sum(dim=0))
    assert ours.activity.hits.sum() == 12
    torch.testing.assert_close(gradients(make("2d", GLOBAL)[0], x, grad)[1], gradients(ours, x, grad)[1])


def test_convert_measures_and_says_what_it_did(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3), nn.Conv2d(64, 64, 3, groups=2))
    timed = []

    def decide(rule, shape):
        with torch.enable_grad():
            dense, sparse = shape.passes(rule.typical(0.04))
            timed.append((shape.needs, [each.shape for each in dense()] == [each.shape for each in sparse()]))
        return Decision(False, shape.rows, 1.0, 2.0)

    monkeypatch.setattr("meprop.speed.decide", decide)
    report = str(meprop.convert(model, meprop.Sampled(noise=0.25)))
    assert "groups=2" in report
    assert isinstance(model[0], meprop.nn.Conv2d)
    model[:2](torch.randn(2, 3, 6, 6)).sum().backward()
    assert timed == [((False, True, True), True)]
    assert model[0].decision is not None


def test_what_is_not_supported_says_why():
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(20, 3, 3, 3, requires_grad=True)
    with pytest.raises(meprop.NotSupportedError, match="differs for the two products"):
        functional.conv2d(x, weight, rule=meprop.PerProduct(input=GLOBAL, weight=meprop.Sampled()))
    with pytest.raises(meprop.NotSupportedError, match="groups=3"):
        functional.conv2d(x, weight[:, :1], groups=3, rule=GLOBAL)
    output = functional.conv2d(x, weight, rule=GLOBAL)
    with pytest.raises(meprop.NotSupportedError, match="create_graph=True"):
        torch.autograd.grad(output.sum(), weight, create_graph=True)


def test_a_pointwise_convolution_still_chooses_at_each_position():
    x, weight = torch.randn(4, 3, 5, 5), torch.randn(20, 3, 1, 1, requires_grad=True)
    grad = torch.randn(4, 20, 5, 5)
    rows = grad.movedim(1, -1)
    kept = GLOBAL.select(rows.flatten(0, -2)).to_dense().view(rows.shape).movedim(-1, 1)
    (found,) = torch.autograd.grad(functional.conv2d(x, weight, rule=GLOBAL), weight, grad)
    (expected,) = torch.autograd.grad(F.conv2d(x, weight), weight, kept)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("ceiling", [0.01, 1])
def test_rows_are_left_out_of_weights_gradients_of_sparse_pointwise_passes_only(kernel, ceiling):
    rule = meprop.Sampled(noise=0.25, exact_sum=False, ceiling=ceiling)
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(20, 3, kernel, kernel, requires_grad=True)
    found = []
    for sparse_grad in (False, True):
        torch.manual_seed(0)
        output = functional.conv2d(x, weight, rule=rule, sparse_grad=sparse_grad)
        found += torch.autograd.grad(output, weight, torch.randn_like(output))
    assert not found[0].is_sparse
    assert found[1].is_sparse == (kernel == 1 and ceiling == 1)
    torch.testing.assert_close(found[1].to_dense(), found[0], rtol=0, atol=0)
