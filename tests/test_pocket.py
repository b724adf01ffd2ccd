"""Rendered scenes: what is drawn, what is said of it, and the COCO folder that holds both."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from repro.__main__ import main
from repro.errors import InputError
from repro.pocket import halves
from repro.pocket import scenes as rules
from repro.pocket.halves import read_scenes, render_pocket
from repro.pocket.scenes import Item, Scene, describe_scene, draw_scene, sample_scene

SETTINGS = {"num_train": 30, "num_val": 8, "num_test": 3, "image_size": 32, "seed": 5}
IMAGES = {"train": 30, "val": 8, "test": 3}

scenes = st.integers(0, 2**32).map(lambda seed: sample_scene(random.Random(seed)))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(folder, split):
    kind = "image_info" if split == "test" else "captions"
    return json.loads((folder / "annotations" / f"{kind}_{split}2017.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pocket") / "data"
    render_pocket(folder, **SETTINGS)
    return folder


@given(scenes)
def test_an_object_s_colour_is_seen_at_its_position_and_the_background_in_the_corner(scene):
    side = 64
    pixels = np.asarray(draw_scene(scene, side))
    assert pixels.shape == (side, side, 3)
    for item in scene.objects:
        assert np.abs(np.subtract(item.centre, rules.POSITIONS[item.position])).max() <= rules.JITTER + 1e-3
        x, y = (int(at * side) for at in item.centre)
        assert tuple(pixels[y, x]) == rules.COLOURS[item.colour]
    assert tuple(pixels[0, 0]) == rules.BACKGROUNDS[scene.background]


@given(scenes)
def test_objects_do_not_touch_each_other(scene):
    """So the picture of all is the sum of the pictures of each, up to blended edge pixels."""
    ground, *each = (
        np.asarray(draw_scene(replace(scene, objects=objects), 64))
        for objects in ((), *((item,) for item in scene.objects))
    )
    assert sum((picture != ground).any(-1).astype(int) for picture in each).max() == 1


@given(scenes, st.data())
def test_changing_any_attribute_changes_the_picture(scene, data):
    names = {"shape": rules.SHAPES, "colour": rules.COLOURS, "size": rules.SIZES, "background": rules.BACKGROUNDS}
    name = data.draw(st.sampled_from(sorted(names)))
    owner = scene if name == "background" else scene.objects[0]
    changed = replace(
        owner, **{name: data.draw(st.sampled_from([o for o in names[name] if o != getattr(owner, name)]))}
    )
    if isinstance(changed, Item):
        changed = replace(scene, objects=(changed, *scene.objects[1:]))
    assert changed.attributes() != scene.attributes()
    assert draw_scene(changed, 64).tobytes() != draw_scene(scene, 64).tobytes()


def test_scenes_vary_in_all_they_can():
    rng = random.Random(0)
    drawn = [sample_scene(rng) for _ in range(600)]
    items = [item for scene in drawn for item in scene.objects]
    known = {"shape": rules.SHAPES, "colour": rules.COLOURS, "size": rules.SIZES, "position": rules.POSITIONS}
    assert {name: {getattr(item, name) for item in items} for name in known} == {n: set(of) for n, of in known.items()}
    assert {scene.background for scene in drawn} == set(rules.BACKGROUNDS)
    assert {len(scene.objects) for scene in drawn} == set(range(1, rules.MAX_OBJECTS + 1))
    assert len({scene.attributes() for scene in drawn}) > 500


def test_a_scene_has_five_short_captions_of_thousands_from_less_than_a_hundred_words():
    rng = random.Random(0)
    described = [describe_scene(sample_scene(rng), rng) for _ in range(1000)]
    assert {len(set(captions)) for captions in described} == {rules.CAPTIONS_PER_SCENE} == {5}
    sentences = {caption for captions in described for caption in captions}
    assert len(sentences) > 4000
    split = [caption.replace(",", " ,").split() for caption in sentences]
    assert max(map(len, split)) <= rules.MAX_WORDS
    assert 50 < len({word for words in split for word in words}) < 100
    assert all(caption == caption.lower() == " ".join(caption.split()) for caption in sentences)
    text = ". ".join(sentences)
    wrong = ("a orange", "an red", "is two", "are a ", "are one", "a two", "one circles")
    assert not [words for words in wrong if words in text], "articles and verbs agree with the nouns"


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(folder, tmp_path):
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    assert main(["data", "pocket", str(tmp_path / "again"), *flags]) == 0
    render_pocket(tmp_path / "other", **{**SETTINGS, "seed": 6})
    assert contents(tmp_path / "again") == contents(folder)
    assert contents(tmp_path / "other") != contents(folder)


@pytest.mark.parametrize("split", IMAGES)
def test_annotations_have_the_form_of_coco_and_a_side_file_has_the_scenes(folder, split):
    found, truth, has_captions = load(folder, split), read_scenes(folder, split), split != "test"
    images = {image["file_name"]: image for image in found["images"]}
    assert {path.name for path in (folder / f"{split}2017").iterdir()} == images.keys()
    assert len(images) == len(found["images"]) == IMAGES[split]
    for name, image in images.items():
        assert name == f"{image['id']:012d}.jpg"
        with Image.open(folder / f"{split}2017" / name) as picture:
            assert (picture.format, picture.mode) == ("JPEG", "RGB")
            assert picture.size == (image["width"], image["height"]) == (32, 32)
            drawn = np.asarray(draw_scene(truth[image["id"]], 32)).astype(int)
            assert np.abs(np.asarray(picture) - drawn).mean() < 5
    assert set(found) == {"info", "licenses", "images", *["annotations"] * has_captions}
    order = [annotation["image_id"] for annotation in found.get("annotations", [])]
    assert Counter(order) == dict.fromkeys(truth if has_captions else (), 5)
    assert (order != sorted(order)) == has_captions


def test_image_and_caption_ids_are_unique_over_all_splits(folder):
    for key in ("images", "annotations"):
        ids = [row["id"] for split in IMAGES for row in load(folder, split).get(key, [])]
        assert len(set(ids)) == len(ids)


def test_no_held_out_scene_occurs_in_training(tmp_path):
    render_pocket(tmp_path, num_train=600, num_val=300, image_size=8, seed=0)
    train, val = ([scene.attributes() for scene in read_scenes(tmp_path, split).values()] for split in ("train", "val"))
    assert (len(train), len(val), len(set(val))) == (600, 300, 300)
    assert not set(train) & set(val)


def test_attributes_ignore_the_order_and_the_jitter_of_objects():
    near, far = (Item("star", "red", "big", "top left", (at, at)) for at in (0.24, 0.26))
    other = Item("circle", "blue", "small", "top right", (0.75, 0.25))
    assert Scene((near, other), "grey").attributes() == Scene((other, far), "grey").attributes()


def test_a_folder_rendered_with_the_same_settings_is_left_alone_and_another_replaced(tmp_path):
    settings = {"num_train": 2, "num_val": 1, "image_size": 16}
    render_pocket(tmp_path, **settings, seed=1)
    first, times = contents(tmp_path), {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    render_pocket(tmp_path, **settings, seed=1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    (tmp_path / "pocket.json").write_text("{")  # damaged, as by a power loss
    render_pocket(tmp_path, **settings, seed=1)
    assert contents(tmp_path) == first
    render_pocket(tmp_path, **settings, seed=2)
    assert contents(tmp_path) != first


def test_an_interrupted_rendering_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(halves, "describe_scene", fail)
    with pytest.raises(KeyboardInterrupt):
        render_pocket(tmp_path / "data", **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_things_in_it_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="empty folder"):
        render_pocket(tmp_path, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
