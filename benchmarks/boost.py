"""Boosted residual blocks on MNIST beside end-to-end training, dense and sparse, at 5, 10 and 25 blocks.

    python benchmarks/boost.py --boost 0                 # boosted blocks with seed 0, dense and sparse
    python benchmarks/boost.py --gradients 0             # what sparse gradients lose over depth: minutes
    python benchmarks/boost.py --end-to-end 0            # the same numbers of updates end to end: hours for 25 blocks
    python benchmarks/boost.py --page docs/recipes/boost.md

A block is Linear(784, 1024), ReLU, Linear(1024, 784), whose last layer begins with zeros. Each run leaves a JSON file,
and is made only if that is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

import meprop
from meprop import machine
from meprop.boosting import Residual
from meprop.edges import log_exponential_loss
from meprop.reporting.pages import markdown_table, write_sections
from meprop.tasks.mnist import Digits, MnistConfig, load
from meprop.training import tracking

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "boost"
DEPTHS = (5, 10, 25)
RULES: dict[str, meprop.Rule | None] = {
    "dense": None,
    "top-k 4%": meprop.TopK(0.04),
    "sampled 4%": meprop.Sampled(0.04),
}
SETTINGS: dict[str, Any] = {"steps": 6000, "check_every": 1200, "batch_size": 100, "gamma": 0.0}
LEARNING_RATE = 5e-4  # at first, and again after every check
GRADIENT_LEARNING_RATE = 3e-4  # constant
GRADIENT_SETTINGS: dict[str, Any] = {"steps": 500, "check_every": 50, "batch_size": 100, "gamma": 0.0}
GRADIENT_IMAGES = 10_000  # that the blocks are trained on whose gradients are compared
GRADIENT_BATCHES = 10
COLORS = ("#0072B2", "#D55E00", "#009E73")


def digits() -> Digits:
    """MNIST with all 60,000 training images, as nothing is chosen by a development set."""
    found = load(MnistConfig())
    images = torch.cat([found.dev_images, found.train_images])
    return replace(found, train_images=images, train_labels=torch.cat([found.dev_labels, found.train_labels]))


def make_block() -> nn.Module:
    """A block of one hidden layer, which returns zeros."""
    block = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 784))
    nn.init.zeros_(block[2].weight)
    nn.init.zeros_(block[2].bias)
    return block


def convert(model: nn.Module, rule: meprop.Rule | None) -> None:
    """Lets a model back-propagate by a rule. None leaves it dense."""
    if rule is not None:
        meprop.convert(model, rule, when="always")


def adam(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of all runs but those of gradients. Its rate falls to zero by a cosine until the next check."""
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
    schedule = CosineAnnealingWarmRestarts(optimizer, SETTINGS["check_every"])
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that a model gets right, in percent."""
    model.eval()
    found = torch.cat([model(each).argmax(dim=1) for each in images.split(1000)])
    return 100 * float((found == labels).double().mean())


# ---------------------------------------------------------------- what a rule loses of the gradient, over depth


def gradient_errors(layers: list[nn.Module], losses: Callable[[], Iterator[Tensor]], rule: meprop.Rule) -> list[float]:
    """The length of the difference of sparse and dense gradients of each layer, as a share of the dense one's.

    Args:
        layers: Dense modules.
        losses: Gives the loss of each batch, anew when called again.
        rule: What the sparse gradients keep.
    """

    def gradients() -> Iterator[list[Tensor]]:
        for loss in losses():
            found = iter(torch.autograd.grad(loss, [each for layer in layers for each in layer.parameters()]))
            yield [torch.cat([next(found).flatten() for _ in layer.parameters()]) for layer in layers]

    whole = nn.ModuleList(layers)
    difference = torch.zeros(len(layers), dtype=torch.float64)
    length = torch.zeros(len(layers), dtype=torch.float64)
    dense = list(gradients())
    convert(whole, rule)
    for exact, kept in zip(dense, gradients(), strict=True):
        difference += torch.tensor([float((a - b).square().sum()) for a, b in zip(exact, kept, strict=True)])
        length += torch.tensor([float(a.square().sum()) for a in exact])
    meprop.revert(whole)
    return (difference / length).sqrt().tolist()


def errors_end_to_end(
    model: nn.Sequential, data: Digits, rule: meprop.Rule, loss: Callable[[Tensor, Tensor], Tensor]
) -> list[float]:
    """Of each block of a model, whose loss is that of its output."""

    def losses() -> Iterator[Tensor]:
        for number in range(GRADIENT_BATCHES):
            part = slice(100 * number, 100 * number + 100)
            yield loss(model(data.train_images[part]), data.train_labels[part])

    return gradient_errors(list(model[:-1]), losses, rule)


def errors_boosted(boosted: meprop.Boosted, data: Digits, rule: meprop.Rule) -> list[float]:
    """Of each block alone, whose loss is that of its own head on the features of the blocks before."""
    found: list[float] = []
    features = data.train_images[: 100 * GRADIENT_BATCHES]
    for residual, head in zip(boosted.model[:-1], boosted.heads, strict=True):

        def losses(features=features, residual=residual, head=head) -> Iterator[Tensor]:
            for part, labels in zip(features.split(100), data.train_labels.split(100), strict=False):
                yield log_exponential_loss(head(residual(part)), labels)

        found += gradient_errors([residual], losses, rule)
        with torch.no_grad():
            features = residual(features)
    return found


# ---------------------------------------------------------------- the runs


def file_of(name: str, seed: int) -> Path:
    """The file of a finished run."""
    return RESULTS / f"{name.replace(' ', '-').replace('%', '')}-seed{seed}.json"


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes a run's record."""
    about = {"machine": machine.describe(), "versions": tracking.versions(), "commit": tracking.commit()}
    content = json.dumps({**about, **results}, indent=1).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    machine.write_atomically(path, lambda file: file.write(content))
    print(path, flush=True)


