"""What both halves of the model are made of: attention with its softmax in float32, activations, a dropout key."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# With at most FEW_ROWS rows and WIDE columns or more, XLA:CPU multiplies faster with the rows as its second operand.
FEW_ROWS, WIDE = 128, 256


def _gelu(x: jax.Array) -> jax.Array:
    # By erf, as PyTorch has it; jax.nn's erfc is exact further out on the left and takes twice the time.
    return 0.5 * x * (1 + jax.lax.erf(x * jnp.asarray(math.sqrt(0.5), x.dtype)))


# By their names in Hugging Face configurations.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # Hendrycks and Gimpel 2016, section 2
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": nn.tanh,
}


class Part(nn.Module):
    """A part of a model."""

    config: Any  # a configuration of transformers, such as a `ViTConfig`
    dtype: Any  # type of the computation; parameters are float32


class Named(nn.Sequential):
    """Parts one after another, each made with its name and `parent=None`: a level in the tree of parameters."""

    layers: Sequence[Any]
    preserve_adopted_names = True  # or Flax would call them layers_0, layers_1 and so on


def by_rows(layer: Callable[[jax.Array], jax.Array], states: jax.Array) -> jax.Array:
    """Apply a dense layer to [B,T,D] as to one matrix [B*T,D].

    The numbers are the same. XLA's CPU backend takes half the time for the gradients: with two axes to sum over it
    copies the activations, computed again, into another layout (seen with jax 0.10).
    """
    return layer(states.reshape(-1, states.shape[-1])).reshape(*states.shape[:-1], -1)


def times_transposed(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply [R,D] with the transpose of [F,D], to [R,F].

    XLA:CPU brings its second operand into another layout first: with the smaller one there, one beam of one image takes
    a third of the time (jax 0.10). The barrier keeps XLA from turning the product around again.
    """
    if rows.shape[0] > FEW_ROWS or min(kernel.shape) < WIDE:
        return rows @ kernel.T
    turned = lambda rows, kernel: jax.lax.optimization_barrier(kernel @ rows.T).T  # noqa: E731
    return jax.lax.platform_dependent(rows, kernel, cpu=turned, default=lambda rows, kernel: rows @ kernel.T)


def split_heads(values: jax.Array, num_heads: int) -> jax.Array:
    """Split [B,T,H*D] into heads, [B,H,T,D]."""
    batch, length, width = values.shape
    return values.reshape(batch, length, num_heads, width // num_heads).swapaxes(1, 2)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    scale: float | None = None,
    upcast: bool = False,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Average the values that each query attends to, and join the heads.

    Args:
        query: [B,H,Q,D]
        key: [B,H,D,S], transposed: a search multiplies with the same keys many times.
        value: [B,H,S,D]
        mask: bool, broadcastable to [B,H,Q,S]; a query that may see nothing gets the plain mean.
        scale: of the query-key products; None for 1 / sqrt(D).
        upcast: multiply queries and keys in float32 too.
        dropout_rate: of the weights, with one mask [Q,S] for all rows and heads, as Flax has it.
        dropout_key: none for no dropout.

    Returns:
        [B,Q,H*D] in the values' type.

    Source: Vaswani et al. 2017, section 3.2; `flax.linen.dot_product_attention_weights` for the shape of dropout.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    factors = None
    if dropout_key is not None:
        kept = jax.random.bernoulli(dropout_key, 1 - dropout_rate, (query.shape[2], value.shape[2]))
        factors = kept[None, None] / (1 - dropout_rate)
    if upcast:
        query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    attended = _attend(query * jnp.asarray(scale, query.dtype), key, value, mask, factors).astype(value.dtype)
    batch, heads, length, depth = attended.shape
    return attended.swapaxes(1, 2).reshape(batch, length, heads * depth)


@jax.custom_vjp
def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, factors: jax.Array | None
) -> jax.Array:
    return _attend_forward(query, key, value, mask, factors)[0]


def _attend_forward(query, key, value, mask, factors):
    scores = jnp.einsum("bhqd,bhds->bhqs", query, key).astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores).astype(value.dtype)
    dropped = weights if factors is None else weights * factors.astype(weights.dtype)
    attended = jnp.einsum("bhqs,bhsd->bhqd", dropped, value)
    return attended, (query, key, value, mask, factors, weights, attended)


def _attend_backward(kept, cotangent):
    """The gradient from the weights alone: neither the scores nor their exponentials are kept."""
    query, key, value, mask, factors, weights, attended = kept
    by_weight = jnp.einsum("bhqd,bhsd->bhqs", cotangent, value)
    dropped = weights
    if factors is not None:
        by_weight, dropped = by_weight * factors.astype(weights.dtype), weights * factors.astype(weights.dtype)
    mean = (cotangent * attended).sum(axis=-1, keepdims=True)
    by_score = weights * (by_weight - mean)
    if mask is not None:
        by_score = jnp.where(mask, by_score, 0)
    by_score = by_score.astype(query.dtype)
    return (
        jnp.einsum("bhqs,bhds->bhqd", by_score, key),
        jnp.einsum("bhqs,bhqd->bhds", by_score, query),
        jnp.einsum("bhqs,bhqd->bhsd", dropped, cotangent),
        None,
        None,
    )


_attend.defvjp(_attend_forward, _attend_backward)
