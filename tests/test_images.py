"""Pixels equal the reference's bit for bit, and what it refuses is refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ViTImageProcessor

from repro.data.images import ImageError, Resize, decode_image, open_image, pixel_table, resize_image, resize_of
from repro.errors import InputError

MODES = ("RGB", "L", "LA", "P", "RGBA", "CMYK", "I;16", "1", "YCbCr")


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


def read(path: Path) -> Image.Image:
    """Decode a file as Pillow does, and close it."""
    with Image.open(path) as image:
        image.load()
    return image


def reference(image: Image.Image, processor: ViTImageProcessor, **options: str) -> np.ndarray:
    return processor(images=image, return_tensors="np", **options).pixel_values[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


FORMATS = {
    "JPEG": {},
    "JPEG progressive": {"progressive": True},
    "JPEG gray": {},
    "PNG": {},
    "WEBP": {},
    "GIF": {},
    "TIFF": {},
    "BMP": {},
}
MODES_OF = {"JPEG": ("RGB", "CMYK"), "JPEG progressive": ("RGB",), "JPEG gray": ("L",), "BMP": ("RGB", "L", "P", "1")}
WIDER_MODES = {"PNG": ("RGB", "L", "LA", "P", "RGBA", "I;16", "1"), "TIFF": MODES, "WEBP": ("RGB", "RGBA")}
MODES_OF |= WIDER_MODES | {"GIF": ("P", "L")}


@st.composite
def encoded_images(draw: st.DrawFn) -> tuple[bytes, str]:
    """Any format, mode and size of 1 to 2000 pixels, extreme aspect ratios included, of which the area is bounded."""
    name = draw(st.sampled_from(sorted(FORMATS)))
    mode = draw(st.sampled_from(MODES_OF[name]))
    long = draw(st.one_of(st.integers(1, 60), st.integers(1, 2000)))
    short = draw(st.integers(1, max(1, min(long, 90_000 // long))))
    width, height = draw(st.permutations([long, short]))
    image = random_image(draw(st.integers(0, 2**32 - 1)), width, height, mode)
    return encode(image, name.split()[0], **FORMATS[name]), f"{name} {mode}"


@settings(max_examples=150)
@given(encoded_images(), st.sampled_from([Image.Resampling.BILINEAR, Image.Resampling.BICUBIC]))
def test_pixels_equal_the_processors_bit_for_bit_and_what_it_refuses_is_refused(
    folder: Path, image: tuple[bytes, str], resample: int
) -> None:
    path = folder / "any"
    path.write_bytes(image[0])
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, resample=resample)
    opened = read(path)
    # Told where the channels are: left to guess, the processor takes a height of 1 or 3 for them.
    told = {"input_data_format": "channels_last"}
    kept = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8)) if opened.mode == "I;16" else opened
    expected = reference(kept.convert("RGB"), processor, **told)
    np.testing.assert_array_equal(ours(path, processor, convert_to_rgb=True), expected)
    try:
        expected = reference(opened, processor, **(told if opened.height == 3 else {}))
    except (ValueError, IndexError):
        with pytest.raises(ImageError, match="--protocol exact"):
            ours(path, processor)
    else:
        if opened.height > 1 or transformers.__version__.startswith("4."):
            np.testing.assert_array_equal(ours(path, processor), expected)


FILTERS = st.sampled_from(list(Image.Resampling))


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 40), FILTERS)
def test_an_image_of_the_right_size_is_left_as_it_is(seed: int, width: int, height: int, resample: int) -> None:
    image = random_image(seed, width, height)
    resized = resize_image(image, Resize(height, width, resample), convert_to_rgb=False)
    np.testing.assert_array_equal(resized, np.asarray(image))


@given(st.tuples(*[st.integers(0, 255)] * 3), st.integers(2, 300), st.integers(2, 300), FILTERS)
def test_one_colour_stays_itself_at_any_size(colour: tuple[int, int, int], width: int, height: int, resample) -> None:
    resized = resize_image(Image.new("RGB", (width, height), colour), Resize(17, 32, resample), convert_to_rgb=True)
    assert resized.shape == (17, 32, 3)
    assert (resized == colour).all()


@given(st.lists(st.floats(0.05, 0.95), min_size=6, max_size=6))
def test_the_table_rescales_and_normalizes_every_value(settings: list[float]) -> None:
    mean, std = np.array(settings[:3]), np.array(settings[3:])
    processor = ViTImageProcessor(image_mean=mean.tolist(), image_std=std.tolist())
    expected = (np.arange(256)[:, None] / 255 - mean) / std
    np.testing.assert_allclose(pixel_table(processor), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [224, 48])
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_the_processors_settings_are_followed(folder: Path, size: int, resample: int) -> None:
    processor = ViTImageProcessor(
        size={"height": size, "width": size}, resample=resample, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )
    path = folder / "settings.png"
    random_image(5, 70, 90).save(path)
    np.testing.assert_array_equal(ours(path, processor), reference(read(path), processor))


@pytest.mark.parametrize("mode", MODES)
def test_other_modes_are_refused_where_the_processor_refuses_them_and_converted_otherwise(
    folder: Path, image_processor: ViTImageProcessor, mode: str
) -> None:
    path = folder / f"mode-{mode.replace(';', '')}.tiff"
    random_image(1, 30, 20, mode).save(path)
    opened = read(path)
    assert opened.mode == mode
    try:
        expected = reference(opened, image_processor)
    except ValueError:
        with pytest.raises(ImageError, match="--protocol exact"):
            ours(path, image_processor)
    else:
        np.testing.assert_array_equal(ours(path, image_processor), expected)
        assert mode in ("RGB", "YCbCr")
    if mode == "I;16":  # the high byte, where Pillow makes all above 255 white
        opened = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
    converted = reference(opened.convert("RGB"), image_processor)
    np.testing.assert_array_equal(ours(path, image_processor, convert_to_rgb=True), converted)


def test_an_image_one_pixel_high_is_refused_as_by_the_processor(folder: Path, image_processor) -> None:
    path = folder / "flat.png"
    random_image(2, 30, 1).save(path)
    if transformers.__version__.startswith("4."):  # later ones do not guess which axis has the channels
        with pytest.raises(ValueError, match="mean must have 1 elements"):
            reference(read(path), image_processor)
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


def test_a_processor_without_one_size_is_refused() -> None:
    for processor in (ViTImageProcessor(do_resize=False), ViTImageProcessor(size={"height": 4, "width": 4})):
        processor.size = processor.size if not processor.do_resize else {"shortest_edge": 4}
        with pytest.raises(InputError, match=r"preprocessor_config\.json"):
            resize_of(processor)


def test_real_photographs_give_the_references_pixels(real_data: Path, image_processor: ViTImageProcessor) -> None:
    paths = [*(real_data / "coco2017_mini").glob("*2017/*.jpg"), *(real_data / "flickr8k" / "images").glob("*.jpg")]
    assert len(paths) > 1000
    refused = []
    for path in sorted(paths):
        try:
            pixels = ours(path, image_processor)
        except ImageError:
            refused.append(read(path).mode)
        else:
            np.testing.assert_array_equal(pixels, reference(read(path), image_processor))
    assert refused == ["L"]


def test_postscript_is_not_run(tmp_path: Path) -> None:
    picture = tmp_path / "photo.jpg"
    Image.new("RGB", (8, 8)).save(picture, "EPS")
    with pytest.raises(ImageError, match="not in a format that is read: JPEG, PNG"), open_image(str(picture)):
        pass


def test_whatever_pillow_raises_on_a_broken_image_is_about_the_image(tmp_path: Path, monkeypatch) -> None:
    def broken(self: Image.Image) -> None:
        raise AttributeError("'NoneType' object has no attribute 'seek'")

    picture = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(picture)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", broken)
    with pytest.raises(ImageError, match="has no attribute"), open_image(str(picture)):
        pass
