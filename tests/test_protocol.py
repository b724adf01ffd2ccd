"""The protocols and their switches, by name and in a run."""

import dataclasses
import json

import pytest

from repro.__main__ import main
from repro.errors import InputError
from repro.protocol import EXACT, PUBLISHED, protocol_named
from repro.recipes.selftest import command_line, read_case


def test_switches_change_one_choice_each():
    assert protocol_named("exact") is EXACT
    text = "published,always_evaluate_at_end=true,stop_rule=exact"
    changed = protocol_named(text)
    assert changed.name == text
    assert dataclasses.replace(changed, name="published", always_evaluate_at_end=False, stop_rule="2022") == PUBLISHED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exakt", "--protocol 'exakt': choose one of published, current, exact"),
        ("exact,stop=exact", "unknown switch 'stop'; there are loss_reduction, decay_mask"),
        ("exact,stop_rule=2023", "stop_rule=2023: choose one of 2022, current, exact"),
        ("exact,token_eval_loss=yes", "token_eval_loss=yes: choose one of false, true"),
    ],
)
def test_a_switch_that_is_not_there_names_those_that_are(text, message):
    with pytest.raises(InputError, match=message):
        protocol_named(text)


def test_training_may_drop_images_that_an_evaluation_converts_and_scores_by_all_references(tmp_path):
    folder = tmp_path / "run"
    switches = "current,convert_evaluated_to_rgb=true,keep_incomplete_batch=true,generate_per_image=true"
    more = [f"--protocol={switches}", "--caption_metrics", "--max_train_samples=40", "--max_eval_samples=30"]
    command = [*command_line(read_case("current_block0"), folder), *more, "--num_train_epochs=1"]
    assert main(["train", *command]) == 0
    counts = json.loads((folder / "run.json").read_text())["data"]
    assert (counts["train"]["dropped"], counts["validation"]["dropped"]) == (5, 0), "five of each are gray"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    final = [row["eval"] for row in rows if "eval" in row][-1]
    assert final["rows"] == counts["validation"]["kept"]
    assert final["caption_tokenizer"] in ("ptb", "split_words")
    assert 0 <= final["bleu4"] <= final["bleu1"] <= 1
    assert 0 <= final["cider"] <= 10
    results = json.loads((max(folder.glob("ckpt_*")) / "eval_results.json").read_text())
    assert results["eval_cider"] == pytest.approx(final["cider"], abs=1e-6)
