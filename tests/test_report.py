"""The report: whatever a run is like, and whatever its captions hold."""

from __future__ import annotations

import base64
import io
import json
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic_run import read_data, write_run

from repro.__main__ import main
from repro.errors import InputError
from repro.json_files import write_json
from repro.record.sanitize import visible
from repro.reports.charts import nice_ticks, thinned
from repro.reports.page import SHOWN, chosen_items, looks, ranked_items
from repro.reports.runs import Generated, metric_names, read_run_folder
from repro.reports.write import write_report

HOSTILE = [
    "</script><script>window.hit = 1</script>",
    '"><img src=x onerror="window.hit = 1">',
    "<!-- <script>",
    "{{ 7 * 7 }} {% raw %}",
    "a\u202edog\u2066 \x00\x1b[2J\u2028line",
    "lone \ud800 surrogate",
    "a dog " * 20_000,
    "Z̴͗" + "\u0301" * 500,
    "",
]


class Elements(HTMLParser):
    """Every element that a page has, and its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))


def report(*folders: Path, recipe: str | None = None) -> str:
    output = folders[0].parent / "out" / "report.html"
    write_report(folders, output, recipe=recipe)
    return output.read_text(encoding="utf-8")


def holds_nothing_of_others(page: str) -> None:
    elements = Elements(page).found
    assert [attrs.get("id") for tag, attrs in elements if tag == "script"] == ["data", None]
    assert not [name for _, attrs in elements for name in attrs if name.startswith("on") or name == "style"]
    assert all(attrs["src"].startswith("data:image/jpeg;base64,") for tag, attrs in elements if tag == "img")
    assert "default-src 'none'" in next(attrs["content"] for tag, attrs in elements if "http-equiv" in attrs)


def test_a_run_is_told_with_its_curves_captions_and_settings(tmp_path, golden_inputs):
    pictures = sorted((golden_inputs / "images" / "val").iterdir())
    rows = [(str(path), f"a dog number {place}", "a dog") for place, path in enumerate(pictures)]
    page = report(write_run(tmp_path / "mine", rows))
    holds_nothing_of_others(page)
    data = read_data(page)
    assert [chart["key"] for chart in data["charts"]] == [
        *("loss", "learning_rate", "eval_loss", "eval_rouge2", "speed", "eval_attribute_accuracy"),
    ]
    before, folded = page.split('<details class="further">')
    assert "Validation: ROUGE-2" in before
    assert "Validation: attribute accuracy" in folded, (
        "a metric without a name of the field's does not push others down"
    )
    assert data["charts"][0]["lines"][0]["y"][0] == 3
    assert set(data["charts"][4]["lines"][0]["y"]) == {16.0}, "10 steps of 8 rows in 5 seconds"
    assert len(data["items"]) == len(pictures)
    assert data["items"][0][0] in {path.name for path in pictures}
    assert page.count("data:image/jpeg") >= len(pictures)
    assert "add --recipe NAME" in page


def test_runs_are_overlaid_and_told_apart(tmp_path):
    rows = [("a.jpg", "a dog", "a dog")]
    for name, steps in (("a", 40), ("b", 2500)):
        write_run(tmp_path / name / "run", rows, num_steps=steps)
    data = read_data(report(tmp_path / "a", tmp_path / "b"))
    loss = data["charts"][0]
    assert [line["name"] for line in loss["lines"]] == ["a", "b"]
    assert loss["x"] == [0, 2500]
    assert len(loss["lines"][1]["x"]) <= 500


def test_the_published_figures_are_drawn_in_and_a_verdict_is_given(tmp_path):
    from repro.recipes import read_recipe

    recipe = read_recipe("coco2017")
    folder = write_run(tmp_path / "run", [("a.jpg", "a dog", "a dog")], num_steps=120)
    facts = json.loads((folder / "run.json").read_text()) | {
        "data": {"train": {"kept": 1, "dropped": 0, "images": 1, "fingerprint": "x"}},
        "model": {"implementation": "native", "parameters": 1},
        "num_steps": 120,
    }
    facts["flags"] |= {"dtype": "float32"}
    (folder / "run.json").write_text(json.dumps(facts))
    page = report(folder, recipe="coco2017")
    assert "<strong>CANNOT TELL</strong>" in page
    published = {chart["key"]: chart["published"] for chart in read_data(page)["charts"]}
    losses = next(t for t in recipe["targets"] if t["metric"] == "loss" and "margin" in t)["values"]
    assert published["loss"][0]["x"] == [int(step) for step in losses]
    assert published["eval_rouge2"][0]["y"] == [14.64]


@settings(max_examples=10)
@given(st.lists(st.text(st.characters(exclude_categories=())), min_size=3, max_size=3))
def test_no_caption_name_or_flag_is_more_than_text(texts):
    with tempfile.TemporaryDirectory() as name:
        path, caption, label = texts
        rows = [(path, caption, label), *((text, text, text) for text in HOSTILE)]
        dropped = [{"split": caption, "row": label, "image_path": path, "caption": path, "reason": caption}]
        folder = write_run(Path(name) / "run", rows, dropped=dropped, **{"note": {label: [caption]}})
        page = report(folder)
    holds_nothing_of_others(page)
    assert not [char for char in page if char in "\x00\x1b\u202e\u2066\u2028"]
    assert len(page) < 400_000


@given(st.text(st.characters(exclude_categories=())))
def test_visible_text_can_be_encoded_on_one_line(text):
    shown = visible(text)
    shown.encode()
    assert len(shown.splitlines()) <= 1


def test_an_image_that_is_gone_or_a_bomb_is_told_by_its_reason(tmp_path, monkeypatch):
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(bomb)
    rows = [(str(tmp_path / "gone.jpg"), "a dog", "a dog"), (str(bomb), "a cat", "a cat"), ("", "a", "b")]
    page = report(write_run(tmp_path / "run", rows))
    assert "No such file" in page
    assert "decompression bomb" in page


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", b"{"),
        ("run.json", b"[]"),
        ("metrics.jsonl", b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo'),
        ("metrics.jsonl", b'{"step": 1, "loss": NaN}\n{"step": "x"}\n\xff\n'),
        ("metrics.jsonl", b""),
        ("dropped.jsonl", b"nothing\n"),
        ("ckpt_epoch_1_step_40/eval_generation.json", b"[1, {}]"),
        ("eval_images.json", b'{"image_path": 3}'),
    ],
)
def test_a_broken_run_is_reported_as_such(tmp_path, name, content):
    folder = write_run(tmp_path / "run", [("a.jpg", "a dog", "a dog")])
    (folder / name).write_bytes(content)
    page = report(folder)
    holds_nothing_of_others(page)
    assert 'class="problem"' in page or content == b""


def test_an_unfinished_run_is_reported(tmp_path):
    folder = write_run(tmp_path / "run", [("a.jpg", "a dog", "a dog")])
    facts = json.loads((folder / "run.json").read_text())
    del facts["finished"]
    (folder / "run.json").write_text(json.dumps(facts))
    assert "the run is not finished" in report(folder)


def test_what_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match="is not a folder"):
        write_report([tmp_path / "gone"], tmp_path / "report.html")
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_into_the_first_folder(tmp_path, capsys):
    folder = write_run(tmp_path / "run", [("a.jpg", "a dog", "a dog")])
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").is_file()
    assert str(folder / "report.html") in capsys.readouterr().out


def test_items_are_ranked_and_none_is_shown_twice():
    rows = [("a dog", "a dog"), ("a dog", "a big dog"), ("a cat", "two trees")] + [("x", f"y {i}") for i in range(90)]
    paths = ["a.jpg", "a.jpg", "b.jpg", *(f"{i}.jpg" for i in range(90))]
    items = ranked_items(Generated("validation", 1, rows, paths))
    assert items[0].references == ("a dog", "a big dog")
    assert items[0].score == pytest.approx((100 + 80) / 2)
    chosen = chosen_items(items)
    assert {kind: len(found) for kind, found in chosen.items()} == SHOWN
    places = [item.place for found in chosen.values() for item in found]
    assert len(places) == len(set(places))


def test_thinning_keeps_mean_and_range_and_leaves_out_what_is_not_finite():
    x, mean, low, high = thinned(np.arange(1, 6), np.array([1.0, 3.0, np.nan, 8.0, 7.0]), 2)
    assert (x.tolist(), mean.tolist()) == ([2, 4, 5], [2, 8, 7])
    assert (low.tolist(), high.tolist()) == ([1, 8, 7], [3, 8, 7])


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_and_within(low, width):
    ticks = nice_ticks(low, low + width)
    assert 1 <= len(ticks) <= 10
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in ticks)


def test_what_is_said_of_an_evaluation_besides_its_metrics_has_no_curve():
    details = {"rows": 4, "rows_scored": 3, "seconds": 2.0, "saving_seconds": 1.0}
    assert metric_names({"loss": 1.0, **details, "attribute_accuracy": 0.5}) == ["loss", "attribute_accuracy"]


def test_the_words_of_some_captions_have_pictures_of_where_they_look(tmp_path):
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "a.png")
    corner = bytes([255, *[0] * 15]).hex()
    shown = {"image_path": str(tmp_path / "a.png"), "tokens": ["a", " d", "og", ""], "weights": [corner] * 4}
    bad = [
        shown | {"image_path": "absent.png"},
        shown | {"weights": ["x"] * 4},
        shown | {"weights": [corner, corner[:8], corner, corner]},
        shown | {"weights": []},
        shown | {"tokens": []},
    ]
    write_json(tmp_path / "eval_attention.json", [shown, *bad])
    strips = list(looks(read_run_folder(tmp_path)))
    assert [word for word, _ in strips[0]] == ["a", " dog"]
    picture = Image.open(io.BytesIO(base64.b64decode(strips[0][0][1].partition(",")[2])))
    assert picture.getpixel((0, 0))[0] > 3 * picture.getpixel((80, 80))[0]
    assert not [strip for strip in strips[1:] if strip]


@pytest.mark.slow
def test_cocos_size_is_reported_in_seconds_and_megabytes(tmp_path):
    random = np.random.default_rng(0)
    words = [f"word{number}" for number in range(800)]
    picture = tmp_path / "picture.jpg"
    Image.fromarray(random.integers(0, 256, (480, 640, 3), np.uint8)).save(picture)
    texts = [" ".join(random.choice(words, 11)) for _ in range(25_014)]
    images = []
    for number in range(5_000):
        images.append(tmp_path / f"{number:012d}.jpg")
        images[-1].symlink_to(picture)
    rows = [(str(images[row % 5_000]), texts[row % 5_000], text) for row, text in enumerate(texts)]
    folder = write_run(tmp_path / "run", rows, num_steps=2307)
    started = time.perf_counter()
    page = report(folder)
    assert time.perf_counter() - started < 60
    assert len(page) < 10_000_000
    assert len(read_data(page)["items"]) == 5_000
