"""Upload a run to the Hugging Face Hub, beside the training and without ever stopping it or holding it up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_token

from repro.masking import learn, masked
from repro.reporting import upload
from repro.reporting.writer import LOCK, NON_FINITE, PARTIAL, REPORT, STATE, log, models_in

LEFT_AT_HOME = (STATE, LOCK, REPORT, NON_FINITE, f"*{PARTIAL}", "*_images.json", ".*")
"""What stays here of a run's folder: states, where the images are, and the report with small copies of them."""
SNAPSHOTS = f"upload{PARTIAL}"
"""Folder in the run's, with copies of files that grow while they are being uploaded."""
CARD = "README.md"
REMEDIES = {
    400: "Give the repository's name as --hub_model_id OWNER/NAME; a README.md of your own needs valid metadata.",
    401: "The token is not valid: make one with write permission at huggingface.co/settings/tokens, and log in with"
    " `hf auth login` or give it as --hub_token.",
    403: "The token may not write there: give it write permission at huggingface.co/settings/tokens, or name a"
    " repository of your own with --hub_model_id.",
    404: "There is no such owner or repository, or the token may not see it: check --hub_model_id, and that the token"
    " has write permission.",
}


@dataclass(frozen=True)
class Patience:
    """How long an upload is tried.

    Attributes:
        attempts: how often, if the Hub answers 500 or more or not at all; what it refuses is not asked for again.
        pause: seconds before the second attempt, and twice as long before each further one.
        silence: seconds after which a request that hears nothing has failed.
        at_end: seconds that the end of a run waits for what is not uploaded yet; of several processes the others wait
            for the first as well, and give up after 300.
    """

    attempts: int = 4
    pause: float = 2.0
    silence: float = 30.0
    at_end: float = 240.0


PATIENCE = Patience()


Version = tuple[int, int]
"""Of a file: its bytes, and when it was modified, in ns."""


@dataclass(frozen=True)
class _Job:
    """The folder at a moment: content and version of each file, by its path in the repository."""

    message: str
    files: dict[str, tuple[Path, Version]]
    snapshot: Path


