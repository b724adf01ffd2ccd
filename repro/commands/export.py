"""`repro export`: a model in both formats."""

from __future__ import annotations

from repro.commands import COMMANDS
from repro.commands.terminal import start_logging, write_model
from repro.config import ExportArguments, parse_arguments
from repro.errors import InputError


def main(argv: list[str]) -> int:
    (args,) = parse_arguments((ExportArguments,), argv, command="export", about=COMMANDS["export"])
    for name in ("model_name_or_path", "output_dir"):
        if getattr(args, name) is None:
            raise InputError(f"--{name} is missing. `repro export --help` lists the flags.")
    start_logging()
    from repro.models.pretrained import Options, load_model

    return write_model(lambda: load_model(args.model_name_or_path, Options(implementation="native")), args.output_dir)
