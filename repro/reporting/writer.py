"""The files of a run: the example's own, `metrics.jsonl`, `run.json`, `dropped.jsonl`, `state/`, TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from repro.data.census import picture_sheet
from repro.data.limits import RECORDED_BYTES, Refused, read_file
from repro.data.whole_file import check_writable, remove_empty, sha256_of
from repro.errors import InputError
from repro.evaluation.evaluator import Evaluation, caption_of_each_image, coco_results
from repro.masking import MaskingFormatter
from repro.reporting.metrics import METRICS

LOCK = "run.lock"
STATE = "state"
REPORT = "report.html"
NON_FINITE = "non_finite.json"
CLOCK = "clock.json"
RUN_FILES = (
    *("log", "metrics.jsonl", "run.json", "dropped.jsonl", NON_FINITE, CLOCK, STATE, REPORT),
    *("eval_results.json", "eval_generation.json", "eval_captions.json", "eval_images.json"),
    *("test_results.json", "test_generation.json", "test_captions.json", "test_images.json"),
)
MODELS = "ckpt_epoch_*_step_*"
PARTIAL = ".partial"
CHECKED = (
    "metrics.jsonl",
    "*_results.json",
    "*_generation.json",
    "*_captions.json",
    f"{MODELS}/*_results.json",
    f"{MODELS}/*_generation.json",
    f"{MODELS}/*_captions.json",
)
"""What a run's figures are read from."""
WEIGHTS = ("flax_model*.msgpack", "model*.safetensors")
"""Of the last model, which the last figures are about."""
RUN_PATTERNS = (MODELS, "events.out.tfevents.*", f"*{PARTIAL}")
DECIMALS = 6
PICTURES = 8
"""Drawn for TensorBoard at each evaluation."""
DETAILS = (
    *("rows", "rows_scored", "rouge_intervals", "sentence_splitter", "caption_tokenizer"),
    *("seconds", "saving_seconds"),
)
"""What `metrics.jsonl` says of an evaluation besides its metrics."""

log = logging.getLogger("repro")


