"""Files that are there whole or not at all, whoever else writes them at the same time; and what is in them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from repro.errors import InputError


@contextmanager
def whole_file(file: Path, content: str) -> Iterator[Path]:
    """Give the path to write to; it becomes the file when the block is left.

    Args:
        content: what it is, for the error message.

    Raises:
        InputError: it cannot be written.
    """
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(file)
    except OSError as error:
        raise InputError(
            f"{file}: {content} cannot be kept there ({error}); make room or mend it, or name another folder with"
            " --cache_dir."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def sha256_of(file: Path) -> str:
    """Hash a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
