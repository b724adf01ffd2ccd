"""What a piece of work costs at least, counted from its products' shapes, and what a device does at best.

A product [m,k] x [k,n] is 2mkn operations and moves its operands and its result once, each at the width of the
computation; everything between products is taken to be fused with them. A training step does each product three times
(forward, and towards either operand), and AdamW reads parameter, gradient and two moments and writes three of them, in
float32. So bytes are what must be moved; a program moves more.

Roofs are measured on the device: the largest rate of a square matrix product, in float32 and in bfloat16, of the sizes
tried, and the rate at which an array is read and written. Work whose operations take longer at their roof than its
bytes at theirs is bound by arithmetic, other work by memory; the longer of the two, over the time that was measured, is
the share of the roof that is reached. Where the device's peak is known from its data sheet (`PEAKS`), the share of that
stands beside it as utilisation.

    python benchmarks/roofline.py
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

from peers import model_config, write_result

CAPTIONS_PER_IMAGE = 5
WIDTH = {"float32": 4, "bfloat16": 2}
TURNS = 5
SIDES, LONG_ENOUGH = (2048, 4096, 8192, 16384), 0.01
COPIED = 2**28
"""Elements, 1 GiB in float32."""
ADAMW_BYTES = 7 * 4
"""A parameter: it, its gradient and two moments are read, it and the moments written."""
PEAKS = {
    # NVIDIA's data sheets, SXM, dense; XLA multiplies float32 in TF32 on these.
    "NVIDIA H100 80GB HBM3": {"bfloat16": 989.4, "float32": 494.7, "gigabytes_a_second": 3350},
    "NVIDIA H200": {"bfloat16": 989.4, "float32": 494.7, "gigabytes_a_second": 4800},
    # Google Cloud's documentation.
    "TPU v4": {"bfloat16": 275, "gigabytes_a_second": 1228},
}
"""Teraflops and memory bandwidth by JAX's name of the device."""


class Product(NamedTuple):
    """A matrix product [m,k] x [k,n], done so many times."""

    times: int
    m: int
    k: int
    n: int

    @property
    def operations(self) -> int:
        return 2 * self.times * self.m * self.k * self.n

    @property
    def elements(self) -> int:
        """Of both operands and the result."""
        return self.times * (self.m * self.k + self.k * self.n + self.m * self.n)


Parts = dict[str, list[Product]]


def encoder_products(config: Any, batch: int) -> Parts:
    """Encode a batch of images."""
    encoder = config.encoder
    states, width, inner = num_states(config), encoder.hidden_size, encoder.intermediate_size
    layers, rows = encoder.num_hidden_layers, batch * num_states(config)
    patch = encoder.num_channels * encoder.patch_size**2
    return {
        "encoder": [
            Product(4 * layers, rows, width, width),
            Product(layers, rows, width, inner),
            Product(layers, rows, inner, width),
            Product(layers * batch, states, width, states),
            Product(layers * batch, states, states, width),
            Product(1, rows, patch, width),
        ]
    }


def decoder_products(config: Any, batch: int, *, beams: int, positions: int, steps: int, past: int) -> Parts:
    """Decode a batch in a number of steps.

    Args:
        positions: tokens of each beam that one step takes.
        past: tokens that self-attention looks at.
    """
    decoder, states = config.decoder, num_states(config)
    layers, wide, rows = decoder.n_layer, decoder.hidden_size, batch * beams * positions
    per_image = steps * layers * batch
    return {
        "cross-attention keys and values": [Product(2 * layers, batch * states, config.encoder.hidden_size, wide)],
        "decoder": [
            Product(6 * steps * layers, rows, wide, wide),
            Product(2 * steps * layers, rows, wide, 4 * wide),
            Product(per_image, beams * positions, wide, states),
            Product(per_image, beams * positions, states, wide),
            Product(per_image, beams * positions, wide, past),
            Product(per_image, beams * positions, past, wide),
        ],
        "vocabulary": [Product(steps, rows, wide, decoder.vocab_size)],
    }


def generation_products(settings: dict[str, Any]) -> Parts:
    """Caption a batch by the native search, in which beams share keys and values, and each looks at all slots."""
    config, beams, length = model_config(settings), settings["beams"], settings["length"]
    search = {"beams": beams, "positions": 1, "steps": length - 1, "past": beams * length}
    return {
        **encoder_products(config, settings["batch"]),
        **decoder_products(config, settings["batch"], **search),
    }


