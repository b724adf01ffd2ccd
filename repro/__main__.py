"""The command line: `repro COMMAND ...`; each command imports what it needs when it is chosen."""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from repro import __doc__ as PURPOSE
from repro import __version__
from repro.errors import InputError, Interrupted, RunStopped

INPUT_ERROR = 2
STOPPED = 3
INTERRUPTED = 130
SIGNALLED = 128
"""Plus the signal's number: a run that was asked to stop."""

COMMANDS = {
    "reproduce": "run a recipe offline and check its targets (default: pocket, minutes on a CPU)",
    "verify": "hold finished runs, one or one for each seed, against a recipe's targets: PASS, FAIL or CANNOT TELL",
    "train": "fine-tune, evaluate and predict with the example's documented flags",
    "create-model": "join a vision encoder and a text decoder into a model folder",
    "export": "write a model in both formats, for Flax and for PyTorch",
    "data": "`repro data coco` downloads COCO 2017, `data pocket` renders scenes, `data check` reads what a run would",
}
STATUSES = {"PASS": 0, "FAIL": 1, "CANNOT TELL": 2}
"""Of verdicts."""
SPLITS = ("train", "validation", "test")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 done; 1 a target was missed; 2 the input cannot be used or tells nothing; 3 training cannot
        go on; 130 and 143 stopped by SIGINT and SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else INPUT_ERROR
    if arguments[0] == "--version":
        print(__version__)
        return 0
    handlers: dict[str, Callable[[list[str]], int]] = {
        "reproduce": _reproduce,
        "verify": _verify,
        "train": _train,
        "create-model": _create_model,
        "export": _export,
        "data": _data,
    }
    try:
        if arguments[0] not in handlers:
            near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InputError(f"unknown command {arguments[0]!r}.{hint} `repro --help` lists them.")
        return handlers[arguments[0]](arguments[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT_ERROR
    except RunStopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        return STOPPED
    except Interrupted as error:
        print(error, file=sys.stderr)
        return SIGNALLED + error.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: repro COMMAND ...\n\n{PURPOSE}\n\ncommands:",
            *lines,
            "\n`repro COMMAND --help` describes a command.",
        ]
    )


def make_deterministic(environment: MutableMapping[str, str]) -> None:
    """Set what XLA needs on a GPU to compute the same bits in every run; before JAX starts."""
    from repro.flags import DETERMINISTIC

    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()


