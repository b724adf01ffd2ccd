"""Batches are the same bytes whatever reads them: any number of threads, devices and processes, any cache or block."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from repro.data.batches import CaptionedImages, RowOrder, prepare_split
from repro.data.image_cache import load_images
from repro.data.sources import load_splits
from repro.pocket.halves import render_pocket
from repro.run.build import Training
from repro.training.sharding import create_mesh, train_batch_sharding

BLOCK = 16
"""Rows, and images in memory at most; two batches."""
ROW_ORDER = RowOrder(seed=7, num_epochs=2, shuffle=True, num_replicas=4, replica_batch=2)
NUM_STEPS = 2 * (12 * 5 // 8)
Batches = list[dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batches") / "coco"
    render_pocket(folder, num_train=12, num_val=1, image_size=16, seed=0)
    return folder


def split_of(coco: Path, tokenizer, image_processor, cache: Path | None, **options) -> CaptionedImages:
    name = "ydshieh/coco_dataset_script"
    kept = cache or coco.parent / "kept"
    rows = load_splits(splits=["train"], dataset_name=name, data_dir=str(coco), rows_dir=kept / "rows")["train"]
    places = {path: place for place, path in enumerate(rows.dataset.unique("image_path"))}
    store = load_images(
        list(places),
        image_processor,
        convert_to_rgb=True,
        cache_dir=cache / "images" if cache else None,
        progress=False,
        **options,
    )
    split, dropped = prepare_split(
        rows.dataset,
        tokenizer,
        places,
        store,
        max_length=10,
        decoder_start_token_id=3,
        split="train",
        tokens_dir=kept / "tokens",
    )
    assert not dropped
    return split


def training_of(data: Any, sharding: jax.sharding.NamedSharding) -> Training:
    return Training(SimpleNamespace(splits={"train": data}), None, None, None, ROW_ORDER, sharding, {})


def batches_of(data: CaptionedImages, num_devices: int = 1) -> Batches:
    mesh = create_mesh(jax.devices()[:num_devices], num_replicas=4, replica_batch=2)
    sharding = train_batch_sharding(mesh, num_replicas=4)
    batches = training_of(data, sharding).batches()
    return [{name: np.asarray(array) for name, array in batch.items()} for _, batch, _ in batches]


def assert_same(batches: Batches, expected: Batches) -> None:
    assert len(batches) == len(expected) == NUM_STEPS
    for one, other in zip(batches, expected, strict=True):
        assert set(one) == set(other) == {"pixels", "labels", "decoder_input_ids", "decoder_attention_mask"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope="module")
def expected(coco: Path, tokenizer, image_processor) -> Batches:
    """Batches cut by hand: each image decoded when it is needed, in the documented order."""
    data = split_of(coco, tokenizer, image_processor, None, num_workers=1)
    rows = [rows for epoch in range(2) for rows in ROW_ORDER.epoch_rows(epoch, len(data))]
    return [
        {
            name: array.reshape(4, 2, *array.shape[1:])
            for name, array in {
                "pixels": np.stack([data.images[np.array([place])][0] for place in data.image_index[step.reshape(-1)]]),
                **data.tokens(step.reshape(-1)),
            }.items()
        }
        for step in rows
    ]


def damaged(content: bytes, how: str) -> bytes:
    half = len(content) // 2
    return {
        "gone": b"",
        "cut": content[:half],
        "zeros at the end": content[:-40] + bytes(40),
        "zeros behind": content + bytes(40),
        "another byte": content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :],
        "a list": b"[1]",
    }[how]


@pytest.mark.parametrize("kind", ["rows/*.arrow", "rows/*.json", "tokens/*.npy", "tokens/*.json"])
@pytest.mark.parametrize("how", ["gone", "cut", "zeros at the end", "zeros behind", "another byte", "a list"])
def test_a_damaged_cache_is_named_and_made_again(
    coco: Path, tokenizer, image_processor, expected: Batches, tmp_path: Path, caplog, kind: str, how: str
) -> None:
    split_of(coco, tokenizer, image_processor, tmp_path)
    (file,) = tmp_path.glob(kind)
    whole = file.read_bytes()
    file.write_bytes(damaged(whole, how))
    assert_same(batches_of(split_of(coco, tokenizer, image_processor, tmp_path)), expected)
    assert f"{str(file).removesuffix('.json')}: is damaged" in caplog.text
    assert file.read_bytes() == whole
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("num_devices", [1, 4, 8])
@pytest.mark.parametrize("num_workers", [1, 3, None])
@pytest.mark.parametrize("mode", ["cold cache", "warm cache", "memory", "blocks"])
def test_batches_are_the_same_bytes(
    coco: Path,
    tokenizer,
    image_processor,
    expected: Batches,
    tmp_path: Path,
    mode: str,
    num_workers: int | None,
    num_devices: int,
) -> None:
    cache = tmp_path / "cache" if "cache" in mode else None
    options = {"num_workers": num_workers, "capacity": BLOCK if mode == "blocks" else None}
    for _ in range(2 if mode == "warm cache" else 1):
        data = split_of(coco, tokenizer, image_processor, cache, **options)
    assert_same(batches_of(data, num_devices), expected)


def test_a_step_needs_no_replay(coco: Path, tokenizer, image_processor, expected: Batches) -> None:
    data = split_of(coco, tokenizer, image_processor, None)
    steps = ROW_ORDER.steps_per_epoch(len(data))
    for step in (NUM_STEPS - 1, 3):
        rows = ROW_ORDER.epoch_rows(step // steps, len(data))[step % steps]
        for name, array in data.batch(rows.reshape(-1)).items():
            np.testing.assert_array_equal(array.reshape(expected[step][name].shape), expected[step][name])


def one_process(arguments: dict) -> None:
    """Read what belongs to one process of several, and keep it with the rows that were asked for."""
    from transformers import AutoTokenizer, ViTImageProcessor

    jax.distributed.initialize(
        f"localhost:{arguments['port']}", num_processes=arguments["num_processes"], process_id=arguments["process_id"]
    )
    model = Path(arguments["model"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    data = split_of(
        Path(arguments["coco"]), tokenizer, ViTImageProcessor.from_pretrained(model), Path(arguments["cache"])
    )
    asked: list[list[int]] = []

    class Recorder:
        def __len__(self) -> int:
            return len(data)

        def batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
            asked.append(rows.tolist())
            return data.batch(rows)

    mesh = create_mesh(jax.devices(), num_replicas=4, replica_batch=2)
    arrays: dict[str, np.ndarray] = {}

    sharding = train_batch_sharding(mesh, num_replicas=4)
    for _, batch, _ in training_of(Recorder(), sharding).batches():
        for name, array in batch.items():
            replicas = sorted(shard.index[0].start or 0 for shard in array.addressable_shards)
            parts = {shard.index[0].start or 0: np.asarray(shard.data) for shard in array.addressable_shards}
            arrays[f"{len(arrays) // 4}/{name}"] = np.concatenate([parts[replica] for replica in replicas])
    np.savez(arguments["out"], asked=json.dumps(asked), **arrays)


@pytest.mark.parametrize(
    ("num_processes", "devices_each"),
    [(2, 2), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(4, 1, marks=pytest.mark.slow)],
)
def test_each_process_reads_its_own_rows_and_together_they_are_the_batch(
    coco: Path, expected: Batches, golden_inputs: Path, tmp_path: Path, num_processes: int, devices_each: int
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices_each}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    processes = []
    for process_id in range(num_processes):
        arguments = {
            "port": port,
            "num_processes": num_processes,
            "process_id": process_id,
            "model": str(golden_inputs / "model"),
            "coco": str(coco),
            "cache": str(tmp_path / "cache"),  # which they make together
            "out": str(tmp_path / f"{process_id}.npz"),
        }
        code = f"import json, test_batches; test_batches.one_process(json.loads({json.dumps(json.dumps(arguments))}))"
        processes.append(subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE))
    for process in processes:
        _, message = process.communicate(timeout=300)
        assert process.returncode == 0, message.decode()[-2000:]
    parts = [np.load(tmp_path / f"{process_id}.npz") for process_id in range(num_processes)]
    together = [
        {name: np.concatenate([part[f"{step}/{name}"] for part in parts]) for name in expected[0]}
        for step in range(NUM_STEPS)
    ]
    assert_same(together, expected)
    asked = [json.loads(str(part["asked"])) for part in parts]
    for step in range(NUM_STEPS):
        rows = [row for process in asked for row in process[step]]
        assert len(rows) == len(set(rows)) == ROW_ORDER.global_batch
        assert {len(process[step]) for process in asked} == {ROW_ORDER.global_batch // num_processes}