class HubUploader:
    """Uploads a run's folder; a failure is a warning, and the next upload has what the last one lacked.

    One upload is under way at a time, in a process of its own. Of those that come up meanwhile only the newest is kept.
    Leaving the context ends what is under way.
    """

    def __init__(self, folder: Path, *, repository: str | None, token: str | None) -> None:
        """Begin: the repository is made, or found, in the background.

        Args:
            repository: name of the model repository, None for the folder's.
            token: None for the one of the Hugging Face login.
        """
        self._folder, self._patience = folder, PATIENCE
        self._repository, self._is_made = repository or folder.resolve().name, False
        self._token = token or get_token()
        learn(self._token)
        self._uploaded: dict[str, Version] = {}
        self._number = 0
        self._background = ThreadPoolExecutor(1, "hub")
        self._lock = threading.Lock()
        self._next: _Job | None = None
        self._last: Future[None] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        if constants.HF_HUB_OFFLINE:
            self._give_up("the Hub cannot be reached: HF_HUB_OFFLINE is set.")
        elif self._token is None:
            self._give_up("there is no token: log in with `hf auth login`, or give one as --hub_token.")
        else:
            self._submit(_Job("", {}, folder / SNAPSHOTS / "0"))

    def __enter__(self) -> HubUploader:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if not self._closed and self._last is not None and not self._last.done():
                self._give_up("the upload under way is ended.")
            self._closed = True
            if self._process is not None:
                self._process.kill()
        self._background.shutdown()
        shutil.rmtree(self._folder / SNAPSHOTS, ignore_errors=True)

    def push(self, message: str) -> None:
        """Have the folder as it is now uploaded as one commit, as soon as the upload under way has ended."""
        if self._closed:
            return
        self._number += 1
        snapshot = self._folder / SNAPSHOTS / str(self._number)
        try:
            self._submit(_Job(message, take_snapshot(self._folder, snapshot), snapshot))
        except OSError as error:
            self._warn(f"the files cannot be copied: {error}")

    def finish(self, message: str, *, stopped: Callable[[], bool]) -> None:
        """Upload the folder as it is now, and wait for it as long as `Patience` says.

        Args:
            stopped: asked again and again; True ends the waiting.
        """
        self.push(message)
        if self._closed or self._last is None:
            return
        deadline = time.monotonic() + self._patience.at_end
        log.info("--push_to_hub: waits for the upload, %g seconds at most", self._patience.at_end)
        while not stopped():
            left = deadline - time.monotonic()
            if wait([self._last], timeout=max(0.0, min(left, 0.2))).done:
                return
            if left <= 0:
                break
        self._give_up("the upload was not finished " + ("when a signal came." if stopped() else "in time."))

    def _submit(self, job: _Job) -> None:
        with self._lock:
            dropped, self._next = self._next, job
            self._last = self._background.submit(self._upload_newest)
        if dropped:
            shutil.rmtree(dropped.snapshot, ignore_errors=True)

    def _upload_newest(self) -> None:
        with self._lock:
            job, self._next = self._next, None
        if job is None or self._closed:
            return
        try:
            self._upload(job)
        except Exception as error:  # whatever it is, training goes on
            if not self._closed:
                self._warn(f"{type(error).__name__}: {error}")
        shutil.rmtree(job.snapshot, ignore_errors=True)

    def _upload(self, job: _Job) -> None:
        files = {name: path for name, (path, version) in job.files.items() if self._uploaded.get(name) != version}
        if self._is_made and not files:
            return
        limits = {name: value for name, value in asdict(self._patience).items() if name != "at_end"}
        answer = self._ask(
            {
                "repository": self._repository,
                "create": not self._is_made,
                "token": self._token,
                "message": job.message,
                "files": {name: str(path.absolute()) for name, path in files.items()},
                **limits,
            }
        )
        if self._closed:
            return
        if "error" in answer:
            status = answer["status"]
            if status in REMEDIES:
                self._give_up(f"the Hub refuses ({answer['error']}). {REMEDIES[status]}")
            else:
                self._warn(f"{self._repository}: the upload failed ({answer['error']}).")
            return
        self._repository, self._is_made = answer["repository"], True
        self._uploaded |= {name: job.files[name][1] for name in files}
        if files:
            log.info("--push_to_hub: %s is at %s", job.message, answer["url"])

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Run an upload in a process of its own, which this one's end, a signal or `__exit__` ends too."""
        with self._lock:
            if self._closed:
                return {}
            process = self._process = subprocess.Popen(
                [sys.executable, "-P", upload.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
                start_new_session=True,  # Ctrl-C is for the run, which then decides
            )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        return json.loads(line or '{"error": "the uploading process died", "status": null}')

    def _warn(self, text: str) -> None:
        log.warning(
            "--push_to_hub: %s The run does not depend on it; `hf upload %s %s . --exclude '%s/*'` does it by hand.",
            *(masked(text), self._repository, self._folder, STATE),
        )

    def _give_up(self, text: str) -> None:
        """Warn, and try no further upload in this run."""
        self._closed = True
        self._warn(text)


def take_snapshot(folder: Path, snapshot: Path) -> dict[str, tuple[Path, Version]]:
    """List what is to be uploaded of a run's folder, with copies of the files in it that may still change.

    The folders of finished models do not change. The last model's card stands for the whole repository, unless the
    folder has one of its own.

    Returns:
        Path of the content, and its version, by path in the repository.
    """
    snapshot.mkdir(parents=True, exist_ok=True)
    found: dict[str, tuple[Path, Version]] = {}
    for path in _files(folder):
        name, status = path.relative_to(folder).as_posix(), path.stat()
        if path.parent == folder:
            path = Path(shutil.copyfile(path, snapshot / path.name))
        found[name] = (path, (status.st_size, status.st_mtime_ns))
    cards = [f"{model.name}/{CARD}" for model in models_in(folder) if f"{model.name}/{CARD}" in found]
    return {CARD: found[cards[-1]], **found} if cards else found


def _files(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if not any(fnmatchcase(entry.name, pattern) for pattern in LEFT_AT_HOME):
            yield from (path for path in ([entry] if entry.is_file() else sorted(entry.rglob("*"))) if path.is_file())