def _start_logging(*, quiet: bool = False) -> None:
    """Log to the terminal around the progress bars, and quieten what the libraries say about their own future."""
    import logging

    # transformers would import PyTorch where it is installed, for seconds and nothing.
    os.environ.setdefault("USE_TORCH", "0")
    from tqdm import tqdm

    class Terminal(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(self.format(record), file=sys.stderr)

    logger = logging.getLogger("repro")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers and not quiet:
        logger.addHandler(Terminal())
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()


def _train(argv: list[str]) -> int:
    from repro.config import DataArguments, ModelArguments, TrainingArguments, parse_arguments

    parsed = parse_arguments((ModelArguments, DataArguments, TrainingArguments), argv, command="train")
    args = parsed[-1]
    if args.deterministic:
        make_deterministic(os.environ)
    _start_logging(quiet=bool(args.process_id))
    from repro.training.processes import is_first, start_processes

    start_processes(
        **{name: getattr(args, name) for name in ("coordinator", "process_id", "num_processes", "distributed")}
    )
    from repro.run import run

    result = run(*parsed)
    if not is_first():
        return 0
    _print_table("metric", {**result.metrics, **_speed(result.facts)})
    print(f"written to {result.folder}")
    return 0


def _create_model(argv: list[str]) -> int:
    from repro.config import CreateModelArguments, ModelArguments, parse_arguments

    (args,) = parse_arguments((CreateModelArguments,), argv, command="create-model")
    if args.output_dir is None:
        raise InputError("--output_dir is missing: name a folder for the new model.")
    _start_logging()
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


def _reproduce(argv: list[str]) -> int:
    # The recipe comes first, since among flags of which this parser knows nothing a value would be taken for it.
    recipe, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("pocket", argv)
    parser = _Parser(
        prog="repro reproduce",
        usage="%(prog)s [RECIPE] [flags]",
        description=f"{COMMANDS['reproduce']}. Every flag of `repro train` may be added, and wins over the recipe's."
        " Given again, the command goes on with a run that was ended. RECIPE is pocket (the default), coco2017 or"
        " coco2017-exact.",
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", type=Path, help="default: ./repro-RECIPE")
    parser.add_argument("--keep_going", action="store_true", help="finish a run that can no longer meet the targets")
    parser.add_argument("--dry_run", action="store_true", help="check machine, weights, data and disk, and estimate")
    args, flags = parser.parse_known_args(argv)
    if "--deterministic" in flags:
        make_deterministic(os.environ)
    _start_logging()
    from repro.recipes import read_recipe
    from repro.reproduce import reproduce, start_recipe
    from repro.verify import table

    folder = args.output_dir or Path(f"repro-{recipe}")
    if args.dry_run:
        from repro.dry_run import describe, dry_run

        found = dry_run(*start_recipe(read_recipe(recipe), folder, flags))
        print(describe(found))
        return INPUT_ERROR if found.problems else 0
    done = reproduce(recipe, folder, flags, keep_going=args.keep_going)
    print("\ncaptions of validation images")
    for sample in done.samples:
        print(f"  {Path(sample.image_path).name}  {sample.caption}")
        if sample.truth:
            print(f"{'shows:':>18}  {sample.truth}")
    _print_table("metric", {**done.result.metrics, **_speed(done.result.facts)})
    return _conclude(done.verification, table(done.verification.outcomes), f"written to {folder}")


def _verify(argv: list[str]) -> int:
    parser = _Parser(prog="repro verify", description=COMMANDS["verify"], allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folders of a reproduction or of a run, one for each seed"
    )
    parser.add_argument("--recipe", help="default: the one that the first folder was made by")
    parser.add_argument(
        "--against", nargs="+", type=Path, default=(), metavar="RUN", help="runs that take the reference's place"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts there")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write them as JUnit XML")
    args = parser.parse_args(argv)
    _start_logging()
    from repro.reporting.writer import write_json
    from repro.verify import as_json, as_junit, table, verify

    done = verify(args.runs, recipe=args.recipe, reference=args.against)
    if args.json:
        write_json(args.json, as_json(done))
    if args.junit:
        args.junit.write_bytes(as_junit(done))
    return _conclude(done, table(done.outcomes), f"{len(done.runs)} run{'s' * (len(done.runs) > 1)} of {done.recipe}")


def _conclude(verification: Any, table: str, end: str) -> int:
    for run in verification.runs:
        for note in run.notes:
            print(f"note: {run.folder}: {note}")
    for problem in verification.problems:
        print(f"cannot tell: {problem}")
    if verification.outcomes:
        print(table)
    print(f"\n{verification.verdict}: {end}")
    return STATUSES[verification.verdict]


def _export(argv: list[str]) -> int:
    from repro.config import ExportArguments, parse_arguments

    (args,) = parse_arguments((ExportArguments,), argv, command="export")
    for name in ("model_name_or_path", "output_dir"):
        if getattr(args, name) is None:
            raise InputError(f"--{name} is missing.")
    _start_logging()
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


def _data(argv: list[str]) -> int:
    parser = _Parser(prog="repro data", description=COMMANDS["data"], allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("check", help="read what a run would read, and say what is in it", add_help=False)
    coco = kinds.add_parser("coco", help="download COCO 2017", allow_abbrev=False)
    coco.add_argument("--data_dir", type=Path, required=True, help="where the files are put, and left as zips")
    coco.add_argument("--splits", nargs="+", default=SPLITS, choices=SPLITS, help="default: all three")
    coco.add_argument("--max_images", type=int, help="only the first images of each split (default: the zips, 26 GB)")
    coco.add_argument("--base_url", nargs="+", help="servers to try in turn (default: http://images.cocodataset.org)")
    pocket = kinds.add_parser("pocket", help="render captioned scenes", allow_abbrev=False)
    pocket.add_argument("folder", type=Path, help="where the COCO 2017 layout is written")
    pocket.add_argument("--num_train", type=int, default=4000, help="default: %(default)s")
    pocket.add_argument("--num_val", type=int, default=200, help="default: %(default)s")
    pocket.add_argument("--num_test", type=int, default=0, help="default: %(default)s")
    pocket.add_argument("--image_size", type=int, default=64, help="pixels, default: %(default)s")
    pocket.add_argument("--seed", type=int, default=2017, help="default: %(default)s")
    if argv[:1] == ["check"]:
        return _data_check(argv[1:])
    args = vars(parser.parse_args(argv))
    if args.pop("kind") == "pocket":
        from repro.data.pocket import render_pocket

        folder = args.pop("folder")
        render_pocket(folder, **args)
        print(f"written to {folder}")
        return 0
    from repro.data.download import DOWNLOADS, download_coco

    base_urls = args.pop("base_url") or [DOWNLOADS]
    for path in download_coco(**args, base_urls=base_urls):
        print(path)
    return 0


def _data_check(argv: list[str]) -> int:
    from repro.config import CheckArguments, DataArguments, ModelArguments, TrainingArguments, parse_arguments

    classes = (ModelArguments, DataArguments, TrainingArguments, CheckArguments)
    parsed = parse_arguments(classes, argv, command="data check")
    _start_logging()
    from repro.check import check_data, describe

    print(describe(check_data(*parsed)))
    print(f"written to {parsed[-1].report_dir}")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise InputError(f"{message}. `{self.prog} --help` lists the flags.")


def _speed(facts: dict[str, object]) -> dict[str, float]:
    return {
        name: value
        for name in ("train_seconds", "train_rows_per_second")
        if isinstance(value := facts.get(name), float)
    }


def _print_table(title: str, values: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, value in values.items():
        print(f"  {name:28} {value:>12.4f}")
    print()


def program() -> None:
    """Run a command and end the process.

    Where a signal stopped it, this is done at once: threads of XLA or Arrow that are still at work crash an interpreter
    that is taken down around them, and the status would be SIGSEGV's. All that is to be kept is on disk by then.
    """
    status = main()
    jax = sys.modules.get("jax")
    # The other processes of a run wait for a proper end.
    if status in (INTERRUPTED, SIGNALLED + signal.SIGTERM) and not (jax and jax.distributed.is_initialized()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    program()
