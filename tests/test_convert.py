"""convert, revert and report: in place, the same Parameters, and a reason for whatever stays dense."""

import copy
import pickle
import re
from functools import partial

import numpy
import pytest
import torch
from torch import nn

import meprop

RULE = meprop.TopK(0.05)


def convert(model, rule=RULE, **options):
    """Without measuring: these tests are about what is converted, not about what is faster."""
    return meprop.convert(model, rule, **{"when": "always", **options})


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 200), nn.ReLU(), nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 10))


def statuses(report: meprop.ConversionReport) -> dict[str, str]:
    return {layer.name: layer.status for layer in report.layers}


def reasons(report: meprop.ConversionReport) -> dict[str, str]:
    return {layer.name: layer.reason for layer in report.layers}


def nonzero_rows(layer: nn.Linear) -> int:
    return int((layer.weight.grad.abs().sum(1) > 0).sum())


def test_wide_layers_become_sparse_and_the_narrow_output_layer_stays():
    model = mlp()
    report = convert(model)
    assert statuses(report) == {"0": "sparse", "2": "sparse", "4": "dense"}
    assert [layer.k for layer in report.layers] == [10, 8, None]
    assert "narrow: 10" in reasons(report)["4"]
    model(torch.randn(1, 30)).square().sum().backward()
    assert [nonzero_rows(model[i]) for i in (0, 2, 4)] == [10, 8, 10]


def test_identity_of_modules_parameters_hooks_and_optimizer_survives():
    model = mlp()
    modules, parameters = list(model.modules()), list(model.parameters())
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("hook"))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for act in (lambda: convert(model), lambda: meprop.revert(model)):
        act()
        assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    convert(model)
    model(torch.randn(4, 30)).square().sum().backward()
    optimizer.step()
    assert seen == ["hook"]
    assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])


def test_checkpoints_load_both_ways():
    plain, converted = mlp(), mlp()
    convert(converted)
    for source, target in ((plain, converted), (converted, plain)):
        with torch.no_grad():
            source[0].weight.normal_()
        assert target.load_state_dict(source.state_dict()) == nn.modules.module._IncompatibleKeys([], [])
        assert torch.equal(target[0].weight, source[0].weight)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_converted_model_are_converted(duplicate):
    model = mlp()
    convert(model)
    twin = duplicate(model)
    assert str(meprop.report(twin)) == str(meprop.report(model))
    twin(torch.randn(1, 30)).square().sum().backward()
    assert nonzero_rows(twin[0]) == 10
    assert model[0].weight.grad is None


def test_revert_gives_the_plain_classes_and_leaves_no_trace():
    model, untouched = mlp(), mlp()
    convert(model)
    meprop.revert(model)
    for module, plain in zip(model.modules(), untouched.modules(), strict=True):
        assert type(module) is type(plain)
        assert vars(module).keys() == vars(plain).keys()
    model(torch.randn(1, 30)).square().sum().backward()
    assert nonzero_rows(model[0]) > 90


def test_a_second_conversion_takes_the_new_rule():
    model = mlp()
    convert(model)
    report = convert(model, meprop.TopK(7))
    assert [layer.k for layer in report.layers] == [7, 7, None]
    assert str(report) == str(meprop.report(model))


def test_a_second_conversion_leaves_what_its_filter_refuses():
    model = mlp()
    convert(model)
    report = convert(model, meprop.TopK(7), filter=lambda name, layer: name == "0")
    assert [layer.k for layer in report.layers] == [7, 8, None]


def test_the_filter_gets_name_and_layer_and_its_refusal_is_reported():
    model, asked = mlp(), []
    report = convert(model, filter=lambda name, layer: asked.append((name, layer)) or name != "0")
    assert asked == [("0", model[0]), ("2", model[2]), ("4", model[4])]
    assert statuses(report) == {"0": "dense", "2": "sparse", "4": "dense"}
    assert reasons(report)["0"] == "refused by the filter"
    assert reasons(meprop.report(model))["0"] == "refused by the filter"


def test_min_features_moves_the_line():
    assert statuses(convert(mlp(), meprop.TopK(3), min_features=10))["4"] == "sparse"
    with pytest.raises(ValueError, match="min_features=0"):
        convert(mlp(), min_features=0)


