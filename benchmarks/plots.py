"""The pages' pictures, drawn from the committed results; `pip install matplotlib`.

    python benchmarks/plots.py                          # speed.svg, moves.svg, band.svg
    python benchmarks/plots.py --run repro-pocket       # pocket.png as well, of a finished reproduction

`tests/test_benchmarks.py` holds the numbers in speed.svg against the results.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from repro.recipes.equivalence import FALSE_FAILS, prediction_reach

HERE = Path(__file__).resolve().parent
CPU = HERE / "results" / "cpu-2-cores"
INK, OURS, OTHERS, QUIET = "#1f2933", "#0b6e99", "#b0b8c1", "#8794a1"
PICTURES = 8


def start() -> Any:
    """Give pyplot, set up to draw the same file from the same numbers, legible on white and on black pages."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {
        "svg.hashsalt": "repro",
        "svg.fonttype": "none",  # text stays text, which can be searched and is a fifth of the size
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "white",
    }
    return pyplot


def read(name: str, folder: Path = CPU) -> Any:
    return json.loads((folder / name).read_text())


def speeds() -> list[tuple[str, list[tuple[str, float]]]]:
    """How long peers take in relation to this project: measurement, then (peer, times) each."""
    names = {"flax": "Flax class", "torch": "PyTorch", "torch_compiled": "PyTorch, compiled"}
    measured = [
        ("captions, two CPU cores", [read("generation.json")]),
        ("evaluation, two CPU cores", [read("evaluation.json")]),
        ("training step, two CPU cores", [read("train_step.json"), read("train_step_torch.json")]),
    ]
    found = [
        (
            title,
            [
                (names[peer], values["times_native"])
                for result in results
                for peer, values in result["peers"].items()
                if peer in names
            ],
        )
        for title, results in measured
    ]
    jobs = read("accelerator.json", HERE / "results" / "h200")["documented run"]
    for title, kind in (("captions, one H200", "generation"), ("training step, one H200", "training step")):
        ours = next(job for name, job in jobs.items() if name.startswith(f"{kind}, native, bfloat16"))
        peers = [
            (names[name.split(", ")[1]], job["seconds"] / ours["seconds"])
            for name, job in jobs.items()
            if name.startswith(f"{kind}, torch") and "bfloat16" in name
        ]
        found.append((title, peers))
    return found


def draw_speed(output: Path) -> None:
    pyplot = start()
    bars = [(f"{title}: {peer}", times) for title, peers in speeds() for peer, times in peers][::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.34 * len(bars) + 0.9), layout="constrained")
    axes.barh([name for name, _ in bars], [times - 1 for _, times in bars], left=1, color=OTHERS, height=0.62)
    for place, (_, times) in enumerate(bars):
        axes.text(times * 1.03, place, f"{times:.2f}", va="center")
    axes.axvline(1, color=OURS, linewidth=2)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.set_xlim(1, 20)
    axes.set_xlabel("time that others take, in relation to this project's (1)")
    save(figure, output / "speed.svg")


def draw_moves(output: Path) -> None:
    pyplot = start()
    base, *rows = read("ablation.json")["variants"]
    rows = rows[::-1]
    spread = base["eval_rouge2"]["standard_deviation"]
    figure, axes = pyplot.subplots(figsize=(8, 0.3 * len(rows) + 0.9), layout="constrained")
    axes.axvspan(-spread, spread, color=OTHERS, alpha=0.35, linewidth=0)
    axes.axvline(0, color=QUIET, linewidth=1)
    for place, row in enumerate(rows):
        found = row["eval_rouge2"]
        axes.errorbar(
            found["difference"], place, xerr=found["half_width"], color=OURS, marker="o", markersize=4, capsize=2
        )
    axes.set_yticks(range(len(rows)), [row["variant"] + ("" if row["paired"] else ", trained anew") for row in rows])
    axes.set_xlabel("ROUGE-2: difference and 95 % interval; grey: a run's standard deviation", loc="right")
    save(figure, output / "moves.svg")


def draw_band(output: Path) -> None:
    pyplot = start()
    recipe, seeds = read("pocket.json", HERE.parent / "repro" / "recipes"), read("pocket_seeds.json")
    targets = {target["metric"]: target for target in recipe["targets"] if "standard_deviation" in target}
    figure, (axes, others) = pyplot.subplots(1, 2, figsize=(8, 2.2), layout="constrained", sharey=True)
    groups = {name: runs for name, runs in seeds["groups"].items() if runs}
    for axis, metric, label in ((axes, "eval_loss", "evaluation loss"), (others, "eval_rouge2", "ROUGE-2")):
        target = targets[metric]
        false_fails = FALSE_FAILS / len(targets)
        reach = prediction_reach(target["standard_deviation"], target["freedom"], target["runs"], false_fails)
        axis.axvspan(target["value"] - reach, target["value"] + reach, color=OTHERS, alpha=0.35, linewidth=0)
        axis.axvline(target["value"], color=QUIET, linewidth=1)
        for place, runs in enumerate(groups.values()):
            axis.plot([run[metric] for run in runs], [-place] * len(runs), "|", color=OURS, markersize=11)
        axis.set_xlabel(label)
    axes.set_yticks(range(0, -len(groups), -1), groups)
    save(figure, output / "band.svg")


def draw_pictures(run: Path, output: Path) -> None:
    """Draw validation images of a reproduction with a reference and what the model says."""
    from PIL import Image

    pyplot = start()
    checkpoint = max((run / "run").glob("ckpt_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    rows = json.loads((checkpoint / "eval_generation.json").read_text())
    images = json.loads((run / "run" / "eval_images.json").read_text())["image_path"]
    # The first rows of distinct images, in the order of the file: nobody has chosen them.
    first = list({path: place for place, path in reversed(list(enumerate(images)))}.values())[::-1][:PICTURES]
    figure, grid = pyplot.subplots(2, PICTURES // 2, figsize=(9, 6.2), layout="constrained")
    for axis, place in zip(grid.flat, first, strict=True):
        with Image.open(images[place]) as image:
            axis.imshow(image.convert("RGB").resize((256, 256), Image.Resampling.NEAREST))
        axis.set_axis_off()
        said = "\n".join(textwrap.wrap(rows[place]["pred"], 27))
        meant = "\n".join(textwrap.wrap(rows[place]["label"], 34))
        axis.set_title(said, fontsize=9, color=OURS, weight="bold", loc="left")
        axis.text(0, -0.04, meant, fontsize=8, color=QUIET, va="top", transform=axis.transAxes)
    figure.savefig(output / "pocket.png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})  # the same file from the same numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CPU, metavar="DIR")
    parser.add_argument("--run", type=Path, metavar="REPRODUCTION", help="whose validation images are shown")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for draw in (draw_speed, draw_moves, draw_band):
        draw(args.output)
    if args.run:
        draw_pictures(args.run, args.output)


if __name__ == "__main__":
    main()
