"""Fine-tunes a Hugging Face encoder for classification in a loop of one's own, dense and sparse side by side.

    python examples/huggingface_encoder.py --steps 200

The encoder is built from a config, and the task is made up (which of two tokens is there more often?), so that nothing
has to be downloaded; for a real one put `AutoModelForSequenceClassification.from_pretrained(...)` and your data there.
Needs meprop[hf].
"""

from __future__ import annotations

import argparse
import time

import torch
import transformers
from torch import Tensor

import meprop


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [32, 24] of 100 kinds, and whether there are more of the first kind than of the second [32]."""
    tokens = torch.randint(2, 100, (32, 24), generator=generator)
    marked = torch.rand(32, 24, generator=generator) < 0.3
    tokens[marked] = torch.randint(0, 2, (int(marked.sum()),), generator=generator)
    return tokens, ((tokens == 0).sum(1) > (tokens == 1).sum(1)).long()


def train(name: str, options: argparse.Namespace) -> str:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024
    )
    model = transformers.BertForSequenceClassification(config)
    if name == "sparse":
        print(meprop.convert(model, meprop.TopK(options.k, scope="batch"), when=options.when))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    seconds, losses = 0.0, []
    for _ in range(options.steps):
        tokens, labels = batch(generator)
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - start
        losses.append(loss.item())
    last = losses[-20:]
    return f"{name:8} loss {sum(last) / len(last):.3f}   {1000 * seconds / options.steps:.1f} ms a step"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--k", type=float, default=0.1, help="a share of the features")
    parser.add_argument("--when", choices=["always", "auto"], default="always")
    options = parser.parse_args()
    print("\n".join([train(name, options) for name in ("dense", "sparse")]))


if __name__ == "__main__":
    main()
