"""Files that are there whole or not at all, whoever else writes them, and where they may be; and what is in them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from repro.errors import InputError
from repro.json_files import PARTIAL, keys, read_json, write_json
from repro.limits import DROPPED_CHARACTERS

# What stands beside a file of a cache: a hash of it and of what was noted, and the run that has built it again.
ENTRY = keys(sha256=str, notes=list[Any], built_by=str | None)

PLAIN_NAME = re.compile(r"\w[\w.+ -]{0,199}", re.ASCII)
# What makes, moves or removes files, by how many of an audit event's first arguments are paths.
ONE_PATH = ("open", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
TWO_PATHS = ("os.rename", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_below: ContextVar[Path | None] = ContextVar("below", default=None)
_watch_files = cache(sys.addaudithook)  # once, and for good: it cannot be undone
log = logging.getLogger("repro")


def build_once(
    file: Path, content: str, build: Callable[[Path], list[Any] | None], *, rebuild: str | None = None
) -> list[Any]:
    """Have one of the processes that want a file write it, on whatever host they are; the others wait for it.

    A hash lies beside it, so that a file that was damaged is written again, and what was noted, which is returned.

    Args:
        content: what it is, for messages.
        build: writes it to the path that it is given, and returns what is to be noted of it.
        rebuild: a run's own name, to have written again what another has written; None to take that.

    Raises:
        InputError: it cannot be written or locked.
    """
    beside = file.with_name(f"{file.name}.json")
    if (notes := _notes_of(file, beside, rebuild)) is not None:
        return notes
    with kept_there(file, content), alone(file.with_name(f"{file.name}.lock")):
        if (notes := _notes_of(file, beside, rebuild)) is not None:
            return notes
        if rebuild is None and file.exists():
            log.warning("%s: is damaged; %s are made again", file, content)
        for left in file.parent.glob(f"{file.name}*{PARTIAL}"):  # by a builder that was killed
            left.unlink()
        partial = file.with_name(file.name + PARTIAL)
        try:
            notes = build(partial) or []
            entry = {"sha256": _hash_of(partial, notes), "notes": notes, "built_by": rebuild}
            write_json(beside, entry, indent=None)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
        return notes


def _notes_of(file: Path, beside: Path, rebuild: str | None) -> list[Any] | None:
    """Read what was noted of a file; None if it is not as it was written, or another run has built it."""
    with suppress(InputError, OSError):
        entry = read_json(beside, ENTRY, largest=2 * DROPPED_CHARACTERS)
        if rebuild in (None, entry["built_by"]) and entry["sha256"] == _hash_of(file, entry["notes"]):
            return entry["notes"]
    return None


def _hash_of(file: Path, notes: list[Any]) -> str:
    return hashlib.sha256(f"{sha256_of(file)}{json.dumps(notes)}".encode()).hexdigest()


@contextmanager
def alone(lock_file: Path) -> Iterator[None]:
    """Keep out all others that lock this file; the system lets go of it when this process ends, however it does.

    Across hosts that takes a file system with `flock`, as NFS has since Linux 2.6.12; one without is an OSError.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file)
    try:
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            log.info("%s: another process is building there; waiting for it", lock_file)
            held = lock.acquire()
    except NotImplementedError as error:
        raise OSError(str(error)) from error
    with held:
        yield


@contextmanager
def kept_there(place: Path, content: str, instead: str = "") -> Iterator[None]:
    """Raise an InputError, with the remedy, where what a block keeps in a cache cannot be written or locked."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{place}: {content} cannot be kept there ({error}); make room or mend it, or name another folder with"
            f" --cache_dir{instead}."
        ) from error


def check_writable(folder: Path, flag: str) -> None:
    """Check that files can be written in a folder, there or not, and leave nothing; an InputError names the flag."""
    missing: list[Path] = []
    try:
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {folder}: no file can be written there ({error}); name another folder.") from error
    finally:
        remove_empty(missing)


def check_file_writable(file: Path, flag: str) -> None:
    """Check that a file can be written as `check_writable` does."""
    check_writable(file.parent, flag)
    if file.is_dir():
        raise InputError(f"{flag} {file}: is a folder; name a file.")


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, the inner ones first, as far as nothing lies in them."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def sha256_of(file: Path) -> str:
    """Hash a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_plain_names(source: str | Path, names: Iterable[Any]) -> None:
    """Raise an InputError if what a model says its files are called has a folder in it, or could not be a file."""
    for name in names:
        if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
            raise InputError(
                f"{source}: names a file or chat template {name!r}, which could lie outside of the model's folder;"
                " take it out, or give it a name of ASCII letters, digits, dots and dashes."
            )


@contextmanager
def writing_only_below(folder: Path) -> Iterator[None]:
    """Let this thread's Python write nowhere else, whatever names a library takes from a model; else an InputError."""
    _watch_files(_refuse_outside)
    token = _below.set(Path(os.path.realpath(folder)))
    try:
        yield
    except _Outside as error:
        raise InputError(f"{error}: would be written outside of {folder}; use another model.") from error
    finally:
        _below.reset(token)


class _Outside(PermissionError):
    """Where it is raised for a module's compiled form, Python goes on without."""


def _refuse_outside(event: str, arguments: tuple[Any, ...]) -> None:
    folder = _below.get()
    if folder is None or (event == "open" and not arguments[2] & WRITING):
        return
    for path in arguments[: 2 * (event in TWO_PATHS) or (event in ONE_PATH)]:
        if isinstance(path, str | bytes | os.PathLike):
            found = Path(os.path.realpath(os.fsdecode(path)))
            if found != folder and folder not in found.parents:
                raise _Outside(str(found))
