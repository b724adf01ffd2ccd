"""`repro caption`: pictures from files, folders, patterns and lists, captioned one line each as they are done."""

from __future__ import annotations

import glob
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from repro.commands import COMMANDS
from repro.commands.terminal import printable, start_logging
from repro.config import COUNT, DTYPES, FORMATS, IMPLEMENTATIONS, LENGTH, flag, make_arguments
from repro.errors import InputError
from repro.limits import IMAGE_SUFFIXES, LISTED_BYTES, URL_SCHEMES
from repro.parser import Checked, Parser, add_fields, sentence
from repro.progress import progress_bar

LIST = "-"
NOT_ALL = 1  # exit status: there is an image without captions
WIDEST_NAME = 40
DIGITS = 6  # of a score in JSON: float32 has no more that mean something


class Picture(NamedTuple):
    """What an argument means: an image's path as it is shown, or a problem with what was named."""

    name: str
    problem: str | None = None


@dataclass(frozen=True)
class CaptionArguments(Checked):
    """How `repro caption` captions."""

    num_beams: int | None = flag(None, "Beams (default: the model's configuration, else 1).", COUNT)
    num_return_sequences: int = flag(1, "Captions of each image.", COUNT)
    max_length: int | None = flag(None, "Tokens, start token included (default: the model's, else 32).", LENGTH)
    batch_size: int = flag(8, "Images at once.", COUNT)
    dtype: str = flag("float32", "Type of the computation.", choices=DTYPES)
    model_implementation: str | None = flag(None, "Whose model (default: native if it can).", choices=IMPLEMENTATIONS)
    weights_format: str | None = flag(None, "Of the model's weights, those in this format.", choices=FORMATS)


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    (how,) = make_arguments((CaptionArguments,), vars(args))
    found = [item for name in args.images for item in _find(name, null=args.null)]
    if not found:
        raise InputError("standard input names no image; give one path a line, or with --null one before each NUL.")
    start_logging(models=[args.model])
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about images that it can read all the same
    results: Iterator[tuple[Any, Any]] = iter(())
    images = [item.name for item in found if item.problem is None]
    if images:
        from repro.models.captioning import Captioner

        settings = dict(vars(how))
        of_model = {name: settings.pop(name) for name in ("dtype", "model_implementation", "weights_format")}
        results = Captioner.from_pretrained(_checkpoint_of(args.model), **of_model).stream(images, **settings)
    outcomes = ((name, problem or next(results)[1]) for name, problem in found)
    widths = [len(printable(item.name, sys.stdout)) for item in found]
    width = max((width for width in widths if width <= WIDEST_NAME), default=0)
    failures = _print(outcomes, len(found), as_json=args.json, width=width)
    if failures:
        _tell(f"{failures} of {len(found)} could not be captioned")
    return NOT_ALL if failures else 0


def _parser() -> Parser:
    parser = Parser(
        prog="repro caption",
        description=f"{sentence(COMMANDS['caption'])} A folder stands for the images in it and below it, in the order"
        " of their names, without hidden ones. A pattern (`photos/**/*.jpg`) is expanded where the shell has not done"
        " so. What cannot be captioned is named on standard error, the others are captioned, and the exit status is 1."
        " Scores are the tokens' log-probabilities, summed and divided by their number: 0 at most.",
        epilog="An image whose name begins with a dash is named after `--`, or as ./-NAME.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id; of a run, its best or else newest checkpoint")
    named = "file, folder, pattern, or - for paths on standard input, one a line"
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=named)
    add_fields(parser, CaptionArguments)
    parser.add_argument("--json", action="store_true", help='a line each: {"image", "captions"} or {"image", "error"}')
    parser.add_argument("--null", action="store_true", help="paths on standard input end with NUL (`find -print0`)")
    return parser


def _checkpoint_of(model: str) -> str:
    """Take the place of a run's or a reproduction's folder: its best checkpoint, or its newest if it kept no best."""
    from repro.record.metrics import METRICS
    from repro.record.record import read_record
    from repro.record.writer import models_in, step_of_model

    run = Path(model, "run") if Path(model, "run").is_dir() else Path(model)
    models = models_in(run)
    if not models or Path(model, "config.json").exists():
        return model
    record = read_record(run)
    metric = record.facts.get("flags", {}).get("metric_for_best_model")
    best = record.recorded.best_step(metric) if metric in METRICS else None  # another version's may not be
    chosen = next((path for path in models if step_of_model(path) == best), models[-1])
    which = f"best by {metric}" if metric and step_of_model(chosen) == best else "newest"
    _tell(f"{chosen}: the {which} of {len(models)} checkpoint{'s' * (len(models) > 1)}")
    return str(chosen)


def _find(name: str, *, null: bool) -> Iterator[Picture]:
    """What an argument names."""
    if name == LIST:
        yield from map(Picture, _listed(sys.stdin.buffer, b"\0" if null else b"\n"))
        return
    is_pattern = glob.has_magic(name) and not name.startswith(URL_SCHEMES) and not os.path.lexists(name)
    matches = sorted(glob.glob(name, recursive=True)) if is_pattern else [name]
    for match in matches:
        yield from _expanded(match)
    if not matches:
        yield Picture(name, "no file matches")


def _listed(stream: BinaryIO, end: bytes) -> Iterator[str]:
    names = stream.read(LISTED_BYTES + 1)
    if len(names) > LISTED_BYTES:
        raise InputError(f"standard input: has more than {LISTED_BYTES:,} bytes of names; name a folder instead.")
    return (os.fsdecode(name) for name in names.split(end) if name)


def _expanded(path: str) -> list[Picture]:
    if not os.path.isdir(path):
        return [Picture(path)]
    errors: list[OSError] = []
    files: list[str] = []
    for folder, folders, names in os.walk(path, onerror=errors.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    found = [Picture(file) for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
    if others := len(files) - len(found):
        _tell(f"{path}: {others} other file{'s' * (others > 1)} left out")
    found += [Picture(str(error.filename), f"the folder cannot be read: {error.strerror}") for error in errors]
    if not found:
        found = [Picture(path, f"holds no images ({', '.join(name[1:] for name in IMAGE_SUFFIXES)})")]
    return sorted(found)


def _print(outcomes: Iterable[tuple[str, Any]], number: int, *, as_json: bool, width: int) -> int:
    """Print each outcome when it comes, and count those that are no captions."""
    failures = 0
    with progress_bar(progress=True, total=number, unit="image", leave=False) as bar:
        for name, outcome in outcomes:
            if not isinstance(outcome, list):
                failures += 1
                _tell(f"{name}: {outcome}")
            for line in [_as_json(name, outcome)] if as_json else _as_text(name, outcome, width):
                bar.write(line, file=sys.stdout)
            sys.stdout.flush()
            bar.update()
    return failures


def _as_json(name: str, outcome: Any) -> str:
    """In ASCII, so that any name gets through any terminal and pipe, and back (`os.fsencode`)."""
    if not isinstance(outcome, list):
        return json.dumps({"image": name, "error": str(outcome)})
    captions = [{"caption": found.caption, "score": round(found.score, DIGITS)} for found in outcome]
    return json.dumps({"image": name, "captions": captions})


def _as_text(name: str, outcome: Any, width: int) -> Iterator[str]:
    shown = printable(name, sys.stdout)
    for found in outcome if isinstance(outcome, list) else ():
        yield f"{shown:{width}}  {found.score:9.4f}  {printable(found.caption, sys.stdout)}".rstrip()
        shown = ""


def _tell(message: str) -> None:
    tqdm.write(printable(message, sys.stderr), file=sys.stderr)
