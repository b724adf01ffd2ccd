"""csv, tsv, txt, json and jsonl files, and folders of images with captions beside them, as records, one by one.

Arrow, and so the datasets library, refuses a whole file for one value of another type; here its row is dropped.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from io import TextIOWrapper
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import ijson

from repro import limits
from repro.errors import InputError
from repro.json_files import parse
from repro.limits import IMAGE_SUFFIXES, LIST_BYTES, RECORD_CHARACTERS, CheckedJson, Lines, open_file

SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": ","}
OTHER_SEPARATORS = ",;\t|"  # of spreadsheets, Flickr30k, open_clip: where a header has not its file's own
FORMATS = (*SEPARATORS, ".json", ".jsonl")
BOM = b"\xef\xbb\xbf"
# Numbers as 64 bits hold them, a larger one is an error. Otherwise the parser in C makes Python's integers of any
# length, does not see that Python refuses one of more than 4300 digits, and ends the process (ijson 3.6).
EXACT = {"use_float": True}


def read_records(path: str) -> Iterator[dict[str, Any]]:
    """Read the objects of a csv, tsv, txt, json (a list of objects, or one under "data") or jsonl file, or of a folder.

    Raises:
        InputError: the file is missing, empty or malformed.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if file.is_dir():
        records, suffix = _sidecars(file), ".txt"
    elif suffix in SEPARATORS:
        records = _separated(file, SEPARATORS[suffix])
    elif suffix == ".jsonl" or (prefix := json_prefix(file)) is None:
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
        raise InputError(f"{path}: cannot be read as {suffix[1:]}: {one_line(error)} (row {place + 1})") from error
    if place < 0:
        raise InputError(f"{path}: is empty; it needs one object for each caption.")


def open_json(file: Path, list_depth: int = 2) -> CheckedJson:
    """Open a file behind its byte order mark, if it has one."""
    opened = open_file(file, LIST_BYTES)
    if opened.read(len(BOM)) != BOM:
        opened.seek(0)
    return CheckedJson(opened, list_depth)


def stream(opened: CheckedJson, prefix: str) -> Iterator[Any]:
    """Parse the values at a place of a JSON file, one after another."""
    return ijson.items(opened, prefix, **EXACT)


def one_line(error: Exception) -> str:
    """What a parser says, without the drawing under it."""
    text = " ".join(str(error).split())
    return f"{text}; write null for NaN and Infinity, which JSON has not" if re.search("NaN|Infinity", text) else text


def json_prefix(file: Path) -> str | None:
    """Find where a json file has its list: `item` or the name of a list in one object; None where lines are objects.

    COCO's annotation files have `annotations.item`, Karpathy's splits `images.item`; what is not JSON, an InputError.
    """
    found = None
    try:
        with open_json(file) as opened:
            for prefix, event, _ in ijson.parse(opened, multiple_values=True, **EXACT):
                if event == "start_array" and prefix in ("", "data", "annotations"):
                    return f"{prefix}.item".lstrip(".")
                if event == "start_array" and prefix == "images":
                    found = "images.item"
                if event == "end_map" and prefix == "":
                    break
    except (OSError, ValueError, ijson.JSONError) as error:
        raise InputError(f"{file}: cannot be read as json: {one_line(error)}") from error
    return found


def _separated(file: Path, separator: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(RECORD_CHARACTERS)
    with TextIOWrapper(open_file(file, LIST_BYTES), "utf-8-sig", newline="") as opened:
        lines = Lines(opened)
        first = next(lines, "")
        if separator not in first:
            separator = max(OTHER_SEPARATORS, key=first.count)
        reader = csv.reader(chain([first], lines), delimiter=separator, strict=True)
        names = next(reader, [])
        header = [name.strip() for name in names]
        for values in reader:
            lines.taken = 0
            if len(values) > len(header):
                raise ValueError(
                    f"line {reader.line_num} has {len(values)} fields, the header {len(header)}; put values that"
                    f" contain the separator {separator!r} or a line break in double quotes"
                )
            if header != names:  # blanks around the separators, as in Flickr30k's results.csv
                values = [value.strip() for value in values]
            # Only an empty or missing cell is null: "NA" and "null" are words that a caption may be.
            if values:
                yield {name: value or None for name, value in zip_longest(header, values)}


def _sidecars(folder: Path) -> Iterator[dict[str, Any]]:
    """Give each image below a folder, and its captions: the lines of the text file of its name."""
    files = [file for file in sorted(folder.rglob("*")) if "/." not in f"/{file.relative_to(folder)}"]  # hidden ones
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    images = {file: file.with_suffix("") for file in files if file.suffix.lower() in IMAGE_SUFFIXES}
    for image, stem in images.items():
        content = limits.read_file(texts[stem], RECORD_CHARACTERS) if stem in texts else b""
        lines = content.decode("utf-8-sig", "surrogateescape").splitlines()  # what is not UTF-8 drops its row
        yield {"image": str(image.relative_to(folder)), "caption": [line.strip() for line in lines if line.strip()]}
    for stem in sorted(texts.keys() - images.values()):
        yield {"image": None, "caption": texts[stem].name}


def _lines(file: Path) -> Iterator[Any]:
    with TextIOWrapper(open_file(file, LIST_BYTES), "utf-8-sig", newline="\n") as opened:
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
