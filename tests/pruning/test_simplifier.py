"""Simplifier: what it counts, which units it removes and when, what it refuses, and how it is resumed."""

import copy
import doctest
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import meprop
from meprop.pruning import simplifier as simplifier_module
from prunable import (
    CASES,
    RULE,
    WIDTH,
    alive_units,
    make,
    quietly,
    train,
)


@pytest.mark.filterwarnings("ignore::meprop.NoEffectWarning")
@pytest.mark.parametrize("scope", ["example", "batch"])
@pytest.mark.parametrize("k", [5, 100])
def test_units_are_removed_by_what_a_literal_count_says(k, scope):
    """Also where everything is selected: then the entries that are not zero count."""
    rule = meprop.TopK(k, scope=scope)
    model, x = make(CASES["stack"], rule=rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    simplifier = meprop.Simplifier(model, 0.25, optimizer=optimizer, check_every=6)
    hits = torch.zeros(WIDTH)

    def count(grad: Tensor) -> None:
        hits.add_((rule.select(grad).to_dense() != 0).sum(dim=0))

    handle = model[0].register_forward_hook(lambda *args: args[2].register_hook(count) and None)
    for seed in range(6):
        torch.manual_seed(seed)
        train(model, optimizer, torch.randn_like(x))
        if seed % 2:  # accumulated over two batches in each of the optimizer's steps
            model(x).sum().backward()
        simplifier.step()
    handle.remove()
    share = hits / (9 * len(x))
    alive = share >= 0.25
    assert 0 < alive.sum() < WIDTH
    assert simplifier.widths["0"] == int(alive.sum())
    found = simplifier.activity["0"]
    assert torch.equal(found.isnan(), ~alive)
    torch.testing.assert_close(found[alive], share[alive])


def test_a_channel_is_kept_for_any_of_its_positions():
    """A share of the examples, however few of an example's positions are not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 3))
    meprop.convert(model, meprop.TopK(5, scope="batch"), min_features=10, when="always")
    x = torch.randn(6, 3, 20, 20)
    simplifier = meprop.Simplifier(model, 0.9, check_every=1, example_inputs=(x,))
    model(x).square().sum().backward()
    assert model[0].activity.examples == 6
    simplifier.step()
    assert simplifier.widths["0"] == 5


@pytest.mark.parametrize("warmup", [0, 4, 5])
def test_cycles_that_prune_alternate_with_cycles_that_only_train(warmup):
    model, _ = make(CASES["stack"])
    simplifier = meprop.Simplifier(model, 0.5, check_every=2, cycle=4, warmup=warmup)
    for _ in range(12):
        for layer in (model[0], model[3]):
            layer.activity.hits.fill_(10)
            layer.activity.hits[0] = 4  # a unit to remove, at each check
            layer.activity.examples = 10
        simplifier.step()
    prunes = {
        0: [True, True, False, False, True, True],
        4: [False, False, True, True, False, False],
        5: [False, False, True, True, False, False],  # its cycle is steps 6 to 9
    }[warmup]
    assert [(check.step, check.prunes) for check in simplifier.history] == list(
        zip(range(2, 13, 2), prunes, strict=True)
    )
    removed = [sum(prunes[: number + 1]) for number in range(6)]
    assert [WIDTH - check.widths["0"] for check in simplifier.history] == removed
    assert alive_units(simplifier)["3"].tolist() == list(range(removed[-1], 30))


def test_the_counts_begin_again_at_each_check():
    model, x = make(CASES["stack"])
    simplifier = meprop.Simplifier(model, 0.0, check_every=1, cycle=1)
    for _ in range(3):
        model(x).sum().backward()
        assert model[0].activity.examples == len(x)
        simplifier.step()
    assert simplifier.widths == {"0": WIDTH, "3": 30}  # with a threshold of 0 they are only counted


def test_without_examples_nothing_is_removed():
    model, x = make(CASES["stack"])
    simplifier = meprop.Simplifier(model, 1.0, check_every=1)
    with torch.no_grad():
        model(x)
    simplifier.step()
    assert simplifier.widths == {"0": WIDTH, "3": 30}
    assert simplifier.activity["0"].isnan().all()


def test_a_threshold_that_would_empty_a_layer_keeps_min_units_and_warns():
    model, x = make(CASES["stack"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    simplifier = meprop.Simplifier(model, 1.0, optimizer=optimizer, check_every=1, min_units=4)
    train(model, optimizer, torch.randn(50, 6, dtype=torch.float64))
    hits = model[0].activity.hits.clone()
    with pytest.warns(UserWarning, match="would leave 0 of 24 units of layer '0': its min_units=4 most active"):
        simplifier.step()
    assert simplifier.widths == {"0": 4, "3": 4}
    assert sorted(hits[alive_units(simplifier)["0"]].tolist()) == sorted(hits.tolist())[-4:]
    train(model, optimizer, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been said; nothing more is removed
        simplifier.step()
    assert simplifier.widths == {"0": 4, "3": 4}


@pytest.mark.parametrize("scale", [10, 1000])
def test_units_below_a_share_of_the_mean_are_removed_however_few_hits_there_are(scale):
    model, x = make(CASES["stack"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    simplifier = meprop.Simplifier(model, optimizer=optimizer, check_every=1)
    assert simplifier.of_mean == 0.5
    train(model, optimizer, x)
    for layer in (model[0], model[3]):
        layer.activity.hits.fill_(10 * scale)
        layer.activity.hits[:4] = torch.tensor([0, 4, 6, 30]) * scale  # the mean is near 10
        layer.activity.examples = 10**6
    simplifier.step()
    alive = alive_units(simplifier)
    assert alive["0"].tolist() == list(range(2, WIDTH))
    assert alive["3"].tolist() == list(range(2, 30))
    for layer in (model[0], model[3]):
        layer.activity.hits.fill_(20 * scale)
        layer.activity.hits[0] = 9.3 * scale  # below half of the mean of those that are left, not of those at first
        layer.activity.examples = 10**6
    simplifier.step()
    assert simplifier.widths == {"0": WIDTH - 2, "3": 28}


def test_of_a_residual_sum_a_unit_stays_that_one_layer_hits_often_for_that_layer():
    model, x = make(CASES["residual"])
    simplifier = meprop.Simplifier(model, of_mean=0.5, check_every=1)
    model(x).sum().backward()
    for layer, hits in (
        (model.first, 10_000),
        (model.block, 100),
        (model.scaled, 100),
    ):  # the second is hit less often altogether
        layer.activity.hits.fill_(hits)
        layer.activity.hits[:2] = 0
    model.block.activity.hits[1] = 100
    simplifier.step()
    assert alive_units(simplifier)["first"].tolist() == list(range(1, WIDTH))


def test_a_layer_is_judged_when_half_of_its_mean_is_ten_hits():
    """Until then it goes on counting, also where it is resumed: few hits leave out units by chance."""
    model, _ = make(CASES["stack"])
    simplifier = meprop.Simplifier(model, check_every=1)
    first, second = model[0].activity, model[3].activity
    for check in range(1, 5):
        first.hits[1:] += 5
        first.examples += 8
        second.hits.fill_(30)
        second.hits[0] = 0 if check == 1 else 30
        second.examples = 8
        simplifier.step()
        assert simplifier.widths == {"0": WIDTH, "3": 29}
        assert (first.hits[0], first.hits[1], first.examples, second.examples) == (0, 5 * check, 8 * check, 0)
        state = simplifier.state_dict()
    resumed = meprop.Simplifier(make(CASES["stack"])[0], check_every=1)
    resumed.load_state_dict(state)
    first = resumed.model[0].activity
    first.hits[1:] += 5
    resumed.step()
    assert resumed.widths["0"] == WIDTH - 1
    assert first.examples == 0


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_units_that_are_hit_alike_are_not_removed_by_chance(rows):
    """A check after few rows: each unit is hit as often as another, on average."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 4))
    meprop.convert(model, meprop.TopK(10), when="always")
    simplifier = meprop.Simplifier(model, check_every=20, cycle=10_000)
    for _ in range(400):
        activity = model[0].activity
        for _ in range(rows):
            activity.hits[torch.randperm(len(activity.hits))[:10]] += 1
            activity.examples += 1
        simplifier.step()
    assert simplifier.widths["0"] > 245


def test_without_a_hit_nothing_is_removed():
    model, x = make(CASES["stack"])
    simplifier = meprop.Simplifier(model, check_every=1)
    (0 * model(x)).sum().backward()
    simplifier.step()
    assert simplifier.widths == {"0": WIDTH, "3": 30}


@pytest.mark.filterwarnings("ignore:of_mean=0.5 may remove nearly all units")
@pytest.mark.parametrize("rule", [meprop.Sampled(noise=0.25), meprop.TopK(0.2), meprop.TopK(0.04, scope="global")])
def test_the_defaults_remove_units_that_never_learn_and_no_others(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 4))
    with torch.no_grad():
        model[0].bias[:30] = -100.0  # ReLU never lets these through
    meprop.convert(model, rule, when="always")
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    simplifier = meprop.Simplifier(model, optimizer=optimizer, check_every=100, cycle=100)
    for _ in range(200):
        x = torch.randn(64, 20)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        optimizer.step()
        simplifier.step()
    alive = alive_units(simplifier)["0"]
    assert int((alive < 30).sum()) == 0
    assert len(alive) > 40


