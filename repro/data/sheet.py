"""Pictures with their captions on one sheet, to look at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from repro.data.images import ImageError, view_image

COLUMNS, MARGIN = 4, 8
PICTURE_SIDE, CAPTION_HEIGHT = 240, 78
FONT_SIZE, LINE_LENGTH, LINES = 13, 30, 4


def picture_sheet(rows: Sequence[tuple[str, str | None]]) -> Image.Image:
    """Draw images, by their references, in a grid with a caption under each; one that cannot be read is left blank."""
    width, height = PICTURE_SIDE + 2 * MARGIN, PICTURE_SIDE + CAPTION_HEIGHT + 2 * MARGIN
    sheet = Image.new("RGB", (COLUMNS * width, -(-len(rows) // COLUMNS) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, (reference, caption) in enumerate(rows):
        left, top = number % COLUMNS * width + MARGIN, number // COLUMNS * height + MARGIN
        try:
            picture = view_image(reference)
            picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            sheet.paste(picture, (left + (PICTURE_SIDE - picture.width) // 2, top + PICTURE_SIDE - picture.height))
        except ImageError as error:
            caption = f"[{error}] {caption}"
        lines = textwrap.wrap(caption or "(no caption)", LINE_LENGTH, max_lines=LINES, placeholder=" …")
        draw.multiline_text((left, top + PICTURE_SIDE + MARGIN // 2), "\n".join(lines), "black", font)
    return sheet
