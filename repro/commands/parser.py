"""A parser of flags that names the nearest one it knows, and leaves it to the command line to end."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from repro.errors import InputError


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviations; what is wrong is an InputError."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        self.check_flags(args)
        return super().parse_args(args, namespace)

    def check_flags(self, args: Sequence[str], others: Iterable[str] = ()) -> None:
        """Look for a flag that does not exist before argparse takes its value for something else.

        Args:
            others: names that are known elsewhere, without their dashes.

        Raises:
            InputError: there is one; the nearest that does exist is named.
        """
        known = self._names() | set(others)
        for arg in args[: args.index("--")] if "--" in args else args:
            name = arg.removeprefix("--").partition("=")[0]  # the value may be a token
            if arg.startswith("--") and name not in known:
                near = difflib.get_close_matches(name.replace("-", "_"), sorted(known), n=1)
                hint = f" Did you mean --{near[0]}?" if near else f" `{self.prog} --help` lists the flags."
                raise InputError(f"unknown argument {f'--{name}'!r}.{hint}")

    def error(self, message: str) -> None:  # type: ignore[override]
        raise InputError(f"{message}. `{self.prog} --help` lists the flags.")

    def _names(self) -> set[str]:
        """All flags, those of subcommands included."""
        names = {name.removeprefix("--") for name in self._option_string_actions if name.startswith("--")}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                names = names.union(*(parser._names() for parser in action.choices.values()))
        return names
