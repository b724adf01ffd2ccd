"""`repro report`: runs on one page."""

from __future__ import annotations

from pathlib import Path

from repro.commands import COMMANDS
from repro.commands.terminal import start_logging
from repro.parser import Parser, sentence


def main(argv: list[str]) -> int:
    parser = Parser(prog="repro report", description=sentence(COMMANDS["report"]))
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs or of reproductions")
    parser.add_argument(
        "--recipe", metavar="NAME", help="whose targets they are held against (default: their own, if any)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the first folder")
    args = parser.parse_args(argv)
    start_logging()
    from repro.data.atomic import check_file_writable
    from repro.record.writer import REPORT
    from repro.report.write import write_report

    output = args.output or args.runs[0] / REPORT
    check_file_writable(output, "--output")
    write_report(args.runs, output, recipe=args.recipe)
    print(f"written to {output}")
    return 0
