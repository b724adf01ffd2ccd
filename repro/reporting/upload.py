"""One upload to the Hugging Face Hub, in a process of its own, which can be ended whatever the network does.

Nothing in this file belongs to the package when it is at work: `repro.reporting.hub` starts it by its path, without
importing JAX. A job comes as one line of JSON on standard input, which carries the token past command line and
environment; what became of it goes as one line to standard output. If the input ends, so does the process.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

AGAIN = (408, 429)
"""Of the answers 400 to 499, those that may be different next time."""
LONGEST_TEXT = 400


def upload(
    *,
    repository: str,
    create: bool,
    token: str,
    message: str,
    files: dict[str, str],
    attempts: int,
    pause: float,
    silence: float,
) -> dict[str, Any]:
    """Commit files to a model repository, again if need be.

    Args:
        create: make the repository if there is none, and find out whose it is.
        files: paths of their contents by their paths in the repository.
        attempts: how often it is tried.
        pause: seconds before the second attempt, and twice as long before each further one.
        silence: seconds after which a request that hears nothing has failed.

    Returns:
        {"repository", "url"}; or {"error", "status"}, with the Hub's last answer (None if it was not one) in words.
    """
    limit_silence(silence)

    def attempt() -> dict[str, Any]:
        from huggingface_hub import CommitOperationAdd, HfApi

        api, found = HfApi(token=token), repository
        if create:
            found = api.create_repo(repository, exist_ok=True).repo_id
        if files:
            additions = [CommitOperationAdd(name, path) for name, path in files.items()]
            api.create_commit(found, additions, commit_message=message)
        return {"repository": found, "url": f"{api.endpoint}/{found}"}

    return tried(attempt, attempts=attempts, pause=pause)


def tried(attempt: Callable[[], dict[str, Any]], *, attempts: int, pause: float) -> dict[str, Any]:
    """Return what an attempt returns, or what became of the last one; what is refused is not tried again."""
    while True:
        try:
            return attempt()
        except Exception as error:
            attempts, status = attempts - 1, status_of(error)
            refused = status is not None and 400 <= status < 500 and status not in AGAIN
            if not attempts or refused or is_misnamed(error):
                text = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_TEXT]
                return {"error": text, "status": 400 if is_misnamed(error) else status}
        time.sleep(pause)
        pause *= 2


def status_of(error: BaseException) -> int | None:
    """Find the HTTP status that an error comes from; None if the Hub did not answer."""
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return int(status)
    return None


def is_misnamed(error: BaseException) -> bool:
    """Tell whether the repository's name cannot be one, which is found out without the Hub."""
    return any(type(cause).__name__ == "HFValidationError" for cause in _causes(error))


def limit_silence(seconds: float) -> None:
    """Give every request of this process a timeout: huggingface_hub's have none."""
    import huggingface_hub
    from huggingface_hub.utils import get_session

    client = type(get_session())
    if hasattr(huggingface_hub, "set_client_factory"):  # from 1.0 on, of httpx; from 2.0 on of httpx2
        huggingface_hub.set_client_factory(lambda: client(follow_redirects=True, timeout=seconds))
    else:

        class Session(client):
            def request(self, *arguments: Any, **settings: Any) -> Any:
                return super().request(*arguments, **{**settings, "timeout": settings.get("timeout") or seconds})

        huggingface_hub.configure_http_backend(Session)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _end_with_the_input() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Do the job on standard input."""
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_input, daemon=True).start()
    print(json.dumps(upload(**job)), flush=True)
    os._exit(0)  # threads of the libraries that wait for the network are not waited for


if __name__ == "__main__":
    main()
