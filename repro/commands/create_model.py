"""`repro create-model`: a vision encoder and a text decoder joined into a model folder."""

from __future__ import annotations

from pathlib import Path

from repro.commands import COMMANDS
from repro.commands.terminal import start_logging
from repro.config import CreateModelArguments, ModelArguments, parse_arguments
from repro.errors import InputError


def main(argv: list[str]) -> int:
    (args,) = parse_arguments((CreateModelArguments,), argv, command="create-model", about=COMMANDS["create-model"])
    if args.output_dir is None:
        raise InputError("--output_dir is missing: name a folder for the new model.")
    start_logging()
    from repro.models.pretrained import save_model
    from repro.prepare import load_or_create
    from repro.reporting.writer import check_output_dir

    check_output_dir(Path(args.output_dir), overwrite=False)
    halves = {name: value for name, value in vars(args).items() if name not in ("seed", "output_dir")}
    created = load_or_create(ModelArguments(**halves), seed=args.seed)
    save_model(created, created.params, Path(args.output_dir))
    for note in created.notes:
        print(note)
    print(f"written to {args.output_dir}")
    return 0
