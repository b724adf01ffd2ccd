"""Several processes compute what one does: the reference's numbers, from the command line, over loopback."""

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest.mock import MagicMock

import jax
import pytest
from test_reproduce import make_small

from repro.__main__ import main
from repro.config import ARGUMENTS, given_flags
from repro.errors import InputError
from repro.recipes.selftest import command_line, compare_with_golden, read_case
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
DECIDES = """
import sys
from repro.training.processes import decided_by_first, is_first, start_processes
start_processes(coordinator=sys.argv[3], num_processes=2, process_id=int(sys.argv[-1]))
assert decided_by_first(lambda: ["by the first"] * is_first()) == ["by the first"]
decided_by_first(lambda: start_processes(process_id=5) if is_first() else 1 / 0)
"""


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(folder, num_processes, *more, program=MAIN, hosts=(None,) * 4, last=(), command=None):
    """Start processes of one device each, of `CASE` or a command, in their hosts' folders, the last with more flags."""
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}
    together = ["--coordinator", f"localhost:{free_port()}", "--num_processes", str(num_processes), *more]
    words = [sys.executable, *program, *(command or ("train", *command_line(CASE, folder))), *together]
    processes = []
    for number in range(num_processes):
        own_words = [*words, "--process_id", str(number), *(last if number == num_processes - 1 else ())]
        how = {"env": environment, "cwd": hosts[number], "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(own_words, **how))
    return processes


def finish(processes, *statuses):
    """Wait for all, which must end with these statuses; returns what they said."""
    said = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert not statuses or [process.returncode for process in processes] == list(statuses), said
    return said


def wait_until(is_there):
    deadline = time.monotonic() + PATIENCE
    while not is_there() and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "mesh", "how"), [(2, 2, "train"), (4, "2,fsdp=2", "train"), (4, 4, "reproduce")])
def test_processes_together_give_the_numbers_of_the_reference(number, mesh, how, tmp_path, capfd):
    folder, more = tmp_path / "golden" / "run", {}
    if how == "reproduce":
        flags = given_flags(ARGUMENTS, command_line(CASE, folder), command="reproduce")
        del flags["output_dir"]
        targets = [{"metric": "eval_loss", "low": 0.0, "source": "any run"}]
        more["program"] = with_recipe({"name": "golden", "flags": flags, "targets": targets})
        more["command"] = ("reproduce", "golden", "--output_dir", str(folder.parent))
    finish(start(folder, number, "--mesh", f"data={mesh}", **more), *[0] * number)
    assert capfd.readouterr().out.count("written to") == 1
    facts = json.loads((folder / "run.json").read_text())
    assert facts["processes"] == len(facts["devices"]) == number
    result = compare_with_golden(folder, "published_8dev")
    assert result.passed, result
    if number == 4:  # one process goes on with what they have saved
        assert main(["train", *command_line(CASE, folder), "--resume", "auto"]) == 0


@pytest.mark.slow
def test_processes_decide_together_what_fits_and_build_a_cache_anew_once(tmp_path):
    folder = tmp_path / "run"
    said = finish(start(folder, 2, "--overwrite_cache", program=("-c", SMALL_SECOND)), 0, 0)
    facts = json.loads((folder / "run.json").read_text())
    assert facts["replicas_at_once"] == 4, "the second process has no room for more"
    assert "4 of 8 device batches are evaluated at once" in (folder / "log").read_text()
    result = compare_with_golden(folder, "published_8dev")
    assert result.captions_equal == result.captions > 0
    assert sum(message.count("images into") for message in said) == 1, said
    assert len(list((tmp_path / "cache" / "repro" / "rows").glob("*.arrow"))) == 2


@pytest.mark.slow
def test_a_run_of_which_one_process_was_killed_ends_and_goes_on(tmp_path):
    folder = tmp_path / "run"
    processes = start(folder, 2, "--resume", "auto", "--save_steps", "2", "--num_train_epochs", "400")
    wait_until(lambda: list((folder / "state").glob("[0-9]")))
    processes[1].kill()
    said = finish(processes)
    assert processes[0].returncode not in (0, None), said
    # Asked to stop, the two find a step after which both do; then the disk has the state of just this one.
    processes = start(folder, 2, "--resume", "auto", "--save_steps", "1000", "--num_train_epochs", "400")
    before = (folder / "metrics.jsonl").read_bytes().count(b"\n")
    wait_until(lambda: (folder / "metrics.jsonl").read_bytes().count(b"\n") > before)
    processes[1].send_signal(signal.SIGTERM)
    said = finish(processes, 143, 143)
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    steps = [row["step"] for row in rows if "loss" in row]  # others are of evaluations
    assert steps == list(range(1, len(steps) + 1))
    assert max(int(path.name) for path in (folder / "state").iterdir()) == steps[-1]
    assert f"the state of step {steps[-1]} is saved" in said[0]


