"""Where rows come from: which reader the flags mean, and where each split's rows are kept once they are read.

What the datasets library loads (Hub ids, data-set folders, image folders, parquet) is read here too;
images that are embedded are not copied out: a row refers to its place in the library's own Arrow file.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b, sha256
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk

from repro.data import coco
from repro.data.files import FORMATS, json_prefix, read_records
from repro.data.images import ARROW, EMBEDDED, image_key
from repro.data.rows import Row, Rows, make_rows
from repro.data.shards import read_shards
from repro.errors import InputError
from repro.limits import LIST_BYTES, URL_SCHEMES, local_path, size_of

COCO_NAMES = ("ydshieh/dummy_coco_dataset", "ydshieh/coco_dataset_script")
# Names that columns usually have, and after them those that open_clip, Flickr30k and img2dataset give.
IMAGE_COLUMNS = (("image_path", "image", "file_name", "filename", "path"), ("filepath", "image_name"))
CAPTION_COLUMNS = (
    ("caption", "captions", "text", "txt", "sentence", "sentences", "description"),
    ("title", "comment", "json.caption"),
)
# Of the rows that are kept on disk: to be raised when a reader gives other rows for the same file.
VERSION = 1

PARQUET, SHARDS = TABLES = ".parquet", ".tar"

Columns = tuple[str | None, str | None]  # of images and of captions, as asked for


@dataclass(frozen=True)
class _Source:
    """A split's records, unread, and what they depend on."""

    name: str
    records: Callable[[], Iterable[Row]]
    files: Sequence[Path]
    settings: tuple[Any, ...]
    folder: Path | None = None  # that relative image paths begin in, or in --data_dir


def load_splits(
    *,
    splits: Sequence[str],
    rows_dir: Path,
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
    rebuild: str | None = None,
) -> dict[str, Rows]:
    """Load the asked-for splits (`train`, `validation`, `test`) from what the flags name.

    Relative image paths begin in `data_dir`, beside the file that names them, or in the working directory.

    Args:
        rows_dir: where rows are kept once they have been read.
        cache_dir: the datasets library's.
        rebuild: see `make_rows`.

    Raises:
        InputError: a source, a split or a column is missing, or an image is on the web.
    """
    files = {"train": train_file, "validation": validation_file, "test": test_file}
    columns = (image_column, caption_column)
    loaded = {}
    if dataset_name is not None and dataset_name not in COCO_NAMES:
        loaded = load_hub(dataset_name, dataset_config_name, data_dir, cache_dir=cache_dir, token=token)

    def find(split: str) -> _Source:
        if dataset_name is None:
            return _file(files[split], split, data_dir, cache_dir, columns)
        if dataset_name in COCO_NAMES:
            return _official_coco(dataset_name, dataset_config_name or coco.YEARS[0], data_dir, split)
        if split not in loaded:
            raise InputError(
                f"--dataset_name {dataset_name}: has no split {split!r}, only {', '.join(map(repr, loaded))}."
            )
        return _table(loaded[split], split, dataset_name, Path(dataset_name), columns)

    result = {}
    for split, source in [(split, find(split)) for split in splits]:
        roots = [os.path.abspath(root) for root in (data_dir, source.folder, "") if root is not None]
        file = rows_dir / f"{_key(source, split, roots)}.arrow"
        read = partial(make_rows, split=split, source=source.name, file=file)
        kept_since = file.stat().st_mtime_ns if file.exists() else None
        result[split] = read(_located(source, roots), rebuild=rebuild)
        if kept_since and not all(map(image_key, result[split].dataset.unique("image_path"))):
            # Images may have been moved; of several processes that find the same file, one reads again.
            result[split] = read(_located(source, roots), rebuild=str(kept_since))
    return result


def _official_coco(name: str, year: str, data_dir: str | None, split: str) -> _Source:
    if year not in coco.YEARS:
        raise InputError(f"--dataset_config_name {year}: the built-in COCO reader knows {', '.join(coco.YEARS)}.")
    if data_dir is None:
        raise InputError(f"--dataset_name {name} needs --data_dir with the COCO files.")
    folder = coco.check_folder(data_dir)
    file, member = coco.annotation_file(folder, year, split)
    return _Source(member, lambda: coco.read_official(folder, year, split), [file], (year,))


