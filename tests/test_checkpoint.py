"""A saved state is the state, whole or not used at all, on any mesh; and which are kept."""

from __future__ import annotations

import json
import resource
import threading
from contextlib import closing
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repro.errors import InputError, RunStopped
from repro.training.checkpoint import Checkpoints, check_checksums, find_newest, set_aside, write_checksums
from repro.training.sharding import create_mesh, put, state_sharding
from repro.training.steps import TrainState, create_learning_rate_fn, create_optimizer, create_train_state

OPTIMIZER = create_optimizer(create_learning_rate_fn(0.01, num_steps=10), rule="layer_norms", max_grad_norm=1.0)
RECORD = {"step": 2, "training_seconds": 1.5, "settings": {"num_replicas": 2}}


def state_on(num_devices: int, **shape: int) -> TrainState:
    mesh = create_mesh(jax.devices()[:num_devices], num_replicas=8, replica_batch=1, shape=shape or None)
    params = {"kernel": np.arange(64 * 48, dtype=np.float32).reshape(64, 48), "bias": np.ones(7, np.float32)}
    state = create_train_state(params, OPTIMIZER, seed=3, num_replicas=8)
    return put(jax.tree.map(np.asarray, state), state_sharding(mesh, state))


@partial(jax.jit, donate_argnums=0)
def step(state: TrainState) -> TrainState:
    updates, opt_state = OPTIMIZER.update(state.params, state.opt_state, state.params)
    params = jax.tree.map(jnp.add, state.params, updates)
    return TrainState(state.step + 1, params, opt_state, state.dropout_keys + 1)


def like(state: TrainState) -> TrainState:
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), state)


def assert_same(one: TrainState, other: TrainState) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


def save_steps(folder: Path, *steps: int, keep: int = 9, best=lambda: None) -> None:
    with closing(Checkpoints(folder, keep=keep, best=best)) as checkpoints:
        for number in steps:
            checkpoints.save(state_on(1).replace(step=jnp.int32(number)), number, RECORD | {"step": number})


def test_a_state_is_saved_as_it_was_though_training_goes_on(tmp_path):
    state = step(step(state_on(1)))
    expected = jax.device_get(state)
    with closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        checkpoints.save(state, 2, RECORD)
        for _ in range(20):
            state = step(state)  # takes the buffers that are being saved
        checkpoints.wait()
        found = find_newest(tmp_path)
        assert found.record == RECORD
        assert_same(checkpoints.restore(found, like(state)), expected)


@pytest.mark.parametrize("saved", [(1, {}), (8, {"data": 2, "fsdp": 4}), (8, {"fsdp": 8})], ids=str)
@pytest.mark.parametrize("read", [(1, {}), (4, {"data": 4}), (8, {"data": 4, "fsdp": 2})], ids=str)
def test_a_state_is_read_onto_another_mesh(saved, read, tmp_path):
    state, wanted = state_on(saved[0], **saved[1]), like(state_on(read[0], **read[1]))
    with closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        checkpoints.save(state, 5, RECORD | {"step": 5})
    with closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        restored = checkpoints.restore(find_newest(tmp_path), wanted)
    assert_same(restored, state)
    assert jax.tree.map(lambda a: a.sharding, restored) == jax.tree.map(lambda a: a.sharding, wanted)


def test_large_arrays_are_cut_by_fsdp_along_their_longest_axis_and_small_ones_are_not():
    state = state_on(8, fsdp=8)
    assert {shard.data.shape for shard in state.params["kernel"].addressable_shards} == {(8, 48)}
    moments = state.opt_state[1][0]
    assert {shard.data.shape for shard in moments.mu["kernel"].addressable_shards} == {(8, 48)}
    assert {shard.data.shape for shard in state.params["bias"].addressable_shards} == {(7,)}


def test_the_last_and_the_best_are_kept(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, 5, keep=2, best=lambda: 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "5"]


