"""`repro data check`: read all that a run would read, once, and say what is in it and what the run would need."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repro.config import CheckArguments, DataArguments, ModelArguments, TrainingArguments
from repro.data.captions import caption_lengths
from repro.data.census import ImageCensus, inspect_images, joined, picture_sheet
from repro.data.image_cache import cores
from repro.data.images import resize_of
from repro.data.pipeline import number_images
from repro.data.rows import Rows, column
from repro.data.whole_file import check_writable
from repro.flags import check_values
from repro.json_files import write_json
from repro.models.pretrained import Pretrained
from repro.prepare import (
    SPLIT_FLAGS,
    cache_folder,
    check_rows,
    check_run,
    converts_to_rgb,
    count_evaluations,
    load_or_create,
    read_rows,
    target_length,
)
from repro.protocol import Protocol, protocol_named
from repro.training.losses import row_losses
from repro.training.optimizer import count_parameters

PERCENTILES = (0, 50, 95, 99, 100)
REASONS_LISTED = 20
BYTES_OF_WEIGHT = 2 * 4
"""A checkpoint holds float32 weights twice, for Flax and for PyTorch."""
PROBE_SIDES, PROBE_TURNS, PROBE_SECONDS = (2048, 4096, 8192, 16384), 4, 0.01


def check_data(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    check_args: CheckArguments,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Check what the flags of a run name; writes `data_check.json` and `data_check.png`, and returns the former.

    Without `--do_train`, `--do_eval` and `--do_predict`, the training and validation rows are checked.

    Raises:
        InputError: a run with these flags and data would be refused; what the data hold is written all the same, as far
            as it can be read.
    """
    if not (args.do_train or args.do_eval or args.do_predict):
        args = dataclasses.replace(args, do_train=True, do_eval=True)
    check_values(model_args, data_args, args)
    folder = Path(check_args.report_dir)
    check_writable(folder, "--report_dir")
    check_writable(cache_folder(model_args), "--cache_dir")
    if args.output_dir is not None:
        check_writable(Path(args.output_dir), "--output_dir")
    protocol = protocol_named(args.protocol)
    splits = [split for split, flag in SPLIT_FLAGS.items() if getattr(args, flag)]
    started = time.perf_counter()
    rows = read_rows(model_args, data_args, splits)
    seconds = {"rows": time.perf_counter() - started}
    pretrained = load_or_create(model_args, seed=args.seed)
    check_run(data_args, args, pretrained, jax.devices())
    num_workers = data_args.preprocessing_num_workers or cores()
    started = time.perf_counter()
    of_split = _inspect(rows, protocol, pretrained, num_workers=num_workers, progress=progress)
    census = joined(of_split.values())
    seconds["images"] = time.perf_counter() - started
    started = time.perf_counter()
    report: dict[str, Any] = {
        "splits": {
            name: _describe_split(split, of_split[name], pretrained, target_length(data_args, name))
            for name, split in rows.items()
        }
    }
    seconds["tokens"] = time.perf_counter() - started
    report["images"] = _describe_images(census)
    report["needs"] = _describe_needs(report, pretrained, model_args, data_args, args, seconds, num_workers)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "data_check.json", report)
    if pictures := _random_rows(rows, census, check_args.num_pictures, args.seed):
        picture_sheet(pictures).save(folder / "data_check.png")
    kept = {name: split["rows_kept"] for name, split in report["splits"].items()}
    check_rows(args, protocol, kept, jax.device_count())
    return report


def _inspect(
    rows: dict[str, Rows], protocol: Protocol, pretrained: Pretrained, *, num_workers: int, progress: bool
) -> dict[str, ImageCensus]:
    """Look at the images of each split as the run would take them; splits that are treated alike share a census."""
    found: dict[str, ImageCensus] = {}
    for convert in (False, True):
        together = [name for name in rows if converts_to_rgb(protocol, name) == convert]
        if together:
            census = inspect_images(
                list(number_images(rows[name].dataset for name in together)),
                resize_of(pretrained.image_processor),
                convert_to_rgb=convert,
                num_workers=num_workers,
                progress=progress,
            )
            found |= dict.fromkeys(together, census)
    return found


