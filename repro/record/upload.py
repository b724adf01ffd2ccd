"""Uploads to the Hugging Face Hub in a process of its own, which can be ended whatever the network does.

Nothing else of the package is at work in it: `repro.record.hub` starts this file by its path, without importing JAX.
Standard input carries lines of JSON: what all uploads share, with the token, which is thus on no command line and in no
environment; then one upload a line. What became of each goes as one line to standard output. If the input ends, so does
the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Of the answers 400 to 499, those that may be different next time.
AGAIN = (408, 429)
LONGEST_TEXT = 400


def upload(
    *, repository: str, token: str, message: str, folder: str | None, attempts: int, pause: float
) -> dict[str, Any]:
    """Commit what has changed in a folder to a model repository, which is made if there is none.

    Args:
        folder: None to make the repository alone.
        attempts: how often it is tried.
        pause: seconds before the second attempt, and twice as long before each further one.

    Returns:
        {"url"}; or {"error", "status"}, with the Hub's last answer (None if it was not one) in words.
    """

    def attempt() -> dict[str, Any]:
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        found = api.create_repo(repository, exist_ok=True).repo_id
        if folder is not None:
            api.upload_folder(repo_id=found, folder_path=folder, commit_message=message)
        return {"url": f"{api.endpoint}/{found}"}

    return tried(attempt, attempts=attempts, pause=pause)


def tried(attempt: Callable[[], dict[str, Any]], *, attempts: int, pause: float) -> dict[str, Any]:
    """Return what an attempt returns, or what became of the last one; what is refused is not tried again."""
    while True:
        try:
            return attempt()
        except Exception as error:
            attempts, status = attempts - 1, status_of(error)
            if not attempts or (status is not None and 400 <= status < 500 and status not in AGAIN):
                return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_TEXT], "status": status}
        time.sleep(pause)
        pause *= 2


def status_of(error: BaseException | None) -> int | None:
    """Find the HTTP status that an error comes from: 400 for a name that cannot be one, None without any answer."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None or type(error).__name__ == "HFValidationError":
            return int(status or 400)
        error = error.__cause__ or error.__context__
    return None


def limit_silence(seconds: float) -> None:
    """Give every request of this process a timeout: huggingface_hub's have none."""
    import huggingface_hub
    from huggingface_hub.utils import get_session

    client: Any = type(get_session())
    if hasattr(huggingface_hub, "set_client_factory"):  # from 1.0 on, of httpx; from 2.0 on of httpx2
        huggingface_hub.set_client_factory(lambda: client(follow_redirects=True, timeout=seconds))
    else:

        class Session(client):
            def request(self, *arguments: Any, **settings: Any) -> Any:
                return super().request(*arguments, **{**settings, "timeout": settings.get("timeout") or seconds})

        huggingface_hub.configure_http_backend(Session)


def main() -> None:
    """Do the uploads that standard input asks for, one after another."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    shared = json.loads(sys.stdin.readline())
    limit_silence(shared.pop("silence"))

    def work(line: str) -> None:
        print(json.dumps(upload(**shared, **json.loads(line))), file=answers, flush=True)

    worker = ThreadPoolExecutor(1)
    for line in sys.stdin:
        worker.submit(work, line)
    os._exit(0)  # whatever the upload under way waits for


if __name__ == "__main__":
    main()
