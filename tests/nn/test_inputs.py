"""Inputs and weights that are no strided tensors, graphs of torch.fx and torch.jit, and vectorised backward passes."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from transformers.pytorch_utils import Conv1D

import meprop

RULE = meprop.TopK(2, scope="batch")


def jagged() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(5, 6)], layout=torch.jagged)


def strided_nested() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(5, 6)])


def of(layer: nn.Module, x: Tensor) -> Tensor:
    output = layer(x, x, x) if isinstance(layer, nn.MultiheadAttention) else layer(x)
    return output[0] if isinstance(output, tuple) else output


def kind_of(x: Tensor) -> str:
    return "nested" if x.is_nested else str(x.layout)


def converted(layer: nn.Module, rule: meprop.Rule = RULE, **options) -> nn.Module:
    meprop.convert(layer, rule, **{"when": "always", "min_features": 1, **options})
    return layer


INPUTS = {
    "jagged": jagged,
    "nested": strided_nested,
    "coo": lambda: torch.randn(4, 6).relu().to_sparse(),
    "csr": lambda: torch.randn(4, 6).relu().to_sparse_csr(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", INPUTS)
def test_torchs_own_pass_takes_inputs_of_other_layouts_and_the_record_says_so(kind, bias, sparse_grad):
    torch.manual_seed(0)
    x, plain = INPUTS[kind](), nn.Linear(6, 8, bias=bias)
    layer = converted(copy.deepcopy(plain), sparse_grad=sparse_grad)
    for each in (plain, layer):
        output = each(x)
        (output.to_padded_tensor(0.0) if output.is_nested else output).square().sum().backward()
    for found, expected in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)
    record = layer.policy.record
    assert record.sparse_passes == 0
    (described,) = meprop.report(layer).layers
    assert described.status == "dense"
    assert described.reason.endswith(f"no sparse backward pass seen yet: its input is {kind_of(x)}")


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_torchs_own_pass_takes_a_sparse_weight():
    torch.manual_seed(0)
    layer, x = converted(nn.Linear(6, 8, bias=False)), torch.randn(4, 6)
    weight = layer.weight.detach().clone()
    layer.weight = nn.Parameter(weight.to_sparse_csr(), requires_grad=False)
    torch.testing.assert_close(layer(x.requires_grad_()), x @ weight.t())
    assert "weight" in layer.policy.record.left_to_torch


LINEAR = {
    "Linear": (lambda: nn.Linear(6, 8), (4, 6)),
    "Linear, no bias": (lambda: nn.Linear(6, 8, bias=False), (4, 6)),
    "Linear, sequences": (lambda: nn.Linear(6, 8), (4, 3, 6)),
}


def of_a_sparse_factor(output: Tensor, sparse: bool) -> None:
    grad = torch.ones_like(output).tril()
    output.backward(grad.to_sparse() if sparse else grad)


def of_gather(output: Tensor, sparse: bool) -> None:
    first = torch.zeros(*output.shape[:-1], 1, dtype=torch.int64)
    output.gather(-1, first, sparse_grad=sparse).sum().backward()


@pytest.mark.parametrize("rule", [RULE, meprop.TopK(2), meprop.TopK(2, scope="global"), meprop.Sampled(0.3)], ids=str)
@pytest.mark.parametrize("backward", [of_a_sparse_factor, of_gather])
@pytest.mark.parametrize("frozen", ["", "weight", "bias", "weight and bias", "input"])
@pytest.mark.parametrize("name", LINEAR)
def test_a_sparse_output_gradient_gives_what_the_dense_one_gives(name, frozen, backward, rule):
    (make, shape), results = LINEAR[name], []
    for sparse in (False, True):
        torch.manual_seed(0)
        layer = converted(make(), rule)  # of torch's layers only linear ones take a sparse output gradient
        for of, parameter in layer.named_parameters():
            parameter.requires_grad_(not any(kind in of for kind in frozen.split(" and ")) or not frozen)
        x = torch.randn(shape).requires_grad_(frozen != "input")
        backward(layer(x), sparse)
        results.append([each.grad for each in (x, *layer.parameters())])
    assert any(grad is not None and grad.any() for grad in results[0])
    for found, expected in zip(*results, strict=True):
        assert (found is None and expected is None) or torch.equal(found, expected)


class Both(nn.Module):
    """A model with each kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(3, 8, 3), nn.Conv2d(1, 8, 1)
        self.lstm, self.attention, self.head = nn.LSTM(8, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x)[:, None]).mean(dim=1)
        x, _ = self.lstm(x.permute(2, 0, 1))
        x, _ = self.attention(x, x, x)
        return self.head(input=x)


def test_layers_are_leaves_of_torch_fx():
    torch.manual_seed(0)
    model, x = converted(Both(), meprop.Sampled(noise=0.25)), torch.randn(2, 3, 10)
    graph = torch.fx.symbolic_trace(model)
    called = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    assert called == {"conv1", "conv2", "lstm", "attention", "head"}
    torch.testing.assert_close(graph(x), model(x))
    graph(x).sum().backward()
    assert all(layer.policy.record.sparse_passes > 0 for layer in model.children())


