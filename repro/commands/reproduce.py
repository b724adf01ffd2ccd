"""`repro reproduce`: a recipe's data, run and verdict."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from repro.commands import COMMANDS, INPUT_ERROR
from repro.commands.terminal import figures, leave_tpus_alone, make_deterministic, print_end, start_logging
from repro.commands.verify import conclude
from repro.config import ARGUMENTS, SEVERAL, TOPOLOGY, flag, given_flags
from repro.errors import InputError
from repro.parser import Checked, sentence

MOST_SEEDS = 200
RECIPES = """RECIPE is one of
  pocket          rendered scenes; 6 minutes and 1.5 GB of memory on two CPU cores
  coco2017        the documented run; 20.4 GB to download, 37 GB on disk; days on two
                  CPU cores, on one H200 minutes of training (estimated)
  coco2017-exact  the same training, scored without drops, with BLEU and CIDEr-D"""


@dataclass(frozen=True)
class ReproduceArguments(Checked):
    """What `repro reproduce` takes besides the flags of the run."""

    output_dir: str | None = flag(None, "Folder of all that is made (default: repro-RECIPE, with --seeds -seeds).")
    seeds: str | None = flag(
        None, "Run each of these, such as 1-5 or 1,4,9, in a folder of its own, and judge them together."
    )
    keep_going: bool = flag(False, "Finish a run that can no longer meet the targets.")
    dry_run: bool = flag(False, "Check machine, weights, data and disk, time a few steps, and estimate; train nothing.")
    topology: str | None = flag(None, f"With --dry_run: compile the run for {TOPOLOGY}.")


def main(argv: list[str]) -> int:
    recipe, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("pocket", argv)
    given = given_flags(
        (ReproduceArguments, *ARGUMENTS),
        argv,
        command="reproduce",
        hidden=ARGUMENTS,
        usage="%(prog)s [RECIPE] [FLAGS]",
        description=f"{sentence(COMMANDS['reproduce'])} Given again, the command goes on with a run that was ended."
        f"\n\n{RECIPES}",
        epilog="Every flag of `repro train` may be added, and wins over the recipe's.",
    )
    own = ReproduceArguments(**{f.name: given.pop(f.name) for f in fields(ReproduceArguments) if f.name in given})
    if given.get("deterministic"):
        make_deterministic()
    if own.topology:
        if not own.dry_run:
            raise InputError("--topology: trains nothing; add --dry_run.")
        leave_tpus_alone()
    seeds = _seeds(own.seeds, given) if own.seeds is not None else []
    folder = Path(own.output_dir or f"repro-{recipe}{'-seeds' * bool(seeds)}")
    from repro.recipes import read_recipe

    models = [name for flag, name in {**read_recipe(recipe)["flags"], **given}.items() if flag.endswith("_or_path")]
    first = f"recipe {recipe} in {folder}: starting JAX and transformers"
    start_logging(first, quiet=bool(given.get("process_id")), models=models, imports=("repro.recipes.reproduce",))
    from repro.recipes.reproduce import leaving_nothing, reproduce, reproduce_seeds, started
    from repro.training.processes import decided_by_first, start_processes

    several = {name: given[name] for name in SEVERAL if name in given}
    if own.dry_run and several:
        raise InputError(f"--dry_run: is of one process; drop {', '.join(f'--{name}' for name in several)}.")
    if own.dry_run:
        from repro.recipes.preflight import dry_run
        from repro.recipes.topology import compile_for, devices_of

        devices = devices_of(own.topology) if own.topology else []
        with leaving_nothing(folder), started(read_recipe(recipe), folder, given, folder) as arguments:
            found = compile_for(*arguments, devices=devices) if devices else dry_run(*arguments)
        print(found.text)
        return INPUT_ERROR if found.problems else 0
    start_processes(**several)
    if seeds:
        runs, verification = reproduce_seeds(recipe, folder, seeds, given, keep_going=own.keep_going)
    else:
        runs = [reproduce(recipe, folder, given, keep_going=own.keep_going)]
        verification = runs[0].verification
    return decided_by_first(lambda: _conclude(folder, runs, verification))


def _conclude(folder: Path, runs: Sequence[Any], verification: Any) -> int:
    """Write the report, and print what came of one run, or of several together."""
    from repro.reports.write import report_at_end

    facts = runs[0].result.facts if len(runs) == 1 else {"seconds": sum(run.result.facts["seconds"] for run in runs)}
    report_at_end(folder, [run.folder for run in runs] if len(runs) > 1 else ())
    if len(runs) == 1:
        print("\ncaptions of validation images")
        for image_path, caption, truth in runs[0].samples:
            print(f"  {Path(image_path).name}  {caption}")
            if truth:
                print(f"{'shows:':>18}  {textwrap.shorten(truth, 58, placeholder=' …')}")
        if not verification.outcomes and (evaluation := runs[0].result.evaluations.get("eval")):
            print("\nvalidation", *figures(evaluation.metrics), sep="\n")
        print()
    status = conclude(verification)
    print_end(folder, facts, runs[-1].result.folder)
    return status


def _seeds(text: str, given: Mapping[str, Any]) -> list[int]:
    """Read `1-5` or `1,4,9`, of which each may be the other."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or not (last if dash else first).isdecimal():
            raise InputError(f"--seeds {text}: must be like 1-5 or 1,4,9.")
        seeds += range(int(first), min(int(last or first), int(first) + MOST_SEEDS) + 1)
    if not 1 < len(set(seeds)) == len(seeds) <= MOST_SEEDS:
        raise InputError(f"--seeds {text}: must be 2 to {MOST_SEEDS} seeds, each once.")
    if given.keys() & {"seed", "resume"}:
        raise InputError("--seeds: takes the place of --seed and --resume; drop these.")
    return seeds
