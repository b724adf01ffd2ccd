"""No input waits for ever, takes gigabytes or minutes, or starts a program: it is dropped, or refused by name."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import load_splits
from PIL import Image

from repro import limits
from repro.__main__ import main
from repro.data import images
from repro.data.files import read_records
from repro.data.images import ImageError, Resize, decode_image
from repro.errors import InputError
from repro.limits import Budget, CheckedJson, Refused
from repro.models.pretrained import load_model
from repro.reports.runs import read_run_folder

MEMORY, SECONDS = 2 << 30, 20  # what an input may cost, at most


def decode(reference, side=32):
    return decode_image(str(reference), Resize(side, side, 3), convert_to_rgb=True)[0]


def load(path):
    return load_splits(splits=["train"], train_file=str(path))["train"]


def sparse(path):
    with path.open("wb") as file:
        file.truncate(3 << 30)


def encoded(image, name, **options):
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def jpeg(width, height, scans):
    """A progressive JPEG of any size in a few bytes: tables of one code, and scans of one component without data."""
    frame = struct.pack(">BHHB", 8, height, width, 3) + b"".join(bytes([c, 0x11, 0]) for c in (1, 2, 3))
    segments = [b"\xff\xd8", b"\xff\xdb\x00\x43\x00" + b"\x01" * 64, b"\xff\xc2\x00\x11" + frame]
    segments += [b"\xff\xc4\x00\x14" + bytes([table]) + b"\x01" + bytes(15) + b"\x00" for table in (0x00, 0x10)]
    segments.append(b"\xff\xda\x00\x0c\x03\x01\x00\x02\x00\x03\x00\x00\x00\x01")
    segments += [b"\xff\xda\x00\x08\x01" + bytes([1 + n % 3, 0, 1, 0x3F, 0]) for n in range(scans - 1)]
    return b"".join([*segments, b"\xff\xd9"])


def png(width, height, *chunks):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(-(-width // 8) + 1) * height) if width * height < 1 << 31 else b""
    pixels = [(b"IHDR", header), *chunks, (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in pixels)


def exif(tags, length):
    """EXIF in which every tag points to the same text."""
    start = 8 + 2 + 12 * tags + 4
    entries = b"".join(struct.pack("<HHII", 0x9000 + tag, 7, length, start) for tag in range(tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", tags) + entries + bytes(4) + bytes(length)


def archive(content, method):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as opened:
        opened.writestr("a.png", content)
    return buffer.getvalue()


def tiled(side):
    """A TIFF of 16 x 16 pixels in one tile of any side."""
    rows = zlib.compress(bytes(1 << 20))
    values = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side), (324, 126)]
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*values, (325, len(rows))])
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 10) + tags + bytes(4) + rows


def iptc(content):
    """An image inside of IPTC, as Pillow's reader of IPTC hands on to any reader."""

    def field(record, number, data):
        return bytes([0x1C, record, number]) + struct.pack(">H", len(data)) + data

    head = [(3, 60, b"\x01\x00"), (3, 65, b"\0"), (3, 20, b"\0\x08"), (3, 30, b"\0\x08"), (3, 120, b"\x01")]
    return b"".join(field(*part) for part in head) + field(8, 10, content)


PLAIN = encoded(Image.new("RGB", (8, 8)), "JPEG")
EPS = encoded(Image.new("RGB", (8, 8)), "EPS")
UNKNOWN = "damaged, or not in a format that is read: JPEG, PNG"
HOSTILE = {
    "scans.jpg": (lambda: jpeg(10_000, 10_000, 500), "500 scans"),
    "segments.jpg": (lambda: PLAIN[:2] + b"\xff\xfe\x00\x02" * 600_000 + PLAIN[2:], "pieces"),
    "canvas.png": (lambda: png(60_000, 60_000), "pixels"),
    "tall.png": (lambda: png(1, 1_000_000), "pixels"),
    "wide.png": (lambda: png(1_000_000, 1), "pixels"),
    "chunks.png": (lambda: png(8, 8, *[(b"prVt", b"")] * 600_000), "pieces"),
    "text.png": (lambda: png(8, 8, *[(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20)))] * 100), "memory"),
    "tags.tif": (lambda: exif(3_000, 4_000_000), UNKNOWN),
    "tile.tif": (lambda: tiled(60_000), "tiles"),
    "plain.ppm": (lambda: b"P3 7000 7000 255 " + b"1 " * 500_000, "not enough image data"),
    "comments.gif": (lambda: b"GIF89a\x08\0\x08\0\0\0\0" + b"!\xfe\0" * 600_000, "pieces"),
    "photo.jpg": (lambda: EPS, UNKNOWN),
    "iptc.jpg": (lambda: iptc(EPS), UNKNOWN),
    "bzip2.zip": (lambda: archive(bytes(1 << 20), zipfile.ZIP_BZIP2), "deflate"),
    "bomb.zip": (lambda: archive(bytes(100 << 20), zipfile.ZIP_DEFLATED), "bytes"),
}
# Tells of each image the reason, processor seconds, and kB more than before at the peak.
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


