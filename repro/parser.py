"""How every command reads its flags: one parser, and the numbers that a flag takes."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import tomllib
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from repro.errors import InputError
from repro.limits import local_path

COLUMN_OF_HELP = 34
# What transformers' HfArgumentParser reads as true and as false.
TRUTHS, FALSEHOODS = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
# NumPy, JAX and XLA count with int32.
LARGEST = 2**31 - 1
# What stands for a value in the help: by its type, or by the last word of the flag's name.
METAVARS = {bool: "BOOL", int: "N", float: "X", "dir": "FOLDER", "path": "MODEL"}


@dataclass(frozen=True)
class Numbers:
    """The numbers that a flag takes: finite ones between two ends, which are two of them unless they are left out."""

    least: float = 0
    most: float = LARGEST
    without: tuple[float, ...] = ()
    whole: bool = False

    def __contains__(self, value: float) -> bool:
        inside = math.isfinite(value) and self.least <= value <= self.most and value not in self.without
        return inside and not (self.whole and value % 1)

    def __str__(self) -> str:
        low = f"{'above' if self.least in self.without else 'at least'} {self.least}"
        high = f"{'below' if self.most in self.without else 'at most'} {self.most}"
        return f"{'a whole number, ' * self.whole}{low} and {'finite' if math.isinf(self.most) else high}"


class Checked:
    """A dataclass of flags; every number in it is one that its flag takes, and no text an address but the Hub's ids."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            allowed, value = field.metadata.get("allowed"), getattr(self, field.name)
            if isinstance(value, str):
                object.__setattr__(self, field.name, local_path(value, f"--{field.name} "))
            if "\0" in str(value):
                raise InputError(f"--{field.name} {value!r}: holds a null character, which no name can.")
            if allowed is not None and value is not None and value not in allowed:
                raise InputError(f"--{field.name} {value}: must be {allowed}.")


class Help(argparse.HelpFormatter):
    """argparse's, which leaves paragraphs whose lines are indented as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(part if "\n  " in part else fill(part, width, indent) for part in text.split("\n\n"))


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviations, and with dashes or underscores in flags; what is wrong is an InputError."""

    def __init__(self, **settings: Any) -> None:
        shape = partial(Help, max_help_position=COLUMN_OF_HELP)
        if examples := _words()["examples"].get(settings["prog"].removeprefix("repro ")):
            lines = "\n  repro ".join(["examples:", *examples])
            settings["epilog"] = "\n\n".join(filter(None, [settings.get("epilog"), lines]))
        super().__init__(**{"allow_abbrev": False, "formatter_class": shape, **settings})
        self.register("type", Path, lambda text: Path(local_path(text)))

    def parse_known_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        end = args.index("--") if "--" in args else len(args)
        flags = [_with_underscores(arg) for arg in args[:end]]
        # Before argparse takes an unknown flag's value for something else; a subcommand's parser looks at its own.
        for arg in flags[:1] if self._subparsers else flags:
            if arg.startswith("--") and _name(arg) not in self._option_string_actions:
                raise InputError(self._unknown(_name(arg)))
        parsed, others = super().parse_known_args([*flags, *args[end:]], namespace)
        if others:
            raise InputError(self._unknown(_name(others[0])))
        return parsed, others

    def _unknown(self, name: str) -> str:
        known, bare = [flag.lstrip("-") for flag in sorted(self._option_string_actions)], name.lstrip("-")
        near = difflib.get_close_matches(bare, known, n=1)
        instead = _words()["hints"].get(bare, "")
        if instead and re.findall(r"--(\w+)", instead)[0] in known:
            return f"unknown argument {name!r}. {instead}"
        hint = f"Did you mean --{near[0]}?" if near else f"`{self.prog} --help` lists the flags."
        return f"unknown argument {name!r}. {hint}"

    def error(self, message: str) -> None:  # type: ignore[override]
        raise InputError(f"{message}. `{self.prog} --help` lists the flags.")


@cache
def _words() -> Any:
    """Hints and examples; the file says more."""
    return tomllib.loads(Path(__file__).with_name("help.toml").read_text(encoding="utf-8"))


def _name(arg: str) -> str:
    """A flag without its value, which may be a token."""
    return arg.partition("=")[0]


def _with_underscores(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else arg


def sentence(text: str) -> str:
    """Make a sentence of what the list of commands says of one."""
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def add_fields(
    parser: argparse.ArgumentParser, arguments: type, groups: Mapping[str, str] | None = None, *, hidden: bool = False
) -> None:
    """Add a dataclass's fields as flags, which are what transformers' HfArgumentParser makes of them.

    One that the parser has already is left as it is; one that is not given has no value in what is parsed.

    Args:
        groups: titles of the help's parts, by the first field of each.
        hidden: leave them out of the help.
    """
    groups = groups or {}
    types, place = get_type_hints(arguments), parser
    for field in fields(arguments):
        if field.name in groups:
            place = parser.add_argument_group(groups[field.name])  # type: ignore[assignment]
        if f"--{field.name}" in parser._option_string_actions:
            continue
        kind = next(of for of in (*get_args(types[field.name]), types[field.name]) if of is not type(None))
        word = field.name.rpartition("_")[2]
        text = field.metadata["help"]
        if field.default is not None and field.default is not False and "default:" not in text:
            text = f"{text.removesuffix('.')} (default: {str(field.default).lower()})."
        settings: dict[str, Any] = {
            "type": kind,
            "default": SUPPRESS,
            "choices": field.metadata.get("choices"),
            "required": field.metadata.get("required", False),
            "help": SUPPRESS if hidden else text,
        }
        if kind is bool:
            settings |= {"type": _truth, "nargs": "?", "const": True}
        if not settings["choices"]:
            shown = field.metadata.get("metavar") or METAVARS.get(kind)
            settings["metavar"] = shown or METAVARS.get(word, word.upper())
        place.add_argument(f"--{field.name}", **settings)
        if field.default is True:
            text = SUPPRESS if hidden else f"the same as --{field.name} false"
            place.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", default=SUPPRESS, help=text)


def _truth(text: str) -> bool:
    if text.lower() not in TRUTHS + FALSEHOODS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in TRUTHS
