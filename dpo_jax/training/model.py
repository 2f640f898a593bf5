"""Opens the models that a config names: their structure, their LoRA, and the frozen weights."""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.typing import DTypeLike
from ml_collections import ConfigDict
from qwix import QArray

from dpo_jax.batch import EncodedText
from dpo_jax.data.tokenizers import Tokenizers, load_tokenizers
from dpo_jax.errors import UserError
from dpo_jax.models.execution import Execution
from dpo_jax.models.lora import ATTENTION, LowRank, find_targets, init_lora
from dpo_jax.models.model_folder import files_of, find_component
from dpo_jax.models.pipeline import Pipeline, load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.sampling import loaded_model
from dpo_jax.sampling.generate import Generator, Sampling
from dpo_jax.sharding import Placement, make_mesh, replicated, rules_of
from dpo_jax.training.defaults import FIELDS
from dpo_jax.training.step import Frozen
from dpo_jax.weights.hub import find_lora
from dpo_jax.weights.io import fingerprint
from dpo_jax.weights.layout import Params, Specs
from dpo_jax.weights.lora_files import lora_files_of, read_lora
from dpo_jax.weights.quantised import QTYPES, Held, is_quantised, quantised_shape, quantiser


def make_placement(config: ConfigDict) -> Placement:
    """Return the mesh of the config, and the sharding of parameters on it."""
    mesh = config.mesh
    return Placement(make_mesh(mesh.data, mesh.fsdp, mesh.tensor), rules_of(mesh.rules))


def open_model(config: ConfigDict, workdir: epath.PathLike) -> Pipeline:
    """Return the structure of `config.model` and its LoRA; "random:FAMILY" is written to `workdir/model` first."""
    model, family = config.model, config.family or None
    if model.startswith("random:"):
        family = model.removeprefix("random:")
        model = epath.Path(workdir) / "model"
        if not model.exists() and jax.process_index() == 0:
            write_random_model(family, model)
        multihost_utils.sync_global_devices("random model written")
    pipeline = load_pipeline(
        model,
        dtype=jnp.dtype(config.dtype),
        vae_dtype=jnp.dtype(config.vae_dtype),
        family=family,
        unet=config.unet,
        transformer=config.transformer,
        vae=config.vae,
        text_length=config.data.text_length,
        model_config=config.model_config,
        revision=config.revision,
        variant=config.variant,
        execution=Execution(config.remat, config.scan, config.attention),
    )
    if config.data.resolution % pipeline.vae_factor:
        raise UserError(f"data.resolution={config.data.resolution} is not a multiple of {pipeline.vae_factor}")
    told = FIELDS["guidance"].default
    if config.guidance != told and not pipeline.is_told_guidance:
        raise UserError(
            f"config.guidance={config.guidance} is for models that are told a guidance scale, such as FLUX.1-dev, and "
            f"this {pipeline.family.name} is not. Leave it at {told}; sample.guidance is the scale of sampling"
        )
    lora = config.lora
    if lora.init:
        adapter = read_lora(find_lora(lora.init), pipeline.denoiser.specs, pipeline.denoiser_name)
        adapters = {layer: LowRank(adapter.rank(layer), alpha) for layer, alpha in adapter.alphas.items()}
        ranks = sorted({size.rank for size in adapters.values()})
        if lora.rank and ranks != [lora.rank]:
            raise UserError(
                f"config.lora.rank={lora.rank}, but {lora.init} has rank {ranks}; set lora.rank=0 to take it"
            )
        return pipeline.with_lora(adapters, lora.dropout)
    if lora.rank:
        if lora.targets == FIELDS["lora.targets"].default and pipeline.denoiser_name != "unet":
            raise UserError(
                f"config.lora.targets={lora.targets!r} is the default, which is for UNets, but the denoiser of this "
                f"model is a {pipeline.denoiser_name}. Set lora.targets, for example to {ATTENTION!r}"
            )
        adapters = find_targets(pipeline.denoiser, lora.targets, rank=lora.rank, alpha=lora.alpha or lora.rank)
        return pipeline.with_lora(adapters, lora.dropout)
    return pipeline


