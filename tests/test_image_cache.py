"""Each image is decoded once, by whichever run comes first; what is interrupted or cut is never taken for whole."""

import json
import logging
import os
import re
import shutil
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
from repro.data.image_cache import load_images
from repro.errors import InputError

SIDE, COUNT, BROKEN = 8, 40, 3
SIZE = SIDE * SIDE * 3
PROCESSOR = ViTImageProcessor(size={"height": SIDE, "width": SIDE})


def draw(folder, number):
    """An image whose bytes are all its number."""
    Image.new("RGB", (12, 9), (number, number, number)).save(folder / f"{number}.png")
    return str(folder / f"{number}.png")


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    paths = [draw(tmp_path / "pictures", number) for number in range(COUNT)]
    Path(paths[BROKEN]).write_text("broken")
    return paths


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch):
    """The references that are decoded, as they are."""
    names, real = [], image_cache.decode_image

    def record(reference, *arguments, **options):
        names.append(reference)
        return real(reference, *arguments, **options)

    monkeypatch.setattr(image_cache, "decode_image", record)
    return names


def load(paths, cache_dir, **options):
    return load_images(paths, PROCESSOR, cache_dir=cache_dir, **{"convert_to_rgb": True, "progress": False, **options})


def check(store, paths):
    """Every image is there and shows its number, but for the broken one, whose reason is told."""
    numbers = np.array([int(re.search(r"(\d+)\.png", path)[1]) for path in paths])
    assert list(store.failures) == [path for path, number in zip(paths, numbers, strict=True) if number == BROKEN]
    places = np.flatnonzero(numbers != BROKEN)
    expected = np.broadcast_to(numbers[places, None, None, None], (len(places), SIDE, SIDE, 3))
    np.testing.assert_array_equal(store.images[places], expected)


@pytest.mark.parametrize("num_workers", [1, 7])
@pytest.mark.parametrize("cached", [True, False])
def test_images_are_the_same_whoever_decodes_them_wherever_they_are(pictures, cache, tmp_path, num_workers, cached):
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        for path in pictures:
            archive.write(path, f"inner/{Path(path).name}")
    names = [*pictures, *(f"zip://inner/{number}.png::{tmp_path / 'some.zip'}" for number in range(COUNT))]
    names += [f"{tmp_path}/pictures/../pictures/{number}.png" for number in (5, BROKEN)]  # by another name
    for _ in range(2):
        store = load(names, cache if cached else None, num_workers=num_workers)
        check(store, names)
    assert store.images[np.array([5, 0, 5])][:, 0, 0, 0].tolist() == [5, 0, 5]


def test_an_image_is_decoded_again_only_if_something_changed(pictures, decoded, cache):
    def count(paths=pictures, **options):
        decoded.clear()
        check(load(paths, cache, **options), paths)
        return len(decoded)

    assert [count(), count()] == [COUNT, 0]
    assert count(pictures[10:20]) == 0  # a part of what another run has decoded
    # Each process of a run asks for the cache to be built again; the first one discards what other runs have left.
    assert [count(rebuild="one run"), count(rebuild="one run")] == [COUNT, 0]
    assert [count(rebuild="another"), count(), count(rebuild="another")] == [COUNT, 0, 0]
    assert count(convert_to_rgb=False) == COUNT  # another geometry is another cache
    Image.new("RGB", (30, 9), (7, 7, 7)).save(pictures[7])
    assert count() == 1
    assert count([*pictures, draw(Path(pictures[0]).parent, COUNT)]) == 1
    assert count() == 0


@pytest.mark.parametrize("cached", [True, False])
def test_turned_photographs_are_told_whoever_decoded_them(pictures, cache, cached):
    exif, turned = Image.Exif(), {pictures[7], pictures[9]}
    exif[0x0112] = 6  # a quarter turn is missing
    for path in turned:
        with Image.open(path) as image:
            image.save(path, exif=exif)
    for turn_upright in (True, True, False):
        assert load(pictures, cache if cached else None, turn_upright=turn_upright, capacity=8).turned == turned


