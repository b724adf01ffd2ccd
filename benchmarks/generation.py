"""Captions per second against transformers' Flax class and PyTorch, and how the cost grows.

    python benchmarks/generation.py --output benchmarks/results/cpu/generation.json

At ViT-B/16 + GPT-2 size, no caption ending early. `--evaluation` measures what an evaluation does with each image's
five captions: the loss of every row, and a caption for every row (the Flax class) or every image (native). `--growth`
times the native model over beams, lengths and batches. The peer PyTorch needs torch beside the package.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from peers import END, Run, compare, draw_batch, jax_captioner, torch_model, torch_pixels, write_result
from roofline import CAPTIONS_PER_IMAGE, generation_products

NEVER = 50_257
"""An end token that no vocabulary entry is."""


def make_generation(peer: str, settings: dict[str, Any]) -> Run:
    pixels = draw_batch(settings)["pixels"]
    beams, length = settings["beams"], settings["length"]
    if peer == "torch":
        import torch

        model = torch_model(settings).eval()
        model.generation_config.eos_token_id = None
        values = torch_pixels(model, pixels)

        def run() -> Any:
            with torch.no_grad():
                found = model.generate(
                    values, num_beams=beams, max_length=length, do_sample=False, pad_token_id=END,
                    decoder_start_token_id=END, eos_token_id=None,
                )  # fmt: skip
            assert found.shape[1] == length
            return found.cpu()

        return run
    import jax
    import jax.numpy as jnp

    captioner, params = jax_captioner(peer, settings)
    captioner.config.eos_token_id = NEVER
    pixels = jax.device_put(pixels)
    if peer == "native":
        generate = jax.jit(lambda params, pixels: search(captioner, params, captioner.encode(params, pixels), settings))
        generate = generate.lower(params, pixels).compile()
        return lambda: jax.block_until_ready(generate(params, pixels))
    from repro.models.captioner import normalize

    their_generate = jax.jit(
        lambda params, pixels: captioner.model.generate(
            jnp.moveaxis(normalize(pixels, captioner.pixel_table, captioner.model.dtype), -1, 1),
            generation_config=captioner.generation_config,  # which is not read from the configuration again, then
            params=params, max_length=length, num_beams=beams, eos_token_id=NEVER, pad_token_id=END,
        ).sequences
    )  # fmt: skip
    return lambda: jax.block_until_ready(their_generate(params, pixels))


def search(captioner: Any, params: Any, memory: Any, settings: dict[str, Any]) -> Any:
    """Native captions of a batch of encoded images; as none ends early, every stop rule does the same work."""
    return captioner.generate(
        params,
        memory,
        max_length=settings["length"],
        num_beams=settings["beams"],
        stop_rule="current",
        group_size=settings["batch"],
    )


def make_evaluation(peer: str, settings: dict[str, Any]) -> Run:
    """The work of evaluating a batch of images with five captions each: as `Evaluator` does it, and as the example."""
    import jax

    from repro.training.losses import row_losses
    from repro.training.steps import make_eval_step

    captioner, params = jax_captioner(peer, settings)
    batch = draw_batch(settings)
    if peer != "native":
        generate = make_generation(peer, settings)

        @jax.jit
        def losses(params: Any, batch: Any) -> Any:
            tokens, mask = batch["decoder_input_ids"], batch["decoder_attention_mask"]
            return row_losses(captioner.logits(params, batch["pixels"], tokens, mask), batch["labels"], mask)

        def run_rows() -> None:
            for _ in range(CAPTIONS_PER_IMAGE):
                jax.block_until_ready(losses(params, batch))
                generate()

        return run_rows
    captioner.config.eos_token_id = NEVER
    encode, eval_step = jax.jit(captioner.encode), jax.jit(make_eval_step(captioner.decode))
    generate_once = jax.jit(lambda params, memory: search(captioner, params, memory, settings))

    def run_images() -> None:
        memory = encode(params, batch["pixels"])
        for _ in range(CAPTIONS_PER_IMAGE):
            jax.block_until_ready(eval_step(params, memory, batch))
        jax.block_until_ready(generate_once(params, memory))

    return run_images


def count_operations(settings: dict[str, Any]) -> dict[str, float]:
    """Giga floating-point operations of the native search: two for each product, by part."""
    parts = generation_products(settings)
    return {name: sum(product.operations for product in products) / 1e9 for name, products in parts.items()}


def measure_growth(settings: dict[str, Any], turns: int) -> list[dict[str, Any]]:
    """Time the native search with one setting changed at a time."""
    rows = []
    changes = {"beams": (1, 2, 4, 8), "length": (8, 16, 32, 64), "batch": (1, 2, 4, 8, 16)}
    for name, values in changes.items():
        for value in values:
            changed = settings | {name: value}
            run = make_generation("native", changed)
            run()
            seconds = []
            for _ in range(turns):
                started = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - started)
            operations = count_operations(changed)
            rows.append(
                {
                    **{key: changed[key] for key in ("batch", "beams", "length")},
                    "seconds": statistics.median(seconds),
                    "spread": [min(seconds), max(seconds)],
                    "giga_operations": sum(operations.values()),
                    "by_part": operations,
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=["native", "flax", "torch"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--beams", type=int, default=8)
    parser.add_argument("--length", type=int, default=32, help="tokens, start token included")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--apart", action="store_true", help="one peer after another, each alone on the device")
    parser.add_argument("--evaluation", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="very small models, to see that it runs")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("batch", "beams", "length", "dtype", "smoke")}
    if args.growth:
        result: dict[str, Any] = {"growth": measure_growth(settings, args.turns)}
    elif args.evaluation:
        peers = [peer for peer in args.peers if peer != "torch"]
        result = compare(make_evaluation, peers, settings, turns=args.turns, apart=args.apart)
    else:
        result = compare(make_generation, args.peers, settings, turns=args.turns, apart=args.apart)
        result["giga_operations"] = count_operations(settings)
    write_result(Path(__file__).stem, result, args.output)


if __name__ == "__main__":
    main()
