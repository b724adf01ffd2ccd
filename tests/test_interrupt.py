"""The first signal is obeyed where nothing is lost, the second at once."""

import os
import signal
import subprocess
import sys

import pytest

from repro.commands.terminal import make_deterministic
from repro.errors import Interrupted
from repro.run.settings import DETERMINISTIC
from repro.training.interrupt import StopSignals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_before_training_a_signal_ends_the_program_where_it_is(signum):
    with StopSignals(), pytest.raises(Interrupted, match=r"training had not begun") as caught:
        signal.raise_signal(signum)
    assert caught.value.signum == signum


def test_in_training_a_signal_waits_for_the_end_of_a_step_and_a_second_one_does_not(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with StopSignals() as signals:
        signals.defer()
        assert not signals.requested(1)
        signals.raise_if_received()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested(2)
        assert ended == []
        with pytest.raises(Interrupted, match="during an evaluation"):
            signals.raise_if_received()
        os.kill(os.getpid(), signal.SIGINT)
    assert ended == [128 + signal.SIGINT]


def test_what_another_process_was_sent_is_no_first_signal(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.reached_preemption_sync_point", lambda step: True)
    with StopSignals() as signals:
        signals.defer()
        assert signals.requested(1)
        os.kill(os.getpid(), signal.SIGTERM)  # as Slurm sends it to all, some of which have heard of it by then
        assert ended == []
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [128 + signal.SIGTERM]


def test_the_switch_for_determinism_keeps_other_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
    make_deterministic()
    assert os.environ["XLA_FLAGS"] == f"--xla_other=1 {DETERMINISTIC}"


@pytest.mark.parametrize(("status", "ends_at_once"), [(143, True), (130, True), (3, False)])
def test_a_process_that_a_signal_stopped_is_not_taken_down_around_its_threads(status, ends_at_once):
    # A run that got SIGTERM while it compiled once ended with SIGSEGV's status, after it had said that it stops.
    code = (
        "import atexit, repro.__main__ as command\n"
        "atexit.register(print, 'taken down')\n"
        f"command.main = lambda: print('said') or {status}\n"
        "command.program()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert done.stdout.splitlines() == ["said", *["taken down"] * (not ends_at_once)]
