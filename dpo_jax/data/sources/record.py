"""What a source is and what it yields, and how votes, ranks and scores become shares of a preference."""

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dpo_jax.data.sources.values import is_missing
from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.files import is_text

CHUNKS = 64
MIN_ROWS_A_CHUNK, MAX_ROWS_A_CHUNK = 100, 2000
MAX_CANDIDATES = 256
"""Of a prompt: people compare a few images, and comparing all pairs of a million takes for ever."""


class Record(NamedTuple):
    """One prompt with K candidates, best first."""

    where: str
    """File and row, for messages."""
    caption: str
    images: tuple[bytes | None, ...]
    """Encoded as they came; None where the source has none."""
    preference: tuple[float, ...]
    """Share that each candidate got, in the order of `images`: sums to 1, all equal for a tie. One candidate alone has
    1 if it was liked, 0 if not."""
    models: tuple[str, ...]
    """What generated each candidate; empty strings where the source doesn't say."""
    captions: tuple[str, ...] | None = None
    """Own caption of each candidate, where they differ from `caption`."""


class Dropped(NamedTuple):
    """A row that states no preference."""

    where: str
    reason: str


class Damaged(NamedTuple):
    """A row that can't be read."""

    where: str
    reason: str
    """Short, and the same for the same fault: reasons are counted."""
    found: str = ""
    """What was found, or looked for in vain."""


class Unusable(UserError):
    """Why a row is `Damaged`: its reason, and what was found."""

    def __init__(self, reason: str, found: str = ""):
        super().__init__(reason)
        self.reason, self.found = reason, found


Outcome = Record | Dropped | Damaged


class Chunk(NamedTuple):
    """A part of the input that is read on its own."""

    file: Path
    start: int
    stop: int
    offset: int = 0
    """Byte where `start` begins, in files of lines."""


def rows_a_chunk(rows: int) -> int:
    """How many rows of an input of so many make a chunk, a multiple of MIN_ROWS_A_CHUNK.

    Fewer of a small input, so that several workers share it.
    """
    rows = min(max(rows // CHUNKS, MIN_ROWS_A_CHUNK), MAX_ROWS_A_CHUNK)
    return rows // MIN_ROWS_A_CHUNK * MIN_ROWS_A_CHUNK


class Source(NamedTuple):
    """How files of one layout are read."""

    chunks: Callable[[Sequence[Path]], list[Chunk]]
    """Splits the input, always the same way; raises ValueError for files of another layout before anything is read."""
    read: Callable[[Chunk], Iterator[Outcome]]
    """Streams the rows of a chunk."""
    help: str


def missing(pattern: str) -> MissingFileError:
    """The error for an input that matches no file, which may be the id of a data set on the Hugging Face hub."""
    hub_id = pattern if re.fullmatch(r"[\w-]+/[\w-]+", pattern) else "OWNER/NAME"
    return MissingFileError(
        f"no file matches --input={pattern}: data sets are read from local files, so download one first "
        f"(hf download --repo-type dataset {hub_id} --local-dir data/{hub_id.split('/')[1]}). "
        "Pick-a-Pic left the hub in 2025 and takes a mirror or a copy of your own; public, each with a --source, are "
        "data-is-better-together/open-image-preferences-v1-binarized (open_image_preferences), MizzenAI/HPDv3 (hpdv3) "
        "and zai-org/ImageRewardDB (imagerewarddb)"
    )


def borda(points: Sequence[float]) -> list[float]:
    """How many others each candidate beats, a tie counting half: the Borda count for rankings with ties.

    Scaled to sum to 1 these are the shares of K(K-1)/2 comparisons that each candidate wins: (1, 0) or (0.5, 0.5) for
    two candidates, (2/3, 1/3, 0) for three in strict order. So the whole ranking is kept, how far apart the points
    are is not.

    Args:
        points: higher is better; turn the sign of ranks.
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
) -> Outcome:
    """Checks a row, scales its shares to sum to 1, and orders it best first; equal candidates stay as stored.

    Args:
        shares: one for each candidate, in any unit: votes, labels, or what `borda` returns.
        image: reads candidate number k, only called for rows that state a preference; raises Unusable where it can't.
        models: of each candidate, null where unknown; empty if no candidate's is known.
    """
    if is_missing(caption):
        return Dropped(where, "without caption")
    if len(shares) > MAX_CANDIDATES:
        return Damaged(where, f"more than {MAX_CANDIDATES} candidates", str(len(shares)))
    names = ["" if is_missing(name) else name for name in models] or [""] * len(shares)
    texts = [caption, *names, *(captions or ())]
    if not all(isinstance(text, str) and is_text(text) for text in texts):
        return Damaged(where, "a caption or model is not text")
    if not len(shares) == len(names) == len(captions or shares):
        return Damaged(where, "as many models and captions as candidates are needed")
    if not all(0 <= share < math.inf for share in shares):
        return Damaged(where, "a label is negative or not a number")
    largest = max(shares)
    if largest == 0:
        return Dropped(where, "unlabelled")
    shares = [share / largest for share in shares]  # their sum could overflow
    order = sorted(range(len(shares)), key=lambda k: -shares[k])
    try:
        images = tuple(image(k) for k in order)
    except Unusable as error:
        return Damaged(where, error.reason, error.found)
    return Record(
        where=where,
        caption=str(caption),
        images=images,
        preference=tuple(shares[k] / sum(shares) for k in order),
        models=tuple(str(names[k]) for k in order),
        captions=None if captions is None else tuple(str(captions[k]) for k in order),
    )
