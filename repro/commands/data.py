"""`repro data`: COCO downloaded, scenes rendered, a run's data looked at."""

from __future__ import annotations

from pathlib import Path

from repro.commands import COMMANDS
from repro.commands.parser import Parser
from repro.commands.terminal import start_logging

SPLITS = ("train", "validation", "test")


def main(argv: list[str]) -> int:
    parser = Parser(prog="repro data", description=COMMANDS["data"])
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("check", help="read what a run would read, and say what is in it", add_help=False)
    coco = kinds.add_parser("coco", help="download COCO 2017")
    coco.add_argument("--data_dir", type=Path, required=True, help="where the files are put, and left as zips")
    coco.add_argument("--splits", nargs="+", default=SPLITS, choices=SPLITS, help="default: all three")
    coco.add_argument("--max_images", type=int, help="only the first images of each split (default: the zips, 26 GB)")
    coco.add_argument("--base_url", nargs="+", help="servers to try in turn (default: http://images.cocodataset.org)")
    pocket = kinds.add_parser("pocket", help="render captioned scenes")
    pocket.add_argument("folder", type=Path, help="where the COCO 2017 layout is written")
    pocket.add_argument("--num_train", type=int, default=4000, help="default: %(default)s")
    pocket.add_argument("--num_val", type=int, default=200, help="default: %(default)s")
    pocket.add_argument("--num_test", type=int, default=0, help="default: %(default)s")
    pocket.add_argument("--image_size", type=int, default=64, help="pixels, default: %(default)s")
    pocket.add_argument("--seed", type=int, default=2017, help="default: %(default)s")
    if argv[:1] == ["check"]:
        return _check(argv[1:])
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


def _check(argv: list[str]) -> int:
    from repro.config import CheckArguments, DataArguments, ModelArguments, TrainingArguments, parse_arguments

    classes = (ModelArguments, DataArguments, TrainingArguments, CheckArguments)
    parsed = parse_arguments(classes, argv, command="data check")
    start_logging()
    from repro.check import check_data, describe

    print(describe(check_data(*parsed)))
    print(f"written to {parsed[-1].report_dir}")
    return 0
