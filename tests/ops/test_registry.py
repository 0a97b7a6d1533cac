"""Who serves a call: backends in order, and why one of them declines. The toy backend is CONTRIBUTING's example."""

import pytest
import torch

import meprop
from meprop import ops
from meprop.ops import native, triton
from meprop.ops.registry import Backend, backend, backend_info, reference, register, remove
from meprop.selection import PlainTopK, RowSelection

needs_native = pytest.mark.skipif(native.reason_missing() is not None, reason="needs the compiled extension")

# ---------------------------------------------------------------- a toy backend, as one file would define it

toy = Backend("toy")
"""Multiplies densely on the CPU, whatever is left out, and notes how often."""

served = []


def declines(choice, grad, weight, x, needs_bias, row_sparse, hits=None):
    if not isinstance(choice, PlainTopK) or choice.blocks > 1 or choice.scope != "example":
        return "the toy takes k of each row only"
    if hits is not None:
        return "the toy does not count"
    return None


@toy.implements(ops.linear_backward, declines)
def linear_backward(choice, grad, weight, x, needs_bias, row_sparse, hits=None):
    served.append(tuple(grad.shape))
    kept_NO = ops.topk_rows(grad, choice.k).to_dense()
    return (
        None if weight is None else kept_NO @ weight,
        None if x is None else kept_NO.t() @ x,
        grad.sum(dim=0) if needs_bias else None,
    )


@pytest.fixture
def with_toy():
    served.clear()
    register(toy, before="native")
    yield
    remove(toy)


# ---------------------------------------------------------------- and what it does


def gradients_of_a_layer(rule) -> list[torch.Tensor]:
    torch.manual_seed(0)
    layer = meprop.nn.Linear(30, 40, rule=rule)
    x = torch.randn(5, 30, requires_grad=True)
    layer(x).square().sum().backward()
    return [x.grad, layer.weight.grad, layer.bias.grad]


def test_a_backend_serves_a_layers_backward_pass(with_toy):
    found = gradients_of_a_layer(meprop.TopK(4))
    assert served == [(5, 40)]
    remove(toy)
    expected = gradients_of_a_layer(meprop.TopK(4))
    register(toy, before="native")  # for the fixture to remove
    assert len(served) == 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_what_it_declines_goes_to_the_next(with_toy):
    gradients_of_a_layer(meprop.TopK(4, scope="batch"))
    assert served == []
    grad, weight = torch.randn(2, 6), torch.randn(6, 3)
    call = ops.linear_backward.explain
    options = {"needs_bias": False, "row_sparse": False}
    assert call(PlainTopK(1, "example"), grad, weight, None, **options) == ("toy", {})
    name, reasons = call(PlainTopK(1, "batch"), grad, weight, None, **options)
    assert reasons["toy"] == "the toy takes k of each row only"
    assert name == ("reference" if native.reason_missing() else "native")
    name, reasons = call(PlainTopK(1, "batch"), grad.double(), weight.double(), None, **options)
    assert name == "reference"
    others = [other.name for other in (native.backend, triton.backend) if other.missing is None]
    assert list(reasons) == ["toy", *others]


def test_it_is_in_backend_info_while_it_is_registered(with_toy):
    assert backend_info()["toy"] is True
    remove(toy)
    assert "toy" not in backend_info()
    register(toy, before="native")


def test_the_order_is_kept_and_names_are_unique(with_toy):
    with pytest.raises(ValueError, match="registered already"):
        register(Backend("toy"))
    with pytest.raises(ValueError, match=r"before='nothing': the backends are toy, native, triton, reference"):
        register(Backend("another"), before="nothing")
    with pytest.raises(ValueError, match="no backend 'another'"):
        backend("another")
    assert backend("toy") is toy


def test_a_backend_that_is_missing_serves_nothing():
    absent = Backend("absent", missing="it is not built")
    absent.implements(ops.topk_rows)(lambda grad, k: pytest.fail("it was asked"))
    register(absent, before="native")
    try:
        assert ops.topk_rows(torch.randn(2, 5), 2).indices.shape == (2, 2)
        assert backend_info()["absent"] is False
        assert backend_info()["reasons"]["absent"] == "it is not built"
    finally:
        remove(absent)


def test_implementations_are_attributes_and_what_is_not_there_says_so():
    assert backend("reference").topk_rows is ops.topk_rows.reference
    with pytest.raises(AttributeError, match="'toy' does not implement 'topk_rows'"):
        _ = toy.topk_rows
    assert not hasattr(toy, "topk_columns")


