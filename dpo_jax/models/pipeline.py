"""A diffusers model folder, opened: every network built from its config.json, no weight read yet."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.typing import DTypeLike

from dpo_jax.batch import Conditioning
from dpo_jax.diffusion.schedule import Schedule, make_schedule
from dpo_jax.models.clip import CLIPTextConfig, CLIPTextModel
from dpo_jax.models.families import Family, find_family, has_component
from dpo_jax.models.network import Network
from dpo_jax.models.unet import UNet2DConditionModel
from dpo_jax.models.unet_config import UNetConfig
from dpo_jax.models.vae import AutoencoderKL, VAEConfig
from dpo_jax.weights.io import LEGACY_FLAX, Sharding, fingerprint, load_params, new_folder, save_component
from dpo_jax.weights.layout import Params


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The networks of one model folder and how they fit together; their parameters come from `load`."""

    folder: epath.Path
    family: Family
    unet: Network
    vae: Network
    text_encoders: tuple[Network, ...]
    schedule: Schedule
    """What training noises by."""
    sampling_schedule: Schedule
    """What sampling follows: the same but for Turbo, whose training rescales the schedule to end in pure noise."""
    force_zeros_for_empty_prompt: bool
    """SDXL: an empty caption is embedded as zeros, not by the text encoders."""
    dtype: jnp.dtype
    """Compute dtype of UNet and text encoders."""

    def denoise(self, unet_params: Params, x_NHWC: jax.Array, t_N: jax.Array, conditioning: Conditioning) -> jax.Array:
        """The UNet's prediction [N, H, W, C] in the compute dtype.

        All weights are rounded to the compute dtype first, also those of the norms, which are then used in float32: a
        policy's float32 masters must compute exactly what a reference stored in bfloat16 does.
        """
        rounded = {name: value.astype(self.dtype) for name, value in unet_params.items()}
        return self.unet(rounded, x_NHWC, t_N, conditioning)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell, along each axis."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def tokenizer_names(self) -> tuple[str, ...]:
        """Subfolders of the tokenizers, one per text encoder."""
        return tuple(encoder.tokenizer for encoder in self.family.text_encoders)

    @property
    def components(self) -> dict[str, Network]:
        """Every network by the name of its folder."""
        names = [encoder.folder for encoder in self.family.text_encoders]
        return {"unet": self.unet, "vae": self.vae, **dict(zip(names, self.text_encoders, strict=True))}

    def load(self, component: str, *, dtype: DTypeLike, sharding: Sharding | None = None) -> Params:
        """The parameters of one component; see `weights.io.load_params`."""
        specs = self.components[component].specs
        return load_params(self.folder / component, specs, dtype=dtype, sharding=sharding)

    def fingerprint(self) -> str:
        """A digest of all its weights, to tell later that this is still the same model."""
        return "-".join(fingerprint(self.folder / component)[:16] for component in self.components)


def load_pipeline(
    folder: epath.PathLike, *, dtype: DTypeLike, vae_dtype: DTypeLike | None = None, family: str | None = None
) -> Pipeline:
    """Reads the configs of a diffusers model folder and builds its networks, computing in `dtype` (VAE: `vae_dtype`).

    No weight is read and no memory allocated. `family` names one of `families.FAMILIES` where the contents can't tell
    (SDXL-Turbo). Raises FileNotFoundError or ValueError when this is no model folder or not one we can train.
    """
    folder = epath.Path(folder)
    model_index = read_model_index(folder)
    absent = [name for name in ("unet", "vae", "scheduler") if not has_component(model_index, name)]
    if absent:
        raise ValueError(
            f"{folder} is a {model_index.get('_class_name')} without {', '.join(absent)}; only Stable Diffusion 1, 2 "
            "and XL (base, Turbo, refiner) are supported"
        )
    unet = UNetConfig.from_dict(*_config(folder / "unet"))
    vae = VAEConfig.from_dict(*_config(folder / "vae"))
    if unet.in_channels != vae.latent_channels:
        raise ValueError(
            f"{folder}: the UNet takes {unet.in_channels} channels and the VAE makes {vae.latent_channels}; those that "
            "take an image beside the noise (inpainting, upscaling) can't be trained here"
        )
    found = find_family(model_index, unet, str(folder), family)
    scheduler, _ = _config(folder / "scheduler", "scheduler_config.json")
    return Pipeline(
        folder=folder,
        family=found,
        unet=Network.build(lambda rngs: UNet2DConditionModel(unet, dtype=dtype, rngs=rngs), unet),
        vae=Network.build(lambda rngs: AutoencoderKL(vae, dtype=vae_dtype or dtype, rngs=rngs), vae),
        text_encoders=tuple(_text_encoder(folder / encoder.folder, dtype) for encoder in found.text_encoders),
        schedule=make_schedule(
            scheduler, training_timesteps=found.training_timesteps, zero_terminal_snr=found.zero_terminal_snr
        ),
        sampling_schedule=make_schedule(scheduler),
        force_zeros_for_empty_prompt=model_index.get("force_zeros_for_empty_prompt", False),
        dtype=jnp.dtype(dtype),
    )