class Doubled(meprop.nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def doubled_on_the_instance(layer: nn.Module) -> nn.Module:
    forward = layer.forward
    layer.forward = lambda input: 2 * forward(input)
    return layer


def doubled_by_a_hook(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


TRACED = {
    "a subclass": lambda: nn.Sequential(Doubled(6, 8, rule=RULE)),
    "the instance": lambda: nn.Sequential(doubled_on_the_instance(converted(nn.Linear(6, 8)))),
    "a hook": lambda: nn.Sequential(doubled_by_a_hook(converted(nn.Linear(6, 8)))),
    "the layer itself": lambda: converted(nn.Linear(6, 8)),
    "a convolution itself": lambda: converted(nn.Conv1d(4, 8, 3)),
    "traced again": lambda: torch.fx.symbolic_trace(nn.Sequential(converted(nn.Linear(6, 8)))),
}


@pytest.mark.parametrize("kind", TRACED)
def test_a_graph_of_torch_fx_computes_what_the_module_does(kind):
    torch.manual_seed(0)
    model, x = TRACED[kind](), torch.randn(4, 6)
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(graph(x), model(x))
    graph(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_in_scripts_of_torch_jit_layers_are_torchs_own():
    torch.manual_seed(0)
    model = converted(nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8)))
    x = torch.randn(2, 3, 10)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))
    torch.jit.save(scripted, file := io.BytesIO())
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x))
    assert type(model[0]) is meprop.nn.Conv1d
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [lambda: nn.LSTM(6, 8), lambda: nn.MultiheadAttention(8, 2)])
def test_scripts_of_other_layers_are_refused_by_name(make):
    with pytest.raises(meprop.NotSupportedError, match="script a plain copy"):
        torch.jit.script(nn.Sequential(converted(make())))


def forward_mode(f, x, y):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, torch.ones_like(x)))


