"""`repro data`: COCO downloaded, scenes rendered, a run's data looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from repro.commands import COMMANDS, INPUT_ERROR
from repro.commands.terminal import leave_tpus_alone, start_logging
from repro.config import ARGUMENTS, COUNT, NATURAL, SEED, CheckArguments, flag, make_arguments, parse_arguments
from repro.parser import Checked, Numbers, Parser, add_fields, sentence

SPLITS = ("train", "validation", "test")
CHECK = "read what a run would read, train nothing, and say what is in it"


@dataclass(frozen=True)
class PocketArguments(Checked):
    """What `repro data pocket` renders."""

    num_train: int = flag(4000, "Training images.", COUNT)
    num_val: int = flag(200, "Validation images.", COUNT)
    num_test: int = flag(0, "Test images.", NATURAL)
    image_size: int = flag(64, "Pixels a side.", Numbers(16))
    seed: int = flag(2017, "Of the scenes.", SEED)


def main(argv: list[str]) -> int:
    parser = Parser(prog="repro data", description=sentence(COMMANDS["data"]))
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", title="kinds")
    kinds.add_parser("check", help=CHECK, add_help=False)
    about = "Download COCO 2017. It goes on where it was interrupted; a file has its name only when it is whole."
    coco = kinds.add_parser("coco", help="download COCO 2017", description=about)
    coco.add_argument("--data_dir", type=Path, required=True, metavar="FOLDER", help="where the zips are put, and left")
    which = f"some of {', '.join(SPLITS)} (default: all)"
    coco.add_argument("--splits", nargs="+", default=SPLITS, choices=SPLITS, metavar="SPLIT", help=which)
    coco.add_argument("--max_images", type=int, metavar="N", help="each split's first images (default: zips, 27 GB)")
    coco.add_argument("--base_url", nargs="+", metavar="URL", help="in turn (default: http://images.cocodataset.org)")
    about = "Render scenes of coloured shapes with five captions each, in the layout of COCO 2017."
    pocket = kinds.add_parser("pocket", help="render captioned scenes", description=about)
    pocket.add_argument("folder", type=Path, metavar="FOLDER", help="where they are written")
    add_fields(pocket, PocketArguments)
    if argv[:1] == ["check"]:
        return _check(argv[1:])
    args = vars(parser.parse_args(argv))
    from repro.data.atomic import check_writable

    if args.pop("kind") == "pocket":
        (scenes,) = make_arguments((PocketArguments,), args)
        from repro.pocket.halves import render_pocket

        check_writable(args["folder"], "FOLDER")
        render_pocket(args["folder"], **vars(scenes))
        print(f"written to {args['folder']}")
        return 0
    from repro.data.download import DOWNLOADS, download_coco

    check_writable(args["data_dir"], "--data_dir")
    base_urls = args.pop("base_url") or [DOWNLOADS]
    for path in download_coco(**args, base_urls=base_urls):
        print(path)
    return 0


def _check(argv: list[str]) -> int:
    classes = (*ARGUMENTS, CheckArguments)
    parsed = parse_arguments(classes, argv, command="data check", about=f"{CHECK}; takes the flags of a run")
    *arguments, own = parsed
    if own.topology:
        leave_tpus_alone()
    start_logging()
    from repro.recipes.preflight import check_data
    from repro.recipes.topology import compile_for, devices_of

    devices = devices_of(own.topology) if own.topology else []
    print(check_data(*parsed), f"written to {own.report_dir}", sep="\n")
    if not devices:
        return 0
    found = compile_for(*arguments, devices=devices)
    print(found.text)
    return INPUT_ERROR if found.problems else 0
