"""Estimates the memory and the time of a run from shapes, shardings and operation counts.

Computed: memory by kind, floating point operations, bytes that the collectives move. Assumed: the share of its peak
rate that a device reaches, the full rate of the links, and that the collectives of micro-batches overlap with their
computation as long as it lasts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from dpo_jax.cli import flatten, replaced
from dpo_jax.encode.images import decode_latents
from dpo_jax.errors import UserError
from dpo_jax.methods import find_method
from dpo_jax.models.attention import AGAIN, ATTENTION
from dpo_jax.models.kernels import choose
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.planning.model_shapes import open_structure
from dpo_jax.planning.products import sums_by_kind
from dpo_jax.planning.program import Program, peak_bytes
from dpo_jax.planning.sizes import held_bytes, missing_bytes, whole_bytes
from dpo_jax.planning.topology import GIB, Topology
from dpo_jax.sharding import AXES, Placement, mesh_shape, rules_of
from dpo_jax.training.config import resolve
from dpo_jax.training.experiment import Experiment, compose
from dpo_jax.training.sample_grids import IMAGES_AT_A_TIME, images_of_grid

SPARE = 0.1
"""Share of the memory that a plan leaves free."""
PROGRAM_BYTES = 0.37 * 2**20
"""Bytes that each product or convolution adds to a program for TPUs, which is kept in the same memory: whole models
have 0.36 to 0.38 MiB per product, unrolled or not. The compiler for GPUs does not count the program."""
WHOLE_IMAGES = 4
"""Fewest pairs of images at a time for which XLA for TPUs convolves whole images. It cuts the images of fewer pairs
into slices, to fill the eight rows of the matrix unit's tiles, and the slices overlap: compiled for one pair, the
convolutions of SD1.5 take 21% more operations and those of SDXL 12%; compiled for four pairs, those of SD1.5 take
none."""
CUT_CONVOLUTIONS = 0.21
PAPER_PAIRS = 2000 * 2048
"""Pairs that the published run saw (arXiv 2311.12908, section 5.1): steps x pairs per step."""


@dataclasses.dataclass(frozen=True)
class Work:
    """The cost of one pair, or of another example of the method, on one device."""

    remat: str
    flops: float
    """Operations of all products and convolutions."""
    model_flops: float
    """The same without those that rematerialization and attention's backward pass repeat."""
    activation_bytes: float
    num_products: int
    """Products and convolutions in the program; those of a loop count once."""
    convolution_flops: float
    """Operations of the convolutions alone."""
    images: int = 2
    """Images of an example: two of a pair."""
    decoding_bytes: float = 0.0
    """Most bytes that the VAE's decoder needs at a time for an image."""


