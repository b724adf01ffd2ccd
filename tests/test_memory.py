"""Programs that are kept on disk: found again, and not taken from where others may write."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from repro.training.memory import keeping_programs


@pytest.fixture
def told_of_no_folder() -> Iterator[None]:
    """As where the environment names no folder for compiled programs, and the quickest is worth keeping."""
    told, least = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    assert jax.config.jax_compilation_cache_dir is None, "it is as it was"
    jax.config.update("jax_compilation_cache_dir", told)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def compile_anew(folder: Path) -> None:
    with keeping_programs(folder):
        jax.jit(lambda x: x * 3 + 1).lower(jnp.zeros(7)).compile()


def test_programs_are_found_again_by_a_run_that_starts_again(
    tmp_path: Path, told_of_no_folder: None, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache" / "programs"
    compile_anew(folder)
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    assert kept
    assert not folder.stat().st_mode & 0o022
    with caplog.at_level(logging.DEBUG, logger="jax._src.compiler"):
        compile_anew(folder)
    assert "cache hit for 'jit__lambda" in caplog.text
    assert {path: path.read_bytes() for path in folder.iterdir()} == kept


def test_programs_are_not_taken_from_where_others_may_write(tmp_path: Path, told_of_no_folder: None) -> None:
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs").chmod(0o777)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "programs", tmp_path / "file"):
        compile_anew(folder)
    assert not any((tmp_path / "programs").iterdir())


def test_a_folder_that_jax_was_told_of_is_used_instead(tmp_path: Path) -> None:
    told = jax.config.jax_compilation_cache_dir
    assert told, "conftest.py names one"
    with keeping_programs(tmp_path / "programs"):
        assert jax.config.jax_compilation_cache_dir == told
    assert not (tmp_path / "programs").exists()
    assert jax.config.jax_compilation_cache_dir == told
