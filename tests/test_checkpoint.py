"""A saved state is the state, whole or not used at all, on any mesh; and which are kept."""

import json
import resource
import shutil
import threading
from contextlib import closing
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repro.errors import InputError, RunStopped
from repro.training.checkpoint import Checkpoints, check_checksums, find_newest, set_aside
from repro.training.sharding import create_mesh, put, state_sharding
from repro.training.steps import create_learning_rate_fn, create_optimizer, create_train_state

OPTIMIZER = create_optimizer(create_learning_rate_fn(0.01, num_steps=10), rule="layer_norms", max_grad_norm=1.0)
RECORD = {"step": 2, "training_seconds": 1.5, "settings": {"num_replicas": 2}}


def state_on(num_devices, **shape):
    mesh = create_mesh(jax.devices()[:num_devices], num_replicas=8, replica_batch=1, shape=shape or None)
    params = {"kernel": np.arange(64 * 48, dtype=np.float32).reshape(64, 48), "bias": np.ones(7, np.float32)}
    state = create_train_state(params, OPTIMIZER, seed=3, num_replicas=8)
    return put(jax.tree.map(np.asarray, state), state_sharding(mesh, state))


@partial(jax.jit, donate_argnums=0)
def step(state):
    return jax.tree.map(lambda array: array + 1, state)


def like(state):
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), state)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


def save_steps(folder, *steps, keep=9, best=lambda: None):
    with closing(Checkpoints(folder, keep=keep, best=best)) as checkpoints:
        for number in steps:
            checkpoints.save(state_on(1).replace(step=jnp.int32(number)), number, RECORD | {"step": number})


def restored(folder, wanted):
    with closing(Checkpoints(folder, keep=9)) as checkpoints:
        return checkpoints.restore(find_newest(folder), like(wanted))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def two(tmp_path):
    """A folder with the states of steps 1 and 2."""
    save_steps(tmp_path, 1, 2)
    return tmp_path


def assert_the_one_before_is_used(folder, caplog, *words):
    caplog.clear()
    found = find_newest(folder)
    assert (found.step, found.corrupt) == (1, [2]), words
    for word in (f"{folder / '2'} is corrupt", *words):
        assert word in caplog.text


def test_a_state_is_saved_as_it_was_though_training_goes_on(tmp_path):
    state = step(step(state_on(1)))
    expected = jax.device_get(state)
    with closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        checkpoints.save(state, 2, RECORD)
        for _ in range(20):
            state = step(state)  # takes the buffers that are being saved
        checkpoints.wait()
        assert find_newest(tmp_path).record == RECORD
        assert_same(checkpoints.restore(find_newest(tmp_path), like(state)), expected)


MESHES = [(1, {}), (8, {"data": 2, "fsdp": 4}), (4, {"data": 4}), (8, {"fsdp": 8})]


@pytest.mark.parametrize(("old", "new"), list(pairwise([*MESHES, MESHES[0]])), ids=str)
def test_a_state_is_read_onto_another_mesh(old, new, tmp_path):
    state, wanted = (state_on(num_devices, **shape) for num_devices, shape in (old, new))
    with closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        checkpoints.save(state, 5, RECORD | {"step": 5})
    found = restored(tmp_path, wanted)
    assert_same(found, state)
    assert jax.tree.map(lambda a: a.sharding, found) == jax.tree.map(lambda a: a.sharding, wanted)


def test_large_arrays_are_cut_by_fsdp_along_their_longest_axis_and_small_ones_are_not():
    state = state_on(8, fsdp=8)
    assert {shard.data.shape for shard in state.params["kernel"].addressable_shards} == {(8, 48)}
    moments = state.opt_state[1][0]
    assert {shard.data.shape for shard in moments.mu["kernel"].addressable_shards} == {(8, 48)}
    assert {shard.data.shape for shard in state.params["bias"].addressable_shards} == {(7,)}


