"""What evaluates, compiled from shapes alone for a number of rows, and what it takes of a device's memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from repro.training.memory import batch_shapes, step_bytes, tree_bytes
from repro.training.sharding import put_rows, replicated, rows_sharding

BATCHES_WAITING = 3
"""Of pixels on a device before their turn: two in the queue, one in the hand of the thread that fills it."""

Load = Callable[[np.ndarray], dict[str, np.ndarray]]
Generate = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Programs:
    """What evaluates B rows at once.

    Attributes:
        num_rows: B.
        place: (what loads rows int[n], rows int[B]) to their arrays on the devices; several processes each load some.
        encode: (params, pixels uint8[B,S,S,3]) to whatever the other two take for these images.
        row_losses: (params, encoded images, a caption [B,T] of each) to the captions' loss (sums, counts), float32[B].
        generate: (params, encoded images) to captions int32[B,L]; None to compute the loss alone.
        num_bytes: the most that is held on one device at any time, parameters included.
    """

    num_rows: int
    place: Callable[[Load, np.ndarray], dict[str, Any]]
    encode: Callable[[Any, Any], Any]
    row_losses: Callable[[Any, Any, dict[str, Any]], tuple[Any, Any]]
    generate: Generate | None
    num_bytes: int = 0


def compile_programs(
    encode: Callable[..., Any],
    row_losses: Callable[..., Any],
    generate: Callable[..., Any] | None,
    params: Any,
    row: Mapping[str, Any],
    mesh: Mesh,
    *,
    num_rows: int,
) -> Programs:
    """Compile the functions of `Programs` for parameters that are whole on every device.

    Args:
        params, row: what is evaluated and one row of a batch [1,...], or their shapes.
    """
    everywhere, sharding = replicated(mesh), rows_sharding(mesh, num_rows=num_rows)
    captions = batch_shapes(row, (num_rows,), sharding)
    pixels = captions.pop("pixels")
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), params)
    lowered = jax.jit(encode).lower(params, pixels)
    encoding = lowered.compile()
    memory = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.out_info,
        encoding.output_shardings,
    )
    scoring = jax.jit(row_losses, out_shardings=everywhere).lower(params, memory, captions).compile()
    searching = generate and jax.jit(generate, out_shardings=everywhere).lower(params, memory).compile()
    # While images are encoded, the encoded ones before them are there still.
    most = max(step_bytes(encoding) + tree_bytes(memory), *(step_bytes(done) for done in (scoring, searching) if done))
    return Programs(
        num_rows=num_rows,
        place=lambda load, rows: put_rows(load, sharding, rows),
        encode=encoding,
        row_losses=scoring,
        generate=searching,
        num_bytes=most + BATCHES_WAITING * tree_bytes(pixels),
    )
