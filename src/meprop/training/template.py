"""A training of your own, for `meprop compare train.py:make`. Put your model, data and optimizer where these are."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import meprop


def make(seed: int, epochs: int) -> meprop.Setup:
    """Return one training. Torch, NumPy and Python have been given the seed, so most files need not look at it."""
    inputs, classes = example_data()
    train, held_out = TensorDataset(inputs[:4000], classes[:4000]), (inputs[4000:], classes[4000:])
    batches = DataLoader(train, batch_size=100, shuffle=True)
    model = nn.Sequential(
        nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, len(classes.unique()))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    # To clip gradients:
    # def clip(*_):
    #     nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    # optimizer.register_step_pre_hook(clip)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, classes = batch
        return F.cross_entropy(model(inputs), classes)

    def evaluate(model: nn.Module) -> float:
        inputs, classes = held_out
        return 100 * (model(inputs).argmax(dim=1) == classes).float().mean().item()

    return meprop.Setup(
        model,
        optimizer,
        batches,
        loss,
        evaluate,
        metric="accuracy",
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches)),
    )


def example_data() -> tuple[Tensor, Tensor]:
    """Return 5,000 inputs [5000, 256] and their classes, which a random network gave them: the same in each run."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5000, 256, generator=generator)
    hidden = torch.relu(inputs @ torch.randn(256, 64, generator=generator))
    return inputs, (hidden @ torch.randn(64, 10, generator=generator)).argmax(dim=1)
