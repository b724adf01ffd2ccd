"""The fault table: whatever is in a file, its rows are dropped with a reason or kept as documented."""

import io
import json
import re
import struct
import zlib

import numpy as np
import pytest
from conftest import load_splits
from PIL import Image

from repro import limits
from repro.data.batches import prepare_split
from repro.data.image_cache import load_images

GOOD = Image.new("RGB", (40, 30), (200, 100, 50))


def photo(name="JPEG", image=GOOD, **options):
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def bomb():
    """A PNG of a few hundred bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(b"\0" * 99), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in chunks.items())


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # by a quarter
    return photo("PNG", exif=exif)


def see_through_palette():
    image = Image.new("P", (40, 30))
    image.putpalette([200, 100, 50, 0, 0, 0])
    return photo("PNG", image, transparency=0)


def animated():
    frames = [Image.new("RGB", (40, 30), colour) for colour in ((200, 100, 50), (0, 0, 0))]
    return photo("GIF", frames[0], save_all=True, append_images=frames[1:])


NO_IMAGE = "damaged, or not in a format that is read"
# What a file holds, why its rows are dropped under `exact` (None: kept), and under `current`.
FILES: dict[str, tuple[bytes, str | None, str | None]] = {
    "whole": (photo(), None, None),
    "truncated": (photo()[:-60], "(?i)truncated", "(?i)truncated"),
    "header alone": (photo("PNG")[:40], NO_IMAGE, NO_IMAGE),
    "zero bytes": (b"", NO_IMAGE, NO_IMAGE),
    "text": (b"<html>404 Not Found</html>", NO_IMAGE, NO_IMAGE),
    "decompression bomb": (bomb(), "DecompressionBomb", "DecompressionBomb"),
    "16 bits": (photo("PNG", Image.fromarray(np.full((30, 40), 51_400, np.uint16))), None, "mode I;16 is not RGB"),
    "CMYK": (photo(image=GOOD.convert("CMYK")), None, "mode CMYK is not RGB"),
    "gray": (photo(image=GOOD.convert("L")), None, "mode L is not RGB"),
    "see-through palette": (see_through_palette(), None, "mode P is not RGB"),
    "animated": (animated(), None, "mode P is not RGB"),
    "rotated by EXIF": (rotated(), None, None),
    "one pixel": (photo("PNG", GOOD.resize((1, 1))), None, "one pixel high"),
    "8000 to 1": (photo("PNG", GOOD.resize((8000, 1))), None, "one pixel high"),
    "new\nline, 'quoted' \\ ü :: 🐈.jpg": (photo(), None, None),
}
# Names of no image, and why their rows are dropped.
NAMES = {
    "absent.jpg": "No such file or directory",
    "a folder": "is a folder",
    "loop": "symbolic links|Too many levels",
    "nul\0.jpg": "ValueError|null",
    "": "is a folder",
    "x" * 300: "too long",
    "lone \udce4.jpg": "not valid Unicode",
    "zip://absent.jpg::{}/good.jpg": "BadZipFile",
}


class Folder:
    """A data set of one good image and others."""

    def __init__(self, folder, tokenizer, image_processor):
        self.folder, self.tokenizer, self.image_processor = folder, tokenizer, image_processor
        (folder / "good.jpg").write_bytes(photo())

    def read(self, *names, current=False, cache=True):
        """Give the split of rows that name these files and the good one, and what was dropped, by name."""
        rows = [{"image_path": name, "caption": f"caption of {name!r}"} for name in ("good.jpg", *names)]
        file, kept = self.folder / "rows.jsonl", self.folder / "cache"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = load_splits(splits=["train"], train_file=str(file), rows_dir=kept)["train"]
        places = {path: place for place, path in enumerate(source.dataset.unique("image_path"))}
        how = {"convert_to_rgb": not current, "cache_dir": kept if cache else None, "progress": False}
        store = load_images(list(places), self.image_processor, **how)
        how = {"max_length": 8, "decoder_start_token_id": 0, "split": "train", "tokens_dir": kept}
        split, dropped = prepare_split(source.dataset, self.tokenizer, places, store, **how)
        return split, {rows[row["row"]]["image_path"]: row["reason"] for row in [*source.dropped, *dropped]}


@pytest.fixture
def folder(tmp_path, tokenizer, image_processor):
    return Folder(tmp_path, tokenizer, image_processor)


def assert_dropped(dropped, reasons):
    assert dropped.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert re.search(reason, dropped[name]), (name, dropped[name])


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("current", [True, False], ids=["current", "exact"])
def test_every_file_is_kept_or_dropped_with_its_reason(folder, current, cache):
    for name, (content, *_) in FILES.items():
        (folder.folder / name).write_bytes(content)
    split, dropped = folder.read(*FILES, current=current, cache=cache)
    reasons = {name: reasons[current] for name, (_, *reasons) in FILES.items()}
    assert_dropped(dropped, {name: reason for name, reason in reasons.items() if reason})
    kept = ["good.jpg", *(name for name, reason in reasons.items() if reason is None)]
    rows = np.arange(len(split))
    assert split.read(rows) == [str(folder.folder / name) for name in kept]
    for name, pixels in zip(kept, split.batch(rows)["pixels"], strict=True):
        if name == "16 bits":
            assert (pixels == 51_400 >> 8).all()
        elif name not in ("gray", "CMYK"):  # the others show the same colour
            np.testing.assert_allclose(pixels[0, 0], (200, 100, 50), atol=6, err_msg=name)


def test_every_name_without_an_image_is_dropped_with_its_reason(folder):
    (folder.folder / "a folder").mkdir()
    (folder.folder / "loop").symlink_to(folder.folder / "loop")
    reasons = {name.format(folder.folder): reason for name, reason in NAMES.items()}
    split, dropped = folder.read(*reasons)
    assert len(split) == 1
    assert_dropped(dropped, reasons)


def test_a_file_that_may_not_be_read_is_dropped(folder, monkeypatch):
    secret, real = folder.folder / "secret.jpg", limits.os.open
    secret.write_bytes(photo())

    def refuse(path, *how, **more):
        if path == str(secret):  # its mode would not keep root from it
            raise PermissionError(13, "Permission denied", path)
        return real(path, *how, **more)

    with monkeypatch.context() as patched:
        patched.setattr(limits.os, "open", refuse)
        split, dropped = folder.read("secret.jpg")
    assert len(split) == 1
    assert_dropped(dropped, {"secret.jpg": "Permission denied"})
    assert len(folder.read("secret.jpg")[0]) == 2  # what the system refuses now it may allow tomorrow


def test_a_caption_of_three_thousand_words_is_kept(folder):
    long = " ".join(["word"] * 3_000)
    rows = {"csv": f'image_path,caption\ngood.jpg,"{long}"\n', "jsonl": json.dumps({"image": "a", "caption": long})}
    for kind, text in rows.items():
        path = folder.folder / f"long.{kind}"
        path.write_text(text)
        assert load_splits(splits=["train"], train_file=str(path))["train"].dataset["caption"][:] == [long]


def test_an_image_folder_with_a_loop_of_links_is_read(folder, tmp_path):
    images = tmp_path / "set" / "train"
    images.mkdir(parents=True)
    (images / "good.jpg").write_bytes(photo())
    (images / "metadata.jsonl").write_text('{"file_name": "good.jpg", "text": "good"}\n')
    (images / "again").symlink_to(images)
    rows = load_splits(splits=["train"], dataset_name=str(tmp_path / "set"), cache_dir=str(tmp_path / "hf"))["train"]
    assert "good" in rows.dataset["caption"][:]
    assert len(rows.dataset) == 1