def save_pipeline(pipeline: Pipeline, output: epath.PathLike, unet_params: Params, *, dtype: DTypeLike) -> None:
    """Writes a complete PyTorch diffusers folder: the tuned UNet in `dtype`, all else copied from `pipeline.folder`.

    The other components are copied byte for byte, except that legacy Flax ones, which PyTorch can't open, are converted
    (in float32), or left out where we have no model for them (the safety checker). All of it is written, or nothing.
    Raises ValueError if `output` exists and is not empty.
    """
    source = pipeline.folder
    model_index = _without_flax(read_model_index(source))
    with new_folder(output) as target:
        for name in [name for name, value in model_index.items() if isinstance(value, list)]:
            if not (source / name).is_dir():  # a safety checker that nobody downloaded
                model_index[name] = [None, None]
                continue
            files = {path.name: path for path in (source / name).iterdir()}
            is_flax = any(file in files for file in LEGACY_FLAX) and not any(map(_is_torch, files))
            if name == "unet":
                config, _ = _config(source / name)
                specs = pipeline.unet.specs
                save_component(target / name, _without_flax(config), unet_params, specs, dtype=dtype)
            elif is_flax and name in pipeline.components:
                config, _ = _config(source / name)
                specs = pipeline.components[name].specs
                params = pipeline.load(name, dtype="float32")
                save_component(target / name, _without_flax(config), params, specs, dtype="float32")
            elif is_flax:
                model_index[name] = [None, None]
            else:
                (target / name).mkdir()
                for file, path in files.items():
                    path.copy(target / name / _without_variant(file, files))
        (target / "model_index.json").write_text(json.dumps(model_index, indent=2) + "\n")


def read_model_index(folder: epath.Path) -> dict[str, Any]:
    """The folder's list of components. Raises FileNotFoundError where there is none."""
    path = folder / "model_index.json"
    if not path.exists():
        raise FileNotFoundError(
            f"no diffusers model folder at {folder}: {path} does not exist; give the path of a downloaded model, for "
            f"example from: hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir {folder}"
        )
    return json.loads(path.read_text())


def _config(folder: epath.Path, file: str = "config.json") -> tuple[dict[str, Any], str]:
    """The parsed config and its path, for error messages."""
    path = folder / file
    if not path.exists():
        raise FileNotFoundError(f"no {path}, though model_index.json lists {folder.name}; download it again")
    return json.loads(path.read_text()), str(path)


def _text_encoder(folder: epath.Path, dtype: DTypeLike) -> Network:
    config = CLIPTextConfig.from_dict(*_config(folder))
    return Network.build(lambda rngs: CLIPTextModel(config, dtype=dtype, rngs=rngs), config)


def _without_flax(config: dict[str, Any]) -> dict[str, Any]:
    """Class names of the PyTorch twin: legacy Flax ones differ by their prefix."""

    def rename(value: Any) -> Any:
        if isinstance(value, list):
            return [rename(item) for item in value]
        return value.removeprefix("Flax") if isinstance(value, str) else value

    return {name: rename(value) for name, value in config.items()}


def _is_torch(file: str) -> bool:
    return file.endswith((".safetensors", ".bin"))


def _without_variant(file: str, siblings: dict[str, Any]) -> str:
    """A component held only as the fp16 variant loses that label, or PyTorch would not find it beside our UNet."""
    plain = file.replace(".fp16.safetensors", ".safetensors").replace(".index.fp16.json", ".index.json")
    return file if plain in siblings else plain
