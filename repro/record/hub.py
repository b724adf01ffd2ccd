"""Upload a run to the Hugging Face Hub, beside the training and without ever stopping it or holding it up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.utils import disable_progress_bars, get_session
from huggingface_hub.utils.logging import set_verbosity_error

from repro.json_files import PARTIAL
from repro.masking import learn, masked
from repro.record.model_card import CARD
from repro.record.writer import ATTENTION, LOCK, NON_FINITE, REPORT, STATE, log, models_in

# What stays here of a run's folder: states, where the images are, and the report with small copies of them.
LEFT_AT_HOME = (STATE, LOCK, REPORT, NON_FINITE, f"*{PARTIAL}", "*_images.json", ATTENTION, ".*")
AGAIN = (408, 429)  # of the answers 400 to 499, those that may be different next time
ATTEMPTS = 4  # of an upload, if the Hub answers 500 or more or not at all; what it refuses is not asked for again
PAUSE = 2.0  # seconds before the second attempt, and twice as long before each further one
SILENCE = 30.0  # seconds after which a request that hears nothing has failed
# Seconds that the end of a run waits for what is not uploaded yet; of several processes the others wait for the
# first as well, and give up after 300. No pause that the Hub asks for is longer, either.
AT_END = 240.0
LONGEST_TEXT = 400
REMEDIES = {
    400: "Give the repository's name as --hub_model_id OWNER/NAME; a README.md of your own needs valid metadata.",
    401: "The token is not valid: make one with write permission at huggingface.co/settings/tokens, and log in with"
    " `hf auth login` or give it as --hub_token.",
    403: "The token may not write there: give it write permission at huggingface.co/settings/tokens, or name a"
    " repository of your own with --hub_model_id.",
    404: "There is no such owner or repository, or the token may not see it: check --hub_model_id, and that the token"
    " has write permission.",
}


class HubUploader(AbstractContextManager["HubUploader"]):
    """Uploads a run's folder; a failure is a warning, and the next upload has what the last one lacked.

    A thread does one upload at a time. Of those that come up meanwhile only the newest is kept. Leaving the context
    gives up what is under way; a thread that hangs in the network then ends with the process.
    """

    def __init__(self, folder: Path, *, repository: str | None, token: str | None) -> None:
        """Begin: the repository is made, or found, in the background.

        Args:
            repository: name of the model repository, None for the folder's.
            token: None for the one of the Hugging Face login.
        """
        self._folder = folder
        self._repository, token = repository or folder.resolve().name, token or get_token()
        learn(token)
        self._changed = threading.Condition(threading.RLock())
        self._current: Callable[[], str] | None = None
        self._next: Callable[[], str] | None = partial(self._upload, "", {})
        self._closed = False
        if constants.HF_HUB_OFFLINE:
            self._give_up("the Hub cannot be reached: HF_HUB_OFFLINE is set.")
        elif token is None:
            self._give_up("there is no token: log in with `hf auth login`, or give one as --hub_token.")
        else:
            disable_progress_bars()
            set_verbosity_error()
            limit_silence(SILENCE)
            self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
            threading.Thread(target=self._work, name="hub", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        with self._changed:
            if not self._closed and self._current is not None:
                self._give_up("the upload under way is ended.")
            self._closed = True
            self._changed.notify_all()

    def push(self, message: str) -> None:
        """Have the folder as it is now uploaded as one commit, as soon as the upload under way has ended."""
        if self._closed:
            return
        try:
            upload = partial(self._upload, message, files_of(self._folder))
        except OSError as error:
            return self._warn(f"the files cannot be read: {error}")
        with self._changed:
            self._next = upload
            self._changed.notify_all()

    def finish(self, message: str, *, stopped: Callable[[], bool]) -> None:
        """Upload the folder as it is now, and wait for `AT_END` seconds, or until `stopped`, asked repeatedly."""
        self.push(message)
        if self._closed:
            return
        deadline = time.monotonic() + AT_END
        log.info("--push_to_hub: waits for the upload, %g seconds at most", AT_END)
        with self._changed:
            while (self._current or self._next) and not self._closed:
                if stopped() or time.monotonic() > deadline:
                    reason = "when a signal came." if stopped() else "in time."
                    return self._give_up(f"the upload was not finished {reason}")
                self._changed.wait(0.2)

    def _work(self) -> None:
        """Do the uploads that come up, and say what became of each."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next or self._closed)
                if self._closed or self._next is None:
                    return
                upload = self._current = self._next
                self._next = None
            done, error, status = tried(upload)
            with self._changed:
                if self._closed:
                    return
                if status in REMEDIES:
                    self._give_up(f"the Hub refuses ({error}). {REMEDIES[status]}")
                elif error:
                    self._warn(f"{self._repository}: the upload failed ({error}).")
                elif done:
                    log.info("--push_to_hub: %s", done)
                self._current = None
                self._changed.notify_all()

    def _upload(self, message: str, files: dict[str, bytes | Path]) -> str:
        """Commit what has changed of the files, and say where; without files, make the repository if there is none."""
        found = self._api.create_repo(self._repository, exist_ok=True).repo_id
        if not files:
            return ""
        added = [CommitOperationAdd(name, content) for name, content in files.items()]
        self._api.create_commit(found, added, commit_message=message)
        return f"{message} is at {self._api.endpoint}/{found}"

    def _warn(self, text: str) -> None:
        log.warning(
            "--push_to_hub: %s The run does not depend on it; `hf upload %s %s . --exclude '%s/*'` does it by hand.",
            *(masked(text), self._repository, self._folder, STATE),
        )

    def _give_up(self, text: str) -> None:
        """Warn, and try no further upload in this run."""
        self._closed = True
        self._warn(text)


