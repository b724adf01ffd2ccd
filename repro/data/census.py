"""What a data set holds: its images as they are, and a sheet of pictures to look at."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from repro.data.image_cache import in_parallel
from repro.data.images import ImageError, Resize, open_image, resize_image
from repro.progress_bar import progress_bar

SHEET_COLUMNS = 4
PICTURE_SIDE = 240
CAPTION_HEIGHT = 78
FONT_SIZE, LINE_LENGTH, LINES = 13, 30, 4
MARGIN = 8


@dataclass(frozen=True)
class ImageCensus:
    """Images as they are before they are resized.

    Attributes:
        modes: how many there are of each of Pillow's modes.
        sizes: int32[M,2], width and height in pixels; 0 where an image cannot be read.
        failures: reference to the reason why an image cannot be used.
    """

    modes: Counter[str]
    sizes: np.ndarray
    failures: dict[str, str]


def inspect_images(
    references: Sequence[str], resize: Resize, *, convert_to_rgb: bool, num_workers: int, progress: bool
) -> ImageCensus:
    """Decode and resize every image as a run does, and keep nothing but what is said of it."""

    def inspect(reference: str) -> tuple[str | None, tuple[int, int], str | None]:
        mode, size = None, (0, 0)
        try:
            with open_image(reference) as image:
                mode, size = image.mode, image.size
                resize_image(image, resize, convert_to_rgb=convert_to_rgb)
        except ImageError as error:
            return mode, size, str(error)
        return mode, size, None

    modes: Counter[str] = Counter()
    sizes = np.zeros((len(references), 2), np.int32)
    failures: dict[str, str] = {}
    with progress_bar(progress=progress, total=len(references), desc="images", unit="image", leave=False) as bar:
        for place, (reference, found) in enumerate(in_parallel(inspect, references, num_workers)):
            mode, sizes[place], failure = found
            if mode is not None:
                modes[mode] += 1
            if failure is not None:
                failures[reference] = failure
            bar.update()
    return ImageCensus(modes, sizes, failures)


def joined(censuses: Iterable[ImageCensus]) -> ImageCensus:
    """Put several together, each counted once."""
    parts = list({id(census): census for census in censuses}.values())
    modes = sum((census.modes for census in parts), Counter())
    failures = {reference: reason for census in parts for reference, reason in census.failures.items()}
    return ImageCensus(modes, np.concatenate([census.sizes for census in parts]), failures)


def picture_sheet(rows: Sequence[tuple[str, str | None]]) -> Image.Image:
    """Draw images, by their references, in a grid with a caption under each; one that cannot be read is left blank."""
    width, height = PICTURE_SIDE + 2 * MARGIN, PICTURE_SIDE + CAPTION_HEIGHT + 2 * MARGIN
    sheet = Image.new("RGB", (SHEET_COLUMNS * width, -(-len(rows) // SHEET_COLUMNS) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, (reference, caption) in enumerate(rows):
        left, top = number % SHEET_COLUMNS * width + MARGIN, number // SHEET_COLUMNS * height + MARGIN
        try:
            with open_image(reference) as image:
                picture = image.convert("RGB")
                picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            sheet.paste(picture, (left + (PICTURE_SIDE - picture.width) // 2, top + PICTURE_SIDE - picture.height))
        except ImageError as error:
            caption = f"[{error}] {caption}"
        lines = textwrap.wrap(caption or "(no caption)", LINE_LENGTH, max_lines=LINES, placeholder=" …")
        draw.multiline_text((left, top + PICTURE_SIDE + MARGIN // 2), "\n".join(lines), "black", font)
    return sheet
