"""What a model's generation configuration asks for: what a search does of it, and what is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from repro.models.beam_search import Captions, beam_search, check_beams

# Settings that change PyTorch's captions and not those here, and the values with which they change none. What only
# sampling reads, such as top_k, is not among them: do_sample says whether there is any.
LEFT_OUT: dict[str, Any] = {
    **dict.fromkeys(("do_sample", "renormalize_logits", "remove_invalid_values"), False),
    **dict.fromkeys(("num_return_sequences", "num_beam_groups", "encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("diversity_penalty", "penalty_alpha", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")),
    **dict.fromkeys(("bad_words_ids", "force_words_ids", "constraints", "sequence_bias", "stop_strings", "max_time")),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "dola_layers")),
}
UNBOUNDED = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}


def left_out(asked: Any) -> Iterator[str]:
    """Name the settings of a `GenerationConfig` that change captions elsewhere and not here."""
    for name, neutral in LEFT_OUT.items():
        if (value := getattr(asked, name, None)) not in (None, neutral, []):
            yield f"generation_config.json: {name} {value!r} is left out; PyTorch's captions may differ"


def search_settings(captioner: Any) -> dict[str, Any]:
    """What a model asks of every search: its special tokens, penalties and bounds, as PyTorch takes them."""
    config, asked = captioner.config, captioner.generation_config
    ends = config.eos_token_id if asked.eos_token_id is None else asked.eos_token_id
    start = config.decoder_start_token_id if asked.decoder_start_token_id is None else asked.decoder_start_token_id
    return {
        "start_token_id": start,
        "end_token_ids": sorted(set(ends)) if isinstance(ends, Sequence) else [ends],
        "pad_token_id": config.pad_token_id,
        # Unset is None in transformers 5.
        "length_penalty": 1.0 if asked.length_penalty is None else asked.length_penalty,
        "early_stopping": asked.early_stopping or False,
        "repetition_penalty": asked.repetition_penalty or 1.0,
        "no_repeat_ngram_size": asked.no_repeat_ngram_size or 0,
        "min_length": (asked.min_length or 0) if asked.min_new_tokens is None else asked.min_new_tokens + 1,
    }


def search(
    captioner: Any, decode_step: Any, cache: Any, *, num_beams: int, num_return_sequences: int = 1, **settings: Any
) -> Captions:
    """`beam_search` and its settings, with those of a captioner."""
    vocab_size, asked = captioner.config.decoder.vocab_size, search_settings(captioner)
    check_beams(num_beams=num_beams, num_return_sequences=num_return_sequences, vocab_size=vocab_size)
    bounds = {name: asked.pop(name) for name in UNBOUNDED}
    constrain = partial(constrained, **bounds, end_token_ids=asked["end_token_ids"])
    asked |= {"num_beams": num_beams, "num_return_sequences": num_return_sequences}
    # What the example's models never asked for is done as in PyTorch, from which models come that do.
    as_pytorch = bounds != UNBOUNDED or len(asked["end_token_ids"]) > 1
    return beam_search(decode_step, cache, constrain=constrain, only_best_end=as_pytorch, **asked, **settings)


def constrained(
    sequences: jax.Array,
    length: jax.Array,
    scores: jax.Array,
    *,
    repetition_penalty: float,
    no_repeat_ngram_size: int,
    min_length: int,
    end_token_ids: Sequence[int],
) -> jax.Array:
    """Lower the scores of next tokens, in the order of PyTorch's processors.

    Args:
        sequences: int32[B,K,L], of which the first `length` tokens are there, start token included.
        scores: float32[B,K,V]
        repetition_penalty: factor of the negative scores of tokens that are there, divisor of the others.
        no_repeat_ngram_size: a token that would end such a sequence a second time is impossible; 0 for none.
        min_length: tokens, start token included, before which no end is possible.
    """
    rows, beams, positions = sequences.shape

    def among(tokens: jax.Array, is_meant: jax.Array) -> jax.Array:
        """Tell which of the vocabulary, bool[B,K,V], are meant ones of int32[B,K,N]."""
        place = (jnp.arange(rows)[:, None, None], jnp.arange(beams)[None, :, None], tokens)
        return jnp.zeros(scores.shape, bool).at[place].max(jnp.broadcast_to(is_meant, tokens.shape))

    if repetition_penalty != 1:
        penalized = jnp.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty)
        scores = jnp.where(among(sequences, jnp.arange(positions) < length), penalized, scores)
    if 0 < (size := no_repeat_ngram_size) <= positions:
        starts = jnp.arange(positions - size + 1)
        grams = sequences[:, :, starts[:, None] + jnp.arange(size)[None]]
        last = jax.lax.dynamic_slice_in_dim(sequences, length - size + 1, size - 1, axis=2)
        repeated = (grams[..., :-1] == last[:, :, None]).all(axis=-1) & (starts + size <= length)[None, None]
        scores = jnp.where(among(grams[..., -1], repeated), -jnp.inf, scores)
    if min_length > 1:
        ends = scores[:, :, jnp.asarray(end_token_ids)]
        scores = scores.at[:, :, jnp.asarray(end_token_ids)].set(jnp.where(length < min_length, -jnp.inf, ends))
    return scores
