"""The model families, as data: the only place that knows one Stable Diffusion from another by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from dpo_jax.models.unet_config import UNetConfig


class TextEncoder(NamedTuple):
    """One text encoder of a family: its folders, and which of its outputs the UNet attends to."""

    folder: str
    tokenizer: str
    context: str
    """The field of `clip.TextOutput` that becomes (a part of) `Conditioning.context_NLD`."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What a model folder does not say of itself."""

    name: str
    text_encoders: tuple[TextEncoder, ...]
    """In the order in which their contexts are concatenated."""
    num_time_ids: int = 0
    """Numbers of size conditioning: 6 = original size, crop, target size; 5 = original size, crop, aesthetic score;
    0 = neither time ids nor a pooled caption. The pooled caption is the last text encoder's."""
    training_timesteps: tuple[int, ...] | None = None
    """The timesteps it was trained on and samples at; None for all."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that the last timestep is pure noise, whatever scheduler_config.json says."""


CLIP_L_LAST = TextEncoder("text_encoder", "tokenizer", "last_hidden_NLD")
CLIP_L = TextEncoder("text_encoder", "tokenizer", "penultimate_NLD")
CLIP_BIG_G = TextEncoder("text_encoder_2", "tokenizer_2", "penultimate_NLD")

FAMILIES = {
    family.name: family
    for family in (
        Family("sd15", (CLIP_L_LAST,)),
        # Its text encoder was saved without its last layer, so this is the penultimate state of the original.
        Family("sd21", (CLIP_L_LAST,)),
        Family("sdxl", (CLIP_L, CLIP_BIG_G), num_time_ids=6),
        Family(
            "sdxl_turbo",
            (CLIP_L, CLIP_BIG_G),
            num_time_ids=6,
            training_timesteps=(249, 499, 749, 999),
            zero_terminal_snr=True,
        ),
        # Refines the last, nearly noiseless fifth of a trajectory (arXiv 2307.01952, section 2.5).
        Family("sdxl_refiner", (CLIP_BIG_G,), num_time_ids=5, training_timesteps=tuple(range(200))),
    )
}


def find_family(model_index: Mapping[str, Any], unet: UNetConfig, where: str, name: str | None = None) -> Family:
    """The family called `name`, or the one that the folder's contents point to.

    SDXL-Turbo has the contents of SDXL, so it is found by name only. Raises ValueError when the folder at `where`
    lacks what the family needs.
    """
    present = {folder for folder in ("text_encoder", "text_encoder_2") if has_component(model_index, folder)}
    if name is None:
        name = _guess(present, unet)
    if name not in FAMILIES:
        raise ValueError(f"unknown model family {name!r}, expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    needed = {encoder.folder for encoder in family.text_encoders}
    if present != needed:
        raise ValueError(f"{where}: {name} has the text encoders {sorted(needed)}, this folder has {sorted(present)}")
    if (family.num_time_ids > 0) != (unet.addition_embed_type == "text_time"):
        raise ValueError(
            f"{where}: {name} takes {family.num_time_ids} time ids, but the UNet's addition_embed_type is "
            f"{unet.addition_embed_type!r}"
        )
    return family


def has_component(model_index: Mapping[str, Any], name: str) -> bool:
    """Whether model_index.json lists the component; absent ones are written as [null, null]."""
    return (model_index.get(name) or [None])[0] is not None


def _guess(text_encoders: set[str], unet: UNetConfig) -> str:
    if text_encoders == {"text_encoder", "text_encoder_2"}:
        return "sdxl"
    if text_encoders == {"text_encoder_2"}:
        return "sdxl_refiner"
    return "sd21" if unet.use_linear_projection else "sd15"
