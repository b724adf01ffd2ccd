"""Upload a run to the Hugging Face Hub, beside the training and without ever stopping it."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi

from repro.reporting.writer import LOCK, PARTIAL, STATE, log

LEFT_AT_HOME = (f"{STATE}/*", LOCK, f"*{PARTIAL}", f"*{PARTIAL}/*")


class HubUploader:
    """Uploads a run's folder after each checkpoint, in the background; a failure is a warning."""

    def __init__(self, folder: Path, *, repository: str | None, token: str | None) -> None:
        self._folder = folder
        self._api = HfApi(token=token)
        self._pending: Future[CommitInfo] | None = None
        self.repository: str | None = None
        try:
            url = self._api.create_repo(repository or folder.resolve().name, exist_ok=True)
            self.repository = url.repo_id
        except Exception as error:  # whatever the network or the Hub says, training goes on
            log.warning(
                "--push_to_hub: the Hub cannot be reached or refuses (%s). The run goes on without"
                " uploading; afterwards, `hf upload REPOSITORY %s` does it.",
                str(error).strip().splitlines()[0],
                folder,
            )

    def push(self, message: str) -> None:
        """Start uploading the folder as one commit, once the upload before it has ended."""
        if self.repository is None:
            return
        self.wait()
        self._pending = self._api.upload_folder(
            repo_id=self.repository,
            folder_path=self._folder,
            commit_message=message,
            ignore_patterns=list(LEFT_AT_HOME),
            run_as_future=True,
        )

    def wait(self) -> None:
        """Wait for the upload under way."""
        if self._pending is None:
            return
        try:
            self._pending.result()
        except Exception as error:
            log.warning("--push_to_hub: upload failed: %s", str(error).strip().splitlines()[0])
        self._pending = None
