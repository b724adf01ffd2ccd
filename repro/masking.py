"""Secrets: the flags that hold them, and the one place that masks them in all that is printed, logged or written."""

from __future__ import annotations

import logging
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from types import TracebackType

SECRET_FLAGS = ("token", "hub_token")
MASK = "***"
# A shorter value is no token, and would be found within ordinary words.
SHORTEST = 8
# Tokens, passwords in addresses, and what signed addresses are signed with.
SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/\s@]+@"
    r"|(?i:(?<=[?&])([\w-]*(?:sig|token|key|credential|secret|password)[\w-]*=))[^&\s'\"<>)]+"
)

_known: set[str] = set()


def learn(*secrets: str | None) -> None:
    """Mask these texts from now on, wherever they come up."""
    _known.update(secret for secret in secrets if secret and len(secret) >= SHORTEST)


def learn_flags(argv: Sequence[str]) -> None:
    """Mask the secrets on a command line from now on."""
    learn(*(argv[place][start:] for place, start in _secrets_in(argv)))


def masked(text: str) -> str:
    """Replace every secret that is known or looks like one."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return SHAPES.sub(lambda found: (found[1] or "") + MASK, text)


def masked_command(argv: Sequence[str]) -> str:
    """Write a process's arguments as a shell takes them, without secrets and without the program's folder."""
    program, shown = PurePath(argv[0]), list(argv)
    shown[0] = program.parent.name if program.name == "__main__.py" else program.name
    for place, start in _secrets_in(argv):
        shown[place] = shown[place][:start] + MASK
    return masked(shlex.join(shown))


def _secrets_in(argv: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Find the arguments that hold secrets, and where these begin in them."""
    for place, arg in enumerate(argv):
        name, equals, _ = arg.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_") in SECRET_FLAGS:
            if equals:
                yield place, len(name) + 1
            elif place + 1 < len(argv) and not argv[place + 1].startswith("--"):
                yield place + 1, 0


class MaskingFormatter(logging.Formatter):
    """Masks a message with its arguments and its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Take `sys.excepthook`'s place."""
    print(masked("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
