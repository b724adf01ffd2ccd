"""Rows to batches: which rows a step takes, what they hold, and their way into the background."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
from datasets import Dataset

from repro.data.captions import caption_lengths, tokenize_captions, unpack_tokens
from repro.data.image_cache import Images, ImageStore, in_parallel
from repro.data.rows import column
from repro.errors import InputError

T = TypeVar("T")
REASONS_SHOWN = 3
HASHED = 100_000  # rows at once
IMAGES_HASHED = 32  # all of COCO's would be 18 GB to read at every start


@dataclass(frozen=True)
class RowOrder:
    """In which order rows are trained on."""

    seed: int
    num_epochs: int
    shuffle: bool  # whether epochs are permuted; otherwise rows come in the order of the file
    num_replicas: int
    replica_batch: int  # row r of a global batch is in replica r // replica_batch

    @property
    def global_batch(self) -> int:
        return self.num_replicas * self.replica_batch

    def steps_per_epoch(self, num_rows: int) -> int:
        return num_rows // self.global_batch

    def epoch_rows(self, epoch: int, num_rows: int) -> np.ndarray:
        """Give the rows of each step of an epoch (counted from 0), int64[steps,R,b], without the incomplete last batch.

        A step's rows depend on nothing but seed, epoch and step: blocks are consecutive parts of the order and batches
        consecutive parts of a block, so that the block size does not matter.
        """
        order = epoch_order(self.seed, epoch, num_rows) if self.shuffle else np.arange(num_rows)
        used = self.steps_per_epoch(num_rows) * self.global_batch
        return order[:used].reshape(-1, self.num_replicas, self.replica_batch)


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


@dataclass(frozen=True)
class CaptionedImages:
    """A split that is ready to be cut into batches, of N rows."""

    dataset: Dataset  # the rows as read, some of which may not be used
    kept: np.ndarray  # int64[N], the place of each row in `dataset` and in `records`
    records: np.ndarray  # the captions of all rows of `dataset`, T tokens each, as `pack_tokens` makes; maybe on disk
    decoder_start_token_id: int  # the first of the decoder's inputs
    image_index: np.ndarray  # int64[N], each row's place in `images`
    images: Images  # distinct images, uint8[S,S,3] each
    num_cut: int = 0  # rows whose caption had more than T tokens
    num_turned: int = 0  # images that are stored turned, as their EXIF says

    def __len__(self) -> int:
        return len(self.kept)

    def batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Gather rows int[B] into `pixels` uint8[B,S,S,3] and the three int32[B,T]."""
        return {"pixels": self.images[self.image_index[rows]], **self.tokens(rows)}

    def tokens(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Gather the captions of rows int[B], the three int32[B,T]."""
        return unpack_tokens(self.records[self.kept[rows]], self.decoder_start_token_id)

    def have_captions(self, rows: np.ndarray) -> np.ndarray:
        """Tell which of rows int[B] have a caption, bool[B]: even an empty one has an eos token."""
        return np.any(self.records["mask"][self.kept[rows]], axis=1)

    def read(self, rows: np.ndarray, column: str = "image_path") -> list[str]:
        """Give what was read of rows int[B]: a `caption`, or an image's name, in `image_id` its source's (a number)."""
        return list(self.dataset[self.kept[rows]][column])

    def fingerprint(self) -> str:
        """Hash what is learned from: tokens, which rows share an image, and the pixels of some images."""
        digest = sha256()
        for start in range(0, len(self), HASHED):
            digest.update(self.records[self.kept[start : start + HASHED]].tobytes())
        _, first, shared = np.unique(self.image_index, return_index=True, return_inverse=True)
        digest.update(np.argsort(np.argsort(first))[shared].astype(np.int64).tobytes())
        some = np.unique(np.linspace(0, len(first) - 1, IMAGES_HASHED).astype(np.int64))
        digest.update(self.images[self.image_index[np.sort(first)[some]]].tobytes())
        return digest.hexdigest()[:16]


def prepare_split(
    dataset: Dataset,
    tokenizer: Any,
    places: Mapping[str, int],
    store: ImageStore,
    *,
    max_length: int,
    decoder_start_token_id: int,
    split: str,
    tokens_dir: Path,
) -> tuple[CaptionedImages, list[dict[str, Any]]]:
    """Join rows with their decoded images and tokenized captions.

    Args:
        places: of each image path in the store.
        tokens_dir: where the tokens are kept.

    Returns:
        The split, and the rows whose image cannot be used: {"split", "row", "image_path", "caption", "reason"}.

    Raises:
        InputError: no row is left.
    """
    index = np.fromiter((places[path] for path in column(dataset, "image_path")), np.int64, len(dataset))
    failed = np.isin(index, [places[path] for path in store.failures if path in places])
    names = ("row", "image_path", "caption")
    dropped = [
        {"split": split, **{name: row[name] for name in names}, "reason": store.failures[row["image_path"]]}
        for row in dataset.select(np.flatnonzero(failed))
    ]
    if failed.all():
        reasons = "; ".join(f"{row['image_path']}: {row['reason']}" for row in dropped[:REASONS_SHOWN])
        raise InputError(
            f"{split}: no row is left of {len(dataset)}, because no image can be read. Check the paths"
            f" (relative ones begin in --data_dir or beside the file that names them). {reasons}"
        )
    records = tokenize_captions(dataset, tokenizer, max_length, tokens_dir)
    kept = np.flatnonzero(~failed)
    # Of captions that were cut, each token is there.
    may_be_cut = kept[np.all(records["mask"][kept] == np.packbits(np.ones(max_length, bool)), axis=1)]
    lengths = caption_lengths(column(dataset.select(may_be_cut), "caption"), tokenizer)
    num_cut = int(np.sum(lengths > max_length))
    num_turned = len(np.intersect1d(index, [places[path] for path in store.turned if path in places]))
    images = (index[kept], store.images)
    return CaptionedImages(dataset, kept, records, decoder_start_token_id, *images, num_cut, num_turned), dropped


def prefetch(items: Iterable[T]) -> Generator[T]:
    """Compute two items ahead in a thread, which ends with its consumer; its exceptions are raised where it is used."""
    source, end = iter(items), cast("T", object())
    with closing(in_parallel(lambda _: next(source, end), repeat(None), 1)) as computed:
        for _, item in computed:
            if item is end:
                return
            yield item
