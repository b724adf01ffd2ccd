"""`repro verify` and `repro report`: finished runs against a recipe's targets, in words or on one page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from repro.commands import COMMANDS
from repro.commands.terminal import coloured, start_logging
from repro.parser import Parser, sentence

STATUS_OF_VERDICT = {"PASS": 0, "FAIL": 1, "CANNOT TELL": 2}
EPILOG = "The exit status is 0 for PASS, 1 for FAIL and 2 for CANNOT TELL."
RUNS: Any = {"nargs": "+", "type": Path, "metavar": "RUN"}


def main(argv: list[str]) -> int:
    parser = Parser(prog="repro verify", description=sentence(COMMANDS["verify"]), epilog=EPILOG)
    parser.add_argument("runs", **RUNS, help="folders of a reproduction or of a run, one for each seed")
    whose = "whose targets (default: those of the recipe that the first folder was made by)"
    parser.add_argument("--recipe", metavar="NAME", help=whose)
    parser.add_argument("--against", **RUNS, default=(), help="runs that take the reference's place")
    number = "how many runs there were to be, decided before the first of them"
    parser.add_argument("--seeds", type=int, metavar="N", help=number)
    again = "evaluate the last model of each run again (default: what the recipe says; pocket does)"
    parser.add_argument("--recompute", action="store_true", default=None, help=again)
    parser.add_argument("--no_recompute", action="store_false", dest="recompute", help="do not")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts there")
    args = parser.parse_args(argv)
    start_logging()
    from repro.data.atomic import check_file_writable
    from repro.json_files import write_json
    from repro.recipes.verify import as_json, verify

    if args.json:
        check_file_writable(args.json, "--json")
    done = verify(args.runs, recipe=args.recipe, reference=args.against, seeds=args.seeds, recompute=args.recompute)
    if args.json:
        write_json(args.json, as_json(done))
    return conclude(done)


def report(argv: list[str]) -> int:
    parser = Parser(prog="repro report", description=sentence(COMMANDS["report"]))
    parser.add_argument("runs", **RUNS, help="folders of runs or of reproductions")
    whose = "whose targets they are held against (default: their own, if any)"
    parser.add_argument("--recipe", metavar="NAME", help=whose)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the first folder")
    args = parser.parse_args(argv)
    start_logging()
    from repro.data.atomic import check_file_writable
    from repro.record.writer import REPORT
    from repro.reports.write import write_report

    output = args.output or args.runs[0] / REPORT
    check_file_writable(output, "--output")
    write_report(args.runs, output, recipe=args.recipe)
    print(f"written to {output}")
    return 0


def conclude(verification: Any) -> int:
    """Print a verdict and what led to it, and give its exit status."""
    for note in [*(f"{run.folder}: {note}" for run in verification.runs for note in run.notes), *verification.notes]:
        print(f"note: {note}")
    for problem in verification.problems:
        print(f"cannot tell: {problem}")
    if verification.outcomes:
        print(coloured(verification.table, sys.stdout))
    number, claim = len(verification.runs), f", {verification.claim}" * bool(verification.claim)
    end = f"{number} run{'s' * (number > 1)} of {verification.recipe}{claim}"
    print(coloured(f"\n{verification.verdict}: {end}", sys.stdout))
    return STATUS_OF_VERDICT[verification.verdict]
