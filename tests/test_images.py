"""Pixels equal the reference's bit for bit, and what it refuses is refused."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers import ViTImageProcessor

from repro.data.images import (
    ImageError,
    Resize,
    decode_image,
    open_image,
    pixel_table,
    resize_image,
    resize_of,
    view_image,
)
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
    decoded, _ = decode_image(str(path), resize_of(processor), convert_to_rgb=convert_to_rgb)
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


RAMP = np.tile(np.linspace(0, 1, 64), (8, 1))  # black to white


def tiff(values: np.ndarray, bits: int, kind: int) -> bytes:
    """A TIFF of the ramp as whole numbers (kind 1), signed ones (2) or fractions (3) of so many bits."""
    data = values.tobytes()
    tags = [(256, 64), (257, 8), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (339, kind)])
    start = struct.pack("<I", 8 + len(data))
    return b"II*\0" + start + data + struct.pack("<H", len(tags) + 1) + entries + bytes(4)


def scaled(white: int, kind: str) -> np.ndarray:
    return (RAMP * white).round().astype(kind)


def twelve_bits() -> np.ndarray:
    first, second = scaled(4095, "u2").reshape(-1, 2).T
    return np.stack([first >> 4, first << 4 & 0xF0 | second >> 8, second & 0xFF], axis=1).astype(np.uint8)


GRAY = {
    "PGM of 10 bits": b"P5 64 8 1023\n" + scaled(1023, ">u2").tobytes(),
    "PGM of 16 bits": b"P5 64 8 65535\n" + scaled(65535, ">u2").tobytes(),
    "PGM in words": b"P2 64 8 1023\n" + " ".join(map(str, scaled(1023, "i4").flat)).encode(),
    "TIFF of 12 bits": tiff(twelve_bits(), 12, 1),
    "TIFF of 16 bits": tiff(scaled(65535, "<u2"), 16, 1),
}
WITHOUT_WHITE = {
    "TIFF of 32 bits": tiff(scaled(2**32 - 1, "<u4"), 32, 1),
    "TIFF of signed numbers": tiff(scaled(2**15 - 1, "<i2"), 16, 2),
    "TIFF of fractions": tiff(RAMP.astype("<f4"), 32, 3),
    "PFM": b"Pf\n64 8\n-1.0\n" + RAMP.astype("<f4").tobytes(),
}


@pytest.mark.parametrize("name", GRAY)
def test_gray_of_more_bits_is_scaled_by_what_its_file_says(tmp_path: Path, name: str) -> None:
    (tmp_path / "gray").write_bytes(GRAY[name])
    found = decode_image(str(tmp_path / "gray"), Resize(8, 64, Image.Resampling.BILINEAR), convert_to_rgb=True)[0]
    np.testing.assert_allclose(found, np.repeat(255 * RAMP[..., None], 3, axis=2), atol=1)
    np.testing.assert_array_equal(np.asarray(view_image(str(tmp_path / "gray"))), found)
    with pytest.raises(ImageError, match="is not RGB"):
        decode_image(str(tmp_path / "gray"), Resize(8, 64, 2), convert_to_rgb=False)


@pytest.mark.parametrize("convert", [True, False])
@pytest.mark.parametrize("name", WITHOUT_WHITE)
def test_gray_whose_white_no_file_says_is_refused(tmp_path: Path, name: str, convert: bool) -> None:
    (tmp_path / "gray").write_bytes(WITHOUT_WHITE[name])
    with pytest.raises(ImageError, match="whose white is not known; save it with 8 or 16 unsigned bits"):
        decode_image(str(tmp_path / "gray"), Resize(8, 64, 2), convert_to_rgb=convert)


@pytest.mark.parametrize("orientation", [None, 0, 1, 2, 3, 6, 8, 9])
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_a_photograph_is_turned_where_that_is_asked_for_and_always_told(tmp_path, name, orientation) -> None:
    image, exif, resize = random_image(3, 40, 20), Image.Exif(), Resize(20, 40, 2)
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(tmp_path / "photo", name, exif=exif)
    stored = read(tmp_path / "photo").convert("RGB")
    held = ImageOps.exif_transpose(read(tmp_path / "photo")).convert("RGB")
    for turn, shown in ((False, stored), (True, held)):
        found = decode_image(str(tmp_path / "photo"), resize, convert_to_rgb=False, turn_upright=turn)
        np.testing.assert_array_equal(found[0], resize_image(shown, resize, convert_to_rgb=False))
        assert found[1] == (orientation in range(2, 9))
    np.testing.assert_array_equal(np.asarray(view_image(str(tmp_path / "photo"))), np.asarray(held))


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
