"""Pictures side by side on one sheet, for people to look at."""

import textwrap
from collections.abc import Sequence
from math import ceil

from PIL import Image, ImageDraw, ImageFont

GAP = 2
FRAME = 3
"""Pixels between pictures that have labels, and the width of a frame."""
FONT_SIZE, LINE_HEIGHT, LETTER_WIDTH = 10, 12, 5


def grid(
    pictures: Sequence[Image.Image],
    columns: int | None = None,
    labels: Sequence[str] = (),
    frames: Sequence[str] = (),
) -> Image.Image:
    """Pictures of one size in rows, from the left, from the top.

    columns: by default about as many as rows. labels: one a picture, written below it. frames: one a picture, the colour around
    it, any name that PIL knows. With either there is white between the pictures.
    """
    columns = min(len(pictures), columns or ceil(len(pictures) ** 0.5))
    width, height = pictures[0].size
    border = FRAME if frames else 0
    gap = GAP if labels or frames else 0
    texts = [textwrap.wrap(label, max(8, width // LETTER_WIDTH)) for label in labels]
    below = LINE_HEIGHT * max(map(len, texts), default=0)
    across, down = width + 2 * border + gap, height + 2 * border + gap + below
    sheet = Image.new("RGB", (columns * across, ceil(len(pictures) / columns) * down), "white" if gap else "black")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for index, picture in enumerate(pictures):
        x, y = index % columns * across, index // columns * down
        if frames:
            pen.rectangle((x, y, x + width + 2 * border - 1, y + height + 2 * border - 1), fill=frames[index])
        sheet.paste(picture, (x + border, y + border))
        for number, line in enumerate(texts[index] if texts else ()):
            pen.text((x, y + height + 2 * border + number * LINE_HEIGHT), line, fill="black", font=font)
    return sheet
