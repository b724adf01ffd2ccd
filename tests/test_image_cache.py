"""Each image is decoded once, by whichever run comes first; what is interrupted or cut is never taken for whole."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessor

from repro.data import image_cache
from repro.data.image_cache import ImageStore, load_images
from repro.errors import InputError

SIDE = 8
PROCESSOR = ViTImageProcessor(size={"height": SIDE, "width": SIDE})
COUNT = 70
BROKEN = 3


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Images whose bytes are all their number, but for a broken one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    paths = []
    for number in range(COUNT):
        path = folder / f"{number}.png"
        Image.new("RGB", (12, 9), (number, number, number)).save(path)
        paths.append(str(path))
    Path(paths[BROKEN]).write_text("broken")
    return paths


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The references that are decoded, as they are."""
    names: list[str] = []
    real = image_cache.decode_image

    def record(reference: str, *arguments: object, **options: object) -> np.ndarray:
        names.append(reference)
        return real(reference, *arguments, **options)

    monkeypatch.setattr(image_cache, "decode_image", record)
    return names


def load(paths: list[str], cache_dir: Path | None, **options) -> ImageStore:
    options = {"convert_to_rgb": True, "progress": False, **options}
    return load_images(paths, PROCESSOR, cache_dir=cache_dir, **options)


def check(store: ImageStore, paths: list[str]) -> None:
    """Every image is there and shows its number, but for the broken one, whose reason is told."""
    assert list(store.failures) == [path for path in paths if path.endswith(f"/{BROKEN}.png")]
    for place, path in enumerate(paths):
        if path not in store.failures:
            assert (store.images[np.array([place])] == int(Path(path).stem)).all()


@pytest.mark.parametrize("num_workers", [1, 2, 7])
@pytest.mark.parametrize("cached", [True, False])
def test_images_are_the_same_whoever_decodes_them(pictures, tmp_path: Path, num_workers: int, cached: bool) -> None:
    store = load(pictures, tmp_path / "cache" if cached else None, num_workers=num_workers)
    check(store, pictures)
    gathered = store.images[np.array([5, 0, 5])]
    assert gathered.shape == (3, SIDE, SIDE, 3)
    assert gathered[:, 0, 0, 0].tolist() == [5, 0, 5]


