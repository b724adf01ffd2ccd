"""Where rows come from: COCO, csv and json files, data sets of the Hub or in its layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
from datasets import Dataset, DatasetDict, load_dataset

from repro.data.coco import read_coco
from repro.data.rows import Rows, make_rows
from repro.errors import InputError

COCO_NAMES = ("ydshieh/dummy_coco_dataset", "ydshieh/coco_dataset_script")
COCO_YEARS = ("2017",)
IMAGE_COLUMNS = ("image_path", "image", "file_name", "filename", "path")
CAPTION_COLUMNS = ("caption", "text", "sentence", "description")
FILE_FORMATS = (".csv", ".json", ".jsonl")


def load_splits(
    *,
    splits: Sequence[str],
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    data_dir: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    test_file: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Rows]:
    """Load the asked-for splits (`train`, `validation`, `test`) from what the flags name.

    Relative image paths are taken as they are where such a file exists, else relative to the file that names them.

    Raises:
        InputError: a source, a split or a column is missing, or a caption is null.
    """
    if dataset_name in COCO_NAMES:
        if (dataset_config_name or COCO_YEARS[0]) not in COCO_YEARS:
            raise InputError(
                f"--dataset_config_name {dataset_config_name}: the built-in COCO reader knows {', '.join(COCO_YEARS)}."
            )
        if data_dir is None:
            raise InputError(f"--dataset_name {dataset_name} needs --data_dir with the COCO files.")
        return read_coco(data_dir, dataset_config_name or COCO_YEARS[0], splits)
    columns = (image_column, caption_column)
    if dataset_name is not None:
        loaded = _load_dataset(
            dataset_name,
            dataset_config_name,
            data_dir,
            cache_dir=cache_dir,
            token=token,
            trust_remote_code=trust_remote_code,
        )
        missing = [split for split in splits if split not in loaded]
        if missing:
            raise InputError(
                f"--dataset_name {dataset_name}: has no split {missing[0]!r}, only {', '.join(map(repr, loaded))}."
            )
        base = Path(data_dir or dataset_name)
        return {split: _select(_columns(loaded[split]), split, dataset_name, base, *columns) for split in splits}
    files = {"train": train_file, "validation": validation_file, "test": test_file}
    result = {}
    for split in splits:
        path = files[split]
        if path is None:
            raise InputError(f"no {split} rows: give --{split}_file, or --dataset_name.")
        result[split] = _select(read_file(path), split, path, Path(path).parent, *columns)
    return result


def read_file(path: str) -> dict[str, list[Any]]:
    """Read a csv, json (a list of objects, or one under "data") or jsonl file as columns.

    JSON is read row by row rather than through Arrow, which refuses a whole file for one value of another type.

    Raises:
        InputError: the file is missing, empty, of another format or malformed.
    """
    file = Path(path)
    if file.suffix not in FILE_FORMATS:
        raise InputError(f"{path}: cannot tell the format; name it {', '.join(FILE_FORMATS)}.")
    if not file.is_file():
        raise InputError(f"{path}: there is no such file.")
    try:
        records = _csv_records(file) if file.suffix == ".csv" else _json_records(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as {file.suffix[1:]}: {error}") from error
    if not records:
        raise InputError(f"{path}: is empty; it needs one object for each caption.")
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _csv_records(file: Path) -> list[dict[str, Any]]:
    # Only an empty cell is null: "NA" and "null" are words that a caption may be.
    frame = pandas.read_csv(
        file, dtype=str, keep_default_na=False, na_values=[""], encoding="utf-8-sig", index_col=False
    )
    return frame.astype(object).where(frame.notna(), None).to_dict(orient="records")


def _json_records(file: Path) -> list[dict[str, Any]]:
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".jsonl" or not text.lstrip().startswith(("[", "{\n", '{"data"')):
        records = [json.loads(line) for line in text.split("\n") if line.strip()]
    else:
        content = json.loads(text)
        records = content.get("data", [content]) if isinstance(content, dict) else content
    for place, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"row {place} is {type(record).__name__}, not an object")
    return records


def _load_dataset(name: str, config: str | None, data_dir: str | None, **hub: Any) -> DatasetDict:
    hub.pop("trust_remote_code")  # datasets runs no code of data sets since 4.0
    try:
        loaded = load_dataset(name, config, data_dir=data_dir, **hub)
    except Exception as error:  # datasets and huggingface_hub raise dozens of kinds
        raise InputError(
            f"--dataset_name {name}: cannot be loaded. A Hub id needs a network; otherwise give a"
            f" folder, or --train_file and --validation_file. ({type(error).__name__}: {error})"
        ) from error
    return loaded


def _columns(dataset: Dataset) -> dict[str, list[Any]]:
    return {name: list(dataset[name]) for name in dataset.column_names}


def _select(
    columns: dict[str, list[Any]],
    split: str,
    source: str,
    folder: Path,
    image_column: str | None,
    caption_column: str | None,
) -> Rows:
    images = columns[_column("image", image_column, IMAGE_COLUMNS, columns, source)]
    captions: list[Any] = [None] * len(images)
    if split != "test" or caption_column in columns or set(CAPTION_COLUMNS) & set(columns):
        captions = columns[_column("caption", caption_column, CAPTION_COLUMNS, columns, source)]
    unusable = [value for value in images if not isinstance(value, str)]
    if unusable:
        raise InputError(
            f"{source}: the image column holds {type(unusable[0]).__name__}; it must hold paths of image files."
        )
    table = {
        "row": list(range(len(images))),
        "image_id": images,
        "image_path": [_resolve(path, folder) for path in images],
        "caption": captions,
    }
    return make_rows(table, split=split, source=source, dropped=[])


def _column(what: str, name: str | None, usual: Sequence[str], columns: dict[str, list[Any]], source: str) -> str:
    found = ", ".join(map(repr, columns))
    if name is not None:
        if name not in columns:
            raise InputError(f"--{what}_column {name!r}: {source} has the columns {found}.")
        return name
    candidates = [column for column in usual if column in columns]
    if len(candidates) != 1:
        raise InputError(f"{source}: which column holds the {what}s? Give --{what}_column; there are {found}.")
    return candidates[0]


def _resolve(path: str, folder: Path) -> str:
    try:
        return path if Path(path).exists() else str(folder / path)
    except (OSError, ValueError):  # NUL, or a name too long: decoding will say so
        return path
