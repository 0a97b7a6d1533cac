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
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
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


def test_options_need_a_rule():
    with pytest.raises(ValueError, match="when without a rule"):
        MePropCallback(when="always")


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
