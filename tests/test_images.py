"""Pixels equal the reference's bit for bit, and what it refuses is refused."""

import io
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers import ViTImageProcessor

from repro.data.images import ImageError, Resize, decode_image, pixel_table, resize_image, resize_of, view_image
from repro.errors import InputError

FORMATS = {
    "JPEG": ("RGB", "CMYK", "L"),
    "JPEG progressive": ("RGB",),
    "PNG": ("RGB", "L", "LA", "P", "RGBA", "I;16", "1"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P", "L"),
    "TIFF": ("RGB", "L", "LA", "P", "RGBA", "CMYK", "I;16", "1", "YCbCr"),
    "BMP": ("RGB", "L", "P", "1"),
}


def random_image(seed, width, height, mode="RGB"):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    return Image.fromarray(values[..., 0].astype(np.uint16)) if mode == "I;16" else image.convert(mode)


def encode(image, name):
    buffer = io.BytesIO()
    image.save(buffer, name.split()[0], progressive="progressive" in name)
    return buffer.getvalue()


def ours(path, processor, *, convert_to_rgb=False):
    decoded, _ = decode_image(str(path), resize_of(processor), convert_to_rgb=convert_to_rgb)
    assert decoded.dtype == np.uint8
    return np.moveaxis(pixel_table(processor)[decoded, np.arange(3)], -1, 0)


def read(path):
    """Decode a file as Pillow does, and close it."""
    with Image.open(path) as image:
        image.load()
    return image


def reference(image, processor, **options):
    return processor(images=image, return_tensors="np", **options).pixel_values[0]


def check(path, processor):
    """Compare an image's pixels with the processor's, converted and as it is; tells whether it takes it as it is."""
    opened = read(path)
    # Told where the channels are: left to guess, the processor takes a height of 1 or 3 for them.
    told = {"input_data_format": "channels_last"}
    # Of 16 bits the high byte, where Pillow makes all above 255 white.
    kept = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8)) if opened.mode == "I;16" else opened
    expected = reference(kept.convert("RGB"), processor, **told)
    np.testing.assert_array_equal(ours(path, processor, convert_to_rgb=True), expected)
    try:
        expected = reference(opened, processor, **(told if opened.height == 3 else {}))
        refused = opened.height == 1  # as by transformers 4, which takes the height for the channels
    except (ValueError, IndexError):
        refused = True
    if refused:
        with pytest.raises(ImageError, match="--protocol exact"):
            ours(path, processor)
    else:
        np.testing.assert_array_equal(ours(path, processor), expected)
    return not refused


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("images") / "any"


