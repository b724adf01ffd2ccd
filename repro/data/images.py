"""Each distinct image, decoded and resized once, as bytes in one memory-mapped array.

The bytes are those that ViTImageProcessor has after its resize; `pixel_table` holds what its rescaling and
normalization make of each of the 256 values, so that a table look-up on the device gives its float32 pixels bit for
bit.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from repro.errors import InputError

CHUNK = 64
"""Images per task of a worker process."""
ZIP_SCHEME = "zip://"


class ImageError(Exception):
    """An image cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Resize:
    """An image processor's geometry: output size in pixels and PIL resampling filter."""

    height: int
    width: int
    resample: int


@dataclass(frozen=True)
class ImageStore:
    """Decoded images.

    Attributes:
        pixels: uint8[M,S,S,3]
        index: image path to its place in `pixels`.
        failures: image path to the reason why it is not there.
    """

    pixels: np.ndarray
    index: dict[str, int]
    failures: dict[str, str]


def pixel_table(image_processor: Any) -> np.ndarray:
    """Ask the processor what it makes of each byte value: float32[256,3], one column a channel."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    ramp = np.repeat(ramp, 8, axis=0)  # a height of 1, 3 or 4 would be taken for the channels
    values = image_processor(images=ramp, do_resize=False, return_tensors="np").pixel_values
    return np.ascontiguousarray(values[0, :, 0, :].T, np.float32)


def resize_of(image_processor: Any) -> Resize:
    """Read the geometry of an image processor.

    Raises:
        InputError: it does not resize to one fixed height and width.
    """
    # transformers 5 lists the sizes that are not given, too.
    size = {name: pixels for name, pixels in dict(image_processor.size).items() if pixels is not None}
    if not image_processor.do_resize or set(size) != {"height", "width"}:
        raise InputError(
            f"image processor with do_resize {image_processor.do_resize} and size {size}: all images"
            ' must become one size; set "do_resize": true and "size": {"height": …, "width": …} in'
            " preprocessor_config.json."
        )
    return Resize(size["height"], size["width"], int(image_processor.resample))


def decode_image(path: str, resize: Resize, *, convert_to_rgb: bool) -> np.ndarray:
    """Decode an image and resize it, ignoring EXIF orientation as the example does.

    Args:
        path: of a file, or `zip://member::archive`.
        convert_to_rgb: convert other modes; otherwise refuse what ViTImageProcessor refuses, which is all that does
        not decode
            to three channels, and images one pixel high, whose height it takes for a channel.

    Returns:
        uint8[S,S,3]

    Raises:
        ImageError: it cannot be read, or is refused.
    """
    try:
        with warnings.catch_warnings():
            # A decompression bomb warns before it raises; both are reasons to drop the image.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(_open(path)) as opened:
                opened.load()
                image: Image.Image = opened.convert("RGB") if convert_to_rgb else opened.copy()
    except (
        OSError,
        ValueError,
        SyntaxError,
        KeyError,
        EOFError,
        zipfile.BadZipFile,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise ImageError(f"{type(error).__name__}: {error}") from error
    if len(image.getbands()) != 3:
        raise ImageError(f"mode {image.mode} is not RGB (--protocol exact converts it)")
    if image.height == 1 and not convert_to_rgb:
        raise ImageError("one pixel high (--protocol exact takes it)")
    size = (resize.width, resize.height)
    if image.mode != "RGB":  # three other channels (YCbCr, LAB, HSV): the processor takes them as they are
        image = Image.fromarray(np.asarray(image), "RGB")
    return np.asarray(image.resize(size, resample=Image.Resampling(resize.resample)))


def load_images(
    paths: Iterable[str],
    image_processor: Any,
    *,
    convert_to_rgb: bool,
    cache_dir: Path | None,
    num_workers: int | None,
    overwrite_cache: bool = False,
    progress: bool = True,
) -> ImageStore:
    """Decode each distinct path once, or take the result of an earlier run.

    Args:
        cache_dir: where the array is kept, under a name made of the paths, sizes and times of the files and the
        processor's
            geometry; None to keep it in memory. It appears there whole or not at all.
        num_workers: processes that decode; None or 1 to decode in this one.

    Raises:
        InputError: the cache cannot be written.
    """
    distinct = list(dict.fromkeys(paths))
    resize = resize_of(image_processor)
    decode = partial(_decode_chunk, resize=resize, convert_to_rgb=convert_to_rgb)
    chunks = [distinct[start : start + CHUNK] for start in range(0, len(distinct), CHUNK)]
    shape = (len(distinct), resize.height, resize.width, 3)
    with tqdm(total=len(distinct), desc="images", unit="image", disable=None if progress else True, leave=False) as bar:
        if cache_dir is None:
            pixels = np.zeros(shape, np.uint8)
            reasons = _fill(pixels, _map(decode, chunks, num_workers), bar)
            return _store(pixels, distinct, reasons)
        target = cache_dir / f"{_cache_key(distinct, resize, convert_to_rgb)}.npy"
        notes = target.with_suffix(".json")
        if overwrite_cache or not (target.exists() and notes.exists()):
            try:
                _build(target, notes, shape, _map(decode, chunks, num_workers), bar)
            except OSError as error:
                raise InputError(
                    f"{cache_dir}: cannot keep {np.prod(shape) / 1e9:.2f} GB of decoded images there"
                    f" ({error}); make room, or name another folder with --cache_dir."
                ) from error
    return _store(np.load(target, mmap_mode="r"), distinct, json.loads(notes.read_text()))


def _build(target: Path, notes: Path, shape: tuple[int, ...], results: Iterator[list[Any]], bar: Any) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial_target = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial_notes = notes.with_name(f"{notes.name}.{os.getpid()}.partial")
    try:
        if shape[0]:
            # Allocated up front: a full disk is then an error here, not a bus error on a later write.
            with partial_target.open("wb") as file:
                np.lib.format.write_array_header_2_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                os.posix_fallocate(file.fileno(), 0, file.tell() + int(np.prod(shape)))
            pixels = np.load(partial_target, mmap_mode="r+")
            reasons = _fill(pixels, results, bar)
            pixels.flush()
        else:
            np.save(partial_target.open("wb"), np.zeros(shape, np.uint8))
            reasons = {}
        partial_notes.write_text(json.dumps(reasons))
        partial_notes.replace(notes)
        partial_target.replace(target)
    finally:
        partial_target.unlink(missing_ok=True)
        partial_notes.unlink(missing_ok=True)


def _fill(pixels: np.ndarray, results: Iterator[list[Any]], bar: Any) -> dict[str, str]:
    """Write decoded images to their places; returns the reasons of the others by path."""
    reasons, place = {}, 0
    for chunk in results:
        for path, result in chunk:
            if isinstance(result, str):
                reasons[path] = result
            else:
                pixels[place] = result
            place += 1
        bar.update(len(chunk))
    return reasons


def _store(pixels: np.ndarray, paths: Sequence[str], reasons: dict[str, str]) -> ImageStore:
    index = {path: place for place, path in enumerate(paths) if path not in reasons}
    return ImageStore(pixels=pixels, index=index, failures=reasons)


def _map(decode: Any, chunks: list[list[str]], num_workers: int | None) -> Iterator[list[Any]]:
    if not num_workers or num_workers == 1 or len(chunks) < 2:
        yield from map(decode, chunks)
        return
    # Spawned, because JAX's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    workers = min(num_workers, len(chunks), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(decode, chunks)


def _decode_chunk(paths: list[str], *, resize: Resize, convert_to_rgb: bool) -> list[tuple[str, np.ndarray | str]]:
    results: list[tuple[str, np.ndarray | str]] = []
    for path in paths:
        try:
            results.append((path, decode_image(path, resize, convert_to_rgb=convert_to_rgb)))
        except ImageError as error:
            results.append((path, str(error)))
    return results


def _cache_key(paths: Sequence[str], resize: Resize, convert_to_rgb: bool) -> str:
    digest = hashlib.sha256(repr((resize, convert_to_rgb)).encode())
    for path in paths:
        file = path.partition("::")[2] or path
        try:
            status = os.stat(file)
            stamp: tuple[int, ...] = (status.st_size, status.st_mtime_ns)
        except (OSError, ValueError):
            stamp = ()
        digest.update(repr((path, stamp)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _open(path: str) -> Any:
    if not path.startswith(ZIP_SCHEME):
        return path
    member, _, archive = path.removeprefix(ZIP_SCHEME).partition("::")
    return io.BytesIO(_archive(archive).read(member))


@lru_cache(maxsize=8)
def _archive(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)