def forward_products(settings: dict[str, Any]) -> Parts:
    """Give the logits of a batch of captions, all tokens at once."""
    config, length = model_config(settings), settings["length"]
    return {
        **encoder_products(config, settings["batch"]),
        **decoder_products(config, settings["batch"], beams=1, positions=length, steps=1, past=length + 1),
    }


def evaluation_products(settings: dict[str, Any]) -> Parts:
    """Evaluate a batch of images as `Evaluator` does: encoded once, five captions' losses each, one search."""
    losses = forward_products(settings)
    del losses["encoder"]
    parts = generation_products(settings)
    repeated = [product._replace(times=CAPTIONS_PER_IMAGE * product.times) for product in flat(losses)]
    return {**parts, "losses": repeated}


def flat(parts: Parts) -> list[Product]:
    return [product for products in parts.values() for product in products]


def operations(parts: Parts) -> int:
    return sum(product.operations for product in flat(parts))


def bytes_moved(parts: Parts, dtype: str) -> int:
    return WIDTH[dtype] * sum(product.elements for product in flat(parts))


def num_states(config: Any) -> int:
    return (config.encoder.image_size // config.encoder.patch_size) ** 2 + 1


def num_parameters(settings: dict[str, Any]) -> int:
    """Count the model's parameters from its shapes."""
    import jax
    from peers import pixel_table
    from transformers import GenerationConfig

    from repro.models.captioner import NativeCaptioner

    captioner = NativeCaptioner(model_config(settings), GenerationConfig(), pixel_table())
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: captioner.init(0))))


def work_of(name: str, settings: dict[str, Any]) -> dict[str, float]:
    """Count one run of a timed benchmark: training step, generation or evaluation."""
    if name == "training step":
        parts = forward_products(settings)
        moved = 3 * bytes_moved(parts, settings["dtype"]) + ADAMW_BYTES * num_parameters(settings)
        return {"operations": 3 * operations(parts), "bytes": moved}
    parts = {"generation": generation_products, "evaluation": evaluation_products}[name](settings)
    return {"operations": operations(parts), "bytes": bytes_moved(parts, settings["dtype"])}


def verdict(work: dict[str, float], seconds: float, roofs: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Say what binds work, how much of that roof its time reaches, and of a known peak."""
    arithmetic = work["operations"] / (roofs["teraflops"][dtype] * 1e12)
    memory = work["bytes"] / (roofs["gigabytes_a_second"] * 1e9)
    peak = roofs.get("peak", {}).get(dtype)
    return {
        "tera_operations": work["operations"] / 1e12,
        "gigabytes": work["bytes"] / 1e9,
        "operations_a_byte": work["operations"] / work["bytes"],
        "bound_by": "arithmetic" if arithmetic >= memory else "memory",
        "roof_seconds": max(arithmetic, memory),
        "share_of_roof": max(arithmetic, memory) / seconds,
        **({"utilisation": work["operations"] / seconds / (peak * 1e12)} if peak else {}),
    }


def multiplication_rate(dtype: str) -> float:
    """Measure how many operations a second the first device does in a large matrix product: what nothing exceeds."""
    import jax
    import jax.numpy as jnp

    multiply, rate = jax.jit(jnp.matmul), 0.0
    for side in SIDES:
        matrix = jnp.ones((side, side), dtype)
        multiply(matrix, matrix).block_until_ready()  # compiles
        times = []
        for _ in range(TURNS):
            started = time.perf_counter()
            multiply(matrix, matrix).block_until_ready()
            times.append(time.perf_counter() - started)
        rate = max(rate, 2 * side**3 / min(times))
        if min(times) > LONG_ENOUGH:  # an accelerator spends longer on the start of a small product than on it
            break
    return rate


def measure_roofs() -> dict[str, Any]:
    """Measure what the first device does at best."""
    import jax
    import jax.numpy as jnp

    array = jnp.ones(COPIED, jnp.float32)
    # In place: a CPU writes into memory that was never touched at a sixth of the rate.
    read_and_write = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = read_and_write(array).block_until_ready()
    times = []
    for _ in range(TURNS):
        started = time.perf_counter()
        array = read_and_write(array).block_until_ready()
        times.append(time.perf_counter() - started)
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "teraflops": {dtype: multiplication_rate(dtype) / 1e12 for dtype in WIDTH},
        "gigabytes_a_second": 2 * array.nbytes / min(times) / 1e9,
        "peak": PEAKS.get(device.device_kind, {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    write_result(Path(__file__).stem, measure_roofs(), args.output)


if __name__ == "__main__":
    main()
