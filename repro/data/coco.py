"""COCO captions from the official folders or zip files, one row per annotation."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repro.data.rows import Rows, make_rows
from repro.errors import InputError

SPLIT_NAMES = {"train": "train", "validation": "val", "test": "test"}
DOWNLOADS = "http://images.cocodataset.org"


def read_coco(data_dir: str | Path, year: str = "2017", splits: Sequence[str] = tuple(SPLIT_NAMES)) -> dict[str, Rows]:
    """Read the asked-for splits of COCO captions, in the order of the annotation file.

    Images and annotations may each be unpacked (`val2017/`, `annotations/`) or in the official zips; nothing is
    unpacked. The test split has one row per image and no captions.

    Args:
        data_dir: the folder that holds them.
        splits: of `train`, `validation`, `test`.

    Raises:
        InputError: the folder, an annotation file or the images of a split are missing.
    """
    folder = Path(data_dir)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise InputError(
            f"--data_dir {folder}: is {'empty' if folder.is_dir() else 'not a folder'}; put COCO's zip files from"
            f" {DOWNLOADS} there (`repro data coco --data_dir {folder}` does), or the folders unpacked from them."
        )
    return {split: _read_split(folder.resolve(), year, split) for split in splits}


def _read_split(folder: Path, year: str, split: str) -> Rows:
    part = SPLIT_NAMES[split] + year
    is_test = split == "test"
    member = f"annotations/{'image_info' if is_test else 'captions'}_{part}.json"
    archive = f"image_info_{part}.zip" if is_test else f"annotations_trainval{year}.zip"
    content = _read_annotations(folder, member, archive)
    prefix, suffix = _locate_images(folder, part)
    images = {image["id"]: image for image in content["images"]}
    annotations = content.get("annotations", [])
    if is_test:
        annotations = [{"image_id": image_id, "id": None, "caption": None} for image_id in images]

    table: dict[str, list[Any]] = {
        name: [] for name in ("row", "image_id", "caption_id", "caption", "height", "width", "file_name", "image_path")
    }
    dropped = []
    for row, annotation in enumerate(annotations):
        image = images.get(annotation["image_id"])
        if image is None:
            dropped.append(
                {
                    "split": split,
                    "row": row,
                    "image_path": None,
                    "caption": annotation["caption"],
                    "reason": f"image_id {annotation['image_id']} is not among the images",
                }
            )
            continue
        file_name = image["file_name"]
        values = (
            row,
            image["id"],
            annotation["id"],
            annotation["caption"],
            image.get("height"),
            image.get("width"),
            file_name,
            f"{prefix}{file_name}{suffix}",
        )
        for column, value in zip(table.values(), values, strict=True):
            column.append(value)
    return make_rows(table, split=split, source=member, dropped=dropped)


def _read_annotations(folder: Path, member: str, archive: str) -> dict[str, Any]:
    path, zipped = folder / member, folder / archive
    try:
        if path.is_file():
            content = json.loads(path.read_bytes())
        elif zipped.is_file():
            with zipfile.ZipFile(zipped) as opened:
                content = json.loads(opened.read(member))
        else:
            raise InputError(
                f"{path}: the annotation file is missing, and so is {archive}; get"
                f" {DOWNLOADS}/annotations/{archive} and leave it in {folder}."
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path if path.is_file() else zipped}: cannot be read ({error}); get {archive} again."
        ) from error
    if not isinstance(content, dict) or "images" not in content:
        raise InputError(f"{path}: is not a COCO file: it has no list of images.")
    return content


def _locate_images(folder: Path, part: str) -> tuple[str, str]:
    """Find a split's images: what stands before and after a file name in an image path."""
    if (folder / part).is_dir():
        return f"{folder / part}/", ""
    if (folder / f"{part}.zip").is_file():
        return f"zip://{part}/", f"::{folder / part}.zip"
    raise InputError(
        f"{folder / part}: the images are missing, and so is {part}.zip; get"
        f" {DOWNLOADS}/zips/{part}.zip and leave it in {folder}."
    )
