"""Aspect-ratio buckets: the shapes that images are cropped to in place of a square, and the shape of each record.

All candidates of a record share the shape that crops the least of them, and all records of a batch share theirs.

Axes: S shapes, N records, M candidates of all records together.
"""

from collections.abc import Sequence

import numpy as np

from dpo_jax.data.images import Shape
from dpo_jax.errors import UserError

BASE = 1024
"""Side of the square of the published lists."""
# The shapes that SDXL was trained on (arXiv 2307.01952, appendix I). Only one of them has no counterpart on its side.
SDXL: tuple[Shape, ...] = (
    *((512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600)),
    *((640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152)),
    *((896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896)),
    *((1152, 896), (1152, 832), (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640)),
    *((1600, 640), (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512)),
)
# The shapes that FLUX.1 Kontext was trained on: PREFERRED_KONTEXT_RESOLUTIONS of diffusers' pipeline_flux_kontext.py.
# Black Forest Labs published none for FLUX.1-dev, which takes any multiples of 16 pixels.
_FLUX_WIDE = ((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104))
FLUX: tuple[Shape, ...] = (*_FLUX_WIDE, (1024, 1024), *((width, height) for height, width in reversed(_FLUX_WIDE)))
PUBLISHED = {"sdxl": SDXL, "flux": FLUX}
NAMES = (*PUBLISHED, "data")

STEP = 64
"""Step of the sides of `data`, in pixels: the one of github.com/NovelAI/novelai-aspect-ratio-bucketing."""
STEPS_A_SIDE = 8
"""Least number of steps in the side of the square: smaller resolutions have smaller steps."""
MAX_RATIO = 2
"""Largest ratio of the sides of `data`."""
LEAST_AREA = 0.9
"""Least area of a shape of `data`, as a share of the area of the square."""


def list_shapes(name: str, resolution: int, multiple: int) -> list[Shape]:
    """Return all shapes of a list at a resolution, from the widest to the tallest.

    Their areas are those of the square of `resolution`, or somewhat smaller; FLUX's are up to 1.3% larger.

    Args:
        name: one of `NAMES`.
        resolution: side of the square in pixels.
        multiple: number of pixels of which both sides must be multiples.
    """
    if resolution < multiple:
        raise UserError(
            f"config.data.resolution={resolution} is too small for buckets: this model takes multiples of {multiple} "
            f"pixels; set data.resolution to {multiple} or more"
        )
    if name in PUBLISHED:
        shapes = {_scaled(shape, resolution, multiple) for shape in PUBLISHED[name]}
    else:
        step = max(multiple, min(STEP, resolution // STEPS_A_SIDE) // multiple * multiple)
        square = resolution // multiple * multiple
        shapes = {(square, square), *_stepped(resolution, step)}
    return sorted(shapes, key=lambda shape: (shape[0] / shape[1], shape))


def _scaled(shape: Shape, resolution: int, multiple: int) -> Shape:
    """Return a published shape at another resolution, rounded to multiples."""
    height, width = (max(1, round(side * resolution / BASE / multiple)) * multiple for side in shape)
    while height * width * BASE**2 > max(shape[0] * shape[1], BASE**2) * resolution**2:  # they were rounded up
        height, width = (height - multiple, width) if height > width else (height, width - multiple)
    return height, width


def _stepped(resolution: int, step: int) -> list[Shape]:
    """Return for each side the longest other side with at most the area of the square and at most `MAX_RATIO`."""
    shapes = []
    for shorter in range(step, resolution + 1, step):
        longer = min(resolution**2 // shorter, MAX_RATIO * shorter) // step * step
        if shorter * longer >= LEAST_AREA * resolution**2:
            shapes += [(shorter, longer), (longer, shorter)]
    return shapes


def share_cropped(shape: Shape, sizes_M2: np.ndarray) -> np.ndarray:
    """Return the share of each image, of (height, width), that is cut away where it is cropped to a shape."""
    ratio_M = sizes_M2[:, 0] * shape[1] / (sizes_M2[:, 1] * shape[0])
    return 1 - np.minimum(ratio_M, 1 / ratio_M)


def nearest(shapes: Sequence[Shape], sizes_M2: np.ndarray, record_M: np.ndarray) -> np.ndarray:
    """Return for each record the number of the shape that crops the smallest share of its images, the first of several.

    Args:
        shapes: the shapes to choose from.
        sizes_M2: (height, width) of each candidate.
        record_M: the record of each candidate, ascending from 0.
    """
    count = int(record_M[-1]) + 1 if len(record_M) else 0
    bucket_N, least_N = np.zeros(count, int), np.full(count, np.inf)
    for number, shape in enumerate(shapes):
        # Rounded, so that neither the order of candidates nor their sum's rounding decides between equal shapes.
        cropped_N = np.round(np.bincount(record_M, share_cropped(shape, sizes_M2), count), 9)
        bucket_N[cropped_N < least_N] = number
        least_N = np.minimum(least_N, cropped_N)
    return bucket_N


def used_shapes(shapes: Sequence[Shape], sizes_M2: np.ndarray, record_M: np.ndarray, least: float) -> list[Shape]:
    """Return the shapes to train on: the one with the fewest records is left out until each has at least `least`.

    The records of a shape that is left out then count for the next best. One shape always remains.
    """
    opened = list(shapes)
    bucket_N = nearest(opened, sizes_M2, record_M)
    while len(opened) > 1:
        counts = np.bincount(bucket_N, minlength=len(opened))
        closed = int(counts.argmin())
        if counts[closed] >= least:
            break
        del opened[closed]
        moves_N = bucket_N == closed
        bucket_N[bucket_N > closed] -= 1
        if moves_N.any():
            moves_M = moves_N[record_M]
            bucket_N[moves_N] = nearest(opened, sizes_M2[moves_M], (np.cumsum(moves_N) - 1)[record_M[moves_M]])
    return opened


PATTERN = r"^[1-9]\d{0,4}x[1-9]\d{0,4}( [1-9]\d{0,4}x[1-9]\d{0,4})*$"
"""Regular expression for the shapes that `parse` reads."""


def parse(text: str) -> list[Shape]:
    """Return the shapes of a string such as "1216x832 832x1216"."""
    sides = [each.split("x") for each in text.split(" ")]
    return [(int(height), int(width)) for width, height in sides]


def shown(shape: Shape) -> str:
    """Return a shape as people write it: width x height."""
    return f"{shape[1]}x{shape[0]}"
