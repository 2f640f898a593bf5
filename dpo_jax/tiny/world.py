"""A world small enough to learn in minutes: one coloured shape in one quarter of a 32 x 32 image, and its caption.

Axes: H x W pixels, C colour channels, M drawings.
"""

import itertools

import numpy as np

from dpo_jax.errors import UserError

SIZE = 32
COLOURS = {
    "red": (210, 35, 40),
    "green": (35, 150, 60),
    "blue": (40, 75, 215),
    "yellow": (235, 205, 35),
    "purple": (145, 50, 180),
    "black": (25, 25, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {"top left": (8, 8), "top right": (8, 24), "bottom left": (24, 8), "bottom right": (24, 24)}
"""Centre of each place in pixels from the top left corner: (down, right)."""

JITTER = 1.5  # largest distance of a shape's centre from its place's centre, in pixels and in each direction
RADII = (5.2, 6.4)  # smallest and largest radius of a shape, in pixels
BACKGROUNDS = (200, 245)  # darkest and brightest grey behind a shape
NOISE = 3.0  # standard deviation of the noise on every pixel, in grey levels


def captions() -> list[str]:
    """Return every caption of this world in a fixed order, beginning with `a red circle at the top left`."""
    return [f"a {colour} {shape} at the {place}" for colour, shape, place in itertools.product(COLOURS, SHAPES, PLACES)]


def split() -> tuple[list[str], list[str]]:
    """Return the captions to train on (70%) and those held out (30%); they are always the same."""
    shuffled = np.random.default_rng(0).permutation(captions()).tolist()
    num_train = int(0.7 * len(shuffled))
    return shuffled[:num_train], shuffled[num_train:]


def parse(caption: str) -> tuple[str, str, str]:
    """Return the (shape, colour, place) that a caption names; raises UserError for other captions."""
    words = caption.lower().split()
    try:
        [shape] = set(words) & set(SHAPES)
        [colour] = set(words) & set(COLOURS)
        [place] = [place for place in PLACES if place in " ".join(words)]
    except ValueError:
        raise UserError(
            f"the caption {caption!r} is not of the tiny world; it must name one shape of {SHAPES}, one colour of "
            f"{tuple(COLOURS)} and one place of {tuple(PLACES)}"
        ) from None
    return shape, colour, place


def draw(shape: str, centre: tuple[float, float], radius: float) -> np.ndarray:
    """Return the share of each pixel that the shape covers, float [H, W] from 0 to 1, from 4 x 4 samples per pixel."""
    samples = (np.arange(4 * SIZE) + 0.5) / 4
    y, x = samples[:, None] - centre[0], samples[None, :] - centre[1]
    if shape == "circle":
        inside = y**2 + x**2 < radius**2
    elif shape == "square":
        inside = np.maximum(abs(y), abs(x)) < 0.85 * radius
    elif shape == "triangle":  # pointing up, as wide as it is high
        inside = (abs(x) < (y + radius) / 2) & (y < radius)
    elif shape == "cross":
        inside = (np.minimum(abs(y), abs(x)) < 0.33 * radius) & (np.maximum(abs(y), abs(x)) < 1.1 * radius)
    else:
        raise UserError(f"unknown shape {shape!r}: choose one of {SHAPES}")
    return inside.reshape(SIZE, 4, SIZE, 4).mean(axis=(1, 3))


def render(caption: str, rng: np.random.Generator) -> np.ndarray:
    """Return an image of the caption, uint8 [H, W, C]; place, radius, grey and noise vary with `rng`."""
    shape, colour, place = parse(caption)
    down, right = PLACES[place] + rng.uniform(-JITTER, JITTER, 2)
    cover_HW1 = draw(shape, (down, right), rng.uniform(*RADII))[..., None]
    image_HWC = cover_HW1 * COLOURS[colour] + (1 - cover_HW1) * rng.uniform(*BACKGROUNDS)
    image_HWC = image_HWC + rng.normal(0, NOISE, image_HWC.shape)
    return image_HWC.round().clip(0, 255).astype(np.uint8)
