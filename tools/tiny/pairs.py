"""Pairs of the tiny world: rendered pairs to train the base on, pairs of judged samples to tune it on; and their file.

Axes: N images, H x W pixels, C colour channels.
"""

import io
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from etils import epath
from PIL import Image

from dpo_jax.files import writing
from dpo_jax.tiny import judge, world

Sampler = Callable[[Sequence[str], Sequence[int]], np.ndarray]
"""`sample(captions, seeds) -> images_NHWC`, uint8."""


class Pair(NamedTuple):
    """Two images of one caption, uint8 [H, W, C], and which of them is better."""

    caption: str
    images: tuple[np.ndarray, np.ndarray]
    labels: tuple[float, float]
    """(1, 0) or (0, 1)."""
    model: str
    """The model that drew the images."""


def rendered_pairs(captions: Sequence[str], num_pairs: int) -> list[Pair]:
    """Return pairs whose first image shows the caption and whose second shows another one."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(num_pairs):
        right, wrong = rng.choice(captions, 2, replace=False).tolist()
        pairs.append(Pair(right, (world.render(right, rng), world.render(wrong, rng)), (1.0, 0.0), "world"))
    return pairs


def judged_pairs(sample: Sampler, captions: Sequence[str], seeds_per_caption: int, num_pairs: int) -> list[Pair]:
    """Return at most `num_pairs` pairs of samples that the judge scores unequally, in random order.

    Each caption is drawn `seeds_per_caption` times. No image is in two pairs, and the better image is first in about
    half of them.
    """
    rng = np.random.default_rng(0)
    drawn = [caption for caption in captions for _ in range(seeds_per_caption)]
    images_NHWC = sample(drawn, range(len(drawn)))
    scores_N = judge.score(images_NHWC, drawn)
    pairs = []
    for start in range(0, len(drawn), seeds_per_caption):
        for i, j in untied(scores_N[start : start + seeds_per_caption], rng):
            a, b = start + i, start + j
            labels = (float(scores_N[a] > scores_N[b]), float(scores_N[b] > scores_N[a]))
            pairs.append(Pair(drawn[a], (images_NHWC[a], images_NHWC[b]), labels, "base"))
    return [pairs[i] for i in rng.permutation(len(pairs))[:num_pairs]]


def untied(scores_N: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Return the indices of disjoint pairs of unequal score, chosen and ordered at random."""
    waiting: list[int] = []
    pairs = []
    for i in rng.permutation(len(scores_N)).tolist():
        partner = next((j for j in waiting if scores_N[j] != scores_N[i]), None)
        if partner is None:
            waiting.append(i)
        else:
            waiting.remove(partner)
            pairs.append((partner, i) if rng.random() < 0.5 else (i, partner))
    return pairs


def write(path: epath.PathLike, pairs: Sequence[Pair]) -> None:
    """Write a parquet file of the Pick-a-Pic schema with one pair per row.

    The images are stored losslessly as PNG, although the schema calls the columns jpg: readers look at the bytes.
    """
    columns: dict[str, list] = {
        "caption": [pair.caption for pair in pairs],
        "has_label": [True for _ in pairs],
        "are_different": [True for _ in pairs],
    }
    for side in (0, 1):
        encoded = [_png(pair.images[side]) for pair in pairs]
        columns[f"jpg_{side}"] = encoded
        columns[f"image_{side}_uid"] = [str(uuid.uuid5(uuid.NAMESPACE_OID, data.hex())) for data in encoded]
        columns[f"label_{side}"] = [pair.labels[side] for pair in pairs]
        columns[f"model_{side}"] = [pair.model for pair in pairs]
    columns["best_image_uid"] = [
        columns["image_0_uid" if pair.labels[0] else "image_1_uid"][row] for row, pair in enumerate(pairs)
    ]
    with writing(path) as file:
        pyarrow.parquet.write_table(pa.table(columns), file, compression="zstd")


def _png(image_HWC: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image_HWC).save(data, "PNG", optimize=True)
    return data.getvalue()
