"""Captions as tokens: the masks, the shift and the limits agree for any text."""

import json

import numpy as np
import pytest
from conftest import new_folder
from datasets import Dataset, Features, Value
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2TokenizerFast

from repro.data import captions as module
from repro.data.captions import caption_lengths, pack_tokens, tokenize_captions, unpack_tokens
from repro.errors import InputError

START, LENGTH = 7, 12
texts = st.one_of(st.text(max_size=60), st.sampled_from(["", " ", "ÄÖ 🐈 كلب", "word " * 200, "A CAT"]))


def tokenize(captions, tokenizer, max_length=LENGTH, folder=None):
    dataset = Dataset.from_dict({"caption": captions}, Features({"caption": Value("string")}))
    return unpack_tokens(tokenize_captions(dataset, tokenizer, max_length, folder or new_folder()), START)


def assert_same(tokens, expected):
    assert set(tokens) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(tokens[name], array)


@settings(max_examples=25)
@given(st.lists(st.none() | texts, min_size=1, max_size=6))
@example(["red " * 40, None, "a cat"])  # too long, which costs the eos token, and none, which is all padding
def test_shift_masks_and_lengths_agree_for_any_captions(tokenizer, captions):
    tokens, lengths = tokenize(captions, tokenizer), caption_lengths(captions, tokenizer)
    for row, caption in enumerate(captions):
        words = [] if caption is None else tokenizer(caption.lower() + " ", add_special_tokens=False).input_ids
        expected = [] if caption is None else [*words, tokenizer.eos_token_id]
        assert lengths[row] == len(expected)
        padding = LENGTH - len(expected[:LENGTH])
        labels = expected[:LENGTH] + [tokenizer.pad_token_id] * padding
        assert tokens["labels"][row].tolist() == labels
        assert tokens["decoder_input_ids"][row].tolist() == [START, *labels[:-1]]
        assert tokens["decoder_attention_mask"][row].tolist() == [1] * (LENGTH - padding) + [0] * padding
    assert {array.dtype for array in tokens.values()} == {np.dtype(np.int32)}


def test_chunks_do_not_show(tokenizer, monkeypatch):
    captions = [f"caption {number}" for number in range(7)]
    whole = tokenize(captions, tokenizer)
    monkeypatch.setattr(module, "CHUNK", 3)
    assert_same(tokenize(captions, tokenizer), whole)


def test_tokens_are_kept_for_the_same_captions_tokenizer_and_length_alone(tokenizer, golden_inputs, tmp_path):
    captions, tokenized = ["a cat", None, "two dogs", ""], []

    class Recorder(type(tokenizer)):
        def __call__(self, texts, **options):
            tokenized.append(len(texts))
            return super().__call__(texts, **options)

    recorder = Recorder.from_pretrained(golden_inputs / "model", pad_token=tokenizer.pad_token)

    def count(captions=captions, max_length=LENGTH):
        tokenized.clear()
        tokens = tokenize(captions, recorder, max_length, tmp_path)
        assert_same(tokens, tokenize(captions, tokenizer, max_length))
        return sum(tokenized)

    assert [count(), count()] == [3, 0]
    assert count(max_length=9) == 3
    assert count(captions[:3]) == 2
    recorder.add_tokens(["zebra"])
    assert count() == 3
    assert len(list(tmp_path.glob("*.npy"))) == 4


def test_a_large_vocabulary_keeps_its_numbers():
    labels = np.array([[70_000, 1, 2, 0, 0, 0, 0, 0, 9]], np.int32)
    mask = np.array([[1, 1, 1, 0, 0, 0, 0, 0, 1]], np.int32)
    tokens = unpack_tokens(pack_tokens(labels, mask), START)
    np.testing.assert_array_equal(tokens["labels"], labels)
    np.testing.assert_array_equal(tokens["decoder_attention_mask"], mask)


@pytest.mark.parametrize("name", ["pad_token", "eos_token"])
def test_a_tokenizer_without_a_needed_token_is_refused(golden_inputs, name):
    tokenizer = AutoTokenizer.from_pretrained(golden_inputs / "model")
    tokenizer.pad_token = tokenizer.eos_token
    setattr(tokenizer, name, None)
    with pytest.raises(InputError, match=name):
        tokenize(["a cat"], tokenizer)


def test_gpt2s_own_tokenizer_gives_its_known_ids(real_data):
    folder = real_data / "gpt2_tokenizer"
    tokenizer = GPT2TokenizerFast.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokens = tokenize(["A man riding a wave."], tokenizer, max_length=8)
    assert tokens["labels"].tolist() == [[64, 582, 10311, 257, 6769, 13, 220, 50256]]
    assert json.loads((folder / "tokenizer_cases.json").read_text())
