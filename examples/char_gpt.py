"""A small GPT on characters, dense and sparse side by side: plain PyTorch, three lines of meprop.

    python examples/char_gpt.py --data input.txt --k 0.1 --steps 1000
    python examples/char_gpt.py --data input.txt --k 0.1 --seconds 600 --only sparse --out sparse.json

The text is any file; without --data it is tinyshakespeare/input.txt in the folder $MEPROP_DATA. Its last tenth is held
out. With --seconds a run ends after that much training (evaluation is not counted) and not after --steps, to compare at
equal time; the learning rate falls to zero over either. --out writes every number, with the loss over steps and seconds
(this needs meprop[tasks], for the versions and the commit).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meprop

RULES = {
    "topk": meprop.TopK,
    "compensated": meprop.CompensatedTopK,
    "random": meprop.RandomK,
    "sampled": meprop.Sampled,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a text file")
    parser.add_argument("--rule", choices=RULES, default="topk")
    parser.add_argument("--k", type=number, default=0.1, help="a share of the features (0.1), or a count (20)")
    parser.add_argument(
        "--scope", choices=["example", "batch", "global"], help="per token, unified, or over all tokens"
    )
    parser.add_argument("--noise", type=float, help="--rule sampled: the budget of noise, in place of --k and --scope")
    parser.add_argument("--weight-noise", type=float, help="another budget for the weights' gradients")
    parser.add_argument("--ceiling", type=float, default=0.3, help="the density above which a layer's step is dense")
    parser.add_argument("--sparse-rows", choices=["exact", "decay", "lazy"], help="row-sparse gradients (scope batch)")
    parser.add_argument("--when", choices=["always", "auto"], default="always")
    parser.add_argument("--dense", default="", help="layers to leave dense, comma-separated parts of names: linear2")
    parser.add_argument("--only", choices=["dense", "sparse"], help="one of the two runs")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seconds", type=float, help="train so long instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=128, help="characters")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--evaluate-every", type=int, default=100, help="steps")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    if options.noise is not None and options.rule != "sampled":
        parser.error("--noise is for --rule sampled")
    if options.noise is None and options.weight_noise is not None:
        parser.error("--weight-noise needs --noise")
    if options.data is None:
        if "MEPROP_DATA" not in os.environ:
            parser.error("which text? give --data FILE, or the folder of tinyshakespeare/input.txt in $MEPROP_DATA")
        options.data = Path(os.environ["MEPROP_DATA"]) / "tinyshakespeare" / "input.txt"
    return options


def number(text: str) -> int | float:
    return float(text) if "." in text else int(text)


class Text:
    """A file as numbers of characters; the last tenth is held out."""

    def __init__(self, path: Path, context: int) -> None:
        text = path.read_text()
        self.characters, self.context = sorted(set(text)), context
        codes = {character: code for code, character in enumerate(self.characters)}
        self.all_N = torch.tensor([codes[character] for character in text])
        self.split = len(self.all_N) * 9 // 10
        if len(self.all_N) - self.split <= context + 1:
            raise SystemExit(f"{path} has {len(text)} characters: too few for --context {context}; give a longer text")

    def batch(self, size: int, generator: torch.Generator, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Random pieces [B, T], and the same one character on."""
        start, end = (self.split, len(self.all_N)) if held_out else (0, self.split)
        starts_B = torch.randint(start, end - self.context, (size,), generator=generator)
        pieces_BT = self.all_N[starts_B[:, None] + torch.arange(self.context + 1)]
        return pieces_BT[:, :-1], pieces_BT[:, 1:]


