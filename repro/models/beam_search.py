"""Beam search over any decoder that has a cache, with the stop rules of the three protocols.

Ended beams are ranked by log-probability / (tokens before the end token, start included) ** length_penalty. The search
of a *group* of rows goes on while its rule says so; a row whose group has ended keeps its result while others go on.

`2022`     A group is a device batch; it goes on while, in every row, the best running sum / max_length ** penalty beats
           the worst of the ended beams, once there are as many as beams.
`current`  A group is a device batch; it goes on while that holds in any row, with the tokens so far in the place of
           max_length.
`exact`    As `current`, but each row is a group of its own.

With one beam the search is greedy, as transformers makes it: each row ends, by itself, where its likeliest token is
the end.

Source: Freitag and Al-Onaizan 2017 for the search; transformers 4.15 and 4.57 for the rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp

from repro.protocol import StopRule

IMPOSSIBLE = -1.0e7
"""Log-probability of what must not be chosen; both versions of transformers use this value."""

Cache = Any
DecodeStep = Callable[[jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]]


class Captions(NamedTuple):
    """The best sequence of each row.

    Attributes:
        tokens: int32[B,L], start token first, padded after the end token.
        scores: float32[B], length-normalized log-probability.
    """

    tokens: jax.Array
    scores: jax.Array


class _Search(flax.struct.PyTreeNode):
    length: jax.Array  # int32[], tokens so far, start token included
    running: jax.Array  # int32[B,K,L]
    running_scores: jax.Array  # float32[B,K], best first
    finished: jax.Array  # int32[B,K,L]
    finished_scores: jax.Array  # float32[B,K], best first
    is_finished: jax.Array  # bool[B,K]
    going_on: jax.Array  # bool[B]
    cache: Cache


def beam_search(
    decode_step: DecodeStep,
    cache: Cache,
    *,
    batch_size: int,
    num_beams: int,
    max_length: int,
    start_token_id: int,
    end_token_id: int,
    pad_token_id: int,
    stop_rule: StopRule,
    group_size: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> Captions:
    """Find the most probable captions of a batch.

    Args:
        decode_step: (tokens int32[B*K], position int32[], cache) to (logits [B*K,V], cache).
        cache: pytree; the leading axis of every leaf that has one is B*K, row-major.
        max_length: tokens of a caption, start token included.
        group_size: rows of a device batch under the rules `2022` and `current`.
        early_stopping: stop a group as soon as all its beams have ended.
    """
    chex.assert_is_divisible(batch_size, group_size)
    group_size = 1 if stop_rule == "exact" or num_beams == 1 else group_size
    rows, beams, penalty = batch_size, num_beams, length_penalty
    blank = jnp.full((rows, beams, max_length), pad_token_id, jnp.int32)

    def can_improve(search: _Search) -> jax.Array:
        """bool[B]: the stop rule, decided by each group for all of its rows."""
        reach = max_length if stop_rule == "2022" else search.length - 1
        best_running = search.running_scores[:, :1] / reach**penalty
        worst_finished = jnp.where(search.is_finished, search.finished_scores.min(axis=1, keepdims=True), IMPOSSIBLE)
        better = (best_running > worst_finished).reshape(-1, group_size * beams)
        on = better.all(axis=1) if stop_rule == "2022" else better.any(axis=1)
        if early_stopping:
            on &= ~search.is_finished.reshape(-1, group_size * beams).all(axis=1)
        return jnp.repeat(on, group_size)

    def advance(search: _Search) -> _Search:
        last = jax.lax.dynamic_index_in_dim(search.running, search.length - 1, 2, keepdims=False)
        logits, cache = decode_step(last.reshape(-1), search.length - 1, search.cache)
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(rows, beams, -1)
        vocabulary = log_probs.shape[-1]
        totals = (log_probs + search.running_scores[:, :, None]).reshape(rows, -1)

        # Twice the beams: even if the best K all end here, K others go on. A greedy search ends there instead.
        scores, flat = jax.lax.top_k(totals, 2 * beams if beams > 1 else 1)
        parents, tokens = flat // vocabulary, flat % vocabulary
        sequences = _take(search.running, parents).at[:, :, search.length].set(tokens)
        ended = tokens == end_token_id

        running_scores, kept = jax.lax.top_k(scores + ended * IMPOSSIBLE, beams)
        final_scores = scores / search.length**penalty + ~ended * IMPOSSIBLE
        if early_stopping:
            final_scores += search.is_finished.all(axis=1, keepdims=True) * IMPOSSIBLE
        finished_scores, best = jax.lax.top_k(jnp.concatenate([search.finished_scores, final_scores], axis=1), beams)
        moved = _take(parents, kept) + jnp.arange(rows)[:, None] * beams
        following = _Search(
            length=search.length + 1,
            running=_take(sequences, kept),
            running_scores=running_scores,
            finished=_take(jnp.concatenate([search.finished, sequences], axis=1), best),
            finished_scores=finished_scores,
            is_finished=_take(jnp.concatenate([search.is_finished, ended], axis=1), best),
            going_on=search.going_on,
            # Rows that have ended may reorder their cache: nothing reads it again.
            cache=jax.tree.map(lambda x: x[moved.reshape(-1)] if x.ndim else x, cache),
        )
        following = following.replace(going_on=search.going_on & can_improve(following))
        return _keep_ended(search, following)

    start = _Search(
        length=jnp.asarray(1, jnp.int32),
        running=blank.at[:, :, 0].set(start_token_id),
        # All beams start alike; only the first may have children, or all K would be the same.
        running_scores=jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, IMPOSSIBLE), (rows, 1)),
        finished=blank,
        finished_scores=jnp.full((rows, beams), IMPOSSIBLE),
        is_finished=jnp.zeros((rows, beams), bool),
        going_on=jnp.ones(rows, bool),
        cache=cache,
    )
    end = jax.lax.while_loop(lambda search: (search.length < max_length) & search.going_on.any(), advance, start)
    any_finished = end.is_finished.any(axis=1)
    lengths = (end.running[:, 0, 1:] != pad_token_id).sum(axis=1)
    return Captions(
        tokens=jnp.where(any_finished[:, None], end.finished[:, 0], end.running[:, 0]),
        scores=jnp.where(
            any_finished,
            end.finished_scores[:, 0],
            end.running_scores[:, 0] / jnp.maximum(lengths, 1) ** penalty,
        ),
    )


def _take(values: jax.Array, indices: jax.Array) -> jax.Array:
    """Pick beams: [B,K,...] and int32[B,J] to [B,J,...]."""
    return values[jnp.arange(values.shape[0])[:, None], indices]


def _keep_ended(before: _Search, after: _Search) -> _Search:
    """Leave the results of rows whose group had ended as they were."""

    def choose(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(before.going_on.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    names = ("running", "running_scores", "finished", "finished_scores", "is_finished")
    return after.replace(**{name: choose(getattr(before, name), getattr(after, name)) for name in names})
