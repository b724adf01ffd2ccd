"""The rows of a split as every source yields them, and which of them cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from repro.errors import InputError

Dropped = dict[str, Any]
"""A row that was left out: split, row (counted from 0 as read), image_path, caption, reason."""


@dataclass(frozen=True)
class Rows:
    """A split.

    Attributes:
        dataset: columns `row` (as read), `image_path`, `image_id`, `caption`, and what else the source has.
        dropped: rows that are not in it.
    """

    dataset: Dataset
    dropped: list[Dropped]


def make_rows(table: dict[str, list[Any]], *, split: str, source: str, dropped: list[Dropped]) -> Rows:
    """Check the captions of a table of columns and make a split of it.

    A caption that is not text, or not valid Unicode, drops its row. The test split needs no captions.

    Raises:
        InputError: a caption is null, where captions are learned from or scored, or no row is left.
    """
    kept: list[int] = []
    dropped = list(dropped)
    for place, caption in enumerate(table["caption"]):
        if caption is None and split != "test":
            raise InputError(
                f"{source}: row {table['row'][place]} (counted from 0) has the caption null; give it"
                " a caption or take the row out of the file."
            )
        reason = None if caption is None else _fault(caption)
        if reason is None:
            kept.append(place)
        else:
            dropped.append(
                {
                    "split": split,
                    "row": table["row"][place],
                    "image_path": table["image_path"][place],
                    "caption": caption,
                    "reason": reason,
                }
            )
    if not kept:
        raise InputError(
            f"{source}: no row is left for the {split} split"
            + (f"; the first was dropped because {dropped[0]['reason']}." if dropped else ".")
        )
    columns = {name: [values[place] for place in kept] for name, values in table.items()}
    return Rows(Dataset.from_dict(columns), dropped)


def _fault(caption: Any) -> str | None:
    if not isinstance(caption, str):
        return f"its caption is {type(caption).__name__}, not text"
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"its caption is not valid Unicode ({error.reason})"
    return None
