"""transformers' `FlaxVisionEncoderDecoderModel` behind the two functions that training and evaluation need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from transformers import FlaxVisionEncoderDecoderModel

from repro.models.beam_search import Captions, beam_search
from repro.protocol import StopRule

Params = Any


@dataclass(frozen=True)
class Captioner:
    """A captioning model as pure functions of its parameters.

    Attributes:
        model: the transformers model; its own parameters are not used.
        pixel_table: float32[256,3], the normalized value of each byte in each channel.
    """

    model: FlaxVisionEncoderDecoderModel
    pixel_table: np.ndarray

    @property
    def config(self) -> Any:
        """The `VisionEncoderDecoderConfig`."""
        return self.model.config

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
        length = decoder_input_ids.shape[-1]
        outputs: Any = self.model.module.apply(
            {"params": params},
            self._normalize(pixels),
            decoder_input_ids,
            decoder_attention_mask,
            jnp.broadcast_to(jnp.arange(length), decoder_input_ids.shape),
            deterministic=dropout_key is None,
            rngs={} if dropout_key is None else {"dropout": dropout_key},
        )
        return outputs.logits

    def generate(
        self,
        params: Params,
        pixels: jax.Array,
        *,
        max_length: int,
        num_beams: int,
        stop_rule: StopRule,
        group_size: int,
    ) -> Captions:
        """Caption uint8[B,S,S,3]; the further arguments are those of `beam_search`."""
        rows = pixels.shape[0]
        states = self._encode(params, pixels)
        outputs = (jnp.repeat(states, num_beams, axis=0),)
        cache = self.model.init_cache(rows * num_beams, max_length, outputs)
        mask = jnp.ones((rows * num_beams, max_length), jnp.int32)

        def decode_step(tokens: jax.Array, position: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            step = self.model.decode(
                tokens[:, None],
                outputs,
                decoder_attention_mask=mask,
                decoder_position_ids=jnp.broadcast_to(position, (len(tokens), 1)),
                past_key_values=cache,
                params=params,
                return_dict=True,
            )
            return step.logits[:, -1], step.past_key_values

        settings = self.model.generation_config
        return beam_search(
            decode_step,
            cache,
            batch_size=rows,
            num_beams=num_beams,
            max_length=max_length,
            start_token_id=self.config.decoder_start_token_id,
            end_token_id=self.config.eos_token_id,
            pad_token_id=self.config.pad_token_id,
            stop_rule=stop_rule,
            group_size=group_size,
            length_penalty=settings.length_penalty,
            early_stopping=settings.early_stopping is True,
        )

    def _encode(self, params: Params, pixels: jax.Array) -> jax.Array:
        channels_first = jnp.moveaxis(self._normalize(pixels), -1, 1)
        return self.model.encode(channels_first, params=params).last_hidden_state

    def _normalize(self, pixels: jax.Array) -> jax.Array:
        chex.assert_shape(pixels, (None, None, None, 3))
        chex.assert_type(pixels, jnp.uint8)
        table = jnp.asarray(self.pixel_table)
        normalized = table[pixels.astype(jnp.int32), jnp.arange(3)]
        return normalized.astype(self.model.dtype)
