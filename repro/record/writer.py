"""The files of a run: the example's own, `metrics.jsonl`, `run.json`, `dropped.jsonl`, `state/`, TensorBoard."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from repro.data.atomic import check_writable, remove_empty, sha256_of
from repro.data.sheet import picture_sheet
from repro.errors import InputError
from repro.evaluation.evaluator import Evaluation, coco_results, some_captions
from repro.json_files import PARTIAL, read_json, write_json, write_whole
from repro.masking import MaskingFormatter
from repro.record.record import CLOCK, DETAILS, FACTS, GENERATION, ROWS, Recorded, digest_of_facts

LOCK = "run.lock"
STATE = "state"
REPORT = "report.html"
NON_FINITE = "non_finite.json"
ATTENTION = "eval_attention.json"
RUN_FILES = (
    *("log", ROWS, FACTS, "dropped.jsonl", NON_FINITE, CLOCK, STATE, REPORT),
    *("eval_results.json", "eval_generation.json", "eval_captions.json", "eval_images.json"),
    *(ATTENTION, "test_results.json", "test_generation.json", "test_captions.json", "test_images.json"),
)
MODEL = re.compile(r"ckpt_epoch_[0-9]+_step_[0-9]{1,18}")
# What a run's figures are read from, in its folder and in those of its models.
CHECKED = (ROWS, "*_results.json", "*_generation.json", "*_captions.json")
WEIGHTS = ("flax_model*.msgpack", "model*.safetensors")  # of the last model, which the last figures are about
RUN_PATTERNS = ("events.out.tfevents.*", f"*{PARTIAL}")
DECIMALS = 6
PICTURES = 8  # drawn for TensorBoard at each evaluation

log = logging.getLogger("repro")


@contextmanager
def locked(folder: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Keep other runs out of a folder, which is made if need be; the system lets go of it when this process ends.

    Raises:
        InputError: the folder, which the flag names, cannot be written, or another run is at work in it.
    """
    check_writable(folder, flag)
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        text = f"{flag} {folder}: another run is at work in it; wait for it, or name another folder."
        raise InputError(text) from error
    try:
        yield
    finally:
        if missing and not entries(folder):
            (folder / LOCK).unlink()
            remove_empty(missing)
        lock.release()


def check_output_dir(folder: Path, *, overwrite: bool) -> None:
    """Refuse by an InputError a folder that cannot be written, or holds something and may not be overwritten."""
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
    return sorted((path for path in folder.glob("ckpt_*") if MODEL.fullmatch(path.name)), key=step_of_model)


def step_of_model(folder: Path) -> int:
    """Tell after which step a run saved a model, by its folder's name, one of those that `models_in` lists."""
    return int(folder.name.rpartition("_")[2])


def checked_files(folder: Path) -> list[Path]:
    """List the files of a run that are to have checksums."""
    models = models_in(folder)
    found = [place.glob(pattern) for place in (folder, *models) for pattern in CHECKED]
    found += [place.glob(pattern) for place in models[-1:] for pattern in WEIGHTS]
    return [path for paths in found for path in sorted(paths)]


def entries(folder: Path) -> list[Path]:
    """List what lies in a folder besides its lock."""
    return [path for path in folder.iterdir() if path.name != LOCK] if folder.is_dir() else []


def prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    """Name and round metrics as the example's result files do."""
    return {f"{prefix}_{name}": round(value, DECIMALS) for name, value in metrics.items()}


class RunWriter(AbstractContextManager["RunWriter"]):
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
        ended = [*folder.glob(f"ckpt_*/*{PARTIAL}"), *folder.glob(f"*{PARTIAL}"), *folder.glob(NON_FINITE)]
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
        path = folder / ROWS
        write_whole(path, "".join(json.dumps(row) + "\n" for row in self.recorded.rows).encode())
        self._metrics = path.open("a", encoding="utf-8")
        begins = max((row["step"] + 1 for row in self.recorded.rows), default=None)
        self.tensorboard = SummaryWriter(logdir=str(folder), write_to_disk=True, purge_step=begins)

    def __exit__(self, *_: object) -> None:
        self.tensorboard.close()
        self._metrics.close()
        log.removeHandler(self._handler)
        self._handler.close()

    def checksums(self) -> dict[str, str]:
        """Hash `metrics.jsonl`, every evaluation's results and captions, the last weights, SHA-256 by path."""
        self._metrics.flush()
        return {path.relative_to(self.folder).as_posix(): sha256_of(path) for path in checked_files(self.folder)}

    def describe(self, facts: dict[str, Any], dropped: Iterable[dict[str, Any]]) -> None:
        """Write `run.json`, and `dropped.jsonl` with one row that was left out on each line."""
        if "checksums" in facts:
            facts["checksums"][FACTS] = digest_of_facts(facts)
        write_json(self.folder / FACTS, facts)
        lines = [json.dumps(row) + "\n" for row in dropped]
        (self.folder / "dropped.jsonl").write_text("".join(lines), encoding="utf-8")

    def end(self, reason: str) -> None:
        """Write why the run ends to its log; the terminal is told by the command."""
        self._handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, "ended: %s", (reason,), None))

    def sync(self) -> None:
        """Have the system write `metrics.jsonl` to the disk, which is to know of every step before a saved state."""
        os.fsync(self._metrics.fileno())

    def train_scalars(self, step: int, row: dict[str, float], seconds: float) -> None:
        """Write the example's training scalars, with the seconds spent on steps, to TensorBoard."""
        for name, value in {"time": seconds, "loss": row["loss"], "learning_rate": row["learning_rate"]}.items():
            self.tensorboard.add_scalar(f"train_{name}", value, step)
        self.tensorboard.flush()

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
        self.append([{"step": step, prefix: entry}])
        for name, value in results.items():
            self.tensorboard.add_scalar(name, value, step)
        if pictures := some_captions(evaluation, PICTURES):
            sheet = np.asarray(picture_sheet(list(pictures.items())))
            self.tensorboard.add_image(f"{prefix}_captions", sheet, step, dataformats="HWC")
        self.tensorboard.flush()

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to `metrics.jsonl`: {"step", "loss", "learning_rate"} of each step, or an evaluation's."""
        self._metrics.writelines(json.dumps(row) + "\n" for row in rows)
        self._metrics.flush()
        self.recorded.rows.extend(rows)
        # At each end there may be, so that the time before a kill is known.
        write_whole(self.folder / CLOCK, json.dumps({"seconds": round(self.seconds(), 3)}).encode())

    def read_evaluation(
        self, prefix: str, step: int, folder: Path, *, image_paths: list[str], image_ids: list[str]
    ) -> Evaluation:
        """Read back an evaluation that `recorded` has; an InputError if its captions are damaged."""
        entry = self.recorded.evaluations(prefix)[step]
        file = folder / f"{prefix}_generation.json"
        found = read_json(file, list[GENERATION]) if file.exists() else []
        if found and len(found) != entry["rows"]:
            raise InputError(f"{file}: has {len(found)} captions, and {entry['rows']} rows were evaluated.")
        return Evaluation(
            metrics={name: value for name, value in entry.items() if name not in DETAILS},
            details={name: value for name, value in entry.items() if name in DETAILS},
            generations=found,
            image_paths=image_paths[: entry["rows"]],
            image_ids=image_ids[: entry["rows"]],
        )


def _files_of_a_run(folder: Path) -> list[Path]:
    named = [folder / name for name in RUN_FILES if (folder / name).exists()]
    return [*named, *models_in(folder), *(path for pattern in RUN_PATTERNS for path in folder.glob(pattern))]