def test_no_image_takes_gigabytes_or_minutes_and_each_says_why_it_is_dropped(tmp_path):
    command = [sys.executable, "-c", MEASURED]
    for name, (make, _) in HOSTILE.items():
        (tmp_path / name).write_bytes(make())
        command.append(f"zip://a.png::{tmp_path / name}" if name.endswith(".zip") else str(tmp_path / name))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, (reason, seconds, memory) in zip(HOSTILE, json.loads(done.stdout), strict=True):
        assert HOSTILE[name][1] in str(reason), name
        assert seconds < SECONDS, name
        assert memory * 1024 < MEMORY, name


def test_only_regular_files_are_read(tmp_path):
    pipe, link = tmp_path / "pipe.png", tmp_path / "link.png"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    devices = [device for device in ("/dev/zero", "/dev/kmsg", "/dev/tty") if os.path.exists(device)]
    for reference in (pipe, link, f"zip://a::{pipe}", f"arrow://0/a::{pipe}", *devices):
        with pytest.raises(ImageError, match="not a regular file"):
            decode(reference)
    sparse(tmp_path / "sparse.png")
    with pytest.raises(ImageError, match=r"3,221,225,472 bytes; at most 100,663,296"):
        decode(tmp_path / "sparse.png")


def test_a_file_without_a_size_is_not_read(monkeypatch):
    # As the kernel's log is, at whose end one waits for ever.
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("opened"))
    assert os.stat("/proc/version").st_size == 0
    assert limits.open_file("/proc/version", 100).read() == b""


def test_nothing_else_is_started_or_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    for content in (EPS, iptc(EPS), PLAIN[:2] + b"\xff\xed\x00\x20Photoshop 3.0\x008BIM\x04\x04\0\0" + bytes(8)):
        (tmp_path / "photo.jpg").write_bytes(content)
        with pytest.raises(ImageError):
            decode(tmp_path / "photo.jpg")
    assert set(images.formats()) <= set(limits.FORMATS)
    readme = (Path(__file__).parents[1] / "repro" / "data" / "README.md").read_text()
    assert ", ".join(limits.FORMATS[:-1]) + " and " + limits.FORMATS[-1] in readme


def test_a_resize_is_refused_by_what_lies_half_way(tmp_path):
    (tmp_path / "tall.png").write_bytes(png(1, limits.IMAGE_SIDE))
    assert decode(tmp_path / "tall.png").shape == (32, 32, 3)
    with pytest.raises(ImageError, match="made 1000 wide"):
        decode(tmp_path / "tall.png", 1000)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 100}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpegs_scans_are_counted_but_for_those_of_its_thumbnails(mode, options):
    thumbnail = b"Exif\0\0" + exif(0, 0) + PLAIN
    values = np.random.default_rng(0).integers(0, 256, (60, 80, 4), dtype=np.uint8)
    content = encoded(Image.fromarray(values).convert(mode), "JPEG", exif=thumbnail, **options)
    assert content.count(PLAIN) == 1
    scans = limits.count_scans(content + PLAIN * 200)  # as a telephone appends them
    assert scans == 1 if "progressive" not in options else scans > 1
    assert limits.count_scans(jpeg(8, 8, 300)) == 300
    assert limits.count_scans(content[:100]) == 0


def test_a_budget_is_kept_and_one_thread_may_have_all_of_it():
    budget, held = Budget(10), []

    def work(amount):
        with budget.held(amount):
            held.append(amount)
            assert sum(held) <= max(10, amount)
            held.remove(amount)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [4, 3, 30, 1, 10] * 200))


def test_no_more_than_one_image_is_open_beyond_the_budget(tmp_path, monkeypatch):
    real, now, most = Image.open, [], []

    def opened(*arguments, **options):
        now.append("opened")
        most.append(len(now))
        return real(*arguments, **options)

    def work(_):
        with images.open_image(str(tmp_path / "a.webp")):
            time.sleep(0.01)
            now.pop()

    Image.new("RGB", (100, 100)).save(tmp_path / "a.webp")
    monkeypatch.setattr(Image, "open", opened)
    monkeypatch.setattr(images, "PIXELS", Budget(10_000))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(20)))
    assert max(most) <= 2


