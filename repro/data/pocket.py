"""Scenes of coloured shapes, drawn and captioned by rule, written in the layout of COCO 2017.

A caption can only be learned by looking: what it states (shape, colour, size, count, position,
background) is drawn at random for every scene, and is kept in a side file to check captions with.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL
from PIL import Image, ImageDraw

from repro.errors import InputError

Point = tuple[float, float]
RGB = tuple[int, int, int]


def _star(points: int, inner: float) -> tuple[Point, ...]:
    """Corners of a star of radius 1 that points upwards; `inner` is the radius of its notches."""
    return tuple(
        (radius * math.sin(angle), -radius * math.cos(angle))
        for corner in range(2 * points)
        for radius, angle in [((1.0, inner)[corner % 2], math.pi * corner / points)]
    )


# What a scene may hold. Shapes are outlines in units of their radius, y downwards.
SHAPES: dict[str, tuple[Point, ...]] = {
    "circle": _star(24, 1.0),
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)),
    "star": _star(5, 0.45),
}
COLOURS: dict[str, RGB] = {
    "red": (220, 30, 30),
    "green": (20, 150, 50),
    "blue": (40, 70, 230),
    "yellow": (245, 215, 20),
    "purple": (140, 40, 170),
    "orange": (250, 130, 20),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (248, 248, 248),
    "grey": (160, 160, 160),
    "black": (15, 15, 15),
}
SIZES: dict[str, float] = {"big": 0.20, "small": 0.11}  # radius, in image sides
POSITIONS: dict[str, Point] = {  # centre, in image sides
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
    "centre": (0.5, 0.5),  # of scenes with a single object
}
JITTER = 0.045  # how far an object's centre may lie from that of its position, in image sides
MAX_OBJECTS = 4
GROUP_WEIGHTS = (0.3, 0.55, 0.15)  # how often a scene has 1, 2, 3 groups of like objects

# How captions speak of it.
COUNT_WORDS: dict[str, int] = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
SIZE_WORDS: dict[str, tuple[str, ...]] = {"big": ("big", "large"), "small": ("small", "little")}
PLACE_PHRASES: dict[frozenset[str], tuple[str, ...]] = {
    frozenset({"top"}): ("at the top", "in the top half"),
    frozenset({"bottom"}): ("at the bottom", "in the bottom half"),
    frozenset({"left"}): ("on the left", "on the left side"),
    frozenset({"right"}): ("on the right", "on the right side"),
    frozenset({"centre"}): ("in the middle", "in the centre"),
    **{
        frozenset(name.split()): (f"in the {name}", f"in the {name} corner")
        for name in POSITIONS
        if name != "centre"
    },
}
RELATIONS: dict[str, tuple[str, str]] = {  # the sides on which the first and the second group lie
    "above": ("top", "bottom"),
    "over": ("top", "bottom"),
    "below": ("bottom", "top"),
    "under": ("bottom", "top"),
    "to the left of": ("left", "right"),
    "to the right of": ("right", "left"),
}
ANY_SHAPE = ("shapes", "objects")
OPENINGS = ("", "", "there {be}", "a picture of", "an image of", "we see", "the picture shows")
SIZE_RATE, PLACE_RATE, BACKGROUND_RATE = 0.5, 0.5, 0.3  # how often a caption mentions them
CAPTIONS_PER_SCENE = 5
MAX_WORDS = 18  # of a caption, a comma counted as one

YEAR = 2017
SUPERSAMPLING = 4  # drawn this much larger, then averaged down: smooth edges
JPEG_QUALITY = 95
MIN_IMAGE_SIZE = 16


@dataclass(frozen=True)
class Item:
    """One object of a scene; `centre` is where it is drawn, in image sides from the top left."""

    shape: str
    colour: str
    size: str
    position: str
    centre: Point


@dataclass(frozen=True)
class Scene:
    """Objects on a plain background; objects of the same shape and colour have the same size."""

    objects: tuple[Item, ...]
    background: str

    def attributes(self) -> frozenset[tuple[str, ...]]:
        """All that captions can state of the scene: two scenes are the same if this is equal."""
        seen = {(item.shape, item.colour, item.size, item.position) for item in self.objects}
        return frozenset({(self.background,), *seen})

    def groups(self) -> list[list[Item]]:
        """The objects by shape and colour, in the order of their first one."""
        grouped: dict[tuple[str, str], list[Item]] = {}
        for item in self.objects:
            grouped.setdefault((item.shape, item.colour), []).append(item)
        return list(grouped.values())


def sample_scene(rng: random.Random) -> Scene:
    """A random scene of 1 to `MAX_OBJECTS` objects in groups of the same shape and colour."""
    num_groups = rng.choices(range(1, len(GROUP_WEIGHTS) + 1), GROUP_WEIGHTS)[0]
    num_objects = rng.randint(num_groups, MAX_OBJECTS)
    cuts = sorted(rng.sample(range(1, num_objects), num_groups - 1))
    kinds = rng.sample([(shape, colour) for shape in SHAPES for colour in COLOURS], num_groups)
    free = [name for name in POSITIONS if num_objects == 1 or name != "centre"]
    positions = rng.sample(free, num_objects)
    items: list[Item] = []
    for (shape, colour), start, stop in zip(kinds, [0, *cuts], [*cuts, num_objects], strict=True):
        size = rng.choice(list(SIZES))
        for position in positions[start:stop]:
            x, y = (round(at + rng.uniform(-JITTER, JITTER), 3) for at in POSITIONS[position])
            items.append(Item(shape, colour, size, position, (x, y)))
    return Scene(tuple(items), rng.choice(list(BACKGROUNDS)))


def draw_scene(scene: Scene, image_size: int) -> Image.Image:
    """The scene as an RGB picture of `image_size` pixels a side."""
    side = image_size * SUPERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(image)
    for item in scene.objects:
        radius = SIZES[item.size]
        corners = [
            (side * (item.centre[0] + radius * x), side * (item.centre[1] + radius * y))
            for x, y in SHAPES[item.shape]
        ]
        pen.polygon(corners, fill=COLOURS[item.colour])
    return image.reduce(SUPERSAMPLING)


def describe_scene(scene: Scene, rng: random.Random) -> list[str]:
    """`CAPTIONS_PER_SCENE` different captions that name every object, and state nothing false."""
    captions: dict[str, None] = {}  # a set that keeps the order, which must not vary between runs
    while len(captions) < CAPTIONS_PER_SCENE:
        caption = _caption(scene, rng)
        if len(caption.replace(",", " ,").split()) <= MAX_WORDS:
            captions[caption] = None
    return list(captions)


def _caption(scene: Scene, rng: random.Random) -> str:
    groups = scene.groups()
    rng.shuffle(groups)
    form = rng.choice((_listed, _listed, _placed_first, _related, _counted))
    body = form(groups, rng)
    if body is None:  # the form does not fit this scene
        form, body = _listed, _listed(groups, rng)
    if form is not _placed_first:
        singular = body.split()[0] in ("a", "an", "one")
        opening = rng.choice(OPENINGS).format(be="is" if singular else "are")
        body = f"{opening} {body}".strip()
    if rng.random() < BACKGROUND_RATE:
        ground = f"{rng.choice(('on', 'against'))} a {scene.background} background"
        body = f"{ground} {body}" if body.startswith(("there", "we")) else f"{body} {ground}"
    return body


def _noun_phrase(group: Sequence[Item], rng: random.Random) -> str:
    words = [group[0].colour, group[0].shape + "s" * (len(group) > 1)]
    if rng.random() < SIZE_RATE:
        words.insert(0, rng.choice(SIZE_WORDS[group[0].size]))
    article = "an" if words[0][0] in "aeiou" else "a"
    numerals = [word for word, value in COUNT_WORDS.items() if value == len(group)]
    count = article if len(group) == 1 and rng.random() < 0.8 else numerals[-1]
    return " ".join([count, *words])


def _sides(group: Sequence[Item]) -> frozenset[str]:
    """The sides of the picture on which the whole group lies."""
    return frozenset.intersection(*(frozenset(item.position.split()) for item in group))


def _place(group: Sequence[Item], rng: random.Random) -> str | None:
    phrases = PLACE_PHRASES.get(_sides(group))
    return rng.choice(phrases) if phrases else None


def _listed(groups: Sequence[Sequence[Item]], rng: random.Random) -> str:
    """NP [place], NP [place] and NP [place]."""
    phrases = [_noun_phrase(group, rng) for group in groups]
    places = [_place(group, rng) for group in groups]
    if rng.random() < PLACE_RATE and places[0]:
        # A place after the last phrase alone could be read as the place of all of them.
        told = len(groups) if all(places) and rng.random() < 0.5 else 1
        phrases[:told] = [f"{phrases[i]} {places[i]}" for i in range(told)]
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))


def _counted(groups: Sequence[Sequence[Item]], rng: random.Random) -> str | None:
    """N shapes, NP and NP."""
    if len(groups) == 1:
        return None
    total = sum(len(group) for group in groups)
    count = next(word for word, value in COUNT_WORDS.items() if value == total)
    listed = " and ".join(_noun_phrase(group, rng) for group in groups)
    return f"{count} {rng.choice(ANY_SHAPE)}, {listed}"


def _placed_first(groups: Sequence[Sequence[Item]], rng: random.Random) -> str | None:
    """Place is NP and place are NP."""
    places = [_place(group, rng) for group in groups]
    if not all(places):
        return None
    be = rng.choice(("{be}", "there {be}"))
    return " and ".join(
        f"{where} {be.format(be='are' if len(group) > 1 else 'is')} {_noun_phrase(group, rng)}"
        for where, group in zip(places, groups, strict=True)
    )


def _related(groups: Sequence[Sequence[Item]], rng: random.Random) -> str | None:
    """NP above NP, or: NP with NP above it."""
    if len(groups) != 2:
        return None
    first, second = _sides(groups[0]), _sides(groups[1])
    wordings = [words for words, (a, b) in RELATIONS.items() if a in first and b in second]
    if not wordings:
        return None
    relation = rng.choice(wordings)
    subject, reference = (_noun_phrase(group, rng) for group in groups)
    if rng.random() < 0.7:
        return f"{subject} {relation} {reference}"
    return f"{reference} with {subject} {relation} {'them' if len(groups[1]) > 1 else 'it'}"


def render_pocket(
    data_dir: str | Path,
    *,
    num_train: int,
    num_val: int,
    num_test: int = 0,
    image_size: int,
    seed: int,
) -> None:
    """Write scenes, captions and true attributes as a COCO 2017 folder, unless it is there already.

    No validation or test scene occurs in the training split. The folder appears whole or not at
    all; one that was rendered with other settings is replaced.

    Args:
        data_dir: the folder, with `pocket.json` (the settings), `{train,val,test}2017/*.jpg` and
            `annotations/{captions,scenes}_*2017.json`, for the test split `image_info` instead.
        num_train: images of the training split.
        num_val: images of the validation split.
        num_test: images of the test split, which has no captions; with 0 there is none.
        image_size: side of the pictures, in pixels.
        seed: the same seed gives the same bytes.

    Raises:
        InputError: a number is too small, or `data_dir` holds something else.
    """
    if num_train < 1 or num_val < 1 or num_test < 0 or image_size < MIN_IMAGE_SIZE:
        raise InputError(
            f"cannot render {num_train} training, {num_val} validation and {num_test} test images "
            f"of {image_size} pixels; ask for at least 1, 1 and 0 images of {MIN_IMAGE_SIZE} pixels"
        )
    target = Path(data_dir).absolute()
    num_images = {"train": num_train, "val": num_val, "test": num_test}
    settings = {
        **num_images,
        "image_size": image_size,
        "seed": seed,
        "source": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "pillow": PIL.__version__,
    }
    marker = target / "pocket.json"
    if marker.is_file() and json.loads(marker.read_text()) == settings:
        return
    if target.exists() and not marker.is_file() and (target.is_file() or any(target.iterdir())):
        raise InputError(
            f"{target} holds something other than rendered scenes, and is left as it is; "
            "name a new or an empty folder"
        )
    building = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        (building / "annotations").mkdir(parents=True)
        rng = random.Random(seed)
        first_image_id = 1
        for split, scenes in _sample_splits(num_images, rng).items():
            if scenes:
                _write_split(building, split, scenes, first_image_id, image_size, rng)
            first_image_id += len(scenes)
        _write_json(building / "pocket.json", settings)
        if target.exists():
            shutil.rmtree(target)
        building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def read_scenes(data_dir: str | Path, split: str) -> dict[int, Scene]:
    """The true scenes of a rendered split ("train", "val" or "test"), by COCO image id."""
    path = Path(data_dir) / "annotations" / f"scenes_{split}{YEAR}.json"
    return {
        row["image_id"]: Scene(
            tuple(Item(**{**item, "centre": tuple(item["centre"])}) for item in row["objects"]),
            row["background"],
        )
        for row in json.loads(path.read_text())
    }


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
    folder: Path,
    split: str,
    scenes: Sequence[Scene],
    first_image_id: int,
    image_size: int,
    rng: random.Random,
) -> None:
    """Write a split's pictures, and its annotations in COCO's order: not grouped by image."""
    (folder / f"{split}{YEAR}").mkdir()
    images: list[dict[str, Any]] = []
    captions: list[tuple[int, str]] = []
    for image_id, scene in enumerate(scenes, first_image_id):
        file_name = f"{image_id:012d}.jpg"
        draw_scene(scene, image_size).save(
            folder / f"{split}{YEAR}" / file_name, quality=JPEG_QUALITY, subsampling=0
        )
        images.append(
            {
                "license": 1,
                "file_name": file_name,
                "height": image_size,
                "width": image_size,
                "id": image_id,
            }
        )
        captions += [(image_id, caption) for caption in describe_scene(scene, rng)]
    rng.shuffle(captions)
    first_caption_id = (first_image_id - 1) * CAPTIONS_PER_SCENE + 1
    header = {
        "info": {"description": "Rendered scenes in the COCO 2017 layout", "year": YEAR},
        "licenses": [{"id": 1, "name": "Public domain", "url": ""}],
        "images": images,
    }
    annotations = [
        {"image_id": image_id, "id": caption_id, "caption": caption}
        for caption_id, (image_id, caption) in enumerate(captions, first_caption_id)
    ]
    truth = [
        {"image_id": image["id"], **asdict(scene)}
        for image, scene in zip(images, scenes, strict=True)
    ]
    folder = folder / "annotations"
    if split == "test":
        _write_json(folder / f"image_info_test{YEAR}.json", {**header, "categories": []})
    else:
        _write_json(folder / f"captions_{split}{YEAR}.json", {**header, "annotations": annotations})
    _write_json(folder / f"scenes_{split}{YEAR}.json", truth)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")
