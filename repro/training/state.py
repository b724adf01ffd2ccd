"""All that a training step reads and replaces."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """Parameters, optimizer and randomness after `step` steps.

    Attributes:
        step: int32[]
        params: float32 tree.
        opt_state: the optimizer's.
        dropout_keys: uint32[R,2], one key for each replica.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    dropout_keys: jax.Array


def create_train_state(
    params: Any, optimizer: optax.GradientTransformation, *, seed: int, num_replicas: int
) -> TrainState:
    """Start a run: step 0, and the example's dropout keys (the second half of the seed, split by replica)."""
    _, dropout_key = jax.random.split(jax.random.PRNGKey(seed))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        dropout_keys=jax.random.split(dropout_key, num_replicas),
    )
