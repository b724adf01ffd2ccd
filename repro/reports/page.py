"""The report of runs: one HTML file that needs nothing else, made of plain values.

Whatever comes from captions, file names and flags goes through `clip` and Jinja's escaping, and the page's policy lets
no script run but its own: a browser refuses every other, and every request.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

from markupsafe import Markup
from PIL import Image

from repro.data.images import ImageError, open_image
from repro.recipes.equivalence import Verdict
from repro.recipes.verify import Verification, in_words
from repro.record.metrics import METRICS
from repro.record.sanitize import clip, embedded_json, template
from repro.reports.captions import RANKED_BY, REFERENCES, Item, count_table, ranked_items, text_statistics
from repro.reports.charts import Line, curves_of, number
from repro.reports.runs import RunFiles, finite, label_and_unit, metric_names, spread, words

THUMBNAILS = 200  # about so many in all; further images are found by their texts alone
THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 192, 78
KEY_METRICS = ("loss", "rouge2", "rougeL")
VERSIONS = ("repro", "python", "jax", "flax", "optax", "transformers")
TRAINING = ("num_train_epochs", "learning_rate", "warmup_steps", "protocol", "dtype", "seed")
TIMES = {"startup": "start-up", "train": "training", "waiting_for_input": "of that waiting for input"}
# Facts of `run.json` that are no settings: what came of the run, and when.
RESULTS = re.compile(r"checksums|parts|started|finished|stopped|.*seconds|.*_bytes|train_rows_per_second")
MEANINGS = {
    Verdict.PASS: "Every target is met: what was measured is {claim}.",
    Verdict.FAIL: "What was measured differs from the recipe by more than chance explains: {failed}.",
    Verdict.CANNOT_TELL: "Nothing was found to differ, and too little is known to say that the recipe is reproduced.",
}
Rows = list[tuple[str, list[str]]]  # of a table: label, and a value for each column


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
    differing, settings = _settings(runs)
    found = [chart.figures for chart in charts], [_searchable(item) for item in items]
    data = {"names": names, "ranked_by": ranked_by, "charts": found[0], "items": found[1]}
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
        key_figures=_key_figures(runs),
        overview=_overview(runs),
        verdict=verdict,
        meaning=_meaning(verdict) if verdict else "",
        outcomes=[(outcome, in_words(outcome)) for outcome in verdict.outcomes] if verdict else [],
        no_verdict=no_verdict,
        seeds=[(words(row["seed"]), [words(value) for value in row.values()][1:]) for row in seeds],
        seed_names=list(seeds[0])[1:] if seeds else [],
        charts=charts,
        metrics=_metrics(runs),
        items=items,
        ranked_by=ranked_by,
        counts=[(name, rows) for place, name in enumerate(names) if (rows := count_table(items, place))],
        texts=_texts(runs),
        differing=differing,
        settings=settings,
        data=Markup(embedded_json(data)),
    )


def with_thumbnails(items: list[Item]) -> list[Item]:
    """Add pictures to the first and the last items, and to as many between them as there is room for."""
    each = THUMBNAILS // 4
    between = range(each, len(items) - each, max(len(items) // (2 * each), 1))
    wanted = {*range(each), *range(len(items) - each, len(items)), *between}
    return [_with_thumbnail(item) if place in wanted and item.image else item for place, item in enumerate(items)]


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
    buffer = io.BytesIO()
    with open_image(reference) as opened:
        image = opened.convert("RGB")
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BILINEAR)
    image.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figure(value: Any) -> str:
    return number(value) if finite(value) else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60) if 0 <= seconds < 1e9 else (0, 0)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _meaning(verdict: Verification) -> str:
    """Say in one sentence what a verdict is."""
    if verdict.problems:
        return f"Nothing was judged, for {verdict.problems[0]}"
    failed = [outcome.target.name for outcome in verdict.outcomes if outcome.verdict is Verdict.FAIL]
    return MEANINGS[verdict.verdict].format(claim=verdict.claim, failed=", ".join(failed))


def _key_figures(runs: Sequence[RunFiles]) -> list[tuple[str, str, list[str]]]:
    """(label, unit, value of each run) of what runs come to, or have come to."""
    rows = [(*label_and_unit(name), [run.final.get(name) for run in runs]) for name in KEY_METRICS]
    if not any(run.final for run in runs):
        rows = [
            (
                "training loss",
                METRICS["loss"].unit,
                [next((s["loss"] for s in run.recorded.steps[::-1]), None) for run in runs],
            )
        ]
    rows.append(("speed", "rows a second", [run.rows_per_second for run in runs]))
    return [(label, unit, list(map(_figure, values))) for label, unit, values in rows if any(map(finite, values))]


def _overview(runs: Sequence[RunFiles]) -> Rows:
    """What, when, how long, where and with what, one row a fact."""
    columns = [_facts(run) for run in runs]
    return [(label, [column[label] for column in columns]) for label in columns[0] if any(c[label] for c in columns)]


def _facts(run: RunFiles) -> dict[str, str]:
    facts, flags = run.facts, run.facts.get("flags", {})
    model, versions = facts.get("model"), facts.get("versions", {})
    times = {label: facts[f"{name}_seconds"] for name, label in TIMES.items() if f"{name}_seconds" in facts}
    times["evaluation"] = sum(row["seconds"] for row in run.evaluations.values())
    parts = [f"{label} {_duration(seconds)}" for label, seconds in times.items() if finite(seconds)]
    splits = [
        f"{split}: {of['kept']:,} rows of {of['images']:,} images"
        + f", {of['dropped']:,} dropped" * (of["dropped"] > 0)
        for split, of in facts.get("data", {}).items()
    ]
    return {
        "state": f"{run.state[0]}, {run.progress}",
        "model": f"{model['parameters']:,} parameters, {words(model['implementation'])}" if model else "",
        "data": clip("; ".join(splits)),
        "training": ", ".join(f"{name.replace('_', ' ')} {words(flags[name])}" for name in TRAINING if name in flags),
        "began": words(facts["started"]).replace("T", " ").replace("+0000", " UTC") if "started" in facts else "",
        "took": f"{_duration(run.seconds)}: {', '.join(parts)}",
        "computed on": "; ".join(words(facts[name]) for name in ("devices", "platform") if name in facts),
        "versions": ", ".join(f"{name} {words(versions[name])}" for name in VERSIONS if name in versions),
    }


def _metrics(runs: Sequence[RunFiles]) -> tuple[list[str], Rows, Rows]:
    """The evaluations of one run, or the last ones of several: names, and a row for each metric, known and further."""
    columns = {run.name: run.final for run in runs}
    if len(runs) == 1:
        columns = {f"step {step}": row for step, row in spread(list(runs[0].evaluations.items()))}
    found: dict[bool, Rows] = {True: [], False: []}
    for name in dict.fromkeys(name for row in columns.values() for name in metric_names(row)):
        label = ", ".join(filter(None, label_and_unit(name)))
        found[name in METRICS].append((label, [_figure(row.get(name)) for row in columns.values()]))
    return list(columns), found[True], found[False]


def _texts(runs: Sequence[RunFiles]) -> tuple[list[str], Rows]:
    """Statistics of the captions as texts, those of each run beside the references."""
    rows = {run.name: run.generated.rows for run in runs if run.generated}
    texts = {name: [caption for caption, _ in found] for name, found in rows.items()}
    texts |= {"reference": [reference for _, reference in next(iter(rows.values()))]} if rows else {}
    counted = [text_statistics(found) for found in texts.values()]
    return list(texts), [(label, [column[label] for column in counted]) for label in (counted[0] if counted else ())]


def _searchable(item: Item) -> list[Any]:
    """[name, references, what each run says, thumbnail, problem], as text that can be shown."""
    said = [
        of and [item.pieces(of), round(of.score, 1), [(step, clip(old)) for step, old in of.earlier], of.claims]
        for of in item.said
    ]
    return [item.name, [clip(text) for text in item.references[:REFERENCES]], said, item.thumbnail, item.problem]


def _settings(runs: Sequence[RunFiles]) -> tuple[Rows, list[tuple[str, Rows]]]:
    """What `run.json` says, one row a fact: what differs between runs, and the rest by group, in one column."""
    groups: dict[str, dict[str, list[str]]] = {}
    for place, run in enumerate(runs):
        for name, value in run.facts.items():
            group = groups.setdefault(clip(name, 60) if isinstance(value, Mapping) else "run", {})
            for key, inner in value.items() if isinstance(value, Mapping) else [(name, value)]:
                if not RESULTS.fullmatch(name):
                    group.setdefault(clip(key, 60), ["not set"] * len(runs))[place] = words(inner)
    differing = [(f"{g}: {key}", row) for g, rows in groups.items() for key, row in rows.items() if len(set(row)) > 1]
    same = {g: [(key, row[:1]) for key, row in rows.items() if len(set(row)) == 1] for g, rows in groups.items()}
    return differing, [(group, rows) for group, rows in same.items() if rows]


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
