"""Writes what people look at beside the data: a contact sheet, and the held-out prompts.

Both follow from the records alone, so the same data gives the same bytes.
"""

import functools
import itertools
import json
import textwrap

import numpy as np
import pyarrow.compute as pc
from PIL import Image, ImageOps

from dpo_jax.data import images
from dpo_jax.data.image_grid import image_grid
from dpo_jax.data.prepare.worker import prompt_hash
from dpo_jax.data.store.prepared import PreparedData, lines_of
from dpo_jax.files import writing

CONTACT_SHEET = "contact_sheet.png"
HELDOUT_PROMPTS = "heldout_prompts.jsonl"
SHOWN = 12
"""Records on the contact sheet."""
CELL = 192
"""Side of each of its images in pixels."""
CAPTION = 180
"""Characters of a caption that are shown, which is the number that fits next to its images."""


def write_contact_sheet(prepared: PreparedData) -> None:
    """Write a PNG of records from all parts of the data set: caption, winner (the best candidate), loser (the worst).

    Ties are left out. For a data set of single images, the sheet shows the images.
    """
    rows = []
    for index in _spread(prepared):
        record = prepared.record(index, 2, ("caption", "captions", "images", "preference"))
        cells = [_cell(data) for data in prepared.read_images(record)]
        caption = (record["captions"] or [record["caption"]])[0]
        rows.append((textwrap.shorten(caption, CAPTION, placeholder=" ..."), cells))
    width = max(len(cells) for _, cells in rows)
    columns = ["winner", "loser"] if width == 2 else ["image"]
    with writing(prepared.folder / CONTACT_SHEET) as file:
        image_grid(rows, columns).save(file, format="PNG")


def write_heldout_prompts(prepared: PreparedData) -> None:
    """Write the prompts of the validation split, each once, in the order of their first records.

    The lines are {"prompt": ...}, as `sample --prompts` reads them. Captions that differ in nothing but case and white
    space are one prompt, as in the split. Of a caption with several lines it is the first, as in validation. Without
    held-out prompts there is no file.
    """
    written = set[int]()
    with writing(prepared.folder / HELDOUT_PROMPTS) as file:
        for batch in prepared.records.select(["caption", "split"]).to_batches():
            for caption in batch.filter(pc.equal(batch["split"], "validation"))["caption"].to_pylist():
                if (key := prompt_hash(caption)) not in written:
                    written.add(key)
                    line = json.dumps({"prompt": lines_of(caption)[0]}, ensure_ascii=False) + "\n"
                    file.write(line.encode())
    if not written:
        (prepared.folder / HELDOUT_PROMPTS).unlink()


def _spread(prepared: PreparedData) -> list[int]:
    """Return the first record with a winner and a loser in each of `SHOWN` equal parts, or the first of each part."""
    edges = [len(prepared) * part // SHOWN for part in range(SHOWN + 1)]
    parts = [range(*edge) for edge in itertools.pairwise(edges)]
    compared = [next(filter(functools.partial(_is_compared, prepared), part), None) for part in parts]
    found = [index for index in compared if index is not None]
    return found or [part[0] for part in parts if part]


def _is_compared(prepared: PreparedData, index: int) -> bool:
    preference = prepared.record(index, columns=("images", "preference"))["preference"]
    return len(preference) > 1 and preference[0] > preference[-1]


def _cell(data: images.ImageBytes) -> np.ndarray:
    """Return the whole image on a white square, uint8 [CELL, CELL, 3]."""
    image = images.decode(data)
    method = Image.Resampling.NEAREST if max(image.size) < CELL else Image.Resampling.LANCZOS
    return np.asarray(ImageOps.pad(image, (CELL, CELL), method, color="white"))
