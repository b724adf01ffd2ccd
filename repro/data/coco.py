"""COCO captions: the official folders or zip files, and other files in COCO's or Karpathy's layout.

Annotations are streamed: of a file of any size, only the names of its images are in memory.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import ijson

from repro.data.files import one_line, open_json, stream
from repro.data.images import ZIP, find_member, open_zip
from repro.data.rows import Row
from repro.errors import InputError
from repro.json_files import checked, keys, optional
from repro.limits import LIST_BYTES, NAMED_BYTES, CheckedJson, Refused

SPLIT_NAMES = {"train": "train", "validation": "val", "test": "test"}
LAYOUTS = ("annotations.item", "images.item")
KARPATHY_SPLITS = {"train": ("train", "restval"), "validation": ("val",), "test": ("test",)}
DOWNLOADS = "http://images.cocodataset.org"
YEARS = ("2017", "2014")
# What reading a zip raises where its content or its encryption forbids it.
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
PROBED = 1000  # images that are looked for before a folder is given up: some may be missing
REMEDY = "Give the folder that this path begins in as --data_dir."
NAME_BYTES = 200  # that a name takes, and its number, besides its characters

Id = int | float | str
COCO_IMAGE = keys(id=Id, file_name=str)
ANNOTATION = keys(image_id=Id, caption=Any)
SENTENCES = list[keys(raw=Any)]  # type: ignore[valid-type,misc]
OPTIONAL = optional(filepath=str | None, cocoid=Id, imgid=Id)
KARPATHY_IMAGE = keys(split=str, filename=str, sentences=SENTENCES, **OPTIONAL)


def check_folder(data_dir: str | Path) -> Path:
    """Give the absolute path of a folder of COCO's files; an InputError if there is none, or it is empty."""
    folder = Path(data_dir)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise InputError(
            f"--data_dir {folder}: is {'empty' if folder.is_dir() else 'not a folder'}; put COCO's zip files from"
            f" {DOWNLOADS} there (`repro data coco --data_dir {folder}` does), or the folders unpacked from them."
        )
    return folder.resolve()


def annotation_file(folder: Path, year: str, split: str) -> tuple[Path, str]:
    """Find a split's official annotations, the file or zip and the name inside; an InputError if they are missing."""
    part, is_test = SPLIT_NAMES[split] + year, split == "test"
    member = f"annotations/{'image_info' if is_test else 'captions'}_{part}.json"
    archive = f"image_info_{part}.zip" if is_test else f"annotations_trainval{year}.zip"
    for file in (folder / member, folder / archive):
        if file.is_file():
            return file, member
    raise InputError(
        f"{folder / member}: the annotation file is missing, and so is {archive}; get"
        f" {DOWNLOADS}/annotations/{archive} and leave it in {folder}."
    )


def read_official(folder: Path, year: str, split: str) -> Iterator[Row]:
    """Read a split in the official layout, in the order of its annotations.

    Images and annotations may each be unpacked (`val2017/`, `annotations/`) or in the official zips; nothing is
    unpacked. The test split has one record an image and no captions.

    Raises:
        InputError: the annotations or the images are missing, or not COCO's.
    """
    file, member = annotation_file(folder, year, split)
    part = SPLIT_NAMES[split] + year
    remedy = f"Get {DOWNLOADS}/zips/{part}.zip and leave it in {folder}."
    return _records(file, member, _ImageFinder(file, [folder], part, remedy), has_captions=split != "test")


def read_annotations(file: Path, layout: str, split: str, folders: Sequence[Path]) -> Iterator[Row]:
    """Read a file in COCO's layout, or a split of one in Karpathy's, where each image has its sentences.

    Args:
        layout: where the file has its list, of `LAYOUTS`.
        folders: in which the images are looked for, and in zips there.

    Raises:
        InputError: the file is in neither layout, or no image is found.
    """
    has_captions = layout == "annotations.item"
    if not has_captions:
        with _opened(file, "") as opened:
            first = next(stream(opened, "images.item"), None)
        if isinstance(first, dict) and "sentences" in first:
            return _karpathy_records(file, split, folders)
    part = file.stem.removeprefix("captions_").removeprefix("image_info_")
    return _records(file, "", _ImageFinder(file, folders, part), has_captions=has_captions)


