"""One image: from its reference to the bytes that ViTImageProcessor has after its resize.

`pixel_table` holds what the processor's rescaling and normalization make of each of the 256 values, so that a table
look-up on the device gives its float32 pixels bit for bit.

An image is referred to by a path or a URL, or as `zip://MEMBER::ARCHIVE` or `arrow://ROW/COLUMN::FILE`.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from repro.errors import InputError

URL_SCHEMES = ("http://", "https://")
ZIP, ARROW = "zip://", "arrow://"
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B")
DOWNLOAD_SECONDS = 30

# Several threads decode, and what a `catch_warnings` in one of them does reaches the others. Pillow refuses images of
# more than twice the number of pixels from which on it warns; that is a reason to drop one.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(Exception):
    """An image cannot be used; the message is the reason.

    Attributes:
        passing: whether the reason may pass without a trace in the file, such as a missing permission.
    """

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


@dataclass(frozen=True)
class Resize:
    """An image processor's geometry: output size in pixels and PIL resampling filter."""

    height: int
    width: int
    resample: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.height, self.width, 3


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


def read_image(reference: str) -> Image.Image:
    """Read and decode an image in its own mode and size, ignoring EXIF orientation as the example does.

    Raises:
        ImageError: it cannot be read or decoded.
    """
    try:
        image = Image.open(io.BytesIO(_read_bytes(reference)))
        if image.format == "EPS":
            raise ImageError("PostScript, a program that would have to be run; save the image in another format")
        image.load()
    except UnidentifiedImageError as error:  # whose message has the address of a buffer
        raise ImageError("not in a format that Pillow knows") from error
    except OSError as error:
        # What the system or a server says has a number or a response; Pillow's own OSErrors are about the content.
        passing = error.errno is not None or hasattr(error, "response")
        raise ImageError(_reason(error), passing=passing) from error
    except (
        *(ValueError, TypeError, AttributeError, SyntaxError, LookupError, EOFError, OverflowError, MemoryError),
        *(struct.error, zipfile.BadZipFile, NotImplementedError, RuntimeError, Image.DecompressionBombError),
    ) as error:
        raise ImageError(_reason(error)) from error
    return image


def resize_image(image: Image.Image, resize: Resize, *, convert_to_rgb: bool) -> np.ndarray:
    """Make uint8[S,S,3] of a decoded image.

    Args:
        convert_to_rgb: convert other modes, of 16-bit grayscale the high byte; otherwise refuse what
            ViTImageProcessor refuses, which is all that does not decode to three channels, and images one pixel high,
            whose height it takes for a channel.

    Raises:
        ImageError: it is refused.
    """
    if convert_to_rgb:
        if image.mode in SIXTEEN_BITS:  # Pillow's own conversion makes everything above 255 white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB")
    elif len(image.getbands()) != 3:
        raise ImageError(f"mode {image.mode} is not RGB (--protocol exact converts it)")
    elif image.height == 1:
        raise ImageError("one pixel high (--protocol exact takes it)")
    if image.mode != "RGB":  # three other channels (YCbCr, LAB, HSV): the processor takes them as they are
        image = Image.fromarray(np.asarray(image), "RGB")
    size = (resize.width, resize.height)
    return np.asarray(image.resize(size, resample=Image.Resampling(resize.resample)))


def decode_image(reference: str, resize: Resize, *, convert_to_rgb: bool) -> np.ndarray:
    """`read_image`, then `resize_image`: uint8[S,S,3]."""
    return resize_image(read_image(reference), resize, convert_to_rgb=convert_to_rgb)


def image_key(reference: str, stamps: dict[str, tuple[int, ...]]) -> bytes | None:
    """Hash an image's absolute path, size and time (16 bytes); None if the system does not tell them.

    Args:
        stamps: what is known of archives, to which is added: they are asked once.
    """
    if reference.startswith(URL_SCHEMES):
        return _digest(reference, ())
    inner, _, archive = reference.partition("::") if reference.startswith((ZIP, ARROW)) else ("", "", "")
    file = os.path.abspath(archive or reference)
    try:
        stamp = stamps.get(file) or _stamp(file)
    except (OSError, ValueError):
        return None
    if archive:
        stamps[file] = stamp
    return _digest(f"{inner}::{file}", stamp)


def content_digest(content: bytes) -> bytes:
    """Hash an image's own bytes (16 bytes): rows that embed the same ones share their image."""
    return blake2b(content, digest_size=16).digest()


def _stamp(file: str) -> tuple[int, ...]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _digest(name: str, stamp: tuple[int, ...]) -> bytes:
    return blake2b(f"{name}\n{stamp}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _read_bytes(reference: str) -> bytes:
    if reference.startswith(URL_SCHEMES):
        import requests

        response = requests.get(reference, timeout=DOWNLOAD_SECONDS)
        response.raise_for_status()
        return response.content
    if reference.startswith(ZIP):
        member, _, archive = reference.removeprefix(ZIP).partition("::")
        return _archive(archive).read(member)
    if reference.startswith(ARROW):
        place, _, file = reference.removeprefix(ARROW).partition("::")
        row, _, column = place.partition("/")
        value = _arrow_column(file, column)[int(row)].as_py()
        return value["bytes"] if isinstance(value, dict) else value
    return Path(reference).read_bytes()


@lru_cache(maxsize=8)
def _archive(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@lru_cache(maxsize=64)
def _arrow_column(file: str, column: str) -> Any:
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(file)).read_all()[column]
