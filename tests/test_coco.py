"""COCO's layout: the same rows from folders and from zips, and a remedy for what is missing."""

import itertools
import json
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import load_splits
from test_download import ZIPS, zip_of

from repro.data.image_cache import load_images
from repro.data.images import open_image
from repro.errors import InputError
from repro.pocket.halves import render_pocket


def read_coco(folder, split, year="2017", name="ydshieh/coco_dataset_script", **options):
    options |= {"dataset_name": name, "dataset_config_name": year, "data_dir": str(folder)}
    return load_splits(splits=[split], **options)[split]


def read_json(path, split="train", **options):
    return load_splits(splits=[split], **{f"{split}_file": str(path)}, **options)[split].dataset


def assert_shown(references):
    for reference in references:
        with open_image(reference) as image:
            assert image.size == (16, 16)


@pytest.fixture
def coco(tmp_path):
    folder = tmp_path / "coco"
    render_pocket(folder, num_train=4, num_val=2, num_test=2, image_size=16, seed=0)
    return folder


@pytest.fixture
def zipped(coco, tmp_path):
    (tmp_path / "zips").mkdir()
    for path, pattern in ZIPS.items():
        (tmp_path / "zips" / Path(path).name).write_bytes(zip_of(coco, pattern))
    return tmp_path / "zips"


def annotations(coco, part="val"):
    return coco / "annotations" / f"captions_{part}2017.json"


def change(coco, edit):
    """Edit the annotations of the validation images; gives their file."""
    content = json.loads(annotations(coco).read_text())
    edit(content)
    annotations(coco).write_text(json.dumps(content))
    return annotations(coco)


def decode(references, image_processor):
    references = list(dict.fromkeys(references))
    return load_images(references, image_processor, convert_to_rgb=False, cache_dir=None, progress=False)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_folders_and_zips_give_the_same_rows_and_pixels(coco, zipped, image_processor, split):
    tables = [read_coco(folder, split).dataset for folder in (coco, zipped)]
    stores = [decode(table["image_path"], image_processor) for table in tables]
    every = np.arange(len(set(tables[0]["image_path"])))
    np.testing.assert_array_equal(stores[0].images[every], stores[1].images[every])
    assert not stores[0].failures
    assert tables[0].remove_columns("image_path").to_list() == tables[1].remove_columns("image_path").to_list()
    if split == "test":
        assert tables[0]["caption"][:] == [None, None]


@pytest.mark.parametrize("year", ["2017", "2014"])
def test_rows_come_in_the_order_of_the_annotations(coco, year):
    shutil.rmtree(coco / "test2017")  # which is not asked for
    expected = json.loads(annotations(coco, "train").read_text())["annotations"]
    for path in [*coco.glob("*2017"), *coco.glob("annotations/*")]:
        path.rename(path.with_name(path.name.replace("2017", year)))
    rows = read_coco(coco, "train", year, name="ydshieh/dummy_coco_dataset").dataset
    for key in ("caption", "image_id"):
        assert rows[key][:] == [str(annotation[key]) for annotation in expected]
    assert rows["image_id"][:] != sorted(rows["image_id"][:])
    assert all(Path(path).is_file() for path in rows["image_path"])
    assert rows["row"][:] == list(range(20))


@pytest.mark.parametrize("official", [True, False])
def test_images_unpacked_in_part_beside_the_whole_zip_are_all_found(coco, zipped, official):
    some, *_, last = sorted((coco / "train2017").iterdir())
    (zipped / "train2017").mkdir()
    for path in (some, last):
        shutil.copy(path, zipped / "train2017")
    if not official:
        shutil.rmtree(coco / "train2017")

    def references():
        path, kept = annotations(coco, "train"), {"rows_dir": zipped / "rows", "data_dir": str(zipped)}
        return (read_coco(zipped, "train", **kept).dataset if official else read_json(path, **kept))["image_path"][:]

    found = set(references())
    unpacked = {name for name in found if not name.startswith("zip://")}
    assert unpacked == {str(zipped / "train2017" / path.name) for path in (some, last)}
    assert len(found) == 4
    assert_shown(found)
    with zipfile.ZipFile(zipped / "train2017.zip") as archive:  # the rest, too, and the zip is removed
        archive.extractall(zipped)
    (zipped / "train2017.zip").unlink()
    assert all(Path(name).is_file() for name in references())


