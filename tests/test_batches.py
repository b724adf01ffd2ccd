"""Batches are the same bytes whatever reads them: any number of threads, devices and processes, any cache or block."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from repro.data.batches import RowOrder, prepare_split
from repro.data.image_cache import load_images
from repro.data.sources import load_splits
from repro.pocket.halves import render_pocket
from repro.run.build import Training
from repro.training.sharding import create_mesh, train_batch_sharding

BLOCK = 16  # rows, and images in memory at most; two batches
ROW_ORDER = RowOrder(seed=7, num_epochs=2, shuffle=True, num_replicas=4, replica_batch=2)
NUM_STEPS = 2 * (12 * 5 // 8)
NAMES = {"pixels", "labels", "decoder_input_ids", "decoder_attention_mask"}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches") / "coco"
    render_pocket(folder, num_train=12, num_val=1, image_size=16, seed=0)
    return folder


def split_of(coco, tokenizer, image_processor, cache=None, **options):
    name, kept = "ydshieh/coco_dataset_script", cache or coco.parent / "kept"
    rows = load_splits(splits=["train"], dataset_name=name, data_dir=str(coco), rows_dir=kept / "rows")["train"]
    places = {path: place for place, path in enumerate(rows.dataset.unique("image_path"))}
    options |= {"convert_to_rgb": True, "cache_dir": cache and cache / "images", "progress": False}
    store = load_images(list(places), image_processor, **options)
    how = {"max_length": 10, "decoder_start_token_id": 3, "split": "train", "tokens_dir": kept / "tokens"}
    split, dropped = prepare_split(rows.dataset, tokenizer, places, store, **how)
    assert not dropped
    return split


@pytest.fixture(scope="module")
def read(coco, tokenizer, image_processor):
    """Read the split, with a cache or without."""
    return lambda *cache, **options: split_of(coco, tokenizer, image_processor, *cache, **options)


def batches_of(data, num_devices=1, first_step=0):
    mesh = create_mesh(jax.devices()[:num_devices], num_replicas=4, replica_batch=2)
    sharding = train_batch_sharding(mesh, num_replicas=4)
    training = Training(SimpleNamespace(splits={"train": data}), None, None, None, ROW_ORDER, sharding, {})
    return [batch for _, batch, _ in training.batches(first_step) if batch]


def assert_same(batches, expected):
    for one, other in zip(batches, expected, strict=True):
        assert set(one) == set(other) == NAMES
        for name in NAMES:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope="module")
def expected(read):
    """Batches cut by hand: each image decoded when it is needed, in the documented order."""
    data, batches = read(num_workers=1), []
    for rows in (step.reshape(-1) for epoch in range(2) for step in ROW_ORDER.epoch_rows(epoch, len(data))):
        pixels = np.stack([data.images[np.array([place])][0] for place in data.image_index[rows]])
        batch = {"pixels": pixels, **data.tokens(rows)}
        batches.append({name: array.reshape(4, 2, *array.shape[1:]) for name, array in batch.items()})
    assert len(batches) == NUM_STEPS
    return batches


@pytest.fixture(scope="module")
def whole_cache(read, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    read(folder)
    return folder


DAMAGES = {
    "gone": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeros at the end": lambda content: content[:-40] + bytes(40),
    "zeros behind": lambda content: content + bytes(40),
    "another byte": lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
    "a list": lambda content: b"[1]",
}


@pytest.mark.parametrize("kind", ["rows/*.arrow", "rows/*.json", "tokens/*.npy", "tokens/*.json"])
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_cache_is_named_and_made_again(read, expected, whole_cache, tmp_path, caplog, kind, how):
    shutil.copytree(whole_cache, tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.glob(kind)
    whole = file.read_bytes()
    file.write_bytes(DAMAGES[how](whole))
    assert_same(batches_of(read(tmp_path)), expected)
    assert f"{str(file).removesuffix('.json')}: is damaged" in caplog.text
    assert file.read_bytes() == whole
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("num_workers", [1, 3, None])
@pytest.mark.parametrize("mode", ["cold cache", "warm cache", "memory", "blocks"])
def test_batches_are_the_same_bytes(read, expected, tmp_path, mode, num_workers):
    cache = [tmp_path] if "cache" in mode else []
    for _ in range(2 if mode == "warm cache" else 1):
        data = read(*cache, num_workers=num_workers, capacity=BLOCK if mode == "blocks" else None)
    for num_devices in (1, 4, 8):
        assert_same(batches_of(data, num_devices), expected)


def test_a_step_needs_no_replay(read, expected):
    for first_step in (3, NUM_STEPS - 1):
        assert_same(batches_of(read(), first_step=first_step), expected[first_step:])


def one_process(port, num_processes, process_id, model, coco, folder):
    """Read what belongs to one process of several, and keep it with the rows that were asked for."""
    from transformers import AutoTokenizer, ViTImageProcessor

    jax.distributed.initialize(f"localhost:{port}", num_processes=int(num_processes), process_id=int(process_id))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    cache = Path(folder) / "cache"  # which they make together
    data = split_of(Path(coco), tokenizer, ViTImageProcessor.from_pretrained(model), cache)
    asked = []

    class Recorder:
        def __len__(self):
            return len(data)

        def batch(self, rows):
            asked.append(rows.tolist())
            return data.batch(rows)

    arrays = {}
    for step, batch in enumerate(batches_of(Recorder(), len(jax.devices()))):
        for name, array in batch.items():
            parts = {shard.index[0].start or 0: np.asarray(shard.data) for shard in array.addressable_shards}
            arrays[f"{step}/{name}"] = np.concatenate([parts[replica] for replica in sorted(parts)])
    np.savez(f"{folder}/{process_id}.npz", asked=json.dumps(asked), **arrays)


@pytest.mark.parametrize(
    ("num_processes", "devices_each"),
    [(2, 2), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(4, 1, marks=pytest.mark.slow)],
)
def test_each_process_reads_its_own_rows_and_together_they_are_the_batch(
    coco, expected, golden_inputs, tmp_path, num_processes, devices_each
):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    devices = f"--xla_force_host_platform_device_count={devices_each}"
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices}", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    command = [sys.executable, "-c", "import sys, test_batches; test_batches.one_process(*sys.argv[1:])"]
    command += [str(port), str(num_processes)]
    places = [str(golden_inputs / "model"), str(coco), str(tmp_path)]
    processes = [
        subprocess.Popen([*command, str(process_id), *places], env=environment, stderr=subprocess.PIPE)
        for process_id in range(num_processes)
    ]
    for process in processes:
        _, message = process.communicate(timeout=300)
        assert process.returncode == 0, message.decode()[-2000:]
    parts = [np.load(tmp_path / f"{process_id}.npz") for process_id in range(num_processes)]
    together = [
        {name: np.concatenate([part[f"{step}/{name}"] for part in parts]) for name in NAMES}
        for step in range(NUM_STEPS)
    ]
    assert_same(together, expected)
    asked = [json.loads(str(part["asked"])) for part in parts]
    for step in range(NUM_STEPS):
        rows = [row for process in asked for row in process[step]]
        assert len(rows) == len(set(rows)) == ROW_ORDER.global_batch
        assert {len(process[step]) for process in asked} == {ROW_ORDER.global_batch // num_processes}