def initial_adapter(config: ConfigDict, pipeline: Pipeline) -> Params:
    """Return the LoRA of `config.lora.init`, or a new one that does not change the model; float32, on the host."""
    specs = pipeline.trained_specs
    if not config.lora.init:
        return jax.device_get(init_lora(specs, config.seed, config.lora.initializer))
    params = read_lora(find_lora(config.lora.init), pipeline.denoiser.specs, pipeline.denoiser_name).params
    return jax.tree.map(lambda x: np.asarray(x, np.float32), dict(params))


def load_denoiser(
    pipeline: Pipeline,
    placement: Placement,
    path: epath.Path | None = None,
    only: Collection[str] | None = None,
    like: Mapping[str, Any] = MappingProxyType({}),
    dtype: DTypeLike | None = None,
) -> Params:
    """Return the model's denoiser, or the one at `path`, by default in the compute dtype, as frozen weights are.

    What `like` has quantised is quantised: each tensor is quantised on the devices before the next one is read.
    """

    def store(name: str, value: jax.Array) -> Held:
        shapes = like.get(name)
        if not isinstance(shapes, QArray):
            return value
        return jax.block_until_ready(quantiser(jax.tree.map(lambda x: x.sharding, shapes))(value))

    return pipeline.load(
        pipeline.denoiser_name,
        dtype=dtype or pipeline.dtype,
        sharding=placement,
        path=path,
        only=only,
        store=store,
    )


def abstract_frozen(config: ConfigDict, pipeline: Pipeline, placement: Placement, *, needs_reference: bool) -> Frozen:
    """Return the shapes and shardings of all weights that a training step reads and does not change.

    With a LoRA, `base` is the denoiser that it starts from, in fewer bits where `memory.frozen` says so; the reference
    is that denoiser, too, and `reference` holds only the weights that differ from it. Otherwise `base` holds only fixed
    tables.
    """
    dtypes = {"vae": jnp.dtype(config.vae_dtype)}
    base = abstract_params(pipeline.untrained_specs, pipeline.dtype, placement)
    if config.memory.frozen:
        base |= abstract_quantised(pipeline.untrained_specs, config.memory.frozen, placement)
    reference: Specs = {}
    names = [name for name in pipeline.components if name != pipeline.denoiser_name]
    negative_text = None
    if config.data.get("encoded_views"):
        names = []
    elif reads_encoded_prompts(config):
        names, place = ["vae"], replicated(placement.mesh)
        negative_text = EncodedText(
            *(jax.ShapeDtypeStruct((1, *shape), pipeline.dtype, sharding=place) for shape in pipeline.text_shapes)
        )
    if needs_reference:
        reference = {
            **(pipeline.denoiser.specs if config.reference else {}),
            **(pipeline.trained_specs if pipeline.adapted_denoiser is None else {}),
            **(pipeline.trained_specs if config.lora.init_reference else {}),
        }
    held_reference = abstract_params(reference, reference_dtype(config, pipeline), placement)
    if config.memory.frozen and reference and config.reference:
        held_reference |= abstract_quantised(pipeline.denoiser.specs, config.memory.frozen, placement)
    return Frozen(
        base=base,
        reference=held_reference,
        encoders={
            name: abstract_params(pipeline.components[name].specs, dtypes.get(name, pipeline.dtype), placement)
            for name in names
        },
        negative_text=negative_text,
    )


def reference_dtype(config: ConfigDict, pipeline: Pipeline) -> jnp.dtype:
    """Return what the reference is stored in: the compute dtype, or that of the policy's weights if it is rounder.

    Both must round the model's weights alike, or the first loss would not be log 2.
    """
    stored = jnp.dtype(config.memory.masters)
    return stored if stored == jnp.bfloat16 else pipeline.dtype