def test_a_root_that_is_itself_a_linear_is_converted_in_place():
    layer = nn.Linear(30, 200)
    weight = layer.weight
    report = convert(layer)
    assert type(layer) is meprop.nn.Linear
    assert layer.weight is weight
    assert "(the model itself)" in str(report)
    meprop.revert(layer)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize(
    "make", [lambda: nn.Sequential(nn.ReLU()), lambda: nn.Linear(5, 10), lambda: nn.Conv2d(1, 2, 3)]
)
def test_nothing_to_convert_warns(make):
    with pytest.warns(meprop.NoEffectWarning, match="no layer is sparse"):
        report = convert(make())
    assert not any(layer.status == "sparse" for layer in report.layers)


def test_a_rule_that_keeps_everything_warns_and_says_so():
    with pytest.warns(meprop.NoEffectWarning):
        report = convert(mlp(), meprop.TopK(1.0))
    assert "keeps everything" in reasons(report)["0"]


def test_shared_layers_are_converted_once_and_accumulate():
    layer = nn.Linear(200, 200)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    report = convert(model, meprop.TopK(5))
    assert len(report.layers) == 1
    model(torch.randn(1, 200)).square().sum().backward()
    assert 5 <= nonzero_rows(layer) <= 10


def test_a_weight_shared_by_two_linears_stays_shared():
    model = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 200))
    model[1].weight = model[0].weight
    report = convert(model, meprop.TopK(5))
    assert set(statuses(report).values()) == {"sparse"}
    assert model[1].weight is model[0].weight
    model(torch.randn(1, 200)).square().sum().backward()
    assert 5 <= nonzero_rows(model[0]) <= 10


def test_a_weight_tied_to_an_embedding_stays_dense():
    model = nn.ModuleDict({"embed": nn.Embedding(300, 20), "head": nn.Linear(20, 300), "body": nn.Linear(20, 200)})
    model["head"].weight = model["embed"].weight
    report = convert(model)
    assert statuses(report) == {"head": "dense", "body": "sparse"}
    assert reasons(report)["head"] == "its weight is tied to Embedding 'embed'"


def test_subclasses_keep_their_own_forward():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(Scaled(30, 200), nn.Linear(200, 200), nn.MultiheadAttention(200, 4))
    report = convert(model)
    assert type(model[0]) is Scaled
    assert statuses(report) == {"0": "dense", "1": "sparse", "2": "sparse"}
    assert "Scaled is a subclass" in reasons(report)["0"]


def test_wrapped_models_are_refused_with_the_remedy():
    wrapped = nn.DataParallel(mlp())
    with pytest.raises(meprop.NotSupportedError, match=r"the model is a DataParallel; .* before wrapping"):
        convert(wrapped)
    with pytest.raises(meprop.NotSupportedError, match="its part '0' is a DataParallel"):
        convert(nn.Sequential(wrapped))
    with pytest.raises(meprop.NotSupportedError, match=r"before torch\.compile"):
        convert(torch.compile(mlp()))


def test_distributed_wrappers_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with pytest.raises(meprop.NotSupportedError, match="before wrapping it in DistributedDataParallel"):
            convert(nn.parallel.DistributedDataParallel(mlp()))
        sharded = torch.distributed.fsdp.fully_shard(mlp())
        with pytest.raises(meprop.NotSupportedError, match="before fully_shard"):
            convert(sharded)
    finally:
        torch.distributed.destroy_process_group()


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="model is of type function"):
        convert(lambda x: x)
    with pytest.raises(TypeError, match=r"rule=0\.05"):
        convert(mlp(), 0.05)
    for act in (meprop.convert, meprop.revert, meprop.report):
        for wrong, name in (({}, "dict"), ("x", "str"), (nn.Linear, "type"), (None, "NoneType")):
            with pytest.raises(TypeError, match=f"model is of type {name}; it must be a torch.nn.Module"):
                act(wrong)


WRONG = [
    *({"filter": wrong} for wrong in ("head", ["head"], 1, False)),
    *({"min_features": wrong} for wrong in ("128", True, 1.5, 128.0, None, [1], float("nan"))),
    *({"sparse_grad": wrong} for wrong in ("yes", 1, 0, None, torch.tensor(True))),
    *({"rule": wrong} for wrong in ("topk", 0.05, meprop.TopK)),
    *({"min_features": wrong} for wrong in (0, -1)),
    {"min_features": numpy.True_},
    {"min_features": numpy.float64(128)},
    *({"when": wrong} for wrong in ("never", None, True, ["auto"])),
    *({"compute_dtype": wrong} for wrong in ("bfloat16", torch.float16, True)),
]


