"""The rows of a split as every source yields them: checked as they come, kept in an Arrow file on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset

from repro.data.atomic import build_once
from repro.errors import InputError
from repro.limits import CAPTION_CHARACTERS, DROPPED_CHARACTERS

SCHEMA = pyarrow.schema(
    {"row": pyarrow.int64(), "image_path": pyarrow.string(), "image_id": pyarrow.string(), "caption": pyarrow.string()}
)
CHUNK = 10_000  # rows held in memory at once

# What a source reads: its row (counted from 0), image_path, image_id, caption (or a list of them), a reason to drop it.
Row = dict[str, Any]
Dropped = dict[str, Any]  # a row that was left out: split, row (counted from 0 as read), image_path, caption, reason


@dataclass(frozen=True)
class Rows:
    """A split, one row for each caption."""

    dataset: Dataset  # columns `row` (as read), `image_path` (see `repro.data.images`), `image_id`, `caption`
    dropped: list[Dropped]  # rows that are not in it


def make_rows(records: Iterable[Row], *, split: str, source: str, file: Path, rebuild: str | None = None) -> Rows:
    """Check records one by one and make a split of them.

    A caption that is null, not text, or not valid Unicode, drops its row. The test split needs no captions.

    Args:
        records: not touched where the file is there already, as it was written.
        file: where the split is kept; it appears there whole or not at all.
        rebuild: a run's own name, to read again what another run has put into the file; None to take it as it is.

    Raises:
        InputError: no row is left, or the file cannot be written.
    """
    build = partial(_write, records=records, split=split, source=source)
    dropped = build_once(file, f"the rows of {source}", build, rebuild=rebuild)
    return Rows(Dataset.from_file(str(file)), dropped)


def column(dataset: Dataset, name: str) -> Iterator[Any]:
    """Iterate over a column's values without holding all of them."""
    for batch in dataset.select_columns([name]).with_format("arrow").iter(CHUNK):
        yield from batch[name].to_pylist()


def _write(file: Path, records: Iterable[Row], split: str, source: str) -> list[Dropped]:
    dropped: list[Dropped] = []
    kept: list[Row] = []
    num_kept = listed = 0
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, SCHEMA) as writer:
        for record in records:
            for row in _checked(record, split):
                if "reason" in row:
                    names = ("row", "image_path", "caption", "reason")
                    dropped.append({"split": split, **{name: row.get(name) for name in names}})
                    listed += len(json.dumps(dropped[-1]))
                    if listed > DROPPED_CHARACTERS:
                        raise InputError(
                            f"{source}: {len(dropped)} rows cannot be used, more than can be listed; the first was"
                            f" dropped because {dropped[0]['reason']}."
                        )
                else:
                    kept.append(row)
                    num_kept += 1
            if len(kept) >= CHUNK:
                writer.write_batch(pyarrow.RecordBatch.from_pylist(kept, SCHEMA))
                kept.clear()
        writer.write_batch(pyarrow.RecordBatch.from_pylist(kept, SCHEMA))
    if not num_kept:
        first = f"; the first was dropped because {dropped[0]['reason']}" if dropped else ""
        raise InputError(f"{source}: no row is left for the {split} split{first}.")
    return dropped


def _checked(record: Row, split: str) -> Iterator[Row]:
    """Give a record's rows, one for each of its captions, with a reason where one cannot be used."""
    captions = record["caption"]
    for caption in (captions or [None]) if isinstance(captions, list) else [captions]:
        reason = record.get("reason") or _fault(caption, record["image_path"], split)
        yield {**record, "caption": caption} | ({} if reason is None else {"reason": reason})


def _fault(caption: Any, image_path: Any, split: str) -> str | None:
    if image_path is None:
        return "it has no image"
    if caption is None and split != "test":
        return "it has no caption"
    if caption is not None and not isinstance(caption, str):
        return f"its caption is {type(caption).__name__}, not text"
    if caption and len(caption) > CAPTION_CHARACTERS:
        return f"its caption has {len(caption):,} characters; at most {CAPTION_CHARACTERS:,} are read"
    for what, text in (("caption", caption or ""), ("image's path", image_path)):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"its {what} is not valid Unicode ({error.reason})"
    return None
