"""The evaluated images of one or several runs, with all that a page says of their captions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from nltk.stem.porter import PorterStemmer

from repro.evaluation.rouge import TYPES, rouge_scores
from repro.pocket.attributes import judge_claims, mentioned
from repro.pocket.halves import read_scenes
from repro.pocket.scenes import COUNT_WORDS, MAX_OBJECTS, Scene
from repro.record.sanitize import clip
from repro.reports.runs import Generated

RANKED_BY = "rougeL"
WORD = re.compile(r"([^\W_]+(?:['’][^\W_]+)*)")
RANKED_CHARACTERS = 2000  # of a caption; what is longer is no caption
REFERENCES = 5  # of an image, that are shown
STEM = lru_cache(maxsize=65_536)(PorterStemmer().stem)


@dataclass(frozen=True)
class Said:
    """What a run says of an image."""

    caption: str
    score: float  # mean of the rows' `RANKED_BY`, F x 100
    earlier: tuple[tuple[int | None, str], ...] = ()  # (step, caption) of evaluations before
    claims: Sequence[tuple[str, bool]] = ()  # of a rendered scene: kind of attribute, whether it is true
    counts: Sequence[tuple[int, int]] = ()  # of a rendered scene: objects of one kind, said and true


@dataclass(frozen=True)
class RankedImage:
    """An evaluated image, or a row where images are not known."""

    place: int  # in the order of evaluation
    image: str  # reference to the image, or nothing
    references: tuple[str, ...]
    said: tuple[Said | None, ...]  # by run; None where a run has no caption of it
    thumbnail: str = ""  # address of a picture, or nothing
    problem: str = ""  # why there is no picture, if one was looked for

    @property
    def name(self) -> str:
        """The last part of a path, also of one inside an archive (`zip://NAME::ARCHIVE`)."""
        return clip(self.image.partition("::")[0].rpartition("/")[2], 80) or f"row {self.place + 1}"

    @property
    def scores(self) -> list[float]:
        return [said.score for said in self.said if said]

    @property
    def differs(self) -> bool:
        """Whether runs say different things."""
        return len({said.caption for said in self.said if said}) > 1

    def pieces(self, said: Said) -> list[str]:
        """Cut a caption where words that a reference has begin and end: others, such words, others, and so on."""
        known = {STEM(word) for text in self.references for word in WORD.findall(text[:RANKED_CHARACTERS].lower())}
        pieces = [""]
        for place, text in enumerate(WORD.split(clip(said.caption))):
            matches = place % 2 == 1 and STEM(text.lower()) in known
            pieces += [] if text.isspace() or matches == (len(pieces) % 2 == 0) else [""]
            pieces[-1] += text
        return pieces


def ranked_items(runs: Sequence[Generated | None]) -> list[RankedImage]:
    """Join the rows of an image, and the runs that have it: captions that differ first, then the best."""
    found: dict[Any, tuple[int, str, list[Said | None]]] = {}
    for number, generated in enumerate(runs):
        for key, place, image, said in _of_run(generated, alone=len(runs) == 1) if generated else ():
            found.setdefault(key, (place, image, [None] * len(runs)))[2][number] = said
    items = [RankedImage(place, image, key[1], tuple(said)) for key, (place, image, said) in found.items()]
    return sorted(
        items, key=lambda item: (-item.differs, -np.ptp(item.scores) if item.differs else -item.scores[0], item.place)
    )


def _of_run(generated: Generated, *, alone: bool) -> list[tuple[Any, int, str, Said]]:
    """Gather what a run says of each image, by what tells images apart: path, or its end if runs differ, and texts."""
    # The longest common subsequence takes memory with the square of the length.
    cut = ([text[:RANKED_CHARACTERS] for text in texts] for texts in zip(*generated.rows, strict=True))
    ranked = rouge_scores(*cut).rows[:, TYPES.index(RANKED_BY)]
    scenes = _scenes(generated)
    paths = dict(enumerate(generated.image_paths[: len(generated.rows)]))
    groups: dict[str | int, list[int]] = {}
    for row in range(len(generated.rows)):
        groups.setdefault(paths.get(row) or row, []).append(row)
    made = []
    for image, rows in groups.items():
        caption, path = generated.rows[rows[0]][0], image if isinstance(image, str) else ""
        texts = tuple(generated.rows[row][1] for row in rows)
        earlier = tuple((step, old[rows[0]]) for step, old in generated.earlier)
        claims, scene = mentioned(caption[:RANKED_CHARACTERS]), scenes.get(path)
        told = judge_claims(claims, scene) if scene else []
        counts = [(of.count, len(of.objects(scene))) for of in claims.phrases if of.count] if scene else []
        name = image if alone or not path else "/".join(path.split("/")[-2:])
        made.append(((name, texts), rows[0], path, Said(caption, float(ranked[rows].mean()), earlier, told, counts)))
    return made


def _scenes(generated: Generated) -> dict[str, Scene]:
    """Read what images show that were rendered, by path; others have nothing beside them that says it."""
    try:
        folder = Path(generated.image_paths[0]).parents[1]
        found = read_scenes(folder, generated.split.replace("validation", "val"))
        return {path: found[int(Path(path).stem)] for path in set(generated.image_paths)}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def count_table(items: Sequence[RankedImage], run: int) -> list[tuple[str, list[str]]]:
    """How many objects of a kind a run's captions say, and how many there are: a row for each number that is said."""
    counts = Counter(pair for item in items if (said := item.said[run]) for pair in said.counts)
    numbers = sorted(set(COUNT_WORDS.values()))
    rows = [[counts[said, true] for true in range(MAX_OBJECTS + 1)] for said in numbers]
    return [(f"said {said}", [f"{n:,}" for n in row]) for said, row in zip(numbers, rows, strict=True) if any(row)]
