"""The judge of rendered text: what a caption asks for, the score by its formula, and text that is really read."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from dpo_jax.errors import UserError
from dpo_jax.rewards import open_judge
from dpo_jax.rewards.ocr import accuracy, quoted_text, read


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ('A sign that says "Next Gas 100 Miles", under a blazing sky.', "Next Gas 100 Miles"),
        ("A sign that says “Next Gas”.", "Next Gas"),
        ("Ein Schild: „Ende“", "Ende"),
        ("Un panneau « Fin »", " Fin "),
        ("A shop called 'Don't Panic'", "Don't Panic"),
        ("A shop called \u2018Rex\u2019s\u2019", "Rex\u2019s"),
        ("The dogs' house of 'Rex'", "Rex"),
        ("A knight's castle, the sign declaring \"Do not 'knock'\"", "Do not 'knock'"),
        ('A door with "No. 5" below a sign "OPEN"', "No. 5 OPEN"),
    ],
)
def test_the_text_asked_for_is_quoted(caption: str, text: str) -> None:
    assert quoted_text(caption) == text


@pytest.mark.parametrize("caption", ["a sign", "the dog's and the cat's bowls", 'a sign that says " "', "", '5" wide'])
def test_captions_without_quoted_text_are_refused(caption: str) -> None:
    with pytest.raises(
        UserError, match=rf'as in: a sign that says "OPEN"; the caption {re.escape(repr(caption))} has '
    ):
        quoted_text(caption)


@pytest.mark.parametrize(
    ("found", "asked", "expected"),
    [
        ("HELLO world", "Hello World", 1),
        ("xx hello\nworld yy", "Hello World", 1),
        ("Hallo World", "Hello World", 1 - 1 / 10),
        ("Hello", "Hello World", 1 - 5 / 10),
        ("ello W0rlds", "Hello World", 1 - 3 / 10),
        ("", "Hello World", 0),
        ("quite another text", "OPEN", 0),
    ],
)
def test_accuracy_is_one_minus_the_share_of_wrong_characters(found: str, asked: str, expected: float) -> None:
    assert accuracy(found, asked) == pytest.approx(expected)


def test_the_engine_gets_opencvs_channels_and_may_find_nothing() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)

    def engine(pixels: np.ndarray) -> SimpleNamespace:
        np.testing.assert_array_equal(pixels, image[..., [2, 1, 0]])
        return SimpleNamespace(txts=None)

    assert read(engine, image) == ""


def drawn(*lines: str, ink: str = "black", paper: str = "white") -> np.ndarray:
    image = Image.new("RGB", (240, 240), paper)
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((20, 50 + 80 * number), line, ink, ImageFont.load_default(36))
    return np.asarray(image)


def test_drawn_text_is_read() -> None:
    judge = open_judge("ocr")
    assert judge.is_outside
    images = [drawn("Grand", "Opening"), drawn("Hallo World", ink="yellow", paper="navy"), drawn()]
    captions = ['a banner "Grand Opening"', 'a neon sign "Hello World"', 'a sign "STOP"']
    scores = judge.score(images, captions)
    assert scores.dtype == np.float32
    assert scores.tolist() == pytest.approx([1, 0.9, 0])
