"""`repro report`, and the report at the end of a run: what finished and unfinished runs look like, on one page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repro.data.atomic import whole_file
from repro.errors import InputError
from repro.recipes import read_recipe
from repro.recipes.verify import RUN, as_json, verify
from repro.record.writer import REPORT, log
from repro.reports.charts import Published
from repro.reports.page import page
from repro.reports.runs import holds_a_run, read_run_folder


def write_report(folders: Sequence[Path], output: Path, *, recipe: str | None = None) -> None:
    """Report on runs, overlaid.

    Args:
        folders: of reproductions, or of runs; whatever state they are in.
        recipe: whose targets they are held against; None for the one that the first folder was made by, if any.

    Raises:
        InputError: a folder is not there or holds no run, or there is no such recipe.
    """
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: is not a folder; name a reproduction's, or a run's.")
    places = [folder / RUN if (folder / RUN).is_dir() else folder for folder in folders]
    for place in places:
        if not holds_a_run(place):
            raise InputError(f"{place}: holds no run (no run.json, no metrics.jsonl); name a run's --output_dir.")
    verdict, reason, targets = _verdict(folders, recipe)
    runs = [read_run_folder(place) for place in places]
    text = page(runs, _names(folders), verdict=verdict, no_verdict=reason, published=_published(targets))
    with whole_file(output, "the report") as partial:
        partial.write_text(text, encoding="utf-8")


def report_at_end(folder: Path, runs: Sequence[Path] = ()) -> None:
    """Write the report of a finished run, or of several, into a folder; what goes wrong is a warning: they are done."""
    try:
        write_report(runs or [folder], folder / REPORT)
    except Exception as error:
        log.warning("no report: %s: %s; `repro report %s` tries again", type(error).__name__, error, folder)


def _verdict(
    folders: Sequence[Path], recipe: str | None
) -> tuple[dict[str, Any] | None, str, Sequence[Mapping[str, Any]]]:
    """Verify, if it is known against what; else the reason why it is not."""
    try:
        done = verify(folders, recipe=recipe, recompute=False)
    except InputError as error:
        if recipe is not None:
            raise
        return None, str(error), ()
    return as_json(done), "", read_recipe(done.recipe)["targets"]


def _published(targets: Sequence[Mapping[str, Any]]) -> dict[str, Published]:
    """Find what a recipe's targets say of single steps: the logged losses, and evaluations at a step."""
    found: dict[str, dict[int, float]] = {}
    for target in targets:
        if target["metric"] == "loss" and "margin" in target and "values" in target:
            found["loss"] = {int(step): value for step, value in target["values"].items()}
        elif "value" in target and "margin" in target and "step" in target:
            found.setdefault(target["metric"], {})[target["step"]] = target["value"]
    return {metric: Published("published", list(at), list(at.values())) for metric, at in found.items()}


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of the paths before them as tells them apart."""
    places = [folder.resolve() for folder in folders]
    common = os.path.commonpath([place.parent for place in places])
    names = [place.relative_to(common).as_posix() for place in places]
    return names if len(set(names)) == len(names) else [f"{name} ({n})" for n, name in enumerate(names, start=1)]