def test_an_image_is_decoded_again_only_if_something_changed(pictures, decoded, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def count(paths: list[str] = pictures, **options) -> int:
        decoded.clear()
        check(load(paths, cache, **options), paths)
        return len(decoded)

    assert count() == COUNT
    assert count() == 0
    assert count(pictures[10:20]) == 0  # a part of what another run has decoded
    # Each process of a run asks for the cache to be built again; the first one discards what other runs have left.
    assert [count(rebuild="one run"), count(rebuild="one run")] == [COUNT, 0]
    assert [count(rebuild="another"), count(), count(rebuild="another")] == [COUNT, 0, 0]
    assert count(convert_to_rgb=False) == COUNT  # another geometry is another cache
    Image.new("RGB", (30, 9), (7, 7, 7)).save(pictures[7])
    assert count() == 1
    more = [*pictures, str(Path(pictures[0]).with_name("70.png"))]
    Image.new("RGB", (5, 5), (70, 70, 70)).save(more[-1])
    assert count(more) == 1
    assert count() == 0


@pytest.mark.parametrize("cached", [True, False])
def test_turned_photographs_are_told_whoever_decoded_them(pictures, tmp_path: Path, cached: bool) -> None:
    exif, turned = Image.Exif(), [pictures[7], pictures[9]]
    exif[0x0112] = 6  # a quarter turn is missing
    for path in turned:
        with Image.open(path) as image:
            image.save(path, exif=exif)
    for turn_upright in (True, True, False):
        assert load(pictures, tmp_path if cached else None, turn_upright=turn_upright, capacity=8).turned == set(turned)


@pytest.mark.parametrize("number", [5, BROKEN])
def test_two_names_of_one_file_are_one_image(pictures, tmp_path: Path, number: int) -> None:
    names = [pictures[number], f"{Path(pictures[number]).parent}/../pictures/{number}.png"]
    for _ in range(2):
        store = load(names, tmp_path / "cache")
        if number == BROKEN:
            assert list(store.failures) == names
        else:
            assert (store.images[np.arange(2)] == number).all()


def test_what_the_system_refused_is_tried_again_and_what_is_broken_is_not(pictures, decoded, tmp_path: Path) -> None:
    cache, absent = tmp_path / "cache", Path(pictures[5])
    content = absent.read_bytes()
    absent.unlink()
    assert set(load(pictures, cache).failures) == {pictures[BROKEN], pictures[5]}
    decoded.clear()
    absent.write_bytes(content)
    check(load(pictures, cache), pictures)
    assert decoded == [pictures[5]]


def test_an_interrupted_build_goes_on_where_it_was(pictures, decoded, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(image_cache, "COMMIT", 10)
    real = image_cache.decode_image

    def interrupt(reference: str, *arguments: object, **options: object) -> np.ndarray:
        if reference == pictures[50]:
            raise KeyboardInterrupt
        return real(reference, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "decode_image", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(pictures, tmp_path / "cache", num_workers=1)
    decoded.clear()
    check(load(pictures, tmp_path / "cache"), pictures)
    assert 0 < len(decoded) <= COUNT - 40


BUILD = """
import sys
from pathlib import Path
from transformers import ViTImageProcessor
from repro.data import image_cache
image_cache.COMMIT = 4
real = image_cache.decode_image
def slowly(*arguments, **options):
    import time
    time.sleep(0.005)
    return real(*arguments, **options)
image_cache.decode_image = slowly
paths = sys.argv[3:]
if int(sys.argv[2]):
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
processor = ViTImageProcessor(size={"height": 8, "width": 8})
print("begun", flush=True)
store = image_cache.load_images(paths, processor, convert_to_rgb=True, cache_dir=Path(sys.argv[1]), progress=False)
import numpy as np
for place, path in enumerate(paths):
    if path not in store.failures:
        assert (store.images[np.array([place])] == int(Path(path).stem)).all(), path
print("done", len(store.failures), flush=True)
"""


def start_build(cache: Path, pictures: list[str], *, limit: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, str(cache), str(limit), *pictures]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_a_cache_that_is_right_as_far_as_it_goes(pictures, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for pause in (0.02, 0.07, 0.13):
        build = start_build(cache, pictures)
        assert build.stdout is not None
        assert build.stdout.readline() == "begun\n"
        time.sleep(pause)
        build.send_signal(signal.SIGKILL)
        build.wait()
        build.communicate()
    check(load(pictures, cache), pictures)


def test_what_a_killed_writer_of_the_index_left_goes_with_the_next_build(pictures, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    load(pictures[:2], cache)
    (folder,) = cache.iterdir()
    (folder / "index.jsonl.0123.partial").touch()
    check(load(pictures, cache), pictures)
    assert not list(folder.glob("*.partial"))


def test_two_runs_that_build_at_once_share_the_work(pictures, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    builds = [start_build(cache, pictures) for _ in range(2)]
    results = [build.communicate(timeout=120) for build in builds]
    assert [(build.returncode, out.split()[-2:]) for build, (out, _) in zip(builds, results, strict=True)] == [
        (0, ["done", "1"])
    ] * 2, results
    (folder,) = cache.iterdir()
    assert (folder / "pixels").stat().st_size == (COUNT - 1) * SIDE * SIDE * 3


def spoil(folder: Path, how: str) -> None:
    pixels, index = folder / "pixels", folder / "index.jsonl"
    if how == "pixels cut":
        os.truncate(pixels, pixels.stat().st_size // 2 + 5)
    elif how == "index cut":
        os.truncate(index, index.stat().st_size // 2 + 5)
    elif how == "pixels gone":
        pixels.unlink()
    elif how == "index gone":
        index.unlink()
    elif how == "pixels empty":
        pixels.write_bytes(b"")
    elif how == "other settings":
        index.write_text(index.read_text().replace(f'"height": {SIDE}', f'"height": {SIDE + 1}'))
    elif how == "settings gone":
        index.write_text(index.read_text().partition("\n")[2])
    elif how == "settings a list":
        index.write_text('["build", []]\n' + index.read_text().partition("\n")[2])
    elif how == "settings not text":
        index.write_bytes(b"\xff\xfe" + index.read_bytes())
    elif how == "index zeros":
        index.write_bytes(index.read_bytes()[:-200] + bytes(200))
    elif how in SLOTS:
        first, *lines = index.read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        entries = [[key, [SLOTS[how], entry[1]] if entry[0] in range(6, COUNT) else entry] for key, entry in entries]
        index.write_text("".join(f"{line}\n" for line in [first, *map(json.dumps, entries)]))
    else:
        with index.open("ab") as file:
            file.write(LINES[how])


SLOTS = {"index repeated": 7, "index negative": -1, "index of no kind": None, "index beyond": 10**400}
SPOILED = (
    *("pixels cut", "index cut", "pixels gone", "index gone", "pixels empty", "other settings", "settings gone"),
    *("settings a list", "settings not text", "index zeros", *SLOTS),
)
LINES = {
    "half a line": b'["00',
    "a line that is not text": b"\xff\xfe\n",
    "a line of another form": b"[1]\n",
    "zeros at the end": bytes(1000),
}


@pytest.mark.parametrize("how", [*SPOILED, *LINES])
def test_a_cache_that_is_not_whole_is_mended(pictures, decoded, tmp_path: Path, how: str) -> None:
    cache = tmp_path / "cache"
    load(pictures, cache)
    (folder,) = cache.iterdir()
    spoil(folder, how)
    decoded.clear()
    check(load(pictures, cache), pictures)
    assert bool(decoded) == (how not in LINES)
    if how.endswith("cut"):  # what is left of it is used
        assert 30 <= len(decoded) <= 40
    pictures.append(str(Path(pictures[0]).with_name("70.png")))
    Image.new("RGB", (5, 5), (70, 70, 70)).save(pictures[-1])
    for expected in (pictures[-1:], []):  # and it grows
        decoded.clear()
        check(load(pictures, cache), pictures)
        assert decoded == expected


def test_zeros_at_the_end_of_the_index_are_no_image(pictures, tmp_path: Path) -> None:
    cache, missing = tmp_path / "cache", str(tmp_path / "absent.png")
    load(pictures, cache)
    (index,) = cache.glob("*/index.jsonl")
    with index.open("ab") as file:
        file.write(bytes(77))
    store = load([*pictures, missing], cache)
    assert set(store.failures) == {pictures[BROKEN], missing}, "it is not shown as the image of slot 0"


def test_a_run_keeps_its_images_while_another_one_discards_the_cache(pictures, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store = load(pictures, cache)
    load(list(reversed(pictures)), cache, rebuild="another run")
    check(store, pictures)


def test_the_size_is_announced_before_the_work(pictures, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="repro"):
        load(pictures, tmp_path / "cache")
    assert f"decoding {COUNT} images" in caplog.text
    assert "0.00 GB" in caplog.text


def test_no_room_is_an_error_before_the_work(pictures, decoded, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"70 decoded images need .* are free; make room"):
        load(pictures, tmp_path / "cache")
    assert not decoded


@pytest.mark.parametrize("images", [0.5, 20.5, 40])
def test_a_disk_that_fills_up_leaves_no_half_cache_in_use(pictures, decoded, tmp_path: Path, images: float) -> None:
    cache = tmp_path / "cache"
    # To a writer, a limit on the size of files looks like a full disk.
    build = start_build(cache, pictures, limit=int(images * SIDE * SIDE * 3))
    _, message = build.communicate(timeout=120)
    assert build.returncode == 1
    assert "InputError" in message
    assert "decoded images cannot be kept there" in message
    assert "--cache_dir" in message
    check(load(pictures, cache), pictures)
    assert COUNT - int(images) <= len(decoded) <= COUNT


def test_a_cache_that_cannot_be_written_is_named(pictures, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--cache_dir"):
        load(pictures, tmp_path / "file")


def test_images_are_read_from_zip_files_by_any_number_of_threads(pictures, tmp_path: Path) -> None:
    archive = tmp_path / "some.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for path in pictures:
            opened.write(path, f"inner/{Path(path).name}")
    names = [f"zip://inner/{number}.png::{archive}" for number in range(COUNT)]
    store = load([*names, f"zip://inner/absent.png::{archive}"], tmp_path / "cache", num_workers=5)
    assert set(store.failures) == {names[BROKEN], f"zip://inner/absent.png::{archive}"}
    for number in set(range(COUNT)) - {BROKEN}:
        assert (store.images[np.array([number])] == number).all()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("how", ["cut", "zeros", "another image", "one bit"])
def test_pixels_that_change_are_named_and_decoded_again(pictures, decoded, tmp_path: Path, caplog, how, when) -> None:
    store, size = load(pictures, tmp_path / "cache"), SIDE * SIDE * 3
    (pixels,) = tmp_path.glob("cache/*/pixels")
    whole = pixels.read_bytes()
    if how == "cut" and when == "meanwhile":
        os.truncate(pixels, 2 * size + 5)
    elif how == "zeros":
        pixels.write_bytes(whole[: 2 * size] + bytes(len(whole) - 2 * size))
    elif how == "another image":
        pixels.write_bytes(whole[: 2 * size] + whole[size : 2 * size] + whole[3 * size :])
    elif how == "one bit":
        pixels.write_bytes(whole[: 2 * size] + bytes([whole[2 * size] ^ 1]) + whole[2 * size + 1 :])
    else:
        os.truncate(pixels, 3 * size - 1)
    decoded.clear()
    for _ in range(2):
        check(store if when == "meanwhile" else load(pictures, tmp_path / "cache"), pictures)
    assert (pictures[2] in decoded, len(set(decoded))) == (True, len(decoded)), "each once: the file is mended"
    assert "is damaged" in caplog.text or "is not whole" in caplog.text


def test_without_a_cache_no_more_images_than_the_capacity_are_held(pictures, decoded) -> None:
    store = load(pictures, None, capacity=20)
    assert len(decoded) == COUNT
    order = np.random.default_rng(0).permutation([n for n in range(COUNT) if n != BROKEN])
    for _ in range(2):  # all others come between an image and the same one again
        decoded.clear()
        for start in range(0, len(order), 10):
            places = order[start : start + 10]
            assert (store.images[places] == places[:, None, None, None]).all()
        assert len(decoded) > len(order) - 20
    decoded.clear()
    store.images[order[-10:]]
    assert not decoded


def test_without_a_cache_a_batch_larger_than_the_capacity_is_whole(pictures) -> None:
    store = load(pictures, None, capacity=3)
    for places in (np.arange(10, 13), np.arange(12, 20), np.arange(18, 30)):
        assert (store.images[places][:, 0, 0, 0] == places).all()


def test_without_a_cache_a_file_that_vanishes_is_named(pictures) -> None:
    store = load(pictures, None, capacity=10)
    Path(pictures[20]).unlink()
    with pytest.raises(InputError, match=r"20\.png: could be read before, and now it cannot: No such file"):
        store.images[np.array([20])]


def test_without_a_cache_images_that_do_not_fit_into_memory_are_refused(pictures, decoded, monkeypatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    with pytest.raises(InputError, match=r"--no_image_cache: .* do not fit .*--block_size"):
        load(pictures, None)
    assert not decoded
    check(load(pictures, None, capacity=10), pictures)
