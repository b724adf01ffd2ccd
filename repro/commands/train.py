"""`repro train`: one run by the documented flags."""

from __future__ import annotations

import os

from repro.commands import COMMANDS
from repro.commands.terminal import make_deterministic, print_metrics, start_logging
from repro.config import ARGUMENTS, SEVERAL, parse_arguments

ABOUT = f"{COMMANDS['train']}; what the example does not have is marked `Further:`"


def main(argv: list[str]) -> int:
    parsed = parse_arguments(ARGUMENTS, argv, command="train", about=ABOUT)
    args = parsed[-1]
    if args.deterministic:
        make_deterministic(os.environ)
    start_logging(quiet=bool(args.process_id))
    from repro.training.processes import is_first, start_processes

    start_processes(**{name: getattr(args, name) for name in SEVERAL})
    from repro.run.train import run

    result = run(*parsed)
    if not is_first():
        return 0
    from repro.report.write import report_at_end

    report_at_end(result.folder)
    print_metrics(result.metrics, result.facts)
    print(f"written to {result.folder}")
    return 0
