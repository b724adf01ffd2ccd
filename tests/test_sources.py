"""People's own rows: csv, json, jsonl and local data sets, their columns, paths and faults."""

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
TEXTS = [row["caption"] for row in ROWS]


def read_image(reference):
    with open_image(reference) as image:
        return image


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def load(path, split="train", **options):
    return load_splits(splits=[split], **{f"{split}_file": path}, **options)[split]


def reasons(rows):
    return [(row["row"], row["reason"]) for row in rows.dropped]


def table(separator, image="image_path", caption="caption"):
    return f'{image}{separator}{caption}\na.jpg{separator}one\nb.jpg{separator}"two, ""quoted"" ü"\n'


FORMATS = {
    "rows.jsonl": lines(ROWS),
    "rows.json": json.dumps(ROWS),
    "data.json": json.dumps({"data": ROWS}, indent=1),
    "lines.json": lines(ROWS),
    "rows.csv": table(","),
    "bom.csv": "\ufeff" + table(","),
    "bom.jsonl": "\ufeff" + lines(ROWS),
    "bom.json": "\ufeff" + json.dumps(ROWS),
    "windows.csv": table(",").replace("\n", "\r\n"),
    "rows.tsv": table("\t"),
    "captions.txt": table(",", "image"),  # Flickr8k
    "ROWS.CSV": table(","),
    "spreadsheet.csv": '"image";"caption"\n"a.jpg";"one"\n"b.jpg";"two, ""quoted"" ü"\n',
    "open_clip.csv": table("\t", "filepath", "title"),
    "flickr30k.csv": 'image_name| comment_number| comment\na.jpg| 0| one\nb.jpg| 1| two, "quoted" ü\n',
    "comma.tsv": table(",", "image"),
    "blanks.csv": 'image | caption \na.jpg | one\nb.jpg | two, "quoted" ü\n',
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name, tmp_path):
    dataset = load(write(tmp_path / name, FORMATS[name])).dataset
    assert dataset["caption"][:] == TEXTS
    assert dataset["image_path"][:] == [str(tmp_path / row["image_path"]) for row in ROWS]
    assert dataset["row"][:] == [0, 1]


def kept(rows):
    return list(zip(rows.dataset["row"], rows.dataset["caption"], strict=True))


def test_only_an_empty_or_missing_cell_is_null_and_drops_its_row(tmp_path):
    # One line without a caption is in Flickr30k's list.
    path = write(tmp_path / "rows.csv", "image,caption\na.jpg,NA\nb.jpg,\nc.jpg\n,four\nd.jpg,null\n")
    rows = load(path)
    assert kept(rows) == [(0, "NA"), (4, "null")]
    assert reasons(rows) == [(1, "it has no caption"), (2, "it has no caption"), (3, "it has no image")]
    assert len(load(path, split="test").dataset) == 4, "predictions need no captions"


def test_a_row_of_json_has_as_many_captions_as_are_texts(tmp_path):
    longest = "b" * CAPTION_CHARACTERS
    captions = ["NA", "", longest, ["one", "two", None], None, [], 17, [18], {"x": 1}, "lone \ud800", longest + "b"]
    rows = load(write(tmp_path / "rows.jsonl", lines({"image": "a.jpg", "captions": value} for value in captions)))
    assert kept(rows) == [(0, "NA"), (1, ""), (2, longest), (3, "one"), (3, "two")]
    assert reasons(rows) == [
        *((row, "it has no caption") for row in (3, 4, 5)),
        *((row, f"its caption is {kind}, not text") for row, kind in ((6, "int"), (7, "int"), (8, "dict"))),
        (9, "its caption is not valid Unicode (surrogates not allowed)"),
        (10, "its caption has 16,385 characters; at most 16,384 are read"),
    ]


