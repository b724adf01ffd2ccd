"""csv, tsv, json and jsonl files as records, read one by one.

Arrow, and so the datasets library, refuses a whole file for one value of another type; here its row is dropped.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import ijson

from repro.errors import InputError
from repro.json_files import parse
from repro.limits import LIST_BYTES, RECORD_CHARACTERS, CheckedJson, Lines, open_file

SEPARATORS = {".csv": ",", ".tsv": "\t"}
FORMATS = (*SEPARATORS, ".json", ".jsonl")
BOM = b"\xef\xbb\xbf"
# Numbers as 64 bits hold them, a larger one is an error. Otherwise the parser in C makes Python's integers of any
# length, does not see that Python refuses one of more than 4300 digits, and ends the process (ijson 3.6).
EXACT = {"use_float": True}


def read_file(path: str) -> Iterator[dict[str, Any]]:
    """Read the objects of a csv, tsv, json (a list of objects, or one under "data") or jsonl file.

    Raises:
        InputError: the file is missing, empty or malformed.
    """
    file = Path(path)
    if file.suffix in SEPARATORS:
        records = _separated(file, SEPARATORS[file.suffix])
    elif file.suffix == ".jsonl" or (prefix := json_prefix(file)) is None:
        records = _lines(file)
    else:
        records = _items(file, prefix)
    place = -1
    try:
        for place, record in enumerate(records):
            if not isinstance(record, dict):
                raise ValueError(f"row {place} is {type(record).__name__}, not an object")
            yield record
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not UTF-8 (byte {error.object[error.start]:#04x} after row {place}); save it as UTF-8, for"
            f" example `iconv -f latin1 -t utf-8 {file.name}`."
        ) from error
    except (OSError, ValueError, csv.Error, ijson.JSONError) as error:
        raise InputError(f"{path}: cannot be read as {file.suffix[1:]}: {one_line(error)}") from error
    if place < 0:
        raise InputError(f"{path}: is empty; it needs one object for each caption.")


def open_json(file: Path, list_depth: int = 2) -> CheckedJson:
    """Open a file behind its byte order mark, if it has one."""
    opened = open_file(file, LIST_BYTES)
    if opened.read(len(BOM)) != BOM:
        opened.seek(0)
    return CheckedJson(opened, list_depth)


def _open_text(file: Path, newline: str) -> TextIOWrapper:
    return TextIOWrapper(open_file(file, LIST_BYTES), "utf-8-sig", newline=newline)


def stream(opened: CheckedJson, prefix: str) -> Iterator[Any]:
    """Parse the values at a place of a JSON file, one after another."""
    return ijson.items(opened, prefix, **EXACT)


def one_line(error: Exception) -> str:
    """What a parser says, without the drawing under it."""
    return " ".join(str(error).split())


def json_prefix(file: Path) -> str | None:
    """Find where a json file has its list: `item` or the name of a list in one object; None where lines are objects.

    COCO's annotation files have `annotations.item`, Karpathy's splits `images.item`.

    Raises:
        InputError: the file is not JSON.
    """
    lists = []
    try:
        with open_json(file) as opened:
            for prefix, event, _ in ijson.parse(opened, multiple_values=True, **EXACT):
                if event == "start_array" and prefix in ("", "data", "annotations"):
                    return f"{prefix}.item".lstrip(".")
                if event == "start_array" and prefix == "images":
                    lists.append(prefix)
                if event == "end_map" and prefix == "":
                    break
    except (OSError, ValueError, ijson.JSONError) as error:
        raise InputError(f"{file}: cannot be read as json: {one_line(error)}") from error
    return f"{lists[0]}.item" if lists else None


def _separated(file: Path, separator: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(RECORD_CHARACTERS)
    with _open_text(file, newline="") as opened:
        lines = Lines(opened)
        reader = csv.reader(lines, delimiter=separator, strict=True)
        header = next(reader, None)
        if header is None:
            return
        for values in reader:
            lines.taken = 0
            if not values:
                continue
            if len(values) != len(header):
                raise ValueError(
                    f"line {reader.line_num} has {len(values)} fields, the header {len(header)}; put values that"
                    " contain the separator or a line break in double quotes"
                )
            # Only an empty cell is null: "NA" and "null" are words that a caption may be.
            yield {name: value or None for name, value in zip(header, values, strict=True)}


def _lines(file: Path) -> Iterator[Any]:
    with _open_text(file, newline="\n") as opened:
        lines = Lines(opened)
        for number, line in enumerate(lines, start=1):
            lines.taken = 0
            if line.strip():
                try:
                    yield parse(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error


def _items(file: Path, prefix: str) -> Iterator[Any]:
    with open_json(file, prefix.count(".") + 1) as opened:
        yield from stream(opened, prefix)
