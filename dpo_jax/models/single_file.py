"""Tells what a single file of the original layout holds, and finds what belongs to it and lies elsewhere."""

import re
from collections.abc import Collection
from typing import Any

from etils import epath

from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.models.denoiser import DENOISER_PREFIX
from dpo_jax.models.families import FAMILIES, UNET, Family
from dpo_jax.weights.file_kinds import kind_of
from dpo_jax.weights.hub import find_model
from dpo_jax.weights.io import preferred_weights

VAE_PREFIXES = ("first_stage_model.", "vae.")
"""Prefixes of the VAE's names; SD3 and older models have the first one."""
# Patterns of the names of tensors that are there if a field of the denoiser's config is set.
_LAYERS_OF_FIELDS = {"guidance_embeds": r"\bguidance_(in|embedder)\."}
# Empty tensors by which descendants of SDXL tell web UIs that the whole model has another noise schedule or target.
V_PRED, ZERO_TERMINAL_SNR = "v_pred", "ztsnr"
_OTHER_SCHEDULES = {
    "edm_mean": "has the noise schedule of EDM",
    "edm_vpred.sigma_max": "has the noise schedule of EDM",
}


def family_of_single_file(names: Collection[str], where: str, name: str | None = None) -> Family:
    """Return the family called `name`, or the one that the tensor names of a single file match.

    SDXL-Turbo has the same tensors as SDXL, and Z-Image-Turbo those of Z-Image, so they are found by name only. A file
    of a transformer may lack text encoders; `absent_from_file` says which. Raises a UserError if the file at `where`
    holds something else or lacks something that the family needs.
    """
    if name is not None and name not in FAMILIES:
        raise UserError(f"unknown model family {name!r}, expected one of {', '.join(FAMILIES)}")
    present = {prefix for prefix in _ENCODER_PREFIXES if any(tensor.startswith(prefix) for tensor in names)}
    kind = kind_of(names)
    alike = [family for family in FAMILIES.values() if family.denoiser.kind == kind]
    if kind == UNET.kind and not (present and any(tensor.startswith(DENOISER_PREFIX) for tensor in names)):
        alike = []
        kind += (
            " without text encoders (give the model that it belongs to, and this file as --unet, or config.unet in "
            "training)"
        )
    if not alike:
        raise UserError(
            f"{where} holds {kind or 'tensors such as ' + ', '.join(sorted(names)[:3])}; a model that is one file must "
            "hold the UNet and the text encoders of Stable Diffusion 1, 2 or XL in the original layout, or the "
            "transformer of Stable Diffusion 3, FLUX.1 or Z-Image"
        )
    for sign, what in _OTHER_SCHEDULES.items():
        if sign in names:
            raise UserError(f"{where} holds a tensor {sign}, so it {what}, which is not supported")
    fitting = {family.name: family for family in alike if _fits(family, names, present)}
    if not fitting:
        raise UserError(f"{where} has the text encoders {sorted(present)}, which no supported family has together")
    name = name or next(iter(fitting))
    if name not in fitting:
        raise UserError(f"{where} holds a model of the family {' or '.join(fitting)}, not {name}; leave the family out")
    return fitting[name]


def absent_from_file(family: Family, names: Collection[str]) -> set[str]:
    """Return the networks of the family that a single file with tensors of these names lacks, by their folders."""
    prefixes: dict[str, tuple[str, ...]] = {"vae": VAE_PREFIXES}
    prefixes |= {encoder.folder: (encoder.original_prefix,) for encoder in family.text_encoders}
    return {folder for folder, own in prefixes.items() if not any(name.startswith(own) for name in names)}


def _fits(family: Family, names: Collection[str], encoders: Collection[str]) -> bool:
    """Return whether a file with tensors of these names, and text encoders with these prefixes, is of the family."""
    own = _original_prefixes(family)
    for field, layer in _LAYERS_OF_FIELDS.items():
        if family.config_fields.get(field) not in (None, any(re.search(layer, name) for name in names)):
            return False
    return own == set(encoders) if family.denoiser is UNET else own.issuperset(encoders)


def configs_of_file(path: epath.Path, family: Family, names: Collection[str], model_config: str) -> epath.Path:
    """Return the folder of the configs and tokenizers that belong to the single file at `path`.

    That is `model_config`, a folder or hub id, or else the published model.
    """
    if family.has_unlike_siblings and not model_config and V_PRED not in names:
        raise UserError(
            f"{path} is a file of the family {family.name}, and does not say what it predicts; set model_config "
            f"to {family.published} (768 pixels, velocity) or to {family.published}-base (512 pixels, noise)"
        )
    try:
        return find_model(model_config or family.version(names).published, weights=False)
    except OSError as error:
        raise MissingFileError(
            f"{path} has no configs and tokenizers; set model_config to a folder or hub id that has them ({error})"
        ) from error


def beside_file(
    path: epath.Path,
    family: Family,
    names: Collection[str],
    model_config: str,
    variant: str,
    *,
    given: Collection[str] = (),
) -> dict[str, epath.Path]:
    """Return the folders of the networks that a file lacks, by their names: those of the model with its configs.

    Those that are `given` are not looked for.

    Raises a UserError for a UNet's file, which has to hold everything but the VAE; MissingFileError if there are none.
    """
    absent = sorted(absent_from_file(family, names) - set(given))
    if not absent:
        return {}
    if family.denoiser is UNET:
        raise UserError(f"{path} has no VAE; give one as --vae (config.vae in training): a folder, file or hub id")
    model = model_config or family.version(names).published
    advice = f"set model_config to a folder or hub id of a whole model of the family {family.name}"
    try:
        folder = find_model(model, only=absent, variant=variant)
    except OSError as error:
        raise MissingFileError(f"{path} holds no {' and no '.join(absent)}; {advice} ({error})") from error
    for name in absent:
        held = {file.name for file in (folder / name).iterdir()} if (folder / name).is_dir() else set()
        if preferred_weights(held, variant) is None:
            raise MissingFileError(f"{path} holds no {name}, and there are no weights in {folder / name}; {advice}")
    return {name: folder / name for name in absent}


def with_marks(config: dict[str, Any], names: Collection[str], path: str, named: str) -> dict[str, Any]:
    """Return the scheduler's config with the settings that the empty tensors of a single file state.

    These tensors, V_PRED and ZERO_TERMINAL_SNR, override the published model's config. Raises a UserError if they
    contradict the config that the user `named`.
    """
    said: dict[str, Any] = {}
    if V_PRED in names:
        said["prediction_type"] = "v_prediction"
    if ZERO_TERMINAL_SNR in names:
        said["rescale_betas_zero_snr"] = True
    for field, value in said.items():
        if named and config.get(field, value) != value:
            mark = V_PRED if field == "prediction_type" else ZERO_TERMINAL_SNR
            raise UserError(
                f"{path} holds the tensor {mark}, which says {field}={value!r}, but {named} says {config[field]!r}; "
                "take the configs that belong to this model, or correct that file"
            )
    if "rescale_betas_zero_snr" in said and (not named or "timestep_spacing" not in config):
        said["timestep_spacing"] = "trailing"  # sampling has to begin in pure noise, as training did
    return config | said


def _original_prefixes(family: Family) -> set[str]:
    return {encoder.original_prefix for encoder in family.text_encoders}


_ENCODER_PREFIXES = set().union(*map(_original_prefixes, FAMILIES.values()))
