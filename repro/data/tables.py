"""What the datasets library loads: Hub ids, data-set folders, image folders, parquet, WebDataset shards.

Images that are embedded are not copied out: a row refers to its place in the library's own Arrow file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk

from repro.data.images import ARROW, content_digest
from repro.data.limits import LIST_BYTES, size_of
from repro.data.rows import Record
from repro.errors import InputError

BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
SAVED = ("dataset_dict.json", "state.json")


def load_hub(name: str, config: str | None, data_dir: str | None, **hub: Any) -> DatasetDict:
    """Load a data set by its Hub id or from a folder, also one that `save_to_disk` wrote.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        if any((Path(name) / file).is_file() for file in SAVED):
            loaded = load_from_disk(name)
        else:
            loaded = load_dataset(name, config, data_dir=data_dir, **hub)
    except Exception as error:  # datasets and huggingface_hub raise dozens of kinds
        raise InputError(
            f"--dataset_name {name}: cannot be loaded. A Hub id needs a network; otherwise give a"
            f" folder, or --train_file and --validation_file. ({type(error).__name__}: {error})"
        ) from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)


def load_files(files: Sequence[str], *, cache_dir: str | None) -> Dataset:
    """Load parquet files or WebDataset shards.

    Raises:
        InputError: they cannot be read.
    """
    try:
        for file in files:
            size_of(file, LIST_BYTES)
        return load_dataset(
            BUILDERS[Path(files[0]).suffix], data_files={"train": list(files)}, split="train", cache_dir=cache_dir
        )
    except Exception as error:
        raise InputError(f"{files[0]}: cannot be read ({type(error).__name__}: {error}).") from error


def image_columns(dataset: Dataset) -> list[str]:
    """Name the columns that hold images by their type: the library's own, or bytes."""
    found = []
    for name, feature in dataset.features.items():
        kind = dataset.data.schema.field(name).type
        is_struct = pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if isinstance(feature, Image) or is_struct or _is_binary(kind):
            found.append(name)
    return found


def read_table(dataset: Dataset, image_column: str, caption_column: str | None) -> Iterator[Record]:
    """Give a data set's records; the same image, embedded twice, is one."""
    first_place: dict[bytes, str] = {}
    names = [name for name in (image_column, caption_column) if name is not None]
    row = 0
    for cached in dataset.cache_files:
        in_file = 0
        with pyarrow.memory_map(os.path.abspath(cached["filename"])) as file:
            for batch in pyarrow.ipc.open_stream(file):
                images, *captions = (batch.column(name) for name in names)
                for place in range(len(batch)):
                    value = images[place].as_py()
                    name = value.get("path") if isinstance(value, dict) else value
                    content = value.get("bytes") if isinstance(value, dict) else value
                    reference: Any = name
                    if isinstance(content, bytes):
                        here = f"{ARROW}{in_file}/{image_column}::{os.path.abspath(cached['filename'])}"
                        reference = first_place.setdefault(content_digest(content), here)
                    yield {
                        "row": row,
                        "image_path": reference,
                        "image_id": name if isinstance(name, str) else reference,
                        "caption": captions[0][place].as_py() if captions else None,
                    }
                    row += 1
                    in_file += 1


def _is_binary(kind: Any) -> bool:
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))