@dataclasses.dataclass(frozen=True)
class Holdings:
    """Bytes that one device of a mesh holds or receives; remat and micro-batches do not change them."""

    mesh: dict[str, int]
    trained: float
    gradients: float
    """The trained weights without those that `optimizer.rates` freezes."""
    optimizer: float
    ema: float
    moving_reference: float
    frozen_denoiser: float
    """Reference, base of a LoRA, or both."""
    encoders: float
    batch: float
    trained_elsewhere: float
    """Bytes of the trained weights that only other devices hold."""
    frozen_elsewhere: float
    """Bytes of the frozen weights, and of a moving reference as it is sent, that only other devices hold."""
    gathered: float
    """The trained denoiser, or a LoRA and its base, as layers use it from the forward to the backward pass."""
    reference_gathered: float
    """The reference, if it has weights of its own, as layers use it."""
    scan: bool
    """Whether equal blocks run as one loop. The compiler then gathers their weights, and those of the reference, before
    the first micro-batch; otherwise in each micro-batch, when they are needed. A loop reads the weights of all its
    blocks from one array, so frozen weights that are not gathered are copied; trained ones are rounded into it."""
    compute_bytes: int
    """Bytes per number in the compute dtype."""
    master_bytes: int
    """Bytes per number of the trained weights."""
    parameters: int
    trained_parameters: int
    drawn_images: int = 0
    """Images of a grid at a time on each device; 0 without grids."""
    drawing_encoders: float = 0.0
    """VAE and text encoders, which are loaded to draw a grid even if training does without them."""
    old: float = 0.0
    """The policy that draws the images of a round, if it is kept beside the trained one."""

    @property
    def rounded(self) -> float:
        """The trained weights in the compute dtype, where they are stored in another one."""
        return self.in_compute_dtype(self.trained) if self.master_bytes != self.compute_bytes else 0.0

    def in_compute_dtype(self, trained: float) -> float:
        """Return the bytes that bytes of trained weights have in the compute dtype."""
        return trained / self.master_bytes * self.compute_bytes

    @property
    def state_bytes(self) -> tuple[float, ...]:
        """The bytes of what is always held but the encoders."""
        return self.trained, self.optimizer, self.ema, self.moving_reference, self.old, self.frozen_denoiser


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of communication."""

    name: str
    axis: str
    received_bytes: float
    """Bytes that each device receives each time."""
    times: int
    """How often it happens per optimizer step."""
    can_hide: bool
    """Whether it can overlap with the computation of micro-batches."""
    seconds: float
    """Seconds per optimizer step."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The estimate for one config on one machine."""

    topology: Topology
    mesh: dict[str, int]
    remat: str
    accumulation: int
    batch_size: int
    micro_batch_per_device: int
    utilisation: float
    parameters: int
    trained_parameters: int
    memory: dict[str, float]
    """Bytes per device of a training step, by kind."""
    drawing: dict[str, float]
    """Bytes per device while an image grid is drawn, by kind; empty if none is."""
    work: Work
    collectives: list[Collective]
    compute_seconds: float
    """Seconds of computation per optimizer step."""
    update_seconds: float
    """Seconds that the memory traffic of the optimizer takes per step."""

    @property
    def hbm_bytes(self) -> float:
        """The most memory at any time: of a training step, or of an image grid."""
        return max(sum(self.memory.values()), sum(self.drawing.values()))

    @property
    def hbm_limit_bytes(self) -> float:
        return self.topology.device.usable_gib * GIB

    @property
    def fits(self) -> bool:
        """Whether the share `SPARE` of the memory stays free."""
        return self.leaves_spare(self.hbm_bytes)

    def leaves_spare(self, size: float) -> bool:
        """Whether the share `SPARE` of the memory stays free of so many bytes."""
        return size <= (1 - SPARE) * self.hbm_limit_bytes

    @property
    def collective_seconds(self) -> float:
        return sum(collective.seconds for collective in self.collectives)

    @property
    def exposed_seconds(self) -> float:
        """Seconds per step in which collectives do not overlap with the computation of micro-batches."""
        within = sum(collective.seconds for collective in self.collectives if collective.can_hide)
        return max(0.0, within - self.compute_seconds) + self.collective_seconds - within

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds + self.update_seconds

    @property
    def pairs_per_second_per_chip(self) -> float:
        return self.batch_size / self.step_seconds / self.topology.num_chips

    @property
    def chip_hours(self) -> float:
        """Chip-hours for as many pairs as the published run saw."""
        return PAPER_PAIRS / self.pairs_per_second_per_chip / 3600

    def to_json(self) -> dict[str, Any]:
        return {
            "topology": self.topology.name,
            "chips": self.topology.num_chips,
            "mesh": self.mesh,
            "remat": self.remat,
            "accumulation": self.accumulation,
            "micro_batch_per_device": self.micro_batch_per_device,
            "batch_size": self.batch_size,
            "parameters": self.parameters,
            "trained_parameters": self.trained_parameters,
            "hbm_gib": self.hbm_bytes / GIB,
            "hbm_limit_gib": self.hbm_limit_bytes / GIB,
            "hbm_gib_by_kind": {kind: size / GIB for kind, size in self.memory.items()},
            "drawing_gib_by_kind": {kind: size / GIB for kind, size in self.drawing.items()},
            "fits": self.fits,
            "tflop_per_pair": self.work.model_flops / 1e12,
            "tflop_done_per_pair": self.work.flops / 1e12,
            "assumed_utilisation": self.utilisation,
            "compute_seconds": self.compute_seconds,
            "collective_seconds": self.collective_seconds,
            "exposed_collective_seconds": self.exposed_seconds,
            "update_seconds": self.update_seconds,
            "step_seconds": self.step_seconds,
            "collectives": [dataclasses.asdict(collective) for collective in self.collectives],
            "pairs_per_second_per_chip": self.pairs_per_second_per_chip,
            "chip_hours": self.chip_hours,
        }


