"""Progress bars: drawn on a terminal, a line now and then where there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0
LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_fmt}, {remaining} left"


class ProgressLines(tqdm):
    """A bar for files and pipes, which keep what is written to them: nothing of short work, else a line at a time."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        apart = SECONDS_BETWEEN_LINES
        # A fixed `miniters` keeps tqdm's own thread from drawing in between.
        settings |= {"delay": apart, "mininterval": apart, "miniters": 1, "bar_format": LINE, "leave": False}
        super().__init__(*args, **settings)

    def close(self) -> None:
        """End it; by its first line tqdm decides that there is something to wipe away, so there was none."""
        self.last_print_t = 0.0
        super().close()

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        """Write each state on a line of its own."""

        def write(state: str) -> None:
            file.write(state + "\n")
            file.flush()

        return write


def progress_bar(iterable: Any = None, *, progress: bool, lines: bool = True, **settings: Any) -> Any:
    """Make a bar with tqdm's settings.

    Args:
        progress: False for none.
        lines: also where there is no terminal.
        settings: tqdm's; `unit` is one, such as "image", or "B".
    """
    if settings.get("unit", "B") != "B":
        settings["unit"] = f" {settings['unit']}s"
    if sys.stderr.isatty() or not progress:
        return tqdm(iterable, disable=not progress, **settings)
    return ProgressLines(iterable, disable=not lines, **settings)
