"""The report of runs: one HTML file that needs nothing else, made of plain values.

Whatever comes from captions, file names and flags goes through `untrusted` and Jinja's escaping, and the page's policy
lets no script run but its own: a browser refuses every other, and every request.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from repro.data.images import ImageError, open_image
from repro.evaluation.rouge import TYPES, rouge_scores
from repro.record.metrics import METRICS
from repro.record.sanitize import clip, embedded_json, template
from repro.reports.charts import Published, draw, line_class, number
from repro.reports.runs import Generated, RunFiles, curves_of, finite, label_and_unit, metric_names

RANKED_BY = "rougeL"
COMMONEST = 8
# Of attention: captions, tokens of one, the side of its pictures, how dark they are where nothing is looked at.
LOOKS, LONGEST_LOOK, LOOK_SIDE, DARKER = 24, 40, 88, 5
RANKED_CHARACTERS = 2000  # of a caption; what is longer is no caption
SHOWN = {"best": 12, "worst": 12, "random": 24}
THUMBNAILS = 200  # in all; further images are found by their texts alone
THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 192, 78
REFERENCES = 5  # of an image, that are shown
DATA = {"kept": "rows", "captions": "rows with a caption", "captions_cut": "captions cut to the greatest length"}
TIMES = {
    "startup_seconds": "seconds before the first step",
    "train_seconds": "seconds of training",
    "waiting_for_input_seconds": "of them waiting for input",
    "train_rows_per_second": "rows a second",
}


@dataclass(frozen=True)
class Item:
    """An evaluated image, or a row where images are not known."""

    place: int  # in the order of evaluation
    image: str  # reference to the image, or nothing
    caption: str
    references: tuple[str, ...]
    score: float  # mean of the rows' `RANKED_BY`, F x 100
    thumbnail: str = ""  # address of a picture, or nothing
    problem: str = ""  # why there is no picture, if one was looked for


def page(
    runs: Sequence[RunFiles],
    names: Sequence[str],
    *,
    verdict: Mapping[str, Any] | None,
    no_verdict: str = "",
    published: Mapping[str, Published],
) -> str:
    """Make the report.

    Args:
        names: of the runs, distinct.
        verdict: `repro.recipes.verify.as_json`; None where runs are of no recipe.
        no_verdict: why there is none.
        published: what curves are held against, by metric (`loss`, `eval_rouge2`).
    """
    names = [clip(name, 80) for name in names]
    drawn = [draw(chart) for chart in sorted(curves_of(runs, names, published), key=lambda chart: chart.further)]
    captioning = next((place for place, run in enumerate(runs) if run.generated), 0)
    generated = runs[captioning].generated
    items = with_thumbnails(ranked_items(generated)) if generated else []
    folder = files("repro.reports") / "templates"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return template("repro.reports", "report.html", autoescape=True, number=_number, clip=clip).render(
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}';"
        " base-uri 'none'; form-action 'none'",
        style=Markup(style),
        script=Markup(script),
        title=clip(", ".join(names), 160),
        names=[(name, line_class(place)) for place, name in enumerate(names)],
        verdict=verdict,
        no_verdict=no_verdict,
        problems=[(name, clip(problem)) for name, run in zip(names, runs, strict=True) for problem in run.problems],
        charts=drawn,
        final=_final_table(runs),
        generated=generated,
        generated_by=names[captioning],
        num_items=len(items),
        chosen=chosen_items(items),
        ranked_by=METRICS[RANKED_BY].label,
        repeated=_repeated(generated) if generated else [],
        looks=list(looks(runs[0])),
        dropped=[(name, run.dropped) for name, run in zip(names, runs, strict=True) if run.dropped.counts],
        settings=_settings(runs),
        data=Markup(embedded_json({"charts": [chart.figures for chart in drawn], "items": _searchable(items)})),
    )


def ranked_items(generated: Generated) -> list[Item]:
    """Join the rows that have an image and a caption in common, best first."""
    # The longest common subsequence takes memory with the square of the length.
    scores = rouge_scores(
        *([text[:RANKED_CHARACTERS] for text in texts] for texts in zip(*generated.rows, strict=True))
    )
    ranked = scores.rows[:, TYPES.index(RANKED_BY)]
    groups: dict[tuple[Any, str], list[int]] = {}
    for place, (caption, _) in enumerate(generated.rows):
        image = generated.image_paths[place] if place < len(generated.image_paths) else place
        groups.setdefault((image, caption), []).append(place)
    items = [
        Item(
            place=rows[0],
            image=image if isinstance(image, str) else "",
            caption=caption,
            references=tuple(generated.rows[row][1] for row in rows),
            score=float(ranked[rows].mean()),
        )
        for (image, caption), rows in groups.items()
    ]
    return sorted(items, key=lambda item: (-item.score, item.place))


def chosen_items(items: Sequence[Item]) -> dict[str, list[Item]]:
    """The best, the worst first, and some drawn at random, the same every time; none of them twice."""
    best = list(items[: SHOWN["best"]])
    rest = items[len(best) :]
    worst = list(rest[::-1][: SHOWN["worst"]])
    others = rest[: len(rest) - len(worst)]
    drawn = random.Random(0).sample(others, min(SHOWN["random"], len(others)))
    return {kind: found for kind, found in (("best", best), ("worst", worst), ("random", drawn)) if found}


def with_thumbnails(items: list[Item]) -> list[Item]:
    """Add pictures to the items that are shown, and to as many others as there is room for."""
    shown = [item for found in chosen_items(items).values() for item in found]
    others = items[:: max(len(items) // THUMBNAILS, 1)]
    wanted = {item.place for item in [*shown, *others][:THUMBNAILS] if item.image}
    return [_with_thumbnail(item) if item.place in wanted else item for item in items]


def _with_thumbnail(item: Item) -> Item:
    try:
        return replace(item, thumbnail=thumbnail(item.image))
    except (ImageError, OSError, ValueError) as error:  # it cannot be read any more
        return replace(item, problem=clip(str(error), 120))


def thumbnail(reference: str) -> str:
    """Make a small JPEG of an image, as a data address.

    Raises:
        ImageError, OSError, ValueError: it cannot be read.
    """
    with open_image(reference) as opened:
        image = opened.convert("RGB")
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BILINEAR)
    return _address(image)


def _address(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _searchable(items: Iterable[Item]) -> list[list[Any]]:
    """[file name, caption, references, score, thumbnail] of each, as text that can be shown."""
    return [
        [
            clip(_file_name(item.image), 80),
            clip(item.caption),
            [clip(text) for text in item.references[:REFERENCES]],
            round(item.score, 1),
            item.thumbnail,
        ]
        for item in items
    ]


def _file_name(reference: str) -> str:
    """The last part of a path, also of one inside an archive (`zip://NAME::ARCHIVE`)."""
    return reference.partition("::")[0].rpartition("/")[2]


def _final_table(runs: Sequence[RunFiles]) -> list[tuple[str, list[Any]]]:
    """Figures of each run's end, one row a figure."""
    rows: list[tuple[str, list[Any]]] = [("steps", [run.last_step for run in runs])]
    for metric in dict.fromkeys(name for run in runs for name in metric_names(run.final)):
        rows.append((", ".join(filter(None, label_and_unit(metric))), [run.final.get(metric) for run in runs]))
    rows.append(("rows evaluated", [run.final.get("rows") for run in runs]))
    for split in ("train", "validation", "test"):
        counts = [run.facts.get("data", {}).get(split, {}) for run in runs]
        found = [(f"{split}: {label}", [of.get(name) for of in counts]) for name, label in DATA.items()]
        rows += [(label, values) for label, values in found if any(values)]
    rows += [(label, [run.facts.get(name) for run in runs]) for name, label in TIMES.items()]
    evaluating = [[found.get("seconds") for found in run.recorded.evaluations("eval").values()] for run in runs]
    return [*rows, ("seconds of evaluation", [sum(filter(finite, seconds)) for seconds in evaluating])]


