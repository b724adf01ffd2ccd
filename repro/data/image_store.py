"""Distinct images as uint8[M,S,S,3]: from the cache on disk, or a bounded number of them in memory."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from repro.data.image_cache import CHUNK, GIGABYTE, Decoded, ImageCache, cores
from repro.data.images import ImageError, Resize, decode_image, resize_of
from repro.errors import InputError
from repro.progress_bar import progress_bar

log = logging.getLogger("repro")


class Images(Protocol):
    """Images by number: indexed with int[B], gives uint8[B,S,S,3]."""

    def __getitem__(self, places: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True)
class ImageStore:
    """Distinct images.

    Attributes:
        images: by their place among the references that were asked for.
        failures: reference to the reason why it is not there.
    """

    images: Images
    failures: dict[str, str]


class DecodedImages:
    """Images decoded when they are asked for, of which the last used stay in memory.

    Args:
        capacity: images that are kept, unless more are asked for at once; None keeps all.
        num_workers: threads that decode.
    """

    def __init__(
        self,
        references: Sequence[str],
        decode: Callable[[str], Decoded],
        *,
        capacity: int | None,
        num_workers: int,
    ) -> None:
        self._references, self._decode, self._capacity = references, decode, capacity
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._pool = ThreadPoolExecutor(num_workers)
        self._lock = threading.Lock()

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        with self._lock:
            failures = self._hold(dict.fromkeys(places.tolist()))
            for place, error in failures.items():
                raise InputError(f"{self._references[place]}: could be read before, and now it cannot: {error}.")
            return np.stack([self._kept[place] for place in places.tolist()])

    def scan(self, places: Sequence[int]) -> dict[str, str]:
        """Decode images, keeping what there is room for; returns why others cannot be used, by reference."""
        with self._lock:
            return {self._references[place]: str(error) for place, error in self._hold(dict.fromkeys(places)).items()}

    def _hold(self, wanted: dict[int, None]) -> dict[int, ImageError]:
        for place in wanted.keys() & self._kept.keys():
            self._kept.move_to_end(place)
        missing = [place for place in wanted if place not in self._kept]
        while self._capacity is not None and len(self._kept) + len(missing) > self._capacity:
            if next(iter(self._kept), None) in (None, *wanted):
                break  # more are asked for than are kept
            self._kept.popitem(last=False)
        failures = {}
        for place, result in zip(
            missing, self._pool.map(self._decode, [self._references[place] for place in missing]), strict=True
        ):
            if isinstance(result, ImageError):
                failures[place] = result
            else:
                self._kept[place] = result
        return failures


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
    decode = partial(_try_to_decode, resize=resize, convert_to_rgb=convert_to_rgb)
    num_workers = num_workers or cores()
    bar = progress_bar(progress=progress, total=len(references), desc="images", unit="image", leave=False, smoothing=0)
    with bar:
        if cache_dir is None:
            return _load_into_memory(references, decode, resize, capacity, num_workers, bar)
        cache = ImageCache(cache_dir, resize, convert_to_rgb=convert_to_rgb)
        try:
            return ImageStore(*cache.load(references, decode, num_workers=num_workers, rebuild=rebuild, bar=bar))
        except OSError as error:
            raise InputError(
                f"{cache.folder}: decoded images cannot be kept there ({error}); make room or mend it, name another"
                " folder with --cache_dir, or do without with --no_image_cache."
            ) from error


def _load_into_memory(
    references: Sequence[str],
    decode: Callable[[str], Decoded],
    resize: Resize,
    capacity: int | None,
    num_workers: int,
    bar: Any,
) -> ImageStore:
    held = min(len(references), capacity or len(references)) * int(np.prod(resize.shape))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    log.info("decoding %d images; %.2f GB of them stay in memory", len(references), held / GIGABYTE)
    if held > memory:
        raise InputError(
            f"--no_image_cache: {held / GIGABYTE:.2f} GB of decoded images do not fit into"
            f" {memory / GIGABYTE:.2f} GB of memory; bound their number with --block_size, or leave the cache on."
        )
    images = DecodedImages(references, decode, capacity=capacity, num_workers=num_workers)
    failures: dict[str, str] = {}
    step = min(CHUNK * num_workers, capacity or len(references))
    for start in range(0, len(references), step):
        places = range(start, min(start + step, len(references)))
        failures |= images.scan(places)
        bar.update(len(places))
    return ImageStore(images, failures)


def _try_to_decode(reference: str, *, resize: Resize, convert_to_rgb: bool) -> Decoded:
    try:
        return decode_image(reference, resize, convert_to_rgb=convert_to_rgb)
    except ImageError as error:
        return error