def test_a_check_removes_no_more_than_max_removal_the_least_active_units_first():
    model, _ = make(CASES["stack"])
    simplifier = meprop.Simplifier(model, 0.9, check_every=1, cycle=100, max_removal=0.25, min_units=3)
    widths = [30]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the threshold would leave none, but a check takes a quarter at most
        while widths[-1] > 4:
            hits = model[3].activity.hits
            hits.copy_(torch.arange(len(hits)))
            model[0].activity.hits.fill_(100)
            model[0].activity.examples = model[3].activity.examples = 100
            simplifier.step()
            widths.append(simplifier.widths["3"])
            assert alive_units(simplifier)["3"].tolist() == list(range(30 - widths[-1], 30))
    assert widths == [30, 23, 18, 14, 11, 9, 7, 6, 5, 4]  # the last ones: one at least, or it would never end
    assert simplifier.widths["0"] == WIDTH
    model[3].activity.examples = 100
    with pytest.warns(UserWarning, match="would leave 0 of 4 units of layer '3': its min_units=3 most active"):
        simplifier.step()


def test_a_share_is_one_of_the_new_width():
    model, x = make(CASES["stack"], rule=meprop.TopK(0.25))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    simplifier = meprop.Simplifier(model, 0.3, optimizer=optimizer, check_every=1)
    train(model, optimizer, x)
    simplifier.step()
    width = simplifier.widths["0"]
    assert width < WIDTH
    optimizer.zero_grad()
    model(x[:1]).sum().backward()
    assert (model[0].weight.grad.abs().sum(dim=1) > 0).sum() <= round(0.25 * width)
    assert meprop.report(model).layers[0].out_features == width


