"""What saving the state beside the training costs, and how soon a run that was ended takes its next step.

    python benchmarks/saving.py --output benchmarks/results/cpu-2-cores/saving.json

A ViT-GPT-2 of half the width and two thirds of the depth (a state of 1 GB) is trained on one batch, in blocks of 50
steps. Every other block begins with `Checkpoints.save`, so that a change of the machine's speed meets both kinds; the
clock of a block includes the save's own call and ends when the last step is there. Reported are the medians of the
kinds and, as overhead, the median of the ratios of neighbours. Afterwards processes of their own go on from the last
state: without a cache of compiled programs, and with one (`JAX_COMPILATION_CACHE_DIR`) that is warm.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from peers import draw_batch, model_config, pixel_table, write_result

STEPS = 50


def build(settings: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Compile the step; returns it, how its state is made, what that looks like, and a batch on the device."""
    import jax
    from transformers import GenerationConfig

    from repro.models.captioner import NativeCaptioner
    from repro.training.memory import batch_shapes
    from repro.training.sharding import create_mesh, put, replicated, state_sharding, train_batch_sharding
    from repro.training.steps import create_learning_rate_fn, create_optimizer, create_train_state, make_train_step

    config = model_config(settings)
    if not settings["smoke"]:
        half = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 2048}
        config.encoder.update(half)
        config.decoder.update({"n_embd": 512, "n_layer": 8, "n_head": 8})
    captioner = NativeCaptioner(config, GenerationConfig(), pixel_table())
    schedule = create_learning_rate_fn(3e-5, num_steps=10_000)
    optimizer = create_optimizer(schedule, rule="layer_norms")
    sizes = {"num_replicas": 1, "replica_batch": settings["batch"]}
    mesh = create_mesh(jax.devices()[:1], **sizes)
    create = partial(create_train_state, optimizer=optimizer, seed=0, num_replicas=1)
    places = state_sharding(mesh, jax.eval_shape(lambda: create(captioner.init(0))))
    like = jax.jit(lambda: create(captioner.init(0)), out_shardings=places).eval_shape()
    batch, sharding = draw_batch(settings), train_batch_sharding(mesh, num_replicas=1)
    step = make_train_step(captioner.logits, optimizer, schedule, reduction="tokens", replicas_at_once=1)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, replicated(mesh)))
    return (
        jitted.lower(like, batch_shapes(batch, tuple(sizes.values()), sharding)).compile(),
        lambda: put(create(captioner.init(0)), places),
        like,
        put({name: array[None] for name, array in batch.items()}, sharding),
    )


def measure_saving(settings: dict[str, Any], folder: Path, *, pairs: int) -> dict[str, Any]:
    """Train blocks with and without a save; the last state stays in the folder."""
    from repro.training.checkpoint import Checkpoints

    step, create, _, batch = build(settings)
    state = create()
    states = Checkpoints(folder, keep=1)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    blocked, on_disk = [], []
    for number in range(-1, 2 * pairs):  # the first block warms up
        saves = number % 2 == 0
        started = time.perf_counter()
        if saves:
            states.save(state, number, {"step": number, "training_seconds": 0.0, "settings": {"num_replicas": 1}})
            blocked.append(time.perf_counter() - started)
            assert states._pending
            states._pending.add_done_callback(lambda _, begun=started: on_disk.append(time.perf_counter() - begun))
        for _ in range(STEPS):
            state, metrics = step(state, batch)
            float(metrics["loss"])
        states.wait()
        if number >= 0:
            seconds[saves].append((time.perf_counter() - started) / STEPS)
            print(f"{'with' if saves else 'without'} a save: {seconds[saves][-1]:.3f} s a step", flush=True)
    states.close()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    overheads = [(with_save / without - 1) * 100 for with_save, without in zip(*seconds.values(), strict=True)]
    return {
        "state_megabytes": round(size / 1e6),
        "seconds_a_step_without": statistics.median(seconds[False]),
        "seconds_a_step_with": statistics.median(seconds[True]),
        "overhead_percent": statistics.median(overheads),
        "overhead_percent_of_each_pair": overheads,
        "seconds_save_blocks": blocked,
        "seconds_until_on_disk_with_checksums": on_disk,
    }


def restart(settings: dict[str, Any], folder: Path, started: float) -> dict[str, float]:
    """Go on from the state in a folder; returns the seconds that each part took, from the start of the process."""
    from repro.training.checkpoint import Checkpoints, find_newest

    marks = {"imports": time.time()}
    found = find_newest(folder)
    assert found
    marks["verify_checksums"] = time.time()
    step, _, like, batch = build(settings)
    marks["model_and_compile"] = time.time()
    states = Checkpoints(folder, keep=1)
    state = states.restore(found, like)
    marks["restore"] = time.time()
    float(step(state, batch)[1]["loss"])
    marks["first_step"] = time.time()
    states.close()
    times = [started, *marks.values()]
    parts = {name: end - begin for name, begin, end in zip(marks, times, times[1:], strict=False)}
    return {**parts, "total": times[-1] - started}


def measure_restarts(settings: dict[str, Any], folder: Path) -> dict[str, dict[str, float]]:
    """Restart in processes of their own, without and with compiled programs from before."""
    results = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
        for name, more in (("no cache", {}), ("cold cache", environment), ("warm cache", environment)):
            command = [sys.executable, __file__, "--restart", str(folder), "--started", repr(time.time())]
            command += ["--settings", json.dumps(settings)]
            done = subprocess.run(command, env={**os.environ, **more}, check=True, capture_output=True, text=True)
            results[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: {results[name]['total']:.1f} s to the end of the next step", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=32, help="tokens")
    parser.add_argument("--pairs", type=int, default=3, help="of blocks")
    parser.add_argument("--smoke", action="store_true", help="very small models, to see that it runs")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--restart", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.restart:
        print(json.dumps(restart(args.settings, args.restart, args.started)))
        return
    settings = {"batch": args.batch, "length": args.length, "smoke": args.smoke}
    # This process keeps the device while others restart, and JAX takes three quarters of a GPU at its start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "settings": settings,
            "saving": measure_saving(settings, Path(folder) / "state", pairs=args.pairs),
            "restart": measure_restarts(settings, Path(folder) / "state"),
        }
    write_result("saving", result, args.output)


if __name__ == "__main__":
    main()