@pytest.mark.parametrize("count", [numpy.int64(6), numpy.uint8(6), numpy.int32(6)], ids=lambda count: str(type(count)))
def test_counts_may_be_integers_of_numpy(count):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
    report = convert(model, meprop.TopK(2), min_features=count)
    assert [layer.status for layer in report.layers] == ["sparse", "dense"]
    assert report.layers[1].reason == "narrow: 5 output features, min_features=6"
    assert repr(meprop.InBlocks(meprop.TopK(1), count)) == repr(meprop.InBlocks(meprop.TopK(1), 6))
    simplifier = meprop.Simplifier(model, threshold=0.1, check_every=count, cycle=count, warmup=count, min_units=count)
    numbers = simplifier.check_every, simplifier.cycle, simplifier.warmup, simplifier.min_units
    assert [type(number) for number in numbers] == [int] * 4


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_wrong_arguments_are_refused_by_name_and_value_before_anything_changes(options):
    model, rule = mlp(), meprop.TopK(5, scope="batch")
    ((name, wrong),) = options.items()
    with pytest.raises((TypeError, ValueError), match=f"{name}={re.escape(repr(wrong))}.*; it (is|must be)"):
        convert(model, **{"rule": rule, **options})
    assert not any(isinstance(module, meprop.nn.Linear) for module in model.modules())
    if name in ("sparse_grad", "compute_dtype"):
        for make in (partial(meprop.nn.Linear, 6, 8), partial(meprop.nn.Conv1d, 6, 8, 1)):
            with pytest.raises((TypeError, ValueError), match=f"{name}="):
                make(rule=rule, **options)
        with pytest.raises((TypeError, ValueError), match=f"{name}="):
            setattr(meprop.nn.MultiheadAttention(8, 2, rule=rule), *next(iter(options.items())))


def test_a_refused_call_changes_nothing():
    model = nn.Sequential(mlp(), nn.DataParallel(mlp()))
    with pytest.raises(meprop.NotSupportedError, match="its part '1' is a DataParallel"):
        convert(model)
    assert not any(isinstance(module, meprop.nn.Linear) for module in model.modules())

    def broken(name, layer):
        return name == "0" or {}[name]

    with pytest.raises(KeyError, match="'2'"):
        convert(model[0], filter=broken)
    assert not any(isinstance(module, meprop.nn.Linear) for module in model.modules())


@pytest.mark.parametrize("scope", ["example", "batch"])
def test_a_converted_model_compiles_whole_and_stays_sparse(scope):
    torch._dynamo.reset()
    model = mlp()
    convert(model, meprop.TopK(5, scope=scope))
    torch.compile(model, fullgraph=True, backend="aot_eager")(torch.randn(1, 30)).square().sum().backward()
    assert [nonzero_rows(model[i]) for i in (0, 2)] == [5, 5]


