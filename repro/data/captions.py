"""Captions as token arrays, by the example's rules (REFERENCE section 3): tokenized once, kept compact on disk."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from repro.data.atomic import build_once, writing_only_below
from repro.errors import InputError

CHUNK = 10_000  # captions tokenized at once, by all threads of the tokenizers library: bounds what is in memory


@dataclass(frozen=True)
class TokenizedCaptions:
    """The captions of N rows, each of T tokens."""

    records: np.ndarray  # [N], `labels` uint16[T] or int32[T] and `mask` (bits) uint8[ceil(T / 8)]; maybe on disk
    decoder_start_token_id: int  # the first of the decoder's inputs

    def __getitem__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Gather rows int[B]: `labels`, `decoder_input_ids` and `decoder_attention_mask`, int32[B,T].

        The mask is the tokenizer's attention mask and serves the loss too: GPT-2 pads with its eos token, so the labels
        alone do not tell padding.
        """
        records = self.records[rows]
        labels = records["labels"].astype(np.int32)
        return {
            "labels": labels,
            "decoder_input_ids": shift_right(labels, self.decoder_start_token_id),
            "decoder_attention_mask": np.unpackbits(records["mask"], axis=1, count=labels.shape[1]).astype(np.int32),
        }

    def given(self, rows: np.ndarray) -> np.ndarray:
        """Tell which of rows int[B] have a caption, bool[B]: even an empty one has an eos token."""
        return np.any(self.records["mask"][rows], axis=1)

    def full(self, rows: np.ndarray) -> np.ndarray:
        """Tell which of rows int[B] have all of T tokens, bool[B], and so may have been cut."""
        ones = np.packbits(np.ones(self.records.dtype["labels"].shape, bool))
        return np.all(self.records["mask"][rows] == ones, axis=1)


def shift_right(labels: np.ndarray, decoder_start_token_id: int) -> np.ndarray:
    """Make each position of int32[N,T] the one before it predicts, and the first one the start token; int32[N,T]."""
    return np.insert(labels[:, :-1], 0, decoder_start_token_id, axis=1)


def tokenize_captions(
    captions: Iterable[str | None],
    num_captions: int,
    tokenizer: Any,
    *,
    max_length: int,
    decoder_start_token_id: int,
    cache: tuple[Path, str] | None = None,
) -> TokenizedCaptions:
    """Tokenize lower-cased captions with a closing eos token, padded and truncated to one length.

    A caption that is too long loses its eos token. A row without a caption is all padding under an all-zero mask.

    Args:
        captions: not touched where the cache has their tokens.
        cache: a folder, and a fingerprint of the captions; None to keep the tokens in memory.

    Raises:
        InputError: the tokenizer has no pad or no eos token, or the cache cannot be written.
    """
    for name in ("pad_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise InputError(
                f"the tokenizer {tokenizer.name_or_path!r} has no {name}; set it, for GPT-2"
                f" `tokenizer.{name} = '<|endoftext|>'`, and save the tokenizer again."
            )
    kind = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    chunks = _tokenize(iter(captions), tokenizer, max_length, kind)
    if cache is None:
        records = np.concatenate(list(chunks))
    else:
        folder, fingerprint = cache
        parts = (fingerprint, num_captions, max_length, tokenizer_fingerprint(tokenizer))
        file = folder / f"{sha256(repr(parts).encode()).hexdigest()[:32]}.npy"
        build_once(file, "the tokens of the captions", partial(_save, chunks=chunks, count=num_captions))
        records = np.load(file, mmap_mode="r")
    assert len(records) == num_captions
    return TokenizedCaptions(records, decoder_start_token_id)


def caption_lengths(captions: Iterable[str | None], tokenizer: Any) -> np.ndarray:
    """Count the tokens of each caption with its eos token, before anything is cut, int32[N]; 0 where there is none."""
    chunks = [np.zeros(0, np.int32)]
    for count, given, texts in _target_texts(iter(captions), tokenizer):
        lengths = np.zeros(count, np.int32)
        lengths[given] = [len(ids) for ids in tokenizer(texts).input_ids] if given else []
        chunks.append(lengths)
    return np.concatenate(chunks)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash all that a tokenizer saves, but for the truncation and padding of its last call."""
    digest = sha256(type(tokenizer).__name__.encode())
    with tempfile.TemporaryDirectory() as folder:
        with writing_only_below(Path(folder)):
            tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            content = file.read_bytes() if file.is_file() else b""
            if file.name == "tokenizer.json":
                state = json.loads(content)
                content = json.dumps({**state, "truncation": None, "padding": None}, sort_keys=True).encode()
            digest.update(content)
    return digest.hexdigest()


def pack_tokens(labels: np.ndarray, mask: np.ndarray, kind: Any = np.int32) -> np.ndarray:
    """Put labels and attention mask int32[N,T] into the records of `TokenizedCaptions`, labels as numbers of a kind."""
    length = labels.shape[1]
    record = [("labels", kind, (length,)), ("mask", np.uint8, (-(-length // 8),))]
    records = np.zeros(len(labels), record)
    records["labels"], records["mask"] = labels, np.packbits(mask.astype(bool), axis=1)
    return records


def _tokenize(captions: Iterator[str | None], tokenizer: Any, max_length: int, kind: Any) -> Iterator[np.ndarray]:
    for count, given, texts in _target_texts(captions, tokenizer):
        labels = np.full((count, max_length), tokenizer.pad_token_id, np.int32)
        mask = np.zeros_like(labels)
        if given:
            how = {"max_length": max_length, "padding": "max_length", "truncation": True, "return_tensors": "np"}
            encoded = tokenizer(texts, **how)
            labels[given], mask[given] = encoded["input_ids"], encoded["attention_mask"]
        yield pack_tokens(labels, mask, kind)


def _target_texts(captions: Iterator[str | None], tokenizer: Any) -> Iterator[tuple[int, list[int], list[str]]]:
    """Give chunks: their number of rows, which of them have a caption, and what is tokenized of these."""
    while chunk := list(islice(captions, CHUNK)):
        given = [row for row, caption in enumerate(chunk) if caption is not None]
        yield len(chunk), given, [f"{str(chunk[row]).lower()} {tokenizer.eos_token}" for row in given]


def _save(file: Path, chunks: Iterator[np.ndarray], count: int) -> None:
    first = next(chunks)
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": (count,)}
    with file.open("wb") as opened:
        np.lib.format.write_array_header_2_0(opened, header)
        opened.writelines(chunk.tobytes() for chunk in chain([first], chunks))
