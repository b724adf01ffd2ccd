"""The training and evaluation step: pure functions of (state, batch), written for one array on one machine.

A training batch has a leading axis of replicas, R, each with its own dropout key and, under `replica_means`, its own
mean loss; which devices compute them is the sharding's matter (`repro.training.sharding`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from repro.protocol import DecayMask, LossReduction
from repro.training.losses import row_losses

Batch = dict[str, jax.Array]
# `NativeCaptioner.logits`: (params, pixels, inputs [B,T], mask [B,T], dropout_key=key) to logits [B,T,V].
LogitsFn = Callable[..., jax.Array]
# `NativeCaptioner.decode`: (params, encoded images, inputs [B,T], mask [B,T]) to logits [B,T,V].
DecodeFn = Callable[[Any, Any, jax.Array, jax.Array], jax.Array]


@flax.struct.dataclass
class TrainState:
    """All that a training step reads and replaces, after `step` steps."""

    step: jax.Array  # int32[]
    params: Any  # float32 tree
    opt_state: optax.OptState  # the optimizer's
    dropout_keys: jax.Array  # uint32[R,2], one key for each replica


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
EvalStep = Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]
_built_once = lru_cache(maxsize=4, typed=True)  # of equal parts, so that several runs of one process compile it once


def create_train_state(
    params: Any, optimizer: optax.GradientTransformation, *, seed: int, num_replicas: int
) -> TrainState:
    """Start a run: step 0, and the example's dropout keys (the second half of the seed, split by replica)."""
    _, dropout_key = jax.random.split(jax.random.PRNGKey(seed))
    keys = jax.random.split(dropout_key, num_replicas)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), keys)


def check_captions(batch: Batch, *, leading_axes: int) -> None:
    """Assert the shapes and dtypes of a batch's captions: int32 tokens [...,T] that agree."""
    captions = [batch[name] for name in ("labels", "decoder_input_ids", "decoder_attention_mask")]
    chex.assert_rank(captions, leading_axes + 1)
    chex.assert_equal_shape(captions)
    chex.assert_type(captions, jnp.int32)


def check_batch(batch: Batch, *, leading_axes: int) -> None:
    """Assert a batch's shapes and dtypes: uint8 pixels [...,S,S,3], and `check_captions`."""
    check_captions(batch, leading_axes=leading_axes)
    chex.assert_shape(batch["pixels"], (*batch["labels"].shape[:-1], None, None, 3))
    chex.assert_type(batch["pixels"], jnp.uint8)


def replica_weights(counts: jax.Array, reduction: LossReduction) -> jax.Array:
    """Weigh the sums of replicas that have `counts` tokens, float32[R], so that they add up to the loss."""
    if reduction == "replica_means":
        return 1.0 / (len(counts) * counts)
    return jnp.broadcast_to(1.0 / counts.sum(), counts.shape)


@_built_once
def make_train_step(
    logits_fn: LogitsFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    reduction: LossReduction,
    label_smoothing: float = 0.0,
    replicas_at_once: int | None = None,
    gather: Callable[[Any], Any] = lambda params: params,
) -> TrainStep:
    """Build the step: (state, batch [R,b,...]) to (state', metrics of this batch).

    The loss is a sum over replicas with weights that the masks alone decide, so its gradient is a sum as well: however
    many replicas are computed at once, the others after them, it is the same but for rounding.

    Args:
        replicas_at_once: divides R; None for all.
        gather: makes the parameters whole on each device that keeps but a part of them.

    Returns:
        The step; its metrics are {"loss", "learning_rate", "grad_norm"}, float32[] each, the norm before any clipping.
    """

    def replica_loss(params: Any, batch: Batch, key: jax.Array) -> jax.Array:
        mask = batch["decoder_attention_mask"]
        logits = logits_fn(params, batch["pixels"], batch["decoder_input_ids"], mask, dropout_key=key)
        sums, _ = row_losses(logits, batch["labels"], mask, label_smoothing=label_smoothing)
        return sums.sum()

    def loss_fn(params: Any, batch: Batch, keys: jax.Array, weights: jax.Array) -> jax.Array:
        params = gather(params)
        if len(keys) == 1:
            # Without the axis of replicas the backward pass takes an eighth less time on a CPU (jax 0.10).
            alone = jax.tree.map(lambda x: x[0], (batch, keys))
            return replica_loss(params, *alone) * weights[0]
        return (jax.vmap(replica_loss, in_axes=(None, 0, 0))(params, batch, keys) * weights).sum()

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        check_batch(batch, leading_axes=2)
        chex.assert_equal_shape_prefix((batch["labels"], state.dropout_keys), 1)
        keys = jax.vmap(jax.random.split)(state.dropout_keys)
        counts = batch["decoder_attention_mask"].sum(axis=(1, 2)).astype(jnp.float32)
        replicas = (batch, keys[:, 0], replica_weights(counts, reduction))
        loss, gradients = _in_turns(jax.value_and_grad(loss_fn), state.params, replicas, replicas_at_once)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        following = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, keys[:, 1])
        metrics = {
            "loss": loss,
            "learning_rate": jnp.asarray(schedule(state.step)),
            "grad_norm": optax.tree.norm(gradients),
        }
        return following, metrics

    return train_step


