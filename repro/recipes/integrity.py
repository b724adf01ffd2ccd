"""Whether finished runs can be relied on: their records whole, consistent, and several runs what they are taken for.

It need not stop a forger; it must stop every accident.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from repro.config import ARGUMENTS, FLAGS, HALVES, SEVERAL, flags_of, parse_arguments
from repro.data.atomic import sha256_of
from repro.errors import InputError
from repro.evaluation.rouge import rouge_scores
from repro.json_files import read_json
from repro.record.record import FACTS, GENERATION, ROWS, Record, Recorded, digest_of_facts
from repro.record.writer import checked_files, models_in, prefixed

SAME_SCORE = 1e-4  # of ROUGE, 0 to 100: computed again from the same captions it is the same but for the order of a sum
# Shares of a loss and of a metric of captions, computed again from the weights on the kind of device of the run.
SAME_LOSS, SAME_METRIC = 1e-5, 2e-3
# Times as much on another, where products are rounded to bfloat16: pocket's loss by 2e-4, ROUGE-2 by 0.5 %.
ELSEWHERE = 50.0


def missing_of_record(folder: Path, facts: Mapping[str, Any], recorded: Recorded) -> list[str]:
    """Find what a finished run's record lacks, and which of its files are not as it left them."""
    checksums: Mapping[str, str] = facts.get("checksums", {})
    if not checksums:
        return ["run.json has no checksums of its figures"]
    needed = {path.relative_to(folder).as_posix() for path in checked_files(folder)} | {ROWS}
    for step in recorded.evaluations("eval"):
        names = ["eval_results.json"]
        names += ["eval_generation.json"] * bool(facts["flags"].get("predict_with_generate"))
        names += ["flax_model.msgpack"] * (0 < step == facts["num_steps"])
        needed |= {(_place(folder, step) / name).relative_to(folder).as_posix() for name in names}
    problems = [f"run.json has no checksum of {name}" for name in sorted(needed - checksums.keys())]
    now = {name: sha256_of(folder / name) for name in checksums if name != FACTS and (folder / name).is_file()}
    now[FACTS] = digest_of_facts(facts)  # which earlier versions did not note
    problems += [f"{name} is not as the run left it" for name, digest in checksums.items() if now.get(name) != digest]
    steps = [row["step"] for row in recorded.rows if "loss" in row]
    if steps != list(range(1, facts["num_steps"] + 1)):
        problems.append(f"metrics.jsonl has {len(set(steps))} of {facts['num_steps']} steps, or not in order")
    if broken := [row["step"] for row in recorded.rows if "loss" in row and not math.isfinite(row["loss"])]:
        problems.append(f"the loss of step {broken[0]} is not finite")
    return problems


def _place(folder: Path, step: int) -> Path:
    """The folder of an evaluation's files: its model's, or without training the run's own."""
    return next((path for path in models_in(folder) if path.name.endswith(f"_step_{step}")), folder)


def contradictions(folder: Path, recorded: Recorded) -> list[str]:
    """Compute scores again from the captions, and hold results against the record."""
    problems = []
    for step, entry in recorded.evaluations("eval").items():
        place = _place(folder, step)
        named = prefixed("eval", {name: v for name, v in entry.items() if isinstance(v, int | float)})
        try:
            results = read_json(place / "eval_results.json", dict[str, float])
            found = {name: (value, named.get(name)) for name, value in results.items()}
            if "rouge1" in entry:
                rows = read_json(place / "eval_generation.json", list[GENERATION])
                if len(rows) != entry["rows"]:
                    problems.append(f"step {step}: {len(rows)} captions, of {entry['rows']} rows that were evaluated")
                again = rouge_scores([row["pred"] for row in rows], [row["label"] for row in rows])
                if again.sentence_splitter != entry["sentence_splitter"]:  # which decides about rougeLsum alone
                    again.means.pop("rougeLsum")
                found |= {f"{name} of its captions": (value, entry[name]) for name, value in again.means.items()}
        except (InputError, LookupError) as error:
            problems.append(f"step {step}: its results and captions cannot be read ({error})")
            continue
        problems += [
            f"step {step}: {name} is {value}, and metrics.jsonl has {other}"
            for name, (value, other) in found.items()
            if other is None or not abs(value - other) <= SAME_SCORE
        ]
    return problems


