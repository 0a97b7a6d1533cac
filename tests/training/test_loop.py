from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("lightning_fabric")

import meprop
from meprop import disturbance, speed
from meprop.errors import MepropError
from meprop.training.config import SimplifyConfig, TrainingConfig
from meprop.training.loop import Trainer, fit
from tiny import TinyConfig, TinyTask

CONFIG = TrainingConfig(epochs=3, k=5, accelerator="cpu")


def ignore(trainer):
    pass


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_dense_and_sparse_start_alike_and_see_the_same_batches(task):
    dense, sparse = (Trainer(task, CONFIG, rule, 7) for rule in (None, CONFIG.rule()))
    assert_same_weights(weights(dense), weights(sparse))
    fit([dense], ignore)
    seen_dense, task.seen = task.seen, []
    fit([sparse], ignore)
    assert len(seen_dense) == 3 * 8
    assert all(torch.equal(d, s) for d, s in zip(seen_dense, task.seen, strict=True))
    assert not torch.equal(seen_dense[0], seen_dense[8])  # the order changes from epoch to epoch
    assert any(not torch.equal(weights(dense)[n], weights(sparse)[n]) for n in weights(dense))


def test_dense_and_sparse_with_everything_kept_are_the_same_run(task):
    dense, sparse = (Trainer(task, CONFIG, rule, 7) for rule in (None, meprop.TopK(120, scope="example")))
    everything = Trainer(task, CONFIG, meprop.TopK(127), 7)
    fit([dense, sparse, everything], ignore)
    with pytest.warns(meprop.NoEffectWarning):
        kept_all = Trainer(task, CONFIG, meprop.TopK(1.0), 7)
    fit([kept_all], ignore)
    assert_same_weights(weights(dense), weights(kept_all))


@pytest.mark.parametrize("turn", [1, 3, 100])
def test_taking_turns_changes_nothing(task, turn):
    alone = Trainer(task, CONFIG, CONFIG.rule(), 7)
    fit([alone], ignore)
    torch.manual_seed(99)
    pair = [Trainer(task, CONFIG, rule, 7) for rule in (None, CONFIG.rule())]
    fit(pair, lambda trainer: torch.rand(3), turn=turn)  # the caller draws numbers too
    assert_same_weights(weights(alone), weights(pair[1]))


def test_phases_are_dense_and_annealed_at_their_steps(task):
    config = TrainingConfig(epochs=2, noise=0.8, noise_start=0.1, dense_warmup_steps=4, dense_end_steps=8)
    dense, trainer = (Trainer(task, config, rule, 7) for rule in (None, config.rule("sampled")))
    assert dense.schedule is None
    budgets = []
    for step in range(16):
        rule = trainer.model[0].rule
        budgets.append(None if rule.keeps_all(128) else rule.noise)
        for each in (dense, trainer):
            if step == 8:
                each.advance(1)  # the end of an epoch, which is a call of its own
            each.advance(1)
        equal = torch.equal(dense.model[0].weight, trainer.model[0].weight)
        assert equal == (step < 4)
    assert budgets[:4] + budgets[8:] == [None] * 12
    assert budgets[4:8] == pytest.approx([0.1, 0.2, 0.4, 0.8])


def test_the_density_of_a_scheduled_run_includes_its_dense_steps(task):
    config = TrainingConfig(epochs=2, k=16, dense_warmup_steps=3, dense_end_steps=1)
    (run,) = fit([Trainer(task, config, config.rule(), 7)], ignore)
    assert run.density == pytest.approx((4 + 12 * 16 / 128) / 16)
    assert [(layer["status"], layer["k"]) for layer in run.layers] == [("sparse", 16), ("dense", None)]


