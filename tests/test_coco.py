"""COCO's layout: the same rows from folders and from zips, and a remedy for what is missing."""

from __future__ import annotations

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
from PIL import Image

from repro.data.image_cache import load_images
from repro.data.images import open_image
from repro.errors import InputError
from repro.pocket.halves import render_pocket

ZIPS = {
    "train2017.zip": "train2017/*",
    "val2017.zip": "val2017/*",
    "test2017.zip": "test2017/*",
    "annotations_trainval2017.zip": "annotations/captions_*",
    "image_info_test2017.zip": "annotations/image_info_*",
}


def read_image(reference: str) -> Image.Image:
    with open_image(reference) as image:
        return image


def read_coco(folder: Path, splits=("train", "validation", "test"), year: str = "2017", **options):
    name = "ydshieh/coco_dataset_script"
    return load_splits(splits=splits, dataset_name=name, dataset_config_name=year, data_dir=str(folder), **options)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    folder = tmp_path / "coco"
    render_pocket(folder, num_train=4, num_val=2, num_test=2, image_size=16, seed=0)
    return folder


@pytest.fixture
def zipped(coco: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "zips"
    folder.mkdir()
    for name, pattern in ZIPS.items():
        with zipfile.ZipFile(folder / name, "w") as archive:
            for path in sorted(coco.glob(pattern)):
                archive.write(path, path.relative_to(coco))
    return folder


def test_folders_and_zips_give_the_same_rows_and_pixels(coco: Path, zipped: Path, image_processor) -> None:
    unpacked, packed = read_coco(coco), read_coco(zipped)
    assert set(unpacked) == {"train", "validation", "test"}
    for split in unpacked:
        tables = [rows[split].dataset for rows in (unpacked, packed)]
        stores = [
            load_images(
                list(dict.fromkeys(table["image_path"])),
                image_processor,
                convert_to_rgb=False,
                cache_dir=None,
                progress=False,
            )
            for table in tables
        ]
        every = np.arange(len(set(tables[0]["image_path"])))
        np.testing.assert_array_equal(stores[0].images[every], stores[1].images[every])
        assert not stores[0].failures
        assert tables[0].remove_columns("image_path").to_list() == tables[1].remove_columns("image_path").to_list()


def test_rows_come_in_the_order_of_the_annotations(coco: Path) -> None:
    rows = read_coco(coco, splits=["train"])["train"].dataset
    annotations = json.loads((coco / "annotations" / "captions_train2017.json").read_text())["annotations"]
    for name, key in (("caption", "caption"), ("image_id", "image_id")):
        assert rows[name][:] == [str(annotation[key]) for annotation in annotations]
    assert rows["image_id"][:] != sorted(rows["image_id"][:])
    assert all(Path(path).is_file() for path in rows["image_path"])
    assert rows["row"][:] == list(range(20))


@pytest.mark.parametrize("official", [True, False])
def test_images_unpacked_in_part_beside_the_whole_zip_are_all_found(coco: Path, zipped: Path, official: bool) -> None:
    some, *_, last = sorted((coco / "train2017").iterdir())
    (zipped / "train2017").mkdir()
    for path in (some, last):
        shutil.copy(path, zipped / "train2017")

    def references() -> list[str]:
        if official:
            return read_coco(zipped, splits=["train"], rows_dir=zipped / "rows")["train"].dataset["image_path"][:]
        path = coco / "annotations" / "captions_train2017.json"
        return read_json(path, data_dir=str(zipped), rows_dir=zipped / "rows")["image_path"][:]

    if not official:
        shutil.rmtree(coco / "train2017")
    found = references()
    assert {name for name in found if not name.startswith("zip://")} == {
        str(zipped / "train2017" / path.name) for path in (some, last)
    }
    assert len(set(found)) == 4
    assert all(read_image(name).size == (16, 16) for name in found)
    with zipfile.ZipFile(zipped / "train2017.zip") as archive:  # the rest, too, and the zip is removed
        archive.extractall(zipped)
    (zipped / "train2017.zip").unlink()
    assert all(Path(name).is_file() for name in references())


def test_the_test_split_has_images_and_no_captions(coco: Path) -> None:
    rows = read_coco(coco, splits=["test"])["test"].dataset
    assert rows["caption"][:] == [None, None]


def test_both_documented_names_mean_the_built_in_reader(coco: Path) -> None:
    for name in ("ydshieh/dummy_coco_dataset", "ydshieh/coco_dataset_script"):
        rows = load_splits(splits=["validation"], dataset_name=name, dataset_config_name="2017", data_dir=str(coco))
        assert len(rows["validation"].dataset) == 10


def test_only_the_asked_for_splits_are_needed(coco: Path) -> None:
    shutil.rmtree(coco / "test2017")
    assert set(read_coco(coco, splits=["train", "validation"])) == {"train", "validation"}


def remove_folder(coco: Path) -> None:
    shutil.rmtree(coco)


def empty_folder(coco: Path) -> None:
    shutil.rmtree(coco)
    coco.mkdir()


def remove_annotations(coco: Path) -> None:
    (coco / "annotations" / "captions_val2017.json").unlink()


def break_annotations(coco: Path) -> None:
    (coco / "annotations" / "captions_val2017.json").write_text('{"images": [')


def other_annotations(coco: Path) -> None:
    (coco / "annotations" / "captions_val2017.json").write_text("[]")


def remove_images(coco: Path) -> None:
    shutil.rmtree(coco / "val2017")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (remove_folder, ("coco", "not a folder", "zip")),
        (empty_folder, ("coco", "empty", "zip")),
        (remove_annotations, ("captions_val2017.json", "annotations_trainval2017.zip")),
        (break_annotations, ("captions_val2017.json", "cannot be read", "again")),
        (other_annotations, ("captions_val2017.json", "not a COCO file")),
        (remove_images, ("val2017", "val2017.zip")),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(coco: Path, spoil, words: tuple[str, ...]) -> None:
    spoil(coco)
    with pytest.raises(InputError) as caught:
        read_coco(coco, splits=["validation"])
    for word in words:
        assert word in str(caught.value)


def test_an_annotation_without_its_image_is_dropped_and_listed(coco: Path) -> None:
    path = coco / "annotations" / "captions_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][3]["image_id"] = 999
    path.write_text(json.dumps(content))
    rows = read_coco(coco, splits=["validation"])["validation"]
    assert len(rows.dataset) == 9
    assert [(row["row"], "999" in row["reason"]) for row in rows.dropped] == [(3, True)]


def test_the_real_subset_is_read(real_data: Path) -> None:
    rows = read_coco(real_data / "coco2017_mini", splits=["train", "validation"])
    assert (len(rows["train"].dataset), len(rows["validation"].dataset)) == (400, 795)


def test_2014_has_the_same_layout(coco: Path) -> None:
    for path in [*coco.glob("*2017"), *coco.glob("annotations/*")]:
        path.rename(path.with_name(path.name.replace("2017", "2014")))
    rows = read_coco(coco, year="2014")
    assert len(rows["train"].dataset) == 20
    assert Path(rows["train"].dataset["image_path"][0]).is_file()


def karpathy(coco: Path, *, filepath: bool) -> Path:
    """The validation and training annotations as one file in Karpathy's layout."""
    images = []
    for part, split in (("train", "train"), ("train", "restval"), ("val", "val"), ("val", "test")):
        content = json.loads((coco / "annotations" / f"captions_{part}2017.json").read_text())
        chosen = content["images"][:1] if split in ("restval", "test") else content["images"][1:]
        for image in chosen:
            sentences = [row for row in content["annotations"] if row["image_id"] == image["id"]]
            images.append(
                {"filename": image["file_name"], "split": split, "cocoid": image["id"]}
                | ({"filepath": f"{part}2017"} if filepath else {})
                | {"sentences": [{"raw": row["caption"], "sentid": row["id"]} for row in sentences]}
            )
    path = coco / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def read_json(path: Path, split: str = "train", **options):
    return load_splits(splits=[split], **{f"{split}_file": str(path)}, **options)[split].dataset


@pytest.mark.parametrize("packed", [False, True])
def test_karpathys_splits_are_read_and_restval_is_for_training(coco: Path, zipped: Path, packed: bool) -> None:
    path = karpathy(coco, filepath=True)
    options = {"data_dir": str(zipped)} if packed else {}
    if packed:
        for part in ("train2017", "val2017"):
            shutil.rmtree(coco / part)
    assert len(read_json(path, "train", **options)) == 4 * 5
    assert len(read_json(path, "validation", **options)) == len(read_json(path, "test", **options)) == 5
    table = read_json(path, "train", **options)
    assert all(read_image(name).size == (16, 16) for name in table["image_path"])
    assert set(table["image_id"][:5]) != set(table["image_id"][5:10])


def test_karpathys_file_of_another_data_set_has_its_images_where_data_dir_says(coco: Path) -> None:
    path = karpathy(coco, filepath=False)
    shutil.copytree(coco / "val2017", coco / "train2017", dirs_exist_ok=True)
    table = read_json(path, "train", data_dir=str(coco / "train2017"))
    assert all(Path(name).is_file() for name in table["image_path"])
    with pytest.raises(InputError, match=r"dataset_coco\.json: its images are not to be found, .*--data_dir"):
        read_json(path)


@pytest.mark.parametrize("place", ["annotations", "images", "elsewhere", "zip"])
def test_any_coco_json_finds_its_images(coco: Path, zipped: Path, tmp_path: Path, place: str) -> None:
    path, options = coco / "annotations" / "captions_val2017.json", {}
    if place == "images":
        path = path.rename(coco / "val2017" / "mine.json")
    elif place in ("elsewhere", "zip"):
        path = path.rename(tmp_path / "captions_val2017.json")
        options["data_dir"] = str(zipped if place == "zip" else coco / "val2017")
    table = read_json(path, "validation", **options)
    assert len(table) == 10
    assert all(read_image(name).size == (16, 16) for name in table["image_path"])
    named = read_coco(coco if place == "annotations" else zipped, splits=["validation"])["validation"].dataset
    assert table["caption"][:] == named["caption"][:]


@pytest.mark.parametrize("style", ["absolute", "windows", "literal"])
def test_absolute_names_and_those_of_windows_are_found(coco: Path, style: str) -> None:
    """Names join as `os.path.join` does it; one that has a backslash itself is taken as it is."""

    def edit(content: dict) -> None:
        for image in content["images"]:
            place = coco / "val2017" / image["file_name"]
            image["file_name"] = str(place) if style == "absolute" else f"val2017\\{place.name}"
            if style == "literal":
                place.rename(coco / image["file_name"])

    table = read_json(change(coco, edit), "validation")
    assert len(table) == 10
    assert all(read_image(name).size == (16, 16) for name in table["image_path"])


def test_a_number_that_is_none_is_shown_with_what_to_write(coco: Path) -> None:
    path = change(coco, lambda content: content["annotations"][1].update(caption=float("nan")))
    with pytest.raises(InputError, match=rf'{path.name}: .*"caption": NaN.*write null for NaN'):
        read_json(path, "validation")


def test_a_coco_json_without_annotations_serves_prediction(coco: Path) -> None:
    table = read_json(coco / "annotations" / "image_info_test2017.json", "test")
    assert table["caption"][:] == [None, None]
    assert all(Path(name).is_file() for name in table["image_path"])


def change(coco: Path, edit) -> Path:
    path = coco / "annotations" / "captions_val2017.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def test_an_id_of_two_images_drops_their_rows_and_one_named_twice_does_not(coco: Path) -> None:
    def edit(content: dict) -> None:
        first, second = content["images"]
        content["images"] += [dict(first), {**second, "file_name": "other.jpg"}]

    path = change(coco, edit)
    content = json.loads(path.read_text())
    rows = read_coco(coco, splits=["validation"])["validation"]
    second = content["images"][1]
    assert set(rows.dataset["image_id"]) == {str(content["images"][0]["id"])}
    assert {row["reason"] for row in rows.dropped} == {
        f"image_id {second['id']} is both {second['file_name']} and other.jpg"
    }


def test_duplicate_annotations_and_images_without_one_change_nothing(coco: Path) -> None:
    def edit(content: dict) -> None:
        content["annotations"][1]["id"] = content["annotations"][0]["id"]
        content["images"].append({"id": 12345, "file_name": "nobody.jpg"})

    change(coco, edit)
    rows = read_coco(coco, splits=["validation"])["validation"]
    assert (len(rows.dataset), rows.dropped) == (10, [])


@pytest.mark.parametrize("key", ["image_id", "caption"])
def test_an_annotation_that_lacks_a_key_is_named(coco: Path, key: str) -> None:
    path = change(coco, lambda content: content["annotations"][2].pop(key))
    with pytest.raises(InputError, match=rf"{path.name}: cannot be read \(Object missing required field `{key}`\)"):
        read_coco(coco, splits=["validation"])


def test_the_whole_of_val2017_is_read(real_data: Path, tmp_path: Path) -> None:
    table = read_json(real_data / "captions_val2017_full.json", data_dir=str(real_data / "coco2017_mini" / "val2017"))
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


def test_a_number_of_any_length_is_refused_by_name_and_ends_no_interpreter(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").touch()
    files = []
    for place, number in itertools.product(PLACES, NUMBERS):
        files.append(tmp_path / f"{len(files)}.json")
        files[-1].write_text(place.replace("NUMBER", number))
    code = (
        "import sys\nfrom pathlib import Path\nfrom repro.data.sources import load_splits\n"
        "from repro.errors import InputError\n"
        "for path in sys.argv[1:]:\n"
        "    rows = dict(splits=['train'], train_file=path, rows_dir=Path(f'{path}.rows'))\n"
        "    try: print(path, len(load_splits(**rows)['train'].dataset))\n"
        "    except InputError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    said = [line for line in done.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert [line.partition(".json")[0] for line in said] == [str(file.with_suffix("")) for file in files]


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content.update(images=3),
        lambda content: content.update(images=[3]),
        lambda content: content["images"].insert(0, {"id": [], "file_name": "a"}),
        lambda content: content["images"].insert(0, {"id": 1, "file_name": 3}),
        lambda content: content["annotations"].insert(0, None),
        lambda content: content["annotations"].insert(0, {"image_id": {}, "caption": "a"}),
    ],
)
def test_annotations_of_another_form_are_refused_by_name(coco: Path, edit) -> None:
    path = change(coco, edit)
    for read in (lambda: read_coco(coco, splits=["validation"]), lambda: read_json(path, "validation")):
        with pytest.raises(InputError, match=path.name):
            read()


def test_a_zip_member_that_does_not_unpack_drops_its_rows(coco: Path, image_processor) -> None:
    archive = coco / "val2017.zip"
    paths = sorted((coco / "val2017").iterdir())
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for path in paths:
            opened.write(path, path.relative_to(coco))
    with zipfile.ZipFile(archive) as opened:
        member = opened.infolist()[0]
    content = bytearray(archive.read_bytes())
    start, end = (member.header_offset + 30 + len(member.filename) + skip for skip in (0, member.compress_size))
    content[start:end] = b"\xff" * (end - start)
    archive.write_bytes(content)
    shutil.rmtree(coco / "val2017")
    rows = read_coco(coco, splits=["validation"])["validation"]
    references = list(dict.fromkeys(rows.dataset["image_path"]))
    store = load_images(references, image_processor, convert_to_rgb=True, cache_dir=None, progress=False)
    assert [name.partition("::")[0] for name in store.failures] == [f"zip://{member.filename}"]


def test_an_annotation_zip_that_is_damaged_is_named(coco: Path, zipped: Path) -> None:
    archive = zipped / "annotations_trainval2017.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.write(coco / "annotations" / "captions_val2017.json", "annotations/captions_val2017.json")
    whole = archive.read_bytes()
    for place in range(80, len(whole), len(whole) // 40):
        archive.write_bytes(whole[:place] + b"\xff" * 12 + whole[place + 12 :])
        with suppress(InputError):
            assert len(read_coco(zipped, splits=["validation"])["validation"].dataset) == 10
            continue
        with pytest.raises(InputError, match=archive.name):
            read_coco(zipped, splits=["validation"])
