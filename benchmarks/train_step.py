"""Training steps per second and memory against transformers' Flax class and PyTorch.

    python benchmarks/train_step.py --output benchmarks/results/cpu/train_step.json

At ViT-B/16 + GPT-2 size, dropout on, AdamW. The Flax class takes this project's own step (loss, optimizer, donation),
so that the model alone differs; `flax_example` takes the example's loss, which builds smoothed one-hot targets. Model
FLOP utilisation is the operations of the forward pass times three, over time and the peak given by `--peak_teraflops`.
`--batches` times the first peer alone at several batch sizes. The peer PyTorch needs torch beside the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from peers import Run, compare, draw_batch, jax_captioner, torch_model, torch_pixels, write_result
from roofline import forward_products, operations


def make_step(peer: str, settings: dict[str, Any]) -> Run:
    batch = draw_batch(settings)
    if peer.startswith("torch"):
        return _torch_step(settings, batch, compiled=peer == "torch_compiled")
    import jax
    import optax

    from repro.training.steps import create_learning_rate_fn, create_optimizer, create_train_state, make_train_step

    captioner, params = jax_captioner(peer.split("_")[0], settings)
    schedule = create_learning_rate_fn(3e-5, num_steps=10_000, warmup_steps=0)
    optimizer = create_optimizer(schedule, rule="layer_norms")
    replicas = settings.get("replicas", 1)
    state = create_train_state(params, optimizer, seed=0, num_replicas=replicas)
    del params
    batch = jax.device_put({name: array.reshape(replicas, -1, *array.shape[1:]) for name, array in batch.items()})
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

    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    holder = [state]
    del state

    def run() -> float:
        holder[0], metrics = compiled(holder[0], batch)
        jax.block_until_ready(holder[0])
        return float(metrics["loss"])

    return run


def _torch_step(settings: dict[str, Any], batch: dict[str, np.ndarray], *, compiled: bool = False) -> Run:
    import torch

    model = torch_model(settings | {"dtype": "float32"}).train()
    on_gpu = model.device.type == "cuda"
    if on_gpu:  # the same products as JAX's default, TF32
        torch.set_float32_matmul_precision("high")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, weight_decay=0.0, fused=on_gpu)
    model = torch.compile(model) if compiled else model
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
        return loss.item()

    return run


def forward_operations(settings: dict[str, Any]) -> float:
    """Operations of one forward pass over a batch."""
    return operations(forward_products(settings))


def with_rates(result: dict[str, Any], peak_teraflops: float | None) -> dict[str, Any]:
    """Add to what peers measured the rates that it comes to."""
    settings = result["settings"]
    count = 3 * forward_operations(settings)
    peers = {}
    for peer, measured in result["peers"].items():
        peers[peer] = dict(measured)
        if "failed" not in measured:
            rate = count / measured["seconds"] / 1e12
            peers[peer] |= {"rows_per_second": settings["batch"] / measured["seconds"], "teraflops": rate}
            if peak_teraflops:
                peers[peer] |= {"utilisation": rate / peak_teraflops}
    return {**result, "giga_operations": count / 1e9, "peak_teraflops": peak_teraflops, "peers": peers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=["native", "flax", "flax_example", "torch"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=32, help="tokens")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--peak_teraflops", type=float, help="the device's, for the model FLOP utilisation")
    parser.add_argument("--apart", action="store_true", help="one peer after another, each alone on the device")
    parser.add_argument("--batches", type=int, nargs="+", help="instead: of the first peer, at these sizes")
    parser.add_argument("--smoke", action="store_true", help="very small models, to see that it runs")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("batch", "length", "dtype", "smoke")}

    def measure(peers: list[str], settings: dict[str, Any]) -> dict[str, Any]:
        found = compare(make_step, peers, settings, turns=args.turns, apart=args.apart)
        return with_rates(found, args.peak_teraflops)

    if args.batches:
        sizes = [measure(args.peers[:1], settings | {"batch": batch}) for batch in args.batches]
        result: dict[str, Any] = {"batches": sizes}
    else:
        result = measure(args.peers, settings)
    write_result(Path(__file__).stem, result, args.output)


if __name__ == "__main__":
    main()
