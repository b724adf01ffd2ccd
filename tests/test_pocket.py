"""Rendered scenes: what is drawn, what is said of it, and the COCO folder that holds both."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from repro.errors import InputError
from repro.pocket import halves as pocket
from repro.pocket import scenes as rules
from repro.pocket.halves import read_scenes
from repro.pocket.scenes import Item, Scene, describe_scene, draw_scene, sample_scene

SETTINGS = {"num_train": 30, "num_val": 8, "num_test": 3, "image_size": 32, "seed": 5}

scenes = st.integers(0, 2**32).map(lambda seed: sample_scene(random.Random(seed)))
seeds = st.integers(0, 2**32)


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load(folder: Path, name: str) -> dict:
    return json.loads((folder / "annotations" / name).read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pocket") / "data"
    pocket.render_pocket(folder, **SETTINGS)
    return folder


@given(scenes)
def test_an_object_s_colour_is_seen_at_its_position_and_the_background_in_the_corner(scene):
    side = 64
    pixels = np.asarray(draw_scene(scene, side))
    assert pixels.shape == (side, side, 3)
    for item in scene.objects:
        for at, name in zip(item.centre, rules.POSITIONS[item.position], strict=True):
            assert abs(at - name) <= rules.JITTER + 1e-3
        x, y = (int(at * side) for at in item.centre)
        assert tuple(pixels[y, x]) == rules.COLOURS[item.colour]
    assert tuple(pixels[0, 0]) == rules.BACKGROUNDS[scene.background]


@given(scenes)
def test_objects_do_not_touch_each_other(scene):
    """So the picture of all is the sum of the pictures of each, up to blended edge pixels."""
    ground = np.asarray(draw_scene(replace(scene, objects=()), 64))
    covered = sum(
        (np.asarray(draw_scene(replace(scene, objects=(item,)), 64)) != ground).any(-1).astype(int)
        for item in scene.objects
    )
    assert covered.max() == 1


@given(scenes, st.data())
def test_changing_any_attribute_changes_the_picture(scene, data):
    options = {
        "shape": rules.SHAPES,
        "colour": rules.COLOURS,
        "size": rules.SIZES,
        "background": rules.BACKGROUNDS,
    }
    name = data.draw(st.sampled_from(sorted(options)))
    owner = scene if name == "background" else scene.objects[0]
    other = data.draw(st.sampled_from([o for o in options[name] if o != getattr(owner, name)]))
    changed = replace(owner, **{name: other})
    if isinstance(changed, Item):
        changed = replace(scene, objects=(changed, *scene.objects[1:]))
    assert changed.attributes() != scene.attributes()
    assert draw_scene(changed, 64).tobytes() != draw_scene(scene, 64).tobytes()


def test_scenes_vary_in_all_they_can():
    rng = random.Random(0)
    drawn = [sample_scene(rng) for _ in range(600)]
    items = [item for scene in drawn for item in scene.objects]
    assert {item.shape for item in items} == set(rules.SHAPES)
    assert {item.colour for item in items} == set(rules.COLOURS)
    assert {item.size for item in items} == set(rules.SIZES)
    assert {item.position for item in items} == set(rules.POSITIONS)
    assert {scene.background for scene in drawn} == set(rules.BACKGROUNDS)
    assert {len(scene.objects) for scene in drawn} == set(range(1, rules.MAX_OBJECTS + 1))
    assert len({scene.attributes() for scene in drawn}) > 500


@given(scenes, seeds)
def test_a_scene_has_five_different_short_captions(scene, seed):
    captions = describe_scene(scene, random.Random(seed))
    assert len(set(captions)) == len(captions) == rules.CAPTIONS_PER_SCENE
    for caption in captions:
        assert len(caption.replace(",", " ,").split()) <= rules.MAX_WORDS
        assert caption == caption.lower() == " ".join(caption.split())


def test_the_grammar_yields_thousands_of_sentences_from_less_than_a_hundred_words():
    rng = random.Random(0)
    captions = [caption for _ in range(1000) for caption in describe_scene(sample_scene(rng), rng)]
    words = {word for caption in captions for word in caption.replace(",", " ,").split()}
    assert len(set(captions)) > 4000
    assert 50 < len(words) < 100


def test_articles_and_verbs_agree_with_the_nouns():
    rng = random.Random(1)
    text = ". ".join(c for _ in range(500) for c in describe_scene(sample_scene(rng), rng))
    for wrong in ("a orange", "an red", "is two", "are a ", "are one", "a two", "one circles"):
        assert wrong not in text


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(folder, tmp_path):
    pocket.render_pocket(tmp_path / "again", **SETTINGS)
    pocket.render_pocket(tmp_path / "other", **{**SETTINGS, "seed": 6})
    assert digest(tmp_path / "again") == digest(folder)
    assert digest(tmp_path / "other") != digest(folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_annotations_have_the_form_of_coco(folder, split):
    captions = load(folder, f"captions_{split}2017.json")
    assert set(captions) == {"info", "licenses", "images", "annotations"}
    assert len(captions["images"]) == SETTINGS[f"num_{split}"]
    for image in captions["images"]:
        assert image["file_name"] == f"{image['id']:012d}.jpg"
        with Image.open(folder / f"{split}2017" / image["file_name"]) as picture:
            assert (picture.format, picture.mode) == ("JPEG", "RGB")
            assert picture.size == (image["width"], image["height"]) == (32, 32)
    described = Counter(annotation["image_id"] for annotation in captions["annotations"])
    assert described == {image["id"]: 5 for image in captions["images"]}
    assert len({annotation["id"] for annotation in captions["annotations"]}) == described.total()
    order = [annotation["image_id"] for annotation in captions["annotations"]]
    assert order != sorted(order)


def test_the_test_split_has_pictures_and_no_captions(folder):
    info = load(folder, "image_info_test2017.json")
    assert "annotations" not in info
    names = {path.name for path in (folder / "test2017").iterdir()}
    assert names == {image["file_name"] for image in info["images"]}
    assert len(names) == SETTINGS["num_test"]


def test_image_and_caption_ids_are_unique_over_all_splits(folder):
    names = ("captions_train2017.json", "captions_val2017.json", "image_info_test2017.json")
    files = [load(folder, name) for name in names]
    for key in ("images", "annotations"):
        ids = [row["id"] for file in files for row in file.get(key, [])]
        assert len(set(ids)) == len(ids)


def test_the_side_file_holds_the_scene_of_every_picture(folder):
    for split in ("train", "val", "test"):
        for image_id, scene in read_scenes(folder, split).items():
            drawn = np.asarray(draw_scene(scene, 32)).astype(int)
            with Image.open(folder / f"{split}2017" / f"{image_id:012d}.jpg") as picture:
                assert np.abs(np.asarray(picture) - drawn).mean() < 5


def test_no_held_out_scene_occurs_in_training(tmp_path):
    pocket.render_pocket(tmp_path, num_train=1500, num_val=300, image_size=16, seed=0)
    train, val = ([scene.attributes() for scene in read_scenes(tmp_path, split).values()] for split in ("train", "val"))
    assert (len(train), len(val), len(set(val))) == (1500, 300, 300)
    assert not set(train) & set(val)


def test_attributes_ignore_the_order_and_the_jitter_of_objects():
    near, far = (Item("star", "red", "big", "top left", (at, at)) for at in (0.24, 0.26))
    other = Item("circle", "blue", "small", "top right", (0.75, 0.25))
    one, two = Scene((near, other), "grey"), Scene((other, far), "grey")
    assert one.attributes() == two.attributes()


def test_a_folder_rendered_with_the_same_settings_is_left_alone_and_another_replaced(tmp_path):
    settings = {"num_train": 2, "num_val": 1, "image_size": 16}
    pocket.render_pocket(tmp_path, **settings, seed=1)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    pocket.render_pocket(tmp_path, **settings, seed=1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    first = digest(tmp_path)
    (tmp_path / "pocket.json").write_text("{")  # damaged, as by a power loss
    pocket.render_pocket(tmp_path, **settings, seed=1)
    assert digest(tmp_path) == first
    pocket.render_pocket(tmp_path, **settings, seed=2)
    assert digest(tmp_path) != first


def test_an_interrupted_rendering_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pocket, "describe_scene", fail)
    with pytest.raises(KeyboardInterrupt):
        pocket.render_pocket(tmp_path / "data", **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_things_in_it_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="empty folder"):
        pocket.render_pocket(tmp_path, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
