"""`repro env` and `repro selftest`: what is installed here, and whether it computes what the reference computed."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from repro.commands import COMMANDS
from repro.commands.terminal import start_logging
from repro.parser import Parser, sentence
from repro.provenance import as_lines, environment

EPILOG = (
    "The exit status is 0 where every judged case equals its record, else 1. Judged is float32 at the highest precision"
    " of products; on a GPU or TPU the default precision is reported as well."
)


def env(argv: list[str]) -> int:
    parser = Parser(prog="repro env", description=sentence(COMMANDS["env"]))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    found = environment()
    print(json.dumps(found, indent=1) if args.json else as_lines(found))
    return 0


def selftest(argv: list[str]) -> int:
    parser = Parser(prog="repro selftest", description=sentence(COMMANDS["selftest"]), epilog=EPILOG)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), help="report this type of computation, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args(argv)
    start_logging(quiet=True)
    from repro.recipes.selftest import JUDGED, run_cases

    made_by, shown = environment(), sys.stderr if args.json else sys.stdout
    print(f"{as_lines(made_by)}\n", file=shown)
    results = run_cases(args.dtype, say=lambda line: print(line, file=shown, flush=True))
    passed = all(case.passed for case in results[JUDGED])
    if args.json:
        found = {way: [asdict(case) for case in cases] for way, cases in results.items()}
        print(json.dumps({**made_by, "passed": passed, "results": found}, indent=1))
    else:
        print("\nPASS: this machine computes what the reference computed." if passed else "\nFAIL")
    return 0 if passed else 1
