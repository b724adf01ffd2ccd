"""The report of runs: one HTML file that needs nothing else, made of plain values.

Whatever comes from captions, file names and flags goes through `clip` and Jinja's escaping, and the page's policy lets
no script run but its own: a browser refuses every other, and every request.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from importlib.resources import files
from itertools import pairwise
from typing import Any

import numpy as np
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from PIL import Image

from repro.data.images import ImageError, view_image
from repro.recipes.verify import Verification, in_words, label
from repro.record.metrics import METRICS
from repro.record.sanitize import clip, template
from repro.reports.captions import RANKED_BY, REFERENCES, RankedImage, count_table, ranked_items
from repro.reports.charts import Line, curves_of, number, rounded
from repro.reports.runs import RunFiles, finite, label_and_unit, metric_names, spread, words

THUMBNAILS = 200  # about so many in all; further images are found by their texts alone
EARLIER = 25_000  # captions of earlier evaluations in all; if there are more, those of images with a thumbnail
THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 192, 78
# Of attention: captions, tokens of one, the side of its pictures, how dark they are where nothing is looked at.
LOOKS, LONGEST_LOOK, LOOK_SIDE, DARKER = 24, 40, 88, 5
KEY_METRICS = ("loss", "rouge2", "rougeL")
VERSIONS = ("repro", "python", "jax", "flax", "optax", "transformers")
TRAINING = {"num_train_epochs": "epochs", "learning_rate": "learning rate", "protocol": "protocol", "seed": "seed"}
TIMES = {"startup": "start-up", "train": "training", "waiting_for_input": "of that waiting for input"}
# Facts of `run.json` that are no settings: what came of the run, and when.
RESULTS = re.compile(r"checksums|parts|started|finished|stopped|.*seconds|.*_bytes|train_rows_per_second")


def page(
    runs: Sequence[RunFiles],
    *,
    verdict: Verification | None,
    no_verdict: str,
    wanted: Mapping[str, Line],
    seeds: Sequence[Mapping[str, Any]],
) -> str:
    """Make the report.

    Args:
        verdict: None where runs are of no recipe; `no_verdict` says why.
        wanted: what curves are held against, by metric (`loss`, `eval_rouge2`).
        seeds: the runs from which the recipe's targets come, their values by metric.
    """
    charts = curves_of(runs, wanted)
    items = with_thumbnails(ranked_items([run.generated for run in runs]))
    names, ranked_by = [run.name for run in runs], METRICS[RANKED_BY].label
    # Of one run all evaluations are shown, of several the last ones.
    evaluations = [(run.name, run.final) for run in runs]
    if len(runs) == 1:
        evaluations = [(f"step {step}", row) for step, row in spread(list(runs[0].evaluations.items()))]
    settings = _rows([_settings(run) for run in runs])
    has_all = sum(len(of.earlier) for item in items for of in item.said if of) <= EARLIER
    said = [_searchable(item, with_earlier=has_all or bool(item.thumbnail)) for item in items]
    data = {"names": names, "ranked_by": ranked_by, "charts": rounded(list(map(asdict, charts))), "items": said}
    folder = files("repro.reports") / "templates"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return template("repro.reports", "report.html", autoescape=True, clip=clip, words=words).render(
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}';"
        " base-uri 'none'; form-action 'none'",
        style=Markup(style),
        script=Markup(script),
        title=clip(", ".join(names), 160),
        runs=runs,
        names=names,
        key_figures=_rows([_key_figures(run) for run in runs]),
        overview=_rows([_overview(run) for run in runs]),
        verdict=verdict,
        outcomes=[(found, label(found.target), in_words(found)) for found in verdict.outcomes] if verdict else [],
        no_verdict=no_verdict,
        seeds=seeds,
        charts=charts,
        evaluations=[name for name, _ in evaluations],
        metrics=[_rows([_metrics(row, known=known) for _, row in evaluations]) for known in (True, False)],
        items=items,
        ranked_by=ranked_by,
        counts=[(name, rows) for place, name in enumerate(names) if (rows := count_table(items, place))],
        looks=list(looks(runs[0])),
        differing=[(": ".join(name), values) for name, values in settings if len(set(values)) > 1],
        settings=[(group, (key, values[:1])) for (group, key), values in settings if len(set(values)) == 1],
        data=htmlsafe_json_dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False),
    )


def with_thumbnails(items: list[RankedImage]) -> list[RankedImage]:
    """Add pictures to the first and the last items, and to as many between them as there is room for."""
    each = THUMBNAILS // 4
    between = range(each, len(items) - each, max(len(items) // (2 * each), 1))
    wanted = {*range(each), *range(len(items) - each, len(items)), *between}
    found = list(items)
    for place in wanted & {place for place, item in enumerate(items) if item.image}:
        try:
            found[place] = replace(items[place], thumbnail=thumbnail(items[place].image))
        except (ImageError, OSError, ValueError) as error:  # it cannot be read any more
            found[place] = replace(items[place], problem=clip(str(error), 120))
    return found


def thumbnail(reference: str) -> str:
    """Make a small JPEG of an image, as a data address; ImageError, OSError or ValueError if it cannot be read."""
    image = view_image(reference)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BILINEAR)
    return _address(image)


def _address(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def looks(run: RunFiles) -> Iterator[list[tuple[str, str]]]:
    """Of some captions, each word with a small picture that is bright where the word looks."""
    turned = run.facts.get("protocol", {}).get("turn_upright", False)  # as the model saw it
    for shown in run.attention[:LOOKS]:
        pairs = [pair for pair in zip(shown["tokens"], shown["weights"], strict=False) if pair[0]][:LONGEST_LOOK]
        begins = [place for place, (token, _) in enumerate(pairs) if token.startswith(" ") or not place]
        with suppress(ImageError, OSError, ValueError, LookupError):  # it cannot be read any more
            image = view_image(shown["image_path"], turn_upright=turned).resize((LOOK_SIDE, LOOK_SIDE))
            patches = np.array([list(bytes.fromhex(weights)) for _, weights in pairs], np.float32)
            dark, strip, side = image.point(lambda value: value // DARKER), [], math.isqrt(patches.shape[1])
            for begin, end in pairwise([*begins, len(pairs)]):
                seen = patches[begin:end].mean(axis=0).reshape(side, side).astype(np.uint8)
                picture = Image.composite(image, dark, Image.fromarray(seen).resize(image.size))
                strip.append((clip("".join(token for token, _ in pairs[begin:end]), 40), _address(picture)))
            yield strip


def _rows(columns: Sequence[Mapping[Any, str]]) -> list[tuple[Any, list[str]]]:
    """Set columns beside one another: a row for each name that one of them has."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "") for column in columns]) for name in names]