def test_a_compiled_model_is_counted_and_cut_as_it_is():
    torch._dynamo.reset()
    runs = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager")):
        model, x = make(CASES["stack"], torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        simplifier = meprop.Simplifier(model, 0.3, optimizer=optimizer, check_every=2)
        called = wrap(model)
        for _ in range(5):
            train(called, optimizer, x)
            simplifier.step()
        runs.append((simplifier.history, model[0].activity.hits.tolist()))
    assert runs[0] == runs[1]
    assert runs[0][0][-1].widths["0"] < WIDTH


def test_nothing_to_prune_warns():
    with pytest.warns(meprop.NoEffectWarning, match="cannot be pruned: it is not converted"):
        meprop.Simplifier(nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, "threshold=-0.1; it is a share"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"of_mean": 1.5}, "of_mean=1.5; it is a share of a layer's mean"),
        ({"threshold": 0.1, "of_mean": 0.5}, "two measures; give one"),
        ({"check_every": 0}, "check_every=0; it must be at least 1"),
        ({"cycle": 0}, "cycle=0"),
        ({"warmup": -1}, "warmup=-1; it must be at least 0"),
        ({"max_removal": 0.0}, "max_removal=0.0; it is a share of a layer's units, above 0"),
        ({"max_removal": 1.1}, "max_removal=1.1"),
        ({"min_units": 0}, "min_units=0"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        meprop.Simplifier(make(CASES["stack"])[0], **options)


def test_arguments_of_the_wrong_kind_are_refused():
    model, x = make(CASES["stack"])
    kinds = [{"check_every": 1.5}, {"min_units": 2.5}, {"cycle": True}]
    kinds += [{"example_inputs": wrong} for wrong in (x, {"x": x}, 5)]
    for options in kinds:
        with pytest.raises(TypeError, match=next(iter(options))):
            meprop.Simplifier(model, **options)
    with pytest.raises(ValueError, match="none of the model's parameters"):
        meprop.Simplifier(model, optimizer=torch.optim.Adam(make(CASES["stack"])[0].parameters()))


def test_wrapped_models_are_refused():
    with pytest.raises(meprop.NotSupportedError, match="the model is a DataParallel; simplify the module inside"):
        meprop.Simplifier(nn.DataParallel(make(CASES["stack"])[0]))
    with pytest.raises(TypeError, match="function"):
        meprop.Simplifier(lambda x: x)


@pytest.mark.parametrize(
    "change", [meprop.revert, lambda m: meprop.convert(m, RULE, min_features=10), meprop.Simplifier]
)
def test_layers_that_no_longer_count_are_noticed(change):
    model, _ = make(CASES["stack"])
    simplifier = meprop.Simplifier(model, check_every=1)
    change(model)
    with pytest.raises(meprop.NotSupportedError, match="layer '0' no longer counts"):
        simplifier.step()


@pytest.mark.parametrize("at", [7, 8, 9])  # in mid-cycle between two checks, at one, and in a cycle that only trains
@pytest.mark.parametrize("name", ["stack", "stacked, bidirectional lstm"])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, name, at):
    def start():
        model, x = make(CASES[name], torch.float32)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        simplifier = meprop.Simplifier(model, 0.2, optimizer=optimizer, check_every=4, cycle=8)
        return model, optimizer, simplifier, x

    def run(model, optimizer, simplifier, x, steps):
        for seed in steps:
            torch.manual_seed(seed)
            train(model, optimizer, torch.randn_like(x))
            simplifier.step()

    whole = start()
    run(*whole, range(24))
    part = start()
    run(*part, range(at))
    torch.save([each.state_dict() for each in part[:3]], tmp_path / "state")
    model_state, optimizer_state, state = torch.load(tmp_path / "state", weights_only=True)
    resumed = start()
    resumed[2].load_state_dict(state)
    assert str(resumed[2].report()) == str(part[2].report())
    resumed[0].load_state_dict(model_state)
    resumed[1].load_state_dict(optimizer_state)
    run(*resumed, range(at, 24))
    assert whole[2].widths[next(iter(whole[2].widths))] < WIDTH
    assert resumed[2].history == whole[2].history
    for one, other in zip(resumed[0].state_dict().values(), whole[0].state_dict().values(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(resumed[2].activity.values(), whole[2].activity.values(), strict=True):
        assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))


