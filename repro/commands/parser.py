"""A parser of flags that names the nearest one it knows, and leaves it to the command line to end."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, get_args, get_type_hints

from repro.errors import InputError

COLUMN_OF_HELP = 34
TRUTHS = {"yes": True, "true": True, "t": True, "y": True, "1": True}
FALSEHOODS = {"no": False, "false": False, "f": False, "n": False, "0": False}
"""As transformers' HfArgumentParser reads them."""
METAVARS = {bool: "BOOL", int: "N", float: "X", "dir": "FOLDER", "path": "MODEL"}
"""What stands for a value in the help: by its type, or by the last word of the flag's name."""


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviations; what is wrong is an InputError."""

    def __init__(self, **settings: Any) -> None:
        shape = partial(argparse.HelpFormatter, max_help_position=COLUMN_OF_HELP)
        super().__init__(**{"allow_abbrev": False, "formatter_class": shape, **settings})

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


def sentence(text: str) -> str:
    """Make a sentence of what the list of commands says of one."""
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def add_fields(parser: argparse.ArgumentParser, arguments: type, groups: Mapping[str, str]) -> None:
    """Add a dataclass's fields as flags, which are what transformers' HfArgumentParser makes of them.

    Args:
        groups: titles of the help's parts, by the first field of each.
    """
    types, place = get_type_hints(arguments), parser
    for field in fields(arguments):
        if field.name in groups:
            place = parser.add_argument_group(groups[field.name])  # type: ignore[assignment]
        kind = next(of for of in (*get_args(types[field.name]), types[field.name]) if of is not type(None))
        word = field.name.rpartition("_")[2]
        text = field.metadata["help"]
        if field.default is not None and field.default is not False and "default:" not in text:
            text = f"{text.removesuffix('.')} (default: {str(field.default).lower()})."
        settings: dict[str, Any] = {"type": kind, "default": field.default, "choices": field.metadata.get("choices")}
        if kind is bool:
            settings |= {"type": _truth, "nargs": "?", "const": True}
        if not settings["choices"]:
            settings["metavar"] = (
                field.metadata.get("metavar") or METAVARS.get(kind) or METAVARS.get(word, word.upper())
            )
        place.add_argument(f"--{field.name}", help=text, **settings)
        if field.default is True:
            place.add_argument(
                f"--no_{field.name}",
                dest=field.name,
                action="store_false",
                default=True,
                help=f"the same as --{field.name} false",
            )


def _truth(text: str) -> bool:
    found = (TRUTHS | FALSEHOODS).get(text.lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return found
