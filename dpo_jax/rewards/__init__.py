"""Judges of images. Each scores how well an image suits its caption, higher is better.

`JUDGES` is the table of them, `open_judge` the way to one. Importing this module is cheap: JAX and the networks come
with the judge that needs them.
"""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dpo_jax.errors import UserError

if TYPE_CHECKING:
    from dpo_jax.sharding import Placement

Images = Sequence[np.ndarray] | np.ndarray
Reward = Callable[[Images, Sequence[str]], np.ndarray]


class Judge(NamedTuple):
    """What compares images in place of people: an opened judge."""

    name: str
    score: Reward
    """(uint8 images [H, W, 3] of any sizes, a caption for each) -> float32 [N].

    Raises ValueError with the reason if it can't judge an image or a caption, OSError if it can't judge at all."""
    is_outside: bool = False
    """Whether one process can ask it for all, which may be dear."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an opened judge works."""

    dtype: str = "float32"
    """Of a network's weights and computation: float32, or bfloat16 with half the memory."""
    batch_size: int = 32
    """Images that go through a network at a time; rounded up to a multiple of what the mesh splits it into."""
    placement: "Placement | None" = None
    """Where a network's weights lie; by default each device has them all and takes its part of the images."""
    timeout: float = 600.0
    """Seconds that an outside judge has for each call."""


class JudgeKind(NamedTuple):
    """A line of the table."""

    open: Callable[[str, Settings], Reward]
    """(what follows NAME= in the spec, or the default) -> the function that scores; raises as `open_judge`."""
    help: str
    needs: str = ""
    """What is to follow NAME=, if anything."""
    default: str = ""
    """The hub id that is taken if nothing follows, where the published files can be read as they are."""
    is_outside: bool = False
    """Whether it is no part of dpo_jax, and knows nothing of its devices and processes."""


def open_judge(
    spec: str,
    *,
    dtype: str = Settings.dtype,
    batch_size: int = Settings.batch_size,
    placement: "Placement | None" = None,
    timeout: float = Settings.timeout,
) -> Judge:
    """Opens the judge of a spec: `NAME`, or `NAME=` and what it is opened from.

    That is a folder, a file or a hub id for a network (`pickscore=models/PickScore_v1`), `module:function` for
    `python`, a command line for `command`, an address for `http`. The other arguments are the `Settings`.

    Raises:
        ValueError, FileNotFoundError: there is no such judge, or not what it needs.
    """
    name, source = find_judge(spec)
    judge = JUDGES[name]
    score = judge.open(source, Settings(dtype, batch_size, placement, timeout))

    def checked(images: Images, captions: Sequence[str]) -> np.ndarray:
        _check(name, images, captions)
        scores = np.asarray(score(images, captions), np.float32) if len(captions) else np.zeros(0, np.float32)
        odd = np.flatnonzero(~np.isfinite(scores))
        if odd.size:
            more = f" and {odd.size - 1} more images" if odd.size > 1 else ""
            raise UserError(
                f"the judge {name} gave the score {scores[odd[0]]} to an image of {captions[odd[0]]!r}{more}, which "
                "can't be compared with others; its weights or its dtype may be to blame"
            )
        return scores

    return Judge(name, checked, judge.is_outside)


def find_judge(spec: str) -> tuple[str, str]:
    """The name of a spec's judge and what it is opened from; ValueError where there is no such judge."""
    name, separator, source = spec.partition("=")
    if name not in JUDGES:
        raise UserError(f"there is no judge {name!r}; those that come with dpo_jax are {', '.join(JUDGES)}")
    judge = JUDGES[name]
    if separator and not judge.needs:
        raise UserError(f"the judge {name} is opened by its name alone, not by {spec!r}")
    if judge.needs and not source and not judge.default:
        raise UserError(f"the judge {name} needs {judge.needs}: {name}=...")
    return name, source or judge.default


def _check(name: str, images: Images, captions: Sequence[str]) -> None:
    if len(images) != len(captions):
        raise UserError(f"{len(images)} images but {len(captions)} captions: give one caption an image")
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise UserError(f"the judge {name} looks at uint8 images [H, W, 3], not {image.dtype} {list(image.shape)}")


def _from(module: str, opens: str) -> Callable[[str, Settings], Reward]:
    """The function that opens a judge, in a module that is imported when it is called."""

    def open_it(source: str, settings: Settings) -> Reward:
        found: Any = importlib.import_module(f"dpo_jax.{module}")
        return getattr(found, opens)(source, settings)

    return open_it


JUDGES = {
    "shapes": JudgeKind(
        _from("tiny.judge", "open_shapes"), "the exact judge of the tiny world, whose images have 32 x 32 pixels"
    ),
    "clipscore": JudgeKind(
        _from("rewards.clip_judges", "open_clipscore"),
        "100 x the cosine of CLIP's features of image and caption, at least 0",
        "a CLIP in transformers' layout",
        "openai/clip-vit-large-patch14",
    ),
    "pickscore": JudgeKind(
        _from("rewards.clip_judges", "open_pickscore"),
        "PickScore: a CLIP tuned on the votes of Pick-a-Pic",
        "a CLIP in transformers' layout",
        "yuvalkirstain/PickScore_v1",
    ),
    "hpsv2": JudgeKind(
        _from("rewards.clip_judges", "open_hps"),
        "HPSv2: a CLIP tuned on the votes of HPDv2",
        "HPS_v2_compressed.pt of xswu/HPSv2 on the hub, converted to .safetensors",
    ),
    "hpsv2.1": JudgeKind(
        _from("rewards.clip_judges", "open_hps"),
        "HPSv2.1: the same, on better data",
        "HPS_v2.1_compressed.pt of xswu/HPSv2 on the hub, converted to .safetensors",
    ),
    "imagereward": JudgeKind(
        _from("rewards.image_reward", "open_image_reward"),
        "ImageReward: a BLIP trained on experts' rankings",
        "ImageReward.pt of THUDM/ImageReward on the hub, converted to .safetensors",
    ),
    "aesthetic": JudgeKind(
        _from("rewards.clip_judges", "open_aesthetic"),
        "LAION's aesthetic predictor v2, from 1 to 10; it reads no caption",
        "sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor, converted to "
        ".safetensors",
    ),
    "implicit": JudgeKind(
        _from("rewards.implicit", "open_implicit"),
        "the implicit reward of a model that was tuned by preferences: how much better it denoises than its reference",
        "two models, as in implicit=TUNED:REFERENCE",
    ),
    "jpeg_compressibility": JudgeKind(
        _from("rewards.jpeg", "open_compressibility"), "minus the kilobytes of the image as a JPEG of quality 95"
    ),
    "jpeg_incompressibility": JudgeKind(
        _from("rewards.jpeg", "open_incompressibility"), "the kilobytes of the image as a JPEG of quality 95"
    ),
    "python": JudgeKind(
        _from("rewards.outside", "open_function"),
        "your own: a Python function, called with a list of images and one of captions, that returns a number each",
        "a function of the working directory or the environment, module:function",
        is_outside=True,
    ),
    "command": JudgeKind(
        _from("rewards.outside", "open_command"),
        "your own: a command that reads lines of JSON with image files and captions, and prints a score for each",
        "a command line",
        is_outside=True,
    ),
    "http": JudgeKind(
        _from("rewards.outside", "open_http"),
        "your own: an HTTP endpoint that answers images and captions with scores",
        "an address",
        is_outside=True,
    ),
}
