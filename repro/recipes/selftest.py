"""The golden cases on this machine: whether what is installed here still computes what the reference computed.

A case is a run of the reference on a tiny model, recorded step by step and caption by caption (`golden/README.md`). It
is run again, and its files are held against the record, for a test, or for a person after an upgrade.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization, traverse_util

from repro.config import ARGUMENTS, parse_arguments
from repro.record.writer import log
from repro.run.train import run

GOLDEN = Path(__file__).parent / "golden"
CASES = ("current_1dev", "current_8dev", "published_8dev", "current_block0")
PROTOCOLS = {"head": "current", "published": "published"}
JUDGED = "float32, highest"
UNMOVED = 1e-6  # norm up to which the record's own parameter is taken for one that does not move


@dataclass(frozen=True)
class Bounds:
    """How far a run may be from the record."""

    loss: float = 2e-5  # of each training step; another XLA or another processor adds in another order
    learning_rate: float = 1e-7
    evaluation: float = 1e-4  # of an evaluation's loss and length, and of ROUGE in percent
    # Of each parameter's norm, relative. Before Pillow 13 the cases' JPEGs decode otherwise, which moves one bias by
    # 0.0011; with Pillow 13 it is 0.000001 on jax 0.10 to 0.12.
    norm: float = 2e-3
    # Of the norm of a parameter that does not move in exact arithmetic, as attention's biases of keys: their gradients
    # are rounding, of which AdamW makes steps. A gradient that is none would move them by 0.01.
    noise: float = 1e-4


@dataclass(frozen=True)
class CaseResult:
    """How near a run came to the record of its case; figures are the largest differences, as `Bounds` has them."""

    name: str
    steps: int  # compared
    first_difference: int | None  # the first step beyond the bound
    loss: float
    learning_rate: float
    evaluation: float
    rouge: float  # in percent
    norm: float
    noise: float
    captions_equal: int  # of `captions`
    captions: int
    counts: tuple[str, ...]  # what differs in rows and steps, in words
    passed: bool


def read_case(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def command_line(case: dict[str, Any], output_dir: Path) -> list[str]:
    """Write the flags with which `repro train` does what the reference did; the cache lies beside `output_dir`."""
    inputs = GOLDEN / "inputs"
    files = {"train_file": "train", "validation_file": "val", "test_file": "test"}
    return [
        *("--output_dir", str(output_dir), "--cache_dir", str(output_dir.parent / "cache")),
        *("--model_name_or_path", str(inputs / "model")),
        *(f"--{flag}={inputs / name}.jsonl" for flag, name in files.items()),
        *("--image_column", "image_path", "--caption_column", "caption"),
        *("--protocol", PROTOCOLS[case["semantics"]], "--num_replicas", str(case["devices"]), "--attention_pictures=0"),
        *case["args"],
    ]


def run_case(name: str, folder: Path, flags: Sequence[str] = ()) -> CaseResult:
    """Run a case in a folder that holds no other, with further flags such as `--dtype bfloat16`, and compare."""
    arguments = parse_arguments(ARGUMENTS, [*command_line(read_case(name), folder), *flags], command="train")
    run(*arguments, progress=False)
    return compare_with_golden(folder, name)


def compare_with_golden(folder: Path, name: str, bounds: Bounds = Bounds()) -> CaseResult:
    """Hold the files of a run against the record of a case."""
    case = read_case(name)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "loss" in row]
    pairs = list(zip(measured, case["train_steps"], strict=False))
    losses, rates = (
        np.abs([ours[kind] - theirs[kind] for ours, theirs in pairs]) for kind in ("loss", "learning_rate")
    )
    # Written so that a NaN is beyond every bound.
    beyond = np.flatnonzero(~((losses <= bounds.loss) & (rates <= bounds.learning_rate)))
    evaluations = [_compare_evaluation(folder, rows, expected) for expected in case["evals"]]
    differences = {kind: [value for found in evaluations for value in found[kind]] for kind in evaluations[0]}
    largest = {kind: float(np.max(np.abs([0.0, *values]))) for kind, values in differences.items()}  # a NaN stays one
    first = pairs[beyond[0]][1]["step"] if len(beyond) else None
    counts = _differing_counts(folder, case, len(measured))
    near = not counts and first is None and largest["evaluation"] <= bounds.evaluation
    alike = largest["captions"] == 0 and largest["rouge"] <= bounds.evaluation
    moved = largest["norm"] <= bounds.norm and largest["noise"] <= bounds.noise
    return CaseResult(
        name=name,
        steps=len(pairs),
        first_difference=first,
        loss=float(losses.max()),
        learning_rate=float(rates.max()),
        **{kind: largest[kind] for kind in ("evaluation", "rouge", "norm", "noise")},
        captions_equal=differences["captions"].count(0),
        captions=len(differences["captions"]),
        counts=counts,
        passed=near and alike and moved,
    )


def _compare_evaluation(folder: Path, rows: list[dict[str, Any]], expected: dict[str, Any]) -> dict[str, list[float]]:
    """Differences of one evaluation: of loss and length, of ROUGE, of parameters; 0 or 1 for each caption."""
    prefix = "eval" if "eval_results" in expected else "test"
    place, step = folder / expected["dir"], expected["dir"].rpartition("_")[2]
    found = next(row[prefix] for row in rows if prefix in row and (not step or row["step"] == int(step)))
    generations = json.loads((place / f"{prefix}_generation.json").read_text())
    captions = zip(generations, expected[f"{prefix}_generation"], strict=True)
    recorded = expected.get("param_l2_norms", {})
    params = serialization.msgpack_restore((place / "flax_model.msgpack").read_bytes()) if recorded else {}
    weights = traverse_util.flatten_dict(params, sep="/")
    norms = {path: float(np.linalg.norm(np.asarray(value, np.float64))) for path, value in weights.items()}
    assert norms.keys() == recorded.keys(), "the parameter tree is another one"
    return {
        "evaluation": [found[kind] - expected[f"{prefix}_results"][f"{prefix}_{kind}"] for kind in ("loss", "gen_len")],
        "rouge": [found[kind] - mean for kind, mean in expected[f"{prefix}_rouge_exact_mean"].items()],
        "norm": [norms[path] / norm - 1 for path, norm in recorded.items() if norm > UNMOVED],
        "noise": [norms[path] - norm for path, norm in recorded.items() if norm <= UNMOVED],
        "captions": [ours != theirs for ours, theirs in captions],
    }


def _differing_counts(folder: Path, case: dict[str, Any], num_steps: int) -> tuple[str, ...]:
    facts, expected = json.loads((folder / "run.json").read_text()), case["counts"]
    batch = expected["Total train batch size (w. parallel & distributed)"]
    kept = {split: counts["kept"] for split, counts in facts["data"].items()}
    # The example counts the rows that fill its batches where it shuffles, and all of them where it does not.
    train = kept["train"] if expected["Num train examples"] % batch else kept["train"] // batch * batch
    pairs = {
        "steps": (num_steps, len(case["train_steps"])),
        "steps of an epoch": (facts["steps_per_epoch"], expected["Optimization steps per epoch"]),
        "training rows": (train, expected["Num train examples"]),
        "validation rows": (kept["validation"], expected["Num evaluation examples"]),
    }
    return tuple(f"{what}: {ours}, not {theirs}" for what, (ours, theirs) in pairs.items() if ours != theirs)


def run_cases(dtype: str | None, say: Callable[[str], None]) -> dict[str, list[CaseResult]]:
    """Run the short cases, judged in float32 at the highest precision of products, and reported otherwise.

    Args:
        dtype: a further type of computation to report.
        say: is told the table of results line by line as they come, at most 78 columns wide.

    Returns:
        Results by what they were computed in: `float32, highest` is the one that is judged.
    """
    ways: dict[str, tuple[str, list[str]]] = {JUDGED: ("highest", [])}
    if jax.default_backend() != "cpu":  # a CPU has one precision
        ways["float32, default"] = ("default", [])
    if dtype and dtype != "float32":
        ways[dtype] = ("default", ["--dtype", dtype])
    results: dict[str, list[CaseResult]] = {way: [] for way in ways}
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        for way, (precision, flags) in ways.items():
            say(f"{way}{'' if way == JUDGED else ' (reported, not judged)'}")
            say("  case            steps differs at    loss    rate   norms  captions  verdict")
            for name in CASES:
                with tempfile.TemporaryDirectory() as place, jax.default_matmul_precision(precision):
                    result = run_case(name, Path(place) / "run", flags)
                results[way].append(result)
                say(_line(way, result))
    finally:
        log.setLevel(level)
    return results


def _line(way: str, case: CaseResult) -> str:
    """Put one result into words."""
    verdict = ("PASS" if case.passed else "FAIL") if way == JUDGED else ("equal" if case.passed else "differs")
    first = (
        f"  {case.name:15}{case.steps:>6}{case.first_difference or '-':>11}{case.loss:8.0e}{case.learning_rate:8.0e}"
        f"{case.norm:8.0e}{f'{case.captions_equal}/{case.captions}':>10}  {verdict}"
    )
    return "\n".join([first, *(f"    {difference}" for difference in case.counts)])