@contextmanager
def locked(folder: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Keep other runs out of a folder, which is made if need be; the system lets go of it when this process ends.

    Args:
        flag: that names the folder, for the message.

    Raises:
        InputError: the folder cannot be written, or another run is at work in it.
    """
    check_writable(folder, flag)
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"{flag} {folder}: another run is at work in it; wait for it, or name another folder."
        ) from error
    try:
        yield
    finally:
        if missing and not entries(folder):
            (folder / LOCK).unlink()
            remove_empty(missing)
        lock.release()


def check_output_dir(folder: Path, *, overwrite: bool) -> None:
    """Refuse to mix a run with what lies in its folder; changes nothing.

    Raises:
        InputError: the folder cannot be written, or holds something and may not be overwritten.
    """
    check_writable(folder, "--output_dir")
    if not overwrite and folder.is_dir() and entries(folder):
        raise InputError(
            f"--output_dir {folder}: is not empty; name another folder, or add --resume auto to go on with the run in"
            " it, or --overwrite_output_dir to replace that."
        )


def holds_only_run_files(folder: Path) -> bool:
    """Tell whether all that lies in a folder has the name of something that a run writes."""
    return {path.name for path in entries(folder)} <= {path.name for path in _files_of_a_run(folder)}


def models_in(folder: Path) -> list[Path]:
    """List the model folders of a run, in the order of their steps."""
    whole = [path for path in folder.glob(MODELS) if not path.name.endswith(PARTIAL)]
    return sorted(whole, key=lambda path: int(path.name.rpartition("_")[2]))


def checked_files(folder: Path) -> list[Path]:
    """List the files of a run that are to have checksums."""
    last = models_in(folder)[-1:]
    found = [sorted(folder.glob(pattern)) for pattern in CHECKED]
    found += [sorted(place.glob(pattern)) for place in last for pattern in WEIGHTS]
    return [path for paths in found for path in paths]


def entries(folder: Path) -> list[Path]:
    """List what lies in a folder besides its lock."""
    return [path for path in folder.iterdir() if path.name != LOCK] if folder.is_dir() else []


def read_facts(folder: Path) -> dict[str, Any]:
    """Read `run.json`; empty where there is none that can be read."""
    try:
        return json.loads(read_file(folder / "run.json", RECORDED_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}


def read_clock(folder: Path) -> float:
    """Read for how many seconds a run has been at work, until it ended or was killed; 0 where that is not known."""
    try:
        seconds = float(json.loads((folder / CLOCK).read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0.0
    return seconds if 0 <= seconds < math.inf else 0.0


@dataclass(frozen=True)
class Recorded:
    """What `metrics.jsonl` says.

    Attributes:
        rows: its objects, in order.
    """

    rows: list[dict[str, Any]]

    def evaluation(self, prefix: str, step: int) -> dict[str, Any] | None:
        """Find an evaluation's metrics and details."""
        found = [row[prefix] for row in self.rows if prefix in row and row["step"] == step]
        return found[-1] if found else None

    def evaluated(self, prefix: str) -> bool:
        """Tell whether there is any evaluation of this name."""
        return any(prefix in row for row in self.rows)

    def best_step(self, metric: str, *, prefix: str = "eval") -> int | None:
        """Find the step with the best value of a metric, the first of several."""
        sign = 1.0 if METRICS[metric].better == "more" else -1.0
        scored = [(sign * row[prefix][metric], -row["step"]) for row in self.rows if metric in row.get(prefix, ())]
        return -max(scored)[1] if scored else None


def read_recorded(folder: Path, step: int) -> Recorded:
    """Read `metrics.jsonl` up to a step; a line that was being written when the run was killed is left out."""
    rows = []
    path = folder / "metrics.jsonl"
    try:
        text = read_file(path, RECORDED_BYTES).decode()
    except FileNotFoundError:
        text = ""
    except Refused as error:
        raise InputError(f"{path}: {error}.") from error
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return Recorded([row for row in rows if row["step"] <= step])


def write_json(path: Path, value: Any, *, indent: int | None = 4) -> None:
    """Write JSON, whole or not at all; any text round-trips, lone surrogates too (they stay escaped)."""
    try:
        data = json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        data = json.dumps(value, indent=indent).encode("utf-8")
    _write_whole(path, data)


def _write_whole(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + PARTIAL)
    partial.write_bytes(data)
    partial.replace(path)


def prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    """Name and round metrics as the example's result files do."""
    return {f"{prefix}_{name}": round(value, DECIMALS) for name, value in metrics.items()}


class RunWriter:
    """Writes one run's folder."""

    def __init__(
        self,
        folder: Path,
        recorded: Recorded | None = None,
        *,
        branches_off: bool = False,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Prepare the folder.

        Args:
            recorded: steps and evaluations that the run begins with; None to remove what is left of another.
            branches_off: they are another run's, so what is left in the folder is removed all the same.
            clock: gives for how many seconds the run has been at work, in all of its parts.
        """
        from tensorboardX import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        # Of a run that goes on, only what is no longer true is removed: half a model, and why it had stopped.
        stays = recorded is not None and not branches_off
        ended = [*folder.glob(f"*{PARTIAL}"), *folder.glob(NON_FINITE)]
        for path in ended if stays else _files_of_a_run(folder):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.folder = folder
        self.seconds = clock
        self.recorded = recorded or Recorded([])
        self._handler = logging.FileHandler(folder / "log", encoding="utf-8")
        self._handler.setFormatter(MaskingFormatter("%(asctime)s - %(levelname)s - %(message)s"))
        log.addHandler(self._handler)
        path = folder / "metrics.jsonl"
        _write_whole(path, "".join(json.dumps(row) + "\n" for row in self.recorded.rows).encode())
        self._metrics = path.open("a", encoding="utf-8")
        steps = [row["step"] for row in self.recorded.rows]
        self._tensorboard = SummaryWriter(
            logdir=str(folder), write_to_disk=True, purge_step=max(steps) + 1 if steps else None
        )

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_tensorboard()
        self._metrics.close()
        log.removeHandler(self._handler)
        self._handler.close()

    def close_tensorboard(self) -> None:
        """Have all that TensorBoard is to show on disk; before that, its writer keeps the last of it in a queue."""
        self._tensorboard.close()

    def checksums(self) -> dict[str, str]:
        """Hash `metrics.jsonl`, every evaluation's results and captions, the last weights, SHA-256 by path."""
        self._metrics.flush()
        return {path.relative_to(self.folder).as_posix(): sha256_of(path) for path in checked_files(self.folder)}

    def describe(self, facts: dict[str, Any], dropped: Iterable[dict[str, Any]]) -> None:
        """Write `run.json`, and `dropped.jsonl` with one row that was left out on each line."""
        write_json(self.folder / "run.json", facts)
        lines = [json.dumps(row) + "\n" for row in dropped]
        (self.folder / "dropped.jsonl").write_text("".join(lines), encoding="utf-8")

    def non_finite(self, **report: Any) -> None:
        """Write which step had numbers that are not finite, and its rows; going on with the run removes it."""
        write_json(self.folder / NON_FINITE, report)

    def end(self, reason: str) -> None:
        """Write why the run ends to its log; the terminal is told by the command."""
        self._handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, "ended: %s", (reason,), None))

    def train_steps(self, rows: Iterable[dict[str, float]]) -> None:
        """Append {"step", "loss", "learning_rate"} of each step to `metrics.jsonl`."""
        self._append(list(rows))

    def sync(self) -> None:
        """Have the system write `metrics.jsonl` to the disk, which is to know of every step before a saved state."""
        os.fsync(self._metrics.fileno())

    def train_scalars(self, step: int, row: dict[str, float], seconds: float) -> None:
        """Write the example's training scalars, with the seconds spent on steps, to TensorBoard."""
        self._tensorboard.add_scalar("train_time", seconds, step)
        self._tensorboard.add_scalar("train_loss", row["loss"], step)
        self._tensorboard.add_scalar("train_learning_rate", row["learning_rate"], step)
        self._tensorboard.flush()

    def images(self, prefix: str, paths: list[str], ids: list[str]) -> None:
        """Write `{prefix}_images.json`: which image each row of a split is about, in the order of its generations."""
        path = self.folder / f"{prefix}_images.json"
        if not path.exists():
            write_json(path, {"image_path": paths, "image_id": ids}, indent=None)

    def evaluation(
        self, prefix: str, evaluation: Evaluation, *, step: int, folder: Path, seconds: float, **more: float
    ) -> None:
        """Write an evaluation's results and captions to `folder`, and its metrics and some pictures to the logs.

        The files are `{prefix}_results.json`, `{prefix}_generation.json`, and for data in which images have numbers
        `{prefix}_captions.json` as COCO's evaluation servers take it.

        Args:
            seconds: that it took; `more`, such as `saving_seconds`, is written beside it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        results = prefixed(prefix, evaluation.metrics)
        write_json(folder / f"{prefix}_results.json", results)
        if evaluation.generations:
            write_json(folder / f"{prefix}_generation.json", evaluation.generations)
        if captions := coco_results(evaluation):
            write_json(folder / f"{prefix}_captions.json", captions, indent=None)
        times = {name: round(value, 3) for name, value in {"seconds": seconds, **more}.items()}
        entry = {**evaluation.metrics, **evaluation.details, **times}
        self._append([{"step": step, prefix: entry}])
        for name, value in results.items():
            self._tensorboard.add_scalar(name, value, step)
        if pictures := _some_pictures(evaluation):
            sheet = np.asarray(picture_sheet(pictures))
            self._tensorboard.add_image(f"{prefix}_captions", sheet, step, dataformats="HWC")
        self._tensorboard.flush()

    def _append(self, rows: list[dict[str, Any]]) -> None:
        self._metrics.writelines(json.dumps(row) + "\n" for row in rows)
        self._metrics.flush()
        self.recorded.rows.extend(rows)
        # At each end there may be, so that the time before a kill is known.
        _write_whole(self.folder / CLOCK, json.dumps({"seconds": round(self.seconds(), 3)}).encode())

    def read_evaluation(
        self, prefix: str, *, step: int, folder: Path, image_paths: list[str], image_ids: list[str]
    ) -> Evaluation:
        """Read back an evaluation that `recorded` has."""
        entry = self.recorded.evaluation(prefix, step)
        assert entry is not None
        generations = folder / f"{prefix}_generation.json"
        return Evaluation(
            metrics={name: value for name, value in entry.items() if name not in DETAILS},
            details={name: value for name, value in entry.items() if name in DETAILS},
            generations=json.loads(generations.read_text(encoding="utf-8")) if generations.exists() else [],
            image_paths=image_paths[: entry["rows"]],
            image_ids=image_ids[: entry["rows"]],
        )


def _some_pictures(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Choose images that lie evenly among those evaluated, the same every time, with their captions."""
    captions = list(caption_of_each_image(evaluation.image_paths, evaluation.generations).items())
    places = np.unique(np.linspace(0, len(captions) - 1, min(PICTURES, len(captions))).astype(int))
    return [captions[place] for place in places]


def _files_of_a_run(folder: Path) -> list[Path]:
    named = [folder / name for name in RUN_FILES if (folder / name).exists()]
    return named + [path for pattern in RUN_PATTERNS for path in folder.glob(pattern)]
