"""Distinct images as uint8[M,S,S,3]: from the cache on disk, or a bounded number of them in memory."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from repro.data.image_cache import GIGABYTE, Decode, Decoded, ImageCache, cores, in_parallel
from repro.data.images import ImageError, Resize, decode_image, resize_of
from repro.errors import InputError
from repro.progress import progress_bar

log = logging.getLogger("repro")


class Images(Protocol):
    """Images by number: indexed with int[B], gives uint8[B,S,S,3]."""

    def __getitem__(self, places: np.ndarray, /) -> np.ndarray: ...


class ImageStore(NamedTuple):
    """Distinct images by their place among the references, and by reference the reasons why others are not there."""

    images: Images
    failures: dict[str, str]


class DecodedImages:
    """Images that are decoded once to see which can be used, and again when they are asked for.

    Args:
        decode: gives images by place, uint8[S,S,3], or why they cannot be used.
        capacity: images that stay in memory, unless more are asked for at once; None keeps all.
        bar: shows how many have been decoded.

    Attributes:
        failures: reference to the reason why it cannot be used.
    """

    def __init__(self, references: Sequence[str], decode: Decode, capacity: int | None, bar: Any) -> None:
        self._references, self._decode = references, decode
        self._capacity = len(references) if capacity is None else capacity
        self._kept: dict[int, np.ndarray] = {}  # the last used come last
        self._lock = threading.Lock()
        self.failures: dict[str, str] = {}
        for place, image in self._decode(range(len(references))):
            if isinstance(image, ImageError):
                self.failures[references[place]] = str(image)
            elif len(self._kept) < self._capacity:
                self._kept[place] = image
            bar.update()

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        with self._lock:
            wanted = dict.fromkeys(places.tolist())
            images = {place: self._kept.pop(place) for place in wanted if place in self._kept}
            while self._kept and len(self._kept) + len(wanted) > self._capacity:
                del self._kept[next(iter(self._kept))]
            for place, image in self._decode([place for place in wanted if place not in images]):
                if isinstance(image, ImageError):
                    raise InputError(f"{self._references[place]}: could be read before, and now it cannot: {image}.")
                images[place] = image
            self._kept |= images
        return np.stack([images[place] for place in places.tolist()])


def load_images(
    references: Sequence[str],
    image_processor: Any,
    *,
    convert_to_rgb: bool,
    cache_dir: Path | None,
    capacity: int | None = None,
    num_workers: int | None = None,
    rebuild: str | None = None,
    progress: bool = True,
) -> ImageStore:
    """Decode each reference once, but for what earlier runs have decoded.

    Args:
        references: distinct.
        cache_dir: folder of the cache, which runs may share and build at the same time; None for none.
        capacity: without a cache, how many decoded images are kept in memory; None for all.
        num_workers: threads that decode; None for one on each core.
        rebuild: a run's own name, to discard what other runs have decoded in this geometry; None to use it.

    Raises:
        InputError: there is no room for the images, or the cache cannot be written.
    """
    resize = resize_of(image_processor)

    def decode_one(place: int) -> Decoded:
        try:
            return decode_image(references[place], resize, convert_to_rgb=convert_to_rgb)
        except ImageError as error:
            return error

    decode = partial(in_parallel, decode_one, num_workers=num_workers or cores())
    bar = progress_bar(progress=progress, total=len(references), desc="images", unit="image", leave=False, smoothing=0)
    with bar:
        if cache_dir is None:
            _check_memory(len(references), capacity, resize)
            images = DecodedImages(references, decode, capacity, bar)
            return ImageStore(images, images.failures)
        cache = ImageCache(cache_dir, resize, convert_to_rgb=convert_to_rgb)
        try:
            return ImageStore(*cache.load(references, decode, rebuild, bar))
        except OSError as error:
            raise InputError(
                f"{cache.folder}: decoded images cannot be kept there ({error}); make room or mend it, name another"
                " folder with --cache_dir, or do without with --no_image_cache."
            ) from error


def _check_memory(total: int, capacity: int | None, resize: Resize) -> None:
    held = min(total, capacity or total) * math.prod(resize.shape) / GIGABYTE
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIGABYTE
    log.info("decoding %d images; %.2f GB of them stay in memory", total, held)
    if held > memory:
        raise InputError(
            f"--no_image_cache: {held:.2f} GB of decoded images do not fit into"
            f" {memory:.2f} GB of memory; bound their number with --block_size, or leave the cache on."
        )
