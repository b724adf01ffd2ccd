"""Upload a run to the Hugging Face Hub, beside the training and without ever stopping it or holding it up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_token

from repro.json_files import PARTIAL
from repro.masking import learn, masked
from repro.record import upload
from repro.record.writer import LOCK, NON_FINITE, REPORT, STATE, log, models_in

# What stays here of a run's folder: states, where the images are, and the report with small copies of them.
LEFT_AT_HOME = (STATE, LOCK, REPORT, NON_FINITE, f"*{PARTIAL}", "*_images.json", ".*")
# Folder in the run's, with copies of files that grow while they are being uploaded.
SNAPSHOTS = f"upload{PARTIAL}"
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
# An upload: its message, and the folder with what there is to upload.
Job = dict[str, str | None]


class HubUploader:
    """Uploads a run's folder; a failure is a warning, and the next upload has what the last one lacked.

    A process of its own does one upload at a time. Of those that come up meanwhile only the newest is kept. Leaving the
    context ends what is under way.
    """

    def __init__(self, folder: Path, *, repository: str | None, token: str | None) -> None:
        """Begin: the repository is made, or found, in the background.

        Args:
            repository: name of the model repository, None for the folder's.
            token: None for the one of the Hugging Face login.
        """
        self._folder, self._patience, self._number = folder, PATIENCE, 0
        self._repository, token = repository or folder.resolve().name, token or get_token()
        learn(token)
        self._changed = threading.Condition(threading.RLock())
        self._current: Job | None = None
        self._next: Job | None = None
        self._process: subprocess.Popen[str] | None = None
        self._closed = False
        if constants.HF_HUB_OFFLINE:
            self._give_up("the Hub cannot be reached: HF_HUB_OFFLINE is set.")
        elif token is None:
            self._give_up("there is no token: log in with `hf auth login`, or give one as --hub_token.")
        else:
            limits = {name: value for name, value in asdict(self._patience).items() if name != "at_end"}
            self._start({"repository": self._repository, "token": token, **limits})
            self._submit({"message": "", "folder": None})

    def __enter__(self) -> HubUploader:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._closed and self._current is not None:
            self._give_up("the upload under way is ended.")
        self._closed = True
        if self._process is not None:
            self._process.kill()
            self._listener.join()
            with suppress(OSError), self._process:  # closes what is left of the pipes
                pass
        shutil.rmtree(self._folder / SNAPSHOTS, ignore_errors=True)

    def push(self, message: str) -> None:
        """Have the folder as it is now uploaded as one commit, as soon as the upload under way has ended."""
        if self._closed:
            return
        self._number += 1
        snapshot = self._folder / SNAPSHOTS / str(self._number)
        try:
            take_snapshot(self._folder, snapshot)
        except OSError as error:
            self._warn(f"the files cannot be copied: {error}")
        else:
            self._submit({"message": message, "folder": str(snapshot.absolute())})

    def finish(self, message: str, *, stopped: Callable[[], bool]) -> None:
        """Upload the folder as it is now, and wait for it as long as `Patience` says.

        Args:
            stopped: asked again and again; True ends the waiting.
        """
        self.push(message)
        if self._closed:
            return
        deadline = time.monotonic() + self._patience.at_end
        log.info("--push_to_hub: waits for the upload, %g seconds at most", self._patience.at_end)
        with self._changed:
            while self._current is not None and not self._closed:
                if stopped() or time.monotonic() > deadline:
                    reason = "when a signal came." if stopped() else "in time."
                    return self._give_up(f"the upload was not finished {reason}")
                self._changed.wait(0.2)

    def _start(self, shared: dict[str, Any]) -> None:
        """Start the process, which this one's end, a signal or `__exit__` ends too."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", upload.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
            start_new_session=True,  # Ctrl-C is for the run, which then decides
        )
        self._tell(shared)
        self._listener = threading.Thread(target=self._listen, args=(self._process.stdout,), name="hub", daemon=True)
        self._listener.start()

    def _tell(self, what: dict[str, Any]) -> None:
        assert self._process is not None
        with suppress(OSError):  # of a process that died, which the listener notices
            print(json.dumps(what), file=self._process.stdin, flush=True)

    def _submit(self, job: Job) -> None:
        with self._changed:
            if self._current is None:
                self._current = job
                self._tell(job)
            else:
                _remove(self._next)
                self._next = job

    def _listen(self, answers: Iterable[str]) -> None:
        """Say what became of each upload, and have the next one done."""
        for line in answers:
            with self._changed:
                if not self._closed:
                    self._conclude(json.loads(line))
                _remove(self._current)
                self._current, following, self._next = None, self._next, None
                if following is not None and not self._closed:
                    self._submit(following)
                self._changed.notify_all()
        if not self._closed:
            self._give_up("the uploading process died.")

    def _conclude(self, answer: dict[str, Any]) -> None:
        assert self._current is not None
        if "error" not in answer:
            if self._current["folder"]:
                log.info("--push_to_hub: %s is at %s", self._current["message"], answer["url"])
        elif answer["status"] in REMEDIES:
            self._give_up(f"the Hub refuses ({answer['error']}). {REMEDIES[answer['status']]}")
        else:
            self._warn(f"{self._repository}: the upload failed ({answer['error']}).")

    def _warn(self, text: str) -> None:
        log.warning(
            "--push_to_hub: %s The run does not depend on it; `hf upload %s %s . --exclude '%s/*'` does it by hand.",
            *(masked(text), self._repository, self._folder, STATE),
        )

    def _give_up(self, text: str) -> None:
        """Warn, and try no further upload in this run."""
        self._closed = True
        self._warn(text)


def _remove(job: Job | None) -> None:
    if job is not None and job["folder"]:
        shutil.rmtree(job["folder"], ignore_errors=True)


def take_snapshot(folder: Path, snapshot: Path) -> None:
    """Lay out what is to be uploaded of a run's folder: copies of files that may still change, links to the others.

    The folders of finished models do not change. The last model's card stands for the whole repository, unless the
    folder has one of its own.
    """
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and not any(fnmatchcase(name.parts[0], pattern) for pattern in LEFT_AT_HOME):
            place = snapshot / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if len(name.parts) == 1:
                shutil.copyfile(path, place)
            else:
                place.symlink_to(path.resolve())
    cards = [path for model in models_in(snapshot) if (path := model / CARD).is_file()]
    if cards and not (snapshot / CARD).exists():
        shutil.copyfile(cards[-1], snapshot / CARD)