def reads_encoded_prompts(config: ConfigDict) -> bool:
    """Whether an online run encodes its prompts once, before the first round."""
    return "online" in config and bool(config.online.encode_prompts)


def load_frozen(
    config: ConfigDict, pipeline: Pipeline, placement: Placement, abstract: Frozen, adapter: Params | None
) -> Frozen:
    """Return the weights whose shapes `abstract` gives; see `abstract_frozen`."""
    encoders = load_encoders(config, pipeline, placement, list(abstract.encoders))
    base = load_denoiser(pipeline, placement, only=abstract.base, like=abstract.base) if abstract.base else {}
    reference: Params = {}
    if not abstract.reference:
        return Frozen(base, reference, encoders)
    dtype = reference_dtype(config, pipeline)
    if config.reference:
        path = find_component(config.reference, pipeline.denoiser_name)
        reference = load_denoiser(pipeline, placement, path, like=abstract.reference, dtype=dtype)
    elif adapter is None:
        reference = load_denoiser(pipeline, placement, only=abstract.reference, dtype=dtype)
    if config.lora.init_reference:
        assert adapter is not None  # checked by `config.check_settings`
        reference |= {
            name: jax.device_put(np.asarray(value, dtype), placement(name, pipeline.trained_specs[name]))
            for name, value in adapter.items()
        }
    return Frozen(base, reference, encoders)


def load_encoders(
    config: ConfigDict, pipeline: Pipeline, placement: Placement, only: Collection[str] | None = None
) -> dict[str, Params]:
    """Return the VAE and the text encoders, all or `only` some."""
    return loaded_model.load_encoders(pipeline, placement, config.vae_dtype, only=only)


def load_tokenizers_of(pipeline: Pipeline) -> Tokenizers:
    return load_tokenizers(pipeline.folder, pipeline.tokenizers)


def make_generator(
    config: ConfigDict,
    pipeline: Pipeline,
    encoders: Callable[[], Mapping[str, Params]],
    placement: Placement,
    batch_size: int,
    report: Callable[[str], None] | None = None,
) -> Generator:
    """Return the generator that `config.sample` describes; it tells `report` about images that are not finite."""
    return Generator(
        pipeline,
        encoders,
        load_tokenizers_of(pipeline),
        placement,
        sampling_of(config),
        resolution=config.data.resolution,
        batch_size=batch_size,
        report=report,
    )


def sampling_of(config: ConfigDict) -> Sampling:
    """Return the settings that a run draws its grids with."""
    return Sampling(config.sample.steps, config.sample.guidance, config.sample.sampler)


def for_sampling(pipeline: Pipeline, params: Params) -> Params:
    """Return trained weights in the dtype of the frozen ones, so that one compiled sampler serves both."""
    return {name: value.astype(pipeline.dtype) for name, value in params.items()}


def abstract_params(specs: Specs, dtype: DTypeLike, placement: Placement) -> Any:
    """Return the shapes and shardings of weights."""
    return {
        name: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=placement(name, spec)) for name, spec in specs.items()
    }


def abstract_quantised(specs: Specs, kind: str, placement: Placement) -> Any:
    """Return the shapes and shardings of those weights that `memory.frozen=kind` quantises."""
    quantised = {}
    for name, spec in specs.items():
        if is_quantised(name, spec):
            shapes = quantised_shape(spec.shape, QTYPES[kind])
            places = placement.of_parts(name, spec, shapes)
            quantised[name] = jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
            )
    return quantised


def model_fingerprints(config: ConfigDict, pipeline: Pipeline) -> dict[str, str]:
    """Return fields for config.json: digests of the files of the models that a run begins with."""
    digests = {"fingerprints.model": pipeline.fingerprint()}
    if config.reference:
        reference = find_component(config.reference, pipeline.denoiser_name)
        digests["fingerprints.reference"] = fingerprint(files_of(reference, pipeline.variant))
    if config.lora.init:
        digests["fingerprints.lora"] = fingerprint(lora_files_of(find_lora(config.lora.init)))
    return digests
