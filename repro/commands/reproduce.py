"""`repro reproduce`: a recipe's data, run and verdict."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

from repro.commands import COMMANDS, INPUT_ERROR
from repro.commands.parser import Parser, sentence
from repro.commands.terminal import make_deterministic, print_table, speed, start_logging
from repro.commands.verify import conclude
from repro.config import DataArguments, ModelArguments, TrainingArguments


def main(argv: list[str]) -> int:
    # The recipe comes first, since among flags of which this parser knows nothing a value would be taken for it.
    recipe, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("pocket", argv)
    parser = Parser(
        prog="repro reproduce",
        usage="%(prog)s [RECIPE] [FLAGS]",
        description=f"{sentence(COMMANDS['reproduce'])} Given again, the command goes on with a run that was ended."
        " RECIPE is pocket, which renders its own data; coco2017, the documented run; or coco2017-exact, the same"
        " training scored without drops.",
        epilog="Every flag of `repro train` may be added, and wins over the recipe's.",
    )
    parser.add_argument("--output_dir", type=Path, metavar="FOLDER", help="of all that is made (default: repro-RECIPE)")
    parser.add_argument("--keep_going", action="store_true", help="finish a run that can no longer meet the targets")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check machine, weights, data and disk, time a few steps, and estimate; train nothing",
    )
    parser.check_flags(argv, others=_train_flags())
    args, flags = parser.parse_known_args(argv)
    if "--deterministic" in flags:
        make_deterministic(os.environ)
    start_logging()
    from repro.recipes import read_recipe
    from repro.report import report_at_end
    from repro.reproduce import leaving_nothing, reproduce, start_recipe
    from repro.verify import table

    folder = args.output_dir or Path(f"repro-{recipe}")
    if args.dry_run:
        from repro.dry_run import describe, dry_run

        with leaving_nothing(folder):
            found = dry_run(*start_recipe(read_recipe(recipe), folder, flags))
        print(describe(found))
        return INPUT_ERROR if found.problems else 0
    done = reproduce(recipe, folder, flags, keep_going=args.keep_going)
    report_at_end(folder)
    print("\ncaptions of validation images")
    for sample in done.samples:
        print(f"  {Path(sample.image_path).name}  {sample.caption}")
        if sample.truth:
            print(f"{'shows:':>18}  {sample.truth}")
    print_table("metric", {**done.result.metrics, **speed(done.result.facts)})
    return conclude(done.verification, table(done.verification.outcomes), f"written to {folder}")


def _train_flags() -> set[str]:
    """The names as `repro train` takes them: with dashes too, and what is on by itself with a `no` before it."""
    names = {
        field.name for arguments in (ModelArguments, DataArguments, TrainingArguments) for field in fields(arguments)
    }
    names |= {f"no_{name}" for name in names}
    return names | {name.replace("_", "-") for name in names}