def _repeated(generated: Generated) -> list[tuple[str, int]]:
    """The captions that are generated most, ties in the order of words; a model that has collapsed has few."""
    found = sorted(Counter(caption for caption, _ in generated.rows).items(), key=lambda item: (-item[1], item[0]))
    return [(clip(text), count) for text, count in found[:COMMONEST] if count > 1]


def looks(run: RunFiles) -> Iterator[list[tuple[str, str]]]:
    """Of some captions, each word with a small picture that is bright where the word looks."""
    for shown in run.attention[:LOOKS]:
        pairs = [pair for pair in zip(shown["tokens"], shown["weights"], strict=False) if pair[0]][:LONGEST_LOOK]
        begins = [place for place, (token, _) in enumerate(pairs) if token.startswith(" ") or not place]
        with suppress(ImageError, OSError, ValueError, LookupError):  # it cannot be read any more
            with open_image(shown["image_path"]) as opened:
                image = opened.convert("RGB").resize((LOOK_SIDE, LOOK_SIDE))
            patches = np.array([list(bytes.fromhex(weights)) for _, weights in pairs], np.float32)
            dark, strip, side = image.point(lambda value: value // DARKER), [], math.isqrt(patches.shape[1])
            for begin, end in pairwise([*begins, len(pairs)]):
                seen = patches[begin:end].mean(axis=0).reshape(side, side).astype(np.uint8)
                picture = Image.composite(image, dark, Image.fromarray(seen).resize(image.size))
                strip.append((clip("".join(token for token, _ in pairs[begin:end]), 40), _address(picture)))
            yield strip


def _settings(runs: Sequence[RunFiles]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """All that `run.json` says, by group, one row a fact."""
    groups: dict[str, dict[str, list[str]]] = {}
    for place, run in enumerate(runs):
        for name, value in run.facts.items():
            if name in ("checksums", "parts"):
                continue
            pairs = value.items() if isinstance(value, Mapping) else [("", value)]
            group = name if isinstance(value, Mapping) else "run"
            for key, inner in pairs:
                row = groups.setdefault(clip(group, 60), {}).setdefault(clip(str(key) or name, 60), [""] * len(runs))
                row[place] = clip(inner if isinstance(inner, str) else json.dumps(inner, default=str), 200)
    return [(group, list(rows.items())) for group, rows in groups.items()]


def _number(value: Any) -> str:
    return number(value) if finite(value) else ("" if value is None else clip(str(value), 80))


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
