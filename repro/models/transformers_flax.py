"""transformers' `FlaxVisionEncoderDecoderModel` behind `NativeCaptioner`'s interface, for any pair that it supports.

transformers 5 has no Flax classes; nothing but this module needs one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import FlaxAutoModel, FlaxAutoModelForCausalLM, FlaxVisionEncoderDecoderModel
from transformers.utils import cached_file

from repro.models.beam_search import Captions
from repro.models.captioner import normalize
from repro.models.generation import search
from repro.models.weights import FLAX_INDEX, Params, shards_of


@dataclass(frozen=True, eq=False)
class FlaxClassCaptioner:
    """`NativeCaptioner` for a model of transformers; its own parameters are not used."""

    model: FlaxVisionEncoderDecoderModel
    pixel_table: np.ndarray  # float32[256,3], the normalized value of each byte in each channel

    config = property(lambda self: self.model.config)
    generation_config = property(lambda self: self.model.generation_config)

    def logits(
        self,
        params: Params,
        pixels: jax.Array,
        decoder_input_ids: jax.Array,
        decoder_attention_mask: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """See `NativeCaptioner.logits`."""
        outputs: Any = self.model.module.apply(
            {"params": params},
            normalize(pixels, self.pixel_table, self.model.dtype),
            decoder_input_ids,
            decoder_attention_mask,
            jnp.broadcast_to(jnp.arange(decoder_input_ids.shape[-1]), decoder_input_ids.shape),
            deterministic=dropout_key is None,
            rngs={} if dropout_key is None else {"dropout": dropout_key},
        )
        return outputs.logits

    def encode(self, params: Params, pixels: jax.Array) -> jax.Array:
        """See `NativeCaptioner.encode`: the encoder's states, [B,N,D]."""
        images = jnp.moveaxis(normalize(pixels, self.pixel_table, self.model.dtype), -1, 1)
        return self.model.encode(images, params=params).last_hidden_state

    def decode(
        self, params: Params, memory: jax.Array, decoder_input_ids: jax.Array, decoder_attention_mask: jax.Array
    ) -> jax.Array:
        """See `NativeCaptioner.decode`."""
        outputs: Any = self.model.module.apply(
            {"params": params},
            decoder_input_ids,
            decoder_attention_mask,
            jnp.broadcast_to(jnp.arange(decoder_input_ids.shape[-1]), decoder_input_ids.shape),
            memory,
            method=_decode,
        )
        return outputs.logits

    def generate(
        self, params: Params, memory: jax.Array, *, max_length: int, num_beams: int, **settings: Any
    ) -> Captions:
        """See `NativeCaptioner.generate`; here each beam has a copy of its image's states, as transformers has it."""
        states = jnp.repeat(memory, num_beams, axis=0)
        past = self.model.init_cache(len(states), max_length, (states,))

        def decode_step(
            tokens: jax.Array, parents: jax.Array, position: jax.Array, cache: tuple[jax.Array, Any]
        ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            states, past = cache
            rows, beams = tokens.shape
            ancestors = (parents + jnp.arange(rows)[:, None] * beams).reshape(-1)
            outputs, following = self.model.module.apply(
                {"params": params, "cache": jax.tree.map(lambda x: x[ancestors] if x.ndim else x, past)},
                tokens.reshape(-1, 1),
                jnp.ones((rows * beams, max_length), jnp.int32),
                jnp.broadcast_to(position, (rows * beams, 1)),
                states,
                mutable=["cache"],
                method=_decode,
            )
            return outputs.logits[:, -1].reshape(rows, beams, -1), (states, following["cache"])

        sizes: dict[str, Any] = {"batch_size": len(memory), "max_length": max_length, "num_beams": num_beams}
        return search(self, decode_step, (states, past), **sizes, **settings)


def _decode(
    module: Any, tokens: jax.Array, attention_mask: jax.Array, position_ids: jax.Array, states: jax.Array
) -> Any:
    """The class's `decode`, by keyword: by position it gives a BERT the image as token types (transformers 4.57)."""
    projection = module._get_projection_module()
    return module._get_decoder_module()(
        input_ids=tokens,
        attention_mask=attention_mask,
        position_ids=position_ids,
        encoder_hidden_states=states if projection is None else projection(states),
        encoder_attention_mask=jnp.ones(states.shape[:2], jnp.int32),
    )


def load(path: str, *, dtype: str, **hub: Any) -> tuple[FlaxVisionEncoderDecoderModel, Params]:
    """Load a whole model and its parameters."""
    _check_index(path, hub)
    model = FlaxVisionEncoderDecoderModel.from_pretrained(path, dtype=jnp.dtype(dtype), **hub)
    return model, model.params


def create(
    config: Any, halves: dict[str, str | None], *, seed: int, dtype: str, **hub: Any
) -> tuple[FlaxVisionEncoderDecoderModel, Params]:
    """Make a model with random weights, and those of each half ("encoder", "decoder") that has a path."""
    model = FlaxVisionEncoderDecoderModel(config, seed=seed, dtype=jnp.dtype(dtype))
    params = dict(model.params)
    for half, kind in (("encoder", FlaxAutoModel), ("decoder", FlaxAutoModelForCausalLM)):
        path = halves[half]
        if path is not None:
            _check_index(path, hub)
            params[half] = kind.from_pretrained(path, config=getattr(config, half), seed=seed, **hub).params
    return model, params


def _check_index(path: str, hub: dict[str, Any]) -> None:
    download = {name: value for name, value in hub.items() if name != "trust_remote_code"}
    index = cached_file(path, FLAX_INDEX, _raise_exceptions_for_missing_entries=False, **download)
    if index is not None:
        shards_of(Path(index))