def test_what_the_system_refused_is_tried_again_and_what_is_broken_is_not(pictures, decoded, cache):
    absent = Path(pictures[5])
    absent.rename(absent.with_name("elsewhere"))
    assert set(load(pictures, cache).failures) == {pictures[BROKEN], pictures[5]}
    absent.with_name("elsewhere").rename(absent)
    decoded.clear()
    check(load(pictures, cache), pictures)
    assert decoded == [pictures[5]]


def test_an_interrupted_build_goes_on_where_it_was(pictures, decoded, cache, monkeypatch):
    monkeypatch.setattr(image_cache, "COMMIT", 10)
    real = image_cache.decode_image

    def interrupt(reference, *arguments, **options):
        if reference == pictures[35]:
            raise KeyboardInterrupt
        return real(reference, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "decode_image", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(pictures, cache, num_workers=1)
    decoded.clear()
    check(load(pictures, cache), pictures)
    assert set(decoded) == set(pictures[35:])


# A processor's settings stand for it, because transformers takes seconds to be imported.
BUILD = """
import resource, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from repro.data import image_cache
cache, limit, *paths = sys.argv[1:]
if int(limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
real = image_cache.decode_image
image_cache.decode_image = lambda *arguments, **options: time.sleep(0.01) or real(*arguments, **options)
image_cache.COMMIT = 4
print("begun", flush=True)
processor = SimpleNamespace(do_resize=True, size={"height": 8, "width": 8}, resample=2)
image_cache.load_images(paths, processor, convert_to_rgb=True, cache_dir=Path(cache), progress=False)
"""


def start_build(cache, pictures, *, limit=0):
    command = [sys.executable, "-c", BUILD, str(cache), str(limit), *pictures]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_a_cache_that_is_right_as_far_as_it_goes(pictures, cache):
    for pause in (0.02, 0.07, 0.13):
        build = start_build(cache, pictures)
        assert build.stdout.readline() == "begun\n"
        time.sleep(pause)
        build.kill()
        build.communicate()
    check(load(pictures, cache), pictures)


def test_two_runs_that_build_at_once_share_the_work(pictures, decoded, cache):
    for build in [start_build(cache, pictures) for _ in range(2)]:
        _, message = build.communicate(timeout=120)
        assert build.returncode == 0, message
    (pixels,) = cache.glob("*/pixels")
    assert pixels.stat().st_size == (COUNT - 1) * SIZE
    check(load(pictures, cache), pictures)
    assert not decoded


@pytest.mark.parametrize("images", [0.5, 20.5, 25])
def test_a_disk_that_fills_up_leaves_no_half_cache_in_use(pictures, decoded, cache, images):
    # To a writer, a limit on the size of files looks like a full disk.
    build = start_build(cache, pictures, limit=int(images * SIZE))
    _, message = build.communicate(timeout=120)
    assert build.returncode == 1
    for words in ("InputError", "decoded images cannot be kept there", "--cache_dir"):
        assert words in message
    check(load(pictures, cache), pictures)
    assert COUNT - int(images) <= len(decoded) <= COUNT


def in_slot(slot):
    """Give the index this slot for most of the images."""

    def change(content):
        first, *lines = content.splitlines()
        entries = [json.loads(line) for line in lines]
        entries = [[key, [slot, *entry[1:]] if entry[0] in range(6, COUNT) else entry] for key, entry in entries]
        return b"\n".join([first, *(json.dumps(entry).encode() for entry in entries), b""])

    return change


def half(content):
    return content[: len(content) // 2 + 5]


def others(content):
    return content.partition(b"\n")[2]


ENDS = (b'["00', b"\xff\xfe\n", b"[1]\n", bytes(1000))
SPOILED = {
    "pixels cut": ("pixels", half),
    "pixels gone": ("pixels", None),
    "pixels empty": ("pixels", lambda content: b""),
    "index cut": ("index.jsonl", half),
    "index gone": ("index.jsonl", None),
    "index zeros": ("index.jsonl", lambda content: content[:-200] + bytes(200)),
    "other settings": ("index.jsonl", lambda content: content.replace(b'"height": 8', b'"height": 9')),
    "settings gone": ("index.jsonl", others),
    "settings a list": ("index.jsonl", lambda content: b'["build", []]\n' + others(content)),
    "settings not text": ("index.jsonl", lambda content: b"\xff\xfe" + content),
    **{f"slots {slot!r:.5}": ("index.jsonl", in_slot(slot)) for slot in (7, -1, None, 10**400)},
    **{f"whole and {end!r:.9}": ("index.jsonl", lambda content, end=end: content + end) for end in ENDS},
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_cache_that_is_not_whole_is_mended_and_grows(pictures, decoded, cache, how):
    load(pictures, cache)
    (folder,) = cache.iterdir()
    name, change = SPOILED[how]
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if change:
        (folder / name).write_bytes(change(content))
    (folder / "index.jsonl.0123.partial").touch()  # as a killed writer leaves it
    decoded.clear()
    check(load(pictures, cache), pictures)
    assert bool(decoded) == ("whole" not in how)
    if how.endswith("cut"):  # what is left of it is used
        assert COUNT // 2 - 5 <= len(decoded) <= COUNT // 2 + 5
    pictures.append(draw(Path(pictures[0]).parent, COUNT))
    for expected in (pictures[-1:], []):
        decoded.clear()
        check(load(pictures, cache), pictures)
        assert decoded == expected
    assert not list(folder.glob("*.partial"))
    absent = str(folder / "absent.png")
    assert set(load([*pictures, absent], cache).failures) == {pictures[BROKEN], absent}, "zeros are no image"


def test_a_run_keeps_its_images_while_another_one_discards_the_cache(pictures, decoded, cache):
    store = load(pictures, cache)
    load(list(reversed(pictures)), cache, rebuild="another run")
    decoded.clear()
    check(store, pictures)
    assert not decoded


def test_no_room_is_an_error_before_the_work_whose_size_is_announced(pictures, decoded, cache, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="repro")
    usage = shutil.disk_usage(cache.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"40 decoded images need .* are free; make room"):
        load(pictures, cache)
    assert re.search(r"decoding 40 images .* 0\.00 GB", caplog.text)
    assert not decoded


def test_a_cache_that_cannot_be_written_is_named(pictures, cache):
    cache.write_text("")
    with pytest.raises(InputError, match="--cache_dir"):
        load(pictures, cache)


CHANGES = {
    "cut": lambda whole: whole[: 3 * SIZE - 1],
    "zeros": lambda whole: whole[: 2 * SIZE] + bytes(len(whole) - 2 * SIZE),
    "another image": lambda whole: whole[: 2 * SIZE] + whole[SIZE : 2 * SIZE] + whole[3 * SIZE :],
    "one bit": lambda whole: whole[: 2 * SIZE] + bytes([whole[2 * SIZE] ^ 1]) + whole[2 * SIZE + 1 :],
}


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("how", CHANGES)
def test_pixels_that_change_are_named_and_decoded_again(pictures, decoded, cache, caplog, how, when):
    store = load(pictures, cache)
    (pixels,) = cache.glob("*/pixels")
    pixels.write_bytes(CHANGES[how](pixels.read_bytes()))
    decoded.clear()
    for _ in range(2):
        check(store if when == "meanwhile" else load(pictures, cache), pictures)
    assert (pictures[2] in decoded, len(set(decoded))) == (True, len(decoded)), "each once: the file is mended"
    assert "is damaged" in caplog.text or "is not whole" in caplog.text


def test_without_a_cache_no_more_images_than_the_capacity_are_held_but_for_a_batch(pictures, decoded):
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
    assert (store.images[order][:, 0, 0, 0] == order).all()


def test_without_a_cache_a_file_that_vanishes_is_named(pictures):
    store = load(pictures, None, capacity=10)
    Path(pictures[20]).unlink()
    with pytest.raises(InputError, match=r"20\.png: could be read before, and now it cannot: No such file"):
        store.images[np.array([20])]


def test_without_a_cache_images_that_do_not_fit_into_memory_are_refused(pictures, decoded, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda _: 70)
    with pytest.raises(InputError, match=r"--no_image_cache: .* do not fit .*--block_size"):
        load(pictures, None)
    assert not decoded
    check(load(pictures, None, capacity=10), pictures)
