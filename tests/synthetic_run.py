"""Folders like those that runs leave, without a run."""

import json

from repro.evaluation.evaluator import Evaluation
from repro.record.writer import RunWriter


def write_run(folder, rows, *, num_steps=40, dropped=(), num_evaluations=1, **facts):
    """Write a run of some steps and evaluations of rows (image path, generated caption, reference)."""
    steps = [{"step": step, "loss": 3 / step, "learning_rate": 1e-3 / step} for step in range(1, num_steps + 1)]
    with RunWriter(folder) as writer:
        for row in steps[9::10]:
            row["seconds"] = 0.5 * row["step"]
            writer.train_scalars(row["step"], row, row["seconds"])
        writer.append(steps)
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
        flags = {"seed": 42, "per_device_train_batch_size": 4, "learning_rate": 3e-5}
        known = {"flags": flags, "num_replicas": 2, "num_steps": num_steps, "train_seconds": 20.0}
        writer.describe({**known, "finished": "2026-01-01T00:00:00+0000", **facts}, dropped)
    return folder


def read_data(page):
    """What the page's script reads."""
    return json.loads(page.split('id="data">')[1].split("</script>")[0])
