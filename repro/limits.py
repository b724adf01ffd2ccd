"""What is read of files that others made: regular files alone, and of each no more than any real one holds.

Every limit that input meets is here. What exceeds one drops its row (images, captions) or is refused by name.
"""

from __future__ import annotations

import io
import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, TextIO
from urllib.parse import unquote

from repro.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

# Of images. `FORMATS` are Pillow's names of the only formats that are opened: none starts a program, or takes memory
# beyond its pixels.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "TGA")
IMAGE_SUFFIXES = (  # of the files that are taken from a folder; a file that is named may have any
    *(".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tga", ".tif", ".tiff", ".webp"),
)
URL_SCHEMES = ("http://", "https://")
IMAGE_BYTES = 96 << 20  # an image's file, or a zip file's list of members (train2017.zip's has 12 MB)
IMAGE_PIXELS = 110_000_000  # also half-way through a resize; phones make 108 million; WebP takes 16 bytes for each
IMAGE_SIDE = 1 << 18
SCANNED_PIXELS = 1 << 32  # a JPEG's pixels times its scans, 1.5 ns each; a progressive photograph has ten scans
IMAGE_READS = 1 << 20  # pieces of an image; real ones are smallest in a GIF, with 255 bytes

# Of lists of rows, which are streamed.
LIST_BYTES = 1 << 36
RECORD_CHARACTERS = 1 << 24  # one line, row or object; COCO's largest annotation has some 10,000
CAPTION_CHARACTERS = 1 << 14
JSON_DEPTH = 100
NAMED_BYTES = 1 << 30  # the images that a COCO file names, as they are held
DROPPED_CHARACTERS = 1 << 28  # the rows that are left out, as they are listed
LISTED_BYTES = 1 << 25  # the names on standard input

# Of models and runs. `SETTINGS` is how the names begin of what is read of a model's folder besides its weights.
SETTINGS = (
    *("config", "generation_config", "preprocessor_config", "processor_config", "tokenizer", "vocab", "merges"),
    *("special_tokens_map", "added_tokens", "chat_template", "sentencepiece", "spiece", "spm"),
)
SETTINGS_BYTES = 48 << 20  # Gemma's tokenizer has 33 MB; Python's objects take up to 30 times as much as their JSON
WEIGHTS_BYTES = 768 << 20  # beyond the configuration's float32; GPT-2 XL's buffers and second embedding have 520 MB
LAYERS = 1000
RECORDED_BYTES = 1 << 26  # each file of a run that a report reads

# Of TIFF's tags and JPEG's markers. `JPEG_MARKER` finds those that end an image or stand before a length.
TILE_WIDTH, TILE_LENGTH = 322, 323
START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")


def local_path(text: str, flag: str = "") -> str:
    """Give a path without `~/` or `file://`; an InputError refuses the address of what is elsewhere."""
    scheme, separator, rest = text.partition("://")
    if separator and scheme.lower() == "file":
        return unquote(rest.removeprefix("localhost"))
    if separator and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        raise InputError(
            f"{flag}{text}: is an address, and only files of this machine are read and written; mount or copy what is"
            " there, and name its path (of a model or data set on the Hub, its id)."
        )
    return os.path.expanduser(text) if text.startswith("~/") else text


class Refused(OSError):
    """A file is not read; the message says why."""


def bounded(size: int, largest: int) -> int:
    if size > largest:
        raise Refused(f"has {size:,} bytes; at most {largest:,} are read")
    return size


def size_of(path: str | Path, largest: int) -> int:
    """Tell a regular file's size in bytes.

    Raises:
        Refused: it is something else, such as a pipe or a device, on which one may wait for ever, or larger.
        OSError: it cannot be found.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Refused("is a folder" if stat.S_ISDIR(status.st_mode) else "is not a regular file")
    return bounded(status.st_size, largest)


def open_file(path: str | Path, largest: int) -> io.BufferedReader | io.BytesIO:
    """Open a regular file of at most `largest` bytes; raises as `size_of` does."""
    if not size_of(path, largest):  # what the kernel makes up, such as its log, has no size and may have no end
        return io.BytesIO()
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))


def read_file(path: str | Path, largest: int, part: tuple[int, int] = (0, -1)) -> bytes:
    """Read what `open_file` opens, or a part of it: (offset, size) in bytes."""
    with open_file(path, largest) as opened:
        opened.seek(part[0])
        return opened.read(part[1])


class Lines(Iterator[str]):
    """A file's lines; a Refused ends them where those of one record are too long."""

    def __init__(self, opened: TextIO) -> None:
        self._opened, self._number = opened, 0
        self.taken = 0  # characters since the last record, at whose end the reader sets it to 0

    def __next__(self) -> str:
        line = self._opened.readline(RECORD_CHARACTERS - self.taken + 1)
        self._number, self.taken = self._number + 1, self.taken + len(line)
        if self.taken > RECORD_CHARACTERS:
            raise Refused(f"line {self._number} ends a row of more than {RECORD_CHARACTERS:,} characters")
        if not line:
            raise StopIteration
        return line


