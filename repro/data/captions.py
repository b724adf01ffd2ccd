"""Captions as token arrays, by the example's rules (REFERENCE section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from repro.errors import InputError

CHUNK = 10_000
"""Captions tokenized at once: bounds the Python lists between tokenizer and arrays."""


def shift_right(labels: np.ndarray, decoder_start_token_id: int) -> np.ndarray:
    """Make each position the one before it predicts.

    Args:
        labels: int32[N,T]
        decoder_start_token_id: what the first position becomes.

    Returns:
        int32[N,T]
    """
    shifted = np.empty_like(labels)
    shifted[:, 0] = decoder_start_token_id
    shifted[:, 1:] = labels[:, :-1]
    return shifted


def tokenize_captions(
    captions: Sequence[str | None], tokenizer: Any, *, max_length: int, decoder_start_token_id: int
) -> dict[str, np.ndarray]:
    """Tokenize lower-cased captions with a closing eos token, padded and truncated to one length.

    A caption that is too long loses its eos token. A row without a caption is all padding under an all-zero mask.

    Returns:
        `labels`, `decoder_input_ids` and `decoder_attention_mask`, int32[N,T]. The mask is the tokenizer's attention
        mask and serves the loss too: GPT-2 pads with its eos token, so the labels alone do not tell padding.

    Raises:
        InputError: the tokenizer has no pad or no eos token.
    """
    for name in ("pad_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise InputError(
                f"the tokenizer {tokenizer.name_or_path!r} has no {name}; set it, for GPT-2"
                f" `tokenizer.{name} = '<|endoftext|>'`, and save the tokenizer again."
            )
    labels = np.full((len(captions), max_length), tokenizer.pad_token_id, np.int32)
    mask = np.zeros_like(labels)
    given = [row for row, caption in enumerate(captions) if caption is not None]
    for start in range(0, len(given), CHUNK):
        rows = given[start : start + CHUNK]
        encoded = tokenizer(
            [f"{str(captions[row]).lower()} {tokenizer.eos_token}" for row in rows],
            max_length=max_length,
            padding="max_length",
            truncation=True,
            return_tensors="np",
        )
        labels[rows] = encoded["input_ids"]
        mask[rows] = encoded["attention_mask"]
    return {
        "labels": labels,
        "decoder_input_ids": shift_right(labels, decoder_start_token_id),
        "decoder_attention_mask": mask,
    }
