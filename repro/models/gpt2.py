"""GPT-2 (Radford et al. 2019) with cross-attention and the parameter tree of `FlaxGPT2LMHeadModel`.

Training calls the model with the encoder's states. All else starts from `remember`, which computes an image's
cross-attention keys and values once: a call with these scores a caption, `decode_step` adds one token to each beam.

Axes: B images or rows, T target tokens, K beams, L tokens of the cache, N encoder states of width E, D width, H heads,
V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from repro.models.layers import ACTIVATIONS, Named, Part, attend, by_rows, split_heads, times_transposed

INIT_STDDEV = 0.02  # of the projections' kernels, whatever the configuration says: FlaxGPT2's


class KeysValues(flax.struct.PyTreeNode):
    """What one layer attends to: keys [B,H,D/H,S], transposed for the products with queries, and values [B,H,S,D/H]."""

    key: jax.Array
    value: jax.Array


# All that the decoder knows of an image: what each layer's cross-attention attends to, S = N.
Memory = tuple[KeysValues, ...]


class Cache(flax.struct.PyTreeNode):
    """What a search keeps."""

    memory: Memory  # of the images, one for all beams
    # Each layer's tokens so far, S = L*K: each position's K beams side by side, where they were written.
    past: tuple[KeysValues, ...]
    ancestors: jax.Array  # int32[B,K,L], the beam at each position from which a beam's token there comes


class Conv1D(nn.Module):
    """A dense layer whose kernel is [features,inputs], GPT-2's projection."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(INIT_STDDEV), (self.features, inputs.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        inputs, kernel, bias = nn.dtypes.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        return by_rows(lambda rows: times_transposed(rows, kernel) + bias[None], inputs)