def test_a_state_of_another_model_is_refused():
    state = meprop.Simplifier(make(CASES["stack"])[0]).state_dict()
    with pytest.raises(ValueError, match="of another model"):
        meprop.Simplifier(make(CASES["residual"])[0]).load_state_dict(state)
    model, x = make(CASES["stack"])
    simplifier = meprop.Simplifier(model, 0.5, check_every=1)
    model(x).sum().backward()
    simplifier.step()
    with pytest.raises(ValueError, match="units that are removed here"):
        simplifier.load_state_dict(state)

    model, x = make(CASES["batch norm"])
    simplifier = meprop.Simplifier(model, 0.5, check_every=1, example_inputs=(x,))
    model(x).square().sum().backward()
    simplifier.step()
    assert min(simplifier.widths.values()) < WIDTH
    with pytest.raises(ValueError, match=r"cannot be pruned here: .*give example_inputs"):
        quietly(make(CASES["batch norm"])[0]).load_state_dict(simplifier.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda things: pickle.loads(pickle.dumps(things))])
def test_copies_go_on_alike_and_apart(duplicate):
    model, x = make(CASES["stack"])
    optimizer = torch.optim.Adam(model.parameters())
    simplifier = meprop.Simplifier(model, 0.3, optimizer=optimizer, check_every=2)
    train(model, optimizer, x)
    simplifier.step()
    twins = duplicate((model, optimizer, simplifier))
    untouched = twins[0][0].activity.hits.clone()
    for things in ((model, optimizer, simplifier), twins):
        assert torch.equal(things[0][0].activity.hits, untouched)
        train(things[0], things[1], x)
        things[2].step()
    assert twins[2].widths == simplifier.widths
    assert simplifier.widths["0"] < WIDTH
    assert torch.equal(twins[0](x), model(x))


def test_the_example_of_the_docstring_holds():
    assert doctest.testmod(simplifier_module) == (0, 7)
