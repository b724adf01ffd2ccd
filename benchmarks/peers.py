"""One piece of work done by this project's model, by transformers' Flax class and by PyTorch, in turns.

Rules. Each peer lives in a process of its own, with random weights of the same configuration, and is warmed up by one
run, whose time (compilation included) is reported apart, and two more. Then they take turns, one run each, so that a
change of the machine's speed meets all of them; the clock stops when the result is there (`block_until_ready`).
Reported are the median, the spread (minimum to maximum) and, as ratio, the median of the ratios of runs of the same
turn. Peak memory is the process's largest resident size on a CPU, and on an accelerator what the backend reports.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

END = 50_256
WARM_UPS = 2
"""Runs after the first: the second and third step of a training still meet memory that was never touched."""
Run = Callable[[], Any]


def model_config(settings: dict[str, Any]) -> Any:
    """ViT-B/16 and GPT-2 as published, or with `smoke` two very small halves."""
    from transformers import GPT2Config, VisionEncoderDecoderConfig, ViTConfig

    encoder, decoder = ViTConfig(), GPT2Config()
    if settings["smoke"]:
        encoder = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        decoder = GPT2Config(n_embd=32, n_layer=1, n_head=2)
    decoder.is_decoder = decoder.add_cross_attention = True
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = config.eos_token_id = config.pad_token_id = END
    return config


def pixel_table() -> np.ndarray:
    return np.tile(np.linspace(-1, 1, 256, dtype=np.float32)[:, None], (1, 3))


def draw_batch(settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random pixels, and captions of full length: no peer may skip padding."""
    random = np.random.default_rng(0)
    shape = (settings["batch"], settings["length"])
    tokens = random.integers(0, 50_257, shape, dtype=np.int32)
    return {
        "pixels": random.integers(0, 256, (settings["batch"], 224, 224, 3), dtype=np.uint8),
        "labels": tokens,
        "decoder_input_ids": tokens,
        "decoder_attention_mask": np.ones(shape, np.int32),
    }


def jax_captioner(peer: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """A captioner and its parameters on the device."""
    import jax
    from transformers import GenerationConfig

    from repro.models.captioner import NativeCaptioner

    config, dtype = model_config(settings), jax.numpy.dtype(settings["dtype"])
    if peer == "native":
        captioner = NativeCaptioner(config, GenerationConfig(), pixel_table(), dtype=dtype)
        return captioner, captioner.init(0)
    from transformers import FlaxVisionEncoderDecoderModel

    from repro.models.transformers_flax import FlaxClassCaptioner

    model = FlaxVisionEncoderDecoderModel(config, seed=0, dtype=dtype)
    return FlaxClassCaptioner(model, pixel_table()), model.params


def torch_model(settings: dict[str, Any]) -> Any:
    import torch
    from transformers import VisionEncoderDecoderModel

    torch.manual_seed(0)
    model = VisionEncoderDecoderModel(model_config(settings))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device=device, dtype=getattr(torch, settings["dtype"]))


def torch_pixels(model: Any, pixels: np.ndarray) -> Any:
    import torch

    values = np.moveaxis(pixel_table()[pixels, np.arange(3)], -1, 1)
    return torch.tensor(values, device=model.device, dtype=model.dtype)


def compare(
    make: Callable[[str, dict[str, Any]], Run], peers: list[str], settings: dict[str, Any], *, turns: int
) -> dict[str, Any]:
    """Let the peers take turns at the work that `make(peer, settings)` returns; their times, ratios and memory."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for peer in peers:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(make, peer, settings, theirs), daemon=True)
        process.start()
        theirs.close()
        workers[peer] = (process, ours)
        report = ours.recv()  # one after another: compilations do not disturb each other
        print(f"{peer}: ready after {report:.1f} s", flush=True)
        workers[peer] = (process, ours, report)
    seconds: dict[str, list[float]] = {peer: [] for peer in peers}
    for _ in range(turns):
        for peer, (_, connection, _) in workers.items():
            connection.send("run")
            seconds[peer].append(connection.recv())
        print({peer: round(times[-1], 3) for peer, times in seconds.items()}, flush=True)
    results = {}
    for peer, (process, connection, first) in workers.items():
        connection.send("end")
        times = seconds[peer]
        results[peer] = {
            "seconds": statistics.median(times),
            "spread": [min(times), max(times)],
            "seconds_of_turns": times,
            "first_run_seconds": first,
            "peak_memory_mb": connection.recv(),
        }
        process.join()
    for peer in peers[1:]:
        ratios = [theirs / ours for theirs, ours in zip(seconds[peer], seconds[peers[0]], strict=True)]
        results[peer][f"times_{peers[0]}"] = statistics.median(ratios)
        results[peer]["ratio_spread"] = [min(ratios), max(ratios)]
    return {"settings": settings, "turns": turns, "peers": results}


def _work(make: Callable[[str, dict[str, Any]], Run], peer: str, settings: dict[str, Any], connection: Any) -> None:
    run = make(peer, settings)
    started = time.perf_counter()
    run()
    first = time.perf_counter() - started
    for _ in range(WARM_UPS):
        run()
    connection.send(first)
    while connection.recv() == "run":
        started = time.perf_counter()
        run()
        connection.send(time.perf_counter() - started)
    connection.send(peak_memory(peer))


def peak_memory(peer: str) -> float:
    """Megabytes: the device's where it keeps count, else the process's."""
    if peer != "torch":
        import jax

        statistics_of_device = jax.devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in statistics_of_device:
            return statistics_of_device["peak_bytes_in_use"] / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def write_result(name: str, result: dict[str, Any], output: Path | None) -> None:
    """Print a result, and write it with the machine and the versions that made it."""
    import jax

    result = {
        "benchmark": name,
        "date": date.today().isoformat(),
        "device": f"{jax.devices()[0].device_kind}, {multiprocessing.cpu_count()} cores, {platform.machine()}",
        "versions": _versions("jax", "flax", "transformers", "torch", "numpy"),
        **result,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")


def _versions(*packages: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