@pytest.mark.parametrize(("start", "end"), [(5, 35), (35, 5), (0.25, 0.0625), (400, 100)])
def test_k_goes_linearly_from_its_start_to_its_end(task, start, end):
    config = TrainingConfig(epochs=2, k=end, k_start=start, dense_warmup_steps=3)
    trainer = Trainer(task, config, config.rule(), 7)
    kept = []
    for step in range(16):
        kept.append(trainer.model[0].rule.count(128))
        if step == 8:
            trainer.advance(1)  # the end of an epoch, which is a call of its own
        trainer.advance(1)
    counts = [k if isinstance(k, int) else k * 128 for k in (start, end)]
    expected = torch.linspace(*map(float, counts), 13).clamp(max=128)
    assert kept[:3] == [128] * 3
    torch.testing.assert_close(torch.tensor(kept[3:]).float(), expected, atol=0.51, rtol=0)
    (run,) = fit([trainer], ignore)
    assert run.density == pytest.approx(sum(kept) / 16 / 128, rel=0.01)
    assert not config.keeps_its_density


def test_k_is_divided_among_the_layers(task):
    task.config = replace(task.config, hidden=(128, 160))
    config = TrainingConfig(k=20, k_start=4, k_ratio=(1.0, 3.0))
    trainer = Trainer(task, config, config.rule(), 7)
    assert [layer.k for layer in trainer.report.layers] == [10, 30, None]  # in the last step
    assert [trainer.model[place].rule.k for place in (0, 3)] == [2, 6]  # in the first step
    (run,) = fit([trainer], ignore)
    assert run.density == pytest.approx((20 + 4) / 2 * 2 / (128 + 160))


def test_a_ratio_has_a_number_for_each_sparse_layer(task):
    config = TrainingConfig(k_ratio=(1.0, 3.0))
    with pytest.raises(ValueError, match=r"--k-ratio \[1\.0, 3\.0\]: give a number for each sparse layer, 1 here"):
        Trainer(task, config, config.rule(), 7)
    Trainer(task, config, None, 7)  # dense has none


@pytest.mark.parametrize("options", [{"k_start": 5}, {"k_ratio": (1.0,)}])
def test_k_cannot_go_up_or_be_divided_where_a_rule_has_none(task, options):
    with pytest.raises(ValueError, match="need a rule with k, such as topk; this one has none: TopK"):
        Trainer(task, TrainingConfig(**options), meprop.TopK(energy=0.9), 7)


def test_a_budget_of_the_model_is_shared(task):
    config = TrainingConfig(noise=0.44, noise_of="model")
    task.config = replace(task.config, hidden=(128, 128))
    trainer = Trainer(task, config, config.rule("sampled"), 7)
    assert [trainer.model[place].rule.noise for place in (0, 3)] == pytest.approx([0.2, 0.2])


def test_dense_phases_that_take_all_steps_are_refused(task):
    config = TrainingConfig(epochs=1, dense_warmup_steps=5, dense_end_steps=3)
    with pytest.raises(ValueError, match=r"--dense-warmup-steps 5 and --dense-end-steps 3 .* the training has 8"):
        Trainer(task, config, config.rule(), 7)


def test_fused_dropout_is_that_of_sparse_runs_and_goes_on_where_it_was():
    """A run that is resumed after an epoch ends like one that was not."""
    task, config = TinyTask(TinyConfig(hidden=(1024,))), replace(CONFIG, fuse=True)
    whole, first, plain = (Trainer(task, each, CONFIG.rule(), 7) for each in (config, config, CONFIG))
    assert whole.report.fused == ("1 + 2",)
    assert plain.report.fused == ()
    assert Trainer(task, config, None, 7).report.fused == ()
    assert_same_weights(weights(whole), weights(plain))
    fit([whole, plain], ignore)
    assert any(not torch.equal(weights(whole)[name], weights(plain)[name]) for name in weights(plain))
    first.advance(11)
    rest = Trainer(task, config, CONFIG.rule(), 7)
    rest.load_state_dict(copy.deepcopy(first.state_dict()))
    fit([rest], ignore)
    assert_same_weights(weights(whole), weights(rest))


def test_another_seed_is_another_run(task):
    first, second = (Trainer(task, CONFIG, None, seed) for seed in (0, 1))
    assert not torch.equal(weights(first)["0.weight"], weights(second)["0.weight"])


def test_the_callers_random_state_is_left_alone(task):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fit([Trainer(task, CONFIG, CONFIG.rule(), 7)], ignore)
    assert torch.equal(torch.rand(4), expected)