def _describe_split(split: Rows, census: ImageCensus, pretrained: Pretrained, max_length: int) -> dict[str, Any]:
    dataset = split.dataset
    of_image = Counter(column(dataset, "image_path"))
    unusable = sum(count for path, count in of_image.items() if path in census.failures)
    lengths = caption_lengths(column(dataset, "caption"), pretrained.tokenizer)
    given = lengths[lengths > 0]
    return {
        "rows": len(dataset) + len(split.dropped),
        "rows_kept": len(dataset) - unusable,
        "rows_dropped_for_themselves": len(split.dropped),
        "rows_dropped_for_their_image": unusable,
        "reasons": [row["reason"] for row in split.dropped[:REASONS_LISTED]],
        "images": len(of_image),
        "images_by_captions": dict(sorted(Counter(of_image.values()).items())),
        "captions": len(given),
        "tokens_of_a_caption": _percentiles(given),
        "max_length": max_length,
        "captions_cut": int(np.sum(given > max_length)),
    }


def _describe_images(census: ImageCensus) -> dict[str, Any]:
    readable = census.sizes[census.sizes[:, 0] > 0]
    return {
        "distinct": len(census.sizes),
        "modes": dict(census.modes.most_common()),
        "width": _percentiles(readable[:, 0]),
        "height": _percentiles(readable[:, 1]),
        "unusable": len(census.failures),
        "failures": dict(sorted(census.failures.items())[:REASONS_LISTED]),
        "reasons": dict(Counter(census.failures.values()).most_common(REASONS_LISTED)),
    }


def _describe_needs(
    report: dict[str, Any],
    pretrained: Pretrained,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    seconds: dict[str, float],
    num_workers: int,
) -> dict[str, Any]:
    splits, usable = report["splits"], report["images"]["distinct"] - report["images"]["unusable"]
    cache_bytes = usable * int(np.prod(resize_of(pretrained.image_processor).shape))
    parameters = count_parameters(pretrained.params)
    needs: dict[str, Any] = {
        "seconds_reading_rows": round(seconds["rows"], 1),
        "seconds_decoding_images": round(seconds["images"], 1),
        "threads": num_workers,
        "seconds_tokenizing": round(seconds["tokens"], 1),
        "image_cache_bytes": cache_bytes if data_args.image_cache else 0,
        "cache_free_bytes": _free(cache_folder(model_args)),
        "checkpoint_bytes": parameters * BYTES_OF_WEIGHT,
        "output_free_bytes": _free(Path(args.output_dir or ".")),
    }
    if "train" in splits:
        batch = (args.num_replicas or jax.device_count()) * args.per_device_train_batch_size
        steps_per_epoch = splits["train"]["rows_kept"] // batch
        steps = steps_per_epoch * int(args.num_train_epochs)
        evaluations = count_evaluations(args, protocol_named(args.protocol), steps_per_epoch)
        operations = steps * batch * training_operations(pretrained, splits["train"]["max_length"])
        rate = multiplication_rate(model_args.dtype) * jax.device_count()
        needs |= {
            "global_batch": batch,
            "steps": steps,
            "checkpoints": max(evaluations, 1),
            "operations": operations,
            "operations_per_second": rate,
            "seconds_training_at_least": round(operations / rate, 1),
        }
    return needs


