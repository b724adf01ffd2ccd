"""Rows to batches: the order of an epoch, its blocks and batches, and their way into the background."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from datasets import Dataset

from repro.data.captions import tokenize_captions
from repro.data.images import ImageStore
from repro.errors import InputError

Item = TypeVar("Item")
REASONS_SHOWN = 3


def epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """Draw the order of the rows in an epoch (counted from 0), int64[N], as the example does.

    The key of the order is the second half of the chain's key, which each epoch splits; the chain starts with the
    first half of the seed (the other half is dropout's). Which stream is drawn from is JAX's
    `jax_threefry_partitionable` at the call.
    """
    chain, _dropout = jax.random.split(jax.random.PRNGKey(seed))
    for _ in range(epoch + 1):
        chain, order_key = jax.random.split(chain)
    return np.asarray(jax.random.permutation(order_key, num_rows), np.int64)


def blocks(order: np.ndarray, block_size: int) -> Iterator[np.ndarray]:
    """Cut an order into consecutive blocks; 0 makes one block of it."""
    step = block_size or max(len(order), 1)
    return (order[start : start + step] for start in range(0, len(order), step))


def batches(block: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Cut a block into consecutive batches, without the incomplete last one."""
    last = len(block) - batch_size
    return (block[start : start + batch_size] for start in range(0, last + 1, batch_size))


def check_sizes(num_rows: int, *, train_batch: int, eval_batch: int, block_size: int) -> None:
    """Check that the training rows can be cut as asked.

    Raises:
        InputError: the block size is negative or not a multiple of both global batches, or a batch has more rows
        than there are.
    """
    for name, batch in (("train", train_batch), ("eval", eval_batch)):
        if block_size < 0 or block_size % batch:
            raise InputError(
                f"--block_size {block_size}: must be 0 or a multiple of the global {name} batch of"
                f" {batch} rows (replicas x --per_device_{name}_batch_size)."
            )
    if num_rows < train_batch:
        raise InputError(
            f"the global train batch of {train_batch} rows is larger than the data: {num_rows} rows"
            " are left; lower --per_device_train_batch_size or --num_replicas."
        )


@dataclass(frozen=True)
class CaptionedImages:
    """A split that is ready to be cut into batches.

    Attributes:
        labels, decoder_input_ids, decoder_attention_mask: int32[N,T]
        image_index: int64[N], each row's place in `pixels`.
        pixels: uint8[M,S,S,3]
        captions: str or None of each row, as read.
        image_ids, image_paths: of each row.
    """

    labels: np.ndarray
    decoder_input_ids: np.ndarray
    decoder_attention_mask: np.ndarray
    image_index: np.ndarray
    pixels: np.ndarray
    captions: list[str | None]
    image_ids: list[Any]
    image_paths: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Gather rows int[B] into `pixels` uint8[B,S,S,3] and the three int32[B,T]."""
        return {"pixels": self.pixels[self.image_index[rows]], **self.tokens(rows)}

    def tokens(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Gather the captions of rows int[B], the three int32[B,T]."""
        return {
            "labels": self.labels[rows],
            "decoder_input_ids": self.decoder_input_ids[rows],
            "decoder_attention_mask": self.decoder_attention_mask[rows],
        }


def prepare_split(
    dataset: Dataset,
    tokenizer: Any,
    images: ImageStore,
    *,
    max_length: int,
    decoder_start_token_id: int,
    split: str,
) -> tuple[CaptionedImages, list[dict[str, Any]]]:
    """Join rows with their decoded images and tokenized captions.

    Returns:
        The split, and the rows whose image cannot be used: {"split", "row", "image_path", "caption", "reason"}.

    Raises:
        InputError: no row is left.
    """
    columns = {name: list(dataset[name]) for name in dataset.column_names}
    paths = columns["image_path"]
    kept = [row for row, path in enumerate(paths) if path in images.index]
    dropped = [
        {
            "split": split,
            "row": columns["row"][row],
            "image_path": path,
            "caption": columns["caption"][row],
            "reason": images.failures[path],
        }
        for row, path in enumerate(paths)
        if path not in images.index
    ]
    if not kept:
        reasons = "; ".join(f"{row['image_path']}: {row['reason']}" for row in dropped[:REASONS_SHOWN])
        raise InputError(
            f"{split}: no row is left of {len(paths)}, because no image can be read. Check the paths"
            f" (relative ones are looked up beside the file that names them). {reasons}"
        )
    captions = [columns["caption"][row] for row in kept]
    tokens = tokenize_captions(
        captions, tokenizer, max_length=max_length, decoder_start_token_id=decoder_start_token_id
    )
    prepared = CaptionedImages(
        **tokens,
        image_index=np.asarray([images.index[paths[row]] for row in kept], np.int64),
        pixels=images.pixels,
        captions=captions,
        image_ids=[columns["image_id"][row] for row in kept],
        image_paths=[paths[row] for row in kept],
    )
    return prepared, dropped


def prefetch(items: Iterable[Item], size: int = 2) -> Iterator[Item]:
    """Compute up to `size` items ahead in a thread.

    The thread ends with its consumer, and its exceptions are raised where the items are used.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=size)
    stopped = threading.Event()

    def offer(kind: str, value: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not offer("item", item):
                    return
            offer("end", None)
        except BaseException as error:  # the consumer raises it
            offer("error", error)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stopped.set()
        thread.join()
