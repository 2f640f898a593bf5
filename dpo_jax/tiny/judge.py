"""The exact judge of the tiny world: it reads shape, colour and place from the pixels, and nothing in it is learned.

It separates the object from the background by colour. It then compares the object's outline with every drawing that the
world can make, and the object's average colour with every colour that has a name.

Axes: N images, H x W pixels, C colour channels, M possible drawings.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.errors import UserError
from dpo_jax.tiny import world

MIN_CONTRAST = 60.0  # an object differs from the background by at least this much (Euclidean distance of RGB)
MIN_MATCH = 0.9  # cosine of an object's outline with the best drawing, below which its shape has no name
MAX_COLOUR_DISTANCE = 90.0  # Euclidean distance of RGB beyond which a colour has no name
MAX_PLACE_DISTANCE = 4.0  # pixels, in each direction, beyond which a place has no name


class Reading(NamedTuple):
    """What an image shows; None for what has no name in this world."""

    shape: str | None
    colour: str | None
    place: str | None


def open_shapes(source: str, settings: object) -> Callable[[Sequence[np.ndarray], Sequence[str]], np.ndarray]:
    """Open the judge, as `dpo_jax.rewards.JUDGES` does; it needs no files and ignores the settings."""

    def reward(images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
        for image in images:  # before they are stacked, which takes one size
            _check(image[None])
        return score(np.stack(list(images)), captions)

    return reward


def score(images_NHWC: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Return the share of a caption's shape, colour and place that its image shows: float32 [N] of 0, 1/3, 2/3, 1."""
    readings = read(images_NHWC)
    if len(readings) != len(captions):
        raise UserError(f"there are {len(readings)} images but {len(captions)} captions; give one caption per image")
    wanted = [world.parse(caption) for caption in captions]
    points_N3 = [[a == b for a, b in zip(seen, want, strict=True)] for seen, want in zip(readings, wanted, strict=True)]
    return np.asarray(points_N3, np.float32).reshape(-1, 3).mean(axis=1)


def read(images_NHWC: np.ndarray) -> list[Reading]:
    """Return shape, colour and place of the object in each uint8 image [32, 32, 3]."""
    images_NHWC = np.asarray(images_NHWC)
    _check(images_NHWC)
    drawings_MP, shapes_M, centres_M2 = _drawings()
    colours = np.asarray(list(world.COLOURS.values()), np.float64)
    places = np.asarray(list(world.PLACES.values()), np.float64)
    pixels_NHWC = images_NHWC.astype(np.float32)
    edges = [pixels_NHWC[:, 0], pixels_NHWC[:, -1], pixels_NHWC[:, :, 0], pixels_NHWC[:, :, -1]]
    background_NC = np.median(np.concatenate(edges, axis=1), axis=1)
    difference_NHW = np.linalg.norm(pixels_NHWC - background_NC[:, None, None], axis=-1)
    contrast_N = np.quantile(difference_NHW, 0.97, axis=(1, 2))
    cover_NHW = (difference_NHW / np.maximum(contrast_N, MIN_CONTRAST)[:, None, None]).clip(0, 1)
    cover_NHW[cover_NHW < 0.2] = 0
    match_NM = cover_NHW.reshape(-1, world.SIZE**2) @ drawings_MP.T

    readings = []
    for image_HWC, cover_HW, contrast, match_M in zip(pixels_NHWC, cover_NHW, contrast_N, match_NM, strict=True):
        if contrast < MIN_CONTRAST:
            readings.append(Reading(None, None, None))
            continue
        best = int(match_M.argmax())
        is_named = match_M[best] > MIN_MATCH * np.linalg.norm(cover_HW)
        colour_distance = np.linalg.norm(colours - image_HWC[cover_HW > 0.8].mean(axis=0), axis=1)
        place_distance = abs(places - centres_M2[best]).max(axis=1)
        readings.append(
            Reading(
                shapes_M[best] if is_named else None,
                _nearest(list(world.COLOURS), colour_distance, MAX_COLOUR_DISTANCE),
                _nearest(list(world.PLACES), place_distance, MAX_PLACE_DISTANCE),
            )
        )
    return readings


def _check(images_NHWC: np.ndarray) -> None:
    if images_NHWC.dtype != np.uint8 or images_NHWC.shape[1:] != (world.SIZE, world.SIZE, 3):
        raise UserError(
            f"the shapes judge reads uint8 images [N, {world.SIZE}, {world.SIZE}, 3], "
            f"not {images_NHWC.dtype} {list(images_NHWC.shape)}"
        )


def _nearest(names: list[str], distances: np.ndarray, limit: float) -> str | None:
    return names[distances.argmin()] if distances.min() <= limit else None


@functools.cache
def _drawings() -> tuple[np.ndarray, list[str], np.ndarray]:
    """Return outlines_MP of every shape at every pixel and in three sizes, of norm 1, with their shapes and centres."""
    centres = [(down, right) for down in range(4, world.SIZE - 3) for right in range(4, world.SIZE - 3)]
    kinds = [(s, c, r) for s in world.SHAPES for r in np.linspace(*world.RADII, 3) for c in centres]
    drawings_MP = np.stack([world.draw(*kind).ravel() for kind in kinds]).astype(np.float32)
    drawings_MP /= np.linalg.norm(drawings_MP, axis=1, keepdims=True)
    return drawings_MP, [kind[0] for kind in kinds], np.asarray([kind[1] for kind in kinds], np.float64)