def run_boosted(name: str, seed: int, data: Digits) -> None:
    """Boosts blocks, unless the record is there."""
    path = file_of(f"boosted {name}", seed)
    if path.exists():
        return
    torch.manual_seed(seed)
    blocks = nn.ModuleList(make_block() for _ in range(max(DEPTHS)))
    head = nn.Linear(784, 10)
    convert(blocks, RULES[name])
    boosted = meprop.boost(blocks, head, (data.train_images, data.train_labels), optimizer=adam, **SETTINGS)
    print(boosted, flush=True)
    test, features = list[float](), data.test_images
    for residual, own_head in zip(boosted.model[:-1], boosted.heads, strict=True):
        features = torch.cat([residual(each).detach() for each in features.split(1000)])
        test.append(accuracy(own_head, features, data.test_labels))
    results: dict[str, Any] = {
        "settings": {**SETTINGS, "learning_rate": LEARNING_RATE},
        "blocks": [asdict(each) for each in boosted.blocks],
        "stopped": boosted.stopped,
        "test": test,
    }
    write(path, results)


def run_gradients(seed: int, data: Digits) -> None:
    """Compares sparse and dense gradients of each of 25 blocks, unless the record is there."""
    path = file_of("gradients", seed)
    if path.exists():
        return
    torch.manual_seed(seed)
    blocks = [make_block() for _ in range(max(DEPTHS))]
    part = (data.train_images[:GRADIENT_IMAGES], data.train_labels[:GRADIENT_IMAGES])
    optimizer = partial(torch.optim.Adam, lr=GRADIENT_LEARNING_RATE, fused=True)
    boosted = meprop.boost(blocks, nn.Linear(784, 10), part, optimizer=optimizer, **GRADIENT_SETTINGS)
    print(boosted, flush=True)
    errors = {
        name: {
            "boosted": errors_boosted(boosted, data, rule),
            "end to end": errors_end_to_end(boosted.model, data, rule, log_exponential_loss),
            "end to end, cross entropy": errors_end_to_end(boosted.model, data, rule, nn.functional.cross_entropy),
        }
        for name, rule in RULES.items()
        if rule is not None
    }
    settings = {**GRADIENT_SETTINGS, "learning_rate": GRADIENT_LEARNING_RATE, "images": GRADIENT_IMAGES}
    write(path, {"settings": settings, "blocks": [asdict(each) for each in boosted.blocks], "errors": errors})


