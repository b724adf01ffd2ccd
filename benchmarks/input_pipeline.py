"""What it costs to bring an epoch of captioned images to the training step, beside the example's way of doing it.

Rules. The peer is a model of the example's input made of the same public parts: `datasets.map` tokenizes once; then,
block by block, `datasets.filter` runs `ViTImageProcessor` on every row to see whether it can, `datasets.map` runs it
again and keeps float32 features on disk, and batches are read from there as NumPy arrays. Both read the same JPEG files
of 640 x 480 pixels with five captions each, one epoch, in a process of its own that may use one core, in turns; nothing
is copied to a device. Counted are the CPU seconds after the imports (user and system, children included) and the bytes
on disk afterwards. The projection to COCO multiplies by its 591,753 rows.

With `--scale N`, N images with COCO's number of captions go through reading, tokenization, cache and one epoch of
batches, in two processes one after another; and the same at a tenth. Memory is the process's largest resident size, and
of it what is its own (anonymous), sampled ten times a second; what is mapped from files can be taken back at any time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from peers import write_result
from PIL import Image

COCO_IMAGES, COCO_ROWS, CAPTIONS = 118_287, 591_753, 5
BATCH, LENGTH, SIDE = 256, 32, 224
BLOCK = 1024
STEP_ROWS_PER_SECOND = 2600
WAITING_STEPS = 100
WORDS = 3000


def write_photo(path: str, seed: int, size: tuple[int, int]) -> None:
    """A smooth picture with grain, which a JPEG of quality 90 makes about as large as COCO's (160 kB at 640 x 480)."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    values = np.asarray(small.resize(size, Image.Resampling.BICUBIC), np.int16)
    values = values + random.integers(-24, 25, values.shape[:2], dtype=np.int16)[..., None]
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def write_data(folder: Path, num_images: int, num_rows: int, size: tuple[int, int]) -> None:
    """Images and captions of about ten words in COCO's layout, by all cores."""
    (folder / "train2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    names = [f"{number:012d}.jpg" for number in range(num_images)]
    jobs = [(str(folder / "train2017" / name), number, size) for number, name in enumerate(names)]
    with multiprocessing.get_context("spawn").Pool() as pool:
        pool.starmap(write_photo, jobs, chunksize=64)
    random = np.random.default_rng(0)
    words = np.array(["".join(chr(97 + letter) for letter in random.integers(0, 26, 5)) for _ in range(WORDS)])
    with (folder / "annotations" / "captions_train2017.json").open("w") as file:
        images = ({"id": number, "file_name": name} for number, name in enumerate(names))
        file.write('{"images": [' + ",".join(map(json.dumps, images)) + '], "annotations": [')
        for row in range(num_rows):
            caption = " ".join(words[random.integers(0, WORDS, random.integers(8, 15))])
            annotation = {"image_id": row % num_images, "id": row, "caption": f"A {caption}."}
            file.write(", " * (row > 0) + json.dumps(annotation))
        file.write("]}")
    train_tokenizer(folder)


def train_tokenizer(folder: Path) -> None:
    """A byte-level BPE of GPT-2's size for these words."""
    from tokenizers.implementations import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads((folder / "annotations" / "captions_train2017.json").read_text())["annotations"][:5000]
    bpe = ByteLevelBPETokenizer(lowercase=True)
    bpe.train_from_iterator((row["caption"] for row in content), vocab_size=8000, special_tokens=["<|endoftext|>"])
    end = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe, **end).save_pretrained(folder / "tokenizer")


