"""What mimalloc in the place of the system's malloc gains on a CPU: the same work with both, one after the other.

    pip install '.[flax-class]' torch==2.13.0
    python benchmarks/allocator.py --output benchmarks/results/cpu-2-cores/allocator.json
    python benchmarks/allocator.py --parts pocket    # one of pocket, training, generation, flickr8k
    MIMALLOC_PURGE_DELAY=1000 python benchmarks/allocator.py --parts flickr8k --smoke    # 40 steps, another delay in ms

`pocket` is `repro reproduce` from nothing to its verdict; `training` and `generation` are a step and a search at
ViT-B/16 + GPT-2 size beside transformers' Flax class and PyTorch, which get the same allocator. `flickr8k`, where
`REPRO_REAL_DATA` names a folder that has it, is `repro train` with a small ViT-GPT-2 on 8,000 captions of 1,600
photographs, two epochs of 250 steps, evaluated after each. Of every part: seconds, processor time, the kernel's share
of it, how many cores were busy, and the largest resident size of a process. FILE keeps the parts that are not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from peers import write_result
from transformers import GPT2Config, GPT2TokenizerFast, ViTConfig, ViTImageProcessor

from repro.allocator import LIBRARY, PURGE, SWITCH
from repro.config import flags_of

HERE = Path(__file__).parent
PEERS = ("--peers", "native", "flax", "torch", "--turns", "2", "--output")
# Commands, to which the place of what they write is added.
PARTS: dict[str, tuple[str, ...]] = {
    "training": (str(HERE / "train_step.py"), *PEERS),
    "generation": (str(HERE / "generation.py"), *PEERS),
    "pocket": ("-m", "repro", "reproduce", "--output_dir"),
    "flickr8k": ("-m", "repro", "train", "--output_dir"),
}
SMOKE = {
    "pocket": ("--keep_going", "--max_train_samples", "100", "--max_eval_samples", "20", "--num_train_epochs", "1"),
    "flickr8k": ("--max_train_samples", "640", "--max_eval_samples", "96"),  # 40 steps
}
FLICKR8K = {
    **{"do_train": True, "do_eval": True, "predict_with_generate": True, "max_target_length": 32, "num_beams": 4},
    **{"num_train_epochs": 2, "num_replicas": 1, "per_device_train_batch_size": 32, "learning_rate": 3e-4},
    **{"per_device_eval_batch_size": 32, "logging_steps": 50},
}
ALLOCATORS = ("malloc", "mimalloc")


def environment(allocator: str) -> dict[str, str]:
    """The variables of a process that is given its memory by an allocator."""
    found = {**PURGE, **os.environ, SWITCH: "system", "JAX_PLATFORMS": "cpu"}
    if allocator == "mimalloc":
        library = Path(str(distribution("cmeel-mimalloc").locate_file(LIBRARY))).resolve(strict=True)
        found["LD_PRELOAD"] = str(library)
    return found


def flickr8k(place: Path) -> list[str]:
    """Make the halves of a small ViT-GPT-2 with GPT-2's vocabulary; returns the flags of its run."""
    real, encoder, decoder = Path(os.environ["REPRO_REAL_DATA"]), place / "encoder", place / "decoder"
    small = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    ViTConfig(**small).save_pretrained(encoder)
    ViTImageProcessor().save_pretrained(encoder)
    GPT2Config(n_embd=128, n_layer=4, n_head=4).save_pretrained(decoder)
    files = [str(real / "gpt2_tokenizer" / name) for name in ("vocab.json", "merges.txt")]
    GPT2TokenizerFast(*files, pad_token="<|endoftext|>").save_pretrained(decoder)
    halves = {"encoder_config_name": encoder, "decoder_config_name": decoder, "cache_dir": place / "cache"}
    rows = {"train_file": real / "flickr8k" / "train.jsonl", "validation_file": real / "flickr8k" / "val.jsonl"}
    return flags_of({**FLICKR8K, **halves, **rows})


def measure(part: str, allocator: str, *, smoke: bool) -> dict[str, Any]:
    """Do a part's work, and tell what it took of the machine."""
    with tempfile.TemporaryDirectory() as place:
        made = Path(place, "made")
        more = [
            *(flickr8k(Path(place)) if part == "flickr8k" else ()),
            *(SMOKE.get(part, ("--smoke",)) if smoke else ()),
        ]
        command, began = [sys.executable, *PARTS[part], str(made), *more], time.perf_counter()
        process = subprocess.Popen(command, env=environment(allocator), cwd=place)
        _, status, used = os.wait4(process.pid, 0)  # with the processes that it started
        seconds, processor = time.perf_counter() - began, used.ru_utime + used.ru_stime
        figure = "train_rows_per_second" if part in SMOKE else "peers"
        file = {"pocket": made / "run" / "run.json", "flickr8k": made / "run.json"}.get(part, made)
        found = json.loads(file.read_text())
    return {
        "status": os.waitstatus_to_exitcode(status),  # of a very small pocket 1: it misses its targets
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "system_share": round(used.ru_stime / processor, 3),
        "busy_cores": round(processor / seconds, 2),
        "largest_mb": round(used.ru_maxrss / 1e3),
        "date": date.today().isoformat(),
        "purge_delay_ms": environment(allocator)["MIMALLOC_PURGE_DELAY"],
        figure: found[figure],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    at_hand = [part for part in PARTS if part != "flickr8k" or "REPRO_REAL_DATA" in os.environ]
    parser.add_argument("--parts", nargs="+", choices=at_hand, default=at_hand)
    parser.add_argument("--smoke", action="store_true", help="very small, to see that it runs")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = json.loads(args.output.read_text())["parts"] if args.output and args.output.exists() else {}
    for part in args.parts:
        both = {allocator: measure(part, allocator, smoke=args.smoke) for allocator in ALLOCATORS}
        times = {name: both[name]["seconds"] for name in ALLOCATORS}
        if part not in SMOKE:
            times = {name: both[name]["peers"]["native"]["seconds"] for name in ALLOCATORS}
        found[part] = {**both, "times_as_fast": round(times["malloc"] / times["mimalloc"], 3)}
        write_result("allocator", {"smoke": args.smoke, "parts": found}, args.output, quiet=True)
        print(json.dumps({part: found[part]}, indent=1), flush=True)


if __name__ == "__main__":
    main()