def evaluated_again(folder: Path, facts: Mapping[str, Any], recorded: Recorded) -> tuple[list[str], list[str]]:
    """Evaluate the last model again, on the run's data with the run's flags.

    Returns:
        What contradicts the record, and notes: that there was nothing to evaluate, or how far apart the metrics are.
    """
    from repro.run.train import run

    step = facts["num_steps"]
    recorded_metrics = recorded.evaluations("eval").get(step)
    if not recorded_metrics:
        return [], ["not evaluated again: there is no evaluation of the last step"]
    # Earlier versions had other flags, too.
    flags = {name: value for name, value in facts["flags"].items() if name in FLAGS and not name.startswith(HALVES)}
    flags |= {"do_train": False, "do_predict": False, "push_to_hub": False, "resume": "never", "mesh": None}
    flags |= {"model_name_or_path": str(_place(folder, step)), "num_replicas": facts["num_replicas"]}
    flags |= {"overwrite_output_dir": False, **dict.fromkeys(SEVERAL)}
    with tempfile.TemporaryDirectory() as output:
        flags["output_dir"] = f"{output}/again"
        try:
            arguments = parse_arguments(ARGUMENTS, flags_of(flags), command="verify")
            found = run(*arguments, progress=False).evaluations["eval"]
        except InputError as error:
            return [], [f"not evaluated again: {error}"]
    again = {**found.metrics, "rows": found.details["rows"]}
    looser = 1.0 if str(facts.get("platform")).startswith(f"{jax.default_backend()},") else ELSEWHERE
    problems = [
        f"{name} of its weights is {value:.6g}, and metrics.jsonl has {recorded_metrics.get(name)}"
        for name, value in again.items()
        if not abs(value - recorded_metrics.get(name, math.inf))
        <= looser * abs(value) * (SAME_LOSS if name == "loss" else SAME_METRIC)
    ]
    apart = again["loss"] - recorded_metrics["loss"]
    return problems, [f"evaluated again: loss {again['loss']:.6f}, {apart:+.1e} apart"]


def not_repetitions(runs: Sequence[Record]) -> list[str]:
    """Find what forbids to take runs for repetitions of one another."""
    usable = [run for run in runs if run.facts]
    seeds = [run.seed for run in usable]
    problems = [
        f"seed {seed} is there {seeds.count(seed)} times; runs of one seed are not independent"
        for seed in sorted({seed for seed in seeds if seeds.count(seed) > 1})
    ]
    return problems + _different(
        model_implementation=[run.facts["model"]["implementation"] for run in usable],
        dtype=[run.facts["flags"].get("dtype") for run in usable],
    )


def mixed(runs: Sequence[Record], others: Sequence[Record]) -> list[str]:
    """Find what forbids to compare runs at all: old with new, or with one another."""
    usable = [run for run in (*runs, *others) if run.facts]
    # What a configuration consists of depends on the version of transformers.
    models: dict[tuple[str, str], list[str]] = {}
    seeds: dict[tuple[float, ...], set[int]] = {}
    for run in usable:
        model, version = run.facts["model"], run.facts.get("versions", {}).get("transformers")
        models.setdefault((model["implementation"], version), []).append(model.get("fingerprint"))
        if run.losses:
            seeds.setdefault(run.losses, set()).add(run.seed)
    return [
        *_different(
            data=[{n: s.get("fingerprint") for n, s in run.facts.get("data", {}).items()} for run in usable],
            steps=[run.facts["num_steps"] for run in usable],
            parameters=[run.facts["model"]["parameters"] for run in usable],
            counts=[
                [(n, s["kept"], s["dropped"], s["images"]) for n, s in run.facts["data"].items()] for run in usable
            ],
        ),
        *(problem for found in models.values() for problem in _different(models=found)),
        *(
            f"seeds {', '.join(map(str, sorted(same)))} have the same losses, so they are one run"
            for same in seeds.values()
            if len(same) > 1
        ),
    ]


def other_versions(runs: Sequence[Record], others: Sequence[Record]) -> list[str]:
    """Say of which versions old and new runs are, where they differ: what an upgrade has changed."""
    found = []
    for name in dict.fromkeys(name for run in (*runs, *others) for name in run.facts.get("versions", {})):
        now, then = (
            ", ".join(sorted({str(run.facts.get("versions", {}).get(name)) for run in group}))
            for group in (runs, others)
        )
        found += [f"{name} {then} then, {now} now"] * (now != then)
    return [f"versions: {'; '.join(found)}"] if found else []


def _different(**found: Sequence[Any]) -> list[str]:
    values = {what: sorted(set(map(str, each))) for what, each in found.items()}
    return [f"the runs are of different {what}: {', '.join(each)}" for what, each in values.items() if len(each) > 1]