def training_operations(pretrained: Pretrained, max_length: int) -> float:
    """Count the arithmetic operations of one row's training step, optimizer left out, from the compiler's own count."""
    captioner = pretrained.captioner
    side = resize_of(pretrained.image_processor).shape
    tokens = jax.ShapeDtypeStruct((1, max_length), jnp.int32)

    def loss(params: Any, pixels: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
        sums, _ = row_losses(captioner.logits(params, pixels, ids, mask), ids, mask)
        return sums.sum()

    shapes = jax.eval_shape(lambda: pretrained.params)
    lowered = jax.jit(jax.grad(loss)).lower(shapes, jax.ShapeDtypeStruct((1, *side), jnp.uint8), tokens, tokens)
    cost = lowered.cost_analysis()
    assert cost is not None, "every backend counts operations before it compiles"
    return float(cost["flops"])


def multiplication_rate(dtype: str) -> float:
    """Measure how many operations a second the first device does in a large matrix product: what nothing exceeds."""
    multiply, rate = jax.jit(jnp.matmul), 0.0
    for side in PROBE_SIDES:
        matrix = jnp.ones((side, side), dtype)
        multiply(matrix, matrix).block_until_ready()
        seconds = []
        for _ in range(PROBE_TURNS):
            started = time.perf_counter()
            multiply(matrix, matrix).block_until_ready()
            seconds.append(time.perf_counter() - started)
        rate = max(rate, 2 * side**3 / min(seconds))
        if min(seconds) > PROBE_SECONDS:  # an accelerator spends longer on the start of a small product than on it
            break
    return rate


def _random_rows(rows: dict[str, Rows], census: ImageCensus, count: int, seed: int) -> list[tuple[str, str | None]]:
    """Draw rows whose image can be used, from all splits."""
    random = np.random.default_rng(seed)
    chosen: list[tuple[str, str | None]] = []
    sizes = [len(split.dataset) for split in rows.values()]
    for row in random.permutation(sum(sizes))[: 4 * count + 100].tolist():
        for split, size in zip(rows.values(), sizes, strict=True):
            if row < size:
                drawn = split.dataset[row]
                if drawn["image_path"] not in census.failures and len(chosen) < count:
                    chosen.append((drawn["image_path"], drawn["caption"]))
                break
            row -= size
    return chosen


def _percentiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    return {f"p{p}": int(value) for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def _free(folder: Path) -> int:
    return shutil.disk_usage(existing(folder)).free


def describe(report: dict[str, Any]) -> str:
    """Put a report into words."""
    images, needs = report["images"], report["needs"]
    lines = []
    for name, split in report["splits"].items():
        by_captions = ", ".join(f"{images} with {n}" for n, images in split["images_by_captions"].items())
        lines += [
            f"{name}: {split['rows']} rows, {split['rows_kept']} can be used;"
            f" {split['rows_dropped_for_themselves']} dropped for themselves,"
            f" {split['rows_dropped_for_their_image']} for their image",
            f"  {split['images']} images, by captions: {by_captions}",
            f"  tokens of a caption: {_range(split['tokens_of_a_caption'])}; {split['captions_cut']} of"
            f" {split['captions']} are cut at {split['max_length']}",
            *(f"  dropped: {reason}" for reason in split["reasons"]),
        ]
    modes = ", ".join(f"{count} {mode}" for mode, count in images["modes"].items())
    once = (
        f"{needs['seconds_reading_rows']} s to read the rows, {needs['seconds_decoding_images']} s to decode the images"
    )
    lines += [
        f"images: {images['distinct']} distinct, {images['unusable']} cannot be used; modes: {modes}",
        f"  width {_range(images['width'])}; height {_range(images['height'])}",
        *(f"  {count} times: {reason}" for reason, count in images["reasons"].items()),
        *(f"  {path}: {reason}" for path, reason in images["failures"].items()),
        "a run needs",
        f"  once: {once} in {needs['threads']} threads, {needs['seconds_tokenizing']} s to tokenize",
        f"  {_size(needs['image_cache_bytes'])} for the image cache ({_size(needs['cache_free_bytes'])} are free)",
    ]
    if "steps" in needs:
        lines += [
            f"  {needs['checkpoints']} checkpoints of {_size(needs['checkpoint_bytes'])}"
            f" ({_size(needs['output_free_bytes'])} are free)",
            f"  {needs['steps']} steps of {needs['global_batch']} rows: {needs['operations']:.3g} operations, at least"
            f" {needs['seconds_training_at_least']:.0f} s at the {needs['operations_per_second'] / 1e12:.2f} TFLOP/s of"
            " this machine's matrix products; evaluations not counted",
        ]
    return "\n".join(lines)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _range(values: dict[str, int]) -> str:
    if not values:
        return "none"
    return f"{values['p0']} to {values['p100']}, median {values['p50']}, 99 % up to {values['p99']}"
