"""The fault table: whatever is in a file, its rows are dropped with a reason or kept as documented."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import load_splits
from PIL import Image

from repro import limits
from repro.data.batches import CaptionedImages, prepare_split
from repro.data.image_cache import load_images
from repro.data.images import decode_image, resize_of

GOOD = Image.new("RGB", (40, 30), (200, 100, 50))


def photo(name: str = "JPEG", image: Image.Image = GOOD, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # by a quarter
    return photo("PNG", exif=exif)


def see_through_palette() -> bytes:
    image = Image.new("P", (40, 30))
    image.putpalette([200, 100, 50, 0, 0, 0])
    return photo("PNG", image, transparency=0)


def animated() -> bytes:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ((200, 100, 50), (0, 0, 0))]
    return photo("GIF", frames[0], save_all=True, append_images=frames[1:])


def sixteen_bits() -> bytes:
    return photo("PNG", Image.fromarray(np.full((30, 40), 51_400, np.uint16)))


# What a file holds, why its rows are dropped under `exact` (None: kept), and under `current`.
FILES: dict[str, tuple[bytes, str | None, str | None]] = {
    "whole": (photo(), None, None),
    "truncated": (photo()[:-60], "(?i)truncated", "(?i)truncated"),
    "header alone": (photo("PNG")[:40], "not in a format that is read", "not in a format that is read"),
    "zero bytes": (b"", "not in a format that is read", "not in a format that is read"),
    "text": (b"<html>404 Not Found</html>", "not in a format that is read", "not in a format that is read"),
    "decompression bomb": (bomb(), "DecompressionBomb", "DecompressionBomb"),
    "16 bits": (sixteen_bits(), None, "mode I;16 is not RGB"),
    "CMYK": (photo(image=GOOD.convert("CMYK")), None, "mode CMYK is not RGB"),
    "gray": (photo(image=GOOD.convert("L")), None, "mode L is not RGB"),
    "see-through palette": (see_through_palette(), None, "mode P is not RGB"),
    "animated": (animated(), None, "mode P is not RGB"),
    "rotated by EXIF": (rotated(), None, None),
    "one pixel": (photo("PNG", GOOD.resize((1, 1))), None, "one pixel high"),
    "8000 to 1": (photo("PNG", GOOD.resize((8000, 1))), None, "one pixel high"),
}


class Folder:
    """A data set of one good image and one that is not."""

    def __init__(self, folder: Path, tokenizer, image_processor) -> None:
        self.folder, self.tokenizer, self.image_processor = folder, tokenizer, image_processor
        (folder / "good.jpg").write_bytes(photo())

    def read(self, *names: str, current: bool = False, cache: bool = True, between: Callable[[], None] = lambda: None):
        """Give the split of rows that name these files and the good one, and what was dropped, by name."""
        rows = [{"image_path": name, "caption": f"caption of {name!r}"} for name in ("good.jpg", *names)]
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = load_splits(
            splits=["train"], train_file=str(self.folder / "rows.jsonl"), rows_dir=self.folder / "cache"
        )["train"]
        between()
        places = {path: place for place, path in enumerate(source.dataset.unique("image_path"))}
        store = load_images(
            list(places),
            self.image_processor,
            convert_to_rgb=not current,
            cache_dir=self.folder / "cache" if cache else None,
            progress=False,
        )
        split, dropped = prepare_split(
            source.dataset,
            self.tokenizer,
            places,
            store,
            max_length=8,
            decoder_start_token_id=0,
            split="train",
            tokens_dir=self.folder / "cache",
        )
        return split, {rows[row["row"]]["image_path"]: row["reason"] for row in [*source.dropped, *dropped]}


@pytest.fixture
def folder(tmp_path: Path, tokenizer, image_processor) -> Folder:
    return Folder(tmp_path, tokenizer, image_processor)


def pixels(split: CaptionedImages, row: int) -> np.ndarray:
    return split.batch(np.array([row]))["pixels"][0]


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("name", FILES)
def test_every_file_is_kept_or_dropped_with_its_reason(folder: Folder, name: str, cache: bool) -> None:
    content, *reasons = FILES[name]
    (folder.folder / "it").write_bytes(content)
    for reason, current in zip(reasons, (False, True), strict=True):
        split, dropped = folder.read("it", current=current, cache=cache)
        assert len(split) == 1 + (reason is None)
        assert pixels(split, 0).std() > 0
        assert set(dropped) == (set() if reason is None else {"it"})
        if reason is not None:
            assert re.search(reason, dropped["it"]), dropped
        elif name not in ("gray", "CMYK", "16 bits"):  # all show the same colour
            np.testing.assert_allclose(pixels(split, 1)[0, 0], (200, 100, 50), atol=6)
        elif name == "16 bits":
            assert (pixels(split, 1) == 51_400 >> 8).all()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.jpg", "No such file or directory"),
        ("a folder", "is a folder"),
        ("loop", "symbolic links|Too many levels"),
        ("nul\0.jpg", "ValueError|null"),
        ("", "is a folder"),
        ("x" * 300, "too long"),
        ("lone \udce4.jpg", "not valid Unicode"),
        ("zip://absent.jpg::good.jpg", "BadZipFile"),
    ],
)
def test_every_name_without_an_image_is_dropped_with_its_reason(folder: Folder, name: str, reason: str) -> None:
    (folder.folder / "a folder").mkdir()
    (folder.folder / "loop").symlink_to(folder.folder / "loop")
    if name.startswith("zip://"):
        name = f"zip://absent.jpg::{folder.folder / 'good.jpg'}"
    split, dropped = folder.read(name)
    assert len(split) == 1
    assert list(dropped) == [name]
    assert re.search(reason, dropped[name]), dropped


def test_a_name_with_a_line_break_is_a_name(folder: Folder) -> None:
    name = "new\nline, 'quoted' \\ ü :: 🐈.jpg"
    (folder.folder / name).write_bytes(photo())
    split, dropped = folder.read(name)
    assert (len(split), dropped) == (2, {})
    assert split.read(np.array([1])) == [str(folder.folder / name)]


def test_a_file_that_may_not_be_read_is_dropped(folder: Folder, monkeypatch) -> None:
    secret = folder.folder / "secret.jpg"
    secret.write_bytes(photo())
    secret.chmod(0)
    if os.access(secret, os.R_OK):  # root may read everything
        real = limits.os.open

        def refuse(path: str, *how: int, **more: int) -> int:
            if path == str(secret):
                raise PermissionError(13, "Permission denied", path)
            return real(path, *how, **more)

        monkeypatch.setattr(limits.os, "open", refuse)
    split, dropped = folder.read("secret.jpg")
    assert len(split) == 1
    assert "Permission denied" in dropped["secret.jpg"]
    secret.chmod(0o600)
    monkeypatch.undo()
    assert len(folder.read("secret.jpg")[0]) == 2  # what the system refuses now it may allow tomorrow


def test_a_file_that_vanishes_between_scan_and_read_is_dropped(folder: Folder) -> None:
    brief = folder.folder / "brief.jpg"
    brief.write_bytes(photo())
    split, dropped = folder.read("brief.jpg", between=brief.unlink)
    assert len(split) == 1
    assert "No such file" in dropped["brief.jpg"]


def test_rotation_by_exif_is_ignored_as_in_the_reference(folder: Folder) -> None:
    half = Image.new("RGB", (40, 30))
    half.paste((255, 255, 255), (0, 0, 20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    images = []
    for name, options in (("plain.png", {}), ("turned.png", {"exif": exif})):
        (folder.folder / name).write_bytes(photo("PNG", half, **options))
        path = str(folder.folder / name)
        images.append(decode_image(path, resize_of(folder.image_processor), convert_to_rgb=False)[0])
    np.testing.assert_array_equal(*images)
    assert images[0][:, :10].min() > images[0][:, -10:].max()


def test_a_caption_of_three_thousand_words_is_kept(folder: Folder) -> None:
    long = " ".join(["word"] * 3_000)
    for suffix, text in (
        (".csv", f'image_path,caption\ngood.jpg,"{long}"\n'),
        (".jsonl", json.dumps({"image_path": "good.jpg", "caption": long})),
    ):
        path = folder.folder / f"long{suffix}"
        path.write_text(text)
        (caption,) = load_splits(splits=["train"], train_file=str(path))["train"].dataset["caption"]
        assert caption == long


def test_an_image_folder_with_a_loop_of_links_is_read(folder: Folder, tmp_path: Path) -> None:
    images = tmp_path / "set" / "train"
    images.mkdir(parents=True)
    (images / "good.jpg").write_bytes(photo())
    (images / "metadata.jsonl").write_text('{"file_name": "good.jpg", "text": "good"}\n')
    (images / "again").symlink_to(images)
    rows = load_splits(splits=["train"], dataset_name=str(tmp_path / "set"), cache_dir=str(tmp_path / "hf"))["train"]
    assert "good" in rows.dataset["caption"][:]
    assert len(rows.dataset) == 1
