"""`repro report`, and the report at the end of a run: what finished and unfinished runs look like, on one page."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from repro.errors import InputError
from repro.json_files import write_whole
from repro.recipes import read_recipe
from repro.recipes.targets import Target, read_targets
from repro.recipes.verify import RUN, Verification, folders_of_runs, verify
from repro.record.record import FACTS, ROWS
from repro.record.writer import REPORT, log
from repro.reports.charts import Line, columns_of
from repro.reports.page import page
from repro.reports.runs import read_run_folder


def write_report(folders: Sequence[Path], output: Path, *, recipe: str | None = None, seeds: int | None = None) -> None:
    """Report on runs, overlaid.

    Args:
        folders: of reproductions, or of runs; whatever state they are in.
        recipe: whose targets they are held against; None for the one that the first folder was made by, if any.
        seeds: see `verify`.

    Raises:
        InputError: a folder is not there or holds no run, or there is no such recipe.
    """
    named, folders = folders, folders_of_runs(folders)
    places = [folder / RUN if (folder / RUN).is_dir() else folder for folder in folders]
    for place in places:
        if not any((place / name).exists() for name in (FACTS, ROWS)):
            raise InputError(f"{place}: holds no run (no run.json, no metrics.jsonl); name a run's --output_dir.")
    verdict, reason = None, ""
    try:
        verdict = verify(named, recipe=recipe, seeds=seeds, recompute=False)
    except InputError as error:  # it is not known against what
        if recipe is not None:
            raise
        reason = str(error)
    content = read_recipe(verdict.recipe) if verdict else {"targets": []}
    runs = [read_run_folder(place, name) for place, name in zip(places, _names(folders), strict=True)]
    last = max(run.facts.get("num_steps", run.last_step) for run in runs)
    wanted = _wanted(read_targets(content["targets"]), verdict, last)
    text = page(runs, verdict=verdict, no_verdict=reason, wanted=wanted, seeds=content.get("seeds", ()))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, text.encode())
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error}); name another file.") from error


def report_at_end(folder: Path, runs: Sequence[Path] = ()) -> None:
    """Write the report of a finished run, or of several, into a folder; what goes wrong is a warning: they are done."""
    try:
        write_report(runs or [folder], folder / REPORT, seeds=len(runs) or None)
    except Exception as error:
        log.warning("no report: %s: %s; `repro report %s` tries again", type(error).__name__, error, folder)


def _wanted(targets: Sequence[Target], verdict: Verification | None, last: int) -> dict[str, Line]:
    """Find what a recipe wants of each metric: values by step, and how far from them a run may be.

    Args:
        verdict: whose bands take the place of margins.
        last: the step of what is measured at the end.
    """
    outcomes = verdict.outcomes if verdict else ()
    reaches = {of.target.name: (of.interval[1] - of.interval[0]) / 2 for of in outcomes if of.interval and of.band}
    found: dict[str, list[tuple[float, ...]]] = {}
    for target in targets:
        reach = reaches.get(target.name) or target.margin or target.tolerance or 0.0
        at = last if target.step is None else target.step
        values = target.values or ({} if target.value is None else {str(at): target.value})
        points = [(int(step), value, value - reach, value + reach) for step, value in values.items()]
        if math.isfinite(target.low) or math.isfinite(target.high):
            points = [(at, math.nan, target.low, target.high)]
        found.setdefault(target.metric, []).extend(points)
    columns = {metric: columns_of(sorted(points), "x", "y", "low", "high") for metric, points in found.items()}
    return {metric: Line("wanted", -1, **values) for metric, values in columns.items() if values}


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of the paths before them as tells them apart."""
    places = [folder.resolve() for folder in folders]
    common = os.path.commonpath([place.parent for place in places])
    names = [place.relative_to(common).as_posix() for place in places]
    return names if len(set(names)) == len(names) else [f"{name} ({n})" for n, name in enumerate(names, start=1)]