@st.composite
def encoded_images(draw):
    """Any format, mode and size of 1 to 2000 pixels, extreme aspect ratios included, of which the area is bounded."""
    name = draw(st.sampled_from(sorted(FORMATS)))
    mode = draw(st.sampled_from(FORMATS[name]))
    long = draw(st.one_of(st.integers(1, 60), st.integers(1, 2000)))
    short = draw(st.integers(1, max(1, min(long, 90_000 // long))))
    width, height = draw(st.permutations([long, short]))
    return encode(random_image(draw(st.integers(0, 2**32 - 1)), width, height, mode), name)


@settings(max_examples=100)
@given(encoded_images(), st.sampled_from(list(Image.Resampling)))
@example(encode(random_image(2, 30, 1), "PNG"), Image.Resampling.BILINEAR)
def test_pixels_equal_the_processors_bit_for_bit_and_what_it_refuses_is_refused(file, image, resample):
    file.write_bytes(image)
    colours = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    check(file, ViTImageProcessor(size={"height": 32, "width": 40}, resample=resample, **colours))


@pytest.mark.parametrize("mode", FORMATS["TIFF"])
def test_other_modes_are_refused_where_the_processor_refuses_them_and_converted_otherwise(file, image_processor, mode):
    file.write_bytes(encode(random_image(1, 30, 20, mode), "TIFF"))
    assert read(file).mode == mode
    assert check(file, image_processor) == (mode in ("RGB", "YCbCr"))


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 40), st.sampled_from(list(Image.Resampling)))
def test_an_image_of_the_right_size_is_left_as_it_is(seed, width, height, resample):
    image = random_image(seed, width, height)
    resized = resize_image(image, Resize(height, width, resample), convert_to_rgb=False)
    np.testing.assert_array_equal(resized, np.asarray(image))


RAMP = np.tile(np.linspace(0, 1, 64), (8, 1))  # black to white


def tiff(values, bits, kind):
    """A TIFF of the ramp as whole numbers (kind 1), signed ones (2) or fractions (3) of so many bits."""
    data = values.tobytes()
    tags = [(256, 64), (257, 8), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (339, kind)])
    start = struct.pack("<I", 8 + len(data))
    return b"II*\0" + start + data + struct.pack("<H", len(tags) + 1) + entries + bytes(4)


def scaled(white, kind):
    return (RAMP * white).round().astype(kind)


def twelve_bits():
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
OF_RAMP = Resize(8, 64, Image.Resampling.BILINEAR)


@pytest.mark.parametrize("name", GRAY)
def test_gray_of_more_bits_is_scaled_by_what_its_file_says(file, name):
    file.write_bytes(GRAY[name])
    found = decode_image(str(file), OF_RAMP, convert_to_rgb=True)[0]
    np.testing.assert_allclose(found, np.repeat(255 * RAMP[..., None], 3, axis=2), atol=1)
    np.testing.assert_array_equal(np.asarray(view_image(str(file))), found)
    with pytest.raises(ImageError, match="is not RGB"):
        decode_image(str(file), OF_RAMP, convert_to_rgb=False)


@pytest.mark.parametrize("name", WITHOUT_WHITE)
def test_gray_whose_white_no_file_says_is_refused(file, name):
    file.write_bytes(WITHOUT_WHITE[name])
    for convert in (True, False):
        with pytest.raises(ImageError, match="whose white is not known; save it with 8 or 16 unsigned bits"):
            decode_image(str(file), OF_RAMP, convert_to_rgb=convert)


@pytest.mark.parametrize("orientation", [None, 0, 1, 2, 3, 6, 8, 9])
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_a_photograph_is_turned_where_that_is_asked_for_and_always_told(file, name, orientation):
    image, exif, resize = random_image(3, 40, 20), Image.Exif(), Resize(20, 40, 2)
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(file, name, exif=exif)
    stored, held = read(file).convert("RGB"), ImageOps.exif_transpose(read(file)).convert("RGB")
    for turn, shown in ((False, stored), (True, held)):
        found = decode_image(str(file), resize, convert_to_rgb=False, turn_upright=turn)
        np.testing.assert_array_equal(found[0], resize_image(shown, resize, convert_to_rgb=False))
        assert found[1] == (orientation in range(2, 9))
    np.testing.assert_array_equal(np.asarray(view_image(str(file))), np.asarray(held))


def test_a_processor_without_one_size_is_refused():
    of_edge = ViTImageProcessor()
    of_edge.size = {"shortest_edge": 4}
    for processor in (ViTImageProcessor(do_resize=False), of_edge):
        with pytest.raises(InputError, match=r"preprocessor_config\.json"):
            resize_of(processor)


def test_real_photographs_give_the_references_pixels(real_data, image_processor):
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


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("PIL.ImageFile.ImageFile.load", AttributeError("'NoneType' object has no attribute 'seek'")),
        ("PIL.Image.Image.resize", MemoryError()),
    ],
)
def test_whatever_is_raised_on_an_image_is_about_the_image(file, monkeypatch, place, error):
    def fail(*_, **__):
        raise error

    file.write_bytes(encode(Image.new("RGB", (8, 8)), "PNG"))
    monkeypatch.setattr(place, fail)
    with pytest.raises(ImageError, match=f"{type(error).__name__}: {error}"):
        decode_image(str(file), OF_RAMP, convert_to_rgb=True)
