"""People's own rows: csv, json, jsonl and local data sets, their columns, paths and faults."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import time
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
from conftest import load_splits

from repro.data import sources
from repro.data.images import open_image
from repro.errors import InputError
from repro.limits import CAPTION_CHARACTERS

ROWS = [{"image_path": "a.jpg", "caption": "one"}, {"image_path": "b.jpg", "caption": 'two, "quoted" ü'}]


def read_image(reference: str) -> PIL.Image.Image:
    with open_image(reference) as image:
        return image


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
    "bom.json": "\ufeff" + json.dumps(ROWS),
    "windows.csv": 'image_path,caption\r\na.jpg,one\r\nb.jpg,"two, ""quoted"" ü"\r\n',
    "rows.tsv": 'image_path\tcaption\na.jpg\tone\nb.jpg\t"two, ""quoted"" ü"\n',
    "captions.txt": 'image,caption\na.jpg,one\nb.jpg,"two, ""quoted"" ü"\n',  # Flickr8k
    "ROWS.CSV": 'image_path,caption\na.jpg,one\nb.jpg,"two, ""quoted"" ü"\n',
    "spreadsheet.csv": '"image";"caption"\n"a.jpg";"one"\n"b.jpg";"two, ""quoted"" ü"\n',
    "open_clip.csv": 'filepath\ttitle\na.jpg\tone\nb.jpg\t"two, ""quoted"" ü"\n',
    "flickr30k.csv": 'image_name| comment_number| comment\na.jpg| 0| one\nb.jpg| 1| two, "quoted" ü\n',
    "comma.tsv": 'image,caption\na.jpg,one\nb.jpg,"two, ""quoted"" ü"\n',
    "blanks.csv": 'image | caption \na.jpg | one\nb.jpg | two, "quoted" ü\n',
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    dataset = load(write(tmp_path / name, FORMATS[name])).dataset
    assert dataset["caption"][:] == [row["caption"] for row in ROWS]
    assert dataset["image_path"][:] == [str(tmp_path / row["image_path"]) for row in ROWS]
    assert dataset["row"][:] == [0, 1]


def test_relative_paths_are_relative_to_the_file_that_names_them(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    for name in ("here/a.jpg", "here/b.jpg", "b.jpg"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "here")
    rows = [{"image_path": name, "caption": "x"} for name in ("a.jpg", "b.jpg", "c.jpg", str(tmp_path / "b.jpg"))]
    assert load(write(tmp_path / "rows.jsonl", lines(rows))).dataset["image_path"][:] == [
        str(tmp_path / "here" / "a.jpg"),  # which is only here, as the example would have it
        str(tmp_path / "b.jpg"),
        str(tmp_path / "c.jpg"),
        str(tmp_path / "b.jpg"),
    ]


COCO_NULL = {
    "images": [{"id": number, "file_name": f"{name}.jpg"} for number, name in enumerate("abc")],
    "annotations": [{"image_id": number, "caption": text} for number, text in enumerate(["NA", None, "null"])],
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("empty.csv", "image_path,caption\na.jpg,NA\nb.jpg,\nc.jpg,null\n"),
        ("short.csv", "image_path,caption\na.jpg,NA\nb.jpg\nc.jpg,null\n"),  # one such line is in Flickr30k's list
        ("null.json", json.dumps([{"image": "a.jpg", "caption": text} for text in ("NA", None, "null")])),
        ("coco.json", json.dumps(COCO_NULL)),
    ],
)
def test_a_null_caption_drops_its_row_which_only_an_empty_cell_is(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    rows = load(write(tmp_path / name, text))
    assert rows.dataset["caption"][:] == ["NA", "null"]
    assert [(row["row"], row["reason"]) for row in rows.dropped] == [(1, "it has no caption")]
    assert len(load(str(tmp_path / name), split="test").dataset) == 3, "predictions need no captions"


def test_relative_paths_begin_in_data_dir_whatever_names_them(tmp_path: Path, monkeypatch) -> None:
    """As LAVIS's lists, Flickr8k's and those of Windows have them; what is not there is looked for where it was."""
    (tmp_path / "Images" / "val2014").mkdir(parents=True)
    (tmp_path / "lists").mkdir()
    names = ["0.jpg", "val2014/1.jpg", "lists/beside.jpg", "val2014\\1.jpg"]
    places = [f"Images/{name}" for name in names]
    places[2], places[3] = "lists/beside.jpg", places[1]
    for place in places:
        (tmp_path / place).touch()
    monkeypatch.chdir(tmp_path)
    addresses = [f"file://{tmp_path}/Images/0.jpg", "absent.jpg"]
    rows = [{"image": name.removeprefix("lists/"), "caption": ["one"]} for name in (*names, *addresses)]
    write(tmp_path / "lists" / "rows.json", json.dumps(rows))
    table = pyarrow.table({"image": [row["image"] for row in rows], "caption": ["one"] * len(rows)})
    pyarrow.parquet.write_table(table, tmp_path / "lists" / "rows.parquet")
    for suffix in ("json", "parquet"):
        found = load(f"lists/rows.{suffix}", data_dir="Images", cache_dir=str(tmp_path / "hf")).dataset["image_path"][:]
        assert found == [str(tmp_path / place) for place in (*places, "Images/0.jpg", "Images/absent.jpg")]


def test_a_folder_of_images_with_texts_beside_them_is_read(tmp_path: Path) -> None:
    (tmp_path / "set" / "more").mkdir(parents=True)
    (tmp_path / "set" / ".thumbnails").mkdir()
    texts = {"a.jpg": "one\n", "more/b.PNG": "two\n\n three \r\n", "c.v1.jpg": "four", "d.jpg": None, "latin.jpg": None}
    texts |= {".thumbnails/a.jpg": "small", ".hidden.jpg": "hidden"}
    for name, text in texts.items():
        (tmp_path / "set" / name).touch()
        if text is not None:
            write((tmp_path / "set" / name).with_suffix(".txt"), text)
    with pytest.raises(InputError, match="--train_file FOLDER"):
        load_splits(splits=["train"], dataset_name=str(tmp_path / "set"), cache_dir=str(tmp_path / "hf"))
    (tmp_path / "set" / "latin.txt").write_bytes(b"caf\xe9")
    write(tmp_path / "set" / "readme.txt", "about it")
    rows = load(str(tmp_path / "set"), rows_dir=tmp_path / "rows")
    expected = [("a.jpg", "one"), ("c.v1.jpg", "four"), ("more/b.PNG", "two"), ("more/b.PNG", "three")]
    assert list(zip(rows.dataset["image_id"], rows.dataset["caption"], strict=True)) == expected
    assert rows.dataset["image_path"][:] == [str(tmp_path / "set" / name) for name, _ in expected]
    assert [row["reason"].split(" (")[0] for row in rows.dropped] == [
        "it has no caption", "its caption is not valid Unicode", "it has no image"
    ]  # fmt: skip
    write(tmp_path / "set" / "a.txt", "changed")
    assert load(str(tmp_path / "set"), rows_dir=tmp_path / "rows").dataset["caption"][0] == "changed"
    assert len(load(str(tmp_path / "set"), split="test").dataset) == 5


def test_an_empty_caption_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", lines([{"image_path": "a.jpg", "caption": ""}]))
    assert load(path).dataset["caption"][:] == [""]


def test_captions_that_are_not_text_are_dropped_and_listed(tmp_path: Path) -> None:
    broken = [17, [18], {"x": 1}, "lone \ud800 surrogate"]
    rows = [*ROWS, *({"image_path": "c.jpg", "caption": caption} for caption in broken)]
    split = load(write(tmp_path / "rows.jsonl", lines(rows)))
    assert split.dataset["caption"][:] == [row["caption"] for row in ROWS]
    assert [row["row"] for row in split.dropped] == [2, 3, 4, 5]
    reasons = " ".join(row["reason"] for row in split.dropped)
    for word in ("int", "dict", "Unicode"):
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
        ("rows.doc", "x", "cannot tell the format"),
        ("rows.csv", "image;caption\na.jpg;one; two\n", "line 2 has 3 fields, the header 2; .* separator ';'"),
        ("rows.json", '[{"image": "a.jpg", "caption": NaN}]', "write null for NaN"),
        ("rows.jsonl", "", "is empty"),
        ("rows.jsonl", "{not json}\n", "cannot be read as jsonl"),
        ("rows.json", '["text"]', "row 0 is str"),
        ("rows.jsonl", lines(ROWS) + "{half", "cannot be read as jsonl: line 3"),
        ("rows.json", json.dumps(ROWS)[:-9], "cannot be read as json"),
        ("rows.csv", "image_path,caption\na.jpg,one, or two\n", "line 2 has 3 fields, the header 2; .* double quotes"),
        ("rows.csv", 'image_path,caption\na.jpg,"one\n', "cannot be read as csv"),
        ("rows.csv", "", "is empty"),
        ("rows.csv", "image_path,caption\n", "is empty"),
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
            {"dataset_name": "ydshieh/coco_dataset_script", "dataset_config_name": "2015", "data_dir": str(tmp_path)},
            "--dataset_config_name 2015: the built-in COCO reader knows 2017, 2014",
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


def test_latin_1_is_told_from_utf_8(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "image_path,caption\na.jpg,one\nb.jpg,caf\xe9\n", encoding="latin-1")
    with pytest.raises(InputError, match=r"rows\.csv: is not UTF-8 .*0xe9.*iconv -f latin1 -t utf-8 rows\.csv"):
        load(path)


def test_several_captions_of_an_image_are_as_many_rows(tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "captions": ["one", "two"]}, {"image": "b.jpg", "captions": []}, ROWS[1]]
    rows[2] = {"image": "c.jpg", "captions": ["three"]}
    split = load(write(tmp_path / "rows.jsonl", lines(rows)))
    assert split.dataset["caption"][:] == ["one", "two", "three"]
    assert split.dataset["row"][:] == [0, 0, 2]
    assert [Path(path).name for path in split.dataset["image_path"]] == ["a.jpg", "a.jpg", "c.jpg"]
    assert [(row["row"], row["reason"]) for row in split.dropped] == [(1, "it has no caption")]
    null = load(write(tmp_path / "null.jsonl", lines([{"image": "a.jpg", "captions": ["one", None]}])))
    assert (null.dataset["caption"][:], null.dropped[0]["reason"]) == (["one"], "it has no caption")


def test_a_row_without_an_image_is_dropped_and_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "image_path,caption\na.jpg,one\n,two\n")
    assert [(row["row"], row["reason"]) for row in load(path).dropped] == [(1, "it has no image")]


@pytest.mark.parametrize("address", ["http://example.org/a.jpg", "https://example.org/a.jpg"])
def test_addresses_are_refused(tmp_path: Path, address: str) -> None:
    path = write(tmp_path / "rows.jsonl", lines([ROWS[0], {"image_path": address, "caption": "x"}]))
    with pytest.raises(InputError, match=rf"row 1 has its image at {address}; save the images"):
        load(path)


def test_rows_are_read_once_and_again_when_their_file_changes(tmp_path: Path, monkeypatch) -> None:
    read = []
    real = sources.read_file
    monkeypatch.setattr(sources, "read_file", lambda path: read.append(path) or real(path))
    path, kept = tmp_path / "rows.jsonl", tmp_path / "kept"
    for row in ROWS:  # where images are missing they are looked for each time
        (tmp_path / row["image_path"]).touch()

    def captions(split: str = "train", **options) -> list[str]:
        rows = load(str(path), split=split, rows_dir=kept, **options)
        assert [row["reason"] for row in rows.dropped] == ["its caption is int, not text"]
        return rows.dataset["caption"][:]

    broken = {"image_path": "c.jpg", "caption": 3}
    write(path, lines([*ROWS, broken]))
    expected = [row["caption"] for row in ROWS]
    # Each process of a run asks for its rows to be read again; the first one does it.
    again, other = {"rebuild": "a run"}, {"rebuild": "another run"}
    for count, options in ((1, {}), (1, {}), (2, again), (2, again), (2, {}), (3, other)):
        assert captions(**options) == expected
        assert len(read) == count
    captions(split="validation")
    assert len(read) == 4
    write(path, lines([*ROWS, broken, *ROWS]))
    assert captions() == expected * 2
    assert len(read) == 5
    monkeypatch.chdir(tmp_path)  # relative paths may mean other files here
    captions()
    assert len(read) == 6


def test_images_that_are_moved_after_their_list_was_read_are_looked_for_again(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "first").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    for row in ROWS:
        (tmp_path / "first" / row["image_path"]).touch()
    path = write(tmp_path / "rows.jsonl", lines(ROWS))
    for place in ("first", "."):  # from the working directory to beside the list
        for _ in range(2):
            names = load(path, rows_dir=tmp_path / "kept").dataset["image_path"][:]
            assert names == [str((tmp_path / place / row["image_path"]).resolve()) for row in ROWS]
        for row in ROWS:
            (tmp_path / "first" / row["image_path"]).rename(tmp_path / row["image_path"]) if place == "first" else None


def test_what_cannot_be_read_leaves_nothing_behind(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with pytest.raises(InputError, match="line 3"):
        load(write(tmp_path / "rows.jsonl", lines(ROWS) + "{half"), rows_dir=kept)
    assert all(path.suffix == ".lock" for path in kept.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be kept there.*--cache_dir"):
        load(write(tmp_path / "rows.jsonl", lines(ROWS)), rows_dir=tmp_path / "file")


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    PIL.Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


CAPTIONS = ["one", "two", "three", "four"]
SEEDS = [1, 2, 1, 3]
"""Of each row's image: the third row shows the first one's."""


def as_parquet(folder: Path) -> dict[str, str]:
    rows = {"image": [{"bytes": picture(seed), "path": f"{seed}.png"} for seed in SEEDS], "caption": CAPTIONS}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / "rows.parquet")
    return {"train_file": str(folder / "rows.parquet")}


def as_plain_parquet(folder: Path) -> dict[str, str]:
    table = pyarrow.table({"jpg": [picture(seed) for seed in SEEDS], "text": CAPTIONS})
    for number, part in enumerate((table.slice(0, 3), table.slice(3))):
        pyarrow.parquet.write_table(part, folder / f"part-{number}.parquet")
    return {"train_file": str(folder / "part-*.parquet")}


def write_shard(file: Path, members: dict[str, bytes | str]) -> str:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(file)


def as_web_dataset(folder: Path) -> dict[str, str]:
    for shard, rows in enumerate(([0, 1], [2, 3])):
        members = {}
        for row in rows:
            members |= {f"{row:04d}.png": picture(SEEDS[row]), f"{row:04d}.txt": CAPTIONS[row]}
        write_shard(folder / f"shard-{shard}.tar", members)
    return {"train_file": str(folder / "shard-*.tar")}


def as_mixed_shards(folder: Path) -> dict[str, str]:
    """Images of several formats and endings, in upper case too, and in another order than their texts."""
    endings = ("png", "JPG", "jpeg", "webp")
    for shard, rows in enumerate(([0, 1], [2, 3])):
        members = {f"{row}.{endings[row]}": picture(SEEDS[row]) for row in rows[:1]}
        members |= {f"{rows[0]}.TXT": CAPTIONS[rows[0]], f"{rows[1]}.txt": CAPTIONS[rows[1]]}
        members |= {f"{row}.{endings[row]}": picture(SEEDS[row]) for row in rows[1:]}
        write_shard(folder / f"{shard}.TAR", members)
    return {"train_file": str(folder / "[01].TAR")}


def as_numbered_shards(folder: Path) -> dict[str, str]:
    return as_web_dataset(folder) and {"train_file": str(folder / "shard-{0..1}.tar")}


def as_img2dataset(folder: Path) -> dict[str, str]:
    """Captions in the json of each sample."""
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for row, seed in enumerate(SEEDS):
            about = json.dumps({"url": "x", "caption": CAPTIONS[row], "status": "success"}).encode()
            for suffix, content in ((".png", picture(seed)), (".json", about)):
                member = tarfile.TarInfo(f"{row:04d}{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return {"train_file": str(folder / "{00000..00000}.tar")}


def as_image_folder(folder: Path) -> dict[str, str]:
    (folder / "set" / "train").mkdir(parents=True)
    rows = [{"file_name": f"{row}.png", "text": caption} for row, caption in enumerate(CAPTIONS)]
    for row, seed in enumerate(SEEDS):
        (folder / "set" / "train" / f"{row}.png").write_bytes(picture(seed))
    write(folder / "set" / "train" / "metadata.jsonl", lines(rows))
    return {"dataset_name": str(folder / "set")}


def as_saved_data_set(folder: Path) -> dict[str, str]:
    rows = {"image": [{"bytes": picture(seed), "path": None} for seed in SEEDS], "caption": [[c] for c in CAPTIONS]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features)).save_to_disk(folder / "saved")
    return {"dataset_name": str(folder / "saved")}


def as_parquet_folder(folder: Path) -> dict[str, str]:
    (folder / "hub").mkdir()
    as_parquet(folder / "hub")
    (folder / "hub" / "rows.parquet").rename(folder / "hub" / "train-00000-of-00001.parquet")
    return {"dataset_name": str(folder / "hub")}


SOURCES = (
    *(as_parquet, as_plain_parquet, as_web_dataset, as_mixed_shards, as_numbered_shards, as_img2dataset),
    *(as_image_folder, as_saved_data_set, as_parquet_folder),
)


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_every_source_gives_the_same_captions_and_pictures(make, tmp_path: Path) -> None:
    options = make(tmp_path)
    for _ in range(2):  # the second time from what was kept
        rows = load_splits(splits=["train"], cache_dir=str(tmp_path / "hf"), rows_dir=tmp_path / "rows", **options)
        dataset = rows["train"].dataset
        assert dataset["caption"][:] == CAPTIONS
        for path, seed in zip(dataset["image_path"], SEEDS, strict=True):
            np.testing.assert_array_equal(read_image(path), PIL.Image.open(io.BytesIO(picture(seed))))
    if make is not as_image_folder:  # whose files are three and one copy
        assert len(set(dataset["image_path"])) == 3


def test_what_the_datasets_library_cannot_read_is_named(tmp_path: Path) -> None:
    for name in ("rows.parquet", "rows.tar"):
        write(tmp_path / name, "not one of these")
        with pytest.raises(InputError, match=rf"{name}: cannot be read"):
            load(str(tmp_path / name), cache_dir=str(tmp_path / "hf"))
        with pytest.raises(InputError, match="no such file"):
            load(str(tmp_path / "absent" / name))


def test_fields_of_a_samples_json_are_captions_by_name_and_never_images(tmp_path: Path) -> None:
    path, cache = as_img2dataset(tmp_path)["train_file"], str(tmp_path / "hf")
    assert load(path, caption_column="json.url", cache_dir=cache).dataset["caption"][:] == ["x"] * 4
    for flag, name in (("caption_column", "json.title"), ("image_column", "json.url")):
        with pytest.raises(InputError, match=f"--{flag} '{name}'.*'__key__'"):
            load(path, cache_dir=cache, **{flag: name})


def test_names_that_belong_to_several_samples_are_told_at_once(tmp_path: Path) -> None:
    members = {f"photo.v{row}.{ending}": b"x" * 100 for row in range(3000) for ending in ("jpg", "txt")}
    path, started = write_shard(tmp_path / "a.tar", members), time.monotonic()
    with pytest.raises(InputError, match=r"one sample, 'photo', .* 'photo.v32.jpg'; .*'photo_v32.jpg'") as refused:
        load(path)
    assert time.monotonic() - started < 5
    assert len(str(refused.value)) < 500 + len(str(tmp_path))


def test_one_of_several_images_of_a_sample_is_taken_by_its_name(tmp_path: Path) -> None:
    members = {"a.1.jpg": picture(0), "a.2.jpg": picture(1), "a.txt": "a", "b.1.jpg": picture(2), "b.txt": "b"}
    path = write_shard(tmp_path / "a.tar", members)
    with pytest.raises(InputError, match=r"which column holds the images\? .*'1.jpg', '2.jpg', 'txt'"):
        load(path)
    for column, kept, seed in (("1.jpg", ["a", "b"], 0), ("2.jpg", ["a"], 1)):
        rows = load(path, image_column=column).dataset
        assert rows["caption"][:] == kept
        np.testing.assert_array_equal(read_image(rows["image_path"][0]), PIL.Image.open(io.BytesIO(picture(seed))))


def test_rows_of_a_shard_that_cannot_be_used_are_dropped_one_by_one(tmp_path: Path) -> None:
    members = {"a.jpg": picture(0), "a.txt": "a", "b.jpg": picture(1), "c.txt": "no image", "d.png": picture(2)}
    members |= {"d.txt": b"\xff", "e.png": picture(3), "e.txt": "x" * (CAPTION_CHARACTERS + 1)}
    rows = load(write_shard(tmp_path / "a.tar", members))
    assert rows.dataset["caption"][:] == ["a"]
    assert rows.dataset["image_id"][:] == ["a.jpg"]
    reasons = ["no caption", "no image", "not valid Unicode", "at most 16,384 are read"]
    assert all(reason in row["reason"] for reason, row in zip(reasons, rows.dropped, strict=True))


@pytest.mark.parametrize("keep", [0.0, 0.4, 0.7])
def test_a_shard_that_is_empty_cut_or_compressed_is_named(tmp_path: Path, keep: float) -> None:
    path = Path(
        write_shard(tmp_path / "a.tar", {f"{row}.{end}": "x" * 9999 for row in range(9) for end in ("jpg", "txt")})
    )
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) - 100] if keep else gzip.compress(content))
    with pytest.raises(InputError, match=r"a.tar: cannot be read as tar: .*not compressed"):
        load(str(path))
    with pytest.raises(InputError, match=r"a.tar: is empty"):
        load(write_shard(path, {}))


def test_a_shard_that_is_missing_among_others_is_named(tmp_path: Path) -> None:
    for number in (0, 2):
        write_shard(tmp_path / f"{number}.tar", {"a.jpg": picture(0), "a.txt": "a"})
    with pytest.raises(InputError, match=r"1\.tar: there is no such file"):
        load(str(tmp_path / "{0..2}.tar"), rows_dir=tmp_path / "rows")


def test_a_real_shard_is_read(real_data: Path, tmp_path: Path) -> None:
    rows = load(str(real_data / "cc12m_sample.tar"), cache_dir=str(tmp_path / "hf")).dataset
    assert len(rows) == 32
    assert "Red Square is a city square in Moscow, Russia." in rows["caption"][:]
    assert all(min(read_image(path).size) > 50 for path in rows["image_path"])
