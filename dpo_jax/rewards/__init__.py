"""Judges score how well an image suits its caption; a higher score is better.

`JUDGES` lists the kinds of judges, and `open_judge` opens one. Importing this module is cheap: JAX and the networks are
imported by the judges that need them.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dpo_jax.errors import UserError

if TYPE_CHECKING:
    from dpo_jax.sharding import Placement

Images = Sequence[np.ndarray] | np.ndarray
"""uint8 images [H, W, 3], of any sizes."""
Reward = Callable[[Images, Sequence[str]], np.ndarray]
"""A function (images, one caption per image) -> scores_N."""


class Judge(NamedTuple):
    """An open judge, ready to score."""

    name: str
    score: Reward
    """(uint8 images [H, W, 3] of any sizes, one caption per image) -> float32 scores [N].

    Raises UserError if it cannot judge an image or a caption, EnvironmentFault if it cannot judge at all."""
    is_outside: bool = False
    """Whether it runs outside of JAX; it may be random and cost money, so one process can ask it for all."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an open judge computes."""

    dtype: str = "float32"
    """The dtype of a network's weights and computation: float32, or bfloat16, which needs half the memory."""
    batch_size: int = 32
    """Images per batch of a network; rounded up to a multiple of the parts that the mesh splits a batch into."""
    placement: "Placement | None" = None
    """How weights are distributed. By default every device has all of them and scores a part of the images."""
    timeout: float = 600.0
    """Seconds after which a call of an outside judge fails."""


class JudgeKind(NamedTuple):
    """An entry of `JUDGES`: a judge that can be opened."""

    open: Callable[[str, Settings], Reward]
    """(what follows NAME= in the spec, or the default) -> the function that scores; raises as `open_judge`."""
    help: str
    """One line for --help."""
    needs: str = ""
    """What must follow NAME=, if anything."""
    default: str = ""
    """The hub id that is used if nothing follows; only where the published files can be read as they are."""
    is_outside: bool = False
    """See `Judge.is_outside`."""
    packages: tuple[str, ...] = ()
    """Packages that it imports and that dpo_jax does not install by itself."""
    extra: str = ""
    """The extra of dpo_jax that installs them."""


def open_judge(
    spec: str,
    *,
    dtype: str = Settings.dtype,
    batch_size: int = Settings.batch_size,
    placement: "Placement | None" = None,
    timeout: float = Settings.timeout,
) -> Judge:
    """Open the judge of a spec: `NAME` or `NAME=SOURCE`.

    SOURCE is a folder, a file or a hub id for a network (`pickscore=models/PickScore_v1`), `module:function` for
    `python`, a command line for `command`, and a URL for `http`. The other arguments are those of `Settings`.

    Raises UserError where there is no such judge, or it lacks what it needs.
    """
    name, source = find_judge(spec)
    kind = JUDGES[name]
    score = kind.open(source, Settings(dtype, batch_size, placement, timeout))

    def checked(images: Images, captions: Sequence[str]) -> np.ndarray:
        _check(name, images, captions)
        scores = np.asarray(score(images, captions), np.float32) if len(captions) else np.zeros(0, np.float32)
        odd = np.flatnonzero(~np.isfinite(scores))
        if odd.size:
            more = f" and {odd.size - 1} more images" if odd.size > 1 else ""
            raise UserError(
                f"the judge {name} gave the score {scores[odd[0]]} to an image of {captions[odd[0]]!r}{more}; scores "
                "must be finite, so check its weights or use float32"
            )
        return scores

    return Judge(name, checked, kind.is_outside)


def find_judge(spec: str) -> tuple[str, str]:
    """Return the name of a spec's judge and its source.

    Raises UserError where there is no such judge, or it lacks a source or a package.
    """
    name, separator, source = spec.partition("=")
    if name not in JUDGES:
        raise UserError(f"there is no judge {name!r}; choose one of {', '.join(JUDGES)}")
    kind = JUDGES[name]
    if separator and not kind.needs:
        raise UserError(f"the judge {spec!r} takes nothing after its name; write {name}")
    if kind.needs and not source and not kind.default:
        raise UserError(f"the judge {name} needs {kind.needs}; write {name}=...")
    missing = [package for package in kind.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"the judge {name} needs packages that are not installed; run pip install {' '.join(missing)}, or install "
            f"dpo_jax with its extra {kind.extra}"
        )
    return name, source or kind.default


def _check(name: str, images: Images, captions: Sequence[str]) -> None:
    if len(images) != len(captions):
        raise UserError(f"there are {len(images)} images but {len(captions)} captions; give one caption per image")
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise UserError(f"the judge {name} reads uint8 images [H, W, 3], not {image.dtype} {list(image.shape)}")


