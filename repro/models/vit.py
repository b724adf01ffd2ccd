"""The Vision Transformer's encoder (Dosovitskiy et al. 2021) with the parameter tree of `FlaxViTModel`.

Axes: B batch, S image side, N patches and the class token, D width, H heads.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from repro.models.layers import ACTIVATIONS, Named, Part, attend, by_rows, split_heads


def weight_init(config: Any) -> jax.nn.initializers.Initializer:
    """Truncated normal whose variance is `initializer_range`**2 / fan-in, FlaxViTModel's."""
    return nn.initializers.variance_scaling(config.initializer_range**2, "fan_in", "truncated_normal")


class ViTPart(Part):
    """A part of the encoder, which makes layers with FlaxViTModel's initial weights."""

    deterministic: bool = True  # without dropout

    def dense(self, features: int, name: str = "dense", *, use_bias: bool = True) -> nn.Dense:
        init = weight_init(self.config)
        return nn.Dense(features, use_bias=use_bias, dtype=self.dtype, kernel_init=init, name=name)

    def layer_norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(self.config.layer_norm_eps, self.dtype, name=name)


class PatchProjection(ViTPart):
    """Project each patch of [B,S,S,C] to [B,N-1,D], with a kernel in a convolution's shape, [patch,patch,C,D]."""

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        # A convolution whose stride is its kernel is one product per patch, which every backend multiplies faster.
        patch, channels, width = self.config.patch_size, self.config.num_channels, self.config.hidden_size
        side = self.config.image_size // patch
        whole = pixel_values[:, : side * patch, : side * patch]
        patches = whole.reshape(-1, side, patch, side, patch, channels).swapaxes(2, 3)
        patches = patches.reshape(-1, side * side, patch * patch * channels)
        kernel = self.param("kernel", weight_init(self.config), (patch, patch, channels, width))
        bias = self.param("bias", nn.initializers.zeros_init(), (width,))
        patches, kernel, bias = nn.dtypes.promote_dtype(patches, kernel, bias, dtype=self.dtype)
        return by_rows(lambda rows: rows @ kernel.reshape(-1, width) + bias[None], patches)


class Embeddings(ViTPart):
    """Patches with a class token before them and a position added to each: [B,S,S,C] to [B,N,D]."""

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        config, width = self.config, self.config.hidden_size
        num_patches = (config.image_size // config.patch_size) ** 2
        cls_token = self.param("cls_token", weight_init(config), (1, 1, width))
        projection = PatchProjection(config, self.dtype, parent=None, name="projection")
        patches = Named([projection], name="patch_embeddings")(pixel_values)
        positions = self.param("position_embeddings", weight_init(config), (1, num_patches + 1, width))
        first = jnp.broadcast_to(cls_token.astype(self.dtype), (len(patches), 1, width))
        states = jnp.concatenate([first, patches], axis=1) + positions.astype(self.dtype)
        return nn.Dropout(config.hidden_dropout_prob, name="dropout")(states, deterministic=self.deterministic)


class SelfAttention(ViTPart):
    """Every position attends to all, [B,N,D] to [B,N,D]."""

    @nn.compact
    def __call__(self, states: jax.Array) -> jax.Array:
        config = self.config

        def project(name: str) -> jax.Array:
            layer = self.dense(config.hidden_size, name, use_bias=config.qkv_bias)
            return split_heads(by_rows(layer, states), config.num_attention_heads)

        dropout_rate = config.attention_probs_dropout_prob
        drops = not self.deterministic and dropout_rate > 0
        return attend(
            project("query"),
            project("key").mT,
            project("value"),
            dropout_rate=dropout_rate,
            dropout_key=self.make_rng("dropout") if drops else None,
        )


class Output(ViTPart):
    """Back to the model's width, with dropout: [B,N,F] to [B,N,D]."""

    @nn.compact
    def __call__(self, states: jax.Array) -> jax.Array:
        states = by_rows(self.dense(self.config.hidden_size), states)
        dropout = nn.Dropout(self.config.hidden_dropout_prob, name="dropout")
        return dropout(states, deterministic=self.deterministic)


class Intermediate(ViTPart):
    """The activation of the MLP: [B,N,D] to [B,N,F]."""

    @nn.compact
    def __call__(self, states: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.config.hidden_act](by_rows(self.dense(self.config.intermediate_size), states))


class Layer(ViTPart):
    """Attention and MLP, each normalized before and added after: [B,N,D] to [B,N,D]."""

    @nn.compact
    def __call__(self, states: jax.Array) -> jax.Array:
        settings = (self.config, self.dtype, self.deterministic)
        attention = SelfAttention(*settings, parent=None, name="attention")
        output = Output(*settings, parent=None, name="output")
        states += Named([attention, output], name="attention")(self.layer_norm("layernorm_before")(states))
        activations = Intermediate(*settings, name="intermediate")(self.layer_norm("layernorm_after")(states))
        return states + Output(*settings, name="output")(activations)


class Pooler(ViTPart):
    """FlaxViTModel's head on the class token, [B,N,D] to [B,P]; a captioner has its weights but not its output."""

    @nn.compact
    def __call__(self, states: jax.Array) -> jax.Array:
        return nn.tanh(self.dense(self.config.pooler_output_size)(states[:, 0]))


class ViT(Part):
    """Normalized pixels to one state for the class token and each patch; `config` is a `ViTConfig`."""

    remat: bool  # compute each layer's activations again in the backward pass instead of keeping them

    @nn.compact
    def __call__(self, pixel_values: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Encode [B,S,S,C] to [B,N,D]."""
        config, settings = self.config, (self.config, self.dtype, deterministic)
        states = Embeddings(*settings, name="embeddings")(pixel_values)
        layer = nn.remat(Layer) if self.remat else Layer
        layers = [layer(*settings, parent=None, name=str(number)) for number in range(config.num_hidden_layers)]
        states = Named([Named(layers, parent=None, name="layer")], name="encoder")(states)
        states = nn.LayerNorm(config.layer_norm_eps, self.dtype, name="layernorm")(states)
        if self.is_initializing():
            Pooler(*settings, name="pooler")(states)
        return states
