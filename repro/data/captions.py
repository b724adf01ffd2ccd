"""Captions as token arrays, by the rules of the example: tokenized once, kept compact on disk."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from repro.data.atomic import build_once, writing_only_below
from repro.data.rows import column
from repro.errors import InputError

CHUNK = 10_000  # captions tokenized at once, by all threads of the tokenizers library: bounds what is in memory


def shift_right(labels: np.ndarray, decoder_start_token_id: int) -> np.ndarray:
    """Make each position of int32[N,T] the one before it predicts, and the first one the start token; int32[N,T]."""
    return np.insert(labels[:, :-1], 0, decoder_start_token_id, axis=1)


def tokenize_captions(dataset: Dataset, tokenizer: Any, max_length: int, folder: Path) -> np.ndarray:
    """Tokenize lower-cased captions with a closing eos token, padded and truncated to one length.

    A caption that is too long loses its eos token. A row without a caption is all padding under an all-zero mask.

    Args:
        dataset: N rows with a `caption`.
        folder: where the tokens are kept.

    Returns:
        records[N] as `pack_tokens` makes, on disk.

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
    chunks = _tokenize(column(dataset, "caption"), tokenizer, max_length, kind)
    parts = (_fingerprint(dataset), len(dataset), max_length, tokenizer_fingerprint(tokenizer))
    file = folder / f"{sha256(repr(parts).encode()).hexdigest()[:32]}.npy"
    build_once(file, "the tokens of the captions", partial(_save, chunks=chunks, count=len(dataset)))
    records = np.load(file, mmap_mode="r")
    assert len(records) == len(dataset)
    return records


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
    """Put labels and attention mask int32[N,T] into records[N], labels as numbers of a kind, masks as bits."""
    length = labels.shape[1]
    record = [("labels", kind, (length,)), ("mask", np.uint8, (-(-length // 8),))]
    records = np.zeros(len(labels), record)
    records["labels"], records["mask"] = labels, np.packbits(mask.astype(bool), axis=1)
    return records


def unpack_tokens(records: np.ndarray, decoder_start_token_id: int) -> dict[str, np.ndarray]:
    """Give `labels`, `decoder_input_ids` and `decoder_attention_mask`, int32[B,T], of records[B].

    The mask is the tokenizer's attention mask and serves the loss too: GPT-2 pads with its eos token, so the labels
    alone do not tell padding.
    """
    labels = records["labels"].astype(np.int32)
    return {
        "labels": labels,
        "decoder_input_ids": shift_right(labels, decoder_start_token_id),
        "decoder_attention_mask": np.unpackbits(records["mask"], axis=1, count=labels.shape[1]).astype(np.int32),
    }


def _fingerprint(dataset: Dataset) -> str:
    digest = sha256()
    for caption in column(dataset, "caption"):
        digest.update(b"\0" if caption is None else caption.encode() + b"\n")
    return digest.hexdigest()


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
