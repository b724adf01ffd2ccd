"""Distinct images as uint8[M,S,S,3], each decoded once: on disk, shared by runs, or a bounded number in memory.

The cache is a folder for each geometry. `pixels` holds one image after another; `index.jsonl` says where each is, or
why it cannot be used, by a hash of its path, size and time. Pixels are on disk before the index names them, and files
only grow: whoever is killed leaves what is finished, and readers are never in the way of a writer.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import weakref
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from uuid import uuid4

import numpy as np
import PIL
import xxhash

from repro.data.atomic import alone, kept_there
from repro.data.images import ImageError, Resize, decode_image, image_key, resize_of
from repro.errors import InputError
from repro.json_files import PARTIAL, Count, read_lines, write_whole
from repro.limits import LIST_BYTES
from repro.progress import progress_bar

COMMIT = 1024  # images after which a build is made safe on disk
GIGABYTE = 1e9

T = TypeVar("T")
R = TypeVar("R")
Decoded = tuple[np.ndarray, bool] | ImageError  # uint8[S,S,3], and whether it is stored turned
Decode = Callable[[Iterable[int]], Iterator[tuple[int, Decoded]]]  # of places among the references, in order
Index = dict[str, list[Any] | str]  # by an image's key: place, XXH3 of its bytes, turned or not; or why it fails

log = logging.getLogger("repro")
LINE: Any = tuple[str, tuple[Count, str, bool] | str | dict[str, Any]]  # of the index: build and settings, then entries


class StoredImages:
    """Images one after another in a file, read when they are asked for; what stays in memory is the system's cache.

    Their entries are those of the `Index`; `again` gives those anew whose bytes have changed.
    """

    def __init__(self, file: Path, entries: list[Any], shape: tuple[int, ...], again: Images) -> None:
        self._file, self._entries, self._shape, self._again = file, entries, shape, again
        self._descriptor = os.open(file, os.O_RDWR if os.access(file, os.W_OK) else os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        images = np.empty((len(places), *self._shape), np.uint8)
        for place, image in zip(places.tolist(), images, strict=True):
            slot, total, _ = self._entries[place]
            start = slot * image.nbytes
            if os.preadv(self._descriptor, [image], start) != image.nbytes or _sum(image) != total:
                log.warning("%s: the image at byte %d is damaged; it is decoded again", self._file, start)
                image[:] = self._again[np.array([place])]
                with suppress(OSError):  # of a cache that only others may write
                    os.pwrite(self._descriptor, image, start)
        return images


class ImageCache:
    """The folder of one geometry (see the module)."""

    def __init__(self, cache_dir: Path, resize: Resize, *, convert_to_rgb: bool, turn_upright: bool) -> None:
        # Pillow's version too: another one may decode or resize differently.
        how = {"convert_to_rgb": convert_to_rgb, "turn_upright": turn_upright}
        self._settings = {**asdict(resize), **how, "pillow": PIL.__version__}
        self.folder = cache_dir / sha256(repr(self._settings).encode()).hexdigest()[:16]
        self._pixels, self._index, self._lock = (self.folder / name for name in ("pixels", "index.jsonl", "lock"))
        self._shape, self._image_bytes = resize.shape, math.prod(resize.shape)

    def load(self, references: Sequence[str], decode: Decode, rebuild: str | None, bar: Any) -> ImageStore:
        """Find the references, decoding those that are not there; tells also why some cannot be used."""
        keys = [image_key(reference) or reference for reference in references]
        build, index = self._read(rebuild)
        bar.update(sum(key in index for key in keys))
        if build and index.keys() >= set(keys):
            opened = self._open(references, keys, index, decode)
            if build == self._read(rebuild)[0]:  # otherwise another run has discarded it meanwhile
                return opened
        with alone(self._lock):
            index = self._repair(rebuild)  # in which another run, which was quicker, may have all
            return self._open(references, keys, self._extend(index, references, keys, decode, bar), decode)

    def _open(self, references: Sequence[str], keys: Sequence[str], index: Index, decode: Decode) -> ImageStore:
        found = [index[key] for key in keys]
        failures = {name: entry for name, entry in zip(references, found, strict=True) if isinstance(entry, str)}
        turned = {name for name, entry in zip(references, found, strict=True) if name not in failures and entry[2]}
        stored = StoredImages(self._pixels, found, self._shape, DecodedImages(references, decode))
        return ImageStore(stored, failures, turned)

    def _read(self, rebuild: str | None) -> tuple[str | None, Index]:
        """Give the name of the build that is there and what of it is whole; None if it cannot be used, by `rebuild`."""
        try:
            rows, _damaged = read_lines(self._index, LINE, largest=LIST_BYTES)  # such as what a killed writer began
            available = self._pixels.stat().st_size // self._image_bytes
        except (OSError, InputError):
            return None, {}
        if not rows or rows[0][1] != self._settings or rebuild not in (None, rows[0][0]):
            return None, {}
        # No slot is given twice: of those that are, at most one entry is right, and which is not known.
        times = Counter(entry[0] for _, entry in rows[1:] if isinstance(entry, list))
        is_whole = lambda entry: times[entry[0]] == 1 and entry[0] < available  # noqa: E731
        known = ((key, entry) for key, entry in rows[1:] if isinstance(entry, str | list))
        return rows[0][0], {key: entry for key, entry in known if isinstance(entry, str) or is_whole(entry)}

    def _extend(self, index: Index, references: Sequence[str], keys: Sequence[str], decode: Decode, bar: Any) -> Index:
        """Decode what is missing and add it; what cannot be used for a reason that may pass is told, but not kept."""
        missing = {key: place for place, key in enumerate(keys) if key not in index}
        if not missing:
            return index
        needed, free = len(missing) * self._image_bytes, shutil.disk_usage(self.folder).free
        log.info("decoding %d images into %s: %.2f GB", len(missing), self.folder, needed / GIGABYTE)
        if needed > free:
            raise InputError(
                f"{self.folder}: {len(missing)} decoded images need {needed / GIGABYTE:.2f} GB, and"
                f" {free / GIGABYTE:.2f} GB are free; make room, name another folder with --cache_dir, or do without"
                " with --no_image_cache."
            )
        slot = 1 + max((entry[0] for entry in index.values() if not isinstance(entry, str)), default=-1)
        passing, added = Index(), Index()
        with self._pixels.open("r+b") as pixels, self._index.open("a") as opened:
            pixels.seek(slot * self._image_bytes)

            def commit() -> None:
                pixels.flush()
                os.fsync(pixels.fileno())
                opened.writelines(map(_line, added.items()))
                opened.flush()
                index.update(added)
                added.clear()

            try:
                for place, image in decode(missing.values()):
                    key = keys[place]
                    if isinstance(image, ImageError):
                        reasons = passing if image.passing or key == references[place] else added
                        reasons[key] = str(image)
                    elif key == references[place]:
                        passing[key] = "its file was not there when the run began"
                    else:
                        pixels.write(image[0].tobytes())
                        added[key] = [slot, _sum(image[0]), image[1]]
                        slot += 1
                    bar.update()
                    if len(added) >= COMMIT:
                        commit()
            finally:
                commit()
        return index | passing

    def _repair(self, rebuild: str | None) -> Index:
        """Make the files ready to grow: without what a killed writer, a truncation or other settings left behind.

        Of all processes of a run that builds them again, the first one discards what other runs have left.
        """
        for left in self.folder.glob(f"*{PARTIAL}"):
            left.unlink()
        build, index = self._read(rebuild)
        lines = "".join(map(_line, [(build or rebuild or uuid4().hex, self._settings), *index.items()])).encode()
        if self._index.exists():
            if self._index.read_bytes() == lines:
                return index
            if rebuild is None:
                log.warning("%s: the image cache is not whole; what is missing is decoded again", self.folder)
        if build is None:
            self._index.unlink(missing_ok=True)
            write_whole(self._pixels, b"")  # replaced, not emptied: a run that reads them keeps them
        write_whole(self._index, lines)
        return index


def _sum(image: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(image.data)


def _line(entry: tuple[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(function: Callable[[T], R], items: Iterable[T], num_workers: int) -> Generator[tuple[T, R]]:
    """Map in order in threads, with a bounded number of results ahead: decoding leaves Python's lock to others."""
    with ThreadPoolExecutor(num_workers) as pool:
        pending: deque[tuple[T, Any]] = deque()
        try:
            for item in items:
                pending.append((item, pool.submit(function, item)))
                if len(pending) > 2 * num_workers:
                    first, future = pending.popleft()
                    yield first, future.result()
            for first, future in pending:
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


