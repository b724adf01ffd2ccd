"""First steps that no seed chooses: what the run's own training step does to fixed weights, rows and dropout keys.

A wrong rate, decay, dropout, picture or label shows in them under any seed of the run, before its first step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from optax import tree_utils

from repro.run.build import Training
from repro.training.sharding import put, put_rows

STEPS = (1, 2, 3, 5, 10, 20)
SPREAD = 0.02  # standard deviation of the weights; GPT-2's own


def first_steps(training: Training) -> dict[str, Any]:
    """Take twenty steps from fixed weights, over the rows as they are kept; the run's own state is not touched.

    Returns:
        By step, `loss` (nats a token) and `grad_norm`, before any clipping. `moved`, the norm of the parameters' change
        over the sum of the learning rates. `idle`, the largest change of a parameter that has no gradient. `orders`,
        how many different orders of rows the file and the epochs have.
    """
    data, row_order, random = training.prepared.splits["train"], training.row_order, np.random.default_rng(0)

    def weights(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        around = 1.0 if path[-1].key == "scale" else 0.0
        return (around + SPREAD * random.standard_normal(leaf.shape)).astype(leaf.dtype)

    start = jax.tree_util.tree_map_with_path(weights, training.like.params)
    keys = jax.random.split(jax.random.PRNGKey(0), row_order.num_replicas)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, training.like)
    fixed = {"params": put(start, shardings.params), "dropout_keys": put(keys, shardings.dropout_keys)}
    state, taken = dataclasses.replace(training.create(), **fixed), list[dict[str, float]]()
    batches = np.arange(STEPS[-1] * row_order.global_batch) % len(data)
    for rows in batches.reshape(STEPS[-1], row_order.num_replicas, -1):
        state, metrics = training.step(state, put_rows(data.batch, training.batch_sharding, rows))
        taken.append({name: float(value) for name, value in metrics.items()})
    change = jax.tree.map(np.subtract, jax.device_get(state.params), start)
    momentum = jax.device_get(tree_utils.tree_get(state.opt_state, "mu"))
    idle = jax.tree.map(lambda moved, mean: np.abs(np.where(mean == 0, moved, 0)).max(), change, momentum)
    epochs = [row_order.epoch_rows(epoch, len(data)).reshape(-1) for epoch in range(row_order.num_epochs)]
    return {
        **{name: {str(step): taken[step - 1][name] for step in STEPS} for name in ("loss", "grad_norm")},
        "moved": float(tree_utils.tree_norm(change)) / sum(step["learning_rate"] for step in taken),
        "idle": float(max(jax.tree.leaves(idle))),
        "orders": len({rows.tobytes() for rows in (np.arange(len(epochs[0])), *epochs)}),
    }
