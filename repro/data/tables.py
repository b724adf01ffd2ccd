"""What the datasets library loads: Hub ids, data-set folders, image folders, parquet, WebDataset shards.

Images that are embedded are not copied out: a row refers to its place in the library's own Arrow file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk

from repro.data.images import ARROW
from repro.data.rows import Record
from repro.errors import InputError
from repro.limits import LIST_BYTES, size_of

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
        has_bytes = pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        is_bytes = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
        if isinstance(feature, Image) or has_bytes or is_bytes:
            found.append(name)
    return found


def read_table(dataset: Dataset, image_column: str, caption_column: str | None) -> Iterator[Record]:
    """Give a data set's records; the same image, embedded twice, is one."""
    first_place: dict[bytes, str] = {}
    row = 0
    for file in (os.path.abspath(cached["filename"]) for cached in dataset.cache_files):
        in_file = 0
        with pyarrow.memory_map(file) as opened:
            for batch in pyarrow.ipc.open_stream(opened):
                captions = batch.column(caption_column) if caption_column else pyarrow.nulls(len(batch))
                for value, caption in zip(batch.column(image_column), captions, strict=True):
                    image = value.as_py()
                    name = content = image
                    if isinstance(image, dict):
                        name, content = image.get("path"), image.get("bytes")
                    reference: Any = name
                    if isinstance(content, bytes):
                        here = f"{ARROW}{in_file}/{image_column}::{file}"
                        reference = first_place.setdefault(blake2b(content, digest_size=16).digest(), here)
                    yield {
                        "row": row,
                        "image_path": reference,
                        "image_id": name if isinstance(name, str) else reference,
                        "caption": caption.as_py(),
                    }
                    row, in_file = row + 1, in_file + 1