DEEP = "[" * 100_000 + "]" * 100_000
PICTURES = [{"id": number, "file_name": f"{number}.jpg"} for number in range(100)]
LONG = "a" * 1_200_000
LISTS = {
    "deep.json": (f'{{"images": [], "annotations": [{{"caption": {DEEP}}}]}}', "nested more than 100 deep"),
    "deeper.json": (DEEP, "nested more than 100 deep"),
    "deep.jsonl": (DEEP + "\n", "line 1"),
    "long.jsonl": (f'{{"image": "a.png", "caption": "{LONG}"}}\n', "line 1 ends a row of more than 1,048,576"),
    "long.json": (f'[{{"image": "a.png", "caption": "{LONG}"}}]', "an object of more than 1,048,576"),
    "name.json": (f'{{"{LONG}": 1}}', "an object of more than"),
    "long.csv": (f"image,caption\na.png,{LONG}\n", "line 2 ends a row of more than"),
    "wide.csv": ("image,caption\n" + '"\n",' * 300_000 + "\n", "ends a row of more than"),
    "zeros.tsv": ("image\tcaption\n" + "\0" * 1_200_000, "line 2 ends a row of more than"),
    **{f"pipe.{end}": (None, "not a regular file") for end in ("json", "jsonl", "csv", "parquet", "tar")},
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_beyond_the_limits_or_in_a_pipe_is_refused_at_once(name, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "RECORD_CHARACTERS", 1 << 20)
    text, words = LISTS[name]
    if text is None:
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        load(tmp_path / name)


def test_what_is_in_strings_neither_nests_nor_ends_them(tmp_path):
    rows = [{"image": "a.png", "caption": caption} for caption in ('[[{"\\', "]" * 300, "\\\\\\", '\\"[' * 200, "ü{")]
    for block in (1, 2, 7, 64, 1 << 16):
        for text in (json.dumps(rows), json.dumps({"annotations": rows}, indent=1)):
            checked = CheckedJson(io.BytesIO(text.encode()))
            assert b"".join(checked.read(block) for _ in range(len(text) + 99)) == text.encode()
            assert (checked._depth, checked._in_string) == (0, 0)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert list(read_records(str(tmp_path / "a.json"))) == rows
    with pytest.raises(Refused, match="deep"):
        CheckedJson(io.BytesIO(b"[" * 101)).read(1 << 16)


@pytest.mark.parametrize(
    ("rows", "limit", "words"),
    [
        ([{"image": None, "text": "a"}] * 200, "rows.DROPPED_CHARACTERS", "rows cannot be used, more than can be"),
        ({"images": PICTURES, "annotations": []}, "coco.NAMED_BYTES", "names more than 49 images"),
    ],
    ids=["dropped", "named"],
)
def test_more_rows_than_can_be_listed_or_held_are_refused(rows, limit, words, tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps(rows))
    monkeypatch.setattr(f"repro.data.{limit}", 10_000)
    with pytest.raises(InputError, match=words):
        load(tmp_path / "a.json")


def of_many_layers(file):
    content = json.loads(file.read_text())
    content["decoder"]["n_layer"] = 10**7
    file.write_text(json.dumps(content))


def pipe(file):
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def deep(file):
    file.write_text(DEEP)


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("config.json", of_many_layers, "decoder: 10000000 layers; at most 1000"),
        ("config.json", sparse, r"config\.json: has 3,221,225,472 bytes"),
        ("config.json", deep, r"config\.json: is nested more"),
        ("tokenizer.json", deep, r"tokenizer\.json: is nested more"),
        ("tokenizer_config.json", pipe, r"tokenizer_config\.json: is not a regular file"),
        ("additional_chat_templates/a.jinja", pipe, r"a\.jinja: is not a regular file"),
        ("flax_model.msgpack", sparse, r"msgpack: .* has 3,221,225,472 bytes"),
        ("flax_model.msgpack", pipe, "holds no weights"),
    ],
)
def test_a_model_beyond_the_limits_is_refused_at_once(name, spoil, words, tmp_path, golden_inputs):
    model = Path(shutil.copytree(golden_inputs / "model", tmp_path / "model"))
    spoil(model / name)
    with pytest.raises(InputError, match=words):
        load_model(str(model))


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "dropped.jsonl", "eval_generation.json"])
@pytest.mark.parametrize("make", [pipe, sparse])
def test_a_report_says_which_file_it_could_not_read(name, make, tmp_path):
    (tmp_path / "run.json").write_text('{"num_steps": 1}')
    make(tmp_path / name)
    assert any(name in problem for problem in read_run_folder(tmp_path).problems)
    assert main(["report", str(tmp_path)]) == 0
    if name in ("run.json", "metrics.jsonl"):
        assert main(["verify", str(tmp_path), "--recipe", "coco2017"]) == 2


def test_names_without_an_end_are_refused(monkeypatch, capsys):
    with open("/dev/zero") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        assert main(["caption", "model", "-"]) == 2
    assert "more than 33,554,432 bytes of names" in capsys.readouterr().err


@pytest.mark.parametrize("make", [pipe, deep])
def test_flags_in_a_pipe_or_nested_deep_are_refused(make, tmp_path, capsys):
    make(tmp_path / "flags.json")
    assert main(["train", str(tmp_path / "flags.json")]) == 2
    assert "flags.json: cannot be read as flags and their values" in capsys.readouterr().err
