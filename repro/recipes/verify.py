"""`repro verify`: what finished runs say about a recipe's targets; and a run's figures while it is still at work."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repro.config import ARGUMENTS, FLAGS, SEVERAL, flags_of, parse_arguments
from repro.errors import InputError, RunStopped
from repro.json_files import keys, read_json
from repro.recipes import integrity, read_recipe
from repro.recipes.equivalence import Verdict
from repro.recipes.targets import Measured, Outcome, Run, Target, against, judge_all, overall, read_targets
from repro.record.metrics import name_of
from repro.record.record import FACTS, Record, Recorded, read_record
from repro.run.settings import Settings

MARKER, MARKER_FORM = "recipe.json", keys(name=str)
RUN = "run"
WIDTH = 78  # columns of the table of verdicts
LABELS = {
    "train_dropped": "training rows left out",
    "train_fingerprint": "training rows' fingerprint",
    "validation_fingerprint": "validation rows' fingerprint",
    "num_steps": "steps",
    "loss": "training losses",
    "learning_rate": "learning rates",
    "eval_rows": "validation rows",
    "eval_loss": "validation loss",
    "probe_loss": "first steps' losses",
    "probe_grad_norm": "first steps' gradients",
    "probe_moved": "size of the updates",
    "probe_idle": "change without gradient",
    "probe_orders": "orders of the rows",
}
PROBE = "probe_"  # what `repro.recipes.probe` found
BY_STEP = ("loss", "learning_rate")
OF_TRAIN = {"rows": "kept", "dropped": "dropped", "images": "images"}
COUNTS = (*(f"train_{what}" for what in OF_TRAIN), "num_steps", "parameters")
FINGERPRINTS = {"train_fingerprint": "train", "validation_fingerprint": "validation"}
STARTS = ("model_name_or_path", "encoder_model_name_or_path", "decoder_model_name_or_path")
# Flags that a resumed run may change, and a recipe's may not.
ALSO_COMPARED = ("do_train", "num_replicas", "eval_steps", "max_train_samples", "max_eval_samples", *STARTS)
NOT_COMPARED = ("seed", "output_dir", "overwrite_output_dir", "resume", "token", "hub_token", *SEVERAL)
# What `repro reproduce` adds for a recipe that makes its own data.
OF_ITS_FOLDER = ("data_dir", "cache_dir", "encoder_config_name", "decoder_config_name")
LOOKS = "each look at so many runs is paid for; a number named before the first run, --seeds N, tells with fewer"
# Of a run's facts; whatever else may be missing has a meaning.
NEEDED = ("flags", "data", "model", "num_steps", "num_replicas")
OUTCOME = ("wanted", "measured", "difference", "interval", "verdict", "reason")  # what `--json` writes of an outcome
EARLY = (*BY_STEP, *COUNTS, *FINGERPRINTS, PROBE)  # how the names begin of what is known before the run is over


@dataclass(frozen=True)
class Verification:
    """What runs come to, held against a recipe; a notebook shows it as a table."""

    recipe: str
    runs: tuple[Record, ...]
    outcomes: tuple[Outcome, ...]
    problems: tuple[str, ...]  # of the runs, by folder; with any, nothing was judged
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        return Verdict.CANNOT_TELL if self.problems else overall(self.outcomes)

    @property
    def claim(self) -> str:
        """What a PASS says: at most that the runs are equivalent to others, at least that they are within bounds."""
        found = {outcome.claim: outcome.target.is_statistical for outcome in self.outcomes if outcome.target.is_score}
        if self.verdict is not Verdict.PASS:
            return ""
        return next((claim for claim, statistical in found.items() if statistical), next(iter(found)))

    @property
    def table(self) -> str:
        """Targets, figures and verdicts as text of at most `WIDTH` columns; `as_json` has all figures."""
        lines = [f"{'':30} {'measured':>11} {'wanted':>22}  verdict"] if self.outcomes else []
        for outcome in self.outcomes:
            measured, difference, interval, reason = in_words(outcome)
            wanted = outcome.wanted if len(outcome.wanted) <= 22 else "see below"
            shown = measured or difference
            lines.append(f"{label(outcome.target):30} {shown:>11} {wanted:>22}  {outcome.verdict}")
            more = [f"wanted {outcome.wanted}"] * (wanted != outcome.wanted)
            if outcome.verdict != "PASS":
                more += [f"off by {interval}"] * bool(interval) + [reason.strip(" ()")] * bool(reason)
            lines += textwrap.wrap("; ".join(more), WIDTH, initial_indent="  ", subsequent_indent="  ")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        text = "\n".join([f"{self.verdict}  {self.claim}", *self.problems, self.table])
        return f"<pre>{html.escape(text)}</pre>"


def folders_of_runs(named: Sequence[Path]) -> list[Path]:
    """Put its seeds' folders in the place of one of `repro reproduce --seeds`; an InputError if one is no folder."""
    found: list[Path] = []
    for folder in named:
        if not folder.is_dir():
            raise InputError(f"{folder}: is not a folder; name a reproduction's, or a run's.")
        found += sorted(folder.glob("seed-*"), key=lambda seed: (len(seed.name), seed.name)) or [folder]
    return found


