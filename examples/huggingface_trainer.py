"""GPT-2 in Hugging Face's Trainer, with meprop's callback: dense and sparse side by side.

    python examples/huggingface_trainer.py --steps 100

The model is built from a config and learns to count, so that nothing has to be downloaded. Needs meprop[hf].
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import transformers

import meprop
from meprop.integrations.huggingface import MePropCallback


def train(name: str, options: argparse.Namespace, folder: str) -> str:
    transformers.set_seed(0)
    config = {"vocab_size": 64, "n_positions": 32, "n_embd": 256, "n_layer": 2, "n_head": 4}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, bos_token_id=0, eos_token_id=0))
    rows = (torch.arange(64)[:, None] + torch.arange(32)) % 64
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=options.steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        logging_steps=max(1, options.steps // 5),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rule = meprop.TopK(options.k, scope="batch")
    callbacks = [MePropCallback(rule, when=options.when)] if name == "sparse" else []
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    if name == "sparse":  # c_attn makes query, key and value in one product: there the rule is to choose within each
        apart = meprop.InBlocks(rule, 3)
        meprop.convert(model, apart, filter=lambda layer_name, _: layer_name.endswith("c_attn"), when=options.when)
    result = trainer.train()
    seconds = result.metrics["train_runtime"]
    loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    return f"{name:8} loss {float(loss):.3f}   {1000 * seconds / options.steps:.1f} ms a step"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--k", type=float, default=0.1, help="a share of the features")
    parser.add_argument("--when", choices=["always", "auto"], default="always")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = [train(name, options, folder) for name in ("dense", "sparse")]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
