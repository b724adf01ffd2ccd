"""What a run's scores are of: captions that are cut and rows without one are counted, and said where scores are."""

from __future__ import annotations

import json
import re
from pathlib import Path

from repro.__main__ import main
from repro.data.captions import caption_lengths
from repro.recipes.selftest import GOLDEN, command_line, read_case
from repro.record.model_card import CARD

CASE = read_case("current_1dev")


def test_cut_captions_and_missing_ones_are_said_in_log_record_report_and_card(tmp_path: Path, tokenizer) -> None:
    rows = [json.loads(line) for line in (GOLDEN / "inputs" / "test.jsonl").read_text().splitlines()]
    rows = [{**row, "image_path": str(GOLDEN / "inputs" / row["image_path"])} for row in rows]
    rows[1]["caption"] = None
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    flags = ["--test_file", str(test), "--protocol", "exact", "--max_target_length", "8", "--do_predict"]
    assert main(["train", *command_line(CASE, folder), *flags]) == 0

    facts, log = json.loads((folder / "run.json").read_text())["data"], (folder / "log").read_text()
    for split, name, use in (("train", "train", "trained on"), ("validation", "val", "scored against")):
        counts, lines = facts[split], (GOLDEN / "inputs" / f"{name}.jsonl").read_text().splitlines()
        lengths = caption_lengths([json.loads(line)["caption"] for line in lines], tokenizer)
        assert 0 < counts["captions_cut"] <= sum(lengths > counts["max_length"])
        assert counts["captions"] == counts["kept"]
        cut = f"{counts['captions_cut']} of {counts['captions']} captions are longer than {counts['max_length']} tokens"
        assert f"{split}: {cut}; what is left of them is {use}" in log
    card = next(folder.glob(f"ckpt_*/{CARD}")).read_text()
    cut = f"{facts['validation']['captions_cut']} of {facts['validation']['captions']} were cut at"
    assert card.count(cut) == 2, "beside the scores and in the table of the data"

    assert facts["test"]["kept"] - facts["test"]["captions"] == 1
    assert f"test: 1 of {len(rows)} rows have no caption; loss and scores are of the other {len(rows) - 1}" in log
    assert {"test_loss", "test_rouge2", "test_gen_len"} <= set(json.loads((folder / "test_results.json").read_text()))
    generations = json.loads((folder / "test_generation.json").read_text())
    assert [row["label"] == "" for row in generations] == [row["caption"] is None for row in rows]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["test"]
    assert (last["rows"], last["rows_scored"]) == (len(rows), len(rows) - 1)

    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    for split, count in (
        ("train", f"captions_cut {facts['train']['captions_cut']}"),
        ("validation", f"captions_cut {facts['validation']['captions_cut']}"),
        ("test", f"captions {len(rows) - 1}"),
    ):
        assert re.search(rf'<th scope="row">{split}</th><td[^>]*>[^<]*\b{count}[,<]', page)
