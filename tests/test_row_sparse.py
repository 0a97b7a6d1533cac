"""Row-sparse gradients with torch's own optimizers and clipping: as with dense gradients, or refused by name."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import meprop
from meprop import row_sparse
from meprop.ops import products
from optimizer_cases import ROWS, WIDTH, sparse

RULE = meprop.TopK(5, scope="batch")
OPTIONS = {
    "SGD": [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"weight_decay": 0.1},
        {"fused": True},
        {"foreach": True},
    ],
    "Adagrad": [{"weight_decay": 0.1}, {"fused": True}, {"foreach": True}],
    "Adam": [{"fused": True}, {"foreach": True}, {"amsgrad": True}],
}
NAMES = sorted(
    name
    for name, each in vars(torch.optim).items()
    if isinstance(each, type) and issubclass(each, torch.optim.Optimizer) and each is not torch.optim.Optimizer
)
CASES = [(name, options) for name in NAMES for options in [{}, *OPTIONS.get(name, [])]]
REFUSED = {"ASGD", "Adadelta", "Adafactor", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop"}


def model_of(sparse_grad: bool = True) -> nn.Module:
    """A dense layer first: a step that fails half-way has moved it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 30, bias=False))
    meprop.convert(model, RULE, min_features=20, when="always", sparse_grad=sparse_grad)
    return model


def backward(model: nn.Module) -> Tensor:
    loss = model(torch.ones(4, 6).cumsum(0)).square().sum()
    loss.backward()
    return loss


def groups(model: nn.Module) -> list[dict]:
    return [{"params": [parameter]} for parameter in model.parameters()]


def with_a_step_that_calls_torchs(cls):
    class Mine(cls):
        def step(self, closure=None):
            return super().step(closure)

    Mine.__name__ = cls.__name__
    return Mine


def with_a_hook(cls):
    def make(*args, **options):
        optimizer = cls(*args, **options)
        optimizer.register_step_pre_hook(lambda *_: None)
        return optimizer

    return make


