"""No input waits for ever, takes gigabytes or minutes, or starts a program: it is dropped, or refused by name."""

from __future__ import annotations

import bz2
import io
import json
import os
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import load_splits
from PIL import Image

from repro import limits
from repro.__main__ import main
from repro.data import images
from repro.data.files import read_file
from repro.data.images import ImageError, Resize, decode_image, open_image
from repro.errors import InputError
from repro.limits import Budget, CheckedJson, Refused
from repro.models.pretrained import load_model
from repro.reports.runs import read_run_folder

SMALL = Resize(32, 32, 3)
MEMORY, SECONDS = 2 << 30, 20
"""What an input may cost, at most."""


def decode(reference: str | Path, resize: Resize = SMALL) -> np.ndarray:
    return decode_image(str(reference), resize, convert_to_rgb=True)[0]


def sparse(path: Path, size: int = 3 << 30) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def encoded(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def jpeg(width: int, height: int, scans: int, *, kind: int = 0xC2) -> bytes:
    """A JPEG of any size in a few bytes: tables of one code, and scans of one component without data."""
    segments = [b"\xff\xd8", b"\xff\xdb\x00\x43\x00" + b"\x01" * 64]
    frame = struct.pack(">BHHB", 8, height, width, 3) + b"".join(bytes([c, 0x11, 0]) for c in (1, 2, 3))
    segments.append(bytes([0xFF, kind, 0, len(frame) + 2]) + frame)
    segments += [b"\xff\xc4\x00\x14" + bytes([table]) + b"\x01" + bytes(15) + b"\x00" for table in (0x00, 0x10)]
    last, points = (0x3F, 1) if kind == 0xC2 else (0x3F, 0)
    segments.append(b"\xff\xda\x00\x0c\x03\x01\x00\x02\x00\x03\x00\x00\x00\x01" if points else b"")
    segments += [b"\xff\xda\x00\x08\x01" + bytes([1 + n % 3, 0, points, last, 0]) for n in range(scans - points)]
    return b"".join([*segments, b"\xff\xd9"])


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(-(-width // 8) + 1) * height) if width * height < 1 << 31 else b""
    pixels = [(b"IHDR", header), *chunks, (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in pixels)


def exif(tags: int, length: int) -> bytes:
    """EXIF in which every tag points to the same text."""
    start = 8 + 2 + 12 * tags + 4
    entries = b"".join(struct.pack("<HHII", 0x9000 + tag, 7, length, start) for tag in range(tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", tags) + entries + bytes(4) + bytes(length)


def archive(content: bytes, method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as opened:
        opened.writestr("a.png", content)
    return buffer.getvalue()


def tiled(side: int) -> bytes:
    """A TIFF of 16 x 16 pixels in one tile of any side."""
    rows = zlib.compress(bytes(1 << 20))
    values = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side), (324, 126)]
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*values, (325, len(rows))])
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 10) + tags + bytes(4) + rows


def iptc(content: bytes) -> bytes:
    """An image inside of IPTC, as Pillow's reader of IPTC hands on to any reader."""

    def field(record: int, number: int, data: bytes) -> bytes:
        return bytes([0x1C, record, number]) + struct.pack(">H", len(data)) + data

    head = [(3, 60, b"\x01\x00"), (3, 65, b"\0"), (3, 20, b"\0\x08"), (3, 30, b"\0\x08"), (3, 120, b"\x01")]
    return b"".join(field(*part) for part in head) + field(8, 10, content)


PLAIN = encoded(Image.new("RGB", (8, 8)), "JPEG")
EPS = encoded(Image.new("RGB", (8, 8)), "EPS")
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "scans.jpg": (lambda: jpeg(10_000, 10_000, 500), "500 scans"),
    "sequential.jpg": (lambda: jpeg(10_000, 10_000, 500, kind=0xC0), "500 scans"),
    "segments.jpg": (lambda: PLAIN[:2] + b"\xff\xfe\x00\x02" * 600_000 + PLAIN[2:], "pieces"),
    "canvas.png": (lambda: png(60_000, 60_000), "pixels"),
    "tall.png": (lambda: png(1, 50_000_000), "pixels"),
    "wide.png": (lambda: png(50_000_000, 1), "pixels"),
    "chunks.png": (lambda: png(8, 8, *[(b"prVt", b"")] * 600_000), "pieces"),
    "text.png": (lambda: png(8, 8, *[(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20)))] * 100), "memory"),
    "tags.tif": (lambda: exif(3_000, 4_000_000), "not in a format"),
    "tile.tif": (lambda: tiled(60_000), "tiles"),
    "plain.ppm": (lambda: b"P3 7000 7000 255 " + b"1 " * 4_000_000, "not enough image data"),
    "comments.gif": (lambda: b"GIF89a\x08\0\x08\0\0\0\0" + b"!\xfe\0" * 600_000, "pieces"),
    "photo.jpg": (lambda: EPS, "not in a format that is read"),
    "iptc.jpg": (lambda: iptc(EPS), "not in a format that is read"),
    "bzip2.zip": (lambda: archive(bytes(1 << 20), zipfile.ZIP_BZIP2), "deflate"),
    "bomb.zip": (lambda: archive(bytes(200 << 20), zipfile.ZIP_DEFLATED), "bytes"),
}
MEASURED = """
import json, sys, time
from pathlib import Path
from repro.data.images import ImageError, Resize, decode_image
def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before, found = peak(), []
for reference in sys.argv[1:]:
    begin, reason = time.process_time(), None
    try:
        decode_image(reference, Resize(32, 32, 3), convert_to_rgb=True)
    except ImageError as error:
        reason = str(error)
    found.append((reason, time.process_time() - begin, peak() - before))
print(json.dumps(found))
"""