def _key_figures(run: RunFiles) -> dict[tuple[str, str], str]:
    """What a run comes to, or has come to, by (label, unit)."""
    found: dict[tuple[str, str], Any] = {label_and_unit(name): run.final.get(name) for name in KEY_METRICS}
    if not run.final and run.recorded.steps:
        found = {("training loss", METRICS["loss"].unit): run.recorded.steps[-1]["loss"]}
    rates = [rate for _, rate in run.speed] or [math.nan]
    found["speed", "rows a second"] = run.facts.get("train_rows_per_second", sum(rates) / len(rates))
    return {name: number(value) for name, value in found.items() if finite(value)}


def _overview(run: RunFiles) -> dict[str, str]:
    """What, when, how long, where and with what."""
    facts, model = run.facts, run.facts.get("model")
    flags, versions = (facts.get(name, {}) for name in ("flags", "versions"))
    times = {"in all": run.seconds, **{label: facts.get(f"{name}_seconds") for name, label in TIMES.items()}}
    times["evaluation"] = sum(row["seconds"] for row in run.evaluations.values())
    took = [f"{label} {timedelta(seconds=round(time))}" for label, time in times.items() if time and finite(time)]
    splits = [
        f"{split}: {of['kept']:,} rows of {of['images']:,} images"
        + f", {of['dropped']:,} dropped" * (of["dropped"] > 0)
        for split, of in facts.get("data", {}).items()
    ]
    found = {
        "state": f"{run.state[0]}, {run.progress}",
        "model": f"{model['parameters']:,} parameters, {words(model['implementation'])}" if model else "",
        "data": clip("; ".join(splits)),
        "training": ", ".join(f"{label} {words(flags[name])}" for name, label in TRAINING.items() if name in flags),
        "began": words(facts["started"]).replace("T", " ").replace("+0000", " UTC") if "started" in facts else "",
        "took": ", ".join(took),
        "computed on": "; ".join(words(facts[name]) for name in ("devices", "platform") if name in facts),
        "versions": ", ".join(f"{name} {words(versions[name])}" for name in VERSIONS if name in versions),
    }
    return {label: value for label, value in found.items() if value}


def _metrics(row: Mapping[str, Any], *, known: bool) -> dict[str, str]:
    """Metrics of an evaluation, those that have a label or the others."""
    names = [name for name in metric_names(row) if (name in METRICS) == known]
    return {", ".join(filter(None, label_and_unit(name))): number(row[name]) for name in names}


def _searchable(item: RankedImage, *, with_earlier: bool) -> list[Any]:
    """[name, references, what each run says, thumbnail, problem], as text that can be shown."""
    said: list[Any] = []
    for of in item.said:
        earlier = [(step, clip(text)) for step, text in of.earlier] if of and with_earlier else []
        said.append(of and [item.pieces(of), round(of.score, 1), earlier, of.claims])
    return [item.name, [clip(text) for text in item.references[:REFERENCES]], said, item.thumbnail, item.problem]


def _settings(run: RunFiles) -> dict[tuple[str, str], str]:
    """What `run.json` says of how the run was to be, by (group, name)."""
    return {
        (clip(name, 60) if isinstance(value, Mapping) else "run", clip(key, 60)): words(inner)
        for name, value in run.facts.items()
        if not RESULTS.fullmatch(name)
        for key, inner in (value.items() if isinstance(value, Mapping) else [(name, value)])
    }


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
