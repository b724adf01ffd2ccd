"""Several processes compute what one does: the reference's numbers, from the command line, over loopback."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import jax
import pytest
from test_reproduce import make_small

from repro.__main__ import main
from repro.config import ARGUMENTS, given_flags
from repro.errors import InputError
from repro.recipes.selftest import command_line, compare, read_case
from repro.training import processes as own
from repro.training.processes import launched_several, start_processes

CASE = read_case("published_8dev")
PATIENCE = 300
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
with_recipe = importlib.import_module("kill").with_recipe
HEARTBEAT = own.WAITS["heartbeat_timeout_seconds"]


MAIN = ("-m", "repro")
SMALL_SECOND = """
import jax, sys, repro.run.build, repro.run.prepare
from repro.__main__ import main
repro.run.build.device_bytes = lambda _: 1 if jax.process_index() else 1 << 40
repro.run.build.choices = repro.run.prepare.choices = lambda *_, **__: [8, 4]
sys.exit(main(sys.argv[1:]))
"""


def golden_recipe(folder: Path) -> dict[str, Any]:
    """Make of `CASE` a recipe whose run is in a folder."""
    flags = given_flags(ARGUMENTS, command_line(CASE, folder), command="reproduce")
    del flags["output_dir"]
    return {"name": "golden", "flags": flags, "targets": [{"metric": "eval_loss", "low": 0.0, "source": "any run"}]}


def start(
    folder: Path,
    num_processes: int,
    devices_each: int,
    *more: str,
    program: tuple[str, str] = MAIN,
    hosts: Sequence[Path | None] = (None,) * 4,
    last: tuple[str, ...] = (),
    command: Sequence[str] | None = None,
) -> list[subprocess.Popen[str]]:
    """Start the processes of a run, that of `CASE` or of a command, in their hosts' folders, the last with more."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices_each}",
    }
    together = ["--coordinator", address, "--num_processes", str(num_processes), *more]
    words = [sys.executable, *program, *(command or ("train", *command_line(CASE, folder))), *together]
    return [
        subprocess.Popen(
            [*words, "--process_id", str(i), *(last if i == num_processes - 1 else ())],
            env=environment,
            cwd=hosts[i],
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(num_processes)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Wait for all; returns what they said."""
    return [process.communicate(timeout=PATIENCE)[1] for process in processes]


@pytest.mark.parametrize(
    ("num_processes", "devices_each", "mesh", "how"),
    [(2, 1, "data=2", "train"), (4, 1, "data=2,fsdp=2", "train"), (4, 1, "data=4", "reproduce")],
    ids=["2", "4", "4 as a recipe"],
)
@pytest.mark.slow
def test_processes_together_give_the_numbers_of_the_reference(num_processes, devices_each, mesh, how, tmp_path, capfd):
    folder, more = tmp_path / "golden" / "run", {}
    if how == "reproduce":
        command = ("reproduce", "golden", "--output_dir", str(folder.parent))
        more = {"program": with_recipe(golden_recipe(folder)), "command": command}
    processes = start(folder, num_processes, devices_each, "--mesh", mesh, **more)
    said = finish(processes)
    assert [process.returncode for process in processes] == [0] * num_processes, said
    assert capfd.readouterr().out.count("written to") == 1
    facts = json.loads((folder / "run.json").read_text())
    assert facts["processes"] == num_processes
    assert len(facts["devices"]) == num_processes * devices_each
    result = compare(folder, "published_8dev")
    assert result.passed, result
    if num_processes == 4:  # one process goes on with what they have saved
        assert main(["train", *command_line(CASE, folder), "--resume", "auto"]) == 0


@pytest.mark.slow
def test_processes_decide_together_what_fits_and_build_a_cache_anew_once(tmp_path):
    folder = tmp_path / "run"
    processes = start(folder, 2, 1, "--overwrite_cache", program=("-c", SMALL_SECOND))
    said = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    facts = json.loads((folder / "run.json").read_text())
    assert facts["replicas_at_once"] == 4, "the second process has no room for more"
    assert "4 of 8 device batches are evaluated at once" in (folder / "log").read_text()
    result = compare(folder, "published_8dev")
    assert result.captions_equal == result.captions > 0
    assert sum(message.count("images into") for message in said) == 1, said
    assert len(list((tmp_path / "cache" / "repro" / "rows").glob("*.arrow"))) == 2


@pytest.mark.slow
def test_a_run_of_which_one_process_was_killed_ends_and_goes_on(tmp_path):
    folder = tmp_path / "run"
    processes = start(folder, 2, 1, "--resume", "auto", "--save_steps", "2", "--num_train_epochs", "400")
    deadline = time.monotonic() + PATIENCE
    while not list((folder / "state").glob("[0-9]")) and time.monotonic() < deadline:
        time.sleep(0.02)
    processes[1].kill()
    said = finish(processes)
    assert processes[0].returncode not in (0, None), said
    # Asked to stop, the two find a step after which both do; then the disk has the state of just this one.
    processes = start(folder, 2, 1, "--resume", "auto", "--save_steps", "1000", "--num_train_epochs", "400")
    before = len((folder / "metrics.jsonl").read_bytes().splitlines())
    while len((folder / "metrics.jsonl").read_bytes().splitlines()) <= before and time.monotonic() < deadline:
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    said = finish(processes)
    assert [process.returncode for process in processes] == [143, 143], said
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    steps = [row["step"] for row in rows if "loss" in row]  # others are of evaluations
    assert steps == list(range(1, len(steps) + 1))
    assert max(int(path.name) for path in (folder / "state").iterdir()) == steps[-1]
    assert f"the state of step {steps[-1]} is saved" in said[0]


@pytest.mark.slow
def test_a_second_signal_ends_a_process_at_once(tmp_path):
    folder = tmp_path / "run"
    processes = start(folder, 2, 1, "--resume", "auto", "--num_train_epochs", "400")
    deadline = time.monotonic() + PATIENCE
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1)  # the first evaluation is compiled, which no signal ends but the second
    for process in processes:
        process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    asked = time.monotonic()
    for process in processes:
        process.send_signal(signal.SIGTERM)
    said = finish(processes)
    assert [process.returncode for process in processes] == [143, 143], said
    assert time.monotonic() - asked < HEARTBEAT
    assert not any("is saved" in message for message in said)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(), ("--seeds", "1,2")], ids=["one", "seeds"])
def test_a_recipe_runs_on_several_processes_and_again_on_one(seeds, tmp_path, capfd):
    command = ["reproduce", "--output_dir", str(tmp_path / "pocket"), *seeds]
    program = with_recipe(make_small())
    processes = start(tmp_path, 2, 1, program=program, command=command)
    said = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert capfd.readouterr().out.count("\nPASS: ") == 1
    runs = list(tmp_path.glob("pocket/run") if not seeds else tmp_path.glob("pocket/seed-*/run"))
    assert len(runs) == max(len(seeds), 1)
    rows = [(run / "metrics.jsonl").read_bytes() for run in runs]
    assert all(json.loads((run / "run.json").read_text())["processes"] == 2 for run in runs)
    again = subprocess.run([sys.executable, *program, *command], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert [(run / "metrics.jsonl").read_bytes() for run in runs] == rows, "it goes on from its end"


@pytest.mark.parametrize(
    ("started", "missing"), [((0, 1, 2), []), ((0, 2), [1]), ((1,), [0])], ids=["all", "one is missing", "no first"]
)
def test_every_process_that_has_come_is_told_which_has_not(started, missing, monkeypatch):
    monkeypatch.setattr(own, "START_SECONDS", 2 if missing else 30)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor() as threads, ExitStack() as strangers:
        found = [threads.submit(own._missing, "localhost", port, number, 3) for number in started[:1]]
        for said in (b"99\n", b"-1\n", b"GET / HTTP/1.1\n") if started[0] == 0 else ():
            while True:
                with suppress(OSError):
                    strangers.enter_context(socket.create_connection(("localhost", port))).sendall(said)
                    break
        found += [threads.submit(own._missing, "localhost", port, number, 3) for number in started[1:]]
    assert [answer.result() for answer in found] == [missing] * len(started)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("localhost", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=rf"--coordinator {address}: cannot be opened .*name another port"):
            start_processes(coordinator=address, process_id=0, num_processes=2)


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
    ],
    ids=str,
)
def test_clusters_are_recognized_where_there_are_other_processes(environment, several):
    assert launched_several(environment) is several


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"process_id": 1}, "--coordinator, --num_processes missing: the three of"),
        ({"coordinator": "here:1", "process_id": 2, "num_processes": 2}, "--process_id 2: must be between 0 and 1"),
        ({"coordinator": "here", "process_id": 0, "num_processes": 2}, "--coordinator here: must be host:port"),
    ],
    ids=str,
)
def test_processes_that_cannot_find_each_other_say_what_is_missing(given, message):
    with pytest.raises(InputError, match=message):
        start_processes(**given)


def test_a_cluster_that_jax_does_not_find_is_asked_for_by_flags(monkeypatch):
    def initialize(**_: object) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match=r"--distributed: JAX finds no cluster .*; give --coordinator, --process_id"):
        start_processes(distributed=True)


def test_bad_input_ends_all_processes_with_the_same_message(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "holiday.jpg").touch()
    processes = start(folder, 2, 1)
    said = finish(processes)
    assert [process.returncode for process in processes] == [2, 2], said
    assert all("is not empty; name another folder" in message for message in said)


def make_hosts(folder: Path, inputs: Path, what: str) -> list[Path]:
    """Make two folders with the same names in them, and in the second other rows or weights."""
    hosts = [folder / "0", folder / "1"]
    for host in hosts:
        shutil.copytree(inputs, host)
    if what == "rows":
        rows = hosts[1] / "train.jsonl"
        rows.write_text(rows.read_text().replace("blue", "green"))
    elif what == "weights":
        for weights in hosts[1].glob("model/*.msgpack"):
            content = bytearray(weights.read_bytes())
            content[-1] ^= 1
            weights.write_bytes(content)
    return hosts


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("flag", "--learning_rate: 0.5 here, 0"),
        pytest.param("rows", "(data: ", marks=pytest.mark.slow),
        ("weights", "(weights: "),
    ],
    ids=["flag", "rows", "weights"],
)
def test_a_process_that_was_started_with_something_else_ends_all_and_names_it(what, told, tmp_path, golden_inputs):
    hosts = make_hosts(tmp_path, golden_inputs, what)
    its_own = ("--learning_rate", "0.5") if what == "flag" else ()
    relative = ("--train_file", "train.jsonl", "--model_name_or_path", "model")
    processes = start(tmp_path / "run", 2, 1, *relative, hosts=hosts, last=its_own)
    said = finish(processes)
    assert [process.returncode for process in processes] == [2, 2], said
    assert "process 0: the processes of a run are not alike (others say in what)" in said[0]
    assert told in said[1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_ends_all_processes_at_once(tmp_path):
    (tmp_path / "file").touch()
    processes = start(tmp_path / "file" / "run", 2, 1)
    said = finish(processes)
    assert [process.returncode for process in processes] == [2, 2], said
    assert all("no file can be written there" in message for message in said)