class Attention(Part):
    """Attention to the tokens so far, or with `cross` to the encoder's states."""

    layer: int  # from 0: `scale_attn_by_inverse_layer_idx` scales by it
    cross: bool = False

    def setup(self) -> None:
        width = self.config.hidden_size
        self.c_attn = Conv1D((2 if self.cross else 3) * width, self.dtype)
        if self.cross:
            self.q_attn = Conv1D(width, self.dtype)
        self.c_proj = Conv1D(width, self.dtype)
        self.resid_dropout = nn.Dropout(self.config.resid_pdrop)

    def queries_keys_values(self, states: jax.Array) -> tuple[jax.Array, KeysValues]:
        """Project [B,T,D] to the queries [B,H,T,D/H], keys and values of self-attention."""
        query, key, value = (self._heads(part) for part in jnp.split(self.c_attn(states), 3, axis=-1))
        return query, KeysValues(key.mT, value)

    def keys_values(self, encoder_states: jax.Array) -> KeysValues:
        """Project [B,N,E] to the keys and values of cross-attention."""
        key, value = (self._heads(part) for part in jnp.split(self.c_attn(encoder_states), 2, axis=-1))
        return KeysValues(key.mT, value)

    def __call__(
        self, query: jax.Array, known: KeysValues, *, mask: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        """Attend and project back, [B,H,T,D/H] to [B,T,D]."""
        config = self.config
        scale = query.shape[-1] ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= self.layer + 1
        if self.cross and self.is_mutable_collection("intermediates"):  # for a picture of what a word looks at
            self.sow("intermediates", "weights", jax.nn.softmax(scale * query @ known.key))
        drops = not deterministic and config.attn_pdrop > 0
        attended = attend(
            query,
            known.key,
            known.value,
            mask=mask,
            scale=scale,
            upcast=config.reorder_and_upcast_attn,
            dropout_rate=config.attn_pdrop,
            dropout_key=self.make_rng("dropout") if drops else None,
        )
        return self.resid_dropout(self.c_proj(attended), deterministic=deterministic)

    def _heads(self, states: jax.Array) -> jax.Array:
        return split_heads(states, self.config.num_attention_heads)


class MLP(Part):
    """Two projections with an activation between them, [B,T,D] to [B,T,D]."""

    @nn.compact
    def __call__(self, states: jax.Array, *, deterministic: bool) -> jax.Array:
        config = self.config
        inner = config.n_inner if config.n_inner is not None else 4 * config.hidden_size
        states = ACTIVATIONS[config.activation_function](Conv1D(inner, self.dtype, name="c_fc")(states))
        states = Conv1D(config.hidden_size, self.dtype, name="c_proj")(states)
        return nn.Dropout(config.resid_pdrop, name="dropout")(states, deterministic=deterministic)


class Block(Part):
    """Self-attention, cross-attention and MLP, each normalized before and added after."""

    layer: int

    def setup(self) -> None:
        config, dtype = self.config, self.dtype
        self.ln_1, self.ln_cross_attn, self.ln_2 = (nn.LayerNorm(config.layer_norm_epsilon, dtype) for _ in range(3))
        self.attn = Attention(config, dtype, self.layer)
        self.crossattention = Attention(config, dtype, self.layer, cross=True)
        self.mlp = MLP(config, dtype)

    def __call__(
        self, states: jax.Array, mask: jax.Array, seen: jax.Array | KeysValues, deterministic: bool
    ) -> jax.Array:
        """Add what the block finds to [B,T,D], with a bool[B,1,T,T] mask and [B,N,E] encoder states or `KeysValues`."""
        memory = seen if isinstance(seen, KeysValues) else self.crossattention.keys_values(seen)
        query, present = self.attn.queries_keys_values(self.ln_1(states))
        states += self.attn(query, present, mask=mask, deterministic=deterministic)
        return self._rest(states, memory, deterministic)

    def decode_step(
        self, states: jax.Array, visible: jax.Array, position: jax.Array, memory: KeysValues, past: KeysValues
    ) -> tuple[jax.Array, KeysValues]:
        """Add what the block finds to [B,K,D], each beam's token at `position`; it may see bool[B,1,K,L*K]."""
        query, present = self.attn.queries_keys_values(self.ln_1(states))
        column = position * states.shape[1]
        past = KeysValues(
            key=jax.lax.dynamic_update_slice(past.key, present.key, (0, 0, 0, column)),
            value=jax.lax.dynamic_update_slice(past.value, present.value, (0, 0, column, 0)),
        )
        states += self.attn(query, past, mask=visible, deterministic=True)
        return self._rest(states, memory, True), past

    def _rest(self, states: jax.Array, memory: KeysValues, deterministic: bool) -> jax.Array:
        query = split_heads(self.crossattention.q_attn(self.ln_cross_attn(states)), self.config.num_attention_heads)
        states += self.crossattention(query, memory, mask=None, deterministic=deterministic)
        return states + self.mlp(self.ln_2(states), deterministic=deterministic)


class Transformer(Part):
    """A level of names, which FlaxGPT2 has."""

    remat: bool

    def setup(self) -> None:
        config, dtype = self.config, self.dtype
        init = nn.initializers.normal(config.initializer_range)
        embedding = partial(nn.Embed, features=config.hidden_size, embedding_init=init, dtype=dtype)
        self.wte, self.wpe = embedding(config.vocab_size), embedding(config.max_position_embeddings)
        self.dropout = nn.Dropout(config.embd_pdrop)
        # The last of the arguments of Block.__call__, counted with self, is static.
        block = nn.remat(Block, static_argnums=(4,)) if self.remat else Block
        numbers = range(config.num_hidden_layers)
        self.h = Named([block(config, dtype, number, parent=None, name=str(number)) for number in numbers])
        self.ln_f = nn.LayerNorm(config.layer_norm_epsilon, dtype)


class GPT2(Part):
    """Tokens and an encoder's states to next-token logits."""

    remat: bool  # compute each block's activations again in the backward pass instead of keeping them

    def setup(self) -> None:
        config = self.config
        self.transformer = Transformer(config, self.dtype, self.remat)
        if not config.tie_word_embeddings:
            kernel_init = nn.initializers.normal(config.initializer_range)
            self.lm_head = nn.Dense(config.vocab_size, use_bias=False, dtype=self.dtype, kernel_init=kernel_init)

    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array, seen: jax.Array | Memory, *, deterministic: bool = True
    ) -> jax.Array:
        """int32[B,T] twice and [B,N,E], or what `remember` made of that, to logits [B,T,V]."""
        length, blocks = input_ids.shape[1], self.transformer.h.layers
        # Which tokens each may see, bool[B,1,T,T].
        mask = jnp.tril(jnp.ones((1, 1, length, length), bool)) & (attention_mask[:, None, None, :] > 0)
        states = self.transformer.wte(input_ids) + self.transformer.wpe(jnp.arange(length))[None]
        states = self.transformer.dropout(states, deterministic=deterministic)
        for block, part in zip(blocks, seen if isinstance(seen, tuple) else [seen] * len(blocks), strict=True):
            states = block(states, mask, part, deterministic)
        return self._logits(states)

    def remember(self, encoder_states: jax.Array) -> Memory:
        """Compute from [B,N,E] all that depends on the image alone."""
        return tuple(block.crossattention.keys_values(encoder_states) for block in self.transformer.h.layers)

    def decode_step(
        self, tokens: jax.Array, parents: jax.Array, position: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Predict what follows one token on each beam.

        Args:
            tokens: int32[B,K], at `position`.
            parents: int32[B,K], the beam whose tokens before `position` each beam continues.
            position: int32[]

        Returns:
            (logits [B,K,V], cache).
        """
        batch, beams, length = cache.ancestors.shape
        ancestors = jnp.take_along_axis(cache.ancestors, parents[:, :, None], axis=1)
        ancestors = ancestors.at[:, :, position].set(jnp.arange(beams)[None])
        is_written = (jnp.arange(length) <= position)[None, None, :, None]
        visible = is_written & (ancestors[..., None] == jnp.arange(beams)[None, None, None])
        visible = visible.reshape(batch, 1, beams, length * beams)
        states = self.transformer.wte(tokens) + self.transformer.wpe(position)[None, None]
        following = []
        for block, memory, past in zip(self.transformer.h.layers, cache.memory, cache.past, strict=True):
            states, past = block.decode_step(states, visible, position, memory, past)
            following.append(past)
        return self._logits(states), Cache(cache.memory, tuple(following), ancestors)

    def _logits(self, states: jax.Array) -> jax.Array:
        project = self.transformer.wte.attend if self.config.tie_word_embeddings else self.lm_head
        return by_rows(project, self.transformer.ln_f(states))


def start_cache(memory: Memory, *, num_beams: int, max_length: int) -> Cache:
    """Make room for the beams of captions of `max_length` tokens."""
    batch, heads, _, depth = memory[0].value.shape
    tokens, dtype = num_beams * max_length, memory[0].value.dtype
    empty = KeysValues(
        key=jnp.zeros((batch, heads, depth, tokens), dtype), value=jnp.zeros((batch, heads, tokens, depth), dtype)
    )
    return Cache(memory, (empty,) * len(memory), jnp.zeros((batch, num_beams, max_length), jnp.int32))
