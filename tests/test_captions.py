"""Captions as tokens: the masks, the shift and the limits agree for any text."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import new_folder
from datasets import Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from repro.data import captions as module
from repro.data.captions import caption_lengths, pack_tokens, shift_right, tokenize_captions, unpack_tokens
from repro.errors import InputError

START, LENGTH = 7, 12
texts = st.one_of(st.text(max_size=60), st.sampled_from(["", " ", "ÄÖ 🐈 كلب", "word " * 200, "A CAT"]))


def tokenize(captions, tokenizer, max_length=LENGTH, folder=None):
    dataset = Dataset.from_dict({"caption": captions}, Features({"caption": Value("string")}))
    return unpack_tokens(tokenize_captions(dataset, tokenizer, max_length, folder or new_folder()), START)


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


@given(st.lists(texts, min_size=1, max_size=5))
def test_captions_that_fill_a_row_are_those_that_may_have_been_cut(tokenizer, captions: list[str]) -> None:
    full = tokenize(captions, tokenizer)["decoder_attention_mask"].all(axis=1)
    assert full.tolist() == (caption_lengths(captions, tokenizer) >= LENGTH).tolist()


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


def test_tokens_are_kept_for_the_same_captions_tokenizer_and_length_alone(tokenizer, golden_inputs, tmp_path) -> None:
    captions = ["a cat", None, "two dogs", ""]
    fresh = tokenize(captions, tokenizer)
    tokenized = []

    class Recorder(type(tokenizer)):
        def __call__(self, texts, **options):
            tokenized.append(len(texts))
            return super().__call__(texts, **options)

    recorder = Recorder.from_pretrained(golden_inputs / "model", pad_token=tokenizer.pad_token)

    def count(captions, max_length=LENGTH) -> int:
        tokenized.clear()
        kept = tokenize(captions, recorder, max_length, tmp_path / "tokens")
        for name, array in tokenize(captions, tokenizer, max_length).items():
            np.testing.assert_array_equal(kept[name], array)
        return sum(tokenized)

    assert count(captions) == 3
    assert count(captions) == 0
    assert count(captions, max_length=9) == 3
    assert count(captions[:3]) == 2
    recorder.add_tokens(["zebra"])
    assert count(captions) == 3
    assert len(list((tmp_path / "tokens").glob("*.npy"))) == 4
    assert {name: array.dtype for name, array in fresh.items()} == dict.fromkeys(fresh, np.dtype(np.int32))


def test_a_large_vocabulary_keeps_its_numbers() -> None:
    labels = np.array([[70_000, 1, 2, 0, 0, 0, 0, 0, 9]], np.int32)
    mask = np.array([[1, 1, 1, 0, 0, 0, 0, 0, 1]], np.int32)
    tokens = unpack_tokens(pack_tokens(labels, mask), START)
    np.testing.assert_array_equal(tokens["labels"], labels)
    np.testing.assert_array_equal(tokens["decoder_attention_mask"], mask)


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
    tokens = tokenize(["A man riding a wave."], tokenizer, max_length=8)
    assert tokens["labels"].tolist() == [[64, 582, 10311, 257, 6769, 13, 220, 50256]]
    assert json.loads((folder / "tokenizer_cases.json").read_text())
