"""The Python interface: the commands as functions, flags as keywords, results that a notebook shows.

from repro import reproduce
result = reproduce("pocket")
result.metrics["eval_rouge2"], result.verdict
"""

from __future__ import annotations

import html
import inspect
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from repro.commands.terminal import figures, start_logging
from repro.config import ARGUMENTS, FLAGS, SEVERAL, flags_of, given_flags, make_arguments
from repro.data.images import ImageError
from repro.errors import InputError
from repro.evaluation.evaluator import Evaluation, caption_of_each_image
from repro.masking import learn_flags
from repro.models.captioning import Captioner
from repro.recipes import reproduce as recipes
from repro.recipes import verify as verifying
from repro.record.record import read_record
from repro.record.writer import REPORT, models_in
from repro.reports.page import thumbnail
from repro.reports.write import report_at_end, write_report
from repro.run.train import RunResult, run

Flag = str | int | float | bool | os.PathLike[str] | None
PICTURES = 4  # that a notebook shows


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: of the reproduction or the run.
        metrics: of the last evaluation and of the prediction, such as `eval_rouge2`.
        verification: against the recipe; None of a run without one.
    """

    folder: Path
    metrics: dict[str, float]
    verification: verifying.Verification | None = None
    _run: RunResult = field(repr=False, kw_only=True)

    @property
    def verdict(self) -> str | None:
        """PASS, FAIL or CANNOT TELL; None of a run without a recipe."""
        return self.verification.verdict if self.verification else None

    @property
    def history(self) -> list[dict[str, float]]:
        """A row for each step (`step`, `loss`, `learning_rate`) and each evaluation (`step`, `eval_loss`, ...)."""
        rows = []
        for row in read_record(self._run.folder).recorded.rows:
            evaluated = {f"{kind}_{name}": v for kind in ("eval", "test") for name, v in row.get(kind, {}).items()}
            rows.append({k: v for k, v in {**row, **evaluated}.items() if isinstance(v, int | float)})
        return rows

    def captioner(self) -> Captioner:
        """Load the newest model of the run."""
        return Captioner.from_pretrained(models_in(self._run.folder)[-1])

    def report(self) -> Path:
        """Write the page of the run; returns its path."""
        return report(self.folder)

    def _repr_html_(self) -> str:
        evaluations = self._run.evaluations
        metrics = "\n".join(line for found in evaluations.values() for line in figures(found.metrics))
        pictures = _pictures(evaluations["eval"]) if "eval" in evaluations else ""
        verdict = self.verification._repr_html_() if self.verification else ""
        return f"{verdict}<pre>{html.escape(metrics)}</pre>{pictures}"


def train(*, progress: bool = True, **flags: Flag) -> Result:
    """Train, evaluate and predict by the flags of `repro train`, as keywords.

    Raises:
        InputError: a flag is unknown (the nearest is named) or cannot be used.
        RunStopped: training cannot go on.
    """
    arguments = make_arguments(ARGUMENTS, _given(flags, "train"))
    start_logging(quiet=not progress)
    done = run(*arguments, progress=progress)
    report_at_end(done.folder)
    return Result(done.folder, done.metrics, _run=done)


def reproduce(
    recipe: str = "pocket", *, output_dir: str | os.PathLike[str] | None = None, keep_going: bool = False, **flags: Flag
) -> Result:
    """Run a recipe and hold the result against its targets, as `repro reproduce`; given again, it goes on.

    Args:
        output_dir: None for `repro-RECIPE`.
        keep_going: finish a run that can no longer meet the targets.
        flags: of `repro train`, which win over the recipe's.

    Raises:
        InputError, RunStopped: as `train`.
    """
    given = _given(flags, "reproduce")
    start_logging()
    done = recipes.reproduce(recipe, Path(output_dir or f"repro-{recipe}"), given, keep_going=keep_going)
    report_at_end(done.folder)
    return Result(done.folder, done.result.metrics, done.verification, _run=done.result)


def verify(
    *runs: str | os.PathLike[str],
    recipe: str | None = None,
    against: Sequence[str | os.PathLike[str]] = (),
    seeds: int | None = None,
    recompute: bool | None = None,
) -> verifying.Verification:
    """Hold finished runs against a recipe's targets, or `against` other runs, as `repro verify`."""
    folders, reference = [Path(run) for run in runs], [Path(run) for run in against]
    return verifying.verify(folders, recipe=recipe, reference=reference, seeds=seeds, recompute=recompute)


def report(
    *runs: str | os.PathLike[str], output: str | os.PathLike[str] | None = None, recipe: str | None = None
) -> Path:
    """Put runs on one page, as `repro report`; returns its path."""
    page = Path(output or Path(runs[0]) / REPORT)
    write_report([Path(run) for run in runs], page, recipe=recipe)
    return page


def _given(flags: dict[str, Flag], command: str) -> dict[str, object]:
    """Check keywords as a command line is checked."""
    written = flags_of(flags)
    learn_flags(written)
    if several := [name for name in SEVERAL if flags.get(name)]:
        raise InputError(f"{several[0]}: is for `repro {command}`, started once for each process.")
    return given_flags(ARGUMENTS, written, command=command)


def _pictures(evaluation: Evaluation) -> str:
    """Some images with their captions, small, within the page."""
    cells = []
    for path, caption in list(caption_of_each_image(evaluation.image_paths, evaluation.generations).items())[:PICTURES]:
        with suppress(ImageError):
            cells.append(f'<td><img src="{thumbnail(path)}"><br>{html.escape(caption)}</td>')
    return f"<table><tr>{''.join(cells)}</tr></table>"


def _with_flags(function: Callable[..., Result]) -> inspect.Signature:
    """Name the flags in a function's signature, so that `help` and completion show them."""
    shown = inspect.signature(function)
    own = {name: each for name, each in shown.parameters.items() if each.kind is not inspect.Parameter.VAR_KEYWORD}
    for flag in FLAGS.values():
        named = inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, default=flag.default, annotation=flag.type)
        own.setdefault(flag.name, named)
    return shown.replace(parameters=list(own.values()))


for _function in (train, reproduce):
    _function.__signature__ = _with_flags(_function)  # type: ignore[union-attr]
