"""One image: from its reference to the bytes that ViTImageProcessor has after its resize.

`pixel_table` holds what the processor's rescaling and normalization make of each of the 256 values, so that a table
look-up on the device gives its float32 pixels bit for bit.

An image is referred to by a path, or as `zip://MEMBER::ARCHIVE`, `arrow://ROW/COLUMN::FILE` or
`tar://OFFSET/SIZE::ARCHIVE`.
"""

from __future__ import annotations

import os
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from hashlib import blake2b
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from repro import limits
from repro.errors import InputError
from repro.limits import Refused

ZIP, ARROW, TAR = EMBEDDED = "zip://", "arrow://", "tar://"
# Pillow's modes of gray: 16 bits, and those whose white no file names.
SIXTEEN_BITS, WITHOUT_WHITE = ("I;16", "I;16L", "I;16B"), ("I", "F")
TURNED = range(2, 9)  # orientations but for 1, upright
# Of all images that are being decoded.
BYTES, PIXELS = limits.Budget(limits.IMAGE_BYTES), limits.Budget(limits.IMAGE_PIXELS)
OPENING = threading.Lock()  # one at a time waits for `PIXELS`: some formats take memory when they are opened

# Several threads decode, and what a `catch_warnings` in one of them does reaches the others. Pillow refuses images of
# more than twice the number of pixels from which on it warns; that is a reason to drop one, and broken EXIF is none.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


class ImageError(Exception):
    """An image cannot be used; the message is the reason."""

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing  # whether the reason may pass without a trace in the file, such as a missing permission


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
    # Of height 8: one of 1, 3 or 4 would be taken for the channels.
    ramp = np.tile(np.arange(256, dtype=np.uint8)[:, None], (8, 1, 3))
    values = image_processor(images=ramp, do_resize=False, return_tensors="np").pixel_values
    return np.ascontiguousarray(values[0, :, 0, :].T, np.float32)


def resize_of(image_processor: Any) -> Resize:
    """Read the geometry of an image processor; an InputError if it does not resize to one fixed height and width."""
    # transformers 5 lists the sizes that are not given, too.
    size = {name: pixels for name, pixels in dict(image_processor.size).items() if pixels is not None}
    if not image_processor.do_resize or set(size) != {"height", "width"}:
        raise InputError(
            f"image processor with do_resize {image_processor.do_resize} and size {size}: all images"
            ' must become one size; set "do_resize": true and "size": {"height": …, "width": …} in'
            " preprocessor_config.json."
        )
    return Resize(size["height"], size["width"], int(image_processor.resample))


