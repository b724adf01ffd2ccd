"""Captions as tokens: the masks, the shift and the limits agree for any text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from repro.data import captions as module
from repro.data.captions import shift_right, tokenize_captions
from repro.errors import InputError

START, LENGTH = 7, 12
texts = st.one_of(st.text(max_size=60), st.sampled_from(["", " ", "ÄÖ 🐈 كلب", "word " * 200, "A CAT"]))


def tokenize(captions, tokenizer, max_length=LENGTH):
    return tokenize_captions(captions, tokenizer, max_length=max_length, decoder_start_token_id=START)


@given(caption=texts)
def test_shift_and_masks_agree_for_any_caption(tokenizer, caption: str) -> None:
    tokens = tokenize([caption], tokenizer)
    labels, mask = tokens["labels"][0], tokens["decoder_attention_mask"][0]
    expected = [*tokenizer(caption.lower() + " ", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    count = min(len(expected), LENGTH)
    assert labels.tolist() == expected[:count] + [tokenizer.pad_token_id] * (LENGTH - count)
    assert mask.tolist() == [1] * count + [0] * (LENGTH - count)
    assert tokens["decoder_input_ids"][0].tolist() == [START, *labels[:-1]]
    assert {array.dtype for array in tokens.values()} == {np.dtype(np.int32)}


def test_a_caption_that_is_too_long_loses_its_eos_token(tokenizer) -> None:
    tokens = tokenize(["red " * 40], tokenizer)
    assert tokenizer.eos_token_id not in tokens["labels"]
    assert tokens["decoder_attention_mask"].all()


def test_a_row_without_a_caption_is_all_padding(tokenizer) -> None:
    tokens = tokenize([None, "a cat"], tokenizer)
    assert not tokens["decoder_attention_mask"][0].any()
    assert (tokens["labels"][0] == tokenizer.pad_token_id).all()
    assert tokens["decoder_attention_mask"][1].any()


def test_chunks_do_not_show(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = [f"caption {number}" for number in range(7)]
    whole = tokenize(captions, tokenizer)
    monkeypatch.setattr(module, "CHUNK", 3)
    for name, array in tokenize(captions, tokenizer).items():
        np.testing.assert_array_equal(array, whole[name])


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_shift_right_moves_every_token_by_one(rows: int, length: int, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, 100, (rows, length), dtype=np.int32)
    before = labels.copy()
    shifted = shift_right(labels, START)
    assert (shifted[:, 0] == START).all()
    np.testing.assert_array_equal(shifted[:, 1:], labels[:, :-1])
    np.testing.assert_array_equal(labels, before)


@pytest.mark.parametrize("name", ["pad_token", "eos_token"])
def test_a_tokenizer_without_a_needed_token_is_refused(golden_inputs, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden_inputs / "model")
    tokenizer.pad_token = tokenizer.eos_token
    setattr(tokenizer, name, None)
    with pytest.raises(InputError, match=name):
        tokenize(["a cat"], tokenizer)


def test_gpt2s_own_tokenizer_gives_its_known_ids(real_data) -> None:
    import json

    from transformers import GPT2TokenizerFast

    folder = real_data / "gpt2_tokenizer"
    tokenizer = GPT2TokenizerFast.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokens = tokenize_captions(["A man riding a wave."], tokenizer, max_length=8, decoder_start_token_id=50256)
    assert tokens["labels"].tolist() == [[64, 582, 10311, 257, 6769, 13, 220, 50256]]
    assert json.loads((folder / "tokenizer_cases.json").read_text())