def _from(module: str, opens: str) -> Callable[[str, Settings], Reward]:
    """Return the function of a module that opens a judge; the module is imported when the function is called."""

    def open_it(source: str, settings: Settings) -> Reward:
        found: Any = importlib.import_module(f"dpo_jax.{module}")
        return getattr(found, opens)(source, settings)

    return open_it


JUDGES = {
    "shapes": JudgeKind(
        _from("tiny.judge", "open_shapes"), "the exact judge of the tiny world; images must have 32 x 32 pixels"
    ),
    "clipscore": JudgeKind(
        _from("rewards.clip_judges", "open_clipscore"),
        "CLIPScore: 100 x the cosine of CLIP's image and text features, at least 0",
        "a CLIP in transformers' layout",
        "openai/clip-vit-large-patch14",
    ),
    "pickscore": JudgeKind(
        _from("rewards.clip_judges", "open_pickscore"),
        "PickScore: a CLIP trained on the votes of Pick-a-Pic",
        "a CLIP in transformers' layout",
        "yuvalkirstain/PickScore_v1",
    ),
    "hpsv2": JudgeKind(
        _from("rewards.clip_judges", "open_hps"),
        "HPSv2: a CLIP trained on the votes of HPDv2",
        "HPS_v2_compressed.pt of xswu/HPSv2 on the hub, converted to .safetensors",
    ),
    "hpsv2.1": JudgeKind(
        _from("rewards.clip_judges", "open_hps"),
        "HPSv2.1: HPSv2 trained on better data",
        "HPS_v2.1_compressed.pt of xswu/HPSv2 on the hub, converted to .safetensors",
    ),
    "imagereward": JudgeKind(
        _from("rewards.image_reward", "open_image_reward"),
        "ImageReward: a BLIP trained on rankings by experts",
        "ImageReward.pt of THUDM/ImageReward on the hub, converted to .safetensors",
    ),
    "aesthetic": JudgeKind(
        _from("rewards.clip_judges", "open_aesthetic"),
        "LAION's aesthetic predictor v2, from 1 to 10; it ignores the caption",
        "sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor, converted to "
        ".safetensors",
    ),
    "implicit": JudgeKind(
        _from("rewards.implicit", "open_implicit"),
        "the implicit reward of a tuned model: how much better it denoises the image than its reference does",
        "two models, implicit=TUNED:REFERENCE",
    ),
    "geneval": JudgeKind(
        _from("rewards.geneval_judge", "open_geneval"),
        "GenEval: 1 if the image shows the objects, numbers, colours and positions that its prompt asks for, else 0",
        "GenEval's evaluation_metadata.jsonl, or METADATA:DETECTOR:CLIP",
        is_outside=True,
        packages=("torch",),
        extra="torch",
    ),
    "geneval_partial": JudgeKind(
        _from("rewards.geneval_judge", "open_geneval_partial"),
        "the reward of Flow-GRPO's GenEval task: the share of what the prompt asks for",
        "GenEval's evaluation_metadata.jsonl, or METADATA:DETECTOR:CLIP",
        is_outside=True,
        packages=("torch",),
        extra="torch",
    ),
    "ocr": JudgeKind(
        _from("rewards.ocr", "open_ocr"),
        "accuracy of rendered text, from 0 to 1: how much of the text quoted in the caption can be read in the image",
        is_outside=True,
        packages=("rapidocr", "onnxruntime", "rapidfuzz"),
        extra="ocr",
    ),
    "jpeg_compressibility": JudgeKind(
        _from("rewards.jpeg", "open_compressibility"), "minus the size in kB of the image as a JPEG of quality 95"
    ),
    "jpeg_incompressibility": JudgeKind(
        _from("rewards.jpeg", "open_incompressibility"), "the size in kB of the image as a JPEG of quality 95"
    ),
    "python": JudgeKind(
        _from("rewards.outside", "open_function"),
        "your own Python function: it gets a list of images and a list of captions, and returns one number per image",
        "a function in the working directory or the environment, module:function",
        is_outside=True,
    ),
    "command": JudgeKind(
        _from("rewards.outside", "open_command"),
        "your own command: it reads lines of JSON with image files and captions, and prints one score per line",
        "a command line",
        is_outside=True,
    ),
    "http": JudgeKind(
        _from("rewards.outside", "open_http"),
        "your own HTTP endpoint: it gets images and captions, and answers with scores",
        "a URL",
        is_outside=True,
    ),
}
