"""What commands have in common: the log on the terminal, tables, text that cannot take the terminal over."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO

from repro.masking import MaskingFormatter


def make_deterministic(environment: MutableMapping[str, str]) -> None:
    """Set what XLA needs on a GPU to compute the same bits in every run; before JAX starts."""
    from repro.run.settings import DETERMINISTIC

    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()


def start_logging(*, quiet: bool = False) -> None:
    """Log to the terminal around the progress bars, and quieten what the libraries say about their own future."""
    # transformers would import PyTorch where it is installed, for seconds and nothing.
    os.environ.setdefault("USE_TORCH", "0")
    from tqdm import tqdm

    class Terminal(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(self.format(record), file=sys.stderr)

    logger = logging.getLogger("repro")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers and not quiet:
        terminal = Terminal()
        terminal.setFormatter(MaskingFormatter())
        logger.addHandler(terminal)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()


def printable(text: str, stream: TextIO) -> str:
    """Escape what would not be seen as it is: control characters, line breaks, what the stream cannot encode."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    encoding = stream.encoding or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def print_metrics(metrics: Mapping[str, float], facts: Mapping[str, Any]) -> None:
    """Print a run's metrics and, of its facts, how long training took, as far as it trained."""
    speed = {name: facts[name] for name in ("train_seconds", "train_rows_per_second") if name in facts}
    print("\nmetric")
    for name, value in {**metrics, **speed}.items():
        print(f"  {name:28} {value:>12.4f}")
    print()