def test_result_holds_every_epoch_and_the_seconds_add_up(task):
    (run,) = fit([Trainer(task, CONFIG, CONFIG.rule(), 7)], ignore)
    assert [record["epoch"] for record in run.curve] == [1, 2, 3]
    assert run.curve[-1]["dev"] == run.dev
    assert run.dev["accuracy"] > 70  # it learns
    parts = run.seconds["forward"] + run.seconds["backward"] + run.seconds["optimizer"]
    assert 0 < run.seconds["step"] == pytest.approx(parts)
    assert (run.rule, run.k, run.density) == ("topk", 5, pytest.approx(5 / 128))
    assert [layer["status"] for layer in run.layers] == ["sparse", "dense"]  # the output layer stays dense


def test_each_run_has_the_disturbance_of_its_own_turns(task, monkeypatch):
    now, turns = [0.0, 0.0, 0.0, 0.0], []

    def spend(trainer):  # 10 seconds in a turn, of which others take 1 of the first run's and 4 of the second's
        others = 1 if trainer is first else 4
        now[:] = [now[0] + 10, now[1], now[2] + 0.5, now[3] + 9.5 - others]
        turns.append(trainer)

    def after(trainer):
        now[0] += 1000  # the time between turns is nobody's

    first, second = (Trainer(task, CONFIG, rule, 7) for rule in (None, CONFIG.rule()))
    step = Trainer._train_step
    monkeypatch.setattr(disturbance, "_processor_seconds", lambda: tuple(now))
    monkeypatch.setattr(Trainer, "_train_step", lambda trainer, batch: (spend(trainer), step(trainer, batch)))
    runs = fit([first, second], after, turn=2)
    assert len(turns) == 2 * 3 * 8
    assert runs[0].disturbance == pytest.approx({"stolen": 0.05, "others": 0.1})
    assert runs[1].disturbance == pytest.approx({"stolen": 0.05, "others": 0.4})


def test_random_k_is_a_rule_of_its_own_and_repeats_with_the_seed(task):
    runs = [fit([trainer := Trainer(task, CONFIG, CONFIG.rule("random"), 7)], ignore)[0] for _ in range(2)]
    assert (runs[0].rule, runs[0].k, runs[0].density) == ("random", 5, pytest.approx(5 / 128))
    assert [record["loss"] for record in runs[0].curve] == [record["loss"] for record in runs[1].curve]
    topk = Trainer(task, CONFIG, CONFIG.rule(), 7)
    fit([topk], ignore)
    assert not torch.equal(trainer.model[0].weight, topk.model[0].weight)


@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "sgd"])
def test_each_optimizer_updates_the_weights(task, optimizer):
    trainer = Trainer(task, TrainingConfig(epochs=1, optimizer=optimizer, lr=0.1), None, 7)
    before = weights(trainer)
    trainer.advance(1)
    assert not torch.equal(before["0.weight"], weights(trainer)["0.weight"])


def test_bf16_keeps_fp32_weights_and_still_learns(task):
    (run,) = fit([trainer := Trainer(task, TrainingConfig(epochs=3, k=5, precision="bf16-mixed"), None, 7)], ignore)
    assert trainer.model[0].weight.dtype == torch.float32
    assert run.dev["accuracy"] > 70


def test_a_diverged_run_stops_with_the_place_and_a_remedy(task):
    task.inputs_NI[:] = float("inf")
    with pytest.raises(MepropError, match=r"loss became nan in epoch 1, step 1 \(dense, seed 7\): try a smaller --lr"):
        Trainer(task, CONFIG, None, 7).advance(1)


