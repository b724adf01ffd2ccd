"""Training steps per second and memory against transformers' Flax class and PyTorch.

    python benchmarks/train_step.py --output benchmarks/results/cpu/train_step.json

At ViT-B/16 + GPT-2 size, dropout on, AdamW. The Flax class takes this project's own step (loss, optimizer, donation),
so that the model alone differs; `flax_example` takes the example's loss, which builds smoothed one-hot targets. Model
FLOP utilisation is the operations of the forward pass times three, over time and the peak given by `--peak_teraflops`.
The peer PyTorch needs torch beside the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from generation import count_operations
from peers import Run, compare, draw_batch, jax_captioner, torch_model, torch_pixels, write_result


def make_step(peer: str, settings: dict[str, Any]) -> Run:
    batch = draw_batch(settings)
    if peer == "torch":
        return _torch_step(settings, batch)
    import jax
    import optax

    from repro.training.optimizer import create_learning_rate_fn, create_optimizer
    from repro.training.state import create_train_state
    from repro.training.steps import make_train_step

    captioner, params = jax_captioner(peer.split("_")[0], settings)
    schedule = create_learning_rate_fn(3e-5, num_steps=10_000, warmup_steps=0)
    optimizer = create_optimizer(schedule, rule="layer_norms")
    state = create_train_state(params, optimizer, seed=0, num_replicas=1)
    del params
    batch = {name: array[None] for name, array in batch.items()}
    step = make_train_step(captioner.logits, optimizer, schedule, reduction="tokens")
    if peer == "flax_example":

        def step(state: Any, batch: Any) -> Any:
            rows = {name: array[0] for name, array in batch.items()}
            key, following = jax.random.split(state.dropout_keys[0])

            def loss_fn(params: Any) -> Any:
                logits = captioner.logits(
                    params, rows["pixels"], rows["decoder_input_ids"], rows["decoder_attention_mask"], dropout_key=key
                )
                targets = jax.nn.one_hot(rows["labels"], logits.shape[-1])
                losses = optax.softmax_cross_entropy(logits, targets) * rows["decoder_attention_mask"]
                return losses.sum() / rows["decoder_attention_mask"].sum()

            loss, gradients = jax.value_and_grad(loss_fn)(state.params)
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, dropout_keys=following[None])
            return state, {"loss": loss}

    compiled = jax.jit(step, donate_argnums=0)
    holder = [state]
    del state

    def run() -> float:
        holder[0], metrics = compiled(holder[0], batch)
        jax.block_until_ready(holder[0])
        return float(metrics["loss"])

    return run


def _torch_step(settings: dict[str, Any], batch: dict[str, np.ndarray]) -> Run:
    import torch

    model = torch_model(settings | {"dtype": "float32"}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, weight_decay=0.0)
    values = torch_pixels(model, batch["pixels"])
    tokens, mask, labels = (
        torch.tensor(batch[name], dtype=torch.long, device=model.device)
        for name in ("decoder_input_ids", "decoder_attention_mask", "labels")
    )
    half = settings["dtype"] != "float32"

    def run() -> float:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            logits = model(pixel_values=values, decoder_input_ids=tokens, decoder_attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return run


def forward_operations(settings: dict[str, Any]) -> float:
    """Operations of one forward pass over a batch: one beam, one more token than a search takes, no cache."""
    parts = count_operations(settings | {"beams": 1, "length": settings["length"] + 1})
    return 1e9 * sum(parts.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=["native", "flax", "flax_example", "torch"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=32, help="tokens")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--peak_teraflops", type=float, help="the device's, for the model FLOP utilisation")
    parser.add_argument("--smoke", action="store_true", help="very small models, to see that it runs")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("batch", "length", "dtype", "smoke")}
    result = compare(make_step, args.peers, settings, turns=args.turns)
    operations = 3 * forward_operations(settings)
    result["giga_operations"] = operations / 1e9
    for measured in result["peers"].values():
        rate = operations / measured["seconds"] / 1e12
        measured["rows_per_second"] = args.batch / measured["seconds"]
        measured["teraflops"] = rate
        if args.peak_teraflops:
            measured["utilisation"] = rate / args.peak_teraflops
    write_result(Path(__file__).stem, result, args.output)


if __name__ == "__main__":
    main()
