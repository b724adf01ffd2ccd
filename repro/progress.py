"""Progress bars, on a terminal and in a notebook; a file, which would keep each state of a bar, gets none."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm


def progress_bar(iterable: Any = None, *, progress: bool, **settings: Any) -> Any:
    """Make a bar, or none, with tqdm's settings, of which `unit` is one, such as "image", or "B"."""
    if settings.get("unit", "B") != "B":
        settings["unit"] = f" {settings['unit']}s"
    shown = progress and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    return tqdm(iterable, disable=not shown, **settings)


@contextmanager
def waiting(what: str, *, progress: bool = True) -> Iterator[None]:
    """Log what is begun, and until the block ends show the seconds of what has no steps to count."""
    if progress:
        logging.getLogger("repro").info(what)
    with progress_bar(progress=progress, bar_format="  {elapsed}", leave=False) as clock:
        done = threading.Event()

        def tick() -> None:
            while not done.wait(1):
                clock.refresh()

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