@given(epochs=st.integers(max_value=0))
def test_epochs_are_checked(epochs):
    with pytest.raises(ValueError, match="--epochs must be at least 1"):
        TrainingConfig(epochs=epochs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": ()}, "--seeds"),
        ({"seeds": (1, 2, 1)}, "--seeds"),
        ({"seeds": (-1,)}, "--seeds"),
        ({"seeds": (0, 2**64)}, "--seeds"),
        ({"lr": 0.0}, "--lr"),
        ({"lr": float("nan")}, "--lr"),
        ({"lr_end": 1e-6}, "--lr-end 1e-06 needs --schedule geometric: cosine has its own end"),
        (
            {"lr_end": 0.0, "schedule": "geometric"},
            "--lr-end must be above 0 and at most --lr, which is 0.001, got 0.0",
        ),
        (
            {"lr_end": 0.1, "schedule": "geometric"},
            "--lr-end must be above 0 and at most --lr, which is 0.001, got 0.1",
        ),
        ({"weight_decay": -0.1}, "--weight-decay must be a number, 0 or more, got -0.1"),
        ({"weight_decay": float("inf")}, "--weight-decay must be a number, 0 or more, got inf"),
        ({"weight_decay": float("nan")}, "--weight-decay must be a number, 0 or more, got nan"),
        ({"k": 0}, "k=0"),
        ({"k": 1.5}, "k=1.5"),
        ({"sparse_rows": "lazy"}, r"--sparse-rows lazy needs --scope batch, or entries .* \(--exact-sum False\)"),
        ({"sparse_rows": "lazy", "noise": 0.25}, "--sparse-rows lazy needs --scope batch"),
        ({"state_dtype": "bfloat16", "optimizer": "sgd"}, "--state-dtype bfloat16 needs --optimizer adam or adagrad"),
        (
            {"compute_dtype": "bfloat16", "precision": "bf16-mixed"},
            "--compute-dtype bfloat16 needs --precision 32-true: bf16-mixed is autocast, which chooses by itself",
        ),
        ({"dense_warmup_steps": -1}, "--dense-warmup-steps must be 0 or more, got -1"),
        ({"dense_end_steps": -1}, "--dense-end-steps must be 0 or more, got -1"),
        ({"noise_of": "model"}, "--noise-of model and --noise-start None need --noise"),
        ({"noise_start": 0.1}, "--noise-of layer and --noise-start 0.1 need --noise"),
        ({"noise": 0.5, "noise_start": 0.0}, "--noise-start=0.0 is out of range"),
        ({"noise": 0.5, "k_start": 5}, "--k-start 5 and --k-ratio .* need a rule with k: --noise 0.5 .* --noise None"),
        ({"noise": 0.5, "k_ratio": (1.0,)}, "need a rule with k"),
        ({"k_start": 0.5}, "--k-start 0.5 and --k 20: give two counts, or two shares"),
        ({"k_start": 0}, "k=0 keeps nothing"),
        (
            {"k_ratio": (1.0, 9.0), "k": 1},
            r"--k-ratio \[1.0, 9.0\] makes k=1 0.2, 1.8 in the layers: each needs a count",
        ),
        ({"k_ratio": (1.0, 9.0), "k": 0.8}, "makes k=0.8 0.16, 1.44 in the layers: .* a share of at most 1; give ano"),
        ({"k_ratio": (1.0, 3.0), "k": 0.1, "k_start": 0.8}, "makes k=0.8 0.4, 1.2 in the layers"),
        ({"k_ratio": (1.0, 0.0)}, "--k-ratio=0.0 is out of range"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.1}, "--threshold must be from 0 to 1, got 1.1"),
        ({"of_mean": -0.1}, "--of-mean must be from 0 to 1, got -0.1"),
        ({"threshold": 0.1, "of_mean": 0.5}, "--threshold 0.1 and --of-mean 0.5 are two measures: give one"),
        ({"checks": 0}, "--checks must be at least 1"),
        ({"cycle": 0}, "--cycle"),
        ({"warmup": -1}, "--warmup must be at least 0"),
        ({"max_removal": 0.0}, "--max-removal must be above 0 and at most 1, got 0.0"),
        ({"min_units": 0}, "--min-units must be at least 1, got 0"),
    ],
)
def test_settings_of_simplifying_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        SimplifyConfig(**settings)


def test_a_warmup_that_takes_all_epochs_is_refused(task):
    with pytest.raises(ValueError, match=f"--warmup {CONFIG.epochs} must be below --epochs {CONFIG.epochs}"):
        Trainer(task, CONFIG, CONFIG.rule(), 7, SimplifyConfig(warmup=CONFIG.epochs))


