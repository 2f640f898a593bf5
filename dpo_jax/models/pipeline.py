"""A model whose networks are built from its config.json files; its weights are read later.

The source is a diffusers folder (PyTorch or legacy Flax), the hub id of one, or one file in the original layout.
`models/save.py` writes models.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.typing import DTypeLike

from dpo_jax.batch import Conditioning
from dpo_jax.data.tokenizer_files import TokenizerSpec, read_length
from dpo_jax.diffusion.schedule import Schedule, make_schedule
from dpo_jax.errors import UserError
from dpo_jax.models.clip import CLIPTextConfig
from dpo_jax.models.denoiser import DENOISER_PREFIX, Denoiser, DenoiserConfig
from dpo_jax.models.execution import FASTEST, PLAIN, Execution
from dpo_jax.models.families import (
    SUPPORTED,
    Family,
    Marks,
    TextEncoder,
    Version,
    check_classes,
    find_denoiser,
    find_family,
    has_component,
)
from dpo_jax.models.kernels import choose
from dpo_jax.models.lora import Adapters, add_lora, lora_specs, round_as_adapted, set_dropout_keys
from dpo_jax.models.model_folder import (
    component_config,
    config_path,
    files_of,
    find_component,
    path_of,
    read_config_json,
    read_model_index,
)
from dpo_jax.models.network import Network, network_of
from dpo_jax.models.single_file import beside_file, configs_of_file, family_of_single_file, with_marks
from dpo_jax.models.text_encoders import KINDS
from dpo_jax.models.unet_config import UNetConfig
from dpo_jax.models.vae import AutoencoderKL, VAEConfig
from dpo_jax.sharding import Placement
from dpo_jax.weights.hub import find_model
from dpo_jax.weights.io import Sharding, fingerprint, load_params, read_params, tensor_names
from dpo_jax.weights.layout import Params, Specs
from dpo_jax.weights.quantised import Held, rounded


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The networks of one model and how they fit together; their parameters come from `load`."""

    folder: epath.Path
    """Folder of model_index.json, the scheduler's config and the tokenizers."""
    weights: Mapping[str, epath.Path]
    """Path of each component's weights: its folder, or a single file."""
    family: Family
    denoiser: Network
    vae: Network
    text_encoders: tuple[Network, ...]
    text_lengths: tuple[int, ...]
    """Tokens of a caption for each text encoder, with padding."""
    schedule: Schedule
    """Noise schedule of training."""
    sampling_schedule: Schedule
    """Noise schedule of sampling: the same except for Turbo, whose training rescales it to end in pure noise."""
    force_zeros_for_empty_prompt: bool
    """True if an empty caption is embedded as zeros and not by the text encoders (SDXL)."""
    dtype: jnp.dtype
    """Compute dtype of denoiser and text encoders."""
    scheduler_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The scheduler's config, with the settings that a single file states by empty tensors."""
    variant: str = ""
    """Set of weights to read if there are several: "fp16" or ""."""
    allow_nonfinite: bool = False
    """True if weights may hold NaN and infinity."""
    execution: Execution = PLAIN
    """Settings of the execution of the denoiser's blocks."""
    adapters: Adapters = dataclasses.field(default_factory=dict)
    """The layers of the denoiser that have a LoRA; see `with_lora`."""
    adapted_denoiser: Network | None = None
    """The denoiser with that LoRA."""

    def denoise(
        self,
        denoiser_params: Params,
        x_NHWC: jax.Array,
        t_N: jax.Array,
        conditioning: Conditioning,
        dropout_keys_N: jax.Array | None = None,
    ) -> jax.Array:
        """Return the denoiser's prediction [N, H, W, C] in the compute dtype, with a LoRA if the parameters hold one.

        All weights are first rounded to the compute dtype, also those of the norms, which are then used in float32: a
        policy's float32 masters must compute exactly what a reference stored in bfloat16 computes. `dropout_keys_N`
        turns the LoRA's dropout on.
        """
        weights = {name: rounded(value, self.dtype) for name, value in denoiser_params.items()}
        has_lora = len(denoiser_params) > len(self.denoiser.specs)
        network = self.adapted_denoiser if has_lora and self.adapted_denoiser is not None else self.denoiser
        denoiser = network.bind(weights)
        if dropout_keys_N is not None:
            set_dropout_keys(denoiser, dropout_keys_N)
        return denoiser(x_NHWC, t_N, conditioning)

    def gather(self, placement: Placement, component: str, params: Params) -> Params:
        """Return, inside jit, the weights of a component as its layers use them; see `Placement.gathered`.

        Weights of the denoiser, which is also called "denoiser" here, are rounded to the compute dtype before devices
        exchange them.
        """
        if component not in ("denoiser", self.denoiser_name):
            specs = self.components[component].specs
        else:
            specs = (self.adapted_denoiser or self.denoiser).specs
            params = {name: rounded(x, self.dtype) for name, x in params.items()}
        return {name: placement.gathered(name, specs[name], x) for name, x in params.items()}

    def with_lora(self, adapters: Adapters, dropout: float = 0.0) -> "Pipeline":
        """Return this model with a LoRA in the named layers of its denoiser."""

        module, options = self.family.denoiser.module, {"execution": self.execution, "dtype": self.dtype}

        def make_adapted(rngs: nnx.Rngs) -> nnx.Module:
            denoiser = module(config, rngs=rngs, **options)
            add_lora(denoiser, adapters, dropout, rngs)
            return denoiser

        def make_plain(rngs: nnx.Rngs) -> nnx.Module:
            denoiser = module(config, rngs=rngs, **options)
            round_as_adapted(denoiser, adapters)
            return denoiser

        config = self.denoiser.config
        return dataclasses.replace(
            self,
            adapters=adapters,
            denoiser=Network.build(make_plain, config),
            adapted_denoiser=Network.build(make_adapted, config),
        )

    @property
    def trained_specs(self) -> Specs:
        """Shapes of the trained weights: the LoRA if there is one, otherwise the denoiser without fixed tables."""
        if self.adapted_denoiser is not None:
            return lora_specs(self.adapted_denoiser)
        return {name: spec for name, spec in self.denoiser.specs.items() if spec.is_trainable}

    @property
    def untrained_specs(self) -> Specs:
        """Shapes of the weights of the denoiser that are not trained."""
        trained = self.trained_specs
        return {name: spec for name, spec in self.denoiser.specs.items() if name not in trained}

    @property
    def denoiser_name(self) -> str:
        """Name of the denoiser's folder: "unet" or "transformer"."""
        return self.family.denoiser.folder

    @property
    def class_name(self) -> str:
        """The PyTorch diffusers class of the pipeline."""
        return read_model_index(self.folder)["_class_name"].removeprefix("Flax")

    @property
    def predicts_velocity(self) -> bool:
        """True if the denoiser predicts the velocity and not the noise."""
        return bool(self.schedule.target_x0_T.any())

    @property
    def ends_in_noise(self) -> bool:
        """True if the sampling schedule ends in pure noise (zero terminal SNR)."""
        return bool(self.sampling_schedule.signal_T[-1] < 1e-3)

    @property
    def marks(self) -> Marks:
        """Metadata by which web UIs recognise the model."""
        return (self.family.marks_of_velocity if self.predicts_velocity else None) or self.version.marks

    @property
    def version(self) -> Version:
        """The published model of the family that has the layers of this one."""
        return self.family.version(self.denoiser.specs)

    @property
    def is_of_published_size(self) -> bool:
        """True if the denoiser has the shapes of one of the family's published models."""
        family = self.family
        folders = {family.published_denoiser(hub_id): None for hub_id in (family.published, *family.also_published)}
        return any(self.has_denoiser_like(epath.Path(folder)) for folder in folders)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell along each axis."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def text_shapes(self) -> tuple[tuple[int, int], tuple[int]]:
        """Shapes of context_LD and pooled_P of a caption."""
        composition = self.family.composition
        context, pooled = composition.features([encoder.config for encoder in self.text_encoders])
        return (composition.length(self.text_lengths), context), (pooled,)

    @property
    def is_told_guidance(self) -> bool:
        """True if the model was distilled from guidance and reads its scale (FLUX.1-dev)."""
        return bool(getattr(self.denoiser.config, "guidance_embeds", False))

    def guidance_scale(self, guidance: float) -> float:
        """Return the scale of classifier-free guidance; 1, for none, if the model reads `guidance` itself."""
        return 1.0 if self.is_told_guidance else guidance

    @property
    def trained_resolution(self) -> int:
        """Height and width in pixels of the images that the model was trained on."""
        return int(self.denoiser.config.trained_cells) * self.vae_factor

    @property
    def tokenizer_names(self) -> tuple[str, ...]:
        """Subfolders of the tokenizers, one per text encoder."""
        return tuple(encoder.tokenizer for encoder in self.family.text_encoders)

    @property
    def components(self) -> dict[str, Network]:
        """Every network by the name of its folder."""
        names = [encoder.folder for encoder in self.family.text_encoders]
        return {self.denoiser_name: self.denoiser, "vae": self.vae, **dict(zip(names, self.text_encoders, strict=True))}

    @property
    def original_prefixes(self) -> dict[str, str]:
        """Prefix of each component's names in a single file of the original layout."""
        own = {self.denoiser_name: DENOISER_PREFIX, "vae": self.family.vae_prefix}
        return own | {encoder.folder: encoder.original_prefix for encoder in self.family.text_encoders}

    @property
    def tokenizers(self) -> list[TokenizerSpec]:
        """The tokenizers, one per text encoder."""
        configs = [encoder.config for encoder in self.text_encoders]
        return [
            TokenizerSpec(name, config.tokenizer_kind, length, config.vocab_size, config.max_position_embeddings)
            for name, length, config in zip(self.tokenizer_names, self.text_lengths, configs, strict=True)
        ]

    def read(self, component: str) -> dict[str, np.ndarray]:
        """Return the weights of one component as they are stored; see `weights.io.read_params`."""
        specs, prefix = self.components[component].specs, self.original_prefixes[component]
        return read_params(self.weights[component], specs, prefix=prefix, variant=self.variant)

    def load(
        self,
        component: str,
        *,
        dtype: DTypeLike,
        sharding: Sharding | None = None,
        path: epath.Path | None = None,
        only: Collection[str] | None = None,
        store: Callable[[str, jax.Array], Held] | None = None,
    ) -> Params:
        """Return the parameters of one component, all or `only` some, from `path` if given; see `load_params`."""
        specs, prefix = self.components[component].specs, self.original_prefixes[component]
        path = path or self.weights[component]
        options: dict[str, Any] = {"variant": self.variant, "allow_nonfinite": self.allow_nonfinite, "only": only}
        return load_params(path, specs, dtype=dtype, sharding=sharding, prefix=prefix, store=store, **options)

    def has_denoiser_like(self, path: epath.Path) -> bool:
        """Return whether the denoiser at `path`, its folder or a single file, has the same weights' shapes."""
        kind = self.family.denoiser
        config = kind.config.from_dict(*component_config(self.folder, path, self.denoiser_name))
        if _widths(config) != _widths(self.denoiser.config):  # building a large network takes seconds
            return False
        return network_of(kind.module, config, dtype=self.dtype).specs == self.denoiser.specs

    def config(self, component: str) -> dict[str, Any]:
        """Return the component's config.json."""
        return component_config(self.folder, self.weights[component], component)[0]

    def fingerprint(self, components: Sequence[str] | None = None) -> str:
        """Return the family and a digest of the files of all or some components; it changes when the model changes.

        The scheduler and the tokenizers are always included.
        """
        paths = {name: path for name, path in self.weights.items() if components is None or name in components}
        small = [self.folder / name for name in ("scheduler", *self.tokenizer_names)]
        configs = [
            path
            for folder in small
            for path in sorted(folder.iterdir())
            if path.suffix in (".json", ".txt", ".model", ".jinja")
        ]
        configs += [config_path(self.folder, path, name) for name, path in paths.items()]
        weights = [file for path in paths.values() for file in files_of(path, self.variant)]
        return f"{self.family.name}-{fingerprint([*configs, *weights])}"


