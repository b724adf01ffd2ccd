"""BLEU and CIDEr-D: by hand where that can be done, and from pycocoevalcap's own words."""

import json
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro.errors import InputError
from repro.evaluation import caption_metrics
from repro.evaluation.caption_metrics import caption_scores, check_installed, split_words

REFERENCES = {
    "a.jpg": ["A dog runs over the green grass.", "a brown dog is running on grass"],
    "b.jpg": ["Two people ride their bikes down a street", "people on bikes"],
    "c.jpg": ["A bowl of soup, with bread!", "soup in a white bowl"],
}


@pytest.fixture(autouse=True, scope="module")
def without_java():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_metrics.shutil, "which", lambda _: None)
        yield


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog doesn't bark.", "a dog does n't bark"),
        ("The man's t-shirt (red) isn't his!", "the man 's t-shirt red is n't his"),
        ('a sign that says "stop" -- now...', "a sign that says stop now"),
        ("He cannot go; 1,000 of 3.5 and 1/2", "he can not go 1,000 of 3.5 and 1/2"),
        ("black & white, U.S. flag", "black & white u.s. flag"),
        ("on Main St. on the ground.A dog, made in the U.S.A", "on main st. on the ground.a dog made in the u.s.a"),
        ("  \n ", ""),
    ],
)
def test_captions_are_cut_as_the_treebank_does(caption, words):
    assert split_words(caption) == words.split()


def test_bleu_is_what_it_is_by_hand():
    references = {"x": ["the cat sat on the mat"], "y": ["a dog ran far away"]}
    captions = {"x": "the cat sat on mat", "y": "a dog ran far away"}
    scores, _ = caption_scores(captions, references)
    # Ten words, all of them in the references, against eleven: the brevity penalty alone.
    assert scores["bleu1"] == pytest.approx(math.exp(1 - 11 / 10), rel=1e-6)
    # Of 4 + 4 pairs one, "on mat", is in no reference.
    assert scores["bleu2"] == pytest.approx(math.exp(1 - 11 / 10) * math.sqrt(7 / 8), rel=1e-6)


def test_a_reference_itself_scores_best_and_another_images_scores_nothing():
    own, tokenizer = caption_scores({image: texts[0] for image, texts in REFERENCES.items()}, REFERENCES)
    others = {image: REFERENCES[other][0] for image, other in zip(REFERENCES, ["b.jpg", "c.jpg", "a.jpg"], strict=True)}
    wrong, _ = caption_scores(others, REFERENCES)
    assert own["bleu4"] == pytest.approx(1.0, abs=1e-6)
    assert own["cider"] > 3 > 0.2 > wrong["cider"]
    assert tokenizer == "split_words"


@given(st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_no_text_breaks_the_scores(texts):
    captions = {str(i): text for i, text in enumerate(texts)}
    scores, _ = caption_scores(captions, {i: [text, "a dog"] for i, text in captions.items()})
    assert all(math.isfinite(value) for value in scores.values())


def test_without_the_scorers_the_remedy_is_named(monkeypatch):
    check_installed()
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(InputError, match="pip install 'pycocoevalcap"):
        check_installed()


def test_without_java_the_scores_of_val2017_are_those_of_the_treebank_tokenizer(real_data):
    """One caption of each image against its others; the expected figures come from pycocoevalcap with PTBTokenizer."""
    rows = json.loads((real_data / "captions_val2017_full.json").read_bytes())["annotations"]
    of_image = {}
    for row in rows:
        of_image.setdefault(str(row["image_id"]), []).append(row["caption"])
    scores, _ = caption_scores(
        {image: first for image, (first, *_) in of_image.items()},
        {image: others for image, (_, *others) in of_image.items()},
    )
    by_treebank = {"bleu1": 0.63447, "bleu2": 0.43738, "bleu3": 0.29413, "bleu4": 0.19554, "cider": 0.88654}
    assert scores == pytest.approx(by_treebank, abs=5e-5)
