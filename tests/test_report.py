"""The report: whatever a run is like, and whatever its captions hold."""

from __future__ import annotations

import base64
import io
import json
import re
import tempfile
import time
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic_run import read_data, write_run
from test_faults import bomb

from repro.__main__ import main
from repro.errors import InputError
from repro.json_files import write_json
from repro.record.sanitize import visible
from repro.record.writer import locked
from repro.reports.captions import ranked_items
from repro.reports.charts import thinned
from repro.reports.page import THUMBNAILS, looks, with_thumbnails
from repro.reports.runs import Generated, read_run_folder, words
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
DOG = [("a.jpg", "a dog", "a dog")]
any_text = st.text(st.characters(exclude_categories=()))


def report(*folders, recipe=None):
    output = folders[0].parent / "out" / "report.html"
    write_report(folders, output, recipe=recipe)
    return output.read_text(encoding="utf-8")


def holds_nothing_of_others(page):
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.append((tag, dict(attrs)))
    parser.feed(page)
    assert [attrs.get("id") for tag, attrs in found if tag == "script"] == ["data", None]
    assert not [name for _, attrs in found for name in attrs if name.startswith("on") or name == "style"]
    assert all(attrs["src"].startswith("data:image/jpeg;base64,") for tag, attrs in found if tag == "img")
    assert "default-src 'none'" in next(attrs["content"] for tag, attrs in found if "http-equiv" in attrs)


def test_a_run_is_told_with_its_curves_captions_and_settings(tmp_path, golden_inputs):
    pictures = sorted((golden_inputs / "images" / "val").iterdir())
    rows = [(str(path), f"a dog number {place}", "a dog") for place, path in enumerate(pictures)]
    page = report(write_run(tmp_path / "mine", rows))
    holds_nothing_of_others(page)
    data = read_data(page)
    keys = [chart["key"] for chart in data["charts"]]
    assert keys == ["loss", "learning_rate", "speed"], "one evaluation is no curve"
    before, folded = page.split("<summary>Further metrics")
    assert ("ROUGE-2, F x 100" in before, "attribute accuracy" in folded) == (True, True), "known metrics come first"
    assert data["charts"][0]["lines"][0]["y"][0] == 3
    assert set(data["charts"][2]["lines"][0]["y"]) == {16.0}, "10 steps of 8 rows in 5 seconds"
    assert len(data["items"]) == len(pictures)
    assert data["items"][0][0] in {path.name for path in pictures}
    assert page.count("data:image/jpeg") >= len(pictures)
    assert page.index('class="tiles"') < page.index("finished, step 40") < page.index("add --recipe NAME")


def test_runs_are_overlaid_and_told_apart(tmp_path):
    for name, steps in (("a", 40), ("b", 2500)):
        write_run(tmp_path / name / "run", DOG, num_steps=steps)
    loss = read_data(report(tmp_path / "a", tmp_path / "b"))["charts"][0]
    assert [line["name"] for line in loss["lines"]] == ["a", "b"]
    assert loss["last"] == 2500
    assert len(loss["lines"][1]["x"]) <= 500


def test_what_a_recipe_wants_is_drawn_in_and_a_verdict_is_given(tmp_path):
    facts = {"flags": {"seed": 42, "dtype": "float32"}, "model": {"implementation": "native", "parameters": 1}}
    facts["data"] = {"train": {"kept": 1, "dropped": 0, "images": 1, "fingerprint": "x"}}
    page = report(write_run(tmp_path / "run", DOG, num_steps=120, num_evaluations=3, **facts), recipe="coco2017")
    assert ">CANNOT TELL</strong>" in page
    wanted = {chart["key"]: chart["wanted"] for chart in read_data(page)["charts"]}
    assert wanted["loss"]["x"] == list(range(10, 130, 10)), "where the published run logged its loss"
    assert [wanted["eval_rouge2"][end] for end in ("x", "y", "low", "high")] == [[2000], [14.64], [14.34], [14.94]]
    assert len(wanted["learning_rate"]["x"]) == 18
    metrics = {"eval_loss", "eval_rouge2", "eval_attribute_accuracy"}  # and not how many rows, or how long it took
    assert wanted.keys() == {"loss", "learning_rate", *metrics}