def load_pipeline(
    model: epath.PathLike,
    *,
    dtype: DTypeLike,
    vae_dtype: DTypeLike | None = None,
    family: str | None = None,
    unet: str = "",
    transformer: str = "",
    vae: str = "",
    text_length: int = 0,
    model_config: str = "",
    revision: str = "",
    variant: str = "",
    execution: Execution = FASTEST,
    allow_nonfinite: bool = False,
) -> Pipeline:
    """Read the configs of a model and build its networks, which compute in `dtype` (VAE: `vae_dtype`).

    No weight is read and no memory is allocated. Raises a UserError if `model` is not a model, or is not supported.

    Args:
        model: a diffusers folder, a hub id, or a single .safetensors file in the original layout.
        dtype: compute dtype.
        vae_dtype: compute dtype of the VAE, if it differs.
        family: a name in `families.FAMILIES`, needed where the contents do not tell (SDXL-Turbo).
        unet: another UNet to start from: its folder or file, a model's folder or file, or a hub id of either.
        transformer: the same for a model whose denoiser is a transformer.
        vae: another VAE, given in the same way.
        text_length: tokens of a caption for T5 or Qwen3; 0 for the family's own number, or that of the tokenizer if it
            is smaller.
        model_config: the folder or hub id whose configs and tokenizers belong to a single file; by default the
            family's published model.
        revision: branch, tag or commit on the hub.
        variant: which of several sets of weights to fetch from the hub, for example "fp16".
        execution: how the denoiser's blocks are executed.
        allow_nonfinite: load weights even if they hold NaN or infinity.
    """
    path = find_model(str(model), revision=revision, variant=variant)
    names = set() if path.is_dir() else tensor_names(path)
    folder, beside = path, {}
    if not path.is_dir():
        of_file = family_of_single_file(names, str(path), family)
        beside = beside_file(path, of_file, names, model_config, variant, given=("vae",) if vae else ())
        family, folder = of_file.name, configs_of_file(path, of_file, names, model_config)
    model_index = read_model_index(folder)
    _check_parts(folder, model_index)
    kind = find_denoiser(model_index, str(folder / "model_index.json"))
    other = _other_denoiser({"unet": unet, "transformer": transformer}, kind.folder, path)
    weights = {
        kind.folder: find_component(other, kind.folder) if other else path_of(path, kind.folder),
        "vae": find_component(vae, "vae") if vae else beside.get("vae") or path_of(path, "vae"),
    }
    if other:
        _check_class(folder, weights[kind.folder], kind)
    config: DenoiserConfig = kind.config.from_dict(*component_config(folder, weights[kind.folder], kind.folder))
    vae_config = VAEConfig.from_dict(*component_config(folder, weights["vae"], "vae"))
    _check_channels(folder, kind.folder, config, vae_config)
    found = find_family(model_index, kind, config, str(weights[kind.folder] if other else folder), family)
    check_classes(model_index, kind, found, str(folder / "model_index.json"))
    if text_length and not any(encoder.length for encoder in found.text_encoders):
        raise UserError(f"text_length={text_length}: {found.name} reads as many tokens as its CLIP has; leave it at 0")
    weights |= {
        encoder.folder: beside.get(encoder.folder) or path_of(path, encoder.folder) for encoder in found.text_encoders
    }
    text_encoders = [
        _open_text_encoder(folder, weights[encoder.folder], encoder, model_index, dtype)
        for encoder in found.text_encoders
    ]
    text_lengths = [
        _text_length(folder, encoder, network.config, text_length)
        for encoder, network in zip(found.text_encoders, text_encoders, strict=True)
    ]
    _check_widths(found, config, [encoder.config for encoder in text_encoders], weights)
    scheduler_path = folder / "scheduler" / "scheduler_config.json"
    scheduler_config = with_marks(
        read_config_json(scheduler_path), names, str(path), str(scheduler_path) if model_config else ""
    )
    make = functools.partial(
        make_schedule, scheduler_config, timestep_spacing=found.timestep_spacing, where=str(scheduler_path)
    )
    execution = execution._replace(attention=choose(execution.attention, dtype))
    return Pipeline(
        folder=folder,
        weights=weights,
        family=found,
        denoiser=network_of(kind.module, config, dtype=dtype, execution=execution),
        vae=network_of(AutoencoderKL, vae_config, dtype=vae_dtype or dtype),
        text_encoders=tuple(text_encoders),
        text_lengths=tuple(text_lengths),
        schedule=make(training_timesteps=found.training_timesteps, zero_terminal_snr=found.zero_terminal_snr),
        sampling_schedule=make(),
        force_zeros_for_empty_prompt=bool(model_index.get("force_zeros_for_empty_prompt", False)),
        dtype=jnp.dtype(dtype),
        scheduler_config=scheduler_config,
        variant=variant,
        allow_nonfinite=allow_nonfinite,
        execution=execution,
    )


