"""Progress: a bar on a terminal, few lines elsewhere."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from tqdm import tqdm

from repro import progress as module
from repro.progress import ProgressLines, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(seconds: float, clock: list[float], monkeypatch, **settings) -> None:
    """100 items in as many equal parts of some seconds."""
    monkeypatch.setattr("time.time", lambda: clock[0])
    with progress_bar(progress=True, total=100, desc="images", unit="image", **settings) as bar:
        bar._time = lambda: clock[0]
        bar.start_t = bar.last_print_t = clock[0]
        for _ in range(100):
            clock[0] += seconds / 100
            bar.update(1)


def test_short_work_without_a_terminal_writes_nothing(capsys, monkeypatch):
    work(5.0, [0.0], monkeypatch)
    assert capsys.readouterr().err == ""


def test_long_work_without_a_terminal_writes_a_line_now_and_then(capsys, monkeypatch):
    work(100.0, [0.0], monkeypatch)
    written = capsys.readouterr().err
    lines = written.splitlines()
    assert 2 <= len(lines) <= 100 / module.SECONDS_BETWEEN_LINES + 1
    assert all(line.startswith("images: ") and line.endswith(" left") and " of 100 images, " in line for line in lines)
    assert "\r" not in written


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    bar = progress_bar(progress=True, total=3)
    assert type(bar) is tqdm
    bar.close()


@pytest.mark.parametrize("settings", [{"progress": False}, {"progress": True, "lines": False}])
def test_what_is_hidden_writes_nothing(capsys, settings):
    bar = progress_bar(total=3, **settings)
    assert bar.disable
    bar.close()
    assert capsys.readouterr().err == ""


def test_an_iterable_is_gone_through():
    assert list(progress_bar([1, 2], progress=True)) == [1, 2]
    assert isinstance(progress_bar([1], progress=True), ProgressLines)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["env", "--json"]])
def test_a_command_whose_reader_goes_away_ends_quietly(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "repro", *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