def test_relative_paths_begin_in_data_dir_then_beside_the_list_then_here(tmp_path, monkeypatch):
    """As LAVIS's lists, Flickr8k's and those of Windows have them; what is nowhere is expected in the first."""
    places = {
        "0.jpg": "Images/0.jpg",
        "val2014/1.jpg": "Images/val2014/1.jpg",
        "val2014\\1.jpg": "Images/val2014/1.jpg",
        "beside.jpg": "lists/beside.jpg",
        "here.jpg": "here/here.jpg",
        f"file://{tmp_path}/Images/0.jpg": "Images/0.jpg",
        str(tmp_path / "here/here.jpg"): "here/here.jpg",
    }
    for place in (*places.values(), "here/beside.jpg"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    monkeypatch.chdir(tmp_path / "here")
    places["absent.jpg"] = "Images/absent.jpg"
    write(tmp_path / "lists/rows.json", json.dumps([{"image": name, "caption": ["one"]} for name in places]))
    columns = {"image": list(places), "caption": ["one"] * len(places)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "lists/rows.parquet")
    for suffix in ("json", "parquet"):
        rows = load(f"../lists/rows.{suffix}", data_dir="../Images", cache_dir=str(tmp_path / "hf")).dataset
        assert [Path(path).resolve() for path in rows["image_path"]] == [tmp_path / place for place in places.values()]


def test_a_folder_of_images_with_texts_beside_them_is_read(tmp_path):
    folder = tmp_path / "set"
    for name in ("more", ".thumbnails"):
        (folder / name).mkdir(parents=True)
    texts = {"a.jpg": "one\n", "more/b.PNG": "two\n\n three \r\n", "c.v1.jpg": "four", "d.jpg": None}
    texts |= {"latin.jpg": b"caf\xe9", ".thumbnails/a.jpg": "small", ".hidden.jpg": "hidden"}
    for name, text in texts.items():
        (folder / name).touch()
        if text is not None:
            write((folder / name).with_suffix(".txt"), text)
    write(folder / "readme.txt", "about it")
    rows = load(str(folder), rows_dir=tmp_path / "rows")
    expected = [("a.jpg", "one"), ("c.v1.jpg", "four"), ("more/b.PNG", "two"), ("more/b.PNG", "three")]
    assert list(zip(rows.dataset["image_id"], rows.dataset["caption"], strict=True)) == expected
    assert rows.dataset["image_path"][:] == [str(folder / name) for name, _ in expected]
    said = ["it has no caption", "its caption is not valid Unicode", "it has no image"]
    assert [reason.split(" (")[0] for _, reason in reasons(rows)] == said
    write(folder / "a.txt", "changed")
    assert load(str(folder), rows_dir=tmp_path / "rows").dataset["caption"][0] == "changed"
    assert len(load(str(folder), split="test").dataset) == 5
    for text in folder.rglob("*.txt"):
        text.unlink()
    with pytest.raises(InputError, match="--train_file FOLDER"):
        load_splits(splits=["train"], dataset_name=str(folder), cache_dir=str(tmp_path / "hf"))


def test_columns_are_found_named_or_listed(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines([{"picture": "a.jpg", "words": "one", "text": "two"}]))
    assert load(path, image_column="picture").dataset["caption"][:] == ["two"]
    assert load(path, image_column="picture", caption_column="words").dataset["caption"][:] == ["one"]
    two = write(tmp_path / "two.jsonl", lines([{"image": "a", "caption": "b", "text": "c"}]))
    for file, options, words in (
        (path, {}, "--image_column; there are 'picture', 'words', 'text'"),
        (path, {"image_column": "picture", "caption_column": "wrods"}, r"'wrods'.*'picture', 'words', 'text'"),
        (two, {}, "Give --caption_column"),
    ):
        with pytest.raises(InputError, match=words):
            load(file, **options)
    no_captions = write(tmp_path / "images.jsonl", lines([{"image_path": "a.jpg"}]))
    assert load(no_captions, split="test").dataset["caption"][:] == [None]


def with_image(image):
    return lines([ROWS[0], {"image_path": image, "caption": "x"}])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.doc", "x", "cannot tell the format"),
        ("rows.csv", "image;caption\na.jpg;one; two\n", "line 2 has 3 fields, the header 2; .* separator ';'"),
        ("rows.csv", "image_path,caption\na.jpg,one, or two\n", "line 2 has 3 fields, the header 2; .* double quotes"),
        ("rows.csv", 'image_path,caption\na.jpg,"one\n', "cannot be read as csv"),
        ("rows.csv", b"image_path,caption\na.jpg,caf\xe9\n", r"csv: is not UTF-8 .*0xe9.*iconv -f latin1 .* rows\.csv"),
        ("rows.csv", "", "is empty"),
        ("rows.csv", "image_path,caption\n", "is empty"),
        ("rows.json", '[{"image": "a.jpg", "caption": NaN}]', "write null for NaN"),
        ("rows.json", '["text"]', "row 0 is str"),
        ("rows.json", json.dumps(ROWS)[:-9], "cannot be read as json"),
        ("rows.jsonl", "", "is empty"),
        ("rows.jsonl", "{not json}\n", "cannot be read as jsonl"),
        ("rows.jsonl", lines(ROWS) + "{half", "cannot be read as jsonl: line 3"),
        ("rows.jsonl", with_image(3), "row 1: the image column holds int; it must hold paths"),
        ("rows.jsonl", with_image("http://a.b/c.jpg"), "row 1 has its image at http://a.b/c.jpg; save the images"),
        ("rows.jsonl", with_image("https://a.b/c.jpg"), "row 1 has its image at https://a.b/c.jpg; save the images"),
        ("rows.parquet", "not one", r"rows\.parquet: cannot be read"),
        ("rows.tar", "not one", r"rows\.tar: cannot be read"),
    ],
)
def test_files_that_cannot_be_used_say_why_and_leave_nothing_behind(tmp_path, name, content, words):
    with pytest.raises(InputError, match=words):
        load(write(tmp_path / name, content), rows_dir=tmp_path / "kept", cache_dir=str(tmp_path / "hf"))
    assert all(path.suffix == ".lock" for path in tmp_path.glob("kept/*"))