def _open_text_encoder(
    folder: epath.Path, weights: epath.Path, encoder: TextEncoder, model_index: Mapping[str, Any], dtype: DTypeLike
) -> Network:
    kind = KINDS[encoder.kind]
    config = kind.config.from_dict(*component_config(folder, weights, encoder.folder))
    if isinstance(config, CLIPTextConfig):  # two places state this; diffusers uses this one
        with_projection = model_index[encoder.folder][1].endswith("WithProjection")
        config = dataclasses.replace(config, with_projection=with_projection)
    return network_of(kind.module, config, dtype=dtype)


def _text_length(folder: epath.Path, encoder: TextEncoder, config: Any, chosen: int) -> int:
    """Return the tokens of a caption for a text encoder, where users may have `chosen` a number for T5 or Qwen3."""
    stated = read_length(Path(folder / encoder.tokenizer))
    if encoder.length:
        return chosen or min(encoder.length, stated or encoder.length)
    return stated or int(config.max_position_embeddings)


def _check_parts(folder: epath.Path, model_index: Mapping[str, Any]) -> None:
    """Raise a UserError if a model lacks a component that every model needs."""
    absent = [name for name in ("vae", "scheduler") if not has_component(model_index, name)]
    if absent:
        raise UserError(
            f"{folder} is a {model_index.get('_class_name')} without {', '.join(absent)}; supported are {SUPPORTED}"
        )