def run_end_to_end(depth: int, seed: int, data: Digits) -> None:
    """Trains as many blocks with as many updates as boosting took for them, unless the record is there.

    Its state is saved whenever the learning rate begins again. A run that was stopped goes on from there.
    """
    path = file_of(f"end to end {depth}", seed)
    if path.exists():
        return
    boosted = finished("boosted dense", seed)
    if boosted is None:
        raise SystemExit(f"the boosted run of seed {seed} gives the number of updates: first --boost {seed}")
    if len(kept(boosted)) < depth:
        print(f"no run of {depth} blocks: the boosted run of seed {seed} has {len(kept(boosted))}", flush=True)
        return
    torch.manual_seed(seed)
    model = nn.Sequential(*(Residual(make_block()) for _ in range(depth)), nn.Linear(784, 10))
    optimizer, curve, done = adam(model.parameters()), list[dict[str, float]](), 0
    updates = sum(each["steps"] for each in kept(boosted)[:depth])
    epochs = -(-updates * SETTINGS["batch_size"] // len(data.train_labels))
    order = torch.cat([torch.randperm(len(data.train_labels)) for _ in range(epochs)])
    saved = path.with_suffix(".pt")
    if saved.exists():
        state = torch.load(saved)
        if state["of"] != [updates, SETTINGS]:
            raise SystemExit(f"{saved} is of other settings, {state['of']}; remove it to begin anew")
        done, curve = state["done"], state["curve"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for update, chosen in enumerate(order.split(SETTINGS["batch_size"])[done:updates], done + 1):
        loss = nn.functional.cross_entropy(model.train()(data.train_images[chosen]), data.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update % 200 == 0:
            test = accuracy(model, data.test_images, data.test_labels)
            curve.append({"update": update, "test": test})
            print(f"{depth} blocks end to end, {update} of {updates} updates: test {test:.2f}", flush=True)
        if update % SETTINGS["check_every"] == 0:  # where a new schedule begins as this one goes on
            parts = {"of": [updates, SETTINGS], "done": update, "curve": curve}
            parts |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            machine.write_atomically(saved, partial(torch.save, parts))
    results: dict[str, Any] = {
        "settings": {"batch_size": SETTINGS["batch_size"], "learning_rate": LEARNING_RATE, "updates": updates},
        "test": curve[-1]["test"],
        "train": accuracy(model, data.train_images, data.train_labels),
        "curve": curve,
    }
    write(path, results)
    saved.unlink(missing_ok=True)


# ---------------------------------------------------------------- the page


def finished(name: str, seed: int) -> dict[str, Any] | None:
    """A run's record, or None if it has not been made."""
    path = file_of(name, seed)
    return json.loads(path.read_text()) if path.exists() else None


def kept(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The blocks of a boosted run that are in its model."""
    return [block for block in run["blocks"] if block["kept"]]


def all_of(name: str) -> list[dict[str, Any]]:
    """The records of a run with every seed, in the order of the seeds."""
    stem = file_of(name, 0).stem.removesuffix("0")
    seeds = sorted(int(path.stem.removeprefix(stem)) for path in RESULTS.glob(f"{stem}*.json"))
    return [run for seed in seeds if (run := finished(name, seed))]


def table_of_runs() -> str:
    """Every finished run, boosted and end to end. Accuracies are means over seeds, with the standard deviation."""
    rows = [("run", "blocks", "seeds", "updates", "least gamma", "training accuracy, %", "test accuracy, %")]
    for name in RULES:
        runs = all_of(f"boosted {name}")
        for depth in (*DEPTHS[:-1], None):  # None: all that are kept
            deep = [(run, depth or len(kept(run))) for run in runs if len(kept(run)) > (depth or 0)]
            if not deep:
                continue
            first = [kept(run)[:count] for run, count in deep]
            updates = mean(sum(block["steps"] for block in blocks) for blocks in first)
            gamma = min(block["gamma"] for blocks in first for block in blocks)
            cells = (f"{depth}" if depth else "all: " + ", ".join(str(count) for _, count in deep), str(len(deep)))
            train = [100 - 100 * blocks[-1]["error"] for blocks in first]
            test = [run["test"][count - 1] for run, count in deep]
            rows.append((f"boosted, {name}", *cells, f"{updates:.0f}", f"{gamma:.2f}", spread(train), spread(test)))
    for depth in DEPTHS:
        if runs := all_of(f"end to end {depth}"):
            cells = (str(depth), str(len(runs)), str(runs[0]["settings"]["updates"]), "")
            rows.append(("end to end, dense", *cells, *(spread([run[of] for run in runs]) for of in ("train", "test"))))
    return markdown_table(rows)


def spread(values: list[float]) -> str:
    """The mean, and the standard deviation of several."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def table_of_errors(runs: list[dict[str, Any]]) -> str:
    """The mean gradient error of the blocks in each way, and its standard deviation over seeds."""
    ways = list(next(iter(runs[0]["errors"].values())))
    rows = [("rule", *ways)]
    for name in runs[0]["errors"]:
        rows.append((name, *(spread([mean(run["errors"][name][way]) for run in runs]) for way in ways)))
    return markdown_table(rows)


def axes_of(count: int) -> tuple[Any, Any]:
    """A figure with axes side by side."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5 * count, 4), layout="constrained")
    found = figure.subplots(1, count)
    for axes in found:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, found


def save(figure: Any, path: Path) -> None:
    """Writes a figure as PNG."""
    machine.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def draw_edges(path: Path, seed: int) -> None:
    """Edges, gammas and accuracies over blocks."""
    figure, (edges, gammas, accuracies) = axes_of(3)
    for name, color in zip(RULES, COLORS, strict=True):
        if run := finished(f"boosted {name}", seed):
            blocks = kept(run)
            places = range(1, len(blocks) + 1)
            look = {"color": color, "marker": ".", "label": name}
            edges.plot(places, [block["edge"] for block in blocks], **look)
            gammas.plot(places, [block["gamma"] for block in blocks], **look)
            accuracies.plot(places, run["test"], **look)
            train = [100 - 100 * block["error"] for block in blocks]
            accuracies.plot(places, train, color=color, linestyle=":", linewidth=1)
    for depth in DEPTHS:
        if run := finished(f"end to end {depth}", seed):
            label = "end to end" if depth == DEPTHS[0] else None
            accuracies.plot([depth], [run["test"]], color="black", marker="D", linestyle="", label=label)
    gammas.axhline(0, color="black", linewidth=0.8)
    for axes, title in (
        (edges, "edge"),
        (gammas, "gamma"),
        (accuracies, "accuracy from 95%: test, and training dotted"),
    ):
        axes.set_title(title, fontsize=10)
    accuracies.set_ylim(95, 100)
    figure.legend(*accuracies.get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=5)
    save(figure, path)


def draw_errors(path: Path, errors: dict[str, dict[str, list[float]]]) -> None:
    """Gradient errors over depth."""
    figure, sides = axes_of(len(errors))
    for axes, (name, of) in zip(sides, errors.items(), strict=True):
        for (way, values), color in zip(of.items(), COLORS, strict=True):
            axes.plot(range(1, len(values) + 1), values, color=color, marker=".", label=way)
        axes.set_title(name, fontsize=10)
        axes.set_ylim(bottom=0)
    sides[0].set_ylabel("gradient error, share of the dense gradient")
    figure.legend(*sides[0].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=3)
    save(figure, path)


def write_page(page: Path, seed: int) -> None:
    """Draws the pictures beside a page, and writes tables and pictures of the finished runs into it."""
    draw_edges(page.with_name("boost.png"), seed)
    alt = "Edges, gammas and accuracies of boosted residual blocks over blocks"
    sections = {"boost": f"{table_of_runs()}\n\n![{alt}](boost.png)"}
    if run := finished("gradients", seed):
        draw_errors(page.with_name("boost-errors.png"), run["errors"])
        alt = "Gradient error of sparse back-propagation over depth, boosted and end to end"
        sections["boost-errors"] = f"{table_of_errors(all_of('gradients'))}\n\n![{alt}](boost-errors.png)"
    write_sections(page, sections)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boost", type=int, nargs="*", default=[], metavar="SEED")
    parser.add_argument("--end-to-end", type=int, nargs="*", default=[], metavar="SEED")
    parser.add_argument("--gradients", type=int, nargs="*", default=[], metavar="SEED")
    parser.add_argument("--depths", type=int, nargs="*", default=DEPTHS, help="of the runs end to end")
    parser.add_argument("--page", type=Path, help="write the tables and pictures into this page")
    parser.add_argument("--page-seed", type=int, default=0, help="the seed of the pictures")
    options = parser.parse_args()
    if not (options.boost or options.gradients or options.end_to_end or options.page):
        parser.error("nothing to do: give --boost, --gradients, --end-to-end or --page")
    torch.set_flush_denormal(True)
    data = digits()
    for seed in options.boost:
        for name in RULES:
            run_boosted(name, seed, data)
    for seed in options.gradients:
        run_gradients(seed, data)
    for seed in options.end_to_end:
        for depth in options.depths:
            run_end_to_end(depth, seed, data)
    if options.page is not None:
        write_page(options.page, options.page_seed)


if __name__ == "__main__":
    main()