class GPT(nn.Module):
    def __init__(self, characters: int, options: argparse.Namespace) -> None:
        super().__init__()
        width = options.width
        self.embed = nn.Embedding(characters, width)
        self.place = nn.Embedding(options.context, width)
        layer: dict[str, Any] = {"dropout": options.dropout, "activation": "gelu", "batch_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, options.heads, 4 * width, norm_first=True, **layer)
            for _ in range(options.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)
        self.register_buffer("causal", nn.Transformer.generate_square_subsequent_mask(options.context))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTE = self.embed(tokens_BT) + self.place.weight
        for block in self.blocks:
            x_BTE = block(x_BTE, src_mask=self.causal, is_causal=True)
        return self.head(self.norm(x_BTE))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens_BT, next_BT = batch
    return F.cross_entropy(model(tokens_BT).flatten(0, 1), next_BT.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, text: Text, batches: int = 20) -> float:
    """Nats per character, on the same pieces each time."""
    generator = torch.Generator().manual_seed(1)
    model.eval()
    loss = sum(loss_of(model, text.batch(32, generator, held_out=True)).item() for _ in range(batches)) / batches
    model.train()
    return loss


def rule_of(name: str, options: argparse.Namespace) -> meprop.Rule | None:
    if name == "dense":
        return None
    if options.noise is None:
        return RULES[options.rule](options.k, **({} if options.scope is None else {"scope": options.scope}))
    drawn = meprop.Sampled(noise=options.noise, ceiling=options.ceiling)
    if options.weight_noise is None:
        return drawn
    return meprop.PerProduct(input=drawn, weight=meprop.Sampled(noise=options.weight_noise, ceiling=options.ceiling))


def prepare(name: str, text: Text, options: argparse.Namespace) -> tuple[GPT, torch.optim.Optimizer]:
    """A new model, "dense" or "sparse", and its optimizer."""
    torch.manual_seed(options.seed)
    model = GPT(len(text.characters), options)
    decay: dict[str, Any] = {"lr": options.lr, "betas": (0.9, 0.95), "weight_decay": 0.1}
    if (rule := rule_of(name, options)) is not None:
        left_dense = ["head", *filter(None, options.dense.split(","))]
        keep = lambda layer_name, _: not any(part in layer_name for part in left_dense)  # noqa: E731
        meprop.convert(model, rule, filter=keep, sparse_grad=options.sparse_rows is not None, when=options.when)
    if name == "sparse" and options.sparse_rows is not None:
        return model, meprop.optim.AdamW(model.parameters(), sparse_rows=options.sparse_rows, **decay)
    return model, torch.optim.AdamW(model.parameters(), fused=True, **decay)


def train(name: str, text: Text, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one model, and returns its losses and seconds."""
    model, optimizer = prepare(name, text, options)
    generator = torch.Generator().manual_seed(options.seed)
    spent: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": [], "step": []}
    curve: list[dict[str, float]] = []
    progress, step, seconds = 0.0, 0, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min((step + 1) / 50, 1 - progress)
        batch = text.batch(options.batch, generator)
        moments = [time.perf_counter()]
        loss = loss_of(model, batch)
        moments.append(time.perf_counter())
        loss.backward()
        moments.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        moments.append(time.perf_counter())
        for times, (start, end) in zip(spent.values(), [*pairwise(moments), (moments[0], moments[-1])], strict=True):
            times.append(end - start)
        step, seconds = step + 1, seconds + spent["step"][-1]
        progress = step / options.steps if options.seconds is None else seconds / options.seconds
        if step % options.evaluate_every == 0 or progress >= 1:
            curve.append({"step": step, "seconds": seconds, "train": loss.item(), "dev": evaluate(model, text)})
            print(f"{name}  step {step}  {seconds:.1f} s  dev {curve[-1]['dev']:.3f}", flush=True)
    report = meprop.report(model)
    return {
        "name": name,
        "rule": str(rule_of(name, options) or "dense"),
        "seed": options.seed,
        "steps": step,
        "density": report.density,
        "layers": {layer.name: layer.density for layer in report.layers},
        "dev": {"loss": curve[-1]["dev"]},
        "seconds": {part: sum(times) for part, times in spent.items()},
        "milliseconds": {part: 1000 * median(times) for part, times in spent.items()},
        "curve": curve,
    }


def table(runs: list[dict[str, Any]]) -> str:
    lines = ["          dev loss    steps   forward, ms  backward  optimizer  whole step   kept"]
    for run in runs:
        ms = run["milliseconds"]
        parts = f"{ms['forward']:15.1f}{ms['backward']:10.1f}{ms['optimizer']:11.1f}{ms['step']:12.1f}"
        lines.append(f"{run['name']:8}{run['dev']['loss']:10.3f}{run['steps']:9}{parts}{run['density']:7.1%}")
    return "\n".join(lines)


def write(options: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    from meprop import machine
    from meprop.training import tracking

    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    record = {"task": "char-gpt", "config": config, "machine": machine.describe(), "versions": tracking.versions()}
    record |= {"commit": tracking.commit(), "runs": runs}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    options = arguments()
    text = Text(options.data, options.context)
    runs = [train(name, text, options) for name in ("dense", "sparse") if options.only in (None, name)]
    print(table(runs))
    if options.out is not None:
        write(options, runs)


if __name__ == "__main__":
    main()