def test_a_simplified_run_shrinks_in_its_cycles_and_learns(task):
    trainer = Trainer(task, CONFIG, CONFIG.rule(), 7, SimplifyConfig(threshold=0.05, checks=4, cycle=1, warmup=1))
    (run,) = fit([trainer], ignore)
    assert run.rule == trainer.name == "simplified"
    assert [check["step"] for check in run.checks] == list(range(2, 26, 2))  # 8 steps in an epoch
    assert [check["prunes"] for check in run.checks] == [False] * 4 + [True] * 4 + [False] * 4
    widths = [check["widths"]["0"] for check in run.checks]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 128
    assert run.layers[0]["out_features"] == widths[-1]
    assert run.curve[-1]["loss"] < run.curve[0]["loss"]
    shares = trainer.simplifier.activity["0"]
    assert run.activity.keys() == {"0"}
    for recorded, share in zip(run.activity["0"], shares.tolist(), strict=True):
        assert recorded is None if math.isnan(share) else recorded == pytest.approx(share, abs=6e-5)
    assert sum(share is not None for share in run.activity["0"]) == widths[-1]
    compact = trainer.simplifier.compact()
    assert type(compact[0]) is torch.nn.Linear
    assert compact[0].out_features == widths[-1]


def test_a_resumed_run_keeps_what_its_layers_decided(task, monkeypatch, tmp_path):
    monkeypatch.setenv("MEPROP_CACHE", str(tmp_path))
    config = TrainingConfig(epochs=2, k=5, when="auto")
    monkeypatch.setattr(speed, "measure", lambda rule, shape: (10.0, 100.0))
    trainer = Trainer(task, config, config.rule(), 7)
    trainer.advance(3)
    state = copy.deepcopy(trainer.state_dict())
    assert state["records"]["0"]["decision"]["sparse"] is False

    monkeypatch.setattr(speed, "decide", lambda rule, shape: pytest.fail("decided again"))
    resumed = Trainer(task, config, config.rule(), 7)
    resumed.load_state_dict(state)
    assert str(resumed.report) == str(trainer.report)
    for each in (trainer, resumed):
        each.advance(3)
    for ours, theirs in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_resumed_run_asks_its_rule_when_the_other_does(task, monkeypatch):
    """Its layers keep more than pays, so that their rules are asked now and then. Each time draws a random number."""
    monkeypatch.setattr(speed, "decide", lambda rule, shape: speed.Decision(True, shape.rows, 2.0, 1.0, 1e-6))
    config = TrainingConfig(epochs=9, when="auto")
    trainer = Trainer(task, config, meprop.Sampled(noise=0.25), 7)
    for _ in range(5):
        trainer.advance(9)  # an epoch, whose end is a call of its own
    trainer.advance(5)
    state = copy.deepcopy(trainer.state_dict())
    assert state["records"]["0"]["rested"] > 0
    resumed = Trainer(task, config, meprop.Sampled(noise=0.25), 7)
    resumed.load_state_dict(state)
    for each in (trainer, resumed):
        for _ in range(3):
            each.advance(9)
    for ours, theirs in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert str(resumed.report) == str(trainer.report)
    assert resumed.curve[-1].density == trainer.curve[-1].density


def test_a_resumed_run_keeps_what_its_convolutions_decided(task, monkeypatch, tmp_path):
    def build_model():
        convolution = nn.Conv1d(1, 128, 3)
        return nn.Sequential(nn.Unflatten(1, (1, 6)), convolution, nn.ReLU(), nn.Flatten(), nn.Linear(512, 2))

    monkeypatch.setenv("MEPROP_CACHE", str(tmp_path))
    monkeypatch.setattr(task, "build_model", build_model)
    monkeypatch.setattr(speed, "measure", lambda rule, shape: (10.0, 100.0))
    config = TrainingConfig(epochs=2, k=5, scope="batch", when="auto")
    trainer = Trainer(task, config, config.rule(), 7)
    trainer.advance(1)
    state = copy.deepcopy(trainer.state_dict())
    assert state["records"]["1"]["decision"]["sparse"] is False
    resumed = Trainer(task, config, config.rule(), 7)
    resumed.load_state_dict(state)
    assert str(resumed.report) == str(trainer.report)


