"""`repro env`: what is installed and what computes, for a bug report."""

from __future__ import annotations

import json

from repro.commands import COMMANDS
from repro.parser import Parser, sentence


def main(argv: list[str]) -> int:
    parser = Parser(prog="repro env", description=sentence(COMMANDS["env"]))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    from repro.provenance import describe, environment

    found = environment()
    print(json.dumps(found, indent=1) if args.json else describe(found))
    return 0