def verify(
    folders: Sequence[Path],
    *,
    recipe: str | None = None,
    reference: Sequence[Path] = (),
    seeds: int | None = None,
    recompute: bool | None = None,
) -> Verification:
    """Hold one run, or several with different seeds, against a recipe.

    Args:
        folders: of reproductions, with one seed or several, or of runs, which do not know their recipe.
        recipe: by name; None for the one that the first folder names.
        reference: other runs of the recipe, whose values take the place of the recipe's.
        seeds: how many runs there were to be, decided before the first; None if they are looked at one after another,
            which those in one folder of `repro reproduce --seeds` are not.
        recompute: evaluate the last models again; None for what the recipe says.

    Raises:
        InputError: a folder is not there, or no recipe is named.
    """
    named, folders, reference = len(folders), folders_of_runs(folders), folders_of_runs(reference)
    seeds = len(folders) if seeds is None and named == 1 < len(folders) else seeds
    content = read_recipe(recipe) if recipe else _recipe_of(folders[0])
    runs = [read_run(folder, content) for folder in folders]
    others = [read_run(folder, content) for folder in reference]
    problems = [f"{run.folder}: {problem}" for run in (*runs, *others) for problem in run.problems]
    problems += [*integrity.not_repetitions(runs), *integrity.not_repetitions(others), *integrity.mixed(runs, others)]
    if seeds is not None and seeds != len(runs):
        problems.append(f"--seeds {seeds}: named {seeds} runs and {len(runs)} are given; what is fixed is their number")
    targets = read_targets(content["targets"])
    notes = [_time(run, content) for run in runs if run.minutes is not None]
    if not problems:
        targets = against(targets, [measures(run.facts, run.recorded.rows) for run in others]) if others else targets
        for run in (*runs, *others):
            found = integrity.contradictions(run.folder, run.recorded)
            if content.get("recompute", False) if recompute is None else recompute:
                again, more = integrity.evaluated_again(run.folder, run.facts, run.recorded)
                found, notes = found + again, notes + [f"{run.folder}: {note}" for note in more]
            problems += [f"{run.folder}: {problem}" for problem in found]
        same = [str(run.folder) for run in others if run.losses in {one.losses for one in runs}]
        notes += [f"losses equal those of {', '.join(same)}, step for step"] * bool(same)
    notes += integrity.other_versions(runs, others) if others else []
    notes += [LOOKS] * (seeds is None and len(runs) > 1)
    found_of = [measures(run.facts, run.recorded.rows) for run in ([] if problems else runs)]
    outcomes = judge_all(targets, found_of, named=seeds is not None) if found_of else []
    return Verification(content["name"], tuple(runs), tuple(outcomes), tuple(problems), tuple(notes))


def _time(run: Record, recipe: Mapping[str, Any]) -> str:
    published = recipe.get("reported", {}).get("minutes")
    beside = f"; published: {published['value']} ({published['source']})" if published else ""
    return f"{run.folder}: {run.minutes:.1f} minutes{beside}; time is reported and never judged"