def empty_folder(coco):
    shutil.rmtree(coco)
    coco.mkdir()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shutil.rmtree, "coco: is not a folder; .* zip files"),
        (empty_folder, "coco: is empty; .* zip files"),
        (lambda coco: annotations(coco).unlink(), r"captions_val2017\.json.* annotations_trainval2017\.zip; get"),
        (lambda coco: annotations(coco).write_text('{"images": ['), r"val2017\.json: cannot be read .* get it again"),
        (lambda coco: annotations(coco).write_text("[]"), r"captions_val2017\.json: is not a COCO file"),
        (lambda coco: shutil.rmtree(coco / "val2017"), r"images are not to be found, .*zips/val2017\.zip"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(coco, spoil, words):
    spoil(coco)
    with pytest.raises(InputError, match=words):
        read_coco(coco, "validation")


def test_annotations_of_no_or_two_images_are_dropped_and_repetitions_are_not(coco):
    def edit(content):
        first, second = content["images"]
        content["images"] += [first, {**second, "file_name": "other.jpg"}, {"id": 12345, "file_name": "nobody.jpg"}]
        rows = [row for row in content["annotations"] if row["image_id"] == first["id"]]
        rows[0]["image_id"], rows[1]["caption"], rows[2]["id"] = 999, None, rows[3]["id"]

    content = json.loads(change(coco, edit).read_text())
    first, second = content["images"][:2]
    rows = read_coco(coco, "validation")
    expected = [row["caption"] for row in content["annotations"] if row["image_id"] == first["id"] and row["caption"]]
    assert rows.dataset["caption"][:] == expected
    assert (len(expected), len(rows.dropped)) == (3, 7)
    assert {row["reason"] for row in rows.dropped} == {
        "image_id 999 is not among the images",
        "it has no caption",
        f"image_id {second['id']} is both {second['file_name']} and other.jpg",
    }


def karpathy(coco, *, filepath=True):
    """Annotations as one file in Karpathy's layout; of each part the first image is in `restval` or `test`."""
    images = []
    for part, first, others in (("train", "restval", "train"), ("val", "test", "val")):
        content = json.loads(annotations(coco, part).read_text())
        for number, image in enumerate(content["images"]):
            rows = [row for row in content["annotations"] if row["image_id"] == image["id"]]
            images.append(
                {"filename": image["file_name"], "split": others if number else first, "cocoid": image["id"]}
                | ({"filepath": f"{part}2017"} if filepath else {})
                | {"sentences": [{"raw": row["caption"], "sentid": row["id"]} for row in rows]}
            )
    path = coco / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_karpathys_splits_are_read_and_restval_is_for_training(coco, zipped, packed):
    path, options = karpathy(coco), {"data_dir": str(zipped)} if packed else {}
    if packed:
        for part in ("train2017", "val2017"):
            shutil.rmtree(coco / part)
    table = read_json(path, "train", **options)
    assert len(table) == 4 * 5
    assert len(read_json(path, "validation", **options)) == len(read_json(path, "test", **options)) == 5
    assert_shown(table["image_path"])
    assert set(table["image_id"][:5]) != set(table["image_id"][5:10])


def test_karpathys_file_of_another_data_set_has_its_images_where_data_dir_says(coco):
    path = karpathy(coco, filepath=False)
    table = read_json(path, "train", data_dir=str(coco / "train2017"))
    assert all(Path(name).is_file() for name in table["image_path"])
    with pytest.raises(InputError, match=r"dataset_coco\.json: its images are not to be found, .*--data_dir"):
        read_json(path)


@pytest.mark.parametrize("place", ["annotations", "images", "elsewhere", "zip", "without annotations"])
def test_any_coco_json_finds_its_images(coco, zipped, tmp_path, place):
    split, path, options = "validation", annotations(coco), {}
    if place == "without annotations":
        split, path = "test", coco / "annotations" / "image_info_test2017.json"
    captions = read_coco(coco, split).dataset["caption"][:]
    if place == "images":
        path = path.rename(coco / "val2017" / "mine.json")
    elif place in ("elsewhere", "zip"):
        path = path.rename(tmp_path / "captions_val2017.json")
        options["data_dir"] = str(zipped if place == "zip" else coco / "val2017")
    table = read_json(path, split, **options)
    assert table["caption"][:] == captions
    assert_shown(table["image_path"])


@pytest.mark.parametrize("style", ["absolute", "windows", "literal"])
def test_absolute_names_and_those_of_windows_are_found(coco, style):
    """Names join as `os.path.join` does it; one that has a backslash itself is taken as it is."""

    def edit(content):
        for image in content["images"]:
            place = coco / "val2017" / image["file_name"]
            image["file_name"] = str(place) if style == "absolute" else f"val2017\\{place.name}"
            if style == "literal":
                place.rename(coco / image["file_name"])

    table = read_json(change(coco, edit), "validation")
    assert len(table) == 10
    assert_shown(table["image_path"])


LACKING = r"cannot be read \(Object missing required field `{}`\)"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda content: content["annotations"][2].pop("image_id"), LACKING.format("image_id")),
        (lambda content: content["annotations"][2].pop("caption"), LACKING.format("caption")),
        (lambda content: content["annotations"][1].update(caption=float("nan")), '"caption": NaN.*write null for NaN'),
        (lambda content: content["annotations"].insert(0, None), "cannot be read"),
        (lambda content: content["annotations"].insert(0, {"image_id": {}, "caption": "a"}), "cannot be read"),
        (lambda content: content["images"].insert(0, {"id": [], "file_name": "a"}), "cannot be read"),
        (lambda content: content["images"].insert(0, {"id": 1, "file_name": 3}), "cannot be read"),
        (lambda content: content.update(images=[3]), "cannot be read"),
        (lambda content: content.update(images=3), "is not a COCO file"),
    ],
)
def test_annotations_of_another_form_are_refused_by_name(coco, edit, words):
    path = change(coco, edit)
    for read in (lambda: read_coco(coco, "validation"), lambda: read_json(path, "validation")):
        with pytest.raises(InputError, match=rf"{path.name}: .*{words}"):
            read()


