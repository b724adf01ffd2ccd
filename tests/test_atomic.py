"""Files of a cache that several processes share: one builds, the others wait and read, and nobody collides."""

import errno
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from filelock import FileLock

from repro.data.atomic import build_once
from repro.errors import InputError
from repro.json_files import write_whole

BUILD = """
import os, sys, time
from pathlib import Path
os.getpid = lambda: 7  # as the first process of a container may be called
from repro.data.atomic import build_once

file, words = Path(sys.argv[1]), "words " * 1000

def build(partial):
    with file.with_suffix(".built").open("a") as built:
        built.write("x")
    with partial.open("w") as opened:
        for _ in range(20):
            opened.write(words)
            opened.flush()
            time.sleep(float(sys.argv[2]))

build_once(file, "words", build)
assert file.read_text() == 20 * words
"""


def start(file, pause):
    return subprocess.Popen([sys.executable, "-c", BUILD, str(file), str(pause)], stderr=subprocess.PIPE, text=True)


def write_mine(partial):
    partial.write_text("mine")
    return ["a note"]


def test_writers_of_one_file_do_not_share_a_partial_file(tmp_path):
    file, contents = tmp_path / "file", [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(partial(write_whole, file), contents * 10))
    assert file.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [file]


def test_one_of_several_processes_builds_and_the_others_wait_and_read(tmp_path):
    builders = [start(tmp_path / "file", 0.02) for _ in range(3)]
    said = [builder.communicate(timeout=60) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0, 0], said
    assert (tmp_path / "file.built").read_text() == "x"


def test_a_builder_that_was_killed_keeps_nobody_waiting_and_leaves_nothing(tmp_path):
    file = tmp_path / "file"
    (tmp_path / "file.json.0123.partial").touch()  # as one leaves it that is killed while it writes its notes
    builder = start(file, 10)
    while not (tmp_path / "file.partial").exists():
        assert builder.poll() is None
        time.sleep(0.01)
    waiting = threading.Thread(target=build_once, args=(file, "words", write_mine))
    waiting.start()
    time.sleep(0.3)
    assert not file.exists(), "the builder is at work"
    builder.kill()
    builder.communicate()
    waiting.join(timeout=20)
    assert file.read_text() == "mine"
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_there_is_read_without_a_lock(tmp_path, monkeypatch):
    build_once(tmp_path / "file", "words", write_mine)
    monkeypatch.setattr(FileLock, "acquire", lambda *_, **__: pytest.fail("a cache that may only be read"))
    assert build_once(tmp_path / "file", "words", lambda _: pytest.fail("it is there")) == ["a note"]


def test_what_another_run_has_built_is_built_again_by_the_first_process_of_a_run_alone(tmp_path):
    builds = []

    def build(partial):
        builds.append(partial)
        return write_mine(partial)

    for rebuild, count in ((None, 1), ("one", 2), ("one", 2), ("other", 3), (None, 3)):
        assert build_once(tmp_path / "file", "words", build, rebuild=rebuild) == ["a note"]
        assert len(builds) == count


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("flock")], ids=str)
def test_a_file_system_without_locks_is_named_with_the_remedy(tmp_path, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(InputError, match=r"file: words cannot be kept there .*--cache_dir"):
        build_once(tmp_path / "file", "words", write_mine)