def measure_work(config: ConfigDict, kind: str, model_flops: float | None = None) -> Work:
    """Trace the gradient of one pair and count its work.

    Operations of attention are counted as XLA computes it, also where a kernel does, whose values take no memory.

    Args:
        config: its `remat` decides what the backward pass repeats; `attention` "auto" is taken as for NVIDIA's GPUs.
        kind: of the device, "tpu" or "gpu".
        model_flops: the operations without repetitions, if they are known; otherwise they are traced as well.
    """
    return measure_works(config, [kind], model_flops)[kind]


def measure_works(
    config: ConfigDict,
    kinds: Iterable[str],
    model_flops: float | None = None,
    trace: Callable[[ConfigDict], tuple[Program, list[int]]] | None = None,
) -> dict[str, Work]:
    """Return `measure_work` on each of several kinds of device; only the bytes of activations differ.

    `trace` returns the program of an example's gradient, by default of a pair, and which of its inputs are weights.
    """
    trace = trace or _trace_pair
    attention = {kind: choose(config.attention, config.dtype, kind) for kind in kinds}
    config = replaced(config, {"attention": "xla"})
    program, weights = trace(config)
    if model_flops is None:
        plain = program
        if config.remat != "none":
            plain, _ = trace(replaced(config, {"remat": "none"}))
        model_flops = plain.flops(without=AGAIN)
    products = list(program.products())
    convolution_flops = sums_by_kind(products)["convolution"].flops
    method = find_method(config.loss.name)
    images = method.images_per_example(flatten(config))
    decoding, vae_weights = _trace_decoding(config)
    return {
        kind: Work(
            config.remat,
            program.flops(),
            model_flops,
            peak_bytes(program, weights, by_library=kind != "tpu", fused=ATTENTION if name != "xla" else None),
            len(products),
            convolution_flops,
            images,
            peak_bytes(decoding, vae_weights, by_library=kind != "tpu"),
        )
        for kind, name in attention.items()
    }


def measure_holdings(config: ConfigDict, pipeline: Pipeline, num_devices: int) -> Holdings:
    """Compose the experiment on a mesh of that many devices, without allocating anything, and count its bytes."""
    shape = planned_mesh(config, num_devices)
    derived = resolve(config, device_count=num_devices, process_count=1)
    experiment = compose(config, derived, pipeline, Placement(abstract_mesh(shape), rules_of(config.mesh.rules)))
    return holdings_of(config, experiment, shape, held_bytes(experiment.abstract_batch()))


def planned_mesh(config: ConfigDict, num_devices: int) -> tuple[int, int, int]:
    """Return the sizes of the config's mesh on so many devices; UserError if they cannot be planned."""
    mesh = config.mesh
    shape = mesh_shape(mesh.data, mesh.fsdp, mesh.tensor, num_devices)
    if shape[2] > 1:
        raise UserError(
            f"config.mesh.tensor={shape[2]} cannot be planned: its traffic within layers is not counted. Set "
            "config.mesh.tensor=1; to train with it, set config.remat and config.data.micro_batch yourself"
        )
    return shape