def _in_turns(function: Callable[..., Any], params: Any, replicas: Any, at_once: int | None) -> Any:
    """Add up function(params, *some of the replicas), `at_once` of them [R,...] at a time."""
    num_replicas = len(jax.tree.leaves(replicas)[0])
    if at_once in (None, num_replicas):
        return function(params, *replicas)
    chex.assert_is_divisible(num_replicas, at_once)
    # Strided, so that where devices share [R] evenly they share each turn evenly.
    turns = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(at_once, -1, *x.shape[1:]), 1, 0), replicas)

    def add(total: Any, turn: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(params, *turn)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, params, *replicas))
    return jax.lax.scan(add, zeros, turns)[0]


def make_eval_step(decode_fn: DecodeFn, *, label_smoothing: float = 0.0) -> EvalStep:
    """Build the step: (params, encoded images, their captions [B,T]) to each row's loss (sum, count), float32[B]."""

    def eval_step(params: Any, memory: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        check_captions(batch, leading_axes=1)
        mask = batch["decoder_attention_mask"]
        logits = decode_fn(params, memory, batch["decoder_input_ids"], mask)
        return row_losses(logits, batch["labels"], mask, label_smoothing=label_smoothing)

    return eval_step


BART_LAYER_NORMS = ("self_attn_layer_norm", "layernorm_embedding", "final_layer_norm")
LAYER_NORM_MARKS = ("layernorm", "layer_norm", "ln")


@_built_once
def create_learning_rate_fn(learning_rate: float, *, num_steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """Rise linearly from 0 over `warmup_steps`, then fall linearly to 0 at `num_steps`.

    The learning rate of the s-th step is the schedule at s - 1.
    """
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    decay = optax.linear_schedule(learning_rate, 0.0, num_steps - warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def decay_mask(params: Any, rule: DecayMask) -> Any:
    """Say for each parameter whether weight decay applies.

    `2022` spares biases and the scales of BART's LayerNorms, so those of ViT and GPT-2 decay; `layer_norms` spares
    biases and every parameter named like one (module and name) whose whole path, joined and lower-cased, contains a
    mark of LayerNorm.

    Returns:
        The tree of `params` with a bool in the place of each array.
    """
    paths = list(traverse_util.flatten_dict(params))
    if rule == "2022":
        spared = {(name, "scale") for name in BART_LAYER_NORMS}
    else:
        spared = {path[-2:] for path in paths if any(mark in "".join(path).lower() for mark in LAYER_NORM_MARKS)}
    return traverse_util.unflatten_dict({path: path[-1] != "bias" and path[-2:] not in spared for path in paths})


@_built_once
def create_optimizer(
    schedule: optax.Schedule,
    *,
    rule: DecayMask,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    max_grad_norm: float | None = None,  # the global norm to which larger gradients are scaled down before
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) under a schedule and one of the decay masks."""
    mask = partial(decay_mask, rule=rule)
    adamw = optax.adamw(schedule, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay, mask=mask)
    return adamw if max_grad_norm is None else optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw)
