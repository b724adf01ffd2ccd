"""`repro export`: a model in both formats."""

from __future__ import annotations

from pathlib import Path

from repro.commands import COMMANDS
from repro.commands.terminal import start_logging
from repro.config import ExportArguments, parse_arguments
from repro.errors import InputError


def main(argv: list[str]) -> int:
    (args,) = parse_arguments((ExportArguments,), argv, command="export", about=COMMANDS["export"])
    for name in ("model_name_or_path", "output_dir"):
        if getattr(args, name) is None:
            raise InputError(f"--{name} is missing. `repro export --help` lists the flags.")
    start_logging()
    from repro.models.pretrained import Options, load_model, save_model
    from repro.reporting.writer import check_output_dir

    folder = Path(args.output_dir)
    check_output_dir(folder, overwrite=False)
    loaded = load_model(args.model_name_or_path, Options(implementation="native"))
    save_model(loaded, loaded.params, folder)
    for note in loaded.notes:
        print(note)
    print(f"written to {folder}")
    return 0
