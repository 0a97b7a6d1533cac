"""A LightningModule with meprop's callback: dense and sparse side by side.

    python examples/lightning_callback.py --steps 200

The data are made up: inputs and the outputs of a random network. Needs meprop[lightning].
"""

from __future__ import annotations

import argparse
import time

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import meprop
from meprop.integrations.lightning import MePropCallback


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 8))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        loss = nn.functional.mse_loss(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)


def data() -> DataLoader:
    torch.manual_seed(0)
    inputs = torch.randn(4096, 64)
    with torch.no_grad():
        outputs = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 8))(inputs)
    return DataLoader(TensorDataset(inputs, outputs), batch_size=128, shuffle=True)


def train(name: str, options: argparse.Namespace) -> str:
    batches = data()
    pl.seed_everything(0, verbose=False)
    module = Regression()
    callbacks = [MePropCallback(meprop.TopK(options.k), when=options.when)] if name == "sparse" else []
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=options.steps, max_epochs=-1, accelerator="cpu", callbacks=callbacks, **quiet)
    start = time.perf_counter()
    trainer.fit(module, batches)
    seconds = time.perf_counter() - start
    last = module.losses[-20:]
    return f"{name:8} loss {sum(last) / len(last):.4f}   {1000 * seconds / options.steps:.1f} ms a step"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--k", type=float, default=0.1, help="a share of the features")
    parser.add_argument("--when", choices=["always", "auto"], default="always")
    options = parser.parse_args()
    print("\n".join([train(name, options) for name in ("dense", "sparse")]))


if __name__ == "__main__":
    main()