def test_real_files_are_read(real_data):
    folder = real_data / "coco2017_mini"
    assert [len(read_coco(folder, split).dataset) for split in ("train", "validation")] == [400, 795]
    table = read_json(real_data / "captions_val2017_full.json", data_dir=str(folder / "val2017"))
    assert (len(table), len(set(table["image_id"]))) == (25_014, 5_000)


NUMBERS = ["9" * 5000, "-" + "9" * 200_000, "9" * 400, "1e400", "1" * 5000 + ".5e9999"]
PLACES = [
    '{"info": NUMBER, "images": [{"id": 1, "file_name": "1.jpg"}], "annotations": []}',
    '{"images": [{"id": NUMBER, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "a"}]}',
    '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": NUMBER, "caption": "a"}]}',
    '{"images": [{"id": NUMBER, "file_name": "1.jpg"}]}',
    '{"images": [{"cocoid": NUMBER, "split": "train", "filename": "1.jpg", "sentences": [{"raw": "a"}]}]}',
    '[{"image": "1.jpg", "caption": NUMBER}]',
    '{"data": [{"image": "1.jpg", "caption": "a", "more": NUMBER}]}',
    '{"image": "1.jpg", "caption": NUMBER}',
]
READ_EACH = """
import sys
from pathlib import Path
from repro.data.sources import load_splits
from repro.errors import InputError
for path in sys.argv[1:]:
    try:
        load_splits(splits=["train"], train_file=path, rows_dir=Path(f"{path}.rows"))
        print(path)
    except InputError as error:
        print(error)
"""


def test_a_number_of_any_length_is_refused_by_name_and_ends_no_interpreter(tmp_path):
    (tmp_path / "1.jpg").touch()
    files = []
    for place, number in itertools.product(PLACES, NUMBERS):
        files.append(tmp_path / f"{len(files)}.json")
        files[-1].write_text(place.replace("NUMBER", number))
    done = subprocess.run([sys.executable, "-c", READ_EACH, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    said = [line for line in done.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert [line.partition(".json")[0] for line in said] == [str(file.with_suffix("")) for file in files]


def pack(archive, coco, paths):
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for path in paths:
            opened.write(path, path.relative_to(coco))
    return archive.read_bytes()


def test_a_zip_member_that_does_not_unpack_drops_its_rows(coco, image_processor):
    archive = coco / "val2017.zip"
    content = bytearray(pack(archive, coco, sorted((coco / "val2017").iterdir())))
    with zipfile.ZipFile(archive) as opened:
        member = opened.infolist()[0]
    start = member.header_offset + 30 + len(member.filename)
    content[start : start + member.compress_size] = b"\xff" * member.compress_size
    archive.write_bytes(content)
    shutil.rmtree(coco / "val2017")
    store = decode(read_coco(coco, "validation").dataset["image_path"], image_processor)
    assert [name.partition("::")[0] for name in store.failures] == [f"zip://{member.filename}"]


def test_an_annotation_zip_that_is_damaged_is_named(coco, zipped):
    archive = zipped / "annotations_trainval2017.zip"
    whole = pack(archive, coco, [annotations(coco)])
    for place in range(80, len(whole), len(whole) // 40):
        archive.write_bytes(whole[:place] + b"\xff" * 12 + whole[place + 12 :])
        with suppress(InputError):
            assert len(read_coco(zipped, "validation").dataset) == 10
            continue
        with pytest.raises(InputError, match=archive.name):
            read_coco(zipped, "validation")