def measured(*references: str) -> list[tuple[str, float, int]]:
    """Decode images in a process of its own: reasons, processor seconds, kB more than before at the peak."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *references], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_no_image_takes_gigabytes_or_minutes_and_each_says_why_it_is_dropped(tmp_path: Path) -> None:
    references = []
    for name, (make, _) in HOSTILE.items():
        (tmp_path / name).write_bytes(make())
        references.append(f"zip://a.png::{tmp_path / name}" if name.endswith(".zip") else str(tmp_path / name))
    for name, (reason, seconds, memory) in zip(HOSTILE, measured(*references), strict=True):
        assert HOSTILE[name][1] in str(reason), name
        assert seconds < SECONDS, name
        assert memory * 1024 < MEMORY, name


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path / "link.png", "/dev/zero", "/dev/kmsg", "/dev/tty"):
        if os.path.exists(path):
            with pytest.raises(ImageError, match="not a regular file"):
                decode(path)
    with pytest.raises(ImageError, match=r"3,221,225,472 bytes; at most 100,663,296"):
        decode(sparse(tmp_path / "sparse.png"))
    for reference in (f"{kind}::{tmp_path / 'pipe.png'}" for kind in ("zip://a", "arrow://0/a")):
        with pytest.raises(ImageError, match="not a regular file"):
            decode(reference)


def test_a_file_without_a_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As the kernel's log is, at whose end one waits for ever.
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("opened"))
    assert os.stat("/proc/version").st_size == 0
    assert limits.open_file("/proc/version", 100).read() == b""


def test_nothing_else_is_started_or_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    for content in (EPS, iptc(EPS), PLAIN[:2] + b"\xff\xed\x00\x20Photoshop 3.0\x008BIM\x04\x04\0\0" + bytes(8)):
        (tmp_path / "photo.jpg").write_bytes(content)
        with pytest.raises(ImageError):
            decode(tmp_path / "photo.jpg")
    assert set(images.formats()) <= set(limits.FORMATS)
    readme = (Path(__file__).parents[1] / "repro" / "data" / "README.md").read_text()
    assert ", ".join(limits.FORMATS[:-1]) + " and " + limits.FORMATS[-1] in readme


def test_memory_that_the_system_does_not_give_drops_the_image(tmp_path: Path, monkeypatch) -> None:
    def resize(self: Image.Image, *_: object, **__: object) -> None:
        raise MemoryError

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "resize", resize)
    with pytest.raises(ImageError, match="MemoryError"):
        decode(tmp_path / "a.png")


def test_a_resize_is_refused_by_what_lies_half_way(tmp_path: Path) -> None:
    (tmp_path / "tall.png").write_bytes(png(1, limits.IMAGE_SIDE))
    assert decode(tmp_path / "tall.png").shape == (32, 32, 3)
    with pytest.raises(ImageError, match="made 1000 wide"):
        decode(tmp_path / "tall.png", Resize(1000, 1000, 3))


def test_a_photograph_of_many_scans_is_read(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    thumbnails = PLAIN * 2000  # and what a telephone appends
    (tmp_path / "a.jpg").write_bytes(encoded(Image.fromarray(values), "JPEG", progressive=True) + thumbnails)
    with open_image(str(tmp_path / "a.jpg")) as image:
        assert image.size == (800, 600)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 100}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpegs_scans_are_counted_but_for_those_of_its_thumbnails(mode: str, options: dict[str, object]) -> None:
    thumbnail = b"Exif\0\0" + exif(0, 0) + PLAIN
    values = np.random.default_rng(0).integers(0, 256, (60, 80, 4), dtype=np.uint8)
    content = encoded(Image.fromarray(values).convert(mode), "JPEG", exif=thumbnail, **options)
    assert content.count(PLAIN) == 1
    scans = limits.count_scans(content + PLAIN)
    assert scans == 1 if "progressive" not in options else scans > 1
    assert limits.count_scans(jpeg(8, 8, 300)) == limits.count_scans(jpeg(8, 8, 300, kind=0xC0)) == 300
    assert limits.count_scans(content[:100]) == 0


def test_a_budget_is_kept_and_one_thread_may_have_all_of_it() -> None:
    from concurrent.futures import ThreadPoolExecutor

    budget, held, most = Budget(10), [0], [0]

    def work(amount: int) -> None:
        with budget.held(amount):
            held[0] += amount
            most[0] = max(most[0], held[0] if amount <= 10 else 0)
            assert held[0] <= max(10, amount)
            held[0] -= amount

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [4, 3, 30, 1, 10] * 200))
    assert 0 < most[0] <= 10


def test_no_more_than_one_image_is_open_beyond_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    Image.new("RGB", (100, 100)).save(tmp_path / "a.webp")
    real, now, most = Image.open, [0], [0]

    def opened(*arguments: Any, **options: Any) -> Image.Image:
        now[0] += 1
        most[0] = max(most[0], now[0])
        return real(*arguments, **options)

    def work(_: int) -> None:
        with images.open_image(str(tmp_path / "a.webp")):
            time.sleep(0.01)
            now[0] -= 1

    monkeypatch.setattr(Image, "open", opened)
    monkeypatch.setattr(images, "PIXELS", Budget(10_000))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(20)))
    assert most[0] <= 2


DEEP = "[" * 100_000 + "]" * 100_000
LISTS = {
    "deep.json": (f'{{"images": [], "annotations": [{{"caption": {DEEP}}}]}}', "nested more than 100 deep"),
    "deeper.json": (DEEP, "nested more than 100 deep"),
    "deep.jsonl": (DEEP + "\n", "line 1"),
    "long.jsonl": ('{"image": "a.png", "caption": "' + "a" * 20_000_000 + '"}\n', "line 1 ends a row of more than"),
    "long.json": ('[{"image": "a.png", "caption": "' + "a" * 20_000_000 + '"}]', "an object of more than 16,777,216"),
    "name.json": ('{"' + "a" * 20_000_000 + '": 1}', "an object of more than"),
    "long.csv": ("image,caption\na.png," + "a" * 20_000_000 + "\n", "line 2 ends a row of more than"),
    "wide.csv": ("image,caption\n" + '"\n",' * 5_000_000 + "\n", "ends a row of more than"),
    "zeros.tsv": ("image\tcaption\n" + "\0" * 20_000_000, "line 2 ends a row of more than"),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_beyond_the_limits_is_refused_at_once(name: str, tmp_path: Path) -> None:
    text, words = LISTS[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        load_splits(splits=["train"], train_file=str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.tar"])
def test_a_list_that_is_no_regular_file_is_refused_at_once(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="not a regular file"):
        load_splits(splits=["train"], train_file=str(tmp_path / name))


def test_what_is_in_strings_neither_nests_nor_ends_them(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "caption": caption} for caption in ('[[{"\\', "]" * 300, "\\\\\\", '\\"[' * 200, "ü{")]
    for block in (1, 2, 7, 64, 1 << 16):
        for text in (json.dumps(rows), json.dumps({"annotations": rows}, indent=1)):
            checked = CheckedJson(io.BytesIO(text.encode()))
            assert b"".join(checked.read(block) for _ in range(len(text) + 99)) == text.encode()
            assert (checked._depth, checked._in_string) == (0, 0)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert list(read_file(str(tmp_path / "a.json"))) == rows
    nested = CheckedJson(io.BytesIO(b"[" * 101))
    with pytest.raises(Refused, match="deep"):
        nested.read(1 << 16)


def test_captions_beyond_the_limit_drop_their_rows(tmp_path: Path) -> None:
    captions = ["a caption", "a" * 20_000, "b" * limits.CAPTION_CHARACTERS]
    lines = [json.dumps({"image": "a.png", "caption": caption}) for caption in captions]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    rows = load_splits(splits=["train"], train_file=str(tmp_path / "a.jsonl"))["train"]
    assert rows.dataset["caption"][:] == [captions[0], captions[2]]
    assert [row["reason"] for row in rows.dropped] == ["its caption has 20,000 characters; at most 16,384 are read"]


def test_more_dropped_rows_than_can_be_listed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text((json.dumps({"image": None, "caption": "a"}) + "\n") * 9)
    monkeypatch.setattr("repro.data.rows.DROPPED_CHARACTERS", 200)
    with pytest.raises(InputError, match="3 rows cannot be used, more than can be listed"):
        load_splits(splits=["train"], train_file=str(tmp_path / "a.jsonl"))


def test_a_coco_file_of_too_many_names_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [{"id": number, "file_name": f"{number}.jpg"} for number in range(100)]
    (tmp_path / "a.json").write_text(json.dumps({"images": pictures, "annotations": []}))
    monkeypatch.setattr("repro.data.coco.NAMED_BYTES", 10_000)
    with pytest.raises(InputError, match="names more than 49 images"):
        load_splits(splits=["train"], train_file=str(tmp_path / "a.json"))


@pytest.fixture
def model(tmp_path: Path, golden_inputs: Path) -> Path:
    import shutil

    return Path(shutil.copytree(golden_inputs / "model", tmp_path / "model"))


def edited(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    content["decoder"].update(changes)
    file.write_text(json.dumps(content))


def pipe(model: Path, name: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "layers": (lambda model: edited(model / "config.json", n_layer=10**7), "decoder: 10000000 layers; at most 1000"),
    "sparse configuration": (lambda model: sparse(model / "config.json"), r"config\.json: has 3,221,225,472 bytes"),
    "deep configuration": (lambda model: (model / "config.json").write_text(DEEP), r"config\.json: is nested more"),
    "deep tokenizer": (lambda model: (model / "tokenizer.json").write_text(DEEP), r"tokenizer\.json: is nested more"),
    "pipe": (lambda model: pipe(model, "tokenizer_config.json"), r"tokenizer_config\.json: is not a regular file"),
    "template": (lambda model: pipe(model, "additional_chat_templates/a.jinja"), r"a\.jinja: is not a regular file"),
    "sparse weights": (lambda model: sparse(model / "flax_model.msgpack"), r"msgpack: .* has 3,221,225,472 bytes"),
    "weights": (lambda model: pipe(model, "flax_model.msgpack"), "holds no weights"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_beyond_the_limits_is_refused_at_once(name: str, model: Path) -> None:
    spoil, words = MODELS[name]
    spoil(model)
    with pytest.raises(InputError, match=words):
        load_model(str(model))


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "dropped.jsonl", "eval_generation.json"])
@pytest.mark.parametrize("make", [os.mkfifo, sparse])
def test_a_report_says_which_file_it_could_not_read(
    name: str, make: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text('{"num_steps": 1}')
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    assert any(name in problem for problem in read_run_folder(tmp_path).problems)
    assert main(["report", str(tmp_path)]) == 0
    if name in ("run.json", "metrics.jsonl"):
        assert main(["verify", str(tmp_path), "--recipe", "coco2017"]) == 2


@pytest.mark.parametrize("content", [bytes(1 << 22), zlib.compress(bytes(1 << 26)), bz2.compress(bytes(1 << 26))])
def test_a_file_of_tensorboard_that_is_none_is_left_out(content: bytes, tmp_path: Path) -> None:
    facts = {"flags": {"per_device_train_batch_size": 1}, "num_replicas": 1}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    (tmp_path / "events.out.tfevents.1").write_bytes(content)
    sparse(tmp_path / "events.out.tfevents.2")
    os.mkfifo(tmp_path / "events.out.tfevents.3")
    assert read_run_folder(tmp_path).speed == []


def test_names_without_an_end_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/zero") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        assert main(["caption", "model", "-"]) == 2
    assert "more than 33,554,432 bytes of names" in capsys.readouterr().err


def test_flags_in_a_pipe_or_nested_deep_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "deep.json").write_text(DEEP)
    for name in ("pipe.json", "deep.json"):
        assert main(["train", str(tmp_path / name)]) == 2
        assert f"{name}: cannot be read as flags and their values" in capsys.readouterr().err
