"""torch.ops.meprop.*: schemas, fakes and dispatch, by torch's own checker."""

import pytest
import torch

from cases import gradient
from meprop import ops
from meprop.ops import reference

N, O, I, K = 5, 33, 7, 4  # noqa: E741


def selections(dtype):
    grad = gradient("normal", N, O, dtype)
    return grad, reference.topk_rows(grad, K), reference.topk_columns(grad, K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_operators_pass_opcheck(dtype):
    grad, rows, columns = selections(dtype)
    weight, x = gradient("normal", O, I, dtype), gradient("normal", N, I, dtype)
    channels = gradient("normal", N, O * 6, dtype).view(N, O, 2, 3)
    cases = {
        "topk_rows": (grad, K),
        "topk_columns": (grad, K),
        "topk_channels": (channels, K),
        "grad_input": (*rows, weight),
        "grad_weight": (*rows, x, O),
        "grad_weight_rows": (columns[0], x),
    }
    more = {
        "grad_input": (*columns, weight),
        "grad_weight": (*columns, x, O),
        "topk_channels": (channels.contiguous(memory_format=torch.channels_last), K),
    }
    for name, arguments in [*cases.items(), *more.items()]:
        report = torch.library.opcheck(getattr(torch.ops.meprop, name).default, arguments)
        assert set(report.values()) == {"SUCCESS"}, (name, report)


def test_a_tensor_subclass_goes_through_the_dispatcher():
    """A fake tensor has no memory: reading its address would be an error, or a crash."""
    with torch._subclasses.FakeTensorMode():
        selection = ops.topk_rows(torch.empty(N, O), K)
        assert ops.grad_input(selection, torch.empty(O, I)).shape == (N, I)
        assert ops.grad_weight(selection, torch.empty(N, I)).shape == (O, I)


@pytest.mark.parametrize(
    "indices",
    [torch.arange(4, dtype=torch.int32)[None], torch.arange(4)[None].expand(50, 4), torch.arange(3, dtype=torch.int32)],
    ids=["too few rows", "int64", "too few columns"],
)
def test_operators_refuse_what_is_no_selection(indices):
    """They would read beyond the end of the indices."""
    with pytest.raises(ValueError, match="a selection is values"):
        torch.ops.meprop.grad_input(torch.randn(50, 4), indices, torch.randn(8, 64))
