"""One piece of work done by this project's model, by transformers' Flax class and by PyTorch, in turns.

Rules. Each peer lives in a process of its own, with random weights of the same configuration, and is warmed up by one
run, whose time (making the model and compiling included) is reported apart, and two more. Then they take turns, one run
each, so that a change of the machine's speed meets all of them; the clock stops when the result is there
(`block_until_ready`). Reported are the median, the spread (minimum to maximum) and, as ratio, the median of the ratios
of runs of the same turn. Peak memory is the process's largest resident size on a CPU, and on an accelerator what the
backend reports.

With `--apart` each peer has the device to itself, one after another, where they would not fit into its memory together;
the ratio is then that of the medians. A peer that fails, for want of memory or otherwise, is reported with the reason,
and the others go on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
import traceback
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
Make = Callable[[str, dict[str, Any]], Run]
REASON = 300
"""Characters of a failure that are kept."""


class PeerFailed(Exception):
    """A peer cannot do its work; the message is the reason."""


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
    make: Make, peers: list[str], settings: dict[str, Any], *, turns: int, apart: bool = False
) -> dict[str, Any]:
    """Let the peers take turns at the work that `make(peer, settings)` returns; their times, ratios and memory.

    Returns:
        Of a peer that failed, `failed` alone, the reason.
    """
    groups = [[peer] for peer in peers] if apart else [peers]
    results = {peer: found for group in groups for peer, found in _take_turns(make, group, settings, turns).items()}
    first = results[peers[0]]
    for peer in peers[1:]:
        if "failed" in first or "failed" in results[peer]:
            continue
        pairs = zip(results[peer]["seconds_of_turns"], first["seconds_of_turns"], strict=True)
        ratios = [theirs / ours for theirs, ours in pairs]
        ratio = results[peer]["seconds"] / first["seconds"] if apart else statistics.median(ratios)
        results[peer][f"times_{peers[0]}"] = ratio
        results[peer]["ratio_spread"] = [min(ratios), max(ratios)]
    return {"settings": settings, "turns": turns, "apart": apart, "peers": results}


def _take_turns(make: Make, peers: list[str], settings: dict[str, Any], turns: int) -> dict[str, dict[str, Any]]:
    """Run some peers in turns; what each measured, or why it failed."""
    if len(peers) > 1:
        # JAX takes three quarters of a GPU at its start, and would leave the next peer none.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    results: dict[str, dict[str, Any]] = {}
    workers: dict[str, tuple[Any, Any]] = {}

    def ask(peer: str, message: str | None) -> Any:
        """Send a message to a peer, if there is one, and give its answer; None from one that failed."""
        process, connection = workers[peer]
        try:
            if message is not None:
                connection.send(message)
            failed, answer = connection.recv()
            if failed:
                raise PeerFailed(answer)
            return answer
        except (PeerFailed, EOFError, OSError) as error:
            process.join()
            killed = f"its process ended with status {process.exitcode}, as one that is out of memory may"
            results[peer] = {"failed": str(error) if isinstance(error, PeerFailed) else killed}
            print(f"{peer}: {results[peer]}", flush=True)
            del workers[peer]
            return None

    context = multiprocessing.get_context("spawn")
    first: dict[str, float] = {}
    for peer in peers:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(make, peer, settings, theirs), daemon=True)
        process.start()
        theirs.close()
        workers[peer] = (process, ours)
        report = ask(peer, None)  # one after another: compilations do not disturb each other
        if report is not None:
            first[peer] = report
            print(f"{peer}: ready after {report:.1f} s", flush=True)
    seconds: dict[str, list[float]] = {peer: [] for peer in workers}
    for _ in range(turns):
        for peer in list(workers):
            if (taken := ask(peer, "run")) is not None:
                seconds[peer].append(taken)
        print({peer: round(seconds[peer][-1], 3) for peer in workers}, flush=True)
    for peer in list(workers):
        process = workers[peer][0]
        if (memory := ask(peer, "end")) is not None:
            times = seconds[peer]
            results[peer] = {
                "seconds": statistics.median(times),
                "spread": [min(times), max(times)],
                "seconds_of_turns": times,
                "first_run_seconds": first[peer],
                "peak_memory_mb": memory,
            }
            process.join()
    return {peer: results[peer] for peer in peers}


def _work(make: Make, peer: str, settings: dict[str, Any], connection: Any) -> None:
    """Answer each message with (failed, answer)."""
    try:
        started = time.perf_counter()
        run = make(peer, settings)
        run()
        first = time.perf_counter() - started
        for _ in range(WARM_UPS):
            run()
        connection.send((False, first))
        while connection.recv() == "run":
            started = time.perf_counter()
            run()
            connection.send((False, time.perf_counter() - started))
        connection.send((False, peak_memory(peer)))
    except Exception as error:  # each backend has an error of its own for memory that is not there
        traceback.print_exc()
        connection.send((True, f"{type(error).__name__}: {error}"[:REASON]))


def peak_memory(peer: str) -> float:
    """Megabytes: the device's where it keeps count, else the process's."""
    if peer != "torch":
        import jax

        statistics_of_device = jax.devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in statistics_of_device:
            return statistics_of_device["peak_bytes_in_use"] / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def write_result(name: str, result: dict[str, Any], output: Path | None, *, quiet: bool = False) -> None:
    """Print a result, and write it with the machine and the versions that made it."""
    import jax

    made_by = {
        "benchmark": name,
        "date": date.today().isoformat(),
        "device": f"{jax.devices()[0].device_kind}, {multiprocessing.cpu_count()} cores, {platform.machine()}",
        "versions": _versions("jax", "flax", "transformers", "torch", "numpy"),
    }
    text = json.dumps({**made_by, **{key: value for key, value in result.items() if key not in made_by}}, indent=1)
    if not quiet:
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
