"""Grids of captioned images, for people to look at."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN = 8
CELL = 128
"""Images smaller than this many pixels are enlarged, so that a grid of a tiny model can be seen."""


def image_grid(rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[str]) -> Image.Image:
    """Return an image with one row for each caption and one titled column for each of its uint8 images [H, W, 3]."""
    size = max(CELL, rows[0][1][0].shape[0])
    font = ImageFont.load_default(size=14)
    left, top = 160, 18 + MARGIN  # room for the captions and for the titles
    grid = Image.new("RGB", (left + len(columns) * (size + MARGIN), top + len(rows) * (size + MARGIN)), "white")
    draw = ImageDraw.Draw(grid)
    for column, title in enumerate(columns):
        draw.text((left + column * (size + MARGIN), MARGIN // 2), title, fill="black", font=font)
    for row, (caption, images) in enumerate(rows):
        y = top + row * (size + MARGIN)
        draw.multiline_text((MARGIN, y), textwrap.fill(caption, 20), fill="black", font=font)
        for column, image in enumerate(images):
            cell = Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST)
            grid.paste(cell, (left + column * (size + MARGIN), y))
    return grid
