"""Rendered scenes as a data set in the layout of COCO 2017, with their true attributes in side files."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import PIL

from repro.errors import InputError
from repro.json_files import read_json, write_json
from repro.pocket import scenes as scene_rules
from repro.pocket.scenes import CAPTIONS_PER_SCENE, Scene, describe_scene, draw_scene, sample_scene
from repro.progress import progress_bar

YEAR = 2017
JPEG_QUALITY = 95


def render_pocket(
    data_dir: str | Path, *, num_train: int, num_val: int, num_test: int = 0, image_size: int, seed: int
) -> None:
    """Write scenes, captions and true attributes as a COCO 2017 folder, unless it is there already.

    No validation or test scene occurs in the training split. The folder appears whole or not at all; one that was
    rendered with other settings is replaced.

    Args:
        data_dir: the folder, with `pocket.json` (the settings), `{train,val,test}2017/*.jpg` and
            `annotations/{captions,scenes}_*2017.json`, for the test split `image_info` instead.
        num_train, num_val, num_test: images of each split; the test split has no captions, and with 0 there is none.
        image_size: side of the pictures, in pixels.
        seed: the same seed gives the same bytes.

    Raises:
        InputError: `data_dir` holds something else.
    """
    target = Path(data_dir).resolve()
    num_images = {"train": num_train, "val": num_val, "test": num_test}
    settings: dict[str, Any] = {**num_images, "image_size": image_size, "seed": seed}
    rules = b"".join(path.read_bytes() for path in (Path(__file__), Path(scene_rules.__file__)))
    settings |= {"source": hashlib.sha256(rules).hexdigest(), "pillow": PIL.__version__}  # changed rules render anew
    marker = target / "pocket.json"
    with suppress(InputError):  # one that is not there, or damaged, says nothing
        if read_json(marker, dict) == settings:
            return
    if target.exists() and not marker.is_file() and (target.is_file() or any(target.iterdir())):
        raise InputError(
            f"{target} holds something other than rendered scenes, and is left as it is; name a new or an empty folder"
        )
    building = target.with_name(f".{target.name}.{uuid4().hex}.tmp")
    try:
        (building / "annotations").mkdir(parents=True)
        rng = random.Random(seed)
        first_image_id = 1
        for split, scenes in _sample_splits(num_images, rng).items():
            if scenes:
                _write_split(building, split, scenes, first_image_id, image_size, rng)
            first_image_id += len(scenes)
        write_json(building / "pocket.json", settings, indent=None)
        if target.exists():
            shutil.rmtree(target)
        building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def read_scenes(data_dir: str | Path, split: str) -> dict[int, Scene]:
    """The true scenes of a rendered split ("train", "val" or "test"), by COCO image id."""
    path = Path(data_dir) / "annotations" / f"scenes_{split}{YEAR}.json"
    return {row["image_id"]: msgspec.convert(row, Scene) for row in json.loads(path.read_text())}


def _sample_splits(num_images: dict[str, int], rng: random.Random) -> dict[str, list[Scene]]:
    """Scenes of every split; those of validation and test differ from all others."""
    held_out: dict[frozenset[tuple[str, ...]], Scene] = {}
    while len(held_out) < num_images["val"] + num_images["test"]:
        scene = sample_scene(rng)
        held_out.setdefault(scene.attributes(), scene)
    train: list[Scene] = []
    while len(train) < num_images["train"]:
        scene = sample_scene(rng)
        if scene.attributes() not in held_out:
            train.append(scene)
    unseen = list(held_out.values())
    val, test = unseen[: num_images["val"]], unseen[num_images["val"] :]
    return {"train": train, "val": val, "test": test}


def _write_split(
    folder: Path, split: str, scenes: Sequence[Scene], first_image_id: int, image_size: int, rng: random.Random
) -> None:
    """Write a split's pictures, and its annotations in COCO's order: not grouped by image."""
    pictures = folder / f"{split}{YEAR}"
    pictures.mkdir()
    images: list[dict[str, Any]] = []
    captions: list[tuple[int, str]] = []
    drawn = progress_bar(scenes, progress=True, desc=f"rendering {split}", unit="image", leave=False)
    for image_id, scene in enumerate(drawn, first_image_id):
        name = f"{image_id:012d}.jpg"
        draw_scene(scene, image_size).save(pictures / name, quality=JPEG_QUALITY, subsampling=0)
        images.append({"license": 1, "file_name": name, "height": image_size, "width": image_size, "id": image_id})
        captions += [(image_id, caption) for caption in describe_scene(scene, rng)]
    rng.shuffle(captions)
    first_caption_id = (first_image_id - 1) * CAPTIONS_PER_SCENE + 1
    content: dict[str, Any] = {
        "info": {"description": "Rendered scenes in the COCO 2017 layout", "year": YEAR},
        "licenses": [{"id": 1, "name": "Public domain", "url": ""}],
        "images": images,
    }
    if split != "test":
        content["annotations"] = [
            {"image_id": image_id, "id": caption_id, "caption": caption}
            for caption_id, (image_id, caption) in enumerate(captions, first_caption_id)
        ]
    kind = "image_info" if split == "test" else "captions"
    write_json(folder / "annotations" / f"{kind}_{split}{YEAR}.json", content, indent=None)
    truth = [{"image_id": image_id, **asdict(scene)} for image_id, scene in enumerate(scenes, first_image_id)]
    write_json(folder / "annotations" / f"scenes_{split}{YEAR}.json", truth, indent=None)
