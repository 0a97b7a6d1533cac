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


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_an_optimizer_steps_as_with_dense_gradients_or_is_refused_with_nothing_changed(name, options, with_closure):
    if name == "SparseAdam":
        pytest.skip("it takes no dense gradients, and is the lazy mode of meprop.optim.Adam")
    refused = name in REFUSED or {"fused", "weight_decay"} & options.keys()
    make, trained = getattr(torch.optim, name), []
    for sparse_grad in (False, True):
        model = model_of(sparse_grad)
        optimizer = make(model.parameters() if name == "LBFGS" else groups(model), lr=1e-2, **options)
        before = str((model.state_dict(), optimizer.state_dict()))

        def step(model=model, optimizer=optimizer) -> None:
            closure = lambda: (model.zero_grad(), backward(model))[1]  # noqa: E731
            closure()
            optimizer.step(closure) if with_closure or name == "LBFGS" else optimizer.step()

        if sparse_grad and refused:
            options_named = ", ".join(f"{option}=" for option in options) if name not in REFUSED else ""
            with pytest.raises(meprop.NotSupportedError, match=rf"^{name}.*{options_named}.*Take meprop\.optim\."):
                step()
            assert str((model.state_dict(), optimizer.state_dict())) == before
            return
        step(), step()
        trained.append(model.state_dict())
    for one, other in zip(trained[0].values(), trained[1].values(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW"])
def test_the_remedy_holds(name):
    model = model_of()
    backward(model)
    with pytest.raises(meprop.NotSupportedError, match=rf"shape \[30, 8\].*Take meprop\.optim\.{name} in its place"):
        getattr(torch.optim, name)(model.parameters(), weight_decay=0.1).step()
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


def test_what_would_count_the_zeros_is_refused():
    row_sparse.support()
    for act in (
        lambda: torch.linalg.vector_norm(GRADS["rows"], 0),
        lambda: torch.linalg.vector_norm(GRADS["rows"], 2, dim=1),
        lambda: GRADS["rows"].clone().clamp_(min=1.0),
        lambda: GRADS["rows"].clone().clamp_(max=-1.0),
    ):
        with pytest.raises(meprop.NotSupportedError, match=r"grad\.to_dense"):
            act()
