"""Pixels equal the reference's bit for bit; what it refuses is refused; each image is decoded once."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ViTImageProcessor

from repro.data import images as module
from repro.data.images import ImageError, decode_image, load_images, pixel_table, resize_of
from repro.errors import InputError

MODES = ("RGB", "L", "LA", "P", "RGBA", "CMYK", "I;16", "1", "YCbCr")
LOSSLESS = {"PNG", "BMP", "TIFF"}


def random_image(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    return Image.fromarray(values[..., 0].astype(np.uint16)) if mode == "I;16" else image.convert(mode)


def encode(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def ours(path: Path, processor: ViTImageProcessor, *, convert_to_rgb: bool = False) -> np.ndarray:
    decoded = decode_image(str(path), resize_of(processor), convert_to_rgb=convert_to_rgb)
    assert decoded.dtype == np.uint8
    table = pixel_table(processor)
    return np.moveaxis(table[decoded, np.arange(3)], -1, 0)


def reference(image: Image.Image, processor: ViTImageProcessor, **options: str) -> np.ndarray:
    return processor(images=image, return_tensors="np", **options).pixel_values[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(1, 300), st.sampled_from(["PNG", "JPEG", "BMP", "WEBP"])
)
def test_pixels_equal_the_processors_bit_for_bit_for_any_rgb_image(
    folder: Path, image_processor: ViTImageProcessor, seed: int, width: int, height: int, name: str
) -> None:
    path = folder / f"any.{name}"
    path.write_bytes(encode(random_image(seed, width, height), name))
    # Told where the channels are: left to guess, the processor takes a height of 1 or 3 for them.
    expected = reference(Image.open(path), image_processor, input_data_format="channels_last")
    np.testing.assert_array_equal(ours(path, image_processor, convert_to_rgb=True), expected)


@pytest.mark.parametrize("size", [224, 48])
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_the_processors_settings_are_followed(folder: Path, size: int, resample: int) -> None:
    processor = ViTImageProcessor(
        size={"height": size, "width": size}, resample=resample, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )
    path = folder / "settings.png"
    random_image(5, 70, 90).save(path)
    np.testing.assert_array_equal(ours(path, processor), reference(Image.open(path), processor))


@pytest.mark.parametrize("mode", MODES)
def test_other_modes_are_refused_where_the_processor_refuses_them_and_converted_otherwise(
    folder: Path, image_processor: ViTImageProcessor, mode: str
) -> None:
    path = folder / f"mode-{mode.replace(';', '')}.tiff"
    random_image(1, 30, 20, mode).save(path)
    opened = Image.open(path)
    opened.load()
    assert opened.mode == mode
    try:
        expected = reference(opened, image_processor)
    except ValueError:
        with pytest.raises(ImageError, match="--protocol exact"):
            ours(path, image_processor)
    else:
        np.testing.assert_array_equal(ours(path, image_processor), expected)
        assert mode in ("RGB", "YCbCr")
    converted = reference(opened.convert("RGB"), image_processor)
    np.testing.assert_array_equal(ours(path, image_processor, convert_to_rgb=True), converted)


def test_an_image_one_pixel_high_is_refused_as_by_the_processor(folder: Path, image_processor) -> None:
    path = folder / "flat.png"
    random_image(2, 30, 1).save(path)
    if transformers.__version__.startswith("4."):  # later ones do not guess which axis has the channels
        with pytest.raises(ValueError, match="mean must have 1 elements"):
            reference(Image.open(path), image_processor)
    with pytest.raises(ImageError, match="one pixel high"):
        ours(path, image_processor)


def test_exif_orientation_is_ignored(folder: Path, image_processor: ViTImageProcessor) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter
    path = folder / "turned.png"
    random_image(3, 40, 20).save(path, exif=exif)
    plain = folder / "plain.png"
    random_image(3, 40, 20).save(plain)
    np.testing.assert_array_equal(ours(path, image_processor), ours(plain, image_processor))


def test_unreadable_files_give_their_reason(folder: Path, image_processor: ViTImageProcessor) -> None:
    (folder / "truncated.jpg").write_bytes(encode(random_image(4, 90, 90), "JPEG")[:600])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    (folder / "folder.jpg").mkdir()
    for name in ("truncated.jpg", "empty.jpg", "text.jpg", "folder.jpg", "absent.jpg", "nul\0.jpg"):
        with pytest.raises(ImageError, match=r"\w+"):
            ours(folder / name, image_processor, convert_to_rgb=True)


def test_a_processor_without_one_size_is_refused() -> None:
    for processor in (ViTImageProcessor(do_resize=False), ViTImageProcessor(size={"height": 4, "width": 4})):
        processor.size = processor.size if not processor.do_resize else {"shortest_edge": 4}
        with pytest.raises(InputError, match=r"preprocessor_config\.json"):
            resize_of(processor)


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    paths = []
    for number in range(module.CHUNK + 6):  # enough for two workers
        path = tmp_path / f"{number}.png"
        random_image(number, 12, 9).save(path)
        paths.append(str(path))
    Path(paths[3]).write_text("broken")
    return paths


def load(paths: list[str], processor: ViTImageProcessor, cache_dir: Path | None, **options):
    options = {"convert_to_rgb": True, "num_workers": None, "progress": False, **options}
    return load_images(paths, processor, cache_dir=cache_dir, **options)


def test_cached_and_parallel_images_are_the_same_bytes(pictures, image_processor, tmp_path: Path) -> None:
    stores = [
        load(pictures, image_processor, None),
        load(pictures, image_processor, tmp_path / "one"),
        load(pictures, image_processor, tmp_path / "two", num_workers=2),
        load([*pictures, *pictures], image_processor, tmp_path / "one"),
    ]
    for store in stores:
        np.testing.assert_array_equal(store.pixels, stores[0].pixels)
        assert store.index == stores[0].index
        assert list(store.failures) == [pictures[3]]
    assert len(stores[0].pixels) == len(pictures)


def test_a_cache_is_reused_until_something_changes(pictures, image_processor, tmp_path: Path, monkeypatch) -> None:
    cache, decoded = tmp_path / "cache", []
    real = module.decode_image
    monkeypatch.setattr(module, "decode_image", lambda *a, **k: decoded.append(a) or real(*a, **k))

    def count(**options) -> int:
        decoded.clear()
        load(pictures, image_processor, cache, **options)
        return len(decoded)

    assert count() == len(pictures)
    assert count() == 0
    assert count(overwrite_cache=True) == len(pictures)
    assert count(convert_to_rgb=False) == len(pictures)
    random_image(99, 13, 9).save(pictures[0])
    assert count() == len(pictures)
    assert count() == 0


def test_an_interrupted_build_is_not_taken_for_a_whole_one(pictures, image_processor, tmp_path, monkeypatch) -> None:
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:

        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(module, "decode_image", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(pictures, image_processor, cache)
    assert list(cache.iterdir()) == []
    assert load(pictures, image_processor, cache).pixels.any()


def test_a_cache_that_cannot_be_written_is_named(pictures, image_processor, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--cache_dir"):
        load(pictures, image_processor, tmp_path / "file")


def test_images_are_read_from_zip_files(pictures, image_processor, tmp_path: Path) -> None:
    archive = tmp_path / "some.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.write(pictures[0], "inner/0.png")
    names = [f"zip://inner/0.png::{archive}", f"zip://inner/1.png::{archive}"]
    store = load(names, image_processor, tmp_path / "cache")
    np.testing.assert_array_equal(store.pixels[0], load(pictures[:1], image_processor, None).pixels[0])
    assert list(store.failures) == names[1:]


def test_real_photographs_give_the_references_pixels(real_data: Path, image_processor: ViTImageProcessor) -> None:
    paths = sorted((real_data / "coco2017_mini" / "val2017").glob("*.jpg"))
    store = load([str(path) for path in paths], image_processor, None, convert_to_rgb=False)
    assert len(store.failures) == 1  # one grayscale photograph
    table = pixel_table(image_processor)
    for path in paths[:40]:
        if str(path) in store.index:
            pixels = np.moveaxis(table[store.pixels[store.index[str(path)]], np.arange(3)], -1, 0)
            np.testing.assert_array_equal(pixels, reference(Image.open(path), image_processor))
