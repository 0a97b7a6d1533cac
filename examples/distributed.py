"""MNIST on several processes, dense and sparse: the loss, and the bytes that each process sends in a step.

torchrun --nproc-per-node 2 examples/distributed.py

Needs `pip install 'meprop[tasks]'` for the data, or --random for none.
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import meprop
from meprop.distributed import RowSparseState, SynchronizedTopK, average_gradients, row_sparse_hook


def load(random: bool) -> tuple[Tensor, Tensor]:
    """Images [N, 784] and their classes [N]."""
    if random:
        images_NI = torch.randn(2000, 784, generator=torch.Generator().manual_seed(0))
        return images_NI, (images_NI[:, :10] + images_NI[:, 10:20]).argmax(dim=1)
    from meprop.tasks import mnist

    digits = mnist.load(mnist.MnistConfig())
    return digits.train_images, digits.train_labels


def make_model(hidden: int) -> nn.Sequential:
    """The same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def train(variant: str, options: argparse.Namespace, images_NI: Tensor, labels_N: Tensor) -> tuple[float, float]:
    """The mean loss of the last tenth of the steps, and the bytes that a process sends in a step."""
    model = make_model(options.hidden)
    sent = scores = 0
    if variant != "dense":
        rows_only = variant == "without a wrapper"
        report = meprop.convert(model, SynchronizedTopK(options.k), min_features=11, sparse_grad=rows_only)
        scores = sum(8 * layer.out_features for layer in report.layers if layer.status == "sparse")
    trained = model if variant == "without a wrapper" else DistributedDataParallel(model)
    state = RowSparseState()
    if isinstance(trained, DistributedDataParallel) and variant == "with the hook":
        trained.register_comm_hook(state, row_sparse_hook)
    optimizer = meprop.optim.Adam(model.parameters(), lr=1e-3)

    generator = torch.Generator().manual_seed(dist.get_rank())  # every process has batches of its own
    losses: list[Tensor] = []
    for _ in range(options.steps):
        batch = torch.randint(len(images_NI), (options.batch,), generator=generator)
        loss = F.cross_entropy(trained(images_NI[batch]), labels_N[batch])
        optimizer.zero_grad()
        loss.backward()
        if variant == "without a wrapper":
            sent += average_gradients(model.parameters())
        optimizer.step()
        losses.append(loss.detach())
    last = torch.stack(losses[-max(1, options.steps // 10) :]).mean()
    dist.all_reduce(last)
    if variant == "dense":
        sent = options.steps * sum(parameter.nbytes for parameter in model.parameters())
    return float(last) / dist.get_world_size(), (sent + state.bytes_sent) / options.steps + scores


def main() -> None:
    """Trains all variants, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=50, help="images of each process in a step")
    parser.add_argument("--hidden", type=int, default=1024, help="features of both hidden layers")
    parser.add_argument("--k", type=float, default=0.1, help="share of the features that is kept")
    parser.add_argument("--random", action="store_true", help="random data, which nothing has to be installed for")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    data = load(options.random)
    for variant in ("dense", "with the hook", "without a wrapper"):
        loss, sent = train(variant, options, *data)
        if dist.get_rank() == 0:
            print(f"{variant:20} loss {loss:.4f}   {sent / 1e6:9.4f} MB sent per step by each process", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