def holdings_of(
    config: ConfigDict, experiment: Experiment, shape: tuple[int, int, int], batch_bytes: float
) -> Holdings:
    """Return what one device of a mesh of this shape holds of an experiment; its batch takes `batch_bytes`."""
    pipeline = experiment.pipeline
    state, frozen = experiment.abstract_state(), experiment.frozen
    denoisers = [frozen.base, frozen.reference]
    changing = {name: x for name, x in state.params.items() if experiment.rate_factors[name]}
    moving = state.reference.params if state.reference else {}

    def gathered(frozen: Any, trained: Any = None) -> float:
        rounded = sum(math.prod(x.shape) for x in jax.tree.leaves(trained)) * pipeline.dtype.itemsize
        return (whole_bytes(frozen) + rounded) * (shape[1] > 1)

    return Holdings(
        mesh=dict(zip(AXES, shape, strict=True)),
        trained=held_bytes(state.params),
        gradients=held_bytes(changing),
        optimizer=held_bytes(state.opt_state),
        ema=held_bytes(state.ema),
        moving_reference=held_bytes(moving),
        frozen_denoiser=held_bytes(denoisers),
        encoders=held_bytes(frozen) - held_bytes(denoisers),
        batch=batch_bytes,
        trained_elsewhere=missing_bytes(state.params),
        frozen_elsewhere=missing_bytes(frozen) + missing_bytes(moving) / 4 * pipeline.dtype.itemsize,
        gathered=gathered(frozen.base, state.params),
        reference_gathered=gathered(frozen.reference, moving),
        scan=config.scan,
        compute_bytes=pipeline.dtype.itemsize,
        master_bytes=jnp.dtype(config.memory.masters).itemsize,
        parameters=sum(_size(network.specs) for network in pipeline.components.values()),
        trained_parameters=_size(pipeline.trained_specs),
        drawn_images=min(-(-images_of_grid(config) // (shape[0] * shape[1])), IMAGES_AT_A_TIME),
        drawing_encoders=sum(
            _size(network.specs) * jnp.dtype(config.vae_dtype if name == "vae" else pipeline.dtype).itemsize
            for name, network in pipeline.components.items()
            if name != pipeline.denoiser_name
        ),
        old=held_bytes(state.old),
    )


def make_plan(
    holdings: Holdings,
    work: Work,
    topology: Topology,
    *,
    batch_size: int,
    pairs: int,
    utilisation: float | None = None,
) -> Plan:
    """The plan for `batch_size` pairs per step, `pairs` at a time on each device, which the mesh divides."""
    device, h = topology.device, holdings
    accumulation = batch_size // (h.mesh["data"] * h.mesh["fsdp"] * pairs)
    utilisation = utilisation or device.utilisation
    is_cut = device.kind == "tpu" and pairs * work.images < 2 * WHOLE_IMAGES
    flops = (work.flops + CUT_CONVOLUTIONS * work.convolution_flops * is_cut) * pairs * accumulation
    state = h.gradients + h.optimizer + h.ema + h.moving_reference + h.old
    moved = 2 * state + h.gradients  # all read and written, gradients read
    return Plan(
        topology=topology,
        mesh=h.mesh,
        remat=work.remat,
        accumulation=accumulation,
        batch_size=batch_size,
        micro_batch_per_device=pairs,
        utilisation=utilisation,
        parameters=h.parameters,
        trained_parameters=h.trained_parameters,
        memory=memory_by_kind(h, work, device.kind, pairs=pairs, accumulation=accumulation),
        drawing=drawing_by_kind(h, work),
        work=work,
        collectives=predict_collectives(holdings, accumulation, topology),
        compute_seconds=flops / (device.tflops * 1e12 * utilisation),
        update_seconds=moved / (device.hbm_gb_s * 1e9),
    )


def memory_by_kind(
    holdings: Holdings, work: Work, device_kind: str, *, pairs: int, accumulation: int
) -> dict[str, float]:
    """Return the bytes that a device needs for `pairs` at a time, by kind."""
    h = holdings
    return {
        f"trained weights, {'float32' if h.master_bytes == 4 else 'bfloat16'}": h.trained,
        "optimizer state": h.optimizer,
        "moving average": h.ema,
        "moving reference": h.moving_reference,
        "policy that draws": h.old * (1 + h.compute_bytes / 4),
        "gradients": h.gradients,  # their sum, to which those of a micro-batch are added as they come
        "trained weights, rounded": h.rounded + h.moving_reference / 4 * h.compute_bytes,
        "weights gathered": h.gathered + (h.reference_gathered if h.scan and accumulation > 1 else 0),
        "frozen weights, joined for the loop": h.frozen_denoiser if h.scan and h.mesh["fsdp"] == 1 else 0,
        "reference and frozen denoiser": h.frozen_denoiser,
        "VAE and text encoders": h.encoders,
        "batch": h.batch,
        "activations": work.activation_bytes * pairs,
        "program (from its size, assumed)": PROGRAM_BYTES * work.num_products if device_kind == "tpu" else 0,
    }


def drawing_by_kind(holdings: Holdings, work: Work) -> dict[str, float]:
    """Return the bytes that a device needs while an image grid of the policy is drawn, by kind; {} if none is."""
    h = holdings
    if not h.drawn_images:
        return {}
    return {
        "training state": sum(h.state_bytes),
        "trained weights, rounded": h.rounded,
        "weights gathered": h.gathered,
        "VAE and text encoders": max(h.encoders, h.drawing_encoders),
        f"decoding {h.drawn_images} image{'s' * (h.drawn_images > 1)} at a time": work.decoding_bytes * h.drawn_images,
    }


def predict_collectives(holdings: Holdings, accumulation: int, topology: Topology) -> list[Collective]:
    """Return what jit's partitioner sends on a mesh of `data` and `fsdp`."""
    h = holdings
    rounded = h.in_compute_dtype(h.trained_elsewhere)
    copies = 1 - 1 / h.mesh["data"]
    rows = [
        ("weights gathered", "fsdp", rounded + h.frozen_elsewhere, 1 if h.scan else accumulation, not h.scan),
        ("gradients scattered", "fsdp", rounded * h.gradients / h.trained, accumulation, True),
        ("gradients summed", "data", 2 * h.gradients * copies, accumulation, True),
        ("new weights gathered", "data", h.gradients * copies, 1, False),
    ]
    return [
        Collective(name, axis, received, times, can_hide, times * topology.gather_seconds(received, h.mesh[axis]))
        for name, axis, received, times, can_hide in rows
        if h.mesh[axis] > 1 and received
    ]


def abstract_mesh(shape: tuple[int, ...]) -> Mesh:
    """Return a mesh with names and sizes but no devices, which is enough for shapes and tracing."""
    return cast(Mesh, AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES)))