def test_missing_sources_say_what_to_give(tmp_path):
    official = {"dataset_name": "ydshieh/coco_dataset_script"}
    for options, words in (
        *(({"train_file": str(tmp_path / f"absent.{end}")}, "no such file") for end in ("csv", "parquet", "tar")),
        ({}, "give --train_file, or --dataset_name"),
        (official, "--data_dir"),
        (
            {**official, "data_dir": "x", "dataset_config_name": "2015"},
            "2015: the built-in COCO reader knows 2017, 2014",
        ),
        ({"dataset_name": str(tmp_path / "absent")}, "cannot be loaded"),
    ):
        with pytest.raises(InputError, match=words):
            load_splits(splits=["train"], **options)


def test_a_local_data_set_folder_is_loaded_by_datasets(tmp_path):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", lines(ROWS))
    options = {"dataset_name": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")}
    rows = load_splits(splits=["train"], **options)["train"].dataset
    assert (rows["caption"][:], rows["image_path"][0]) == (TEXTS, str(tmp_path / "set" / "a.jpg"))
    with pytest.raises(InputError, match="has no split 'test', only 'train'"):
        load_splits(splits=["test"], **options)


def test_rows_are_read_once_and_again_when_their_file_changes(tmp_path, monkeypatch):
    path, real, read = tmp_path / "rows.jsonl", sources.read_records, []
    monkeypatch.setattr(sources, "read_records", lambda path: read.append(path) or real(path))
    for row in ROWS:  # where images are missing they are looked for each time
        (tmp_path / row["image_path"]).touch()

    def reads(captions=TEXTS, split="train", **options):
        rows = load(str(path), split=split, rows_dir=tmp_path / "kept", **options)
        assert rows.dataset["caption"][:] == captions
        assert reasons(rows) == [(2, "its caption is int, not text")]
        return len(read)

    broken = {"image_path": "c.jpg", "caption": 3}
    write(path, lines([*ROWS, broken]))
    assert [reads() for _ in range(2)] == [1, 1]
    # Each process of a run asks for its rows to be read again; the first one does it.
    assert [reads(rebuild=run) for run in ("a run", "a run", None, "another run")] == [2, 2, 2, 3]
    assert reads(split="validation") == 4
    write(path, lines([*ROWS, broken, *ROWS]))
    assert reads(TEXTS * 2) == 5
    monkeypatch.chdir(tmp_path)  # relative paths may mean other files here
    assert reads(TEXTS * 2) == 6


def test_images_that_are_moved_after_their_list_was_read_are_looked_for_again(tmp_path, monkeypatch):
    first = tmp_path / "first"
    first.mkdir()
    monkeypatch.chdir(first)
    path = write(tmp_path / "rows.jsonl", lines(ROWS))
    for row in ROWS:
        (first / row["image_path"]).touch()
    for place in (first, tmp_path):  # from the working directory to beside the list
        for row in ROWS:
            (first / row["image_path"]).rename(place / row["image_path"])
        for _ in range(2):
            names = load(path, rows_dir=tmp_path / "kept").dataset["image_path"][:]
            assert names == [str(place / row["image_path"]) for row in ROWS]


def picture(seed):
    buffer = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    PIL.Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def assert_shows(reference, seed):
    np.testing.assert_array_equal(read_image(reference), PIL.Image.open(io.BytesIO(picture(seed))))


CAPTIONS = ["one", "two", "three", "four"]
SEEDS = [1, 2, 1, 3]  # of each row's image: the third row shows the first one's


def write_shard(file, members):
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(file)


def as_parquet(folder):
    rows = {"image": [{"bytes": picture(seed), "path": f"{seed}.png"} for seed in SEEDS], "caption": CAPTIONS}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / "rows.parquet")
    return {"train_file": str(folder / "rows.parquet")}


