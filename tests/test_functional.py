"""functional.linear: exact forward, sparse backward, in every mode in which a layer is called."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import meprop
from cases import LAYOUTS, bits
from meprop.functional.linear import linear_with_policy
from meprop.ops import reference
from meprop.policy import Policy
from meprop.record import Activity, Record

SCOPES = ["example", "batch"]

# batch 0 and 1, odd widths, one feature, k = 1, no and many leading dimensions
SHAPES = [
    ((0,), 5, 9, 3),
    ((1,), 1, 2, 1),
    ((1,), 33, 17, 16),
    ((7,), 19, 63, 8),
    ((), 11, 13, 2),
    ((2, 3), 5, 31, 4),
    ((2, 1, 3), 8, 40, 1),
    ((64,), 50, 130, 20),
]


def make(batch, inputs, outputs, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in [(*batch, inputs), (outputs, inputs), (outputs,)]
    )
    grad_output = torch.randn((*batch, outputs), generator=generator).to(dtype)
    return x, weight, bias, grad_output


def expected_gradients(x, weight, grad_output, rule):
    """By the oracle, in float64: dense products with everything that the rule leaves out set to zero."""
    grad_NO = grad_output.reshape(-1, grad_output.shape[-1])
    select = reference.topk_rows if rule.scope == "example" else reference.topk_columns
    _, indices = select(grad_NO, rule.count(grad_NO.shape[1]))
    kept = torch.zeros_like(grad_NO, dtype=torch.bool)
    kept.scatter_(1, indices.long().expand(grad_NO.shape[0], -1), value=True)
    sparse_NO = torch.where(kept, grad_NO, 0).double()
    x_NI = x.detach().reshape(-1, x.shape[-1]).double()
    grad_x = (sparse_NO @ weight.detach().double()).reshape(x.shape)
    return grad_x, sparse_NO.t() @ x_NI, grad_NO.double().sum(dim=0)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "inputs", "outputs", "k"), SHAPES)
def test_gradients_equal_the_oracle(poisoned, batch, inputs, outputs, k, dtype, scope):
    x, weight, bias, grad_output = make(batch, inputs, outputs, dtype)
    rule = meprop.TopK(k, scope=scope)
    y = meprop.functional.linear(x, weight, bias, rule=rule)
    assert torch.equal(bits(y), bits(F.linear(x, weight, bias)))
    y.backward(grad_output)
    eps = torch.finfo(dtype).eps
    for tensor, expected in zip((x, weight, bias), expected_gradients(x, weight, grad_output, rule), strict=True):
        assert tensor.grad.dtype == dtype
        torch.testing.assert_close(
            tensor.grad.double(),
            expected,
            rtol=4 * eps,
            atol=16 * eps * max(1, expected.abs().max()) if expected.numel() else 0,
        )


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_gradients_of_any_shape_and_layout_equal_the_oracle(data):
    batch = tuple(data.draw(st.lists(st.integers(0, 5), max_size=3), "batch"))
    inputs, outputs = data.draw(st.integers(1, 40), "I"), data.draw(st.integers(2, 70), "O")
    rule = meprop.TopK(data.draw(st.integers(1, outputs - 1), "k"), scope=data.draw(st.sampled_from(SCOPES), "scope"))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]), "dtype")
    x, weight, bias, grad_output = make(batch, inputs, outputs, dtype, seed=inputs)
    layout = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)), "weight's layout")]
    strided = layout(weight.detach()).requires_grad_()
    if len(batch) == 1:
        grad_output = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)), "gradient's layout")](grad_output)
    meprop.functional.linear(x, strided, bias, rule=rule).backward(grad_output)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for tensor, expected in zip((x, strided, bias), expected_gradients(x, weight, grad_output, rule), strict=True):
        torch.testing.assert_close(tensor.grad.double(), expected, rtol=tolerance, atol=tolerance)


class Alternate(meprop.Rule):
    """A rule of somebody's own: every other feature, of every example or of the batch."""

    def __init__(self, columns):
        self.columns = columns

    def count(self, features):
        return features // 2

    def select(self, grad_output_NO):
        rows, width = grad_output_NO.shape
        indices = torch.arange(0, width - 1, 2, dtype=torch.int32)
        values = grad_output_NO[:, indices.long()]
        if self.columns:
            return meprop.ColumnSelection(values, indices, width)
        return meprop.RowSelection(values, indices.expand(rows, -1), width)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_rule_of_ones_own_is_multiplied_like_topk(columns, dtype):
    x, weight, bias, grad_output = make((6,), 5, 21, dtype)
    meprop.functional.linear(x, weight, bias, rule=Alternate(columns)).backward(grad_output)
    kept = grad_output.double().clone()
    kept[:, 1::2] = 0
    kept[:, 20] = 0
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    torch.testing.assert_close(x.grad.double(), kept @ weight.detach().double(), **tolerance)
    torch.testing.assert_close(weight.grad.double(), kept.t() @ x.detach().double(), **tolerance)
    torch.testing.assert_close(bias.grad.double(), grad_output.double().sum(0), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_row_sparse_gradient_is_the_dense_one_without_its_zero_rows(dtype):
    rule = meprop.TopK(4, scope="batch")
    x, weight, bias, grad_output = make((2, 3), 5, 21, dtype)
    meprop.functional.linear(x, weight, bias, rule=rule).backward(grad_output)
    dense, weight.grad = weight.grad, None
    meprop.functional.linear(x, weight, bias, rule=rule, sparse_grad=True).backward(grad_output)
    assert weight.grad.layout == torch.sparse_coo
    assert weight.grad._indices().tolist() == [dense.abs().sum(1).nonzero().flatten().tolist()]
    assert weight.grad._values().shape == (4, 5)
    assert torch.equal(weight.grad.to_dense(), dense)
    meprop.functional.linear(x, weight, bias, rule=rule, sparse_grad=True).backward(grad_output)
    assert torch.equal(weight.grad.to_dense(), 2 * dense)  # it accumulates


def test_a_row_sparse_gradient_needs_a_rule_that_keeps_whole_columns():
    x, weight, bias, grad_output = make((6,), 5, 21)
    with pytest.raises(ValueError, match=r"sparse_grad=True with TopK\(k=3, scope='example'\).*scope='batch'"):
        meprop.functional.linear(x, weight, bias, rule=meprop.TopK(3), sparse_grad=True)
    rows, dense = (
        torch.autograd.grad(
            meprop.functional.linear(x, weight, bias, rule=Alternate(columns=False), sparse_grad=sparse_grad),
            weight,
            grad_output,
        )[0]
        for sparse_grad in (True, False)
    )  # a rule that does not say its scope may leave out rows
    assert rows.is_sparse
    assert torch.equal(rows.to_dense(), dense)


@pytest.mark.parametrize("scope", SCOPES)
def test_an_expanded_gradient_works(scope):
    x, weight, bias, _ = make((6,), 5, 20)
    rule = meprop.TopK(3, scope=scope)
    meprop.functional.linear(x, weight, bias, rule=rule).sum().backward()
    expected = expected_gradients(x, weight, torch.ones(6, 20).double(), rule)
    for tensor, gradient in zip((x, weight, bias), expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)
    assert weight.grad[:3].abs().sum(1).all()  # of equals, the lower index
    assert not weight.grad[3:].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scope", SCOPES)
def test_nan_and_infinity_come_through(scope, value):
    x, weight, _, grad_output = make((4,), 6, 30, torch.float32)
    grad_output[2, 17] = value
    meprop.functional.linear(x, weight, rule=meprop.TopK(2, scope=scope)).backward(grad_output)
    assert not x.grad[2].isfinite().any()
    assert not weight.grad[17].isfinite().all()


def test_a_zero_gradient_gives_zero_gradients():
    x, weight, bias, grad_output = make((4,), 6, 30)
    meprop.functional.linear(x, weight, bias, rule=meprop.TopK(2)).backward(torch.zeros_like(grad_output))
    assert not any(tensor.grad.any() for tensor in (x, weight, bias))


@pytest.mark.parametrize("k", [20, 21, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keeping_everything_is_torch_bit_for_bit(k, dtype):
    x, weight, bias, grad_output = make((33,), 17, 20, dtype)
    meprop.functional.linear(x, weight, bias, rule=meprop.TopK(k)).backward(grad_output)
    sparse = [tensor.grad.clone() for tensor in (x, weight, bias)]
    for tensor in (x, weight, bias):
        tensor.grad = None
    F.linear(x, weight, bias).backward(grad_output)
    for gradient, tensor in zip(sparse, (x, weight, bias), strict=True):
        assert torch.equal(bits(gradient), bits(tensor.grad))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_what_needs_no_gradient_is_not_computed(monkeypatch, scope, needed):
    x, weight, bias, grad_output = make((5,), 6, 30)
    for tensor, needs in zip((x, weight, bias), needed, strict=True):
        tensor.requires_grad_(needs)
    asked = []
    original = meprop.ops.backward_with

    def record(choice, grad, weight, x, needs_bias, *others):
        asked.append((weight is not None, x is not None, needs_bias))
        return original(choice, grad, weight, x, needs_bias, *others)

    monkeypatch.setattr(meprop.ops, "backward_with", record)
    y = meprop.functional.linear(x, weight, bias, rule=meprop.TopK(3, scope=scope))
    saved = [] if y.grad_fn is None or not hasattr(y.grad_fn, "saved_tensors") else y.grad_fn.saved_tensors
    y.backward(grad_output)
    assert asked == ([needed] if any(needed[:2]) else [])  # a bias alone is left to torch
    if needed[:2] == (True, False):
        assert saved[0] is None  # the input of a frozen layer is not kept in memory
    expected = expected_gradients(x, weight, grad_output, meprop.TopK(3, scope=scope))
    for tensor, needs, gradient in zip((x, weight, bias), needed, expected, strict=True):
        assert (tensor.grad is None) == (not needs)
        if needs:
            torch.testing.assert_close(tensor.grad, gradient)


def test_create_graph_raises_and_says_what_to_do():
    x, weight, bias, _ = make((5,), 6, 30)
    y = meprop.functional.linear(x, weight, bias, rule=meprop.TopK(3))
    with pytest.raises(meprop.NotSupportedError, match=r"create_graph=True.*revert"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    y = meprop.functional.linear(x, weight, bias, rule=meprop.TopK(30))
    torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].sum().backward()  # dense: torch's own


def test_no_graph_is_built_where_none_is_wanted():
    x, weight, bias, _ = make((5,), 6, 30)
    with torch.no_grad():
        assert meprop.functional.linear(x, weight, bias, rule=meprop.TopK(3)).grad_fn is None


def test_a_rule_of_the_wrong_type_is_refused():
    with pytest.raises(TypeError, match=r"rule=20.*meprop\.TopK"):
        meprop.functional.linear(torch.zeros(1, 2), torch.zeros(3, 2), rule=20)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_same_inputs_give_the_same_bits(scope):
    def gradients():
        x, weight, bias, grad_output = make((64,), 50, 130, torch.float32)
        meprop.functional.linear(x, weight, bias, rule=meprop.TopK(20, scope=scope)).backward(grad_output)
        return [bits(tensor.grad) for tensor in (x, weight, bias)]

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters(scope, dtype):
    x, weight, bias, _ = make((8,), 12, 40, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y = meprop.functional.linear(x, weight, bias, rule=meprop.TopK(5, scope=scope))
        expected = F.linear(x, weight, bias)
    assert y.dtype == dtype
    assert torch.equal(bits(y), bits(expected))
    y.float().square().sum().backward()
    assert weight.grad.dtype == x.grad.dtype == torch.float32
    rows = int((weight.grad.abs().sum(1) > 0).sum())
    assert rows == 5 if scope == "batch" else 5 <= rows < 40


def nonzero_rows(weight):
    return weight.grad.abs().sum(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("scope", SCOPES)
def test_compiled_gradients_are_as_sparse_as_eager_ones(scope, backend):
    rule = meprop.TopK(3, scope=scope)

    def loss(x, weight, bias):
        return meprop.functional.linear(x, weight, bias, rule=rule).sin().sum()

    def gradients(function):
        x, weight, bias, _ = make((2, 3), 8, 40, torch.float32)
        function(x, weight, bias).backward()
        return x, weight, bias

    torch._dynamo.reset()
    eager, compiled = gradients(loss), gradients(torch.compile(loss, fullgraph=True, backend=backend))
    assert nonzero_rows(compiled[1]) == nonzero_rows(eager[1])
    assert len(nonzero_rows(eager[1])) == 3 if scope == "batch" else 3 <= len(nonzero_rows(eager[1])) <= 18
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_autocast_leaves_float64_alone_as_torch_does():
    x, weight, bias, grad_output = make((8,), 12, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = meprop.functional.linear(x, weight, bias, rule=meprop.TopK(5))
    assert y.dtype == F.linear(x, weight, bias).dtype == torch.float64
    y.backward(grad_output)
    assert weight.grad.dtype == torch.float64


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compute_dtype_takes_inputs_of_another_dtype_than_the_weights(dtype, scope):
    x, weight, bias, grad_output = make((8,), 12, 40, torch.float32)
    x, grad_output = x.detach().to(dtype).requires_grad_(), grad_output.to(dtype)
    rule = meprop.TopK(5, scope=scope)
    y = meprop.functional.linear(x, weight, bias, rule=rule, compute_dtype=torch.bfloat16)
    assert y.dtype == dtype
    y.backward(grad_output)
    for tensor, expected in zip((x, weight, bias), expected_gradients(x, weight, grad_output, rule), strict=True):
        assert tensor.grad.dtype == tensor.dtype
        eps = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(tensor.grad.double(), expected, rtol=8 * eps, atol=64 * eps)


def test_a_frozen_weight_with_row_sparse_gradients_passes_on_what_is_kept():
    x, weight, bias, grad_output = make((6,), 5, 21, torch.float32)
    rule = meprop.TopK(4, scope="batch")
    weight.requires_grad_(False)
    meprop.functional.linear(x, weight, bias, rule=rule, sparse_grad=True).backward(grad_output)
    expected = expected_gradients(x, weight, grad_output, rule)[0]
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-5)
    assert weight.grad is None


def test_complex_weights_are_refused():
    weight = torch.randn(30, 6, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(TypeError, match=r"complex64.*floating"):
        meprop.functional.linear(torch.randn(5, 6, dtype=torch.complex64), weight, rule=meprop.TopK(3))


@pytest.mark.parametrize("scope", SCOPES)
def test_no_input_features(scope):
    x, weight, bias, grad_output = make((2, 3), 0, 9)
    meprop.functional.linear(x, weight, bias, rule=meprop.TopK(3, scope=scope)).backward(grad_output)
    assert x.grad.shape == x.shape
    torch.testing.assert_close(bias.grad, grad_output.sum((0, 1)))


# ---------------------------------------------------------------- counting what is selected


def hits_of(grad_NO: torch.Tensor, rule: meprop.Rule) -> torch.Tensor:
    return (rule.select(grad_NO).to_dense() != 0).sum(dim=0)


@pytest.mark.parametrize("k", [3, 40])
@pytest.mark.parametrize(("scope", "sparse_grad"), [("example", False), ("batch", False), ("batch", True)])
def test_the_backward_pass_counts_what_it_selects_and_is_the_same(scope, sparse_grad, k):
    """Also with k above the width, where everything is selected."""
    torch.manual_seed(0)
    rule, activity = meprop.TopK(k, scope=scope), Activity.of_units(33)
    x, weight, bias = torch.randn(2, 5, 7), torch.randn(33, 7), torch.randn(33)
    grad = torch.randn(2, 5, 33).relu()
    results = []
    for counts in ((), (activity,)):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        output = linear_with_policy(*leaves, Policy(rule, sparse_grad, record=Record(activities=counts)))
        gradients = torch.autograd.grad(output, leaves, grad)
        results.append([output, *(gradient.to_dense() for gradient in gradients)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(activity.hits, hits_of(grad.flatten(0, 1), rule))
    assert activity.examples == 10


@pytest.mark.parametrize("checkpointed", [False, True])
def test_it_counts_once_a_backward_pass_and_adds_up(checkpointed):
    """Under autocast, with gradient checkpointing, which runs the forward pass twice, and over several passes."""
    torch.manual_seed(0)
    rule, activity = meprop.TopK(3), Activity.of_units(33)
    weight, x, grad = (
        torch.randn(33, 7, requires_grad=True),
        torch.randn(4, 7),
        torch.randn(4, 33, dtype=torch.bfloat16),
    )

    policy = Policy(rule, compute_dtype=torch.bfloat16, record=Record(activities=(activity,)))

    def run(x):
        return linear_with_policy(x, weight, None, policy)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            output = checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
            output.backward(grad)
        with torch.no_grad():
            run(x)
    assert torch.equal(activity.hits, 2 * hits_of(grad, rule))
    assert activity.examples == 8


def test_compiled_code_counts_through_a_graph_break_or_not_at_all():
    torch._dynamo.reset()
    weight, x, activity = torch.randn(33, 7, requires_grad=True), torch.randn(4, 7), Activity.of_units(33)

    policy = Policy(meprop.TopK(3), record=Record(activities=(activity,)))

    def run(x):
        return linear_with_policy(2 * x, weight, None, policy) + 1

    torch.compile(run, backend="aot_eager")(x).sum().backward()
    assert (activity.hits.tolist(), activity.examples) == ([4] * 3 + [0] * 30, 4)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Simplifier watches.*Simplifier\.compact"):
        torch.compile(run, backend="aot_eager", fullgraph=True)(x)


def test_transforms_of_torch_func_are_refused_and_say_what_to_do():
    layer = meprop.nn.Linear(3, 8, rule=meprop.TopK(2))
    with pytest.raises(meprop.NotSupportedError, match=r"torch\.func.*revert"):
        torch.func.grad(lambda x: layer(x).sum())(torch.ones(2, 3))
    with pytest.raises(meprop.NotSupportedError, match=r"torch\.func.*revert"):
        torch.vmap(layer)(torch.ones(4, 2, 3))
