"""People's own rows: csv, json, jsonl and local data sets, their columns, paths and faults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from repro.data.sources import load_splits
from repro.errors import InputError

ROWS = [{"image_path": "a.jpg", "caption": "one"}, {"image_path": "b.jpg", "caption": 'two, "quoted" ü'}]


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_text(text, encoding=encoding)
    return str(path)


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def load(path: str, split: str = "train", **options):
    return load_splits(splits=[split], **{f"{split}_file": path}, **options)[split]


FORMATS = {
    "rows.jsonl": lines(ROWS),
    "rows.json": json.dumps(ROWS),
    "data.json": json.dumps({"data": ROWS}, indent=1),
    "lines.json": lines(ROWS),
    "rows.csv": 'image_path,caption\na.jpg,one\nb.jpg,"two, ""quoted"" ü"\n',
    "bom.csv": '\ufeffimage_path,caption\na.jpg,one\nb.jpg,"two, ""quoted"" ü"\n',
    "bom.jsonl": "\ufeff" + lines(ROWS),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    dataset = load(write(tmp_path / name, FORMATS[name])).dataset
    assert dataset["caption"][:] == [row["caption"] for row in ROWS]
    assert dataset["image_path"][:] == [str(tmp_path / row["image_path"]) for row in ROWS]
    assert dataset["row"][:] == [0, 1]


def test_an_existing_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.jpg").touch()
    monkeypatch.chdir(tmp_path / "here")
    assert load(write(tmp_path / "rows.jsonl", lines(ROWS))).dataset["image_path"][:] == [
        "a.jpg",
        str(tmp_path / "b.jpg"),
    ]


def test_only_an_empty_cell_is_null(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "image_path,caption\na.jpg,NA\nb.jpg,null\n")
    assert load(path).dataset["caption"][:] == ["NA", "null"]
    with pytest.raises(InputError, match=r"row 1 .* null"):
        load(write(tmp_path / "rows.csv", "image_path,caption\na.jpg,NA\nb.jpg,\n"))


def test_a_null_caption_is_an_error_that_names_its_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", lines([*ROWS, {"image_path": "c.jpg", "caption": None}]))
    with pytest.raises(InputError, match=r"rows\.jsonl: row 2 .* null"):
        load(path)


def test_an_empty_caption_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", lines([{"image_path": "a.jpg", "caption": ""}]))
    assert load(path).dataset["caption"][:] == [""]


def test_captions_that_are_not_text_are_dropped_and_listed(tmp_path: Path) -> None:
    broken = [17, ["a", "b"], {"x": 1}, "lone \ud800 surrogate"]
    rows = [*ROWS, *({"image_path": "c.jpg", "caption": caption} for caption in broken)]
    split = load(write(tmp_path / "rows.jsonl", lines(rows)))
    assert split.dataset["caption"][:] == [row["caption"] for row in ROWS]
    assert [row["row"] for row in split.dropped] == [2, 3, 4, 5]
    reasons = " ".join(row["reason"] for row in split.dropped)
    for word in ("int", "list", "dict", "Unicode"):
        assert word in reasons


def test_columns_are_found_named_or_listed(tmp_path: Path) -> None:
    row = {"picture": "a.jpg", "words": "one", "text": "two"}
    path = write(tmp_path / "rows.jsonl", lines([row]))
    assert load(path, image_column="picture").dataset["caption"][:] == ["two"]
    assert load(path, image_column="picture", caption_column="words").dataset["caption"][:] == ["one"]
    with pytest.raises(InputError, match="--image_column; there are 'picture', 'words', 'text'"):
        load(path)
    with pytest.raises(InputError, match=r"--caption_column 'wrods'.*'picture', 'words', 'text'"):
        load(path, image_column="picture", caption_column="wrods")
    two = write(tmp_path / "two.jsonl", lines([{"image": "a", "caption": "b", "text": "c"}]))
    with pytest.raises(InputError, match="Give --caption_column"):
        load(two)


def test_a_test_split_may_lack_captions(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", lines([{"image_path": "a.jpg"}]))
    assert load(path, split="test").dataset["caption"][:] == [None]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("rows.txt", "x", "cannot tell the format"),
        ("rows.jsonl", "", "is empty"),
        ("rows.jsonl", "{not json}\n", "cannot be read as jsonl"),
        ("rows.json", '["text"]', "row 0 is str"),
        ("rows.csv", "", "cannot be read as csv"),
        ("rows.jsonl", lines([{"image_path": 3, "caption": "x"}]), "holds int; it must hold paths"),
    ],
)
def test_files_that_cannot_be_used_say_why(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load(write(tmp_path / name, text))


def test_missing_sources_say_what_to_give(tmp_path: Path) -> None:
    for options, words in (
        ({"train_file": str(tmp_path / "absent.csv")}, "no such file"),
        ({}, "give --train_file, or --dataset_name"),
        ({"dataset_name": "ydshieh/coco_dataset_script"}, "--data_dir"),
        (
            {"dataset_name": "ydshieh/coco_dataset_script", "dataset_config_name": "2014", "data_dir": str(tmp_path)},
            "--dataset_config_name 2014",
        ),
        ({"dataset_name": str(tmp_path / "absent")}, "cannot be loaded"),
    ):
        with pytest.raises(InputError, match=words):
            load_splits(splits=["train"], **options)


def test_a_local_data_set_folder_is_loaded_by_datasets(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", lines(ROWS))
    options = {"dataset_name": str(folder), "cache_dir": str(tmp_path / "cache")}
    rows = load_splits(splits=["train"], **options)["train"].dataset
    assert rows["caption"][:] == [row["caption"] for row in ROWS]
    assert rows["image_path"][0] == str(folder / "a.jpg")
    with pytest.raises(InputError, match="has no split 'test', only 'train'"):
        load_splits(splits=["test"], **options)