def test_a_metric_that_is_not_finite_stops_the_run_with_the_reason(task, monkeypatch):
    monkeypatch.setattr(type(task), "evaluate", lambda self, model, split: {"accuracy": 50.0, "loss": float("nan")})
    with pytest.raises(MepropError, match=r"dev loss became nan in epoch 1 \(dense, seed 7\): try a smaller --lr"):
        Trainer(task, TrainingConfig(epochs=1), None, 7).advance(100)


def test_the_learning_rate_falls_along_half_a_cosine_to_zero(task):
    trainer = Trainer(task, TrainingConfig(epochs=2, lr=0.4, accelerator="cpu"), None, 7)
    (group,) = trainer.optimizer.param_groups
    rates = []
    trainer.optimizer.register_step_pre_hook(lambda *_: rates.append(group["lr"]))
    fit([trainer], ignore)
    assert rates[0] == 0.4
    assert rates[8] == pytest.approx(0.2)  # half way
    assert rates[4] - 0.2 == pytest.approx(0.2 / 2**0.5)
    assert 0 < rates[-1] < 0.01
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(("lr_end", "share"), [(None, 1e-3), (0.1, 0.25)])
def test_the_learning_rate_falls_by_the_same_factor_in_each_step(task, lr_end, share):
    config = TrainingConfig(epochs=2, lr=0.4, schedule="geometric", lr_end=lr_end, accelerator="cpu")
    trainer = Trainer(task, config, None, 7)
    (group,) = trainer.optimizer.param_groups
    rates = []
    trainer.optimizer.register_step_pre_hook(lambda *_: rates.append(group["lr"]))
    fit([trainer], ignore)
    assert [*rates, group["lr"]] == pytest.approx([0.4 * share ** (step / 16) for step in range(17)])


def test_the_learning_rate_stays_where_it_is_to_be_constant(task):
    trainer = Trainer(task, TrainingConfig(epochs=2, lr=0.4, schedule="constant", accelerator="cpu"), None, 7)
    trainer.advance(5)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.4


@pytest.mark.parametrize("in_backward", [False, True])  # torch's optimizers, and ours
@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "sgd"])
def test_weight_decay_is_decoupled_with_adam_and_a_penalty_elsewhere(task, optimizer, in_backward):
    def stepped(weight_decay):
        settings = {"optimizer": optimizer, "in_backward": in_backward, "schedule": "constant", "lr": 0.01}
        config = TrainingConfig(**settings, weight_decay=weight_decay, accelerator="cpu")
        trainer = Trainer(task, config, None, 7)
        parameters = [*trainer.model.parameters()]
        before, grads = [each.detach().clone() for each in parameters], []
        trainer.optimizer.register_step_pre_hook(lambda *_: grads.extend(each.grad.clone() for each in parameters))
        trainer.advance(1)
        return before, grads, parameters

    before, grads, plain = stepped(0.0)
    _, _, decayed = stepped(0.5)
    assert not all(map(torch.equal, plain, decayed))
    for old, grad, without, found in zip(before, grads, plain, decayed, strict=True):
        expected = without - 0.01 * 0.5 * old
        if optimizer == "adagrad":
            expected = old - 0.01 * (grad + 0.5 * old) / ((grad + 0.5 * old).abs() + 1e-10)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_gpu_that_is_not_there_is_named_with_the_option(task, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MepropError, match="--accelerator cuda: torch finds no GPU here; give cpu, or auto"):
        Trainer(task, TrainingConfig(accelerator="cuda"), None, 7)


def test_the_largest_seed_that_is_allowed_is_one_for_torch(task):
    trainer = Trainer(task, TrainingConfig(seeds=(2**64 - 1,)), None, 2**64 - 1)
    trainer.advance(1)
    assert trainer.step == 1


