"""The character GPT of examples/char_gpt.py, dense and sparse, at equal steps and at equal time.

    python benchmarks/char_gpt.py --time          # a step of each variant, in turns, on a quiet machine: minutes
    python benchmarks/char_gpt.py --seeds 0 1     # the runs that are missing: hours
    python benchmarks/char_gpt.py --page docs/transformers.md

Equal time is that of the dense run: a variant whose step took half as long, in turns, gets twice the steps. Seconds of
the runs themselves are not compared, as those are made at different times. Each is a process, and leaves a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "char_gpt.py"
RESULTS = ROOT / "benchmarks" / "results" / "char-gpt"
SECTION = "char-gpt"
STEPS = 600
SETTINGS = ["--dropout", "0", "--evaluate-every", "100"]
UNIFIED = ["--scope", "batch", "--sparse-rows", "exact"]
VARIANTS = {
    "dense": [],
    "unified, 25%": ["--k", "0.25", *UNIFIED],
    "unified, 10%": ["--k", "0.1", *UNIFIED],
    "unified, 5%": ["--k", "0.05", *UNIFIED],
    "per token, 25%, in linear1 only": ["--k", "0.25", "--dense", "self_attn,linear2"],
    "per token, 25%": ["--k", "0.25"],
    "per token, 25% at random": ["--k", "0.25", "--rule", "random"],
}
LONGER = ["unified, 25%", "unified, 10%", "unified, 5%"]  # trained for dense's time, too


def stem(variant: str) -> str:
    """What the variant's files are called."""
    return variant.replace(", ", "-").replace(" ", "-").replace("%", "")