def _file(path: str | None, split: str, data_dir: str | None, cache_dir: str | None, columns: Columns) -> _Source:
    if path is None:
        raise InputError(f"no {split} rows: give --{split}_file, or --dataset_name.")
    file, suffix = Path(path), Path(path).suffix.lower()
    if suffix not in (*TABLES, *FORMATS) and not file.is_dir():
        raise InputError(f"{path}: cannot tell the format; name it {', '.join((*FORMATS, *TABLES))}.")
    found = _expanded(path) if suffix in TABLES and not file.exists() else [path]
    if missing := [part for part in found if not Path(part).exists()]:
        raise InputError(f"{missing[0]}: there is no such file.")
    if suffix == PARQUET:
        return _table(_parquet(found, cache_dir), split, path, file.parent, columns)

    def records() -> Iterator[Row]:
        if suffix == SHARDS:
            return _select(read_shards(found), split, path, columns)
        layout = json_prefix(file) if suffix == ".json" and file.is_file() else None
        if layout in coco.LAYOUTS:
            folders = [*([Path(data_dir)] if data_dir else []), file.parent, file.parent.parent]
            return coco.read_annotations(file, layout, split, [folder.absolute() for folder in folders])
        return _select(read_records(path), split, path, columns)

    if file.is_dir():
        return _Source(path, records, [file, *sorted(file.rglob("*"))], columns, file)
    return _Source(path, records, [Path(part) for part in found], columns, file.parent)


def _expanded(pattern: str) -> list[str]:
    """Give the files of a pattern, whose `{000..127}` a shell has not expanded."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if braces is None:
        return sorted(glob.glob(pattern)) or [pattern]
    numbers = (f"{number:0{len(braces[1])}}" for number in range(int(braces[1]), int(braces[2]) + 1))
    return [file for number in numbers for file in _expanded(pattern.replace(braces[0], number, 1))]


def _select(records: Iterator[dict[str, Any]], split: str, source: str, columns: Columns) -> Iterator[Row]:
    """Take image and caption from the objects of a file; the first one says which columns there are."""
    first = next(records)
    inner = [name for name in first if name.startswith("json.")]
    image, caption = _found_columns(split, source, [name for name in first if name not in inner], columns, inner)
    for record in chain([first], records):
        value, text = record.get(image), record.get(caption) if caption else None
        yield {"image_path": value, "image_id": record.get("__name__") or value, "caption": text}


def _table(dataset: Dataset, split: str, source: str, folder: Path, columns: Columns) -> _Source:
    typed = image_columns(dataset)
    if columns[0] is None and len(typed) == 1:
        columns = typed[0], columns[1]
    others = (field for field in dataset.data.schema if field.name not in typed and pyarrow.types.is_struct(field.type))
    inner = [f"{field.name}.{part.name}" for field in others for part in field.type]
    image, caption = _found_columns(split, source, dataset.column_names, columns, inner)
    files = [Path(cached["filename"]) for cached in dataset.cache_files]
    return _Source(source, lambda: read_table(dataset, image, caption), files, (image, caption), folder)


def _found_columns(
    split: str, source: str, names: Sequence[str], wanted: Columns, inner: Sequence[str]
) -> tuple[str, str | None]:
    """Tell which columns hold images and captions, which may be `inner` ones, and which a test split may lack."""
    image, names = _column("image", wanted[0], IMAGE_COLUMNS, names, source), [*names, *inner]
    if split == "test" and wanted[1] not in names and set(names).isdisjoint(chain(*CAPTION_COLUMNS)):
        return image, None
    return image, _column("caption", wanted[1], CAPTION_COLUMNS, names, source)


def _column(what: str, name: str | None, usual: Sequence[Sequence[str]], names: Sequence[str], source: str) -> str:
    found = ", ".join(map(repr, names))
    if name is not None and name not in names:
        raise InputError(f"--{what}_column {name!r}: {source} has the columns {found}.")
    found_usual = ([column for column in tier if column in names] for tier in usual)
    candidates = next(filter(None, found_usual), []) if name is None else [name]
    if len(candidates) != 1:
        hint = " Images with texts beside them are read as --train_file FOLDER." if os.path.isdir(source) else ""
        raise InputError(f"{source}: which column holds the {what}s? Give --{what}_column; there are {found}.{hint}")
    return candidates[0]


def _located(source: _Source, roots: Sequence[str]) -> Iterator[Row]:
    for row, record in enumerate(source.records()):
        value, where = record["image_path"], f"{source.name}: row {row}"
        if value is not None and not isinstance(value, str):
            kind = type(value).__name__
            raise InputError(f"{where}: the image column holds {kind}; it must hold paths of image files.")
        if str(value).startswith(URL_SCHEMES):
            raise InputError(f"{where} has its image at {value}; save the images, and give the paths of their files.")
        yield record | {"row": row, "image_path": None if value is None else _place(value, roots)}


def _place(value: str, roots: Sequence[str]) -> str:
    """Turn what a list says into an image's reference; a relative path is in the first root that has it."""
    value = local_path(value) if value.startswith("file://") else value
    if value.startswith(EMBEDDED) or os.path.isabs(value):
        return value
    names = dict.fromkeys((value, value.replace("\\", "/")))  # as Windows writes it
    places = [str(Path(root, name)) for name in names for root in roots]
    return next(filter(os.path.exists, places), places[0])


