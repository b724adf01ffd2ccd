"""The terminal: what a person sees first and last, in few columns, in colour only where that is seen."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repro.__main__ import main
from repro.commands.terminal import coloured, figures
from repro.config import ARGUMENTS, parse_arguments
from repro.errors import InputError
from repro.progress import waiting
from repro.recipes import read_recipe, recipe_names
from repro.recipes.equivalence import Verdict
from repro.recipes.targets import Outcome, Target, read_targets
from repro.recipes.verify import WIDTH, Verification
from repro.run.step_log import in_short


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_verdicts_are_coloured_on_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert coloured("error: no PASSPORT, FAIL", Terminal()) == "\033[31merror:\033[0m no PASSPORT, \033[31mFAIL\033[0m"
    assert coloured("PASS", io.StringIO()) == "PASS"
    monkeypatch.setenv("NO_COLOR", "1")
    assert coloured("PASS", Terminal()) == "PASS"


def test_counts_are_whole_and_what_is_not_mentioned_is_no_zero() -> None:
    metrics = {"loss": 2.5, "size_accuracy": 0.0, "size_mentions": 0, "count_accuracy": 0.0, "count_mentions": 7}
    assert [line.split()[-1] for line in figures(metrics)] == ["2.5000", "n/a", "0", "0.0000", "7"]


def test_an_evaluation_is_one_short_line() -> None:
    metrics = {"loss": 12.34567, "rouge1": 50.0, "rouge2": 14.64, "rougeL": 39.9, "gen_len": 11.25}
    line = in_short(metrics)
    assert line == "loss 12.3457, ROUGE-2 14.64, ROUGE-L 39.90, length 11.2"
    assert in_short({"gen_len": 11.0}) == "length 11.0"


@pytest.mark.parametrize("name", recipe_names())
def test_a_table_of_verdicts_fits_and_has_names_for_people(name: str) -> None:
    outcomes = [
        Outcome(target, Verdict.CANNOT_TELL, 75000.123, -0.123456, (-12.3456, 12.3456), "too little " * 20, band)
        for target in read_targets(read_recipe(name)["targets"])
        for band in ("", "2.0153 within ± 0.1234 of the runs' mean")
    ]
    text = Verification(name, (), tuple(outcomes), ()).table
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "eval_" not in text
    assert "_" not in Verification(name, (), (Outcome(Target("train_rows", "", low=1), Verdict.PASS),), ()).table


def test_flags_known_from_elsewhere_are_told_by_their_names_here(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, here in {"--lr": "--learning_rate", "--bf16": "--dtype bfloat16", "--report_to": "TensorBoard"}.items():
        assert main(["train", flag, "1"]) == 2
        assert f"unknown argument '{flag}'" in (said := capsys.readouterr().err)
        assert here in said


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("flags.yaml", "learning_rate: 3e-5\ndo_train: true\nseed: 7\n"),
        ("flags.toml", "learning_rate = 3e-5\ndo_train = true\nseed = 7\n"),
        ("flags.json", '{"learning_rate": 3e-5, "do_train": true, "seed": 7}'),
    ],
)
def test_a_file_of_flags_may_be_followed_by_flags_that_change_it(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    args = parse_arguments(ARGUMENTS, [str(tmp_path / name), "--seed", "8"], command="train")[-1]
    assert (args.learning_rate, args.do_train, args.seed) == (3e-5, True, 8)


def test_a_yaml_file_cannot_grow_when_it_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["a: &a0 [1, 1]", *(f"b{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    (tmp_path / "flags.yaml").write_text("\n".join(lines))
    assert main(["train", str(tmp_path / "flags.yaml")]) == 2
    assert "got `array`" in capsys.readouterr().err


def test_the_first_line_comes_before_jax_and_nobody_waits_for_a_hub_that_is_not_there() -> None:
    code = (
        "import sys; from repro.commands.terminal import start_logging\n"
        "import logging; seen = []\n"
        "logging.Handler.handle = lambda self, record: seen.append({'jax', 'transformers'} & set(sys.modules))\n"
        "start_logging('at once', models=['no-such/model'])\n"
        "import huggingface_hub.constants as hub\n"
        "assert seen[0] == set() and hub.HF_HUB_OFFLINE, (seen, hub.HF_HUB_OFFLINE)"
    )
    settings = {name: value for name, value in os.environ.items() if not name.lower().endswith(("_proxy", "_offline"))}
    settings["HF_ENDPOINT"] = "http://127.0.0.1:9"
    subprocess.run([sys.executable, "-c", code], env=settings, check=True)


def test_what_has_no_steps_to_count_is_shown_by_a_clock_that_leaves_nothing(capsys, caplog, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    @waiting("reading")
    def fail() -> None:
        time.sleep(2.5)
        raise InputError("not there")

    with caplog.at_level("INFO", "repro"), pytest.raises(InputError):
        fail()
    *_, last, cleared, empty = (shown := capsys.readouterr().err).split("\r")
    assert caplog.messages == ["reading"]
    assert [text for text in shown.split("\r") if text.strip()] == ["  00:00", "  00:01", "  00:02"]
    assert (last.strip(), cleared.strip(), empty) == ("00:02", "", "")
