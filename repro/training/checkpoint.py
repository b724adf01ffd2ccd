"""The state of a run on disk: written beside the training, whole or not at all, and checked before it is used."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from repro.data.atomic import sha256_of
from repro.errors import InputError, is_disk_full, stopping_on_full_disk
from repro.json_files import Count, Positive, keys, optional, read_json, write_json
from repro.training.processes import is_first
from repro.training.steps import TrainState

CHECKSUMS = "checksums.json"
UNFINISHED = "*.orbax-checkpoint-tmp*"
CORRUPT = ".corrupt"
RECORD = "record"  # folder of a state that holds what was saved beside the arrays
STEP = re.compile(r"0|[1-9][0-9]{0,17}")  # The name of a state's folder; `int` reads others, too
REMOVALS = 10
# Bytes from which on devices that hold the same array each write a part of it: a part of every shape is compiled for
# seconds at the first save (orbax 0.12).
SMALLEST_SLICE = 2**22

log = logging.getLogger("repro")

LATER = optional(waiting_for_input_seconds=float, seconds=float)
# What is saved with a state and needed to go on from it.
STATE_RECORD = keys(step=Count, training_seconds=float, settings=keys(num_replicas=Positive), **LATER)


@dataclass(frozen=True)
class Found:
    """A state that can be restored."""

    folder: str  # of the states
    step: int  # after which it was saved
    record: dict[str, Any]  # what was saved with it
    corrupt: list[int]  # the later steps whose files are not as they were written


@dataclass(frozen=True)
class _LastAndBest(PreservationPolicy):
    last: int
    best: Callable[[], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self.last :], self.best()}
        return [step in kept for step in steps]


class Checkpoints:
    """The states of one run, in `FOLDER/STEP`, of which some are kept.

    Orbax writes them and renames them when they are whole. Its data are not checksummed (a flipped bit is restored
    without complaint, orbax 0.12), so the files' SHA-256 are added once they are written.
    """

    def __init__(self, folder: Path, *, keep: int, best: Callable[[], int | None] = lambda: None) -> None:
        """Open or make the folder, where the last `keep` states are kept, and that of the step that `best` gives."""
        self.folder = folder.absolute()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        # It reports what is also raised, each of several threads for itself.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SMALLEST_SLICE)
        ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
        # Weights hardly compress: zstd, Orbax's default, saves a tenth of the disk for twice the time.
        kinds = {"state": ocp.PyTreeCheckpointHandler(use_compression=False), "record": ocp.JsonCheckpointHandler()}
        how = ocp.CheckpointManagerOptions(preservation_policy=_LastAndBest(keep, best), cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, item_handlers=kinds, options=how)

    def steps(self) -> list[int]:
        """List the steps whose states are kept, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, step: int, record: dict[str, Any]) -> None:
        """Copy the state to the host, and write it in the background; RunStopped, maybe later, on a full disk."""
        self.wait()
        arguments = {"state": ocp.args.PyTreeSave(state), "record": ocp.args.JsonSave(record)}
        with stopping_on_full_disk(f"the state of step {step}"):
            self._manager.save(step, args=ocp.args.Composite(**arguments), force=True)
        self._pending = self._background.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        self._manager.wait_until_finished()
        if is_first():
            write_checksums(self.folder / str(step))

    def wait(self) -> None:
        """Wait until the last state is on disk; RunStopped if that is full, and what was written is removed again."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            with stopping_on_full_disk("the state"):
                pending.result()
        except BaseException:
            for _ in range(REMOVALS):  # other files of the state may still be about to be written
                for unfinished in self.folder.glob(UNFINISHED):
                    shutil.rmtree(unfinished, ignore_errors=True)
                time.sleep(0.05)
            raise

    def restore(self, found: Found, like: TrainState) -> TrainState:
        """Read a state into the shapes, dtypes and shardings of `like`, which may be others than it was saved with.

        Raises:
            InputError: it is damaged, and was killed before its checksums could tell.
        """
        path = Path(found.folder) / str(found.step)
        wanted = ocp.args.PyTreeRestore(like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
        try:
            state = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(path / "state", args=wanted)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # it has no checksums
            raise InputError(f"{path}: the state cannot be read ({error}); remove it and resume once more.") from error
        if is_first() and path.parent == self.folder and not (path / CHECKSUMS).exists():
            write_checksums(path)
        return state

    def close(self) -> None:
        """Wait, and end the threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            try:
                self._manager.close()
            except Exception as error:  # the manager repeats what was raised when the state was written
                if not is_disk_full(error):
                    raise


def whole_states(folder: Path) -> list[int]:
    """List the steps whose states were written to the end; whether their files are good is another question."""
    return [int(path.name) for path in folder.glob("[0-9]*") if STEP.fullmatch(path.name)]


def find_newest(folder: Path, *, step: int | None = None) -> Found | None:
    """Find the newest state in a folder whose files are as they were written, or the one of a step.

    Returns:
        None if there is none; what is wrong with the others is logged.
    """
    candidates = whole_states(folder) if step is None else [step]
    corrupt: list[int] = []
    for candidate in sorted(candidates, reverse=True):
        path = folder / str(candidate)
        try:
            check_checksums(path)
            record = read_json(path / RECORD / "metadata", STATE_RECORD)
            if record["step"] != candidate:
                raise ValueError(f"it is the state of step {record['step']}")
        except (OSError, ValueError, InputError) as error:
            log.warning("%s is corrupt and is not used: %s", path, error)
            corrupt.append(candidate)
            continue
        return Found(str(folder.absolute()), candidate, record, corrupt)
    return None


def set_aside(folder: Path, found: Found) -> None:
    """Rename the corrupt states, and remove later ones, so that the run can come to their steps again."""
    for step in whole_states(folder):
        path = folder / str(step)
        if step in found.corrupt:
            aside = folder / f"{step}{CORRUPT}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        elif step > found.step:
            shutil.rmtree(path)


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file in a folder beside them."""
    sums = {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    write_json(folder / CHECKSUMS, sums, indent=1)


def check_checksums(folder: Path) -> None:
    """Check the files of a folder, but of one that was killed before its checksums: ValueError, OSError, InputError."""
    if not (folder / CHECKSUMS).exists():
        return
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for name, expected in read_json(folder / CHECKSUMS, dict[str, str]).items():
        if name not in there or sha256_of(folder / name) != expected:
            raise ValueError(f"{name} has changed since it was written")
