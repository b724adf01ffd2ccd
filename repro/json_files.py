"""JSON that may be damaged or edited: read as the form that is expected of it, or refused by its file's name.

A form is a type that msgspec knows; of an object it says which keys are looked at, and others may stand beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, TypeVar, cast
from uuid import uuid4

import msgspec

from repro.errors import InputError
from repro.limits import RECORDED_BYTES, read_file

Form = TypeVar("Form")
Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
PARTIAL = ".partial"
LONGEST_INTEGER = 19  # digits of the largest number of 64 bits; Python itself gives up at 4300


def keys(**forms: Any) -> Any:
    """The form of an object that has these keys, or may have them (`optional`)."""
    return cast(Any, TypedDict)("Object", forms)


def optional(**forms: Any) -> dict[str, Any]:
    """The forms of keys that an object may have."""
    return {name: NotRequired[form] for name, form in forms.items()}


def parse(text: str | bytes) -> Any:
    """Parse JSON, with NaN and the infinities as Python writes them; a ValueError says why it is none.

    That is also what a number of more than 64 bits ends in, and text nested too deeply.
    """
    try:
        return json.loads(text, parse_int=_integer, parse_float=_float)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def checked(value: Any, form: type[Form]) -> Form:
    """Give a value back as it is; a ValueError says where it has another form."""
    try:
        msgspec.convert(value, form)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error
    return value


def read_json(file: Path, form: type[Form], *, largest: int = RECORDED_BYTES) -> Form:
    """Read a file; an InputError if it is not there, not regular, has more bytes, or another form."""
    return _named(file, lambda: checked(parse(read_file(file, largest)), form))


def read_lines(
    file: Path, form: type[Form], *, largest: int = RECORDED_BYTES, check: Callable[[Form], object] = bool
) -> tuple[list[Form], int]:
    """Read a file of one JSON value a line: those that have the form, and how many lines have not.

    Args:
        check: raises a ValueError where a value has not the form for another reason.

    Raises:
        InputError: the file is not there, no regular file or larger, or the system cannot read it.
    """
    values: list[Form] = []
    bad = 0
    for line in _named(file, lambda: read_file(file, largest)).splitlines():
        try:
            value = checked(parse(line), form)
            check(value)
            values.append(value)
        except ValueError:
            bad += 1
    return values, bad


def write_json(path: Path, value: Any, *, indent: int | None = 4) -> None:
    """Write JSON, whole or not at all; any text round-trips, lone surrogates too (they stay escaped)."""
    # What UTF-8 has no bytes for, `backslashreplace` writes as JSON does: \udc80.
    write_whole(path, json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace"))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all, whoever else writes it."""
    # Hosts and containers that share a disk may have processes of the same id.
    partial = path.with_name(f"{path.name}.{uuid4().hex}{PARTIAL}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _named(file: Path, read: Callable[[], Form]) -> Form:
    try:
        return read()
    except FileNotFoundError as error:
        raise InputError(f"{file}: is not there.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: is damaged, or is not what its name says ({error}).") from error


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > LONGEST_INTEGER:
        raise ValueError(f"it holds a number of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"it holds the number {text[:LONGEST_INTEGER]}, which is too large")
    return value