def _key(source: _Source, split: str, settings: Any) -> str:
    """Hash what a split's rows depend on: the files' paths, sizes and times, the settings, the working directory."""
    stamps = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
    parts = repr((VERSION, split, stamps, source.settings, settings))
    return sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def load_hub(name: str, config: str | None, data_dir: str | None, **hub: Any) -> DatasetDict:
    """Load a data set by its Hub id or from a folder, also one that `save_to_disk` wrote; else an InputError."""
    problem = f"--dataset_name {name}: cannot be loaded. A Hub id needs a network; else give a folder, or --train_file "
    with _named(problem):
        is_saved = any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))
        loaded = load_from_disk(name) if is_saved else load_dataset(name, config, data_dir=data_dir, **hub)
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)


def _parquet(files: Sequence[str], cache_dir: str | None) -> Dataset:
    with _named(f"{files[0]}: cannot be read "):
        for file in files:
            size_of(file, LIST_BYTES)
        return load_dataset("parquet", data_files={"train": list(files)}, split="train", cache_dir=cache_dir)


@contextmanager
def _named(problem: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # datasets and huggingface_hub raise dozens of kinds
        raise InputError(f"{problem}({type(error).__name__}: {error}).") from error


def image_columns(dataset: Dataset) -> list[str]:
    """Name the columns that hold images by their type: the library's own, or bytes."""

    def holds_bytes(kind: Any) -> bool:
        is_bytes = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
        return is_bytes or (pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)

    kinds = {field.name: field.type for field in dataset.data.schema}
    return [name for name, kind in kinds.items() if isinstance(dataset.features[name], Image) or holds_bytes(kind)]


def read_table(dataset: Dataset, image_column: str, caption_column: str | None) -> Iterator[Row]:
    """Give a data set's records; the same image, embedded twice, is one. Captions may be in an object, COLUMN.KEY."""
    first_place: dict[bytes, str] = {}
    for file in (os.path.abspath(cached["filename"]) for cached in dataset.cache_files):
        with pyarrow.memory_map(file) as opened:
            table = pyarrow.ipc.open_stream(opened).read_all()
            named = table if caption_column in table.column_names else table.flatten()
            captions = named[caption_column] if caption_column else pyarrow.nulls(len(table))
            for place, (value, caption) in enumerate(zip(table[image_column], captions, strict=True)):
                image = value.as_py()
                name = content = image
                if isinstance(image, dict):
                    name, content = image.get("path"), image.get("bytes")
                reference: Any = name
                if isinstance(content, bytes):
                    here = f"{ARROW}{place}/{image_column}::{file}"
                    reference = first_place.setdefault(blake2b(content, digest_size=16).digest(), here)
                image_id = name if isinstance(name, str) else reference
                yield {"image_path": reference, "image_id": image_id, "caption": caption.as_py()}