WAYS = {
    "step": lambda cls: cls,
    "closure": lambda cls: cls,
    "hook": with_a_hook,
    "subclass": with_a_step_that_calls_torchs,
    "hook, subclass and closure": lambda cls: with_a_hook(with_a_step_that_calls_torchs(cls)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_an_optimizer_steps_as_with_dense_gradients_or_is_refused_with_nothing_changed(name, options, way):
    if name == "SparseAdam":
        pytest.skip("it takes no dense gradients, and is the lazy mode of meprop.optim.Adam")
    refused = name in REFUSED or {"fused", "weight_decay"} & options.keys()
    make, trained = WAYS[way](getattr(torch.optim, name)), []
    for sparse_grad in (False, True):
        model = model_of(sparse_grad)
        optimizer = make(model.parameters() if name == "LBFGS" else groups(model), lr=1e-2, **options)
        before = str((model.state_dict(), optimizer.state_dict()))

        def step(model=model, optimizer=optimizer) -> None:
            closure = lambda: (model.zero_grad(), backward(model))[1]  # noqa: E731
            closure()
            optimizer.step(closure) if "closure" in way or name == "LBFGS" else optimizer.step()

        if sparse_grad and refused:
            options_named = ", ".join(f"{option}=" for option in options) if name not in REFUSED else ""
            for _ in range(2):
                with pytest.raises(meprop.NotSupportedError, match=rf"^{name}.*{options_named}.*Take meprop\.optim\."):
                    step()
                assert str((model.state_dict(), optimizer.state_dict())) == before
            return
        step(), step()
        assert "_init_group" not in vars(optimizer)
        trained.append(model.state_dict())
    for one, other in zip(trained[0].values(), trained[1].values(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW"])
def test_the_remedy_holds(name):
    model = model_of()
    backward(model)
    with pytest.raises(meprop.NotSupportedError, match=rf"shape \[30, 8\].*Take meprop\.optim\.{name} in its place"):
        with_a_step_that_calls_torchs(getattr(torch.optim, name))(model.parameters(), weight_decay=0.1).step()
    getattr(meprop.optim, name)(model.parameters(), weight_decay=0.1).step()


def test_those_that_take_sparse_gradients_by_a_step_or_a_hook_of_their_own_are_let_through():
    class Densifies(torch.optim.Adam):
        def step(self, closure=None):
            densify(self)
            return super().step(closure)

    def densify(optimizer, *_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.grad.to_dense()

    model = model_of()
    hooked = torch.optim.Adam(model.parameters())
    hooked.register_step_pre_hook(densify)
    for optimizer in (Densifies(model.parameters()), hooked):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        model.zero_grad()
        backward(model)
        optimizer.step()
        assert not any(map(torch.equal, before, model.parameters()))


def test_a_layer_that_is_unpickled_in_another_process_is_served(tmp_path):
    path = tmp_path / "model"
    path.write_bytes(pickle.dumps(model_of()))
    code = f"""if True:
        import pickle, torch, meprop
        model = pickle.load(open({str(path)!r}, "rb"))
        model(torch.randn(4, 6)).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        try: torch.optim.Adam(model.parameters()).step()
        except meprop.NotSupportedError: print("refused")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "refused\n", done.stderr


def test_a_compiled_step_of_another_optimizer_is_not_disturbed():
    torch._dynamo.reset()
    row_sparse.support()
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.Adam([parameter], lr=0.5)
    torch.compile(optimizer.step, backend="aot_eager")()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.5))


def test_a_grad_scaler_leaves_what_a_dense_step_leaves():
    trained = []
    for sparse_grad in (False, True):
        model, scaler = model_of(sparse_grad), torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer = meprop.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(4, 6)).square().sum()).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        trained.append(list(model.parameters()))
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other)


CLIPS = {
    "norm": lambda params, **options: torch.nn.utils.clip_grad_norm_(params, 0.5, **options),
    "norm of order 1": lambda params, **options: torch.nn.utils.clip_grad_norm_(params, 0.5, 1.0, **options),
    "largest": lambda params, **options: torch.nn.utils.clip_grad_norm_(params, 0.5, math.inf, **options),
    "no clip": lambda params, **options: torch.nn.utils.clip_grad_norm_(params, math.inf, **options),
    "value": lambda params, **options: torch.nn.utils.clip_grad_value_(params, 0.5, **options),
    "ours": lambda params, **options: meprop.optim.clip_grad_norm_(params, 0.5, **options),
    "total": lambda params, **options: torch.nn.utils.get_total_norm([each.grad for each in params], **options),
}
GRADS = {
    "rows": sparse(torch.full((2, WIDTH), 3.0), [4, 9]),
    "unordered, twice": torch.sparse_coo_tensor(
        torch.tensor([[5, 2, 5]]), torch.arange(3.0)[:, None].expand(3, WIDTH), (ROWS, WIDTH), check_invariants=True
    ),
    "no rows": sparse(torch.empty(0, WIDTH), []),
    "entries": torch.eye(ROWS, WIDTH).to_sparse(2),
    "bfloat16": sparse(torch.full((2, WIDTH), 3.0), [4, 9]).bfloat16(),
    "infinite": sparse(torch.full((2, WIDTH), math.inf), [4, 9]),
}


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("grad", GRADS.values(), ids=GRADS)
def test_torch_clips_sparse_gradients_as_dense_ones(grad, clip, foreach):
    row_sparse.support()
    results = []
    for of_weight in (grad.to_dense(), grad.clone()):
        params = [nn.Parameter(torch.zeros(ROWS, WIDTH, dtype=grad.dtype)), nn.Parameter(torch.zeros(3))]
        params[0].grad, params[1].grad = of_weight, torch.ones(3)
        # A row that is not there stays zero, where clipping by a norm of infinity makes 0 * inf of a dense one.
        results.append((clip(params, foreach=foreach), [each.grad.to_dense().nan_to_num() for each in params]))
        assert params[0].grad.layout == of_weight.layout
    torch.testing.assert_close(*results, equal_nan=True)


def test_a_norm_that_is_not_finite_is_found():
    row_sparse.support()
    parameter = nn.Parameter(torch.zeros(ROWS, WIDTH))
    parameter.grad = sparse(torch.full((2, WIDTH), math.nan), [4, 9])
    with pytest.raises(RuntimeError, match="non-finite"):
        torch.nn.utils.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)


BOUND = torch.tensor(0.5)
ANSWERS = {
    "clamp": lambda g: g.clamp(-0.5, 0.5),
    "clamp, one bound": lambda g: g.clamp(max=0.5),
    "clamp, tensors": lambda g: g.clamp(-BOUND, BOUND),
    "clamp_, tensors": lambda g: g.clone().clamp_(-BOUND, BOUND),
    "clip": lambda g: g.clip(-0.5, 0.5),
    "clip_": lambda g: g.clone().clip_(-0.5, 0.5),
    "clamp_min": lambda g: g.clamp_min(-0.5),
    "clamp_max": lambda g: g.clamp_max(0.5),
    "clamp_max_, tensor": lambda g: g.clone().clamp_max_(BOUND),
    "isfinite": torch.isfinite,
    "isfinite, all": lambda g: torch.isfinite(g).all(),
    "isnan": torch.isnan,
    "isnan, any": lambda g: torch.isnan(g).any(),
    "isinf, any": lambda g: torch.isinf(g).any(),
    "isinf, any of a row": lambda g: torch.isinf(g).any(1),
    "isnan, all": lambda g: torch.isnan(g).all(),
    "abs": torch.abs,
    "abs, max": lambda g: g.abs().max(),
    "max": torch.max,
    "max of rows": lambda g: g.max(1).values,
    "min": torch.min,
    "amax": torch.amax,
    "amin": lambda g: g.amin(0),
    "aminmax": lambda g: torch.stack(torch.aminmax(g)),
    "mean": torch.mean,
    "std": torch.std,
    "var": torch.var,
    "median": torch.median,
    "argmax": torch.argmax,
    "count_nonzero": torch.count_nonzero,
    "above": lambda g: g > 0.5,
    "not equal to itself": lambda g: g != g,
    "norm of order 0": lambda g: torch.linalg.vector_norm(g, 0),
    "norms of rows": lambda g: torch.linalg.vector_norm(g, 2, dim=1, keepdim=True),
    "scaled by its norm": lambda g: g * (0.5 / (g.norm() + 1e-6)),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("grad", GRADS.values(), ids=GRADS)
def test_what_hooks_ask_of_a_sparse_gradient_has_the_answer_of_the_dense_one(grad, answer):
    row_sparse.support()
    before = grad.to_dense()
    found, expected = answer(grad), answer(grad.to_dense())
    if found.is_floating_point():  # as above, of a scale of nan or 0
        found, expected = found.to_dense().nan_to_num(), expected.nan_to_num()
    torch.testing.assert_close(found.to_dense(), expected)
    assert torch.equal(grad.to_dense(), before)


HOOKS = {
    "clamp": lambda g: g.clamp(-0.01, 0.01),
    "norm": lambda g: g / g.norm().clamp(min=1.0),
    "largest": lambda g: g / g.abs().max().clamp(min=1.0),
    "finite": lambda g: g if torch.isfinite(g).all() else g * 0,
    "nan": lambda g: g * 0 if torch.isnan(g).any() else g,
    "in place": lambda g: g.clamp_(-0.01, 0.01),
}
MAKES = {
    "Linear": (lambda: nn.Linear(6, 30), (4, 6)),
    "Linear, sequences": (lambda: nn.Linear(6, 30), (4, 3, 6)),
    "Conv1d": (lambda: nn.Conv1d(6, 30, 3), (4, 6, 5)),
    "Conv2d": (lambda: nn.Conv2d(6, 30, 3), (4, 6, 5, 5)),
    "attention": (lambda: nn.TransformerEncoderLayer(6, 2, 30, dropout=0.0), (5, 4, 6)),
}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("name", MAKES)
def test_hooks_clip_sparse_gradients_as_dense_ones(name, hook, kind, passes):
    make, shape = MAKES[name]
    of_parameter = hook if kind == "register_hook" else lambda p: setattr(p, "grad", hook(p.grad))
    grads = []
    for sparse_grad in (False, True):
        torch.manual_seed(0)
        layer = make()
        meprop.convert(layer, RULE, min_features=6, when="always", sparse_grad=sparse_grad)
        for parameter in layer.parameters():
            getattr(parameter, kind)(of_parameter)
        for _ in range(passes):
            layer(torch.randn(shape)).square().sum().backward()
        grads.append([parameter.grad for parameter in layer.parameters()])
    assert any(grad.layout is torch.sparse_coo for grad in grads[1])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(other.to_dense(), one)


@pytest.mark.parametrize(
    "bounds", [{"min": 1.0}, {"max": -1.0}, {"min": torch.tensor(1.0)}, {"max": torch.ones(WIDTH)}]
)
def test_bounds_that_leave_zero_out_are_refused(bounds):
    row_sparse.support()
    for clamp in (lambda: GRADS["rows"].clamp(**bounds), lambda: GRADS["rows"].clone().clamp_(**bounds)):
        with pytest.raises(meprop.NotSupportedError, match=r"Clamp grad\.to_dense"):
            clamp()


@pytest.mark.parametrize(
    "act",
    [
        lambda g: torch.maximum(g, torch.zeros(())),
        lambda g: torch.minimum(g, torch.zeros(())),
        lambda g: torch.where(g > 0, g, 0.0),
        lambda g: g.view(-1),
    ],
)
def test_what_makes_a_dense_gradient_of_a_sparse_one_is_refused(act):
    row_sparse.support()
    with pytest.raises(meprop.NotSupportedError, match=r"of a sparse gradient, .*Take grad\.to_dense"):
        act(GRADS["rows"])


def test_indices_that_are_known_to_ascend_are_known_by_their_memory():
    indices = torch.tensor([[1, 4, 6]])
    products._note_in_order(indices)
    grad = torch.sparse_coo_tensor(indices, torch.ones(3, 2), (9, 2), is_coalesced=True)
    assert products.is_in_order(grad._indices())
    assert not products.is_in_order((grad + grad)._indices())
    assert not products.is_in_order(indices.clone())
    for _ in range(1200):
        products._note_in_order(torch.tensor([[0]]))  # its memory is freed at once
    assert products.is_in_order(grad._indices())
    assert len(products._in_order) < 1100
    assert not any(products.is_in_order(torch.tensor([[5, 2]])) for _ in range(100))
