"""What sees a fault in training within the recipe's first fifty steps, under a listed seed and another.

    python benchmarks/planted_faults.py --folder DIR --output benchmarks/results/cpu-2-cores/planted_faults.json

Nothing is trained to its end: the targets that are known early (counts, fingerprints, the first steps from fixed
weights, the losses of listed seeds) are judged as `repro reproduce` judges them while it trains.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import optax

from repro.data.batches import CaptionedImages, RowOrder
from repro.models import captioner
from repro.recipes import read_recipe
from repro.recipes.probe import first_steps
from repro.recipes.reproduce import started
from repro.recipes.targets import judge_all, read_targets
from repro.recipes.verify import EARLY, measures
from repro.run.build import build_training
from repro.run.prepare import PreparedRun, prepare
from repro.run.settings import Settings
from repro.training import steps

LISTED, UNLISTED = 42, 8
FIRST = 50
IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)  # means, standard deviations

create_optimizer, row_losses, in_turns = steps.create_optimizer, steps.row_losses, steps._in_turns
normalize, logits = captioner.normalize, captioner.NativeCaptioner.logits
gather, order = CaptionedImages.batch, RowOrder.epoch_rows
Fault = Callable[[], Any]


def optimizer(*, rate: float = 1.0, **other: Any) -> Fault:
    """Another optimizer under the schedule that is logged."""

    def create(schedule: optax.Schedule, **settings: Any) -> optax.GradientTransformation:
        return create_optimizer(lambda step: rate * schedule(step), **{**settings, **other})

    return lambda: mock.patch.object(steps, "create_optimizer", create)


def row_orders(epoch_of: Callable[[int], int] = int, *, shuffled: bool = True) -> Fault:
    def epoch_rows(self: RowOrder, epoch: int, num_rows: int) -> np.ndarray:
        return order(dataclasses.replace(self, shuffle=shuffled), epoch_of(epoch), num_rows)

    return lambda: mock.patch.object(RowOrder, "epoch_rows", epoch_rows)


def pixels(change: Callable[..., Any]) -> Fault:
    return lambda: mock.patch.object(captioner, "normalize", change)


def losses(change: Callable[..., Any]) -> Fault:
    return lambda: mock.patch.object(steps, "row_losses", change)


def wrong_pictures(self: CaptionedImages, which: np.ndarray) -> dict[str, np.ndarray]:
    """Give every fiftieth row another row's picture."""
    found = gather(self, which)
    return found | {"pixels": gather(self, np.where(which % 50 == 0, (which + 1) % len(self), which))["pixels"]}


def summed(function: Callable[..., Any], *inputs: Any) -> Any:
    loss, gradients = in_turns(function, *inputs)
    return loss, jax.tree.map(lambda leaf: 8 * leaf, gradients)


def without_dropout(*inputs: Any, **_: Any) -> jax.Array:
    return logits(*inputs)


def of_imagenet(bytes_: jax.Array, table: np.ndarray, dtype: Any) -> jax.Array:
    return normalize(bytes_, (np.arange(256, dtype=np.float32)[:, None] / 255 - IMAGENET[0]) / IMAGENET[1], dtype)


FAULTS: dict[str, Fault] = {
    "none": contextlib.nullcontext,
    "half the rate": optimizer(rate=0.5),
    "a rate 10 % up": optimizer(rate=1.1),
    "weight decay 0.01": optimizer(weight_decay=0.01),
    "weight decay 0.1": optimizer(weight_decay=0.1),
    "beta2 0.99": optimizer(beta2=0.99),
    "no clipping": optimizer(max_grad_norm=None),
    "gradients summed for averaged": lambda: mock.patch.object(steps, "_in_turns", summed),
    "dropout off": lambda: mock.patch.object(captioner.NativeCaptioner, "logits", without_dropout),
    "second epoch in the first one's order": row_orders(lambda epoch: 0),
    "no shuffling": row_orders(shuffled=False),
    "BGR": pixels(lambda bytes_, *rest: normalize(bytes_[..., ::-1], *rest)),
    "mirrored": pixels(lambda bytes_, *rest: normalize(bytes_[:, :, ::-1], *rest)),
    "ImageNet's means": pixels(of_imagenet),
    "2 % wrong pictures": lambda: mock.patch.object(CaptionedImages, "batch", wrong_pictures),
    "labels shifted by one": losses(
        lambda logits, labels, mask, **more: row_losses(logits, jax.numpy.roll(labels, 1, axis=1), mask, **more)
    ),
    "padding in the loss": losses(
        lambda logits, labels, mask, **more: row_losses(logits, labels, jax.numpy.ones_like(mask), **more)
    ),
    "smoothed loss": losses(lambda logits, labels, mask, **_: row_losses(logits, labels, mask, label_smoothing=0.1)),
}


@contextlib.contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """Have what is built meanwhile be faulty, and nothing else: a step that was built of equal parts is kept."""
    steps.make_train_step.cache_clear()
    try:
        with fault():
            yield
    finally:
        steps.make_train_step.cache_clear()


@contextlib.contextmanager
def prepared(folder: Path, seed: int) -> Iterator[PreparedRun]:
    recipe = read_recipe("pocket")
    with started(recipe, folder / f"seed-{seed}", {"seed": seed}, folder) as arguments:
        settings = Settings.of(*arguments, num_devices=1)
        with jax.threefry_partitionable(settings.rules.threefry_partitionable):
            yield prepare(settings, jax.devices()[:1], progress=False)


def seen_by(run: PreparedRun) -> list[str]:
    """Take a run's first steps, and name the targets that fail."""
    training = build_training(run)
    facts = {**run.facts, "probe": first_steps(training)}
    state, logged = training.create(), []
    for step, batch, _ in training.batches(0):
        state, metrics = training.step(state, batch)
        logged.append({"step": step, **{name: float(value) for name, value in metrics.items()}})
        if step == FIRST:
            break
    targets = [target for target in read_targets(read_recipe("pocket")["targets"]) if target.metric.startswith(EARLY)]
    return [
        outcome.target.name
        for outcome in judge_all(targets, [measures(facts, logged)])
        if outcome.verdict == "FAIL" and outcome.target.metric != "learning_rate"  # of later steps
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the scenes, and found again there")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=FAULTS)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for seed in (LISTED, UNLISTED):
        with prepared(args.folder, seed) as run:
            for fault in args.faults:
                began = time.monotonic()
                with planted(FAULTS[fault]):
                    targets = seen_by(run)
                found.setdefault(fault, {})[str(seed)] = {
                    "seen_by": targets,
                    "seconds": round(time.monotonic() - began),
                }
                print(f"{fault}, seed {seed}: {', '.join(targets) or 'nothing'}", flush=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