def as_plain_parquet(folder):
    columns = pyarrow.table({"jpg": [picture(seed) for seed in SEEDS], "text": CAPTIONS})
    for number, part in enumerate((columns.slice(0, 3), columns.slice(3))):
        pyarrow.parquet.write_table(part, folder / f"part-{number}.parquet")
    return {"train_file": str(folder / "part-*.parquet")}


def as_mixed_shards(folder):
    """Images of several formats and endings, in upper case too, and in another order than their texts."""
    for shard, (one, other), endings in ((0, (0, 1), ("png", "JPG")), (1, (2, 3), ("jpeg", "webp"))):
        members = {f"{one}.{endings[0]}": picture(SEEDS[one]), f"{one}.TXT": CAPTIONS[one]}
        members |= {f"{other}.txt": CAPTIONS[other], f"{other}.{endings[1]}": picture(SEEDS[other])}
        write_shard(folder / f"{shard}.TAR", members)
    return {"train_file": str(folder / "{0..1}.TAR")}


def as_img2dataset(folder):
    """Captions in the json of each sample."""
    members = {}
    for row, seed in enumerate(SEEDS):
        about = json.dumps({"url": "x", "caption": CAPTIONS[row], "status": "success"})
        members |= {f"{row:04d}.png": picture(seed), f"{row:04d}.json": about}
    write_shard(folder / "00000.tar", members)
    return {"train_file": str(folder / "{00000..00000}.tar")}


def as_image_folder(folder):
    (folder / "train").mkdir()
    for row, seed in enumerate(SEEDS):
        write(folder / "train" / f"{row}.png", picture(seed))
    rows = [{"file_name": f"{row}.png", "text": caption} for row, caption in enumerate(CAPTIONS)]
    write(folder / "train" / "metadata.jsonl", lines(rows))
    return {"dataset_name": str(folder)}


def as_saved_data_set(folder):
    rows = {"image": [{"bytes": picture(seed), "path": None} for seed in SEEDS], "caption": [[c] for c in CAPTIONS]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features)).save_to_disk(folder)
    return {"dataset_name": str(folder)}


@pytest.mark.parametrize(
    "make",
    [as_parquet, as_plain_parquet, as_mixed_shards, as_img2dataset, as_image_folder, as_saved_data_set],
    ids=lambda make: make.__name__,
)
def test_every_source_gives_the_same_captions_and_pictures(make, tmp_path):
    (tmp_path / "set").mkdir()
    options = make(tmp_path / "set")
    for _ in range(2):  # the second time from what was kept
        rows = load_splits(splits=["train"], cache_dir=str(tmp_path / "hf"), rows_dir=tmp_path / "rows", **options)
        dataset = rows["train"].dataset
        assert dataset["caption"][:] == CAPTIONS
        for path, seed in zip(dataset["image_path"], SEEDS, strict=True):
            assert_shows(path, seed)
    if make is not as_image_folder:  # whose files are three and one copy
        assert len(set(dataset["image_path"])) == 3


