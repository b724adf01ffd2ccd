"""Scenes of coloured shapes, drawn and captioned by rule.

A caption can only be learned by looking: what it states is drawn at random for every scene.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

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
BACKGROUNDS: dict[str, RGB] = {"white": (248, 248, 248), "grey": (160, 160, 160), "black": (15, 15, 15)}
SIZES: dict[str, float] = {"big": 0.20, "small": 0.14}  # radius, in image sides
POSITIONS: dict[str, Point] = {  # centre, in image sides
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
    "centre": (0.5, 0.5),  # of scenes with a single object
}
JITTER = 0.045  # how far an object's centre may lie from that of its position, in image sides
MAX_OBJECTS = 4
GROUP_WEIGHTS = (0.4, 0.6)  # how often a scene has 1 or 2 groups of like objects

# How captions speak of it.
COUNT_WORDS: dict[str, int] = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
SIZE_WORDS: dict[str, tuple[str, ...]] = {"big": ("big", "large"), "small": ("small", "little")}
PLACE_PHRASES: dict[frozenset[str], tuple[str, ...]] = {
    frozenset({"top"}): ("at the top", "in the top half"),
    frozenset({"bottom"}): ("at the bottom", "in the bottom half"),
    frozenset({"left"}): ("on the left", "on the left side"),
    frozenset({"right"}): ("on the right", "on the right side"),
    frozenset({"centre"}): ("in the middle", "in the centre"),
    **{frozenset(name.split()): (f"in the {name}", f"in the {name} corner") for name in POSITIONS if name != "centre"},
}
RELATIONS: dict[str, tuple[str, str]] = {  # the sides on which the first and the second group lie
    **dict.fromkeys(("above", "over"), ("top", "bottom")),
    **dict.fromkeys(("below", "under"), ("bottom", "top")),
    "to the left of": ("left", "right"),
    "to the right of": ("right", "left"),
}
ANY_SHAPE = ("shapes", "objects")
OPENINGS = ("", "", "there {be}", "a picture of", "an image of", "we see", "the picture shows")
SIZE_RATE, PLACE_RATE, BACKGROUND_RATE = 0.5, 0.5, 0.3  # how often a caption mentions them
CAPTIONS_PER_SCENE = 5
MAX_WORDS = 18  # of a caption, a comma counted as one

SUPERSAMPLING = 4  # drawn this much larger, then averaged down: smooth edges


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
        return frozenset({(self.background,), *((i.shape, i.colour, i.size, i.position) for i in self.objects)})

    def in_words(self) -> str:
        """All that the scene holds, for people to read."""
        things = (f"{i.size} {i.colour} {i.shape} {i.position}" for i in self.objects)
        return f"{', '.join(things)}; {self.background} background"

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
        (left, top), radius = item.centre, SIZES[item.size]
        corners = [(side * (left + radius * x), side * (top + radius * y)) for x, y in SHAPES[item.shape]]
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