def stop_if_hopeless(recipe: Mapping[str, Any], facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Stop a run, by what will be its `run.json` and its rows so far, once it is plain that it misses its targets.

    A run that was given other flags than the recipe's is none of the recipe's, and is left to go on.

    Raises:
        RunStopped: a count, a learning rate or the losses so far fail.
    """
    if _flags_that_differ(facts, recipe)[0]:
        return
    targets = [target for target in read_targets(recipe["targets"]) if target.metric.startswith(EARLY)]
    outcomes = judge_all(targets, [measures(facts, rows)])
    if failed := [outcome for outcome in outcomes if outcome.verdict is Verdict.FAIL]:
        raise RunStopped(
            f"the run cannot reproduce {recipe['name']} any more: {'; '.join(map(describe, failed))}. Mend what"
            " differs, or add --keep_going to have it finished all the same."
        )


def read_run(folder: Path, recipe: Mapping[str, Any]) -> Record:
    """Read a run, and find what forbids conclusions from it."""
    if (folder / RUN).is_dir():
        folder = folder / RUN
    record = read_record(folder)
    facts = record.facts
    lacks = [f"{FACTS}: has no {name}" for name in NEEDED if record.facts and name not in facts]
    if record.problems or lacks:
        return Record(folder, {}, Recorded([]), [*record.problems, *lacks])
    recorded = record.recorded.up_to(facts["num_steps"])
    problems, notes = _flags_that_differ(facts, recipe)
    if not facts.get("finished"):
        problems.append("the run is not finished; --resume auto goes on with it")
    else:
        problems += integrity.missing_of_record(folder, facts, recorded)
    return Record(folder, facts, recorded, problems, notes)


def measures(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Run:
    """What a run of these facts and rows measured of a target: by step, or at "" ."""
    data, evaluations = facts.get("data", {}), {row["step"]: row["eval"] for row in rows if "eval" in row}
    counts: dict[str, Any] = {f"train_{what}": data.get("train", {}).get(name) for what, name in OF_TRAIN.items()}
    counts |= {"num_steps": facts.get("num_steps"), "parameters": facts.get("model", {}).get("parameters")}
    counts |= {f"{PROBE}{name}": value for name, value in facts.get("probe", {}).items()}
    seed = int(facts["flags"]["seed"])

    def of(target: Target) -> Measured:
        metric, steps = target.metric, target.steps
        if metric in FINGERPRINTS:
            return Measured(seed, text=data.get(FINGERPRINTS[metric], {}).get("fingerprint"))
        if metric in BY_STEP:
            found = {str(row["step"]): row[metric] for row in rows if row["step"] in steps and metric in row}
            return Measured(seed, found)
        step = max(evaluations, default=None) if target.step is None else target.step
        metrics = {f"eval_{name}": v for name, v in evaluations.get(step, {}).items() if isinstance(v, int | float)}
        value = (counts | metrics).get(metric)
        return Measured(seed, {} if value is None else value if isinstance(value, dict) else {"": float(value)})

    return of


def _recipe_of(folder: Path) -> dict[str, Any]:
    marker = (folder if (folder / MARKER).is_file() else folder.parent) / MARKER
    if not marker.is_file():
        raise InputError(f"{folder}: does not say which recipe it is of; add --recipe NAME.")
    return read_recipe(read_json(marker, MARKER_FORM)["name"])


def _flags_that_differ(facts: Mapping[str, Any], recipe: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    own = dict.fromkeys(OF_ITS_FOLDER, ".") if "data" in recipe else {}
    parsed = parse_arguments(ARGUMENTS, flags_of({**recipe["flags"], **own}), command="verify")
    settings, flags, problems, notes = Settings.of(*parsed, num_devices=1), facts["flags"], list[str](), list[str]()
    for name, value in settings.flags.items():
        if name in (*NOT_COMPARED, *own) or flags.get(name) == value:
            continue
        free = FLAGS[name].metadata.get("may_change") and name not in ALSO_COMPARED
        text = f"--{name} {flags.get(name)}, the recipe has {value}"
        (notes if free or name in recipe.get("may_vary", ()) else problems).append(text)
    if facts.get("shuffle", settings.shuffle) != settings.shuffle:
        size = flags.get("block_size")
        problems.append(f"--block_size {size}: decides whether rows are shuffled, unlike the recipe's")
    return problems, notes


def describe(outcome: Outcome) -> str:
    """Put an outcome on one line."""
    *figures, reason = in_words(outcome)
    named = zip(("measured", "difference", "interval"), figures, strict=True)
    parts = [f"{name} {figure}" for name, figure in named if figure]
    return ", ".join([f"{outcome.target.name}: wanted {outcome.wanted}", *parts]) + reason


def in_words(outcome: Outcome) -> tuple[str, str, str, str]:
    """What was measured, its difference, that one's interval, and the reason; empty where there is none."""
    low, high = outcome.interval or (0.0, 0.0)
    return (
        "" if outcome.measured is None else f"{outcome.measured:.{6 if outcome.measured % 1 else 12}g}",
        "" if outcome.difference is None else f"{outcome.difference:+.4g}",
        "" if outcome.interval is None else f"{low:+.4g} to {high:+.4g}",
        f" ({outcome.reason})" if outcome.reason else "",
    )


def label(target: Target) -> str:
    """What people call a target."""
    name = target.metric.removeprefix("eval_").replace("train_", "training ")
    text = LABELS.get(target.metric) or name_of(name)
    return text if target.step is None else f"{text} at step {target.step}"


def as_json(verification: Verification) -> dict[str, Any]:
    """Make what `--json` writes."""
    return {
        **{name: getattr(verification, name) for name in ("recipe", "verdict", "claim", "problems", "notes")},
        "runs": [
            {
                "folder": str(run.folder),
                "seed": run.seed if run.facts else None,
                "minutes": run.minutes,
                "notes": run.notes,
            }
            for run in verification.runs
        ],
        "targets": [
            {"target": of.target.name, **{name: getattr(of, name) for name in OUTCOME}, "source": of.target.source}
            for of in verification.outcomes
        ],
    }