@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_state_is_named_and_the_one_before_is_used(damage, tmp_path, caplog):
    save_steps(tmp_path, 1, 2)
    files = [path for path in (tmp_path / "2").rglob("*") if path.is_file() and path.name != "checksums.json"]
    assert len(files) > 5
    for file in files:
        content = file.read_bytes()
        if damage == "cut":
            file.write_bytes(content[: len(content) // 2])
        elif damage == "flip":
            middle = len(content) // 2
            file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        else:
            file.unlink()
        caplog.clear()
        found = find_newest(tmp_path)
        assert (found.step, found.corrupt) == (1, [2]), file
        assert f"{tmp_path / '2'} is corrupt" in caplog.text
        assert file.name in caplog.text
        file.write_bytes(content)
    assert find_newest(tmp_path).step == 2


def damaged_record(folder: Path, content: str) -> None:
    (folder / "record" / "metadata").write_text(content)
    (folder / "checksums.json").unlink()


DAMAGES = [
    *(lambda folder, key=key: damaged_record(folder, json.dumps({**RECORD, key: None})) for key in RECORD),
    *(
        lambda folder, text=text: damaged_record(folder, text)
        for text in ("{}", "[]", "", "\0\0", '{"step": 1e400}', '{"step": 2', json.dumps(RECORD | {"step": 1}))
    ),
    lambda folder: damaged_record(folder, json.dumps({**RECORD, "settings": {"num_replicas": 0}})),
    lambda folder: (folder / "checksums.json").write_text("[]"),
    lambda folder: (folder / "checksums.json").write_text('{"a": 3}'),
    lambda folder: (folder / "checksums.json").write_text('{"../../x": "0"}'),
    lambda folder: (folder / "checksums.json").write_text('{"/dev/zero": "0"}'),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
def test_a_state_whose_record_is_of_another_form_is_named_and_the_one_before_is_used(damage, tmp_path, caplog):
    save_steps(tmp_path, 1, 2)
    damage(tmp_path / "2")
    found = find_newest(tmp_path)
    assert (found.step, found.corrupt) == (1, [2])
    assert f"{tmp_path / '2'} is corrupt" in caplog.text


@pytest.mark.parametrize("name", ["2²", "٢", "002", "2 ", "2.bak", "9" * 400])
def test_a_folder_that_is_not_named_by_a_step_is_no_state(name, tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / name[:200])
    found = find_newest(tmp_path)
    assert (found.step, found.corrupt) == (1, [])
    save_steps(tmp_path, 3)
    set_aside(tmp_path, find_newest(tmp_path))
    with closing(Checkpoints(tmp_path, keep=9)) as checkpoints:
        checkpoints.restore(find_newest(tmp_path), like(state_on(1)))
    assert (tmp_path / name[:200]).is_dir()


def test_what_was_killed_while_it_was_written_is_not_found(tmp_path):
    save_steps(tmp_path, 1)
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    assert find_newest(tmp_path).step == 1
    save_steps(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_a_state_that_was_killed_before_its_checksums_is_trusted(tmp_path):
    save_steps(tmp_path, 1)
    (tmp_path / "1" / "checksums.json").unlink()
    found = find_newest(tmp_path)
    assert found.step == 1
    with closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        checkpoints.restore(found, like(state_on(1)))
    assert (tmp_path / "1" / "checksums.json").exists(), "and has them once it was read"


def test_a_damaged_state_without_checksums_is_named_when_it_is_read(tmp_path):
    save_steps(tmp_path, 1)
    refused = []
    for file in sorted((tmp_path / "1" / "state").rglob("*")):
        if file.is_file() and (content := file.read_bytes()):
            (tmp_path / "1" / "checksums.json").unlink()
            file.write_bytes(bytes(len(content)))
            with closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
                try:
                    checkpoints.restore(find_newest(tmp_path), like(state_on(1)))
                except InputError as error:
                    refused.append(str(error))
            file.write_bytes(content)
            write_checksums(tmp_path / "1")
    assert len(refused) > 2
    assert all(f"{tmp_path / '1'}: the state cannot be read" in text for text in refused)


def test_there_is_none_in_an_empty_folder_or_among_damaged_ones(tmp_path):
    assert find_newest(tmp_path / "absent") is None
    save_steps(tmp_path, 1)
    (tmp_path / "1" / "record" / "metadata").write_text("{}")
    assert find_newest(tmp_path) is None


def test_damaged_states_are_set_aside_and_later_ones_removed(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    (tmp_path / "3" / "record" / "metadata").write_text("{}")
    found = find_newest(tmp_path, step=1)
    set_aside(tmp_path, find_newest(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3.corrupt"]
    set_aside(tmp_path, found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3.corrupt"]
    save_steps(tmp_path, 2, 3)
    assert find_newest(tmp_path).step == 3


def test_a_full_disk_leaves_the_earlier_states_usable_and_nothing_half_written(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        checkpoints.save(state_on(1), 1, RECORD | {"step": 1})
        checkpoints.wait()
        # To a writer, a limit on the size of files looks like a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            checkpoints.save(state_on(1), 2, RECORD)
            with pytest.raises(RunStopped, match=r"disk is full: the state.*Earlier states are whole.*--resume auto"):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    check_checksums(tmp_path / "1")
    save_steps(tmp_path, 3, keep=1)
    assert find_newest(tmp_path).step == 3


def test_no_thread_is_left_behind(tmp_path):
    before = set(threading.enumerate())
    save_steps(tmp_path, 1)
    left = [thread.name for thread in set(threading.enumerate()) - before if not thread.daemon]
    assert [name for name in left if "checkpoint" in name] == []
