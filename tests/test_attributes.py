"""What captions claim of rendered scenes, and whether it is true."""

from __future__ import annotations

import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro.pocket.attributes import attribute_accuracy, judge_claims, mentioned
from repro.pocket.scenes import BACKGROUNDS, COLOURS, SHAPES, Item, Scene, describe_scene, sample_scene

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


def false_claims(caption, scene=SCENE):
    return {kind for kind, is_true in judge_claims(mentioned(caption), scene) if not is_true}


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
    item, number = scene.objects[0], len(scene.groups()[0])
    if kind == "count":
        old = f"{item.colour} {item.shape}" + "s" * (number > 1)
        new = f"{'two' if number != 2 else 'three'} {old}"
    else:
        absent = set(COLOURS if kind == "colour" else SHAPES) - {getattr(other, kind) for other in scene.objects}
        old, new = getattr(item, kind), data.draw(st.sampled_from(sorted(absent)))
    wrong = caption.replace(old, new)
    assert wrong != caption
    assert kind in false_claims(wrong, scene)
    result = attribute_accuracy([wrong], [scene])
    assert result["exact_match"] == 0
    assert result[f"{kind}_accuracy"] < 1


CLAIMS = {
    "": [
        *("two big red circles and a small blue star", "two red circles above a blue star on a grey background"),
        *("three shapes", "there are three shapes, two red circles and a blue star", "two circles", "the red circles"),
        "a little blue star with two red circles over it",
        "in the bottom left corner is a blue star and at the top are two red circles",
    ],
    "count": [
        *("four shapes, two red circles and a blue star", "a red circle", "three red circles"),
        *("two circle and two star", "a blue star and a blue star", "two two red circles and a big three blue star"),
    ],
    "colour count": ["two blue circles", "two red stars", "a grey star", "a green", "a green blue star"],
    "shape colour count": ["two red squares"],
    "size": ["two small red circles"],
    "position": ["two red circles on the left", "a blue star in the bottom right", "a blue star in the middle"],
    "relation": [
        *("two red circles below a blue star", "two red circles to the left of a blue star"),
        "two red circles with a blue star above them",
    ],
    "background": ["a blue star against a white background", "a blue star on a red background"],
}


@pytest.mark.parametrize(("false", "caption"), [(kinds, each) for kinds, of in CLAIMS.items() for each in of])
def test_a_claim_is_true_only_of_objects_of_the_stated_shape_and_colour(caption, false):
    assert judge_claims(mentioned(caption), SCENE)
    assert false_claims(caption) == set(false.split())


@pytest.mark.parametrize("caption", ["", "a picture of a", "we see and with the", "to the left of it", "?"])
def test_a_caption_without_attributes_claims_nothing_and_is_counted(caption):
    assert judge_claims(mentioned(caption), SCENE) == []
    alone = attribute_accuracy([caption], [SCENE])
    assert alone["captions_without_attributes"] == 1
    assert alone["attribute_accuracy"] == alone["exact_match"] == alone["attribute_mentions"] == 0
    assert attribute_accuracy([caption, "two red circles"], [SCENE, SCENE])["attribute_accuracy"] == 1


def test_each_claim_weighs_the_same_whatever_its_caption_and_kind():
    # Truths: colour, shape, count; then shape alone of colour, shape, count, size; background not.
    result = attribute_accuracy(["a blue star", "a big green star on a white background"], [SCENE, SCENE])
    assert (result["attribute_accuracy"], result["attribute_mentions"]) == (4 / 8, 8)
    by_kind = {"colour": (1 / 2, 2), "shape": (1, 2), "background": (0, 1), "relation": (0, 0)}
    assert {kind: (result[f"{kind}_accuracy"], result[f"{kind}_mentions"]) for kind in by_kind} == by_kind


def test_an_exact_match_states_every_object_and_nothing_false():
    silent_on_star, silent_on_count = "two red circles", "red circles and a blue star"
    for caption in (silent_on_star, silent_on_count, "three shapes", "two red circles and a big blue star"):
        assert attribute_accuracy([caption], [SCENE])["exact_match"] == 0
    assert attribute_accuracy(["two red circles and a blue star"], [SCENE])["exact_match"] == 1


def test_sides_belong_to_the_group_of_their_clause():
    before = mentioned("in the top left is a red circle and on the right a blue star")
    after = mentioned("a red circle in the top left and a blue star on the right")
    assert before.phrases == after.phrases
    assert [set(phrase.sides) for phrase in after.phrases] == [{"top", "left"}, {"right"}]


@given(scenes, seeds, st.text(string.printable), st.permutations(range(4)))
def test_any_text_can_be_read_in_any_order_of_rows(scene, seed, text, order):
    words = [*describe_scene(scene, random.Random(seed))[0].split(), text]
    random.Random(seed).shuffle(words)
    captions, truth = [text, " ".join(words), "", "two red circles"], [scene, scene, SCENE, SCENE]
    result = attribute_accuracy(captions, truth)
    assert 0 <= result["attribute_accuracy"] <= 1
    assert attribute_accuracy([captions[row] for row in order], [truth[row] for row in order]) == result


def test_no_background_could_be_taken_for_an_object():
    assert not set(COLOURS) & set(BACKGROUNDS)
