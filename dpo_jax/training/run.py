"""A training run that is opened to draw with its model or to export it."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from dpo_jax.cli import flatten, unflatten
from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.sampling.loaded_model import LoadedModel, add_lora, load_encoders, lora_mark, read_lora_for
from dpo_jax.sharding import Placement, make_mesh
from dpo_jax.training.checkpoint import read_config, restore_params
from dpo_jax.training.config import default_config, is_free
from dpo_jax.training.model import (
    abstract_params,
    for_sampling,
    initial_adapter,
    load_denoiser,
    open_model,
    sampling_of,
)
from dpo_jax.training.select_step import select_step
from dpo_jax.weights.layout import Params
from dpo_jax.weights.lora_files import Adapter, Array, Merged


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run, finished or not, at one of its checkpoints: the policy, and the base that it came from."""

    config: ConfigDict
    pipeline: Pipeline
    placement: Placement
    params: Params
    """Trained weights in float32, of the whole denoiser or of a LoRA; their moving average if `ema.decay` is set."""
    step: int

    @functools.cached_property
    def base(self) -> Params:
        """The denoiser that training began with, in the compute dtype, and the LoRA that `lora.init` named."""
        denoiser = load_denoiser(self.pipeline, self.placement)
        return denoiser | initial_adapter(self.config, self.pipeline) if self.config.lora.init else denoiser

    @functools.cached_property
    def policy(self) -> Params:
        """The trained denoiser, in the compute dtype."""
        tuned = for_sampling(self.pipeline, self.params)
        if self.pipeline.adapted_denoiser is not None:
            return self.base | tuned
        tables = self.pipeline.untrained_specs
        return load_denoiser(self.pipeline, self.placement, only=tables) | tuned if tables else tuned

    @property
    def adapter(self) -> Adapter | None:
        """The trained LoRA, or None if the whole denoiser was trained."""
        adapted = self.pipeline.adapted_denoiser
        if adapted is None:
            return None
        return Adapter(jax.device_get(self.params), {name: size.alpha for name, size in self.pipeline.adapters.items()})

    @property
    def merged(self) -> Mapping[str, Array]:
        """The trained denoiser in float32, with the LoRA merged into its kernels."""
        adapter, tables = self.adapter, self.pipeline.untrained_specs
        if adapter is None and not tables:
            return self.params
        stored = self.pipeline.read(self.pipeline.denoiser_name)
        return (
            Merged(stored, adapter)
            if adapter is not None
            else {**{name: stored[name] for name in tables}, **self.params}
        )

    def load_model(self, *, lora: str = "", lora_scale: float = 1.0) -> LoadedModel:
        """Return the trained model to draw with, with a further LoRA where one is named."""
        pipeline, placement = self.pipeline, self.placement
        # What a continued run may change is no other model; fingerprints tell of other weights.
        fields = {field: value for field, value in flatten(self.config).items() if not is_free(field)}
        config = json.dumps(fields, sort_keys=True)
        adapters = read_lora_for(pipeline, lora) if lora else {}

        def load_denoiser() -> Params:
            if lora:
                name = pipeline.denoiser_name
                return add_lora(self.merged, pipeline, placement, name, adapters[name], lora_scale)
            return self.policy

        return LoadedModel(
            pipeline,
            placement,
            f"run {hashlib.sha256(config.encode()).hexdigest()[:16]}, step {self.step}{lora_mark(lora, lora_scale)}",
            load_denoiser,
            lambda: load_encoders(pipeline, placement, self.config.vae_dtype, adapters, lora_scale),
            sampling_of(self.config),
            self.config.data.resolution,
        )


def open_run(workdir: epath.PathLike, step: str = "", *, allow_nonfinite: bool = False) -> Run:
    """Return the run of a work directory, with the weights of one checkpoint and without its optimizer state.

    Args:
        workdir: of a run of `dpo_jax.train` or `dpo_jax.online`.
        step: which checkpoint: its number, "best", or "" for the newest; see `select_step`.
        allow_nonfinite: load weights that hold NaN or infinity, too.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, or its base model has changed.
    """
    saved = read_config(workdir)
    if saved is None:
        raise MissingFileError(
            f"no training run at {workdir}: it has no config.json; give the --workdir of python -m dpo_jax.train"
        )
    config = unflatten(flatten(default_config()) | _checked(saved, workdir))
    pipeline = dataclasses.replace(open_model(config, workdir), allow_nonfinite=allow_nonfinite)
    if pipeline.fingerprint() != saved["fingerprints.model"]:
        raise UserError(
            f"the model in {pipeline.folder} has changed since {workdir} began; put back the model that it began with"
        )
    placement = Placement(make_mesh(data=1, fsdp=-1))  # use the devices of this machine, not those that trained
    item = "ema" if config.ema.decay else "params"
    stored = jnp.float32 if config.ema.decay else jnp.dtype(config.memory.masters)
    abstract = abstract_params(pipeline.trained_specs, stored, placement)
    params, found = restore_params(workdir, abstract, item, select_step(workdir, step))
    return Run(config, pipeline, placement, jax.tree.map(lambda x: x.astype(jnp.float32), params), found)


def _checked(saved: dict[str, Any], workdir: epath.PathLike) -> dict[str, Any]:
    """Return the fields of config.json; UserError names known fields whose values have another type."""
    wrong = [] if isinstance(saved.get("fingerprints.model"), str) else ["fingerprints.model: missing"]
    for field, default in flatten(default_config()).items():
        kinds: Any = {bool: bool, int: int, float: (int, float), str: str}.get(type(default), (list, tuple))
        value = saved.get(field, default)
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            wrong.append(f"{field}: {value!r} instead of one such as {default!r}")
    if wrong:
        raise UserError(
            f"{epath.Path(workdir) / 'config.json'} is damaged ({'; '.join(wrong[:5])}); restore it from a backup"
        )
    return saved
