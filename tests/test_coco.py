"""COCO's layout: the same rows from folders and from zips, and a remedy for what is missing."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest

from repro.data.coco import read_coco
from repro.data.images import load_images
from repro.data.pocket import render_pocket
from repro.data.sources import load_splits
from repro.errors import InputError

ZIPS = {
    "train2017.zip": "train2017/*",
    "val2017.zip": "val2017/*",
    "test2017.zip": "test2017/*",
    "annotations_trainval2017.zip": "annotations/captions_*",
    "image_info_test2017.zip": "annotations/image_info_*",
}


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
                table["image_path"],
                image_processor,
                convert_to_rgb=False,
                cache_dir=None,
                num_workers=None,
                progress=False,
            )
            for table in tables
        ]
        assert (stores[0].pixels == stores[1].pixels).all()
        assert not stores[0].failures
        assert tables[0].remove_columns("image_path").to_list() == tables[1].remove_columns("image_path").to_list()


def test_rows_come_in_the_order_of_the_annotations(coco: Path) -> None:
    rows = read_coco(coco, splits=["train"])["train"].dataset
    annotations = json.loads((coco / "annotations" / "captions_train2017.json").read_text())["annotations"]
    assert rows["caption_id"][:] == [annotation["id"] for annotation in annotations]
    assert rows["image_id"][:] != sorted(rows["image_id"][:])
    assert all(Path(path).is_file() for path in rows["image_path"])
    assert rows["row"][:] == list(range(20))


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