def test_fields_of_a_samples_json_are_captions_by_name_and_never_images(tmp_path):
    path = as_img2dataset(tmp_path)["train_file"]
    assert load(path, caption_column="json.url").dataset["caption"][:] == ["x"] * 4
    for flag, name in (("caption_column", "json.title"), ("image_column", "json.url")):
        with pytest.raises(InputError, match=f"--{flag} '{name}'.*'__key__'"):
            load(path, **{flag: name})


def test_names_that_belong_to_several_samples_are_told_at_once(tmp_path):
    members = {f"photo.v{row}.{ending}": b"x" * 100 for row in range(3000) for ending in ("jpg", "txt")}
    path, started = write_shard(tmp_path / "a.tar", members), time.monotonic()
    with pytest.raises(InputError, match=r"one sample, 'photo', .* 'photo.v32.jpg'; .*'photo_v32.jpg'") as refused:
        load(path)
    assert time.monotonic() - started < 5
    assert len(str(refused.value)) < 500 + len(str(tmp_path))


def test_one_of_several_images_of_a_sample_is_taken_by_its_name(tmp_path):
    members = {"a.1.jpg": picture(0), "a.2.jpg": picture(1), "a.txt": "a", "b.1.jpg": picture(2), "b.txt": "b"}
    path = write_shard(tmp_path / "a.tar", members)
    with pytest.raises(InputError, match=r"which column holds the images\? .*'1.jpg', '2.jpg', 'txt'"):
        load(path)
    for column, kept, seed in (("1.jpg", ["a", "b"], 0), ("2.jpg", ["a"], 1)):
        rows = load(path, image_column=column).dataset
        assert rows["caption"][:] == kept
        assert_shows(rows["image_path"][0], seed)


def test_rows_of_a_shard_that_cannot_be_used_are_dropped_one_by_one(tmp_path):
    members = {"a.jpg": picture(0), "a.txt": "a", "b.jpg": picture(1), "c.txt": "no image", "d.png": picture(2)}
    members |= {"d.txt": b"\xff", "e.png": picture(3), "e.txt": "x" * (CAPTION_CHARACTERS + 1)}
    rows = load(write_shard(tmp_path / "a.tar", members))
    assert rows.dataset["caption"][:] == ["a"]
    assert rows.dataset["image_id"][:] == ["a.jpg"]
    expected = ["no caption", "no image", "not valid Unicode", "at most 16,384 are read"]
    assert all(words in reason for words, (_, reason) in zip(expected, reasons(rows), strict=True))


def test_a_shard_that_is_empty_cut_compressed_or_missing_is_named(tmp_path):
    whole = {f"{row}.{end}": "x" * 9999 for row in range(9) for end in ("jpg", "txt")}
    content = Path(write_shard(tmp_path / "0.tar", whole)).read_bytes()
    for damaged in (gzip.compress(content), *(content[: int(keep * len(content)) - 100] for keep in (0.4, 0.7))):
        with pytest.raises(InputError, match=r"1\.tar: cannot be read as tar: .*not compressed"):
            load(write(tmp_path / "1.tar", damaged))
    with pytest.raises(InputError, match=r"1\.tar: is empty"):
        load(write_shard(tmp_path / "1.tar", {}))
    with pytest.raises(InputError, match=r"2\.tar: there is no such file"):
        load(str(tmp_path / "{0..3}.tar"))


def test_a_real_shard_is_read(real_data):
    rows = load(str(real_data / "cc12m_sample.tar")).dataset
    assert len(rows) == 32
    assert "Red Square is a city square in Moscow, Russia." in rows["caption"][:]
    assert all(min(read_image(path).size) > 50 for path in rows["image_path"])
