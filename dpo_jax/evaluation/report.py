"""What a person looks at: grids of images, policy beside reference."""

import textwrap
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

MARGIN = 8
CELL = 128
"""Images smaller than this many pixels are enlarged, so that a grid of a tiny model can be seen."""


def save_grid(path: epath.PathLike, rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[str]) -> None:
    """Writes a PNG with one row for each caption and one titled column for each image [H, W, 3] of it."""
    size = max(CELL, rows[0][1][0].shape[0])
    font = ImageFont.load_default(size=14)
    caption_width = 160
    line = 18
    width = caption_width + len(columns) * (size + MARGIN) + MARGIN
    grid = Image.new("RGB", (width, line + MARGIN + len(rows) * (size + MARGIN)), "white")
    draw = ImageDraw.Draw(grid)
    for column, title in enumerate(columns):
        draw.text((caption_width + column * (size + MARGIN), MARGIN // 2), title, fill="black", font=font)
    for row, (caption, images) in enumerate(rows):
        top = line + MARGIN + row * (size + MARGIN)
        draw.multiline_text((MARGIN, top), textwrap.fill(caption, 20), fill="black", font=font)
        for column, image in enumerate(images):
            picture = Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST)
            grid.paste(picture, (caption_width + column * (size + MARGIN), top))
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        grid.save(file, format="PNG")
