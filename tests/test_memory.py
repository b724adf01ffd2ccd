"""As many replicas at once as fit; programs that are kept on disk, and not taken from where others may write."""

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from repro.errors import InputError
from repro.training.memory import choices, compile_what_fits, device_bytes, keeping_programs, step_bytes
from repro.training.sharding import create_mesh


@pytest.fixture
def told_of_no_folder():
    """As where the environment names no folder for compiled programs, and the quickest is worth keeping."""
    told, least = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    assert jax.config.jax_compilation_cache_dir is None, "it is as it was"
    jax.config.update("jax_compilation_cache_dir", told)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def compile_anew(folder):
    with keeping_programs(folder):
        jax.jit(lambda x: x * 3 + 1).lower(jnp.zeros(7)).compile()


def test_programs_are_found_again_by_a_run_that_starts_again(tmp_path, told_of_no_folder, caplog):
    folder = tmp_path / "cache" / "programs"
    compile_anew(folder)
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    assert kept
    assert not folder.stat().st_mode & 0o022
    with caplog.at_level(logging.DEBUG, logger="jax._src.compiler"):
        compile_anew(folder)
    assert "cache hit for 'jit__lambda" in caplog.text
    assert {path: path.read_bytes() for path in folder.iterdir()} == kept


def test_programs_are_not_taken_from_where_others_may_write(tmp_path, told_of_no_folder):
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs").chmod(0o777)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "programs", tmp_path / "file"):
        compile_anew(folder)
    assert not any((tmp_path / "programs").iterdir())


def test_a_folder_that_jax_was_told_of_is_used_instead(tmp_path):
    told = jax.config.jax_compilation_cache_dir
    assert told, "conftest.py names one"
    with keeping_programs(tmp_path / "programs"):
        assert jax.config.jax_compilation_cache_dir == told
    assert not (tmp_path / "programs").exists()
    assert jax.config.jax_compilation_cache_dir == told


class Compiled:
    """A program of so many replicas at once."""

    def __init__(self, number):
        self.number = number

    def memory_analysis(self):
        sizes = {"argument": 10, "output": 10, "temp": 100 * self.number, "alias": 10}
        return SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})


def test_as_many_replicas_are_computed_at_once_as_fit():
    mesh = create_mesh(jax.devices()[:2], num_replicas=8, replica_batch=3)
    assert choices(mesh, num_replicas=8, replica_batch=3) == [8, 4, 2]
    assert choices(mesh, num_replicas=8, replica_batch=4) == [8, 4, 2, 1]
    assert step_bytes(Compiled(3)) == 310
    for limit, number in {1000: 8, 809: 4, 410: 4, 300: 2, 50: 1}.items():
        assert compile_what_fits(Compiled, [8, 4, 2, 1], limit=limit, bytes_of=step_bytes)[0] == number
    assert device_bytes(jax.devices()[0]) > 2**27


def test_what_a_compiler_refuses_for_want_of_memory_does_not_fit():
    asked = []

    def compile_program(number):
        asked.append(number)
        if number > 2:
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Used {number}G of 2G hbm.\nand more")
        return number

    def fit(compile_program, *at_once):
        return compile_what_fits(compile_program, list(at_once), limit=10, bytes_of=int)

    assert fit(compile_program, 8, 4, 2, 1) == (2, 2)
    assert asked == [8, 4, 2]
    remedy = r"--gradient_checkpointing or --mesh fsdp=N"
    with pytest.raises(InputError, match=rf"^4 at once: .*{remedy}.*Used 4G of 2G hbm\.\)\.$"):
        fit(compile_program, 8, 4)
    with pytest.raises(ZeroDivisionError):
        fit(lambda number: number / 0, 8, 4)
