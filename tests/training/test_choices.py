from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("lightning_fabric")

import meprop
from meprop.training.choices import read_choices
from meprop.training.config import RunConfig, ScriptTraining, TrainingConfig


@pytest.mark.parametrize(
    ("text", "name", "rule"),
    [
        ("topk", "topk", meprop.TopK(20, scope="example")),
        ("topk:k=0.04", "topk:k=0.04", meprop.TopK(0.04, scope="example")),
        ("topk:k=7, scope = global", "topk:k=7,scope=global", meprop.TopK(7, scope="global")),
        ("sampled:noise=1e-1", "sampled:noise=0.1", meprop.Sampled(noise=0.1)),
        ("sampled:k=0.1,scope=global", "sampled:k=0.1,scope=global", meprop.Sampled(0.1)),
        ("topk:exact-sum=true,k=9", "topk:exact_sum=True,k=9", meprop.TopK(9, "example", exact_sum=True)),
        ("dense:precision=bf16-mixed", "dense:precision=bf16-mixed", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("training", [RunConfig(), TrainingConfig(), ScriptTraining()])
def test_a_choice_is_a_rule_with_settings_of_its_own(text, name, rule, training):
    dense, choice = read_choices([text], training)
    assert (dense.name, dense.make_rule(), dense.training) == ("dense", None, training)
    assert choice.name == name
    assert choice.make_rule() == rule


def test_settings_of_a_choice_go_before_those_of_all():
    training = TrainingConfig(noise=0.25, noise_of="model", when="always", epochs=7)
    _, first, second, third, fourth = read_choices(
        ["sampled", "sampled:noise=1.0,when=auto", "sampled:k=30", "topk"], training
    )
    assert (first.make_rule(), first.training) == (meprop.Sampled(noise=0.25), training)
    assert (second.make_rule(), second.training.when) == (meprop.Sampled(noise=1.0), "auto")
    assert (second.training.noise_of, second.training.epochs) == ("model", 7)
    assert third.make_rule() == meprop.Sampled(30, scope="example")  # k in place of the noise
    assert fourth.make_rule() == meprop.TopK(20, scope="example")  # which has no noise


def test_dense_leaves_aside_what_only_sparse_layers_have():
    shared = TrainingConfig(noise=0.25, compute_dtype="bfloat16", exact_sum=False, sparse_rows="decay")
    _, sampled, dense = read_choices(["sampled", "dense:precision=bf16-mixed"], shared)
    assert (sampled.training, dense.make_rule()) == (shared, None)
    assert dense.training == replace(
        shared, compute_dtype="float32", sparse_rows="no", precision="bf16-mixed", noise=None
    )


def test_a_setting_may_be_a_list():
    texts = ["topk:k_ratio=[1, 3],k=20", "topk:k=20,k_ratio=[3,1]"]
    _, first, second = read_choices(texts, TrainingConfig())
    assert (first.training.k_ratio, second.training.k_ratio) == ((1, 3), (3, 1))
    assert [first.name, second.name] == ["topk:k_ratio=[1,3],k=20", "topk:k=20,k_ratio=[3,1]"]


def test_a_rule_alone_does_not_leave_an_option_aside():
    with pytest.raises(ValueError, match=r"--rule topk: noise=0\.25 is no setting of the rule 'topk'"):
        read_choices(["topk"], TrainingConfig(noise=0.25))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "--rule has no rule; give one or more"),
        (["dense"], "dense is always trained"),
        (["topk", "topk"], "--rule has topk twice"),
        (["topk:k=5", "topk:k = 5"], "--rule has topk:k=5 twice"),
        (["topj"], r"--rule topj: the rules are dense, topk, .*did you mean topk"),
        (["topk:"], None),
        (["topk:k"], "--rule topk:k: 'k' is no setting; write NAME=VALUE, such as k=0.04"),
        (["topk:kk=3"], "--rule topk:kk=3: kk: there is no such key; there are k, k_start, k_ratio, scope, noise"),
        (["topk:epochs=3"], "epochs: there is no such key"),
        (["topk:seeds=3"], "seeds: there is no such key"),
        (["topk:k=many"], "k is 'many'; it must be int | float"),
        (["topk:k=true"], "k is True; it must be int | float"),
        (["topk:k=1.5"], "--rule topk:k=1.5: k=1.5"),
        (["topk:scope=row"], "scope is 'row'; it must be"),
        (["topk:noise=0.5"], "noise=0.5 is no setting of the rule 'topk'"),
        (["dense:fuse=true"], "--rule dense:fuse=true: --fuse: --rule dense keeps everything"),
        (["dense:compute_dtype='bfloat16'"], "--compute-dtype: --rule dense keeps everything"),
        (["sampled:noise=-1"], "--rule sampled:noise=-1: "),
    ],
)
def test_what_is_no_choice_is_refused_with_its_text(texts, message):
    if message is None:
        assert read_choices(texts, RunConfig())[1].name == "topk"
        return
    with pytest.raises(ValueError, match=message):
        read_choices(texts, RunConfig())
