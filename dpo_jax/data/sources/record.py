"""Defines sources and their outcomes, and converts votes, ranks and scores to shares of a preference."""

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dpo_jax.data.sources.values import is_missing, is_unstated, number
from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.files import is_text

CHUNKS = 64
MIN_ROWS_A_CHUNK, MAX_ROWS_A_CHUNK = 100, 2000
MAX_CANDIDATES = 256
"""Candidates per prompt: people compare a few images, and all pairs of a million would take forever."""

MAX_WEIGHT = 1e9
"""Largest weight of a row, far from what float32 holds."""


class Record(NamedTuple):
    """One prompt with K candidates, best first."""

    where: str
    """File and row, for messages."""
    caption: str
    images: tuple[bytes | None, ...]
    """The bytes of each image file, unchanged; None if the source has none."""
    preference: tuple[float, ...]
    """The share of the preference that each candidate got, in the order of `images`: sums to 1, all equal for a tie.
    A single candidate has 1 if it was liked, 0 if not."""
    models: tuple[str, ...]
    """The model that generated each candidate; empty if the source does not say."""
    captions: tuple[str, ...] | None = None
    """The caption of each candidate, if they differ from `caption`."""
    weight: float | None = None
    """Weight in the loss; None if the source does not say, which means 1."""
    masks: tuple[bytes | None, ...] | None = None
    """The bytes of the mask file of each image, None where it has none; None if no image has one."""


class Dropped(NamedTuple):
    """A row that states no preference."""

    where: str
    reason: str


class Damaged(NamedTuple):
    """A row that cannot be read."""

    where: str
    reason: str
    """Short, and the same for the same fault, because reasons are counted."""
    found: str = ""
    """The value that was found, or the name of what is missing."""


class Unusable(UserError):
    """The reason why a row is `Damaged`, and what was found."""

    def __init__(self, reason: str, found: str = ""):
        super().__init__(reason)
        self.reason, self.found = reason, found


Outcome = Record | Dropped | Damaged
"""The outcome of one row of a source's input."""


class Chunk(NamedTuple):
    """A part of the input that is read on its own."""

    file: Path
    start: int
    stop: int
    offset: int = 0
    """The byte at which row `start` begins, in files of lines."""


def rows_a_chunk(rows: int) -> int:
    """Return the number of rows per chunk of an input with this many rows, a multiple of MIN_ROWS_A_CHUNK.

    The chunks of a small input are smaller, so that several workers share it.
    """
    rows = min(max(rows // CHUNKS, MIN_ROWS_A_CHUNK), MAX_ROWS_A_CHUNK)
    return rows // MIN_ROWS_A_CHUNK * MIN_ROWS_A_CHUNK


def chunks_at(files: Sequence[tuple[Path, int, list[int]]]) -> list[Chunk]:
    """Return chunks of `rows_a_chunk` rows of text files: (file, rows, offset of every MIN_ROWS_A_CHUNK-th row)."""
    limit = rows_a_chunk(sum(count for _, count, _ in files))
    return [
        Chunk(file, start, min(start + limit, count), offsets[start // MIN_ROWS_A_CHUNK])
        for file, count, offsets in files
        for start in range(0, count, limit)
    ]


class Source(NamedTuple):
    """The functions that read files of one layout."""

    chunks: Callable[[Sequence[Path]], list[Chunk]]
    """Split the input, always the same way; raise ValueError for files of another layout before anything is read."""
    read: Callable[[Chunk], Iterator[Outcome]]
    """Stream the rows of a chunk."""
    help: str


def missing(pattern: str) -> MissingFileError:
    """Return the error for an input that matches no file; it may be the id of a data set on the Hugging Face hub."""
    hub_id = pattern if re.fullmatch(r"[\w-]+/[\w-]+", pattern) else "OWNER/NAME"
    return MissingFileError(
        f"no file matches --input={pattern}. A data set on the Hugging Face hub is named --input=hub:{hub_id}, for "
        "example hub:data-is-better-together/open-image-preferences-v1-binarized; one whose images are files of their "
        "own, such as MizzenAI/HPDv3 or zai-org/ImageRewardDB, must be downloaded first (hf download --repo-type "
        f"dataset {hub_id} --local-dir data/{hub_id.split('/')[1]}). Pick-a-Pic left the hub in 2025; use a mirror or "
        "a copy of your own"
    )


def borda(points: Sequence[float]) -> list[float]:
    """Return how many others each candidate beats, counting ties as half: the Borda count for rankings with ties.

    Scaled to sum to 1, these are the shares of the K(K-1)/2 comparisons that each candidate wins: (1, 0) or (0.5, 0.5)
    for two candidates, (2/3, 1/3, 0) for three in strict order. This keeps the whole ranking, but not the distances
    between the points.

    Args:
        points: higher is better; negate ranks.
    """
    ordered = sorted(points)
    return [(bisect_left(ordered, point) + bisect_right(ordered, point) - 1) / 2 for point in points]


def make_record(
    where: str,
    caption: object,
    shares: Sequence[float],
    image: Callable[[int], bytes | None],
    models: Sequence[object] = (),
    captions: Sequence[object] | None = None,
    weight: object = None,
    mask: Callable[[int], bytes | None] = lambda k: None,
) -> Outcome:
    """Check a row, scale its shares to sum to 1, and order it best first; equal candidates keep their order.

    Args:
        shares: one per candidate, in any unit: votes, labels, or what `borda` returns.
        image: reads candidate k; called only for rows that state a preference; raises Unusable if it cannot.
        models: one per candidate, null where unknown; empty if none is known.
        weight: weight of the row in the loss, null or blank where the source states none.
        mask: reads the mask of candidate k, as `image` does; None if it has none.
    """
    if is_missing(caption):
        return Dropped(where, "without a caption")
    if len(shares) > MAX_CANDIDATES:
        return Damaged(where, f"more than {MAX_CANDIDATES} candidates", str(len(shares)))
    names = ["" if is_missing(name) else name for name in models] or [""] * len(shares)
    texts = [caption, *names, *(captions or ())]
    if not all(isinstance(text, str) and is_text(text) for text in texts):
        return Damaged(where, "a caption or model is not text")
    if not len(shares) == len(names) == len(captions or shares):
        return Damaged(where, "the number of models or captions is not that of the candidates")
    if not all(0 <= share < math.inf for share in shares):
        return Damaged(where, "a label is negative or not a number")
    stated = None if is_unstated(weight) else number(weight)
    if not is_unstated(weight) and (stated is None or not 0 <= stated <= MAX_WEIGHT):
        return Damaged(where, f"a weight is not a number from 0 to {MAX_WEIGHT:g}", repr(weight)[:200])
    largest = max(shares)
    if largest == 0:
        return Dropped(where, "without a label")
    shares = [share / largest for share in shares]  # their sum could overflow
    order = sorted(range(len(shares)), key=lambda k: -shares[k])
    try:
        images = tuple(image(k) for k in order)
        masks = tuple(mask(k) for k in order)
    except Unusable as error:
        return Damaged(where, error.reason, error.found)
    return Record(
        where=where,
        caption=str(caption),
        images=images,
        preference=tuple(shares[k] / sum(shares) for k in order),
        models=tuple(str(names[k]) for k in order),
        captions=None if captions is None else tuple(str(captions[k]) for k in order),
        weight=stated,
        masks=masks if any(data is not None for data in masks) else None,
    )