def _other_denoiser(given: Mapping[str, str], folder: str, model: epath.Path) -> str:
    """Return the denoiser that the user named in place of the model's own, or ""."""
    for name, other in given.items():
        if other and name != folder:
            raise UserError(
                f"{name}={other} was given, but the denoiser of {model} is a {folder}; set {folder} instead"
            )
    return given[folder]


def _widths(config: DenoiserConfig) -> tuple[int, int, int]:
    """Return the features of what a denoiser takes."""
    return config.latent_channels, config.context_features, config.pooled_features


def _check_class(folder: epath.Path, weights: epath.Path, denoiser: Denoiser) -> None:
    """Raise a UserError if the denoiser that the user named has another architecture than that of the model."""
    config, where = component_config(folder, weights, denoiser.folder)
    name = str(config.get("_class_name", denoiser.class_name)).removeprefix("Flax")
    if name != denoiser.class_name:
        raise UserError(f"{where} describes a {name}, but the {denoiser.folder} of {folder} is a {denoiser.class_name}")


def _check_channels(folder: epath.Path, name: str, config: DenoiserConfig, vae: VAEConfig) -> None:
    """Raise a UserError if the denoiser does not predict what it takes, or takes more than the VAE makes."""
    if config.latent_channels != vae.latent_channels:
        raise UserError(
            f"{folder}: the {name} takes {config.latent_channels} channels, but the VAE makes "
            f"{vae.latent_channels}; models that take an image beside the noise (inpainting, upscaling) are not "
            "supported"
        )
    if isinstance(config, UNetConfig) and config.out_channels != config.in_channels:
        raise UserError(
            f"{folder}: the unet takes {config.in_channels} channels and predicts {config.out_channels}; the "
            "two must be equal"
        )


def _check_widths(
    family: Family, config: DenoiserConfig, encoders: Sequence[Any], weights: Mapping[str, epath.Path]
) -> None:
    """Raise a UserError, before anything is read, if the denoiser does not fit the output of the text encoders."""
    name = family.denoiser.folder
    context, made = family.composition.features(encoders)
    if config.context_features != context:
        raise UserError(
            f"the {name} in {weights[name]} attends to {config.context_features} features per token, but the text "
            f"encoders of {family.name} make {context}; it belongs to another family"
        )
    if config.pooled_features:
        if isinstance(config, UNetConfig):
            made += family.num_time_ids * (config.addition_time_embed_dim or 0)
        if made != config.pooled_features:
            raise UserError(
                f"the {name} in {weights[name]} takes {config.pooled_features} added features, but "
                f"{family.name} makes {made}; it belongs to another family"
            )
