"""Generation settings of public models: constraints against plain Python, ends, and what is left out by name."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_beam_search import ROWS, compiled, images, randomized
from transformers import GenerationConfig

from repro import Captioner
from repro.__main__ import main
from repro.models.generation import LEFT_OUT, constrained, left_out, search_settings
from repro.models.pretrained import load_model

VOCABULARY, POSITIONS = 5, 7


def expected_scores(sequence, scores, *, repetition_penalty, no_repeat_ngram_size, min_length, end_token_ids):
    """The rules of PyTorch's processors for one beam, as sentences: float32[V] and the tokens so far."""
    scores, size = scores.copy(), no_repeat_ngram_size
    for token in set(sequence):
        scores[token] *= repetition_penalty if scores[token] < 0 else 1 / repetition_penalty
    grams = {tuple(sequence[start : start + size]) for start in range(len(sequence) - size + 1)} if size else set()
    for token in range(len(scores)):
        if size and (*sequence[len(sequence) - size + 1 :], token) in grams:
            scores[token] = -np.inf
    if len(sequence) < min_length:
        scores[end_token_ids] = -np.inf
    return scores


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    length=st.integers(1, POSITIONS),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
    no_repeat_ngram_size=st.integers(0, 4),
    min_length=st.integers(0, POSITIONS),
    end_token_ids=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3, unique=True),
)
def test_scores_are_constrained_beam_by_beam(seed, length, **rules):
    random = np.random.default_rng(seed)
    sequences = random.integers(0, VOCABULARY, (2, 3, POSITIONS), dtype=np.int32)
    scores = random.standard_normal((2, 3, VOCABULARY)).astype(np.float32)
    found = np.asarray(constrained(jnp.asarray(sequences), jnp.asarray(length), jnp.asarray(scores), **rules))
    for row, beam in np.ndindex(2, 3):
        expected = expected_scores(sequences[row, beam, :length].tolist(), scores[row, beam], **rules)
        np.testing.assert_allclose(found[row, beam], expected, rtol=1e-6)


def asking(model, **asked):
    """The model with these generation settings."""
    config = GenerationConfig.from_model_config(model.captioner.config)
    config.update(**asked)
    return dataclasses.replace(model, captioner=dataclasses.replace(model.captioner, generation_config=config))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_one_end_may_be_written_as_a_list_and_of_several_each_ends(golden_inputs, num_beams):
    model = load_model(str(golden_inputs / "model"))
    params, pixels, ends = randomized(model.params, 3), images(3), [0, *range(20, 320)]
    one, same, several = (
        np.asarray(compiled(asking(model, eos_token_id=end), num_beams, 12, "exact", ROWS)(params, pixels).tokens[:, 0])
        for end in (0, [0], ends)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != several).any(), "they end earlier"
    for row in several:
        end = np.flatnonzero(np.isin(row[1:], ends))
        assert not len(end) or not row[2 + end[0] :].any(), "nothing follows an end"


ASKED = {"no_repeat_ngram_size": 3, "min_length": 5, "repetition_penalty": 1.5, "num_beams": 4}


def folder_asking(golden_inputs, tmp_path, file, **asked):
    folder = Path(shutil.copytree(golden_inputs / "model", tmp_path / "model"))
    (folder / "generation_config.json").unlink()
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(content | asked))
    return str(folder)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_settings_are_read_from_either_file_and_what_is_left_out_is_named(golden_inputs, tmp_path, file):
    path = folder_asking(golden_inputs, tmp_path, file, **ASKED, do_sample=True, suppress_tokens=[5], top_k=10)
    model = load_model(path)
    found = search_settings(model.captioner) | {"num_beams": model.captioner.generation_config.num_beams}
    assert {name: found[name] for name in ASKED} == ASKED
    assert [note.split()[1] for note in model.notes if "left out" in note] == ["do_sample", "suppress_tokens"]


def test_neutral_settings_are_not_named():
    assert not list(left_out(GenerationConfig()))
    assert not list(left_out(GenerationConfig(**LEFT_OUT)))
    assert [line.split()[1] for line in left_out(GenerationConfig(max_time=1))] == ["max_time"]


def test_an_evaluation_captions_as_the_model_asks_and_says_how(golden_inputs, tmp_path):
    path, rows = folder_asking(golden_inputs, tmp_path, "generation_config.json", **ASKED), tmp_path / "rows.jsonl"
    images = sorted(map(str, (golden_inputs / "images" / "test").glob("*.jpg")))[:3]
    rows.write_text("".join(json.dumps({"image": image, "caption": "a dog"}) + "\n" for image in images))
    where = ["--model_name_or_path", path, "--output_dir", str(tmp_path / "run"), "--validation_file", str(rows)]
    how = ["--do_eval", "--predict_with_generate", "--max_target_length", "12", "--num_beams", "4"]
    assert main(["train", *where, *how, "--cache_dir", str(tmp_path / "cache")]) == 0
    said = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["eval"]["search"]
    assert {name: said[name] for name in ASKED} == ASKED
    assert (said["max_length"], said["stop_rule"], said["end_token_ids"]) == (12, "exact", [0])
    captions = Captioner.from_pretrained(path)(images, max_length=12)
    found = json.loads((tmp_path / "run" / "eval_generation.json").read_text())
    assert [row["pred"].strip() for row in found] == [caption.caption for (caption,) in captions]