class BoundedReads(io.BufferedReader):
    """A zip file, of which at most `IMAGE_BYTES` are read at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        # To the end zipfile reads nothing but the archive's comment, 64 kB at most.
        return super().read(bounded(-1 if size is None else size, IMAGE_BYTES))


class CheckedJson(io.IOBase):
    """JSON on its way to a streaming parser, which takes memory with the square of the depth, and with each object."""

    _IGNORED = bytes(set(range(256)) - set(b'"[]{},'))

    def __init__(self, opened: IO[bytes], list_depth: int = 2) -> None:
        self._opened = opened
        self._list_depth = list_depth  # brackets around the objects of the list that is read
        self._rest, self._in_string, self._depth, self._record = b"", 0, 0, 0

    def close(self) -> None:
        self._opened.close()

    def read(self, size: int = -1) -> bytes:
        import numpy as np  # which takes longer than the help of a command may

        chunk = self._opened.read(size)
        text = self._rest + chunk
        if b"\\" in text:
            text = text.replace(rb"\\", b"").replace(rb"\"", b"")
        self._rest = text[-1:] if text.endswith(b"\\") else b""  # it belongs to what comes next
        signs = np.frombuffer(text.translate(None, self._IGNORED), np.uint8)
        self._record += len(chunk)
        if len(signs):
            quotes = self._in_string + np.cumsum(signs == ord('"'), dtype=np.int32)
            outside = (quotes & 1) == 0
            braces = signs | 32  # of brackets, too
            steps = (braces == ord("{")).astype(np.int8) - (braces == ord("}"))
            depths = self._depth + np.cumsum(steps * outside, dtype=np.int32)
            self._in_string, self._depth = int(quotes[-1] & 1), int(depths[-1])
            if depths.max() > JSON_DEPTH:
                raise Refused(f"is nested more than {JSON_DEPTH} deep")
            if np.any(outside & (depths <= self._list_depth)):
                self._record = 0
        if self._record > RECORD_CHARACTERS:
            raise Refused(f"has an object of more than {RECORD_CHARACTERS:,} bytes")
        return chunk


def check_settings(folder: Path) -> None:
    """Refuse a model's folder by an InputError if a file of it is not regular, too large, or nested too deep."""
    files = [file for file in folder.glob("*") if file.name.startswith(SETTINGS)]
    for file in [*files, *folder.glob("additional_chat_templates/*")]:
        if file.is_dir():
            continue
        try:
            with CheckedJson(open_file(file, SETTINGS_BYTES), JSON_DEPTH) as opened:
                while file.suffix == ".json" and opened.read(1 << 16):
                    pass
        except OSError as error:
            raise InputError(f"{file}: {error.strerror or error}; get the model again.") from error


class Content(io.BytesIO):
    """An image's bytes, for Pillow's readers, which are Python where there are pieces, and keep them."""

    _reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > IMAGE_READS:
            raise Refused(f"has more than {IMAGE_READS:,} pieces")
        return super().read(size)


class Budget:
    """What threads may hold at once; one of them alone may hold anything."""

    def __init__(self, most: int) -> None:
        self._most, self._held, self._changed = most, 0, threading.Condition()

    @contextmanager
    def held(self, amount: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + amount <= self._most)
            self._held += amount
        try:
            yield
        finally:
            with self._changed:
                self._held -= amount
                self._changed.notify_all()


def check_image(image: Image.Image, content: bytes) -> None:
    """Refuse an image that would take too much memory or time, before it is decoded."""
    width, height = image.size
    if width * height > IMAGE_PIXELS or max(width, height) > IMAGE_SIDE:
        raise Refused(
            f"has {width} x {height} pixels; at most {IMAGE_PIXELS:,}, and {IMAGE_SIDE:,} on a side, are decoded"
        )
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        if tags.get(TILE_WIDTH, 1) * tags.get(TILE_LENGTH, 1) > IMAGE_PIXELS:
            raise Refused(f"has tiles of more than {IMAGE_PIXELS:,} pixels")
    if image.format in ("JPEG", "MPO") and (scans := count_scans(content)) * width * height > SCANNED_PIXELS:
        raise Refused(f"has {scans} scans of {width} x {height} pixels; {SCANNED_PIXELS:,} in all are decoded")


def count_scans(content: bytes) -> int:
    """Count a JPEG's scans, without those of its thumbnails and of what follows it."""
    scans, place = 0, 2
    while (found := JPEG_MARKER.search(content, place)) and found[0] != END_OF_IMAGE:
        scans += found[0] == START_OF_SCAN
        place = found.end() + int.from_bytes(content[found.end() : found.end() + 2])
    return scans
