"""Decoded images on disk, memory-mapped; shared by runs, and made by several at once where it comes to that.

The cache is a folder for each geometry. `pixels` holds one image after another; `index` says where each is, by a hash
of its path, size and time; `failures.jsonl` says why others cannot be used. Pixels are on disk before the index names
them, and files only grow: whoever is killed leaves what is finished, and readers are never in the way of a writer.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from uuid import uuid4

import numpy as np
import PIL

from repro.data.images import ImageError, Resize, image_key
from repro.data.whole_file import alone
from repro.errors import InputError

CHUNK = 16
"""Images per task of a thread."""
COMMIT = 1024
"""Images after which a build is made safe on disk."""
RECORD = np.dtype([("key", "S16"), ("slot", "<i8")])
RELEASE_AFTER = 256 << 20
"""Bytes read from the map before its pages are given back: they stay in the system's cache, not in this process."""
GIGABYTE = 1e9

Item = TypeVar("Item")
Result = TypeVar("Result")
Decoded = np.ndarray | ImageError

log = logging.getLogger("repro")


class MappedImages:
    """Images in a memory-mapped file; at most `RELEASE_AFTER` bytes of it stay mapped in this process."""

    def __init__(self, file: BinaryIO, slots: np.ndarray, shape: tuple[int, ...]) -> None:
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._slots = slots
        image_bytes = int(np.prod(shape))
        count = len(self._map) // image_bytes
        self._pixels = np.frombuffer(self._map, np.uint8, count * image_bytes).reshape(count, *shape)
        self._touched = 0

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        images = self._pixels[self._slots[places]]
        self._touched += images.nbytes
        if self._touched > RELEASE_AFTER and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return images


