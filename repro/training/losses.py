"""Label-smoothed cross entropy as sums and counts."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp

LOG_OFFSET = 1e-20  # keeps log(0) out of the smoothed minimum; the example's value


def token_losses(logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
    """Soft cross entropy of each token, minus the least value that it can have.

    The target has 1 - e at the label and e / (V - 1) everywhere else (`optax.smooth_labels` spreads e over all V).

    Args:
        logits: [...,V] of any floating type; the loss is computed in float32.
        labels: int32[...]
        label_smoothing: e, in [0, 1).

    Returns:
        float32[...], 0 where the prediction equals the smoothed target.

    Source: `loss_fn` of transformers' examples/flax/image-captioning/run_image_captioning_flax.py (v4.57.6).
    """
    chex.assert_shape(logits, (*labels.shape, None))
    chex.assert_type(labels, jnp.int32)
    normalizer = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    at_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0].astype(jnp.float32) - normalizer
    if label_smoothing == 0.0:
        return -at_label
    vocabulary = logits.shape[-1]
    confidence, low = 1.0 - label_smoothing, label_smoothing / (vocabulary - 1)
    least = -(confidence * math.log(confidence) + (vocabulary - 1) * low * math.log(low + LOG_OFFSET))
    elsewhere = logits.astype(jnp.float32).sum(axis=-1) - vocabulary * normalizer - at_label
    return -(confidence * at_label + low * elsewhere) - least


def row_losses(
    logits: jax.Array, labels: jax.Array, mask: jax.Array, *, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Sum the token losses of each row where the mask is 1.

    Args:
        logits: [B,T,V]
        labels: int32[B,T]
        mask: int32[B,T]

    Returns:
        (sums, counts), float32[B] each: a mean is the quotient of their totals.
    """
    chex.assert_equal_shape((labels, mask))
    losses = token_losses(logits, labels, label_smoothing=label_smoothing)
    return (losses * mask).sum(axis=1), mask.sum(axis=1).astype(jnp.float32)