@contextmanager
def open_image(reference: str) -> Iterator[Image.Image]:
    """Give an image as it is stored, decoded in its own mode and size; gray of more than 8 bits in all of 16.

    While the block lasts, its memory counts among what threads may hold; what is raised there is about the image, too.

    Raises:
        ImageError: it cannot be read or decoded.
    """
    try:
        size, read = _source(reference)
        with BYTES.held(size), ExitStack() as held:
            content = read()
            with OPENING:
                image = Image.open(limits.Content(content), formats=formats())
                limits.check_image(image, content)
                held.enter_context(PIXELS.held(image.width * image.height))
            image.load()
            yield in_sixteen_bits(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:  # whose message has the address of a buffer
        raise ImageError(f"damaged, or not in a format that is read: {', '.join(formats())}") from error
    except Refused as error:
        raise ImageError(str(error)) from error
    except OSError as error:
        # What the system says has a number; Pillow's own OSErrors are about the content.
        passing = error.errno is not None
        raise ImageError(error.strerror or f"{type(error).__name__}: {error}", passing=passing) from error
    except Exception as error:  # Pillow's readers of rare formats raise whatever comes when the content is broken
        raise ImageError(f"{type(error).__name__}: {error}") from error


@cache
def formats() -> tuple[str, ...]:
    """Which of `FORMATS` this Pillow knows; it looks for no other behind them."""
    Image.init()
    return tuple(name for name in limits.FORMATS if name in Image.OPEN)


def view_image(reference: str, *, turn_upright: bool = True) -> Image.Image:
    """Give an image to look at, in RGB; raises as `open_image` does."""
    with open_image(reference) as image:
        return to_rgb(upright(image) if turn_upright else image)


def upright(image: Image.Image) -> Image.Image:
    """Turn a photograph as its camera was held; gives the same object where its EXIF does not say that it is turned."""
    try:
        return ImageOps.exif_transpose(image) if image.getexif().get(ExifTags.Base.Orientation) in TURNED else image
    except Exception:  # a block of EXIF that cannot be read says nothing about the picture
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of another mode, of 16-bit gray the high byte; an ImageError where its white is not known."""
    if image.mode in WITHOUT_WHITE:
        raise ImageError(f"mode {image.mode}, whose white is not known; save it with 8 or 16 unsigned bits")
    if image.mode in SIXTEEN_BITS:  # Pillow's own conversion makes everything above 255 white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def resize_image(image: Image.Image, resize: Resize, *, convert_to_rgb: bool) -> np.ndarray:
    """Make uint8[S,S,3] of a decoded image.

    Args:
        convert_to_rgb: convert other modes; otherwise refuse what ViTImageProcessor refuses, which is all that does
            not decode to three channels, and images one pixel high, whose height it takes for a channel.

    Raises:
        ImageError: it is refused.
    """
    if resize.width * image.height > limits.IMAGE_PIXELS:  # Pillow makes it narrow first, or wide, and then lower
        raise ImageError(f"{image.width} x {image.height} pixels are too many, made {resize.width} wide")
    if convert_to_rgb or image.mode in WITHOUT_WHITE:
        image = to_rgb(image)
    elif len(image.getbands()) != 3:
        raise ImageError(f"mode {image.mode} is not RGB (--protocol exact converts it)")
    elif image.height == 1:
        raise ImageError("one pixel high (--protocol exact takes it)")
    if image.mode != "RGB":  # three other channels (YCbCr, LAB, HSV): the processor takes them as they are
        image = Image.fromarray(np.asarray(image), "RGB")
    size = (resize.width, resize.height)
    return np.asarray(image.resize(size, resample=Image.Resampling(resize.resample)))


def decode_image(
    reference: str, resize: Resize, *, convert_to_rgb: bool, turn_upright: bool = False
) -> tuple[np.ndarray, bool]:
    """`open_image`, `upright` where asked for, then `resize_image`: uint8[S,S,3], and whether it is stored turned."""
    with open_image(reference) as image:
        held = upright(image)
        pixels = resize_image(held if turn_upright else image, resize, convert_to_rgb=convert_to_rgb)
        return pixels, held is not image


def image_key(reference: str) -> str | None:
    """Hash an image's absolute path, size and time (32 hexadecimal digits); None if the system does not tell them."""
    inner, _, archive = reference.partition("::") if reference.startswith(EMBEDDED) else ("", "", "")
    file = os.path.abspath(archive or reference)
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return None
    name, stamp = f"{inner}::{file}", (status.st_size, status.st_mtime_ns)
    return blake2b(f"{name}\n{stamp}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def in_sixteen_bits(image: Image.Image) -> Image.Image:
    """Give gray its white: Pillow scales a PGM's to 16 bits in a mode of 32, and leaves a TIFF's 12 bits in 16."""
    if image.mode == "I" and image.format == "PPM":
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode in SIXTEEN_BITS and image.format == "TIFF":
        (bits,) = image.tag_v2[ExifTags.Base.BitsPerSample]  # type: ignore[attr-defined]
        return Image.fromarray(np.asarray(image) << 16 - bits) if bits < 16 else image
    return image


def _source(reference: str) -> tuple[int, Callable[[], bytes]]:
    """An image's size in bytes, as far as it is known, and what reads them."""
    if reference.startswith(ZIP):
        member, _, archive = reference.removeprefix(ZIP).partition("::")
        info = find_member(open_zip(archive), member, limits.IMAGE_BYTES)
        return info.file_size, partial(open_zip(archive).read, info)
    if reference.startswith(ARROW):
        place, _, file = reference.removeprefix(ARROW).partition("::")
        row, _, column = place.partition("/")
        value = _arrow_column(file, column)[int(row)]
        value = value["bytes"] if hasattr(value, "keys") else value
        return limits.bounded(len(value.as_buffer()), limits.IMAGE_BYTES), value.as_py
    if reference.startswith(TAR):
        place, _, file = reference.removeprefix(TAR).partition("::")
        offset, _, size = place.partition("/")
        part = int(offset), limits.bounded(int(size), limits.IMAGE_BYTES)
        return part[1], partial(limits.read_file, file, limits.LIST_BYTES, part)
    return limits.size_of(reference, limits.IMAGE_BYTES), partial(limits.read_file, reference, limits.IMAGE_BYTES)


@lru_cache(maxsize=8)
def open_zip(path: str) -> zipfile.ZipFile:
    """Open a zip file, for several threads."""
    return zipfile.ZipFile(limits.BoundedReads(limits.open_file(path, limits.LIST_BYTES)))


def find_member(archive: zipfile.ZipFile, name: str, largest: int) -> zipfile.ZipInfo:
    """Find what a zip file holds under a name, if it can be read piece by piece."""
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Refused("is compressed by another method than deflate, whose memory has no bound")
    limits.bounded(info.file_size, largest)
    return info


@lru_cache(maxsize=64)
def _arrow_column(file: str, column: str) -> Any:
    import pyarrow

    limits.size_of(file, limits.LIST_BYTES)
    return pyarrow.ipc.open_stream(pyarrow.memory_map(file)).read_all()[column]