@settings(max_examples=5)
@given(st.tuples(any_text, any_text, any_text))
def test_no_caption_name_or_flag_is_more_than_text(texts):
    with tempfile.TemporaryDirectory() as name:
        path, caption, label = texts
        rows = [(path, caption, label), *((text, text, text) for text in HOSTILE)]
        dropped = [{"split": caption, "row": label, "image_path": path, "caption": path, "reason": caption}]
        page = report(write_run(Path(name) / "run", rows, dropped=dropped, **{"note": {label: [caption]}}))
    holds_nothing_of_others(page)
    assert not [char for char in page if char in "\x00\x1b\u202e\u2066\u2028"]
    assert len(page) < 400_000


@given(any_text)
def test_visible_text_can_be_encoded_on_one_line(text):
    shown = visible(text)
    shown.encode()
    assert len(shown.splitlines()) <= 1


def test_an_image_that_is_gone_or_a_bomb_is_told_by_its_reason(tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb())
    rows = [(str(tmp_path / name), "a dog", "a dog") for name in ("gone.jpg", "bomb.png")]
    page = report(write_run(tmp_path / "run", [*rows, ("", "a", "b")]))
    assert "No such file" in page
    assert "decompression bomb" in page


BROKEN = {
    "run.json": [b"{", b"[]"],
    "metrics.jsonl": [
        b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo',
        b'{"step": 1, "loss": NaN}\n{"step": "x"}\n\xff\n',
        b"",
    ],
    "dropped.jsonl": [b"nothing\n"],
    "ckpt_epoch_1_step_40/eval_generation.json": [b"[1, {}]"],
    "eval_images.json": [b'{"image_path": 3}'],
}


@pytest.mark.parametrize(("name", "content"), [(name, each) for name, of in BROKEN.items() for each in of])
def test_a_broken_run_is_reported_as_such(tmp_path, name, content):
    folder = write_run(tmp_path / "run", DOG)
    (folder / name).write_bytes(content)
    page = report(folder)
    holds_nothing_of_others(page)
    assert 'class="problem"' in page or content == b""


@pytest.mark.parametrize(
    ("state", "reason"),
    [("running", ""), ("crashed", ""), ("interrupted", "Interrupted: by SIGTERM"), ("stopped", "RunStopped: by NaN")],
)
def test_running_interrupted_and_crashed_are_told_apart(tmp_path, state, reason):
    folder = write_run(tmp_path / "run", DOG, num_steps=283)
    facts = json.loads((folder / "run.json").read_text()) | {"num_steps": 2342, "stopped": reason}
    del facts["finished"]
    (folder / "run.json").write_text(json.dumps(facts))
    with locked(folder) if state == "running" else nullcontext():
        page = report(folder)
    assert f"{state}</strong>" in page
    assert "step 283 of 2342" in page


