"""The terminal: what a person sees first and last, in few columns, in colour only where that is seen."""

from __future__ import annotations

import io

import pytest

from repro.commands.terminal import coloured, figures
from repro.recipes import read_recipe, recipe_names
from repro.recipes.equivalence import Verdict
from repro.recipes.targets import Outcome, Target, read_targets
from repro.recipes.verify import WIDTH, table
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
    text = table(
        [
            Outcome(target, Verdict.CANNOT_TELL, 75000.123, -0.123456, (-12.3456, 12.3456), "too little " * 20, band)
            for target in read_targets(read_recipe(name)["targets"])
            for band in ("", "2.0153 within ± 0.1234 of the runs' mean")
        ]
    )
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "eval_" not in text
    assert "_" not in table([Outcome(Target("train_rows", "", low=1), Verdict.PASS)])
