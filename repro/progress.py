"""Progress bars, on a terminal and in a notebook; a file, which would keep each state of a bar, gets none."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(iterable: Any = None, *, progress: bool, **settings: Any) -> Any:
    """Make a bar with tqdm's settings.

    Args:
        progress: False for none.
        settings: tqdm's; `unit` is one, such as "image", or "B".
    """
    if settings.get("unit", "B") != "B":
        settings["unit"] = f" {settings['unit']}s"
    shown = progress and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    return tqdm(iterable, disable=not shown, **settings)