def test_what_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match="is not a folder"):
        write_report([tmp_path / "gone"], tmp_path / "report.html")
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_items_are_ranked_and_the_ends_have_pictures(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    rows = [("a dog", "a dog"), ("a dog", "a big dog")] + [("x", f"y {i}") for i in range(900)]
    paths = [str(tmp_path / name) for name in ("a.jpg", "a.jpg", *(f"{i}.jpg" for i in range(900)))]
    items = with_thumbnails(ranked_items([Generated("validation", 1, rows, paths)]))
    assert items[0].references == ("a dog", "a big dog")
    assert items[0].scores == pytest.approx([(100 + 80) / 2])
    pictured = [place for place, item in enumerate(items) if item.thumbnail or item.problem]
    assert (pictured[0], pictured[-1], len(pictured) <= THUMBNAILS) == (0, len(items) - 1, True)


def test_runs_stand_side_by_side_and_captions_that_differ_come_first():
    paths = [["/one/val/a.jpg", "/one/val/b.jpg"], ["/two/val/b.jpg", "/two/val/a.jpg", "/two/val/c.jpg"]]
    rows = [[("a dog", "a dog"), ("a cat", "a cats")], [("a cow", "a cats"), ("a dog", "a dog"), ("x", "y")]]
    items = ranked_items([Generated("validation", 1, *each) for each in zip(rows, paths, strict=True)])
    captions = [[said and said.caption for said in item.said] for item in items]
    assert captions == [["a cat", "a cow"], ["a dog", "a dog"], [None, "x"]]
    assert [items[0].pieces(said) for said in items[0].said] == [["", "a cat", ""], ["", "a ", "cow"]], "stems match"


def test_only_settings_that_differ_are_compared_and_no_value_is_pythons(tmp_path):
    flags = {"seed": 1, "per_device_train_batch_size": 4, "learning_rate": 3e-5, "push": True, "mesh": {"data": 2}}
    write_run(tmp_path / "a", DOG, flags=flags | {"dropout": None}, dropped=[{"split": None}])
    write_run(tmp_path / "b", DOG, flags=flags | {"dropout": 0.5})
    page = report(tmp_path / "a", tmp_path / "b")
    assert re.findall("flags: ([a-z_]+)", page.split("<h3>What differs</h3>")[1]) == ["dropout"]
    shown = page.split("<body>")[1].split("<script")[0]
    assert not re.search(r"\b(None|True|False)\b|[{}]|&#39;", shown)
    assert words({"a": {"b": {"c": {"d": 1}}}, "e": [], "f": 2.0}) == "a b c …, e none, f 2"


def test_the_caption_at_each_evaluation_is_kept(tmp_path):
    page = report(write_run(tmp_path / "run", DOG, num_evaluations=40))
    assert read_data(page)["items"][0][2][0][2] == [[step, f"a dog at {step}"] for step in (1, 8, 16, 24, 32)]


def test_what_captions_claim_of_rendered_scenes_is_judged(tmp_path):
    item = {"shape": "star", "colour": "red", "size": "big", "position": "top left", "centre": [0.2, 0.2]}
    scenes = [{"image_id": 7, "objects": [item, item | {"position": "top right"}], "background": "white"}]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "scenes_val2017.json").write_text(json.dumps(scenes))
    path = str(tmp_path / "val2017" / "000000000007.jpg")
    page = report(write_run(tmp_path / "run", [(path, "three red stars", "two red stars")]))
    assert read_data(page)["items"][0][2][0][3] == [["colour", True], ["shape", True], ["count", False]]
    assert '<th scope="row">said 3</th><td class="n" data-name="true 0">0</td>' in page


def test_thinning_keeps_mean_and_range():
    points = [(1, 1.0), (2, 3.0), (4, 8.0), (7, 6.0), (8, 5.0)]
    assert thinned(points, 2) == [(2, 2.0, 1.0, 3.0), (7, 7.0, 6.0, 8.0), (8, 5.0, 5.0, 5.0)]


def test_the_words_of_some_captions_have_pictures_of_where_they_look(tmp_path):
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "a.png")
    corner = bytes([255, *[0] * 15]).hex()
    shown = {"image_path": str(tmp_path / "a.png"), "tokens": ["a", " d", "og", ""], "weights": [corner] * 4}
    broken = [["x"] * 4, [corner, corner[:8], corner, corner], []]
    bad = [{"image_path": "absent.png"}, {"tokens": []}, *({"weights": weights} for weights in broken)]
    write_json(tmp_path / "eval_attention.json", [shown, *(shown | changed for changed in bad)])
    strips = list(looks(read_run_folder(tmp_path)))
    assert [word for word, _ in strips[0]] == ["a", " dog"]
    picture = Image.open(io.BytesIO(base64.b64decode(strips[0][0][1].partition(",")[2])))
    assert picture.getpixel((0, 0))[0] > 3 * picture.getpixel((80, 80))[0]
    assert not [strip for strip in strips[1:] if strip]


@pytest.mark.slow
def test_cocos_size_is_reported_in_seconds_and_megabytes(tmp_path):
    random = np.random.default_rng(0)
    vocabulary = [f"word{number}" for number in range(800)]
    picture = tmp_path / "picture.jpg"
    Image.fromarray(random.integers(0, 256, (480, 640, 3), np.uint8)).save(picture)
    texts = [" ".join(random.choice(vocabulary, 11)) for _ in range(25_014)]
    images = [tmp_path / f"{number:012d}.jpg" for number in range(5_000)]
    for image in images:
        image.symlink_to(picture)
    rows = [(str(images[row % 5_000]), texts[row % 5_000], text) for row, text in enumerate(texts)]
    folder = write_run(tmp_path / "run", rows, num_steps=2307)
    started = time.perf_counter()
    page = report(folder)
    assert time.perf_counter() - started < 60
    assert len(page) < 10_000_000
    assert len(read_data(page)["items"]) == 5_000