def test_the_last_and_the_best_are_kept_and_no_thread_is_left_behind(tmp_path):
    before = {*threading.enumerate()}
    save_steps(tmp_path, 1, 2, 3, 4, 5, keep=2, best=lambda: 2)
    assert names_in(tmp_path) == ["2", "4", "5"]
    assert [
        thread for thread in {*threading.enumerate()} - before if "checkpoint" in thread.name and not thread.daemon
    ] == []


def test_a_damaged_state_is_named_and_the_one_before_is_used(two, caplog):
    files = [path for path in (two / "2").rglob("*") if path.is_file() and path.name != "checksums.json"]
    assert len(files) > 5
    for file in files:
        content = file.read_bytes()
        middle = len(content) // 2
        for damaged in (content[:middle], content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
            file.write_bytes(damaged)
            assert_the_one_before_is_used(two, caplog, file.name)
        file.unlink()
        assert_the_one_before_is_used(two, caplog, file.name)
        file.write_bytes(content)
    assert find_newest(two).step == 2


def test_a_state_whose_record_is_of_another_form_is_named_and_the_one_before_is_used(two, caplog):
    checksums = two / "2" / "checksums.json"
    for content in ("[]", '{"a": 3}', '{"../../x": "0"}', '{"/dev/zero": "0"}'):
        checksums.write_text(content)
        assert_the_one_before_is_used(two, caplog)
    checksums.unlink()
    wrong = [*({key: None} for key in RECORD), {"step": 1}, {"settings": {"num_replicas": 0}}]
    records = [json.dumps(RECORD | values) for values in wrong]
    for content in ("{}", "[]", "", "\0\0", '{"step": 1e400}', '{"step": 2', *records):
        (two / "2" / "record" / "metadata").write_text(content)
        assert_the_one_before_is_used(two, caplog)
    (two / "1" / "record" / "metadata").write_text("{}")
    assert find_newest(two) is None
    assert find_newest(two / "absent") is None


def test_a_folder_that_is_not_named_by_a_step_is_no_state(two):
    others = ["2²", "٢", "002", "2 ", "2.bak", "9" * 200]
    for name in others:
        shutil.copytree(two / "2", two / name)
    shutil.rmtree(two / "2")
    assert (find_newest(two).step, find_newest(two).corrupt) == (1, [])
    save_steps(two, 3)
    set_aside(two, find_newest(two))
    assert restored(two, state_on(1)).step == 3
    assert set(others) < {*names_in(two)}


def test_what_was_killed_while_it_was_written_is_not_found_and_what_was_before_its_checksums_is_trusted(two):
    (two / "3.orbax-checkpoint-tmp").mkdir()
    (two / "2" / "checksums.json").unlink()
    assert find_newest(two).step == 2
    restored(two, state_on(1))
    assert (two / "2" / "checksums.json").exists(), "and has them once it was read"
    save_steps(two, 4)
    assert names_in(two) == ["1", "2", "4"]


def test_a_damaged_state_without_checksums_is_named_when_it_is_read(two):
    refused, checksums = [], two / "2" / "checksums.json"
    for file in (path for path in (two / "2" / "state").rglob("*") if path.is_file() and path.stat().st_size):
        content = file.read_bytes()
        file.write_bytes(bytes(len(content)))
        checksums.unlink(missing_ok=True)
        try:
            restored(two, state_on(1))
        except InputError as error:
            refused.append(str(error))
        file.write_bytes(content)
    assert len(refused) > 2
    assert all(f"{two / '2'}: the state cannot be read" in text for text in refused)


def test_damaged_states_are_set_aside_and_later_ones_removed(two):
    save_steps(two, 3)
    (two / "3" / "record" / "metadata").write_text("{}")
    found = find_newest(two, step=1)
    set_aside(two, find_newest(two))
    assert names_in(two) == ["1", "2", "3.corrupt"]
    set_aside(two, found)
    assert names_in(two) == ["1", "3.corrupt"]
    save_steps(two, 2, 3)
    assert find_newest(two).step == 3


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
    assert names_in(tmp_path) == ["1"]
    check_checksums(tmp_path / "1")
    save_steps(tmp_path, 3, keep=1)
    assert find_newest(tmp_path).step == 3
