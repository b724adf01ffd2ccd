"""What captions claim of rendered scenes, and whether it is true."""

from __future__ import annotations

import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro.pocket.attributes import attribute_accuracy, judge, mentioned
from repro.pocket.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Item,
    Scene,
    describe_scene,
    sample_scene,
)

scenes = st.integers(0, 2**32).map(lambda seed: sample_scene(random.Random(seed)))
seeds = st.integers(0, 2**32)

# Two big red circles at the top, a small blue star in the bottom left, on grey.
SCENE = Scene(
    (
        Item("circle", "red", "big", "top left", (0.25, 0.25)),
        Item("circle", "red", "big", "top right", (0.75, 0.25)),
        Item("star", "blue", "small", "bottom left", (0.25, 0.75)),
    ),
    "grey",
)


def false_claims(caption: str, scene: Scene = SCENE) -> set[str]:
    return {kind for kind, is_true in judge(mentioned(caption), scene) if not is_true}


@given(scenes, seeds)
def test_every_caption_of_the_grammar_is_true_and_complete(scene, seed):
    captions = describe_scene(scene, random.Random(seed))
    result = attribute_accuracy(captions, [scene] * len(captions))
    assert result["attribute_accuracy"] == result["exact_match"] == 1
    assert result["captions_without_attributes"] == 0
    assert all(result[f"{kind}_mentions"] >= len(captions) for kind in ("colour", "shape", "count"))


@given(scenes, seeds, st.data())
def test_a_wrong_colour_shape_or_count_is_caught(scene, seed, data):
    caption = describe_scene(scene, random.Random(seed))[0]
    kind = data.draw(st.sampled_from(["colour", "shape", "count"]))
    item = scene.objects[0]
    if kind == "colour":
        absent = set(COLOURS) - {other.colour for other in scene.objects}
        old, new = item.colour, data.draw(st.sampled_from(sorted(absent)))
    elif kind == "shape":
        absent = set(SHAPES) - {other.shape for other in scene.objects}
        old, new = item.shape, data.draw(st.sampled_from(sorted(absent)))
    else:
        number = len(scene.groups()[0])
        old = f"{item.colour} {item.shape}" + "s" * (number > 1)
        new = f"{'two' if number != 2 else 'three'} {old}"
    wrong = caption.replace(old, new)
    assert wrong != caption
    assert kind in false_claims(wrong, scene)
    result = attribute_accuracy([wrong], [scene])
    assert result["exact_match"] == 0
    assert result[f"{kind}_accuracy"] < 1


@pytest.mark.parametrize(
    ("caption", "false"),
    [
        ("two big red circles and a small blue star", set()),
        ("two red circles above a blue star on a grey background", set()),
        ("a little blue star with two red circles over it", set()),
        ("in the bottom left corner is a blue star and at the top are two red circles", set()),
        ("there are three shapes, two red circles and a blue star", set()),
        ("three shapes", set()),
        ("two circles", set()),
        ("the red circles", set()),
        ("four shapes, two red circles and a blue star", {"count"}),
        ("a red circle", {"count"}),
        ("three red circles", {"count"}),
        ("two circle and two star", {"count"}),
        ("a blue star and a blue star", {"count"}),
        ("two blue circles", {"colour", "count"}),
        ("two red stars", {"colour", "count"}),
        ("a grey star", {"colour", "count"}),
        ("a green", {"colour", "count"}),
        ("a green blue star", {"colour", "count"}),
        ("two two red circles and a big three blue star", {"count"}),
        ("two red squares", {"shape", "colour", "count"}),
        ("two small red circles", {"size"}),
        ("two red circles on the left", {"position"}),
        ("a blue star in the bottom right", {"position"}),
        ("a blue star in the middle", {"position"}),
        ("two red circles below a blue star", {"relation"}),
        ("two red circles to the left of a blue star", {"relation"}),
        ("two red circles with a blue star above them", {"relation"}),
        ("a blue star against a white background", {"background"}),
        ("a blue star on a red background", {"background"}),
    ],
)
def test_a_claim_is_true_only_of_objects_of_the_stated_shape_and_colour(caption, false):
    assert judge(mentioned(caption), SCENE)
    assert false_claims(caption) == false


@pytest.mark.parametrize("caption", ["", "a picture of a", "we see and with the", "left of it", "?"])
def test_a_caption_without_attributes_claims_nothing_and_is_counted(caption):
    assert judge(mentioned(caption), SCENE) == []
    alone = attribute_accuracy([caption], [SCENE])
    assert alone["captions_without_attributes"] == 1
    assert alone["attribute_accuracy"] == alone["exact_match"] == alone["attribute_mentions"] == 0
    beside = attribute_accuracy([caption, "two red circles"], [SCENE, SCENE])
    assert beside["attribute_accuracy"] == 1


def test_each_claim_weighs_the_same_whatever_its_caption_and_kind():
    # Truths: colour, shape, count; then shape alone of colour, shape, count, size; background not.
    captions = ["a blue star", "a big green star on a white background"]
    result = attribute_accuracy(captions, [SCENE, SCENE])
    assert result["attribute_mentions"] == 8
    assert result["attribute_accuracy"] == 4 / 8
    assert (result["colour_accuracy"], result["colour_mentions"]) == (1 / 2, 2)
    assert (result["shape_accuracy"], result["shape_mentions"]) == (1, 2)
    assert (result["background_accuracy"], result["background_mentions"]) == (0, 1)
    assert (result["relation_accuracy"], result["relation_mentions"]) == (0, 0)


@pytest.mark.parametrize(
    ("caption", "exact"),
    [
        ("two red circles and a blue star", 1),
        ("two red circles", 0),  # silent on the star
        ("three shapes", 0),
        ("red circles and a blue star", 0),  # silent on the count
        ("two red circles and a big blue star", 0),
    ],
)
def test_an_exact_match_states_every_object_and_nothing_false(caption, exact):
    assert attribute_accuracy([caption], [SCENE])["exact_match"] == exact


def test_sides_belong_to_the_group_of_their_clause():
    before = mentioned("in the top left is a red circle and on the right a blue star")
    after = mentioned("a red circle in the top left and a blue star on the right")
    assert before.phrases == after.phrases
    assert [set(phrase.sides) for phrase in after.phrases] == [{"top", "left"}, {"right"}]


@given(scenes, st.permutations(range(4)))
def test_accuracy_does_not_depend_on_the_order_of_rows(scene, order):
    captions = ["two red circles", "a blue star", "", "a small square on a black background"]
    truth = [scene, SCENE, scene, SCENE]
    shuffled = [captions[i] for i in order], [truth[i] for i in order]
    assert attribute_accuracy(*shuffled) == attribute_accuracy(captions, truth)


@given(scenes, seeds, st.text(string.printable))
def test_any_text_can_be_read(scene, seed, text):
    words = [*describe_scene(scene, random.Random(seed))[0].split(), text]
    random.Random(seed).shuffle(words)
    for caption in (text, " ".join(words)):
        assert 0 <= attribute_accuracy([caption], [scene])["attribute_accuracy"] <= 1


def test_no_background_could_be_taken_for_an_object():
    assert not set(COLOURS) & set(BACKGROUNDS)
