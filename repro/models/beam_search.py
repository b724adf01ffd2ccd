"""Beam search over any decoder that has a cache, with the stop rules of the three protocols.

Ended beams are ranked by log-probability / (tokens before the end token, start included) ** length_penalty. The search
of a *group* of rows goes on while its rule says so; a row whose group has ended keeps its result while others go on.

`2022`     A group is a device batch; it goes on while, in every row, the best running sum / max_length ** penalty beats
           the worst of the ended beams, once there are as many as beams.
`current`  A group is a device batch; it goes on while that holds in any row, with the tokens so far in the place of
           max_length.
`exact`    As `current`, but each row is a group of its own.

`early_stopping` is transformers': True ends a group once all its beams have ended, "never" compares with the best that
max_length could bring.

With one beam the search is greedy, as transformers makes it: each row ends, by itself, where its likeliest token is
the end.

Source: Freitag and Al-Onaizan 2017 for the search; transformers 4.15 and 4.57 for the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp

from repro.errors import InputError
from repro.protocol import StopRule

# Log-probability of what must not be chosen; both versions of transformers use this value.
IMPOSSIBLE = -1.0e7

DecodeStep = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
Constrain = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
EarlyStopping = bool | Literal["never"]


class Captions(NamedTuple):
    """The best R sequences of each row, best first."""

    tokens: jax.Array  # int32[B,R,L], start token first, padded after the end token
    scores: jax.Array  # float32[B,R], length-normalized log-probability


class _Beams(flax.struct.PyTreeNode):
    """What is known of some rows: the beams that go on, and the best that have ended."""

    running: jax.Array  # int32[B,K,L]
    running_scores: jax.Array  # float32[B,K], best first
    finished: jax.Array  # int32[B,K,L]
    finished_scores: jax.Array  # float32[B,K], best first
    is_finished: jax.Array  # bool[B,K]


class _Search(flax.struct.PyTreeNode):
    length: jax.Array  # int32[], tokens so far, start token included
    beams: _Beams
    parents: jax.Array  # int32[B,K], the beams that the running ones continue
    going_on: jax.Array  # bool[B]
    cache: Any


def check_beams(*, num_beams: int, num_return_sequences: int, vocab_size: int) -> None:
    """Raise an `InputError` if there are no beams, more beams than tokens, or more sequences to return than beams."""
    if not 1 <= num_beams <= vocab_size:
        raise InputError(f"--num_beams {num_beams}: must be between 1 and the vocabulary's {vocab_size} tokens.")
    if not 1 <= num_return_sequences <= num_beams:
        given = f"--num_return_sequences {num_return_sequences}"
        raise InputError(f"{given}: must be between 1 and --num_beams {num_beams}.")


def beam_search(
    decode_step: DecodeStep,
    cache: Any,
    *,
    batch_size: int,
    num_beams: int,
    max_length: int,
    start_token_id: int,
    end_token_ids: Sequence[int],
    pad_token_id: int,
    stop_rule: StopRule,
    group_size: int = 1,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    constrain: Constrain = lambda _sequences, _length, scores: scores,
    only_best_end: bool = False,
    num_return_sequences: int = 1,
) -> Captions:
    """Find the most probable captions of a batch.

    Args:
        decode_step: (tokens int32[B,K], parents int32[B,K], position int32[], cache) to (logits [B,K,V], cache). A
            beam continues what its parent had at the positions before; the cache is the step's to reorder.
        cache: pytree; the leading axis of every leaf that has one is a multiple of B, row-major.
        max_length: tokens of a caption, start token included.
        group_size: rows of a device batch under the rules `2022` and `current`.
        constrain: (running sequences int32[B,K,L], their length, scores of the next token float32[B,K,V]) to the scores
            that are searched: of log-probabilities with beams, of logits in a greedy search, as in PyTorch.
        only_best_end: let no continuation end that is not among the K best, as in PyTorch; the Flax class lets it.
        num_return_sequences: R; where fewer have ended, the best of those that have not follow them.
    """
    chex.assert_is_divisible(batch_size, group_size)
    group_size = 1 if stop_rule == "exact" or num_beams == 1 else group_size
    beams, penalty = num_beams, length_penalty
    furthest = max_length if stop_rule == "2022" else max_length - 1

    def can_improve(length: jax.Array, known: _Beams) -> jax.Array:
        """bool[B]: the stop rule, decided by each group for all of its rows."""
        hopes_for_length = early_stopping == "never" and penalty > 0
        reach = furthest if stop_rule == "2022" or hopes_for_length else length - 1
        best_running = known.running_scores[:, :1] / reach**penalty
        worst_finished = jnp.where(known.is_finished, known.finished_scores.min(axis=1, keepdims=True), IMPOSSIBLE)
        better = (best_running > worst_finished).reshape(-1, group_size * beams)
        on = better.all(axis=1) if stop_rule == "2022" else better.any(axis=1)
        if early_stopping is True:
            on &= ~known.is_finished.reshape(-1, group_size * beams).all(axis=1)
        return jnp.repeat(on, group_size)

    def advance(search: _Search) -> _Search:
        known = search.beams
        last = jax.lax.dynamic_index_in_dim(known.running, search.length - 1, 2, keepdims=False)
        logits, cache = decode_step(last, search.parents, search.length - 1, search.cache)
        logits, vocabulary = logits.astype(jnp.float32), logits.shape[-1]
        if beams > 1:
            log_probs = constrain(known.running, search.length, jax.nn.log_softmax(logits))
        else:
            log_probs = jax.nn.log_softmax(constrain(known.running, search.length, logits))
        totals = (log_probs + known.running_scores[:, :, None]).reshape(batch_size, -1)

        # Twice the beams where there is one end: even if the best K all end here, K others go on. A greedy search ends
        # there instead.
        considered = min((1 + len(end_token_ids)) * beams, totals.shape[1]) if beams > 1 else 1
        scores, flat = jax.lax.top_k(totals, considered)
        parents, tokens = flat // vocabulary, flat % vocabulary
        sequences = _take(known.running, parents).at[:, :, search.length].set(tokens)
        ended = jnp.isin(tokens, jnp.asarray(end_token_ids))

        running_scores, kept = jax.lax.top_k(scores + ended * IMPOSSIBLE, beams)
        if only_best_end:
            ended &= (jnp.arange(considered) < beams)[None]
        final_scores = scores / search.length**penalty + ~ended * IMPOSSIBLE
        if early_stopping is True:
            final_scores += known.is_finished.all(axis=1, keepdims=True) * IMPOSSIBLE
        finished_scores, best = jax.lax.top_k(jnp.concatenate([known.finished_scores, final_scores], axis=1), beams)
        following = _Beams(
            running=_take(sequences, kept),
            running_scores=running_scores,
            finished=_take(jnp.concatenate([known.finished, sequences], axis=1), best),
            finished_scores=finished_scores,
            is_finished=_take(jnp.concatenate([known.is_finished, ended], axis=1), best),
        )
        length, going_on = search.length + 1, search.going_on

        def unless_ended(new: jax.Array, old: jax.Array) -> jax.Array:
            """Let the rows whose group had ended keep their results."""
            return jnp.where(going_on.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return _Search(
            length=length,
            beams=jax.tree.map(unless_ended, following, known),
            parents=_take(parents, kept),
            going_on=going_on & can_improve(length, following),
            cache=cache,
        )

    blank = jnp.full((batch_size, beams, max_length), pad_token_id, jnp.int32)
    beginning = _Beams(
        running=blank.at[:, :, 0].set(start_token_id),
        # All beams start alike; only the first may have children, or all K would be the same.
        running_scores=jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, IMPOSSIBLE), (batch_size, 1)),
        finished=blank,
        finished_scores=jnp.full((batch_size, beams), IMPOSSIBLE),
        is_finished=jnp.zeros((batch_size, beams), bool),
    )
    start = _Search(
        length=jnp.asarray(1, jnp.int32),
        beams=beginning,
        parents=jnp.tile(jnp.arange(beams), (batch_size, 1)),
        going_on=jnp.ones(batch_size, bool),
        cache=cache,
    )
    end = jax.lax.while_loop(lambda search: (search.length < max_length) & search.going_on.any(), advance, start)
    return _best(end.beams, num_return_sequences, pad_token_id, penalty)


def _take(values: jax.Array, indices: jax.Array) -> jax.Array:
    """Pick beams: [B,K,...] and int32[B,J] to [B,J,...]."""
    return values[jnp.arange(values.shape[0])[:, None], indices]


def _best(known: _Beams, number: int, pad_token_id: int, penalty: float) -> Captions:
    """The first `number` of the sequences that ended, then of those that did not."""
    lengths = (known.running[:, :, 1:] != pad_token_id).sum(axis=2)
    running_scores = known.running_scores / jnp.maximum(lengths, 1) ** penalty
    # Places that no ended sequence took go to the end; the order within each kind stays.
    empty = jnp.concatenate([~known.is_finished, jnp.zeros_like(known.is_finished)], axis=1)
    chosen = jnp.argsort(empty, axis=1, stable=True)[:, :number]
    return Captions(
        tokens=_take(jnp.concatenate([known.finished, known.running], axis=1), chosen),
        scores=_take(jnp.concatenate([known.finished_scores, running_scores], axis=1), chosen),
    )
