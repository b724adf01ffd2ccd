"""Progress: a bar on a terminal, nothing elsewhere; and output that nobody reads."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from repro.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("progress", "terminal"), [(False, True), (True, False), (True, True)])
def test_there_is_a_bar_on_a_terminal_alone(progress: bool, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    assert list(progress_bar(range(3), progress=progress, desc="images", unit="image")) == [0, 1, 2]
    assert ("images: 100%" in screen.getvalue()) == (progress and terminal)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["env", "--json"]])
def test_a_command_whose_reader_goes_away_ends_quietly(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "repro", *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
