"""What a data set holds: its images as they are, its rows counted, and a sheet of pictures to look at."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from repro.data.captions import caption_lengths
from repro.data.image_cache import in_parallel
from repro.data.images import ImageError, Resize, open_image, resize_image
from repro.data.rows import Rows, column
from repro.progress import progress_bar

PERCENTILES = (0, 50, 95, 99, 100)
REASONS_LISTED = 20
COLUMNS, MARGIN = 4, 8
PICTURE_SIDE, CAPTION_HEIGHT = 240, 78
FONT_SIZE, LINE_LENGTH, LINES = 13, 30, 4

# An image's reference, and whether it is converted to RGB.
ImageUse = tuple[str, bool]


class Seen(NamedTuple):
    """An image before it is resized."""

    mode: str | None = None  # Pillow's; None where the image cannot be read
    size: tuple[int, int] = (0, 0)  # width and height in pixels
    failure: str | None = None  # why a run cannot use it; None where it can


def look_at_images(uses: Sequence[ImageUse], resize: Resize, num_workers: int) -> dict[ImageUse, Seen]:
    """Decode and resize each image as a run does, and keep nothing but what is said of it."""

    def look(use: ImageUse) -> Seen:
        seen = Seen()
        try:
            with open_image(use[0]) as image:
                seen = Seen(image.mode, image.size)
                resize_image(image, resize, convert_to_rgb=use[1])
        except ImageError as error:
            seen = seen._replace(failure=str(error))
        return seen

    found: dict[ImageUse, Seen] = {}
    with progress_bar(progress=True, total=len(uses), desc="images", unit="image", leave=False) as bar:
        for use, seen in in_parallel(look, uses, num_workers):
            found[use] = seen
            bar.update()
    return found


def count_rows(
    split: Rows, convert_to_rgb: bool, seen: Mapping[ImageUse, Seen], tokenizer: Any, max_length: int
) -> dict[str, Any]:
    of_image = Counter(column(split.dataset, "image_path"))
    unusable = sum(count for path, count in of_image.items() if seen[path, convert_to_rgb].failure is not None)
    lengths = caption_lengths(column(split.dataset, "caption"), tokenizer)
    given = lengths[lengths > 0]
    return {
        "rows": len(split.dataset) + len(split.dropped),
        "rows_kept": len(split.dataset) - unusable,
        "rows_dropped_for_themselves": len(split.dropped),
        "rows_dropped_for_their_image": unusable,
        "reasons": [row["reason"] for row in split.dropped[:REASONS_LISTED]],
        "images": len(of_image),
        "images_by_captions": dict(sorted(Counter(of_image.values()).items())),
        "captions": len(given),
        "tokens_of_a_caption": _percentiles(given),
        "max_length": max_length,
        "captions_cut": int(np.sum(given > max_length)),
    }


def count_images(seen: Mapping[ImageUse, Seen]) -> dict[str, Any]:
    failures = {path: image.failure for (path, _), image in seen.items() if image.failure is not None}
    sizes = np.array([image.size for image in seen.values() if image.size[0]], np.int32).reshape(-1, 2)
    return {
        "distinct": len(seen),
        "modes": dict(Counter(image.mode for image in seen.values() if image.mode is not None).most_common()),
        "width": _percentiles(sizes[:, 0]),
        "height": _percentiles(sizes[:, 1]),
        "unusable": len(failures),
        "failures": dict(sorted(failures.items())[:REASONS_LISTED]),
        "reasons": dict(Counter(failures.values()).most_common(REASONS_LISTED)),
    }


def _percentiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    return {f"p{p}": int(value) for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def picture_sheet(rows: Sequence[tuple[str, str | None]]) -> Image.Image:
    """Draw images, by their references, in a grid with a caption under each; one that cannot be read is left blank."""
    width, height = PICTURE_SIDE + 2 * MARGIN, PICTURE_SIDE + CAPTION_HEIGHT + 2 * MARGIN
    sheet = Image.new("RGB", (COLUMNS * width, -(-len(rows) // COLUMNS) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, (reference, caption) in enumerate(rows):
        left, top = number % COLUMNS * width + MARGIN, number // COLUMNS * height + MARGIN
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