class ImageCache:
    """The folder of one geometry (see the module)."""

    def __init__(self, cache_dir: Path, resize: Resize, *, convert_to_rgb: bool) -> None:
        # Pillow's version too: another one may decode or resize differently.
        self.settings = {**asdict(resize), "convert_to_rgb": convert_to_rgb, "pillow": PIL.__version__}
        self.folder = cache_dir / sha256(repr(self.settings).encode()).hexdigest()[:16]
        self.shape = resize.shape
        self.image_bytes = int(np.prod(resize.shape))
        self._pixels, self._index = self.folder / "pixels", self.folder / "index"
        self._failures, self._settings = self.folder / "failures.jsonl", self.folder / "settings.json"
        self._lock = self.folder / "lock"

    def load(
        self,
        references: Sequence[str],
        decode: Callable[[str], Decoded],
        *,
        num_workers: int,
        rebuild: str | None,
        bar: Any,
    ) -> tuple[MappedImages | np.ndarray, dict[str, str]]:
        """Find the references, decoding those that are not there; tells also why some cannot be used."""
        stamps: dict[str, tuple[int, ...]] = {}
        keys = [image_key(reference, stamps) for reference in references]
        if rebuild is not None:
            with alone(self._lock):
                if self._generation() != rebuild:  # of all processes of a run, the first one discards
                    self._begin_anew(rebuild)
        generation = self._generation()
        slots, failures = self._look_up(references, keys)
        bar.update(int(np.sum(slots >= 0)) + len(failures))
        images = self._open(slots)
        # Another run may have discarded what the index told of, and begun anew.
        if np.any(slots < 0) or generation != self._generation():
            with alone(self._lock):
                slots, failures = self._look_up(references, keys)  # another run may have been quicker
                missing = [place for place in np.flatnonzero(slots < 0).tolist() if references[place] not in failures]
                if missing:
                    failed = self._extend(references, keys, missing, decode, num_workers, bar)
                    slots, _ = self._look_up(references, keys)
                    failures |= failed
                images = self._open(slots)
        return images, failures

    def _open(self, slots: np.ndarray) -> MappedImages | np.ndarray:
        if not np.any(slots >= 0) or not self._pixels.is_file():
            return np.zeros((0, *self.shape), np.uint8)
        with self._pixels.open("rb") as pixels:
            return MappedImages(pixels, slots, self.shape)

    def _look_up(self, references: Sequence[str], keys: Sequence[bytes | None]) -> tuple[np.ndarray, dict[str, str]]:
        """Give each reference's slot, int64[M], -1 where there is none, and the reasons why there never will be."""
        slots = np.full(len(keys), -1)
        records = self._records()
        wanted = np.array([key or b"" for key in keys], RECORD["key"])
        if len(records):
            order = np.argsort(records["key"], kind="stable")
            found = np.searchsorted(records["key"], wanted, side="right", sorter=order) - 1
            candidates = records[order[found]]
            same = (found >= 0) & (candidates["key"] == wanted)
            slots[same] = candidates["slot"][same]
        reasons = self._reasons()
        failures = {
            reference: reasons[key]
            for reference, key, slot in zip(references, keys, slots, strict=True)
            if slot < 0 and key in reasons
        }
        return slots, failures

    def _records(self) -> np.ndarray:
        """Read the index, RECORD[n], as far as the pixels that it names are there."""
        if not self._generation() or not self._index.is_file() or not self._pixels.is_file():
            return np.zeros(0, RECORD)
        raw = self._index.read_bytes()
        available = self._pixels.stat().st_size // self.image_bytes
        records = np.frombuffer(raw, RECORD, len(raw) // RECORD.itemsize)
        return records[records["slot"] < available]

    def _reasons(self) -> dict[bytes | None, str]:
        reasons: dict[bytes | None, str] = {}
        if self._generation() and self._failures.is_file():
            for line in self._failures.read_text().splitlines():
                with suppress(ValueError):  # half a line, from a writer that was killed
                    row = json.loads(line)
                    reasons[bytes.fromhex(row["key"])] = row["reason"]
        return reasons

    def _generation(self) -> str | None:
        """Name the files that are there, as drawn when they were begun; None if they are not of these settings."""
        try:
            settings = json.loads(self._settings.read_text())
            generation = str(settings.pop("generation"))
        except (OSError, ValueError, KeyError, AttributeError):
            return None
        return generation if settings == self.settings else None

    def _extend(
        self,
        references: Sequence[str],
        keys: Sequence[bytes | None],
        missing: Sequence[int],
        decode: Callable[[str], Decoded],
        num_workers: int,
        bar: Any,
    ) -> dict[str, str]:
        """Decode images and add them; returns why some cannot be used."""
        records = self._repair()
        needed, free = len(missing) * self.image_bytes, shutil.disk_usage(self.folder).free
        log.info("decoding %d images into %s: %.2f GB", len(missing), self.folder, needed / GIGABYTE)
        if needed > free:
            raise InputError(
                f"{self.folder}: {len(missing)} decoded images need {needed / GIGABYTE:.2f} GB, and"
                f" {free / GIGABYTE:.2f} GB are free; make room, name another folder with --cache_dir, or do without"
                " with --no_image_cache."
            )
        failures: dict[str, str] = {}
        waiting: list[tuple[bytes, int]] = []
        slot = int(records["slot"].max(initial=-1)) + 1
        chunks = [missing[start : start + CHUNK] for start in range(0, len(missing), CHUNK)]
        with (
            self._pixels.open("r+b") as pixels,
            self._index.open("ab") as index,
            self._failures.open("a") as reasons,
        ):
            pixels.seek(slot * self.image_bytes)

            def commit() -> None:
                pixels.flush()
                os.fsync(pixels.fileno())
                index.write(np.array(waiting, RECORD).tobytes())
                index.flush()
                reasons.flush()
                waiting.clear()

            def decode_chunk(places: Sequence[int]) -> list[Decoded]:
                return [decode(references[place]) for place in places]

            try:
                for places, decoded in in_parallel(decode_chunk, chunks, num_workers):
                    for place, image in zip(places, decoded, strict=True):
                        key = keys[place]
                        if isinstance(image, ImageError):
                            failures[references[place]] = str(image)
                            if key and not image.passing:
                                reasons.write(json.dumps({"key": key.hex(), "reason": str(image)}) + "\n")
                        elif key is None:
                            failures[references[place]] = "its file was not there when the run began"
                        else:
                            pixels.write(image.tobytes())
                            waiting.append((key, slot))
                            slot += 1
                    bar.update(len(places))
                    if len(waiting) >= COMMIT:
                        commit()
            except BaseException:
                with suppress(OSError):  # a full disk has been reported already
                    commit()
                raise
            commit()
        return failures

    def _repair(self) -> np.ndarray:
        """Make the files ready to grow: without what a killed writer, a truncation or other settings left behind."""
        if self._generation() is None:
            self._begin_anew(uuid4().hex)
        records = self._records()
        for file in (self._pixels, self._index, self._failures):
            file.touch()
        if len(records) * RECORD.itemsize != self._index.stat().st_size:
            log.warning("%s: the image cache is not whole; what is missing is decoded again", self.folder)
            partial_index = self._index.with_suffix(".partial")
            partial_index.write_bytes(records.tobytes())
            partial_index.replace(self._index)
        text = self._failures.read_text()
        if text and not text.endswith("\n"):
            self._failures.write_text(text + "\n")
        return records

    def _begin_anew(self, generation: str) -> None:
        # Unlinked, not emptied: a run that reads them keeps them.
        for file in (self._settings, self._index, self._pixels, self._failures):
            file.unlink(missing_ok=True)
        self._settings.write_text(json.dumps({**self.settings, "generation": generation}))


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Iterator[tuple[Item, Result]]:
    """Map in order in threads, with a bounded number of results ahead: decoding leaves Python's lock to others."""
    with ThreadPoolExecutor(num_workers) as pool:
        pending: deque[tuple[Item, Any]] = deque()
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
