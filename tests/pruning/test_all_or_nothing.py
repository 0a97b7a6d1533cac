"""A cut is made as a whole or not at all, whatever fails; and what can be cut is cut in every optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import accelerate
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

import meprop
from meprop.pruning import Call, Value, cutting, handles, remove_handler
from prunable import RULE, WIDTH

GONE = torch.tensor([0, 7])
STAYS = torch.tensor([unit for unit in range(WIDTH) if unit not in GONE])


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, which knows no more than what `detach` gives."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(f"{func} of a {cls.__name__}")


class Dequantizes(Wrapper):
    """As quantized states do: a part of it is a plain tensor."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_select.default:
            return func(args[0].inner, *args[1:])
        return super().__torch_dispatch__(func, types, args, kwargs)


class Scale(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight, self.features, self.options = nn.Parameter(torch.ones(features)), features, {"a": 1}
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    def resize(self) -> None:
        self.features = len(self.weight)
        if self.fails:
            self.options["b"] = self.extra = 2
            self.register_buffer("late", torch.ones(2))
            raise ValueError("it cannot be resized")


@pytest.fixture(autouse=True)
def _handler_of_scale():
    @handles(Scale, resize=Scale.resize)
    def scale(call: Call) -> Value:
        x = call.read(-1)
        call.lay_out({"weight": {0: x.groups}})
        return x

    yield
    remove_handler(Scale)


@dataclass
class Things:
    model: nn.Sequential
    optimizers: list[Any]
    simplifier: meprop.Simplifier
    more: list[Any] = field(default_factory=list)

    def state(self, name: str = "4.weight") -> dict[str, Any]:
        parameter = self.model.get_parameter(name)
        return next(each.state[parameter] for each in self.optimizers if parameter in each.state)


def things(make: Callable[[Any], torch.optim.Optimizer] = torch.optim.Adam, **options) -> Things:
    """A model in the middle of training, with two optimizers. Two units of its first layer are to be removed."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(6, WIDTH), Scale(WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()),
        nn.Linear(WIDTH, WIDTH),
        nn.Linear(WIDTH, 3),
    )
    meprop.convert(model, RULE, min_features=10, when="always")
    x = torch.randn(8, 6)
    first, second = make(model[:4].parameters()), make(model[4:].parameters())
    simplifier = meprop.Simplifier(model, 0.5, optimizer=[first, second], check_every=2, example_inputs=(x,), **options)
    assert simplifier.report().layers[0].reason is None
    for _ in range(2):
        first.zero_grad(), second.zero_grad()
        model(x).square().sum().backward()
        first.step(), second.step()
    simplifier.step()
    for activity in (model[0].activity, model[4].activity):
        activity.examples, activity.hits = 10, torch.full_like(activity.hits, 9)
    model[0].activity.hits[GONE] = 1
    return Things(model, [first, second], simplifier)


def seen(things: Things) -> dict[str, Any]:
    """All that a cut may change: tensors bit by bit, other objects as they are, and which objects they are."""
    model, simplifier = things.model, things.simplifier
    found: dict[str, Any] = {
        "widths": simplifier.widths,
        "steps": simplifier.steps,
        "history": list(simplifier.history),
    }
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found |= {name: tensor, f"{name} itself": id(tensor), f"{name} grad": tensor.grad}
    for number, optimizer in enumerate(things.optimizers):
        for place, (parameter, state) in enumerate(optimizer.state.items()):
            found |= {f"{number}.{place}.{key}": value for key, value in state.items()}
            found[f"{number}.{place} itself"] = id(parameter), id(state)
    for name, module in model.named_modules():
        options = {
            key: repr(value) for key, value in vars(module).items() if not key.startswith("_") and key != "policy"
        }
        found[f"attributes of {name}"] = options, *module._parameters, *module._buffers
    for name, state in simplifier.state_dict().items():
        found |= {f"state {name}": str(state)}
    return {key: copied(value) for key, value in found.items()}


def copied(value: Any) -> Any:
    cannot = isinstance(value, Wrapper) or (isinstance(value, Tensor) and value.layout != torch.strided)
    return value if cannot else copy.deepcopy(value)


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or isinstance(one, Wrapper):
        return one is other or one == other
    if one.layout != torch.strided:
        return str(one) == str(other)
    kind = (one.shape, one.dtype, one.stride())
    return kind == (other.shape, other.dtype, other.stride()) and torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def bad_state(make: Callable[[Tensor], Any], key: str = "exp_avg", name: str = "4.weight") -> Callable[[Things], Any]:
    def spoil(things: Things) -> Callable[[], None]:
        state = things.state(name)
        before = state.get(key)
        state[key] = make(things.model.get_parameter(name).detach())
        return lambda: state.update({key: before}) if before is not None else state.pop(key)

    return spoil


def bad_resize(things: Things) -> Callable[[], None]:
    things.model[1].fails = True
    return lambda: setattr(things.model[1], "fails", False)


def bad_group(things: Things) -> Callable[[], None]:
    things.optimizers[0].param_groups[0]["rates"] = torch.ones(WIDTH)
    return lambda: things.optimizers[0].param_groups[0].pop("rates")


def bad_grad(things: Things) -> Callable[[], None]:
    weight = things.model[4].weight
    before, weight.grad = weight.grad, None
    weight.grad = Wrapper(before)
    return lambda: setattr(weight, "grad", before)


def bad_parameter(things: Things) -> Callable[[], None]:
    layer = things.model[4]
    before = layer.weight
    layer.weight = nn.Parameter(Wrapper(before.detach()), requires_grad=False)
    return lambda: setattr(layer, "weight", before)


def replaced(things: Things) -> Callable[[], None]:
    norm = things.model[2]
    things.model[2] = nn.BatchNorm1d(WIDTH + 1).requires_grad_(False)
    return lambda: things.model.__setitem__(2, norm)


def without_a_bias(things: Things) -> Callable[[], None]:
    bias, things.model[0].bias = things.model[0].bias, None
    return lambda: setattr(things.model[0], "bias", bias)


def in_another_optimizer(things: Things) -> Callable[[], None]:
    group = things.optimizers[1].param_groups[0]
    params = group["params"]
    group["params"] = params[1:]
    return lambda: group.update(params=params)


FAILURES = {
    "a state in a wrapper": (
        bad_state(Wrapper),
        "the state 'exp_avg' of '4.weight' in Adam .*NotImplementedError: aten",
    ),
    "a state that changes its type": (
        bad_state(Dequantizes),
        "the state 'exp_avg' of '4.weight' in Adam .*Dequantizes",
    ),
    "a state in another layout": (bad_state(lambda w: w.to_sparse_csr()), "the state 'exp_avg' of '4.weight'"),
    "a state of another shape": (bad_state(lambda w: w[:, :1].clone(), "row_var"), r"'row_var' of shape \[24, 1\]"),
    "a list of states": (bad_state(lambda w: [len(w)], "old"), "'old' of type list for 4.weight"),
    "an object as a state": (bad_state(lambda w: {"w": len(w)}, "projector"), "'projector' of type dict"),
    "a state of a parameter that stays": (
        bad_state(lambda w: w[None], "old", "5.weight"),
        r"'old' of shape \[1, 3, 24\]",
    ),
    "a tensor as an option": (bad_group, r"Adam has a tensor of shape \[24\] as the option 'rates'"),
    "a gradient in a wrapper": (bad_grad, r"the gradient of '4.weight' .*Wrapper"),
    "a parameter in a wrapper": (bad_parameter, "'4.weight' is a Wrapper, and only plain tensors are cut"),
    "a module of another size": (
        replaced,
        r"'2.weight' is of shape \[25\]; its dimension 0 should consist of 24 units",
    ),
    "a tensor that is gone": (without_a_bias, "'0.bias' is None, not a tensor"),
    "a resize function": (bad_resize, "module '1' cannot be resized: ValueError: it cannot be resized"),
    "an optimizer that is not given": (in_another_optimizer, r"'4.weight' can be removed.*optimizer=\[first, second\]"),
}


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    handles(Scale, resize=Scale.resize)(lambda call: (call.lay_out({"weight": {0: call.x.groups}}), call.x)[1])
    made = things()
    made.simplifier.step()
    remove_handler(Scale)
    return made.simplifier.state_dict()


@pytest.mark.parametrize("by", ["step", "load_state_dict"])
@pytest.mark.parametrize(("spoil", "message"), FAILURES.values(), ids=FAILURES)
def test_what_cannot_be_cut_is_refused_by_name_and_nothing_has_changed(spoil, message, by, saved):
    made = things()
    cut = made.simplifier.step if by == "step" else lambda: made.simplifier.load_state_dict(saved)
    repair = spoil(made)
    before = seen(made)
    with pytest.raises(meprop.NotSupportedError, match=f"(?s){message}.*(N|n)othing has been changed"):
        cut()
    after = seen(made)
    assert before.keys() == after.keys()
    assert [key for key, value in before.items() if not same(value, after[key])] == []
    repair()
    cut()
    assert made.simplifier.widths == {"0": len(STAYS), "4": WIDTH}
    made.model(torch.randn(8, 6)).sum().backward()
    made.optimizers[0].step(), made.optimizers[1].step()


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 3, 6])
@pytest.mark.parametrize("where", ["_put", "_kept", "resize"])
def test_a_cut_that_is_interrupted_anywhere_is_taken_back(where, at, error, monkeypatch):
    made, calls, original = things(), [], getattr(cutting, where)
    before = seen(made)

    def fails(*args):
        calls.append(None)
        if len(calls) == at // (2 if where == "resize" else 1) + 1:
            raise error
        return original(*args)

    monkeypatch.setattr(cutting, where, fails)
    wrapped = error is RuntimeError and where != "_kept"
    with pytest.raises(meprop.NotSupportedError if wrapped else error):
        made.simplifier.step()
    after = seen(made)
    assert [key for key, value in before.items() if not same(value, after[key])] == []
    made.simplifier.step()
    assert made.simplifier.widths["0"] == len(STAYS)


DAMAGED = {
    "steps": "two",
    "starts": None,
    "alive": [],
    "hits": {"0": torch.ones(3), "4": torch.ones(3)},
    "examples": {},
    "shares": {"0": torch.ones(3), "4": torch.ones(3)},
    "history": [{"step": 1}],
}


@pytest.mark.parametrize("lacks", [False, True])
@pytest.mark.parametrize("key", DAMAGED)
def test_a_damaged_state_is_refused_and_nothing_has_changed(key, lacks, saved):
    made = things()
    before = seen(made)
    damaged = {name: value for name, value in saved.items() if name != key} if lacks else {**saved, key: DAMAGED[key]}
    with pytest.raises(ValueError, match=r"damaged|of another model"):
        made.simplifier.load_state_dict(damaged)
    after = seen(made)
    assert [name for name, value in before.items() if not same(value, after[name])] == []


def flat_state(things: Things) -> None:
    """All states are views of one tensor, as are the parameters."""
    parameters = list(things.model.parameters())
    flat = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(flat, parameters)
    for optimizer in things.optimizers:
        for parameter, state in optimizer.state.items():
            state["exp_avg"] = flat.clone()[: parameter.numel()].view(parameter.shape)


def other_states(things: Things) -> None:
    state = things.state()
    state["exp_avg"] = state["exp_avg"].bfloat16()
    state["exp_avg_sq"] = state["exp_avg_sq"].t().contiguous().t()
    state["more"], state["name"], state["none"] = torch.arange(WIDTH * WIDTH).view(WIDTH, WIDTH), "x", None
    state["more"] = state["more"].to(torch.int64)


@pytest.mark.parametrize("prepare", [flat_state, other_states, lambda things: None])
def test_what_can_be_cut_is_cut_in_every_optimizer(prepare):
    made = things()
    prepare(made)
    parameters = dict(made.model.named_parameters())
    before = {
        (number, name, key): copy.deepcopy(value)
        for number, optimizer in enumerate(made.optimizers)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    made.simplifier.step()
    for (number, name, key), value in before.items():
        found = made.optimizers[number].state[parameters[name]][key]
        if isinstance(value, Tensor) and value.dim():
            dim = {"4.weight": 1, "4.bias": None, "5.weight": None, "5.bias": None}.get(name, 0)
            value = value if dim is None else value.index_select(dim, STAYS)
            assert torch.equal(found, value)
            assert found.dtype == value.dtype
        else:
            assert found == value
    made.model(torch.randn(8, 6)).sum().backward()
    if prepare is not other_states:
        made.optimizers[0].step(), made.optimizers[1].step()


WRAPPED = {
    "accelerate": lambda model, optimizer: accelerate.Accelerator(cpu=True).prepare(optimizer),
    "fabric": lambda model, optimizer: Fabric(accelerator="cpu").setup(model, optimizer)[1],
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_the_state_of_an_optimizer_that_a_trainer_wraps_is_cut(wrap):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model = nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))
    meprop.convert(model, RULE, min_features=10, when="always")
    inner = torch.optim.Adam(model.parameters())
    optimizer = wrap(model, inner)
    simplifier = meprop.Simplifier(model, 0.5, optimizer=optimizer, check_every=1)
    model(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    model[0].activity.hits[:] = 10 * (torch.arange(WIDTH) > 3)
    simplifier.step()
    assert inner.state[model[2].weight]["exp_avg"].shape == model[2].weight.shape == (3, WIDTH - 4)
    optimizer.step()


def two(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam(model[0].parameters()), torch.optim.SGD(model[2:].parameters(), lr=0.1)]


def stack() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3), nn.Softmax(-1), nn.Linear(3, 3))
    meprop.convert(model, RULE, min_features=10, when="always")
    return model


def test_an_optimizer_of_only_a_part_of_what_may_be_cut_is_refused():
    model = stack()
    first, second = two(model)
    for part, missing in ((first, "2.weight"), (second, "0.weight' and 1 more")):
        with pytest.raises(
            ValueError, match=rf"parameter '{missing}.*optimizer=\[first, second\].*requires_grad_\(False"
        ):
            meprop.Simplifier(model, optimizer=part)
    meprop.Simplifier(model, optimizer=[first, second])
    meprop.Simplifier(model, optimizer=(first, first, second))
    meprop.Simplifier(model)  # there is none
    model[2].weight.requires_grad_(False)
    meprop.Simplifier(model, optimizer=first)  # nothing trains it
    model[2].requires_grad_(True)
    first.add_param_group({"params": list(model[2].parameters())})
    meprop.Simplifier(model, optimizer=first)  # nothing is cut in the last layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, o: meprop.Simplifier(m, o), r"threshold is of type Adam; write Simplifier\(model, optimizer=optim"),
        (lambda m, o: meprop.Simplifier(m, of_mean=o), r"of_mean is of type Adam; write"),
        (lambda m, o: meprop.Simplifier(o, m), r"model is of type Adam; write Simplifier\(model, optimizer=optimizer"),
        (lambda m, o: meprop.Simplifier(list(m)), "model is of type list; it must be a torch.nn.Module"),
        (lambda m, o: meprop.Simplifier(m, True), "threshold=True is of type bool; it is a share"),
        (lambda m, o: meprop.Simplifier(m, "0.1"), "threshold='0.1' is of type str"),
        (lambda m, o: meprop.Simplifier(m, torch.tensor(0.1)), "threshold=.* is of type Tensor"),
        (lambda m, o: meprop.Simplifier(m, of_mean=False), "of_mean=False is of type bool"),
        (lambda m, o: meprop.Simplifier(m, max_removal=None), "max_removal=None is of type NoneType"),
        (lambda m, o: meprop.Simplifier(m, max_removal=True), "max_removal=True is of type bool"),
        (lambda m, o: meprop.Simplifier(m, check_every="5"), "check_every='5' is of type str"),
        (lambda m, o: meprop.Simplifier(m, optimizer=m), "optimizer is of type Sequential; it is a torch.optim.Opt"),
        (lambda m, o: meprop.Simplifier(m, optimizer=0.1), "optimizer is of type float"),
        (lambda m, o: meprop.Simplifier(m, optimizer="adam"), "optimizer is of type str"),
        (lambda m, o: meprop.Simplifier(m, optimizer={"a": o}), "optimizer is of type dict"),
        (lambda m, o: meprop.Simplifier(m, optimizer=[o, m]), "optimizer is of type list, with a Sequential"),
        (lambda m, o: meprop.Simplifier(m, optimizer=torch.optim.lr_scheduler.ConstantLR(o)), "type ConstantLR"),
        (lambda m, o: meprop.Simplifier(m, example_inputs="x"), "example_inputs is of type str"),
    ],
)
def test_arguments_of_the_wrong_kind_get_an_error_that_says_what_to_write(make, message):
    model = stack()
    with pytest.raises(TypeError, match=message):
        make(model, torch.optim.Adam(model.parameters()))


def test_values_out_of_range_get_one_too():
    model = stack()
    optimizer = torch.optim.Adam(model.parameters())
    for options, message in (
        ({"threshold": float("nan")}, "threshold=nan; it is a share"),
        ({"of_mean": float("nan")}, "of_mean=nan"),
        ({"max_removal": float("nan")}, "max_removal=nan"),
        ({"optimizer": []}, r"optimizer=\[\]; it is an optimizer or several"),
        ({"optimizer": [optimizer, torch.optim.Adam(stack().parameters())]}, "none of the model's parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            meprop.Simplifier(model, **options)


@pytest.mark.parametrize(
    ("tie", "reason"),
    [
        (lambda m: setattr(m[4], "weight", m[0].weight), "is tied to"),
        (lambda m: setattr(m[4].weight, "data", m[0].weight.data), "is tied to"),
        (lambda m: m[0].register_buffer("average", m[0].weight.detach().clone()), "'0.average' is none of the tensors"),
        (lambda m: m[0].register_parameter("gain", nn.Parameter(torch.ones(WIDTH))), "'0.gain' is none of the tensors"),
    ],
)
def test_tensors_that_would_be_cut_in_one_place_only_are_not_cut(tie, reason):
    model = nn.Sequential(
        *(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.Softmax(-1), nn.Linear(WIDTH, WIDTH)),
        nn.Softmax(-1),
    )
    meprop.convert(model, RULE, min_features=10, when="always")
    assert "can be pruned" in str(meprop.Simplifier(model).report())
    tie(model)
    with pytest.warns(meprop.NoEffectWarning, match=reason):
        meprop.Simplifier(model)