def time_steps(seconds: float) -> None:
    """Times a training step of each variant, in turns, and writes steps.json."""
    import torch

    from meprop import machine
    from meprop.bench.measure import DisturbanceMeter, interleaved
    from meprop.training import tracking

    example = runpy.run_path(str(EXAMPLE))
    sides: dict[str, Callable[[], object]] = {}
    for variant, options in VARIANTS.items():
        sys.argv = [str(EXAMPLE), *SETTINGS, *options]
        settings = example["arguments"]()
        text = example["Text"](settings.data, settings.context)
        model, optimizer = example["prepare"]("dense" if variant == "dense" else "sparse", text, settings)
        generator = torch.Generator().manual_seed(0)

        def step(model=model, optimizer=optimizer, text=text, generator=generator, size=settings.batch) -> None:
            example["loss_of"](model, text.batch(size, generator)).backward()
            optimizer.step()
            optimizer.zero_grad()

        sides[variant] = step
    torch.set_flush_denormal(True)
    meter = DisturbanceMeter()
    times = interleaved(sides, seconds)
    disturbance = meter.read()
    record = {
        "machine": machine.describe(),
        "versions": tracking.versions(),
        "commit": tracking.commit(),
        "disturbance": disturbance and asdict(disturbance),
        "times": {variant: asdict(each) for variant, each in times.items()},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = json.dumps(record, indent=1).encode() + b"\n"
    machine.write_atomically(RESULTS / "steps.json", lambda file: file.write(content))


def step_seconds(percentile: str = "p50") -> dict[str, float]:
    """Seconds of a step of each variant."""
    return {name: each[percentile] for name, each in json.loads((RESULTS / "steps.json").read_text())["times"].items()}


def equal_time(variant: str) -> int:
    """The steps that a variant makes while dense makes its own."""
    seconds = step_seconds()
    return round(STEPS * seconds["dense"] / seconds[variant])


def record_of(variant: str, steps: int, seed: int) -> Path:
    """The file of a finished run."""
    return RESULTS / f"{stem(variant)}-{steps}-seed{seed}.json"


def train(variant: str, steps: int, seed: int) -> None:
    """Makes a run, unless its record is there."""
    path = record_of(variant, steps, seed)
    if path.exists():
        return
    unfinished = path.with_suffix(".tmp")
    only = ["--only", "dense" if variant == "dense" else "sparse"]
    options = [*SETTINGS, *VARIANTS[variant], *only, "--steps", str(steps), "--seed", str(seed), "--out", unfinished]
    print(f"{variant}, {steps} steps, seed {seed}", flush=True)
    subprocess.run([sys.executable, EXAMPLE, *options], check=True)
    os.replace(unfinished, path)


def runs(variant: str, steps: int) -> list[dict[str, Any]]:
    """The finished runs of a variant."""
    paths = sorted(RESULTS.glob(f"{stem(variant)}-{steps}-seed*.json"))
    return [json.loads(path.read_text())["runs"][0] for path in paths]


def losses(variant: str, steps: int) -> list[float]:
    """Held-out losses of a variant's finished runs."""
    return [run["dev"]["loss"] for run in runs(variant, steps)]


def markdown() -> str:
    """The table of all finished runs."""
    from meprop.reporting import pages
    from meprop.reporting.terminal import spread

    seconds, low = step_seconds(), step_seconds("p20")
    rows = [
        ("linear layers keep", "step, ms", "speed", f"loss, {STEPS} steps", "seeds", "steps in dense's time", "loss")
    ]
    for variant in VARIANTS:
        same, more = losses(variant, STEPS), equal_time(variant)
        longer = losses(variant, more) if variant in LONGER else []
        rows.append(
            (
                variant,
                f"{1e3 * seconds[variant]:.0f}",
                f"{low['dense'] / low[variant]:.2f}x ({seconds['dense'] / seconds[variant]:.2f}x)",
                spread(same, 3) if same else "",
                str(len(same)),
                str(more) if longer else "",
                f"{spread(longer, 3)} ({len(longer)})" if longer else "",
            )
        )
    timed: dict[str, Any] = json.loads((RESULTS / "steps.json").read_text())
    about = (
        f"{timed['machine']['cpu']}, {timed['machine']['threads']} thread(s), torch {timed['versions']['torch']}, "
        f"{pages.short_commit(timed['commit'])}. Losses in nats per character of held-out text. "
        "Median steps, in turns; speed: of the 20th percentiles (of the medians)."
    )
    return f"{pages.markdown_table(rows)}\n\n{about}"


def draw(path: Path) -> None:
    """Draws the held-out loss of the first seed over steps, and over time in units of dense's."""
    from matplotlib.figure import Figure

    from meprop.machine import write_atomically

    seconds = step_seconds()
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colors = dict(
        zip(VARIANTS, ("#000000", "#0072B2", "#56B4E9", "#999999", "#009E73", "#D55E00", "#CC79A7"), strict=True)
    )
    for axes, chosen in (
        (left, dict.fromkeys(VARIANTS, STEPS)),
        (right, {each: equal_time(each) for each in LONGER}),
    ):
        for variant, steps in ({"dense": STEPS} | chosen).items():
            for run in runs(variant, steps)[:1]:
                scale = 1.0 if axes is left else seconds[variant] / (STEPS * seconds["dense"])
                places = [point["step"] * scale for point in run["curve"]]
                axes.plot(
                    places, [point["dev"] for point in run["curve"]], color=colors[variant], label=variant, marker="."
                )
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(1.9, 3.4)
    left.set_title("in the same steps", fontsize=10)
    right.set_title("in the same time", fontsize=10)
    left.set_xlabel("steps")
    left.set_ylabel("held-out loss, nats per character\n(axis does not start at 0)")
    right.set_xlabel("share of the time that dense takes")
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true", help="time steps, which the runs at equal time need")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to time")
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--longer-seeds", type=int, nargs="*", default=[], help="of the runs at equal time")
    parser.add_argument("--page", type=Path, help="write the table into this page")
    options = parser.parse_args()
    if not (options.time or options.seeds or options.longer_seeds or options.page):
        parser.error("nothing to do: give --time, --seeds, --longer-seeds or --page")
    if options.time:
        time_steps(options.seconds)
    for seed in options.seeds:
        for variant in VARIANTS:
            train(variant, STEPS, seed)
    for seed in options.longer_seeds:
        for variant in LONGER:
            train(variant, equal_time(variant), seed)
    if options.page is not None:
        from meprop.reporting import pages

        picture = options.page.with_name(f"{options.page.stem}-{SECTION}.png")
        draw(picture)
        alt = "Held-out loss of a character GPT, dense and sparse, over steps and over time"
        pages.write_sections(options.page, {SECTION: f"![{alt}]({picture.name})\n\n{markdown()}"})


if __name__ == "__main__":
    main()
