"""Which attributes a caption states of a rendered scene, and how many of them are true."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from repro.pocket import scenes as rules
from repro.pocket.scenes import Item, Scene

KINDS = ("colour", "shape", "count", "size", "position", "relation", "background")

_COLOURS = {*rules.COLOURS, *rules.BACKGROUNDS}
_SIZES = {word: size for size, words in rules.SIZE_WORDS.items() for word in words}
_NOUNS: dict[str, str | None] = {
    **{shape + plural: shape for shape in rules.SHAPES for plural in ("", "s")},
    **dict.fromkeys(rules.ANY_SHAPE),
}
_SIDES = {side: side for position in rules.POSITIONS for side in position.split()} | {"middle": "centre"}


def _any_of(words: Iterable[str]) -> str:
    return rf"\b(?:{'|'.join(words)})\b"


_BACKGROUND = re.compile(rf"(?:\b(?:on|against) )?(?:\ba )?({_any_of(_COLOURS)}) background\b")
_BREAK = re.compile(f"({_any_of([*rules.RELATIONS, 'and', 'with'])}|,)")
# "a red blue star" is read as "a red" and "blue star": nothing that is said goes unjudged.
_PHRASE = re.compile("".join(f"(?:({_any_of(words)}) ?)?" for words in (rules.COUNT_WORDS, _SIZES, _COLOURS, _NOUNS)))
_SIDE = re.compile(_any_of(_SIDES))


@dataclass(frozen=True)
class Phrase:
    """What a caption says of one group of objects; None or empty where it is silent."""

    shape: str | None
    colour: str | None
    count: int | None
    size: str | None
    sides: frozenset[str]

    def objects(self, scene: Scene) -> list[Item]:
        """The objects that have the phrase's shape and colour, as far as it tells them."""
        return [
            item for item in scene.objects if self.shape in (None, item.shape) and self.colour in (None, item.colour)
        ]


@dataclass(frozen=True)
class Claims:
    """All that one caption states: groups of objects, how they lie to each other, backgrounds."""

    phrases: tuple[Phrase, ...]
    relations: tuple[tuple[Phrase, str, Phrase], ...]
    backgrounds: tuple[str, ...]


def mentioned(caption: str) -> Claims:
    """Read the claims of a caption, well-formed or not; unknown words claim nothing.

    A clause ends at "and", "with", a comma or a relation. Sides belong to the group of their clause, and a relation
    without a group after it ("with a star above it") refers to the group before the last.
    """
    text = " ".join(re.findall("[a-z]+|,", caption.lower()))
    backgrounds = tuple(_BACKGROUND.findall(text))
    clauses = _BREAK.split(_BACKGROUND.sub("", text))
    phrases: list[Phrase] = []
    relations: list[tuple[Phrase, str, Phrase]] = []
    for joint, clause in zip(["", *clauses[1::2]], clauses[::2], strict=True):
        sides = frozenset(_SIDES[side] for side in _SIDE.findall(clause))
        new = [
            Phrase(_NOUNS.get(noun), colour or None, rules.COUNT_WORDS.get(count), _SIZES.get(size), sides)
            for count, size, colour, noun in _PHRASE.findall(clause)
            if colour or noun
        ]
        if joint in rules.RELATIONS:
            if phrases and new:
                relations.append((phrases[-1], joint, new[0]))
            elif len(phrases) > 1:
                relations.append((phrases[-1], joint, phrases[-2]))
        phrases += new
    return Claims(tuple(phrases), tuple(relations), backgrounds)


def judge_claims(claims: Claims, scene: Scene) -> list[tuple[str, bool]]:
    """Every claim's kind, and whether it is true of the scene.

    What is said of a group is true only of objects of the stated shape *and* colour: "two red circles" wants exactly
    two red circles, "a big red circle" a red circle, and all of them big. Counts of a group that is named twice add up.
    """
    told: list[tuple[str, bool]] = []
    counts: Counter[tuple[str | None, str | None]] = Counter()
    for phrase in claims.phrases:
        counts[phrase.shape, phrase.colour] += phrase.count or 0
    for phrase in claims.phrases:
        objects = phrase.objects(scene)
        if phrase.colour:
            told.append(("colour", bool(objects)))
        if phrase.shape:
            told.append(("shape", any(item.shape == phrase.shape for item in scene.objects)))
        if phrase.count:
            told.append(("count", counts[phrase.shape, phrase.colour] == len(objects)))
        if phrase.size:
            told.append(("size", {item.size for item in objects} == {phrase.size}))
        if phrase.sides:
            told.append(("position", _all_lie(objects, phrase.sides)))
    for subject, relation, reference in claims.relations:
        here, there = rules.RELATIONS[relation]
        apart = _all_lie(subject.objects(scene), {here})
        told.append(("relation", apart and _all_lie(reference.objects(scene), {there})))
    told += [("background", background == scene.background) for background in claims.backgrounds]
    return told


def _all_lie(objects: Sequence[Item], sides: Iterable[str]) -> bool:
    return bool(objects) and all(set(sides) <= set(item.position.split()) for item in objects)


def attribute_accuracy(captions: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    """How much of what captions state is true of their scenes.

    Args:
        captions: str[N], generated captions.
        scenes: Scene[N], what the picture of each shows.

    Returns:
        `attribute_accuracy`, the fraction of all claims that are true, and for each of `KINDS` `{kind}_accuracy` and
        `{kind}_mentions`, the number of such claims; a fraction of no claims is 0. `exact_match` is the fraction of
        captions that state shape, colour and count of every object, and nothing false. `captions_without_attributes`
        counts those that claim nothing, and so have no part in the accuracies.
    """
    true: Counter[str] = Counter()
    mentions: Counter[str] = Counter()
    exact = silent = 0
    for caption, scene in zip(captions, scenes, strict=True):
        claims = mentioned(caption)
        verdicts = judge_claims(claims, scene)
        mentions.update(kind for kind, _ in verdicts)
        true.update(kind for kind, is_true in verdicts if is_true)
        silent += not verdicts
        stated = {(phrase.shape, phrase.colour) for phrase in claims.phrases if phrase.count}
        is_complete = all((item.shape, item.colour) in stated for item in scene.objects)
        exact += is_complete and all(is_true for _, is_true in verdicts)
    result: dict[str, float] = {
        "attribute_accuracy": true.total() / max(mentions.total(), 1),
        "attribute_mentions": mentions.total(),
        "exact_match": exact / max(len(captions), 1),
        "captions_without_attributes": silent,
    }
    for kind in KINDS:
        result[f"{kind}_accuracy"] = true[kind] / max(mentions[kind], 1)
        result[f"{kind}_mentions"] = mentions[kind]
    return result
