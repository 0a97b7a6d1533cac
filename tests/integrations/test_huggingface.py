"""The callback for Hugging Face's Trainer, and Accelerate without one."""

from __future__ import annotations

import accelerate
import pytest
import torch
import transformers
from torch import nn

import meprop
from meprop.integrations.huggingface import MePropCallback

RULE = meprop.TopK(5, scope="batch")


def gpt2() -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    config = {"vocab_size": 50, "n_positions": 8, "n_embd": 128, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, bos_token_id=0, eos_token_id=0))


def trainer(folder, callback: MePropCallback, **options) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=options.pop("report_to", []),
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **({"optim": options.pop("optim")} if "optim" in options else {}),
    )
    tokens = torch.randint(0, 50, (8, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    return transformers.Trainer(args=arguments, train_dataset=data, callbacks=[callback], **options)


def test_training_is_sparse_and_logs_its_density(tmp_path, capsys):
    model, kept = gpt2(), []
    weight = model.transformer.h[0].mlp.c_fc.weight
    weight.register_post_accumulate_grad_hook(lambda each: kept.append(int((each.grad.abs().sum(0) > 0).sum())))
    training = trainer(tmp_path, MePropCallback(RULE, when="always"), model=model)
    training.train()
    assert kept == [5, 5]
    density = meprop.report(model).density
    assert 0 < density < 0.2
    steps = [entry for entry in training.state.log_history if "loss" in entry]
    assert [entry["meprop_density"] for entry in steps] == [density, density]
    printed = capsys.readouterr().out
    assert "meprop_density" in printed
    assert "4 of 5 layers back-propagate sparsely" in printed


class Tracker(transformers.TrainerCallback):
    """As the Trainer's own ones: it copies what it gets at once."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logs.append(dict(logs))


def test_trackers_that_are_called_before_see_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.trainer, "get_reporting_integration_callbacks", lambda report_to: [Tracker])
    model = gpt2()
    training = trainer(tmp_path, MePropCallback(RULE, when="always", energy=True, layers=True), model=model)
    callbacks = training.callback_handler.callbacks
    (tracker,) = (each for each in callbacks if isinstance(each, Tracker))
    assert callbacks.index(tracker) < [type(each) for each in callbacks].index(MePropCallback)
    measured = []
    weight = model.transformer.h[0].mlp.c_fc.weight
    weight.register_post_accumulate_grad_hook(
        lambda _: measured.append(model.transformer.h[0].mlp.c_fc.policy.record.energy is not None)
    )
    training.train()
    assert measured == [True, True]
    *steps, last = tracker.logs
    history = training.state.log_history
    for entry, kept in zip(steps, history, strict=False):
        found = {name: value for name, value in entry.items() if name.startswith("meprop_")}
        assert found.items() <= kept.items()
        assert {"meprop_density", "meprop_k", "meprop_energy", "meprop_density/transformer.h.0.mlp.c_fc"} <= set(found)
        assert found["meprop_density"] == meprop.report(model).density
        assert found["meprop_k"] == 5
        assert 0 < found["meprop_energy"] < 1
    assert len(steps) == 2
    assert not any(name.startswith("meprop_") for name in last)  # that of the end is not one of steps


def test_the_energy_is_that_of_the_first_step_after_a_log(tmp_path):
    model, measured = gpt2(), []
    training = trainer(tmp_path, MePropCallback(RULE, when="always", energy=True), model=model)
    training.args.max_steps, training.args.logging_steps = 4, 2
    layer = model.transformer.h[0].mlp.c_fc
    layer.weight.register_post_accumulate_grad_hook(lambda _: measured.append(layer.policy.record.energy is not None))
    training.train()
    assert measured == [True, False, True, False]


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")  # not of the extra [hf]
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "curves"))
    model = gpt2()
    trainer(tmp_path, MePropCallback(RULE, when="always"), model=model, report_to=["tensorboard"]).train()
    events = accumulator.EventAccumulator(str(tmp_path / "curves"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/meprop_k")] == [(1, 5.0), (2, 5.0)]
    assert "train/meprop_energy" not in events.Tags()["scalars"]  # nobody asked for it


def test_a_trainer_without_the_callback_logs_what_it_did(tmp_path):
    training = trainer(tmp_path, Tracker(), model=gpt2())
    training.train()
    assert not any("meprop" in name for entry in training.state.log_history for name in entry)


def test_a_model_made_anew_is_refused_or_converted_where_it_is_made(tmp_path):
    with pytest.raises(meprop.NotSupportedError, match="model_init has made a new one"):
        trainer(tmp_path, MePropCallback(RULE), model_init=gpt2).train()

    def converted() -> transformers.GPT2LMHeadModel:
        model = gpt2()
        meprop.convert(model, RULE, when="always")
        return model

    training = trainer(tmp_path, MePropCallback(), model_init=converted)
    training.train()
    assert training.state.log_history[0]["meprop_density"] < 0.2


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, num_key_value_heads=4, **sizes))


def test_the_trainers_clipping_is_that_of_dense_gradients(tmp_path):
    """It clips to a norm of 1 by default. The logged norm is that before."""
    logged, trained = [], []
    for sparse_grad in (False, True):
        model = llama()
        callback = MePropCallback(RULE, when="always", sparse_grad=sparse_grad)
        optimizer = meprop.optim.SGD(model.parameters(), lr=0.1)
        training = trainer(tmp_path, callback, model=model, optimizers=(optimizer, None))
        layouts = []
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.register_post_accumulate_grad_hook(lambda each, layouts=layouts: layouts.append(each.grad.layout))
        training.train()
        assert layouts == [torch.sparse_coo if sparse_grad else torch.strided] * 2
        logged.append([entry["grad_norm"] for entry in training.state.log_history if "grad_norm" in entry])
        trained.append(model.state_dict())
    assert min(logged[0]) > 1
    assert logged[1] == pytest.approx(logged[0])
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "adafactor", "rmsprop"])
def test_the_trainers_optimizers_are_refused_before_a_step_is_lost(tmp_path, optim):
    model = llama()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    training = trainer(tmp_path, MePropCallback(RULE, sparse_grad=True), model=model, optim=optim)
    with pytest.raises(meprop.NotSupportedError, match=r"Take meprop\.optim\."):
        training.train()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("by", ["norm", "value"])
def test_accelerate_clips_row_sparse_gradients(by):
    grads = []
    for sparse_grad in (False, True):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 200), nn.ReLU(), nn.Linear(200, 200))
        meprop.convert(model, meprop.TopK(10, scope="batch"), when="always", sparse_grad=sparse_grad)
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, meprop.optim.Adam(model.parameters()))
        accelerator.backward(model(torch.randn(4, 6)).square().sum())
        clip = accelerator.clip_grad_norm_ if by == "norm" else accelerator.clip_grad_value_
        clip(model.parameters(), 0.5)
        optimizer.step()
        grads.append([parameter.grad.to_dense() for parameter in model.parameters()])
    torch.testing.assert_close(*grads)
    assert 0 < max(each.abs().max() for each in grads[1]) <= 0.5


def test_clipping_that_would_find_no_gradient_is_refused(tmp_path):
    model = gpt2()
    training = trainer(tmp_path, MePropCallback(RULE), model=model)
    training.optimizer = meprop.optim.Adam(model.parameters(), in_backward=True)
    with pytest.raises(meprop.NotSupportedError, match=r"max_grad_norm=1.0 .* max_grad_norm=0"):
        training.train()
    training.args.max_grad_norm = 0.0
    before = model.transformer.wte.weight.detach().clone()
    training.train()
    assert not torch.equal(before, model.transformer.wte.weight)


def test_options_need_a_rule():
    with pytest.raises(ValueError, match="when without a rule"):
        MePropCallback(when="always")


@pytest.mark.parametrize("option", ["energy", "layers"])
def test_flags_are_checked(option):
    with pytest.raises(TypeError, match=f"{option}=1 is of type int; it is True or False"):
        MePropCallback(RULE, **{option: 1})


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_needs_nothing(precision):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # it is the process's, and fixed
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 200), nn.ReLU(), nn.Linear(200, 200))
    meprop.convert(model, meprop.TopK(10, scope="batch"), when="always")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    before = model[2].weight.detach().clone()
    for x in (torch.randn(4, 6), torch.randn(4, 6)):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(x).float().square().mean())
            rows = int((model[2].weight.grad.abs().sum(1) > 0).sum())
            assert 10 <= rows <= 20
            optimizer.step()
    assert not torch.equal(model[2].weight, before)
    assert type(accelerator.unwrap_model(prepared)[0]) is meprop.nn.Linear
