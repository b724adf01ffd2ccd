"""WebDataset shards: tar files in which members whose names begin alike are a sample, an image with its texts.

Images stay where they are: a row refers to the place of its image's bytes in the shard.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import groupby
from typing import Any

from repro import limits
from repro.data.images import TAR
from repro.errors import InputError
from repro.json_files import parse

FIELDS = 64  # of a sample; beyond that, names that belong to several begin alike


def read_shards(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Give the samples: under its ending each text, image and `json`, as `json.KEY` the values of that object.

    `image` is the reference of the first image, whatever its ending, and `__name__` the name of its member; it is None
    where there is no image, and absent where all have further names (`a.1.jpg`). An image a second time is the first.

    Raises:
        InputError: a shard is missing, damaged or compressed, or its names do not tell samples apart.
    """
    first_place: dict[bytes, str] = {}
    key = None
    for path in paths:
        try:
            opened = limits.BoundedReads(limits.open_file(path, limits.LIST_BYTES))
            with opened, tarfile.open(fileobj=opened, mode="r:") as shard:
                for key, members in groupby(_files(shard), lambda member: _split(member.name)[0]):
                    yield _sample(os.path.abspath(path), shard, key, members, first_place)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise InputError(f"{path}: cannot be read as tar: {error}; shards are not compressed.") from error
    if key is None:
        raise InputError(f"{paths[0]}: is empty; it needs an image and a text for each sample.")


def _files(shard: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while member := shard.next():
        shard.members.clear()  # type: ignore[attr-defined]  # it would grow with the shard
        if member.isreg() and not member.issparse():
            yield member


def _split(name: str) -> tuple[str, str]:
    """Tell a member's sample from its field, which begins behind the first dot of its last part."""
    folder, base = os.path.split(name)
    stem, _, field = base.partition(".")
    return os.path.join(folder, stem), field.lower()


def _sample(
    path: str, shard: tarfile.TarFile, key: str, members: Iterator[tarfile.TarInfo], first_place: dict[bytes, str]
) -> dict[str, Any]:
    sample, has_image = dict[str, Any](__key__=key), False
    for number, member in enumerate(members):
        field, opened = _split(member.name)[1], shard.extractfile(member)
        if number == FIELDS:
            raise InputError(
                f"{path}: more than {FIELDS} members are one sample, {key!r}, for a sample's name ends at the first dot"
                f" of {member.name!r}; name them otherwise, such as {member.name.replace('.', '_', 1)!r}."
            )
        assert opened is not None, "it is a file"
        if f".{field.rpartition('.')[2]}" in limits.IMAGE_SUFFIXES:
            here = f"{TAR}{member.offset_data}/{member.size}::{path}"
            content = opened.read(limits.IMAGE_BYTES + 1)  # a larger one is left out when it is opened
            sample[field] = first_place.setdefault(blake2b(content, digest_size=16).digest(), here)
            has_image = True
            if "." not in field and "image" not in sample:
                sample |= {"image": sample[field], "__name__": member.name}
        elif field == "json":
            found = parse(opened.read(limits.bounded(member.size, limits.RECORD_CHARACTERS)))
            sample |= {f"json.{name}": value for name, value in found.items()} if isinstance(found, dict) else {}
        else:  # what is longer or not UTF-8 drops its row, where it is a caption
            sample[field] = opened.read(4 * limits.CAPTION_CHARACTERS + 4).decode("utf-8", "surrogateescape")
    # Of several images (`a.1.jpg`, `a.2.jpg`) the user says which is meant.
    return sample if has_image else sample | {"image": None}