class Clock:
    """A clock of which each step takes what is asked for: it is read four or five times a step."""

    def __init__(self, seconds):
        self.now, self.reads, self.seconds = 0.0, 0, seconds

    def __call__(self):
        self.now += self.seconds / 4
        return self.now


def budgeted(task, monkeypatch, seconds_of_step, **settings):
    config = replace(CONFIG, epochs=4, budget_seconds=8.0, **settings)
    trainer = Trainer(task, config, config.rule(), 7)
    monkeypatch.setattr(trainer, "_clock", Clock(seconds_of_step))
    return trainer


@pytest.mark.parametrize(("seconds_of_step", "steps"), [(1 / 8, 64), (1 / 16, 128), (0.3, 28), (5.0, 2)])
def test_a_budget_in_seconds_is_spent_in_equal_parts(task, monkeypatch, seconds_of_step, steps):
    trainer = budgeted(task, monkeypatch, seconds_of_step)
    (run,) = fit([trainer], ignore)
    assert run.epochs == 4
    assert run.steps == len(task.seen) == pytest.approx(steps, abs=2)
    ends = [record["seconds"] for record in run.curve]
    for part, end in enumerate(ends, start=1):  # no step is cut
        assert end >= 2 * part
        assert end < 2 * part + seconds_of_step


def test_passes_over_the_data_go_on_across_the_parts(task, monkeypatch):
    trainer = budgeted(task, monkeypatch, 0.5)
    fit([trainer], ignore)
    first = torch.cat(task.seen[:8])
    assert sorted(first.tolist()) == list(range(80))  # a part is 4 steps, a pass is 8
    assert not torch.equal(first, torch.cat(task.seen[8:16]))


@pytest.mark.parametrize("seconds_of_step", [1 / 16, 1 / 4, 1.0])
def test_schedules_go_over_their_whole_course_in_the_budget(task, monkeypatch, seconds_of_step):
    trainer = budgeted(task, monkeypatch, seconds_of_step, schedule="cosine", dense_warmup_steps=8)
    seen, late = [], seconds_of_step / 4 / 8  # a step is not over when its ticks are counted
    while not trainer.finished:
        rate = trainer.optimizer.param_groups[0]["lr"]
        seen.append((trainer.share, rate, trainer.model[0].rule.keeps_all(128)))
        trainer.advance(1)
    for share, rate, dense in seen:
        ticks = int(max(0, share - late) * 4 * 8)
        assert rate == pytest.approx(trainer.config.lr * (1 + math.cos(math.pi * ticks / 32)) / 2)
        assert dense == (ticks < 8)
    assert trainer.optimizer.param_groups[0]["lr"] < 0.02 * trainer.config.lr


@pytest.mark.parametrize(("seconds_of_step", "steps"), [(0.3, 3), (0.3, 8), (0.3, 11), (5.0, 1)])
def test_a_run_of_seconds_is_resumed_bit_for_bit(monkeypatch, seconds_of_step, steps):
    straight = budgeted(TinyTask(), monkeypatch, seconds_of_step)
    fit([straight], ignore)
    first = budgeted(TinyTask(), monkeypatch, seconds_of_step)
    while first.steps_before + first.step < steps:
        first.advance(1)
    second = budgeted(TinyTask(), monkeypatch, seconds_of_step)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    (run,) = fit([second], ignore)
    assert_same_weights(weights(straight), weights(second))
    assert run.steps == straight.steps_before


def test_the_run_that_is_behind_has_the_next_turn(task, monkeypatch):
    slow, fast = budgeted(task, monkeypatch, 0.5), budgeted(task, monkeypatch, 0.125)
    turns = []
    fit([slow, fast], turns.append, turn=1)
    before = turns[: turns.index(slow, 1)]
    assert before.count(fast) == pytest.approx(4, abs=1)
    assert slow.steps_before * 4 == pytest.approx(fast.steps_before, abs=4)


def test_simplifying_needs_epochs(task):
    with pytest.raises(ValueError, match="--budget-seconds: cycles of simplifying are counted in epochs"):
        Trainer(task, replace(CONFIG, budget_seconds=1.0), CONFIG.rule(), 0, SimplifyConfig())