def test_every_operation_has_a_contract():
    for name in ("topk_rows", "grad_input", "linear_backward", "lstm_backward", "sgd_rows"):
        operation = getattr(ops, name)
        assert operation.name == name
        assert len(operation.__doc__) > 60


# ---------------------------------------------------------------- what native code may not read


class Subclass(torch.Tensor):
    pass


UNREADABLE = {
    "another dtype": lambda: torch.zeros(2, 3, dtype=torch.float16),
    "another device": lambda: torch.zeros(2, 3, device="meta"),
    "no memory": lambda: torch._efficientzerotensor(2, 3),
    "freed memory": lambda: freed(torch.zeros(2, 3)),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "mkldnn": lambda: torch.eye(3).to_mkldnn(),
    "subclass": lambda: torch.zeros(2, 3).as_subclass(Subclass),
    "wrapper": lambda: Wrapper(torch.zeros(2, 3)),
}


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


class Wrapper(torch.Tensor):
    """A tensor without memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        inner = [each.inner if isinstance(each, Wrapper) else each for each in args]
        return function(*inner, **(kwargs or {}))


@needs_native
@pytest.mark.parametrize("kind", UNREADABLE)
def test_native_code_declines_what_is_not_memory_on_the_cpu(kind):
    tensor, good = UNREADABLE[kind](), torch.zeros(2, 3)
    assert native.declines(good) is None
    assert native.declines(torch.nn.Parameter(good), None, torch.empty(0, 3)) is None
    reason = native.declines(good, tensor)
    assert reason is not None
    assert reason.startswith("native kernels")


@needs_native
@pytest.mark.parametrize("place", range(7))
def test_every_tensor_of_a_call_is_checked(place):
    """Any of them could be the one that is not what it seems."""

    def call(bad):
        tensors = {
            "values": torch.ones(3),
            "indices": torch.tensor([0, 1, 2], dtype=torch.int32),
            "shared": torch.ones(4),
            "starts": torch.tensor([0, 1, 3]),
            "grad": torch.ones(2, 4),
            "weight": torch.ones(4, 5),
            "hits": torch.zeros(4, dtype=torch.int64),
        }
        name = list(tensors)[place]
        if bad:
            tensors[name] = Wrapper(tensors[name])
        parts = [tensors[part] for part in ("values", "indices")]
        selection = RowSelection(*parts, 4, tensors["shared"], tensors["starts"])
        arguments = (selection, tensors["grad"], tensors["weight"], torch.ones(2, 5))
        return ops.linear_backward.explain(*arguments, needs_bias=True, row_sparse=False, hits=tensors["hits"])

    assert call(False) == ("native", {})
    name, reasons = call(True)
    assert name == "reference"
    assert "Wrapper" in reasons["native"]


@needs_native
def test_a_tensor_inside_of_a_transform_is_declined():
    reasons = []
    torch.func.vmap(lambda row: (reasons.append(native.declines(row)), row)[1])(torch.ones(2, 3))
    assert "torch.func" in reasons[0]
    torch.func.grad(lambda x: (reasons.append(native.declines(x)), x.sum())[1])(torch.ones(2, 3))
    assert "torch.func" in reasons[1]


@needs_native
def test_an_optimizers_step_on_what_is_not_contiguous_is_left_to_the_reference():
    weight, other = torch.ones(4, 6), torch.ones(6, 4).t()
    rows = ops.GradientRows(torch.tensor([1]), torch.ones(1, 6))
    options = {"lr": 1.0, "eps": 1.0, "weight_decay": 0.0}
    assert ops.adagrad_rows.explain(weight, torch.ones(4, 6), rows, **options) == ("native", {})
    scattered = ops.GradientRows(torch.tensor([1, 9, 3])[::2], torch.ones(2, 6))
    for state, gradient in ((other, rows), (torch.ones(4, 6), scattered)):
        name, reasons = ops.adagrad_rows.explain(weight, state, gradient, **options)
        assert name == "reference"
        assert "contiguous" in reasons["native"]


@pytest.mark.parametrize("other", [reference, Backend("another")])
def test_what_cannot_be_removed_says_so(other):
    with pytest.raises(ValueError, match="the backends that can be are native, triton"):
        remove(other)