class Images(Protocol):
    """Images by number: indexed with int[B], gives uint8[B,S,S,3]."""

    def __getitem__(self, places: np.ndarray, /) -> np.ndarray: ...


class ImageStore(NamedTuple):
    """Distinct images by their place among the references, and what is to be said of some, by reference."""

    images: Images
    failures: dict[str, str]  # the reasons why some are not there
    turned: set[str]  # those that are stored turned, as their EXIF says


class DecodedImages:
    """Images that are decoded when they are asked for, those that `decode` does not remember."""

    def __init__(self, references: Sequence[str], decode: Decode) -> None:
        self._references, self._decode = references, decode

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        images: dict[int, np.ndarray] = {}
        for place, image in self._decode(dict.fromkeys(places.tolist())):
            if isinstance(image, ImageError):
                raise InputError(f"{self._references[place]}: could be read before, and now it cannot: {image}.")
            images[place] = image[0]
        return np.stack([images[place] for place in places.tolist()])


def load_images(
    references: Sequence[str],
    image_processor: Any,
    *,
    convert_to_rgb: bool,
    turn_upright: bool = False,
    cache_dir: Path | None,
    capacity: int | None = None,
    num_workers: int | None = None,
    rebuild: str | None = None,
    progress: bool = True,
) -> ImageStore:
    """Decode each of distinct references once, but for what earlier runs have decoded.

    Args:
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
            return decode_image(references[place], resize, convert_to_rgb=convert_to_rgb, turn_upright=turn_upright)
        except ImageError as error:
            return error

    remembered = lru_cache(capacity)(decode_one) if cache_dir is None else decode_one
    decode = partial(in_parallel, remembered, num_workers=num_workers or cores())
    bar = progress_bar(progress=progress, total=len(references), desc="images", unit="image", leave=False, smoothing=0)
    with bar:
        if cache_dir is None:
            _check_memory(len(references), capacity, resize)
            store = ImageStore(DecodedImages(references, decode), {}, set())
            for place, image in decode(range(len(references))):  # to see which can be used
                bar.update()
                if isinstance(image, ImageError):
                    store.failures[references[place]] = str(image)
                elif image[1]:
                    store.turned.add(references[place])
            return store
        cache = ImageCache(cache_dir, resize, convert_to_rgb=convert_to_rgb, turn_upright=turn_upright)
        with kept_there(cache.folder, "decoded images", ", or do without with --no_image_cache"):
            return cache.load(references, decode, rebuild, bar)


def _check_memory(total: int, capacity: int | None, resize: Resize) -> None:
    held = min(total, capacity or total) * math.prod(resize.shape) / GIGABYTE
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIGABYTE
    log.info("decoding %d images; %.2f GB of them stay in memory", total, held)
    if held > memory:
        raise InputError(
            f"--no_image_cache: {held:.2f} GB of decoded images do not fit into"
            f" {memory:.2f} GB of memory; bound their number with --block_size, or leave the cache on."
        )