VECTORISED = {
    "is_grads_batched": lambda f, x, y: torch.autograd.grad(f(x), x, torch.randn(3, *y.shape), is_grads_batched=True),
    "jacobian": lambda f, x, y: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "torch.func.jacrev": lambda f, x, y: torch.func.jacrev(f)(x),
    "torch.func.vmap": lambda f, x, y: torch.func.vmap(f)(x.expand(2, *x.shape)),
    "vmap of the backward pass": lambda f, x, y: torch.func.vmap(
        lambda g: torch.autograd.grad(y, x, g, retain_graph=True)
    )(torch.randn(3, *y.shape)),
}
LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (4, 6)),
    "Conv1D": (lambda: Conv1D(8, 6), (4, 6)),
    "conv": (lambda: nn.Conv2d(6, 8, 3), (2, 6, 5, 5)),
    "lstm": (lambda: nn.LSTM(6, 8), (4, 2, 6)),
    "attention": (lambda: nn.MultiheadAttention(8, 2), (4, 2, 8)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("how", VECTORISED)
@pytest.mark.parametrize("kind", LAYERS)
def test_vectorised_passes_are_refused_by_name(kind, how):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = converted(make()), torch.randn(shape, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return layer(x, x, x)[0] if kind == "attention" else layer(x)[0] if kind == "lstm" else layer(x)

    y = function(x)
    with pytest.raises(meprop.NotSupportedError, match=r"transform of torch.func|several output gradients at once"):
        VECTORISED[how](function, x, y)


FORWARD_MODE = {
    "forward_ad": forward_mode,
    "jvp": lambda f, x, y: torch.func.jvp(f, (x,), (x,)),
    "linearize": lambda f, x, y: torch.func.linearize(f, x),
    "jacfwd": lambda f, x, y: torch.func.jacfwd(f)(x),
    "forward-mode jacobian": lambda f, x, y: torch.autograd.functional.jacobian(
        f, x, strategy="forward-mode", vectorize=True
    ),
}


@pytest.mark.parametrize("how", FORWARD_MODE)
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_mode_is_refused_by_name_or_torchs_own(kind, how):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = converted(make()), torch.randn(shape)
    plain = copy.deepcopy(layer)
    meprop.revert(plain)
    if kind == "Conv1D" and how in ("jvp", "jacfwd"):  # the transposed weight needs no gradient there
        found, expected = (FORWARD_MODE[how](partial(of, each), x, None) for each in (layer, plain))
        torch.testing.assert_close(found, expected)
        return
    with pytest.raises(meprop.NotSupportedError, match="forward-mode differentiation"):
        FORWARD_MODE[how](partial(of, layer), x, None)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("options", [{}, {"compute_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 8), lambda: nn.Conv1d(4, 8, 3)], ids=["linear", "conv"])
def test_tangents_of_parameters_are_refused_by_name_and_without_gradients_they_are_torchs(make, options, name):
    layer, x = converted(make(), **options), torch.randn(4, 6)
    plain = getattr(layer, name)
    delattr(layer, name)
    with forward_ad.dual_level():
        setattr(layer, name, forward_ad.make_dual(plain, torch.ones_like(plain)))
        with pytest.raises(meprop.NotSupportedError, match="forward-mode differentiation"):
            layer(x)
        with torch.no_grad():
            assert forward_ad.unpack_dual(layer(x)).tangent is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::meprop.NoEffectWarning")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("options", [{}, {"compute_dtype": torch.bfloat16}, {"rule": meprop.TopK(9)}], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_traces_of_torch_jit_are_torchs_own(kind, options, grad):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    plain = copy.deepcopy(layer)
    meprop.convert(layer, **{"rule": RULE, "when": "always", "min_features": 1, **options})
    inputs = (x, x, x) if kind == "attention" else (x,)
    with torch.set_grad_enabled(grad):
        output = torch.jit.trace(layer, inputs)(*inputs)
        output = output[0] if isinstance(output, tuple) else output
        # With these compute_dtype has no effect on torch's own forward pass.
        torch.testing.assert_close(output, of(plain if kind in ("attention", "lstm") else layer, x))
    if grad and not options:
        output.square().sum().backward()
        of(plain, x).square().sum().backward()
        for found, expected in zip(layer.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
@pytest.mark.parametrize("options", [{}, {"compute_dtype": torch.bfloat16}, {"sparse_grad": True}], ids=str)
@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: nn.Linear(6, 8), (4, 6)), (lambda: nn.Conv1d(3, 8, 3), (4, 3, 6))],
    ids=["linear", "conv"],
)
def test_gradients_of_each_example_are_torchs_own(make, shape, options, frozen):
    torch.manual_seed(0)
    plain, x = make(), torch.randn(shape)
    if frozen is not None:
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(frozen not in name)
    layer = copy.deepcopy(plain)
    meprop.convert(layer, RULE, when="always", min_features=1, **options)
    for each in (plain, layer):
        call_for_per_sample_grads(each, batch_size=4)(x).square().sum().backward()
    for found, expected in zip(layer.parameters(), plain.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(found.grad_sample, expected.grad_sample)
    assert layer.policy.record.left_to_torch.endswith("is an ExpandedWeight")


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_gradients_of_each_example_are_refused_as_torchs_own_layer_refuses_them(kind):
    make, shape = LAYERS[kind]
    plain, x = make(), torch.randn(shape)
    errors = []
    for layer in (plain, converted(copy.deepcopy(plain))):
        inputs = (x, x, x) if kind == "attention" else (x,)
        with pytest.raises(RuntimeError, match="Expanded Weights") as error:
            call_for_per_sample_grads(layer, batch_size=2, batch_first=False)(*inputs)[0].sum().backward()
        errors.append(str(error.value))
    assert errors[0] == errors[1]


MKLDNN = {
    "linear": (lambda: nn.Linear(6, 8), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 8, 3), (4, 3, 6)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding="same"), (4, 3, 6, 6)),
    "pointwise": (lambda: nn.Conv2d(3, 8, 1), (4, 3, 6, 6)),
    "lstm": (lambda: nn.LSTM(6, 8), (2, 4, 6)),
    "attention": (lambda: nn.MultiheadAttention(8, 2), (4, 2, 8)),
}


def outcome(layer: nn.Module, x: Tensor) -> list[Tensor] | str:
    """The output and the gradients of a pass, or torch's error."""
    try:
        output = of(layer, x)
        output = output.to_dense() if output.layout == torch._mkldnn else output
        output.square().sum().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return [output, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("kind", MKLDNN)
def test_inputs_in_the_layout_of_mkldnn_go_through_torchs_own_layer(kind):
    torch.manual_seed(0)
    make, shape = MKLDNN[kind]
    plain, x = make(), torch.randn(shape).to_mkldnn()
    layer = converted(copy.deepcopy(plain))
    expected, found = outcome(plain, x), outcome(layer, x)
    assert type(found) is type(expected)
    if isinstance(expected, str):
        assert found == expected
    else:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    assert layer.policy.record.left_to_torch == f"its {'query' if kind == 'attention' else 'input'} is torch._mkldnn"
    with torch.no_grad():
        assert type(outcome(layer, x)) is type(outcome(plain, x))


def test_an_evaluation_of_a_layer_that_was_not_trained_tells_nothing():
    layer = converted(nn.Linear(6, 8))
    with torch.no_grad():
        layer(jagged())
    assert meprop.report(layer).layers[0].reason == "always"


COMPUTED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 8), lambda: nn.Conv1d(6, 8, 1)], ids=["linear", "conv"])
def test_row_sparse_gradients_of_a_computed_weight_are_refused_by_name(make, how):
    layer = COMPUTED[how](converted(make(), sparse_grad=True))
    with pytest.raises(meprop.NotSupportedError, match="a weight that is computed"):
        layer(torch.randn(4, 6, 3) if isinstance(layer, nn.Conv1d) else torch.randn(4, 6))
    layer = COMPUTED[how](converted(make()))
    layer(torch.randn(4, 6, 3) if isinstance(layer, nn.Conv1d) else torch.randn(4, 6)).sum().backward()
    assert layer.policy.record.sparse_passes == 1
