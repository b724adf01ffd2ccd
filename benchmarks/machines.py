"""What the documented run takes of TPU machines that are not at hand, as XLA's compiler for them says.

    pip install '.[tpu]'
    python benchmarks/machines.py --output benchmarks/results/tpu-compiled/machines.json
    python benchmarks/machines.py --output FILE --rows 0 3    # some; those that FILE has are kept

The recipe `coco2017` (a global batch of 256 rows as 8 replicas of 32, captions of 32 tokens, evaluation of 256 rows
with 8 beams) is compiled at ViT-B/16 + GPT-2 size for each machine as by `--topology`; the data and the weights are
stand-ins, which change no shape. Nothing is run: memory and collectives are the compiler's plan, and the time is that
of the step's operations at the chip's published peak, so the least.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import stand_in
from peers import write_result

from repro.commands.terminal import leave_tpus_alone
from repro.config import ARGUMENTS, make_arguments
from repro.recipes import read_recipe

IMAGES = 600
# A machine, the type of the computation, and flags of the layout.
ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("v3:2x2", "float32", {}),
    ("v3:2x2", "bfloat16", {}),
    ("v5e:1x1", "bfloat16", {}),
    ("v5e:2x4", "bfloat16", {}),
    ("v5e:2x4", "bfloat16", {"mesh": "data=1,fsdp=8"}),
    ("v3:2x2", "float32", {"gradient_checkpointing": True}),
    ("v5e:1x1", "bfloat16", {"gradient_checkpointing": True}),
    ("v6e:1x1", "bfloat16", {}),
    ("v6e:2x4", "bfloat16", {}),
    ("v4:2x2x1", "bfloat16", {}),
    ("v5p:2x2x1", "bfloat16", {}),
    ("v5e:1x1", "float32", {}),
    ("v5e:2x4", "float32", {}),
    ("v4:2x2x1", "float32", {}),
    ("v5p:2x2x1", "float32", {}),
    ("v6e:1x1", "float32", {}),
    ("v6e:2x4", "float32", {}),
)


def compile_row(row: tuple[str, str, dict[str, Any]], folder: Path, *, smoke: bool) -> dict[str, Any]:
    """Compile the run for one machine."""
    from repro.recipes.topology import compile_for, devices_of

    topology, dtype, layout = row
    flags = {name: value for name, value in read_recipe("coco2017")["flags"].items() if "_model_" not in name}
    flags |= {f"{half}_config_name": str(folder / "halves" / half) for half in ("encoder", "decoder")}
    flags |= {"data_dir": str(folder / "data"), "cache_dir": str(folder / "cache"), "dtype": dtype, **layout}
    flags |= {"output_dir": str(folder / "run")} | ({"max_target_length": 8, "num_beams": 2} if smoke else {})
    started = time.perf_counter()
    found = compile_for(*make_arguments(ARGUMENTS, flags), devices=devices_of(topology))
    return {
        "topology": topology,
        "dtype": dtype,
        "flags": layout,
        "compile_seconds": round(time.perf_counter() - started),
        "problems": found.problems,
        "text": found.text.splitlines(),
        **found.facts,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Put the rows into a table in Markdown."""
    lines = [
        "| machine | type | flags | at once | step | sent in a step | evaluation beside the state | a step takes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        flags = ", ".join(f"`--{name} {value}`".replace(" True", "") for name, value in row["flags"].items())
        if "programs" not in row:
            lines.append(f"| {row['topology']} | {row['dtype']} | {flags} | does not fit | | | | |")
            continue
        step = row["programs"]["step"]
        sizes = {kind: (number, size / 1e6) for kind, (number, size) in step["collectives"].items() if size > 1e6}
        sent = "; ".join(f"{size:,.0f} MB in {number} {kind}" for kind, (number, size) in sizes.items())
        cells = (
            row["topology"],
            row["dtype"],
            flags + (" (as asked it does not fit)" if row["problems"] else ""),
            row["replicas_at_once"],
            f"{step['bytes'] / 2**30:.1f} GiB",
            sent,
            f"{row['evaluation_rows_at_once']} rows, {row['evaluation_bytes'] / 2**30:.1f} GiB",
            f"at least {row['step_seconds_at_least'] * 1e3:.0f} ms",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=range(len(ROWS)), help="numbers, from 0")
    parser.add_argument("--smoke", action="store_true", help="very small models, to see that it runs")
    parser.add_argument("--folder", type=Path, help="for the stand-ins, found again (default: a temporary one)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    leave_tpus_alone()
    rows = json.loads(args.output.read_text())["rows"] if args.output and args.output.exists() else []
    with tempfile.TemporaryDirectory() as place:
        folder = args.folder or Path(place)
        stand_in.write_data(folder / "data", IMAGES, len(os.sched_getaffinity(0)))
        stand_in.write_halves(folder / "halves", smoke=args.smoke)
        for row in (ROWS[number] for number in args.rows):
            if any([known["topology"], known["dtype"], known["flags"]] == [*row] for known in rows):
                continue
            rows.append(compile_row(row, folder, smoke=args.smoke))
            print(*rows[-1]["text"], sep="\n", flush=True)
            write_result("machines", {"smoke": args.smoke, "rows": rows}, args.output, quiet=True)
    print(table(rows))


if __name__ == "__main__":
    main()
