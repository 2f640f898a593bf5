"""Accuracy of rendered text: the reward of Flow-GRPO's text-rendering task (arXiv 2505.05470, flow_grpo/ocr.py)."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidocr import RapidOCR

from dpo_jax.errors import UserError
from dpo_jax.rewards import Images, Reward, Settings

QUOTED = re.compile(r'["“”„]([^"“”„]+)["“”]|«([^»]+)»')
APOSTROPHES = re.compile(r"(?<!\w)['\u2018](.+?)['\u2019](?!\w)")
"""Text between apostrophes, straight or typographic, but not between those of "the dog's and the cat's"."""


def open_ocr(source: str, settings: Settings) -> Reward:
    """Open the judge: the share of the text quoted in a caption that RapidOCR reads in the image, see `accuracy`.

    RapidOCR runs PaddleOCR's networks, which its package contains, on CPUs. Flow-GRPO's code runs an older PaddleOCR.
    """
    engine = RapidOCR(params={"Global.log_level": "error", "Global.use_cls": False})  # cls: finds text upside down

    def score(images: Images, captions: Sequence[str]) -> np.ndarray:
        asked = [quoted_text(caption) for caption in captions]
        return np.asarray([accuracy(read(engine, image), text) for image, text in zip(images, asked, strict=True)])

    return score


def quoted_text(caption: str) -> str:
    """Return the text that a caption puts in quotation marks; several quoted parts are joined by a space.

    Quotation marks are "..." or typographic ones, and where a caption has none of these, '...'. Raises UserError for a
    caption without any.
    """
    parts = QUOTED.findall(caption) or [(part,) for part in APOSTROPHES.findall(caption)]
    text = " ".join(part for groups in parts for part in groups if part)
    if not _plain(text):
        raise UserError(
            f'the judge ocr needs the text to render in quotation marks, as in: a sign that says "OPEN"; the caption '
            f"{caption!r} has none"
        )
    return text


def read(engine: Any, image_HWC: np.ndarray) -> str:
    """Return the text that a RapidOCR reads in an image, line by line."""
    lines = engine(np.ascontiguousarray(image_HWC[..., ::-1])).txts  # OpenCV's order of channels
    return "".join(lines or ())


def accuracy(found: str, asked: str) -> float:
    """Return 1 - min(distance, length) / length, from 0 to 1.

    The distance is Levenshtein's: single characters inserted, deleted or replaced. The length is that of the text
    asked for. Spaces and case do not count, and where the whole text is contained in what was found, the distance is 0.
    """
    found, asked = _plain(found), _plain(asked)
    distance = 0 if asked in found else Levenshtein.distance(found, asked)
    return 1 - min(distance, len(asked)) / len(asked)


def _plain(text: str) -> str:
    return "".join(text.split()).lower()