def tokenizer_of(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")


def processor() -> Any:
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": SIDE, "width": SIDE})


def start_ours(folder: Path, cache: Path, num_workers: int | None) -> tuple[Any, dict[str, float]]:
    """All that a run does before its first step; with the seconds of each part."""
    from repro.data.batches import prepare_split
    from repro.data.image_cache import load_images
    from repro.data.sources import load_splits

    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        seconds[name], started = time.perf_counter() - started, time.perf_counter()

    name = "ydshieh/coco_dataset_script"
    rows = load_splits(splits=["train"], dataset_name=name, data_dir=str(folder), rows_dir=cache / "rows")["train"]
    lap("rows")
    places = {path: place for place, path in enumerate(rows.dataset.unique("image_path"))}
    store = load_images(
        list(places),
        processor(),
        convert_to_rgb=False,
        cache_dir=cache / "images",
        num_workers=num_workers,
        progress=False,
    )
    lap("images")
    data, dropped = prepare_split(
        rows.dataset,
        tokenizer_of(folder),
        places,
        store,
        max_length=LENGTH,
        decoder_start_token_id=0,
        split="train",
        tokens_dir=cache / "tokens",
    )
    assert not dropped
    lap("tokens")
    data.fingerprint()
    lap("fingerprint")
    return data, seconds


def batches_of(data: Any) -> Iterator[dict[str, np.ndarray]]:
    from repro.data.batches import RowOrder

    row_order = RowOrder(seed=0, num_epochs=1, shuffle=True, num_replicas=1, replica_batch=min(BATCH, len(data)))
    return (data.batch(rows.reshape(-1)) for rows in row_order.epoch_rows(0, len(data)))


def epoch_ours(folder: Path, cache: Path) -> int:
    data, _ = start_ours(folder, cache, num_workers=1)
    return sum(len(batch["labels"]) for batch in batches_of(data))


def epoch_example(folder: Path, cache: Path) -> int:
    """The example's way (see the module)."""
    import datasets

    datasets.disable_progress_bars()
    content = json.loads((folder / "annotations" / "captions_train2017.json").read_text())
    tokenizer, extractor = tokenizer_of(folder), processor()
    rows = {
        "image_path": [str(folder / "train2017" / f"{row['image_id']:012d}.jpg") for row in content["annotations"]],
        "caption": [row["caption"] for row in content["annotations"]],
    }

    def tokenize(batch: dict[str, list]) -> dict[str, Any]:
        texts = [caption.lower() + " " + tokenizer.eos_token for caption in batch["caption"]]
        tokens = tokenizer(texts, max_length=LENGTH, padding="max_length", truncation=True, return_tensors="np")
        shifted = np.roll(tokens["input_ids"], 1, axis=1)
        return {
            "labels": tokens["input_ids"],
            "decoder_input_ids": shifted,
            "decoder_attention_mask": tokens["attention_mask"],
        }

    def can_be_used(batch: dict[str, list]) -> list[bool]:
        usable = []
        for path in batch["image_path"]:
            try:
                extractor(images=Image.open(path), return_tensors="np")
                usable.append(True)
            except Exception:
                usable.append(False)
        return usable

    def extract(batch: dict[str, list]) -> dict[str, Any]:
        images = [Image.open(path) for path in batch["image_path"]]
        return {"pixel_values": extractor(images=images, return_tensors="np").pixel_values}

    def named(name: str) -> str:
        cache.mkdir(parents=True, exist_ok=True)
        return str(cache / f"{name}.arrow")

    dataset = datasets.Dataset.from_dict(rows).map(
        tokenize, batched=True, remove_columns=["caption"], cache_file_name=named("tokens")
    )
    order = np.random.default_rng(0).permutation(len(dataset))
    seen = 0
    for start in range(0, len(order), BLOCK):
        block = dataset.select(order[start : start + BLOCK])
        block = block.filter(can_be_used, batched=True, cache_file_name=named(f"filter-{start}"))
        block = block.map(extract, batched=True, batch_size=100, cache_file_name=named(f"block-{start}"))
        block = block.remove_columns("image_path").with_format("numpy")
        for first in range(0, len(block), BATCH):
            seen += len(block[first : first + BATCH]["pixel_values"])
    return seen


PEERS: dict[str, Callable[[Path, Path], int]] = {"ours": epoch_ours, "example": epoch_example}


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def use_one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def measure_epoch(peer: str, folder: Path, cache: Path, connection: Any) -> None:
    import datasets  # noqa: F401  (the imports are not counted)
    import jax
    import transformers  # noqa: F401

    import repro.data.sources  # noqa: F401

    use_one_core()
    jax.block_until_ready(jax.random.permutation(jax.random.PRNGKey(0), 8))
    before, started = cpu_seconds(), time.perf_counter()
    rows = PEERS[peer](folder, cache)
    connection.send(
        {
            "rows": rows,
            "cpu_seconds": cpu_seconds() - before,
            "seconds": time.perf_counter() - started,
            "bytes": on_disk(cache),
        }
    )


def in_process(function: Callable[..., None], *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(*arguments, theirs))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result


def compare_epochs(num_images: int, turns: int, size: tuple[int, int], work: Path) -> dict[str, Any]:
    folder = work / "data"
    write_data(folder, num_images, num_images * CAPTIONS, size)
    measured: dict[str, list[dict[str, Any]]] = {"ours": [], "ours_again": [], "example": []}
    for turn in range(turns):
        for name in measured:
            cache = work / f"cache-{name.partition('_')[0]}"
            if name != "ours_again":  # whose cache is warm
                shutil.rmtree(cache, ignore_errors=True)
            measured[name].append(in_process(measure_epoch, name.partition("_")[0], folder, cache))
            print(turn, name, measured[name][-1], flush=True)
        shutil.rmtree(work / "cache-example")
    rows = num_images * CAPTIONS
    assert {result["rows"] for results in measured.values() for result in results} == {rows}, "incomplete batches"
    peers = {}
    for name, results in measured.items():
        seconds = [result["cpu_seconds"] for result in results]
        peers[name] = {
            "cpu_seconds": statistics.median(seconds),
            "spread": [min(seconds), max(seconds)],
            "bytes": results[-1]["bytes"],
            "bytes_a_row": results[-1]["bytes"] / rows,
            "coco_cpu_hours": statistics.median(seconds) / rows * COCO_ROWS / 3600,
        }
    for name in ("ours", "ours_again"):
        ratios = [
            theirs["cpu_seconds"] / mine["cpu_seconds"]
            for theirs, mine in zip(measured["example"], measured[name], strict=True)
        ]
        peers[name]["example_times"] = statistics.median(ratios)
        peers[name]["ratio_spread"] = [min(ratios), max(ratios)]
    return {
        "images": num_images,
        "rows": rows,
        "jpeg_bytes": on_disk(folder / "train2017") / num_images,
        "turns": turns,
        "peers": peers,
        "example_bytes_times_ours": peers["example"]["bytes"] / peers["ours"]["bytes"],
    }


class MemoryWatch:
    """Samples what a process holds by itself, apart from what it has mapped, in MB."""

    def __init__(self) -> None:
        self.peak_own = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    self.peak_own = max(self.peak_own, int(line.split()[1]) * 1024 / 1e6)
            time.sleep(0.1)

    def report(self) -> dict[str, float]:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        return {"peak_resident_mb": resident, "peak_own_mb": self.peak_own}


def measure_start(folder: Path, cache: Path, reads: bool, connection: Any) -> None:
    """Start a run; then, where it reads, take an epoch on one core, and wait for batches in steps of a known length."""
    watch = MemoryWatch()
    began = time.perf_counter()
    data, seconds = start_ours(folder, cache, num_workers=None)
    result: dict[str, Any] = {
        "rows": len(data),
        "seconds": {**seconds, "all": time.perf_counter() - began},
        "after_start": watch.report(),
    }
    if reads:
        from repro.data.batches import prefetch

        use_one_core()
        started, count = time.perf_counter(), 0
        for batch in batches_of(data):
            count += len(batch["labels"])
        result["epoch"] = {"rows": count, "rows_per_second": count / (time.perf_counter() - started)}
        step, waited, slept = BATCH / STEP_ROWS_PER_SECOND, 0.0, 0.0
        batches = prefetch(batches_of(data))
        next(batches)
        for _ in range(WAITING_STEPS):
            time.sleep(step)
            slept += step
            before = time.perf_counter()
            if next(batches, None) is None:
                break
            waited += time.perf_counter() - before
        batches.close()
        result["waiting"] = {"step_seconds": step, "share": waited / (waited + slept)}
    result["peak"] = watch.report()
    connection.send(result)


def scale(num_images: int, size: tuple[int, int], work: Path) -> dict[str, Any]:
    results = {}
    for count in (num_images // 10, num_images):
        folder, cache = work / "data", work / "cache"
        started = time.perf_counter()
        write_data(folder, count, count * COCO_ROWS // COCO_IMAGES, size)
        print(f"{count} images written in {time.perf_counter() - started:.0f} s", flush=True)
        first = in_process(measure_start, folder, cache, False)
        print(json.dumps(first), flush=True)
        second = in_process(measure_start, folder, cache, True)
        print(json.dumps(second), flush=True)
        parts = {part.name: on_disk(part) for part in cache.iterdir()}
        results[str(count)] = {"first_start": first, "second_start": second, "bytes": parts}
        shutil.rmtree(folder)
        shutil.rmtree(cache)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, default=1024, help="of the comparison; whole batches with five captions each"
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--scale", type=int, nargs="?", const=COCO_IMAGES, help="instead: so many images, and a tenth")
    parser.add_argument("--smoke", action="store_true", help="few and small images, to see that it runs")
    parser.add_argument("--folder", type=Path, help="for the images and caches (default: a temporary one)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        if args.scale:
            count = 200 if args.smoke else args.scale
            result = {"sizes": scale(count, (64, 48), Path(work))}
        else:
            count, turns, size = (256, 1, (64, 48)) if args.smoke else (args.images, args.turns, (640, 480))
            result = compare_epochs(count, turns, size, Path(work))
    write_result(Path(__file__).stem, result, args.output)


if __name__ == "__main__":
    main()
