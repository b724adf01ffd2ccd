"""`repro create-model` and `repro export`: model folders, of two halves or of another model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from repro.commands import COMMANDS
from repro.commands.terminal import start_logging
from repro.config import CreateModelArguments, ExportArguments, ModelArguments, parse_arguments

if TYPE_CHECKING:
    from repro.models.pretrained import Pretrained


def create_model(argv: list[str]) -> int:
    (args,) = parse_arguments((CreateModelArguments,), argv, command="create-model", about=COMMANDS["create-model"])
    start_logging()
    from repro.run.prepare import load_or_create

    halves = {name: value for name, value in vars(args).items() if name not in ("seed", "output_dir")}
    return _write(lambda: load_or_create(ModelArguments(**halves), seed=args.seed), Path(args.output_dir))


def export(argv: list[str]) -> int:
    (args,) = parse_arguments((ExportArguments,), argv, command="export", about=COMMANDS["export"])
    start_logging()
    from repro.models.pretrained import Options, load_model
    from repro.record.model_card import CARD

    native = Options(implementation="native", weights_format=args.weights_format)
    folder = Path(args.output_dir)
    status = _write(lambda: load_model(args.model_name_or_path, native), folder)
    card = Path(args.model_name_or_path, CARD)
    if card.is_file():
        shutil.copyfile(card, folder / CARD)
    return status


def _write(make: Callable[[], Pretrained], output_dir: Path) -> int:
    """Make a model for a folder that is new or empty, save it there, and say what there is to know of it."""
    from repro.models.pretrained import save_model
    from repro.record.writer import check_output_dir

    check_output_dir(output_dir, overwrite=False)
    model = make()
    save_model(model, model.params, output_dir)
    print(*model.notes, f"written to {output_dir}", sep="\n")
    return 0