def test_a_converted_model_learns():
    """Sparse gradients train: the loss on a fixed target falls far below its start."""
    torch.manual_seed(0)
    model = mlp()
    convert(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, target = torch.randn(64, 30), torch.randint(0, 10, (64,))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_a_complex_layer_stays_dense():
    model = nn.Sequential(nn.Linear(30, 200), nn.Linear(30, 200, dtype=torch.complex64))
    report = convert(model)
    assert statuses(report) == {"0": "sparse", "1": "dense"}
    assert "complex64" in reasons(report)["1"]


def test_a_class_derived_from_ours_takes_rules_and_cannot_be_reverted():
    class Own(meprop.nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(30, 200), Own(200, 200, rule=meprop.TopK(3)))
    assert [layer.k for layer in convert(model, meprop.TopK(7)).layers] == [7, 7]
    with pytest.raises(meprop.NotSupportedError, match=r"layer '1' is a Own, a class derived from meprop\.nn\.Linear"):
        meprop.revert(model)
    assert type(model[0]) is meprop.nn.Linear  # a refused call changes nothing


class Tagger(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(12, 200, **options)
        self.head = nn.Linear(200, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])


def test_lstms_are_converted_and_reverted_in_place():
    model = Tagger()
    before = dict(model.named_parameters())
    x = torch.randn(4, 3, 12)
    with torch.no_grad():
        output = model(x)
    report = convert(model)
    assert statuses(report) == {"lstm": "sparse", "head": "dense"}
    layer = report.layers[0]
    assert (layer.kind, layer.in_features, layer.out_features, layer.k, layer.density) == ("LSTM", 12, 200, 10, 0.05)
    assert type(model.lstm) is meprop.nn.LSTM
    torch.testing.assert_close(model(x), output)
    model(x[:1, :1]).sum().backward()
    rows = model.lstm.weight_ih_l0.grad.view(4, 200, 12).abs().sum(dim=2) > 0
    assert (rows.sum(dim=1) <= 10).all()
    assert rows[0].sum() == 10
    meprop.revert(model)
    assert type(model.lstm) is nn.LSTM
    assert set(vars(model.lstm)) == set(vars(nn.LSTM(12, 200)))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_lstms_that_stay_dense_say_why():
    class OwnForward(nn.LSTM):
        pass

    model = nn.ModuleDict(
        {
            "projections": nn.LSTM(4, 200, proj_size=8),
            "narrow": nn.LSTM(4, 20),
            "subclass": OwnForward(4, 200),
            "sparse": nn.LSTM(4, 200),
        }
    )
    assert statuses(convert(model)) == dict(zip(model, ["dense", "dense", "dense", "sparse"], strict=True))
    found = reasons(meprop.report(model))
    assert "proj_size=8" in found["projections"]
    assert "20 hidden units" in found["narrow"]
    assert "subclass of LSTM" in found["subclass"]
    mixed = nn.Sequential(nn.LSTM(4, 200), nn.Linear(200, 200))
    report = convert(mixed, meprop.TopK(0.05, scope="batch"), sparse_grad=True)
    assert statuses(report) == {"0": "dense", "1": "sparse"}
    assert "each time step" in reasons(report)["0"]


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, padding="same"), nn.ReLU(), nn.Conv2d(64, 128, 1), nn.Conv2d(128, 63, 3)),
        *(nn.Conv2d(63, 126, 3, groups=3), nn.Flatten(2), nn.Conv1d(126, 200, 5, padding_mode="circular", padding=2)),
    )


def test_convolutions_are_converted_and_reverted_in_place():
    model, untouched = convolutions(), convolutions()
    parameters, x = list(model.parameters()), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        output = model(x)
    report = convert(model, meprop.TopK(5, scope="batch"))
    assert statuses(report) == {"0": "sparse", "2": "sparse", "3": "dense", "4": "dense", "6": "sparse"}
    first = report.layers[0]
    assert (first.kind, first.in_features, first.out_features, first.k) == ("Conv2d", 3, 64, 5)
    assert reasons(report)["3"] == "narrow: 63 output channels, less than half of min_features=128"
    assert "groups=3" in reasons(meprop.report(model))["4"]
    assert torch.equal(model(x), output)
    model(x).square().sum().backward()
    assert [int((model[i].weight.grad.flatten(1) != 0).any(1).sum()) for i in (0, 2, 3, 6)] == [5, 5, 63, 5]
    meprop.revert(model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for module, plain in zip(model.modules(), untouched.modules(), strict=True):
        assert type(module) is type(plain)
        assert vars(module).keys() == vars(plain).keys()


def test_a_choice_at_each_position_leaves_wide_kernels_dense():
    report = convert(convolutions())
    assert statuses(report) == {"0": "dense", "2": "sparse", "3": "dense", "4": "dense", "6": "dense"}
    assert "each position" in reasons(report)["0"]
    assert "scope='batch'" in reasons(report)["6"]


def test_a_converted_layer_that_cannot_take_a_new_rule_keeps_its_own_and_says_so():
    model, batch = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 1)), meprop.TopK(5, scope="batch")
    convert(model, batch)
    for report in (convert(model, meprop.TopK(7)), meprop.report(model)):
        wide, pointwise = report.layers
        assert (wide.rule, pointwise.rule) == (batch, meprop.TopK(7))
        assert wide.reason.startswith("always; keeps TopK(k=5, scope='batch'): TopK(k=7, scope='example') keeps")
        assert pointwise.reason == "always"
    assert reasons(convert(model, batch)) == {"0": "always", "1": "always"}
    assert "refused by the filter" in reasons(convert(model, batch, filter=lambda *_: False))["0"]
    meprop.revert(model)
    assert not any("_meprop" in name for layer in model for name in vars(layer))


