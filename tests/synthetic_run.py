"""Folders like those that runs leave, without a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from repro.evaluation.evaluator import Evaluation
from repro.record.writer import RunWriter


def write_run(
    folder: Path,
    rows: Sequence[tuple[str, str, str]],
    *,
    num_steps: int = 40,
    dropped: Sequence[dict] = (),
    num_evaluations: int = 1,
    **facts: object,
) -> Path:
    """Write a run of some steps and evaluations of rows (image path, generated caption, reference)."""
    with RunWriter(folder) as writer:
        writer.append(
            [
                {"step": step, "loss": 3 / step, "learning_rate": 1e-3 / step}
                | ({"seconds": 0.5 * step} if step % 10 == 0 else {})
                for step in range(1, num_steps + 1)
            ]
        )
        for step in range(10, num_steps + 1, 10):
            writer.train_scalars(step, {"loss": 3 / step, "learning_rate": 1e-3 / step}, seconds=0.5 * step)
        for place in range(1, num_evaluations + 1):
            earlier = "" if place == num_evaluations else f" at {place}"
            evaluation = Evaluation(
                metrics={"loss": 2.5, "attribute_accuracy": 0.9, "rouge2": 14.0},
                details={"rows": len(rows), "rouge_intervals": {"rouge2": [13.0, 15.0]}},
                generations=[{"label": label, "pred": caption + earlier} for _, caption, label in rows],
                image_paths=[],
                image_ids=[],
            )
            step = num_steps * place // num_evaluations
            writer.evaluation("eval", evaluation, step=step, folder=folder / f"ckpt_epoch_1_step_{step}", seconds=2.0)
        writer.images("eval", [path for path, _, _ in rows], [""] * len(rows))
        known = {
            "flags": {"seed": 42, "per_device_train_batch_size": 4, "learning_rate": 3e-5},
            "num_replicas": 2,
            "num_steps": num_steps,
            "train_seconds": 20.0,
            "finished": "2026-01-01T00:00:00+0000",
        }
        writer.describe({**known, **facts}, dropped)
    return folder


def read_data(page: str) -> dict:
    """What the page's script reads."""
    return json.loads(page.split('id="data">')[1].split("</script>")[0])