@pytest.mark.slow
def test_a_second_signal_ends_a_process_at_once(tmp_path):
    folder = tmp_path / "run"
    processes = start(folder, 2, "--resume", "auto", "--num_train_epochs", "400")
    wait_until((folder / "metrics.jsonl").exists)
    for pause in (1, 0.2):  # the first evaluation is compiled, which no signal ends but the second
        time.sleep(pause)
        asked = time.monotonic()
        for process in processes:
            process.send_signal(signal.SIGTERM)
    said = finish(processes, 143, 143)
    assert time.monotonic() - asked < HEARTBEAT
    assert not any("is saved" in message for message in said)


@pytest.mark.slow
def test_a_recipe_runs_on_several_processes_and_again_on_one(tmp_path, capfd):
    command = ["reproduce", "--output_dir", str(tmp_path / "pocket"), "--seeds", "1,2"]
    program = with_recipe(make_small())
    finish(start(tmp_path, 2, program=program, command=command), 0, 0)
    assert capfd.readouterr().out.count("\nPASS: ") == 1
    runs = [tmp_path / "pocket" / f"seed-{seed}" / "run" for seed in (1, 2)]
    rows = [(run / "metrics.jsonl").read_bytes() for run in runs]
    assert all(json.loads((run / "run.json").read_text())["processes"] == 2 for run in runs)
    again = subprocess.run([sys.executable, *program, *command], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert [(run / "metrics.jsonl").read_bytes() for run in runs] == rows, "it goes on from its end"


@pytest.mark.parametrize(("started", "missing"), [((0, 1, 2), []), ((0, 2), [1]), ((1,), [0])])
def test_every_process_that_has_come_is_told_which_has_not(started, missing, monkeypatch):
    monkeypatch.setattr(own, "START_SECONDS", 2 if missing else 30)
    port = free_port()
    with ThreadPoolExecutor() as threads, ExitStack() as strangers:
        found = [threads.submit(own._missing, "localhost", port, number, 3) for number in started[:1]]
        for said in (b"99\n", b"-1\n", b"GET / HTTP/1.1\n") if started[0] == 0 else ():
            while True:
                with suppress(OSError):
                    strangers.enter_context(socket.create_connection(("localhost", port))).sendall(said)
                    break
        found += [threads.submit(own._missing, "localhost", port, number, 3) for number in started[1:]]
    assert [answer.result() for answer in found] == [missing] * len(started)


def test_clusters_are_recognized_where_there_are_other_processes():
    alone = ({}, {"SLURM_STEP_NUM_TASKS": "1"}, {"TPU_WORKER_HOSTNAMES": "localhost"})
    assert not any(map(launched_several, alone))
    several = ("SLURM_STEP_NUM_TASKS", "8"), ("OMPI_COMM_WORLD_SIZE", "2"), ("TPU_WORKER_HOSTNAMES", "host-0,host-1")
    assert all(launched_several({name: value}) for name, value in several)


def test_processes_that_cannot_find_each_other_say_what_is_missing(monkeypatch):
    undefined = MagicMock(side_effect=ValueError("coordinator_address should be defined."))
    monkeypatch.setattr(jax.distributed, "initialize", undefined)
    two = {"num_processes": 2}
    with socket.create_server(("localhost", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        for given, message in (
            ({"process_id": 1}, "--coordinator, --num_processes missing: the three of"),
            ({"coordinator": "here:1", "process_id": 2, **two}, "--process_id 2: must be between 0 and 1"),
            ({"coordinator": "here", "process_id": 0, **two}, "--coordinator here: must be host:port"),
            ({"coordinator": address, "process_id": 0, **two}, f"{address}: cannot be opened .*name another port"),
            ({"distributed": True}, "--distributed: JAX finds no cluster .*; give --coordinator, --process_id"),
        ):
            with pytest.raises(InputError, match=message):
                start_processes(**given)


def test_what_the_first_process_decides_or_refuses_all_are_told(tmp_path):
    said = finish(start(tmp_path, 2, program=("-c", DECIDES), command=("alone",)), 1, 1)
    assert all("InputError: --coordinator, --num_processes missing" in message for message in said), said


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("flag", "--learning_rate: 0.5 here, 0"),
        pytest.param("rows", "(data: ", marks=pytest.mark.slow),
        ("weights", "(weights: "),
    ],
)
def test_a_process_that_was_started_with_something_else_ends_all_and_names_it(what, told, tmp_path, golden_inputs):
    hosts = [Path(shutil.copytree(golden_inputs, tmp_path / name)) for name in ("0", "1")]
    rows, weights = hosts[1] / "train.jsonl", hosts[1] / "model" / "flax_model.msgpack"
    if what == "rows":
        rows.write_text(rows.read_text().replace("blue", "green"))
    elif what == "weights":
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    its_own = ("--learning_rate", "0.5") if what == "flag" else ()
    relative = ("--train_file", "train.jsonl", "--model_name_or_path", "model")
    said = finish(start(tmp_path / "run", 2, *relative, hosts=hosts, last=its_own), 2, 2)
    assert "process 0: the processes of a run are not alike (others say in what)" in said[0]
    assert told in said[1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
