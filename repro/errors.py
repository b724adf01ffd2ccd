"""What ends a run: input that cannot be used, a run that cannot go on, a signal."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_FULL_TEXTS = ("no space left", "disk quota exceeded", "file too large")


class InputError(Exception):
    """A flag, file or row cannot be used.

    The message names the value and says what to do; the command line prints it alone, without a traceback.
    """


class RunStopped(Exception):
    """The run cannot go on, and what it has saved is whole; the message says why, and how to continue."""


class Interrupted(BaseException):
    """A signal asked the run to stop, and its state is saved as far as there is one."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}: {message}")
        self.signum = signum


def is_disk_full(error: BaseException) -> bool:
    """Tell whether a library failed because nothing more can be written; some hide the system's number in a text."""
    told = isinstance(error, OSError) and error.errno in DISK_FULL
    return told or any(text in str(error).lower() for text in DISK_FULL_TEXTS)


@contextmanager
def stopping_on_full_disk(what: str) -> Iterator[None]:
    """Raise RunStopped where a block fails for want of space."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise RunStopped(
            f"the disk is full: {what} could not be written. Earlier states are whole; free some space, then go on with"
            " --resume auto."
        ) from error
