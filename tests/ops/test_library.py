"""torch.ops.meprop.*: schemas, fakes and dispatch, by torch's own checker."""

import pytest
import torch

import meprop
from cases import gradient
from meprop import ops
from meprop.ops import reference
from meprop.selection import PlainTopK, RowSelection

N, O, I, K = 5, 33, 7, 4  # noqa: E741


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_operators_pass_opcheck(dtype):
    grad = gradient("normal", N, O, dtype)
    rows, columns = reference.topk_rows(grad, K), reference.topk_columns(grad, K)
    weight, x = gradient("normal", O, I, dtype), gradient("normal", N, I, dtype)
    channels = gradient("normal", N, O * 6, dtype).view(N, O, 2, 3)
    shared, starts = gradient("normal", 1, O, dtype)[0], torch.tensor([0, 3, 3, 11, 12, 20])
    ragged = (rows[0].flatten(), torch.cat([torch.arange(n, dtype=torch.int32) for n in starts.diff().tolist()]))
    cases = [
        ("topk_rows", (grad, K)),
        ("topk_columns", (grad, K)),
        ("topk_channels", (channels, K)),
        ("topk_channels", (channels.contiguous(memory_format=torch.channels_last), K)),
        ("grad_input", (*rows, weight)),
        ("grad_input", (*columns, weight, None, shared)),
        ("grad_input", (*ragged, weight, starts, shared)),
        ("grad_weight", (*rows, x, O)),
        ("grad_weight", (*columns, x, O, None, shared)),
        ("grad_weight", (*ragged, x, O, starts)),
        ("grad_weight_rows", (columns[0], x)),
    ]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if dtype == torch.float32:  # what a compiled graph makes of an operator does not depend on the dtype
        checks.append("test_aot_dispatch_dynamic")
    for name, arguments in cases:
        report = torch.library.opcheck(getattr(torch.ops.meprop, name).default, arguments, test_utils=checks)
        assert set(report.values()) == {"SUCCESS"}, (name, report)


def test_a_tensor_subclass_goes_through_the_dispatcher():
    """A fake tensor has no memory: reading its address would be an error, or a crash."""
    with torch._subclasses.FakeTensorMode():
        selection = ops.topk_rows(torch.empty(N, O), K)
        assert ops.grad_input(selection, torch.empty(O, I)).shape == (N, I)
        assert ops.grad_weight(selection, torch.empty(N, I)).shape == (O, I)
        indices, starts = torch.empty(9, dtype=torch.int32), torch.empty(N + 1, dtype=torch.int64)
        # The reference would read the starts.
        ragged = meprop.RowSelection(torch.empty(9), indices, O, None, starts)
        assert ops.grad_input(ragged, torch.empty(O, I)).shape == (N, I)
        assert ops.grad_weight(ragged, torch.empty(N, I)).shape == (O, I)


@pytest.mark.parametrize(
    "indices",
    [torch.arange(4, dtype=torch.int32)[None], torch.arange(4)[None].expand(50, 4), torch.arange(3, dtype=torch.int32)],
    ids=["too few rows", "int64", "too few columns"],
)
def test_operators_refuse_what_is_no_selection(indices):
    """They would read beyond the end of the indices."""
    with pytest.raises(ValueError, match="a selection is values"):
        torch.ops.meprop.grad_input(torch.randn(50, 4), indices, torch.randn(8, 64))


@pytest.mark.parametrize("rule", [meprop.InBlocks(meprop.TopK(2), 3), meprop.CompensatedTopK(4)], ids=str)
def test_a_compiled_layer_with_any_selection(rule):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in [(N, I), (O, I), (O,)])

    def loss(x, weight, bias):
        return meprop.functional.linear(x, weight, bias, rule=rule).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    gradients = [torch.autograd.grad(each(x, weight, bias), (x, weight, bias)) for each in (loss, compiled)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shared", [None, torch.ones(O)], ids=["nothing shared", "shared"])
def test_a_compiled_backward_pass_of_a_ragged_selection(shared):
    grad, weight, x = torch.randn(N, O), torch.randn(O, I), torch.randn(N, I)
    indices = torch.tensor([1, 4, 30, 2, 0, 32], dtype=torch.int32)
    starts = torch.tensor([0, 3, 3, 4, 4, 6])

    def run(values, indices, starts, grad, weight, x):
        selection = RowSelection(values, indices, O, shared, starts)
        return ops.linear_backward(selection, grad, weight, x, needs_bias=True, row_sparse=False)

    torch._dynamo.reset()
    arguments = (torch.randn(6), indices, starts, grad, weight, x)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(*arguments)
    for one, other in zip(compiled, run(*arguments), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("scope", ["example", "batch"])
def test_the_traced_backward_pass_is_the_eager_one(scope):
    grad, weight, x = torch.randn(N, O), torch.randn(O, I), torch.randn(N, I)
    for choice in (PlainTopK(K, scope), PlainTopK(2, scope, 3)):
        call = {"needs_bias": True, "row_sparse": False}

        def run(grad, weight, x, choice=choice, call=call):
            return ops.linear_backward(choice, grad, weight, x, **call)

        torch._dynamo.reset()
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(grad, weight, x)
        for one, other in zip(compiled, run(grad, weight, x), strict=True):
            torch.testing.assert_close(one, other)
