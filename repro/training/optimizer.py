"""AdamW with a linear schedule and the two weight-decay masks."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import optax
from flax import traverse_util

from repro.protocol import DecayMask

BART_LAYER_NORMS = ("self_attn_layer_norm", "layernorm_embedding", "final_layer_norm")
LAYER_NORM_MARKS = ("layernorm", "layer_norm", "ln")


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


def count_parameters(params: Any) -> int:
    """Number of scalars in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
