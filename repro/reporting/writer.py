"""The files of a run: the example's own, `metrics.jsonl`, `run.json`, `dropped.jsonl`, TensorBoard."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from repro.errors import InputError
from repro.evaluation.evaluator import Evaluation

RUN_FILES = (
    *("log", "metrics.jsonl", "run.json", "dropped.jsonl"),
    *("eval_results.json", "eval_generation.json", "test_results.json", "test_generation.json"),
)
RUN_PATTERNS = ("ckpt_epoch_*_step_*", "events.out.tfevents.*")
DECIMALS = 6

log = logging.getLogger("repro")


def check_output_dir(folder: Path, *, overwrite: bool) -> None:
    """Refuse to mix a run with what lies in its folder; changes nothing.

    Raises:
        InputError: the folder is a file, or holds something and may not be overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder}: is a file; name a folder.")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"--output_dir {folder}: is not empty; name another folder, or add"
            " --overwrite_output_dir to replace the run in it."
        )


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole or not at all; any text round-trips, lone surrogates too (they stay escaped)."""
    try:
        data = json.dumps(value, indent=4, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        data = json.dumps(value, indent=4).encode("utf-8")
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    """Name and round metrics as the example's result files do."""
    return {f"{prefix}_{name}": round(value, DECIMALS) for name, value in metrics.items()}


class RunWriter:
    """Writes one run's folder; what an earlier run left there under the same names is removed first."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        for path in _files_of_a_run(folder):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.folder = folder
        self._handler = logging.FileHandler(folder / "log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(message)s"))
        log.addHandler(self._handler)
        self._metrics = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._tensorboard = SummaryWriter(logdir=str(folder), write_to_disk=True)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        self._tensorboard.close()
        log.removeHandler(self._handler)
        self._handler.close()

    def describe(self, facts: dict[str, Any], dropped: Iterable[dict[str, Any]]) -> None:
        """Write `run.json`, and `dropped.jsonl` with one row that was left out on each line."""
        write_json(self.folder / "run.json", facts)
        lines = [json.dumps(row) + "\n" for row in dropped]
        (self.folder / "dropped.jsonl").write_text("".join(lines), encoding="utf-8")

    def train_steps(self, rows: Iterable[dict[str, float]]) -> None:
        """Append {"step", "loss", "learning_rate"} of each step to `metrics.jsonl`."""
        self._metrics.writelines(json.dumps(row) + "\n" for row in rows)
        self._metrics.flush()

    def train_scalars(self, step: int, row: dict[str, float], seconds: float) -> None:
        """Write the example's training scalars, with the seconds since the start, to TensorBoard."""
        self._tensorboard.add_scalar("train_time", seconds, step)
        self._tensorboard.add_scalar("train_loss", row["loss"], step)
        self._tensorboard.add_scalar("train_learning_rate", row["learning_rate"], step)
        self._tensorboard.flush()

    def evaluation(self, prefix: str, evaluation: Evaluation, *, step: int, folder: Path, seconds: float) -> None:
        """Write `{prefix}_results.json` and `{prefix}_generation.json` to `folder`, and the metrics to the logs."""
        folder.mkdir(parents=True, exist_ok=True)
        results = prefixed(prefix, evaluation.metrics)
        write_json(folder / f"{prefix}_results.json", results)
        if evaluation.generations:
            write_json(folder / f"{prefix}_generation.json", evaluation.generations)
        entry = {**evaluation.metrics, **evaluation.details, "seconds": round(seconds, 3)}
        self._metrics.write(json.dumps({"step": step, prefix: entry}) + "\n")
        self._metrics.flush()
        for name, value in results.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()


def _files_of_a_run(folder: Path) -> list[Path]:
    named = [folder / name for name in RUN_FILES if (folder / name).exists()]
    return named + [path for pattern in RUN_PATTERNS for path in folder.glob(pattern)]