def _karpathy_records(file: Path, split: str, folders: Sequence[Path]) -> Iterator[Row]:
    finder = _ImageFinder(file, folders, "")
    with _opened(file, "") as opened:
        for value in stream(opened, "images.item"):
            image = checked(value, KARPATHY_IMAGE)
            if image["split"] not in KARPATHY_SPLITS[split]:
                continue
            name = "/".join(filter(None, (image.get("filepath"), image["filename"])))
            found = {"image_path": finder.find(name), "image_id": str(image.get("cocoid", image.get("imgid", name)))}
            for sentence in image["sentences"]:
                yield {**found, "caption": sentence["raw"]}
    finder.check()


def _records(file: Path, member: str, finder: _ImageFinder, *, has_captions: bool) -> Iterator[Row]:
    names: dict[Any, str] = {}
    ambiguous: dict[Any, str] = {}
    held = 0
    with _opened(file, member) as opened:
        for value in stream(opened, "images.item"):
            image = checked(value, COCO_IMAGE)
            other = names.setdefault(image["id"], image["file_name"])
            held += len(other) + NAME_BYTES
            if held > NAMED_BYTES:
                raise Refused(f"names more than {len(names):,} images")
            if other != image["file_name"]:
                ambiguous[image["id"]] = f"image_id {image['id']} is both {other} and {image['file_name']}"
    if not names:
        raise InputError(f"{file}: is not a COCO file: it has no list of images.")
    any(finder.find(name) and finder.found for name in islice(names.values(), PROBED))
    finder.check()
    if not has_captions:
        for image_id, name in names.items():
            yield {"image_path": finder.find(name), "image_id": str(image_id), "caption": None}
        return
    with _opened(file, member) as opened:
        for value in stream(opened, "annotations.item"):
            annotation = checked(value, ANNOTATION)
            image_id, caption = annotation["image_id"], annotation["caption"]
            record = {"image_path": None, "image_id": str(image_id), "caption": caption}
            if image_id not in names:
                yield record | {"reason": f"image_id {image_id} is not among the images"}
            elif image_id in ambiguous:
                yield record | {"reason": ambiguous[image_id]}
            else:
                yield record | {"image_path": finder.find(names[image_id])}


@contextmanager
def _opened(file: Path, member: str) -> Iterator[CheckedJson]:
    """Open an annotation file, or its member if it is a zip; what is wrong with its content is told by its name."""
    try:
        if file.suffix == ".zip":
            archive = open_zip(str(file))
            opened = CheckedJson(archive.open(find_member(archive, member, LIST_BYTES)))
        else:
            opened = open_json(file)
        with opened:
            yield opened
    except (OSError, ValueError, KeyError, ijson.JSONError, *DAMAGED_ZIP) as error:
        raise InputError(f"{file}: cannot be read ({one_line(error)}); mend it, or get it again.") from error


class _ImageFinder:
    """Finds where the images of a file lie: in one of some folders, or in a folder or zip there of the split's name."""

    def __init__(self, source: Path, folders: Sequence[Path], part: str, remedy: str = REMEDY) -> None:
        self._source, self._folders, self._part, self._remedy = source, folders, part, remedy
        self._listed: dict[str, set[str]] = {}
        self._missed = ""
        self.found = False

    def find(self, name: str) -> str:
        """Give an image's reference; of one that is nowhere, the path where it was looked for first."""
        if os.path.isabs(name):
            return name
        references = [*self._candidates(name)]
        if "\\" in name:  # as Windows writes it
            references += self._candidates(name.replace("\\", "/"))
        there = next(filter(self._is_there, references), None)
        self.found |= there is not None
        self._missed = self._missed or name * (there is None)
        return there or references[0]

    def check(self) -> None:
        """Raise an InputError if images were looked for and none was found."""
        if self._missed and not self.found:
            raise InputError(
                f"{self._source}: its images are not to be found, the first being {self._missed}; looked in"
                f" {', '.join(map(str, self._folders))}, and in folders and zips there of the split's name."
                f" {self._remedy}"
            )

    def _candidates(self, name: str) -> Iterator[str]:
        top = name.rpartition("/")[0]
        part = top.split("/")[0] or self._part
        for folder in self._folders:
            if part and not top:
                yield f"{folder / part}/{name}"
            yield f"{folder}/{name}"
            if part:
                yield f"{ZIP}{'' if top else f'{part}/'}{name}::{folder / part}.zip"

    def _is_there(self, reference: str) -> bool:
        packed = reference.startswith(ZIP)
        name, _, place = reference.removeprefix(ZIP).partition("::") if packed else reference.rpartition("/")[::-1]
        if place not in self._listed:
            self._listed[place] = set()
            with suppress(OSError, *DAMAGED_ZIP):
                self._listed[place] = set(open_zip(place).namelist() if packed else os.listdir(place))
        return name in self._listed[place]