def test_convolutions_take_sparse_grad_and_compute_dtype():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 1))
    convert(model, meprop.TopK(5, scope="batch"), sparse_grad=True, compute_dtype=torch.bfloat16)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    for layer in model:
        assert layer.compute_dtype == torch.bfloat16
        assert layer.weight.grad.is_sparse
        assert layer.weight.grad._values().shape == (5, *layer.weight.shape[1:])


def test_a_sparse_last_layer_that_widens_is_questioned():
    """As the output layer of a language model does; the narrow one of a classifier stays dense."""
    head = nn.Sequential(nn.Linear(30, 200), nn.ReLU(), nn.Linear(200, 5000))
    assert "If the last one, '2', gives the model's outputs" in str(convert(head))
    meprop.revert(head)
    assert "If the last one" not in str(convert(head, filter=lambda name, _: name != "2"))
    assert "If the last one" not in str(convert(nn.Sequential(nn.Linear(30, 200), nn.Linear(200, 200))))


def test_a_layer_that_is_the_whole_model_is_questioned_without_a_name():
    (note,) = convert(nn.Linear(8, 256)).notes
    assert note == "If this layer gives the model's outputs, rather leave it dense: use filter"


def test_a_choice_by_example_in_a_model_with_layer_norm_is_questioned():
    model = nn.Sequential(nn.LayerNorm(30), nn.Linear(30, 200), nn.ReLU(), nn.Linear(200, 10))
    assert "scope='batch'" in str(convert(model))
    assert "scope='batch'" not in str(convert(model, meprop.TopK(5, scope="batch")))
    assert "scope='batch'" not in str(convert(mlp()))
    assert "scope='batch'" not in str(convert(model, Columns()))  # it does not say that it chooses by example
    meprop.revert(model)
    assert meprop.report(model).notes == ()


class Columns(meprop.Rule):
    """A rule of somebody's own that does not name its scope."""

    def count(self, features: int) -> int:
        return 5

    def select(self, grad_output_NO: torch.Tensor) -> meprop.ColumnSelection:
        return meprop.TopK(5, scope="batch").select(grad_output_NO)


def test_a_bias_that_is_shared_with_another_module_is_no_tied_weight():
    model = nn.Sequential(nn.Linear(30, 200), nn.LayerNorm(200))
    model[0].bias = model[1].bias
    assert statuses(convert(model, meprop.TopK(5, scope="batch"))) == {"0": "sparse"}


def test_the_density_is_weighted_by_the_layers_sizes():
    report = convert(mlp())
    sizes, densities = [30 * 200, 200 * 150, 150 * 10], [10 / 200, 8 / 150, 1.0]
    expected = sum(size * density for size, density in zip(sizes, densities, strict=True)) / sum(sizes)
    assert report.density == pytest.approx(expected)
    assert meprop.report(nn.ReLU()).density == 1.0


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(8, 200), (3, 8)), (nn.Conv1d(8, 200, 3), (2, 8, 9)), (nn.LSTM(8, 200), (3, 2, 8))],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_model_without_memory_tells_its_shapes(layer, shape):
    """On the meta device, which autocast does not know."""
    model = layer.to("meta")
    convert(model, meprop.TopK(5, scope="batch"))
    output = model(torch.empty(shape, device="meta"))
    assert (output[0] if isinstance(output, tuple) else output).device.type == "meta"
    loss = (output[0] if isinstance(output, tuple) else output).sum()
    loss.backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


def test_without_a_rule_entries_are_drawn_under_a_budget_of_noise():
    model = torch.nn.Sequential(torch.nn.Linear(30, 200), torch.nn.ReLU(), torch.nn.Linear(200, 10))
    report = meprop.convert(model)
    assert report.layers[0].rule == meprop.Sampled() == meprop.Sampled(noise=0.25)
    assert report.layers[0].k is None
    assert "by the gradient" in str(report)


def test_a_report_says_what_was_kept_so_far():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 200), torch.nn.Linear(200, 200))
    meprop.convert(model, meprop.Sampled(noise=1.0), when="always")
    grad = torch.randn(40, 200) * torch.exp(3 * torch.randn(40, 1))
    for _ in range(3):
        model(torch.randn(40, 30)).backward(grad)
    report = meprop.report(model)
    for layer in report.layers:
        assert 0 < layer.density < 1
        assert "kept in 3 passes so far, 0 of them dense" in layer.reason
    model(torch.randn(40, 30)).backward(torch.ones(40, 200))  # nothing to choose: everything is kept
    assert "1 of them dense" in meprop.report(model).layers[1].reason