def _size(specs: Any) -> int:
    return sum(math.prod(spec.shape) for spec in specs.values())


def _trace_decoding(config: ConfigDict) -> tuple[Program, list[int]]:
    """Return the program that decodes the latents of one image, and which of its inputs are weights."""
    pipeline = open_structure(config)
    dtype = jnp.dtype(config.vae_dtype)
    weights = {name: jax.ShapeDtypeStruct(spec.shape, dtype) for name, spec in pipeline.vae.specs.items()}
    cells = config.data.resolution // pipeline.vae_factor
    latents_NhwC = jax.ShapeDtypeStruct((1, cells, cells, pipeline.denoiser.config.latent_channels), jnp.float32)
    program = Program(jax.make_jaxpr(functools.partial(decode_latents, pipeline.vae))(weights, latents_NhwC))
    return program, program.inputs[: len(weights)]


def _trace_pair(config: ConfigDict) -> tuple[Program, list[int]]:
    """Return the program of the gradient of one pair on one device, and which of its inputs are weights."""
    one = replaced(config, {"data.batch_size": 1, "data.micro_batch": 1})
    derived = resolve(one, device_count=1, process_count=1)
    experiment = compose(one, derived, open_structure(one), Placement(abstract_mesh((1, 1, 1))))
    return trace_gradient(experiment, experiment.abstract_batch())


def trace_gradient(experiment: Experiment, batch: Any) -> tuple[Program, list[int]]:
    """Return the program of the gradient of a batch on one device, and which of its inputs are weights."""

    def loss(params: Any, frozen: Any, batch: Any, step: jax.Array) -> jax.Array:
        inputs = experiment.compare(params, frozen, batch, step, training=True)
        return experiment.objective.loss(inputs._replace(running=experiment.objective.no_means())).sum()

    state = experiment.abstract_state()
    weights = state.params, experiment.frozen.with_state(state)
    traced = jax.make_jaxpr(jax.grad(loss))(*weights, batch, jax.ShapeDtypeStruct((), jnp.int32))
    program = Program(traced)
    return program, program.inputs[: len(jax.tree.leaves(weights))]
