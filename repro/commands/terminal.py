"""What commands have in common: the log on the terminal, tables, text that cannot take the terminal over."""

from __future__ import annotations

import importlib
import logging
import os
import re
import shlex
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit
from urllib.request import getproxies

from repro.masking import MaskingFormatter
from repro.progress import waiting

# Green, red or yellow, as ANSI numbers them.
COLOURS = {"PASS": 32, "FAIL": 31, "CANNOT TELL": 33, "error:": 31, "stopped:": 31}


def make_deterministic() -> None:
    """Set what XLA needs on a GPU to compute the same bits in every run; before JAX starts."""
    from repro.run.settings import DETERMINISTIC

    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()


def leave_tpus_alone() -> None:
    """Keep JAX and libtpu from looking for a TPU, and for the server that tells of one; before JAX starts."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v3-8"}
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # beside another process that compiles
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # what is compiled for another machine cannot be read back


def stay_offline_without_hub(*names: str | None) -> None:
    """Spare a user the libraries' retries where a model is no folder and the Hub cannot be reached: use the cache.

    Before transformers is imported, which looks at the environment then.
    """
    if "HF_HUB_OFFLINE" in os.environ or getproxies() or all(name is None or Path(name).exists() for name in names):
        return
    hub = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((hub.hostname or "", hub.port or 443), timeout=1).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def start_logging(
    first: str = "", *, quiet: bool = False, models: Iterable[str | None] = (), imports: Iterable[str] = ()
) -> None:
    """Log to the terminal around the progress bars, and quieten what the libraries say about their own future.

    Args:
        first: is said at once.
        quiet: do not log to the terminal.
        models: that are to be read.
        imports: modules that take seconds to import, which is done here, under a clock.
    """
    # transformers would import PyTorch where it is installed, for seconds and nothing.
    os.environ.setdefault("USE_TORCH", "0")
    from tqdm import tqdm

    class Terminal(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            # Around the bars of a terminal; elsewhere tqdm would write each bar once more with every message.
            write = tqdm.write if sys.stderr.isatty() else print
            write(self.format(record), file=sys.stderr)
            sys.stderr.flush()

    logger = logging.getLogger("repro")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers and not quiet:
        terminal = Terminal()
        terminal.setFormatter(MaskingFormatter())
        logger.addHandler(terminal)
    with waiting(first, progress=bool(first) and not quiet):
        stay_offline_without_hub(*models)
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        for module in imports:
            importlib.import_module(module)


def printable(text: str, stream: TextIO) -> str:
    """Escape what would not be seen as it is: control characters, line breaks, what the stream cannot encode."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    encoding = stream.encoding or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def coloured(text: str, stream: TextIO) -> str:
    """Colour verdicts and errors on a terminal, unless `NO_COLOR` is set (https://no-color.org)."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    words = r"\b(?:PASS|FAIL|CANNOT TELL)\b|^(?:error|stopped):"
    return re.sub(words, lambda found: f"\033[{COLOURS[found[0]]}m{found[0]}\033[0m", text, flags=re.M)


def figures(metrics: Mapping[str, float]) -> Iterator[str]:
    """Lay an evaluation's metrics out, a line each: counts whole, and what no caption has mentioned as such."""
    from repro.record.metrics import name_of

    for name, value in metrics.items():
        mentions = name.replace("_accuracy", "_mentions")
        shown = "n/a" if mentions != name and metrics.get(mentions) == 0 else value
        yield f"  {name_of(name):28} {f'{shown:.4f}' if isinstance(shown, float) else shown:>11}"


def print_end(folder: Path, facts: Mapping[str, Any], run: Path) -> None:
    """Print how long a finished run took, where its report and its last model are, and what to do next.

    Args:
        folder: as the user knows it; `run` is its run's.
        facts: the content of `run.json`.
    """
    from repro.record.writer import REPORT, models_in

    took = [f"{facts['seconds'] / 60:.1f} minutes"] if "seconds" in facts else []
    took += [f"{facts['train_rows_per_second']:.0f} rows/s in training"] if "train_rows_per_second" in facts else []
    print(f"\n{', '.join(took)}; written to {folder}")
    if (folder / REPORT).exists():
        print(f"report: {folder / REPORT}")
    if models := models_in(run):
        print(f"model:  {models[-1]}\nnext:   repro caption {shlex.quote(str(models[-1]))} PHOTO")