def tried(attempt: Callable[[], str]) -> tuple[str, str, int | None]:
    """Tell an attempt's answer, or the last error with the Hub's status; what is refused is not tried again."""
    attempts, pause = ATTEMPTS, PAUSE
    while True:
        try:
            return attempt(), "", None
        except Exception as error:
            attempts, (status, asked) = attempts - 1, answer_of(error)
            if not attempts or (status is not None and 400 <= status < 500 and status not in AGAIN):
                return "", " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_TEXT], status
        time.sleep(max(pause, min(asked, AT_END)))
        pause *= 2


def answer_of(error: BaseException | None) -> tuple[int | None, float]:
    """Find an error's HTTP status, 400 for a name that cannot be one, None without answer; and its Retry-After in s."""
    while error is not None:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if status is not None or type(error).__name__ == "HFValidationError":
            asked = getattr(response, "headers", {}).get("Retry-After", "")
            return int(status or 400), float(asked) if asked.isdecimal() else 0
        error = error.__cause__ or error.__context__
    return None, 0


def limit_silence(seconds: float) -> None:
    """Give every request to the Hub a timeout: huggingface_hub's uploads have none."""
    session: Any = get_session()
    client: Any = type(session)
    if hasattr(huggingface_hub, "set_client_factory"):  # from 1.0 on, of httpx; from 2.0 on of httpx2
        how = {"event_hooks": session.event_hooks, "follow_redirects": True, "timeout": seconds}
        huggingface_hub.set_client_factory(lambda: client(**how))
    else:

        class Session(client):
            def request(self, *arguments: Any, **settings: Any) -> Any:
                return super().request(*arguments, **{**settings, "timeout": settings.get("timeout") or seconds})

        huggingface_hub.configure_http_backend(Session)


def files_of(folder: Path) -> dict[str, bytes | Path]:
    """Collect what is to be uploaded of a run: the content of files that may still change, paths of the others.

    The folders of finished models do not change. The last model's card stands for the whole repository, unless the
    folder has one of its own.
    """
    found: dict[str, bytes | Path] = {}
    for top in sorted(folder.iterdir()):  # what stays is not even looked into: a state may be on its way
        stays = any(fnmatchcase(top.name, pattern) for pattern in LEFT_AT_HOME)
        for path in () if stays else filter(Path.is_file, (top, *sorted(top.rglob("*")))):
            found[path.relative_to(folder).as_posix()] = path.read_bytes() if path == top else path
    cards = [path for model in models_in(folder) if (path := model / CARD).is_file()]
    return ({CARD: cards[-1]} if cards else {}) | found
