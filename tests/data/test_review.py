"""The contact sheet and the held-out prompts that `prepare` leaves beside the data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpo_jax.data.image_grid import MARGIN
from dpo_jax.data.prepare import review
from dpo_jax.data.store.prepared import PreparedData
from dpo_jax.sampling.prompts import read_prompts

from .conftest import encode, write_prepared

RED, BLUE, GREEN = (220, 30, 30), (30, 30, 220), (30, 220, 30)


def image(color: tuple[int, int, int], number: int) -> bytes:
    pixels_HWC = np.full((20, 40, 3), color, np.uint8)
    pixels_HWC[0, 0] = number
    return encode(pixels_HWC, "PNG")


def cells(sheet: Image.Image, columns: int) -> list[list[tuple[int, ...]]]:
    """The colour in the middle of each cell."""
    step, first = review.CELL + MARGIN, 160 + review.CELL // 2
    pixels = np.asarray(sheet)
    middles = range(18 + MARGIN + review.CELL // 2, sheet.height, step)
    return [[tuple(pixels[y, first + column * step].tolist()) for column in range(columns)] for y in middles]


def written(folder: Path, records: list[dict[str, Any]]) -> PreparedData:
    prepared = PreparedData(write_prepared(folder, records))
    review.write_contact_sheet(prepared)
    review.write_heldout_prompts(prepared)
    return prepared


def test_the_sheet_shows_winners_left_and_no_ties(tmp_path: Path) -> None:
    tie = {"images": [image(GREEN, 1), image(GREEN, 2)], "preference": [0.5, 0.5], "caption": "tie"}
    several = {
        "images": [image(RED, 100), image(GREEN, 101), image(BLUE, 102)],
        "preference": [0.6, 0.3, 0.1],
        "caption": "three",
    }
    pairs = [{"images": [image(RED, 10 + i), image(BLUE, 40 + i)], "caption": "pair " * 60} for i in range(28)]
    folder = written(tmp_path / "a", [tie, several, *pairs, tie]).folder
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert cells(sheet, 2) == [[RED, BLUE]] * review.SHOWN
    few = written(tmp_path / "b", [tie, *pairs[:2]]).folder
    with Image.open(few / "contact_sheet.png") as sheet:
        assert cells(sheet, 2) == [[RED, BLUE]] * 2


def test_the_sheet_of_single_images(tmp_path: Path) -> None:
    singles = [{"images": [image(RED, i)], "preference": [1.0], "caption": "one"} for i in range(3)]
    with Image.open(written(tmp_path / "a", singles).folder / "contact_sheet.png") as sheet:
        assert cells(sheet, 1) == [[RED]] * 3


def test_heldout_prompts_are_each_once_and_readable(tmp_path: Path) -> None:
    captions = ["a cat", "seen", "A  Cat", 'first, "quoted"\nsecond', "a cat", "Zoë\u2028x"]
    records = [
        {"images": [image(RED, i), image(BLUE, i)], "caption": caption, "split": "validation"}
        for i, caption in enumerate(captions)
    ]
    records[1]["split"] = "train"
    folder = written(tmp_path / "a", records).folder
    expected = ["a cat", 'first, "quoted"', "Zoë\u2028x"]
    assert [prompt.text for prompt in read_prompts(folder / "heldout_prompts.jsonl")] == expected
    lines = (folder / "heldout_prompts.jsonl").read_text().split("\n")
    assert [json.loads(line)["prompt"] for line in lines if line] == expected


def test_without_a_validation_split_there_is_no_list(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", [{"images": [image(RED, 0), image(BLUE, 0)], "caption": "a"}]).folder
    assert not (folder / "heldout_prompts.jsonl").exists()


@pytest.mark.parametrize("number", [1, 5, 12, 13, 100])
def test_records_are_spread(tmp_path: Path, number: int) -> None:
    pairs = [{"images": [image(RED, 0), image(BLUE, 0)], "caption": str(i)} for i in range(number)]
    spread = review._spread(PreparedData(write_prepared(tmp_path / "a", pairs)))
    assert len(spread) == min(number, review.SHOWN)
    assert spread == sorted(set(spread))
    assert spread[-1] >= number * 11 // 12
