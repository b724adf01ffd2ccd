"""ViT and GPT-2 joined into a captioner with the parameter tree of `FlaxVisionEncoderDecoderModel`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from repro.models.beam_search import Captions
from repro.models.generation import search
from repro.models.gpt2 import GPT2, Memory, start_cache
from repro.models.layers import Part
from repro.models.vit import ViT
from repro.models.weights import Params


class VisionEncoderDecoder(Part):
    """An image encoder whose states a text decoder attends to, projected where their widths differ.

    `config` is a `VisionEncoderDecoderConfig` of a ViT and a GPT-2.
    """

    remat: bool  # trade time for memory in training, layer by layer

    def setup(self) -> None:
        encoder, decoder = self.config.encoder, self.config.decoder
        self.encoder = ViT(encoder, self.dtype, self.remat)
        self.decoder = GPT2(decoder, self.dtype, self.remat)
        if encoder.hidden_size != decoder.hidden_size:
            kernel_init = nn.initializers.normal(decoder.initializer_range)
            self.enc_to_dec_proj = nn.Dense(decoder.hidden_size, kernel_init=kernel_init, dtype=self.dtype)

    def __call__(
        self,
        pixel_values: jax.Array,
        decoder_input_ids: jax.Array,
        decoder_attention_mask: jax.Array,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Normalized pixels [B,S,S,C] and int32[B,T] twice to logits [B,T,V]."""
        states = self._states(pixel_values, deterministic)
        return self.decoder(decoder_input_ids, decoder_attention_mask, states, deterministic=deterministic)

    def encode(self, pixel_values: jax.Array) -> Memory:
        """Normalized pixels [B,S,S,C] to what the decoder remembers of them."""
        return self.decoder.remember(self._states(pixel_values, True))

    def _states(self, pixel_values: jax.Array, deterministic: bool) -> jax.Array:
        states = self.encoder(pixel_values, deterministic=deterministic)
        return self.enc_to_dec_proj(states) if hasattr(self, "enc_to_dec_proj") else states


@dataclass(frozen=True, eq=False)
class NativeCaptioner:
    """A captioning model as pure functions of its parameters."""

    config: Any  # a `VisionEncoderDecoderConfig` of a ViT and a GPT-2
    generation_config: Any  # a `GenerationConfig`; see `repro.models.generation`
    pixel_table: np.ndarray  # float32[256,3], the normalized value of each byte in each channel
    dtype: Any = jnp.float32  # type of the computation
    remat: bool = False  # see `VisionEncoderDecoder`

    @property
    def module(self) -> VisionEncoderDecoder:
        return VisionEncoderDecoder(self.config, self.dtype, self.remat)

    def init(self, seed: int) -> Params:
        """Make the random parameters that `FlaxVisionEncoderDecoderModel` makes from the same seed."""
        side, channels = self.config.encoder.image_size, self.config.encoder.num_channels
        params_key, _ = jax.random.split(jax.random.PRNGKey(seed))
        tokens = jnp.zeros((1, 1), jnp.int32)
        variables = jax.jit(self.module.init)(params_key, jnp.zeros((1, side, side, channels)), tokens, tokens)
        return variables["params"]

    def logits(
        self,
        params: Params,
        pixels: jax.Array,
        decoder_input_ids: jax.Array,
        decoder_attention_mask: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Predict each next token, with dropout where a key is given.

        Args:
            pixels: uint8[B,S,S,3]
            decoder_input_ids: int32[B,T]
            decoder_attention_mask: int32[B,T]
            dropout_key: uint32[2]

        Returns:
            [B,T,V] in the model's dtype.
        """
        return self._apply(
            params,
            normalize(pixels, self.pixel_table, self.dtype),
            decoder_input_ids,
            decoder_attention_mask,
            deterministic=dropout_key is None,
            rngs={} if dropout_key is None else {"dropout": dropout_key},
        )

    def encode(self, params: Params, pixels: jax.Array) -> Memory:
        """Look at uint8[B,S,S,3] once, for any number of captions."""
        return self._apply(params, normalize(pixels, self.pixel_table, self.dtype), method="encode")

    def decode(
        self, params: Params, memory: Memory, decoder_input_ids: jax.Array, decoder_attention_mask: jax.Array
    ) -> jax.Array:
        """`logits` without dropout, of images that have been encoded."""
        inputs = (decoder_input_ids, decoder_attention_mask, memory)
        return self._apply(params, *inputs, method=lambda module, *inputs: module.decoder(*inputs))

    def looks_at(self, params: Params, pixels: jax.Array, decoder_input_ids: jax.Array) -> jax.Array:
        """Tell how much each of int32[B,T] looks at each patch of uint8[B,S,S,3] to predict the next: float32[B,T,P].

        The weights of cross-attention, as the mean over layers and heads, without that of the class token.
        """
        module, mask = replace(self, remat=False).module, jnp.ones_like(decoder_input_ids)
        inputs = (normalize(pixels, self.pixel_table, self.dtype), decoder_input_ids, mask)
        _, found = module.apply({"params": params}, *inputs, mutable="intermediates")
        return jnp.stack(jax.tree.leaves(found)).mean(axis=(0, 2))[..., 1:]

    def generate(self, params: Params, memory: Memory, *, max_length: int, num_beams: int, **settings: Any) -> Captions:
        """Caption images that have been encoded; `settings` are `beam_search`'s, errors those of `check_beams`."""
        # Once, and not at every step of the search.
        params = jax.tree.map(lambda x: x.astype(self.dtype) if x.ndim > 1 else x, params)
        cache = start_cache(memory, num_beams=num_beams, max_length=max_length)
        step = partial(self._apply, params, method=lambda module, *inputs: module.decoder.decode_step(*inputs))
        sizes = {"batch_size": len(cache.ancestors), "max_length": max_length, "num_beams": num_beams}
        return search(self, step, cache, **sizes, **settings)

    def _apply(self, params: Params, *inputs: Any, **settings: Any) -> Any:
        return self.module.apply({"params": params}, *inputs, **settings)


def normalize(pixels: jax.Array, pixel_table: np.ndarray, dtype: Any) -> jax.Array:
    """Look up what each byte of uint8[B,S,S,3] stands for."""
    chex.assert_shape(pixels, (None, None, None, 3))
    chex.assert_type(pixels, jnp.uint8)
    table = jnp.asarray(pixel_table, dtype)
    # A TPU looks up one scalar after another: its compiler expects a second for 32 images, and 0.1 ms for the products.
    looked_up = lambda pixels, table: table[pixels.astype(jnp.int32), jnp.arange(3)]  # noqa: E731
    return jax.lax.platform_dependent(pixels, table, tpu=looked_up_by_products, default=looked_up)


def looked_up_by_products(pixels: jax.Array, table: jax.Array) -> jax.Array:
    """Give table[pixels[...,c],c] bit for bit: with one 1 in a row, products of the highest precision are exact."""
    rows = jax.nn.one_hot(pixels, len(table), dtype=table.dtype)
    return jnp.einsum("bhwcv,vc->bhwc", rows, table, precision="highest")
