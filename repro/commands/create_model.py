"""`repro create-model`: a vision encoder and a text decoder joined into a model folder."""

from __future__ import annotations

from repro.commands import COMMANDS
from repro.commands.terminal import start_logging, write_model
from repro.config import CreateModelArguments, ModelArguments, parse_arguments
from repro.errors import InputError


def main(argv: list[str]) -> int:
    (args,) = parse_arguments((CreateModelArguments,), argv, command="create-model", about=COMMANDS["create-model"])
    if args.output_dir is None:
        raise InputError("--output_dir is missing: name a folder for the new model.")
    start_logging()
    from repro.run.prepare import load_or_create

    halves = {name: value for name, value in vars(args).items() if name not in ("seed", "output_dir")}
    return write_model(lambda: load_or_create(ModelArguments(**halves), seed=args.seed), args.output_dir)
