"""The terminal: what a person sees first and last, in few columns, in colour and with bars only where that is seen."""

import io
import json
import os
import subprocess
import sys
import time

import pytest

from repro.__main__ import main
from repro.commands.terminal import coloured, figures
from repro.errors import InputError
from repro.progress import progress_bar, waiting
from repro.recipes import read_recipe, recipe_names
from repro.recipes.equivalence import Verdict
from repro.recipes.targets import Outcome, Target, read_targets
from repro.recipes.verify import WIDTH, Verification
from repro.run.step_log import in_short


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_verdicts_are_coloured_on_a_terminal_that_wants_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert coloured("error: no PASSPORT, FAIL", Terminal()) == "\033[31merror:\033[0m no PASSPORT, \033[31mFAIL\033[0m"
    assert coloured("PASS", io.StringIO()) == "PASS"
    monkeypatch.setenv("NO_COLOR", "1")
    assert coloured("PASS", Terminal()) == "PASS"


def test_counts_are_whole_and_what_is_not_mentioned_is_no_zero():
    metrics = {"loss": 2.5, "size_accuracy": 0.0, "size_mentions": 0, "count_accuracy": 0.0, "count_mentions": 7}
    assert [line.split()[-1] for line in figures(metrics)] == ["2.5000", "n/a", "0", "0.0000", "7"]


def test_an_evaluation_is_one_short_line():
    metrics = {"loss": 12.34567, "rouge1": 50.0, "rouge2": 14.64, "rougeL": 39.9, "gen_len": 11.25}
    assert in_short(metrics) == "loss 12.3457, ROUGE-2 14.64, ROUGE-L 39.90, length 11.2"
    assert in_short({"gen_len": 11.0}) == "length 11.0"


@pytest.mark.parametrize("name", recipe_names())
def test_a_table_of_verdicts_fits_and_has_names_for_people(name):
    outcomes = [
        Outcome(target, Verdict.CANNOT_TELL, 75000.123, -0.123456, (-12.3456, 12.3456), "too little " * 20, band)
        for target in read_targets(read_recipe(name)["targets"])
        for band in ("", "2.0153 within ± 0.1234 of the runs' mean")
    ]
    text = Verification(name, (), tuple(outcomes), ()).table
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "eval_" not in text
    assert "_" not in Verification(name, (), (Outcome(Target("train_rows", "", low=1), Verdict.PASS),), ()).table


def test_the_first_line_comes_before_jax_and_nobody_waits_for_a_hub_that_is_not_there():
    code = (
        "import logging, sys; seen = []\n"
        "from repro.commands.terminal import start_logging\n"
        "logging.Handler.handle = lambda self, record: seen.append({'jax', 'transformers'} & set(sys.modules))\n"
        "start_logging('at once', models=['no-such/model'])\n"
        "import huggingface_hub.constants as hub\n"
        "assert seen[0] == set() and hub.HF_HUB_OFFLINE, (seen, hub.HF_HUB_OFFLINE)"
    )
    settings = {name: value for name, value in os.environ.items() if not name.lower().endswith(("_proxy", "_offline"))}
    settings["HF_ENDPOINT"] = "http://127.0.0.1:9"
    subprocess.run([sys.executable, "-c", code], env=settings, check=True)


@pytest.mark.parametrize(("progress", "terminal"), [(False, True), (True, False), (True, True)])
def test_there_is_a_bar_on_a_terminal_alone(progress, terminal, monkeypatch):
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    assert list(progress_bar(range(3), progress=progress, desc="images", unit="image")) == [0, 1, 2]
    assert ("images: 100%" in screen.getvalue()) == (progress and terminal)


def test_what_has_no_steps_to_count_is_shown_by_a_clock_that_leaves_nothing(caplog, monkeypatch):
    monkeypatch.setattr("sys.stderr", screen := Terminal())

    @waiting("reading")
    def fail():
        time.sleep(1.5)
        raise InputError("not there")

    with caplog.at_level("INFO", "repro"), pytest.raises(InputError):
        fail()
    assert caplog.messages == ["reading"]
    *shown, cleared, empty = screen.getvalue().split("\r")
    assert [text for text in shown if text.strip()] == ["  00:00", "  00:01"]
    assert (cleared.strip(), empty) == ("", "")


def test_versions_are_told_in_words_and_in_json(capsys):
    assert main(["env", "--json"]) == 0
    versions = json.loads(capsys.readouterr().out)["versions"]
    assert {"repro", "python", "jax"} <= versions.keys()
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert all(version in text for version in versions.values())


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_a_command_whose_reader_goes_away_ends_quietly(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "repro", *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
