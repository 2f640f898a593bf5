"""What a run needs of a machine, and how long it takes there, from shapes, shardings and operation counts alone.

Computed: memory by kind, floating point operations, bytes that the collectives move. Assumed: the share of its peak
rate that a device reaches, that links reach theirs, and that collectives of micro-batches hide behind their computation
as far as it lasts.
"""

import dataclasses
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from dpo_jax.cli import replaced
from dpo_jax.errors import UserError
from dpo_jax.models.operations import AGAIN
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.planning.model_shapes import open_structure
from dpo_jax.planning.products import sums_by_kind
from dpo_jax.planning.program import Program, peak_bytes
from dpo_jax.planning.topology import GIB, Topology
from dpo_jax.sharding import AXES, Placement, mesh_shape, rules_of
from dpo_jax.training.config import resolve
from dpo_jax.training.experiment import compose

SPARE = 0.1
"""Share of the memory that a plan leaves free."""
PROGRAM_BYTES = 0.37 * 2**20
"""What a product or convolution adds to a program for TPUs, which is in the same memory: 0.36 to 0.38 MiB of whole
models, unrolled or not. GPUs' own is not counted by their compiler."""
WHOLE_IMAGES = 4
"""Pairs at a time from which XLA for TPUs convolves images whole. It cuts fewer into slices, to fill the eight rows of
the matrix unit's tiles, and the slices overlap: compiled for one pair, the convolutions of SD1.5 are 21% more work and
those of SDXL 12%; for four pairs of SD1.5 none."""
CUT_CONVOLUTIONS = 0.21
PAPER_PAIRS = 2000 * 2048
"""Of the published run (arXiv 2311.12908, section 5.1): steps times pairs a step."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What one pair costs on one device."""

    remat: str
    flops: float
    """Of all products and convolutions that are done."""
    model_flops: float
    """Without those that rematerialization and attention's backward pass repeat."""
    activation_bytes: float
    num_products: int
    """Products and convolutions in the program, those of a loop once."""
    convolution_flops: float


@dataclasses.dataclass(frozen=True)
class Holdings:
    """Bytes that a mesh leaves on one device, or takes away from it; remat and micro-batches don't change them."""

    mesh: dict[str, int]
    trained: float
    optimizer: float
    ema: float
    frozen_unet: float
    """The reference, or the base of a LoRA, or both."""
    encoders: float
    batch: float
    trained_elsewhere: float
    """Of the trained weights, what is on other devices only."""
    frozen_elsewhere: float
    """Of the frozen weights, what is on other devices only."""
    gathered: float
    """The UNet that is trained, or the base of a LoRA, as layers use it from the forward to the backward pass."""
    reference_gathered: float
    """A reference of its own as layers use it."""
    scan: bool
    """Whether equal blocks run as one loop. Their weights are put together for it, which the compiler does before the
    first micro-batch, the reference's as well; otherwise it gathers them in each micro-batch, when they are needed."""
    compute_bytes: int
    """Of a number in the compute dtype."""
    parameters: int
    trained_parameters: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of communication."""

    name: str
    axis: str
    received_bytes: float
    """By each device, each time."""
    times: int
    """In one optimizer step."""
    can_hide: bool
    """Whether it is needed among the computations of micro-batches, and can go on beside them."""
    seconds: float
    """In one optimizer step."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One config on one machine."""

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
    """Bytes on one device, by kind."""
    work: Work
    collectives: list[Collective]
    compute_seconds: float
    """Of one optimizer step."""
    update_seconds: float
    """The memory traffic of the optimizer."""

    @property
    def hbm_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def hbm_limit_bytes(self) -> float:
        return self.topology.device.hbm_gib * GIB

    @property
    def fits(self) -> bool:
        """With the spare share free."""
        return self.hbm_bytes <= (1 - SPARE) * self.hbm_limit_bytes

    @property
    def collective_seconds(self) -> float:
        return sum(collective.seconds for collective in self.collectives)

    @property
    def exposed_seconds(self) -> float:
        """What of the collectives does not hide behind the computation of the micro-batches."""
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
        """Of as many pairs as the published run saw."""
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
    """Traces the gradient of one pair, with what `config.remat` repeats and, where not known yet, without.

    `kind` is that of the device, "tpu" or "gpu". Attention is counted as XLA does it.
    """
    config = replaced(config, {"attention": "xla"})
    program, activation_bytes = _trace_pair(config, kind)
    if model_flops is None:
        plain = program
        if config.remat != "none":
            plain, _ = _trace_pair(replaced(config, {"remat": "none"}), kind)
        model_flops = plain.flops(without=AGAIN)
    products = list(program.products())
    convolution_flops = sums_by_kind(products)["convolution"].flops
    return Work(config.remat, program.flops(), model_flops, activation_bytes, len(products), convolution_flops)


def measure_holdings(config: ConfigDict, pipeline: Pipeline, num_devices: int) -> Holdings:
    """Composes the experiment on a mesh of that many devices, with nothing in memory."""
    mesh = config.mesh
    shape = mesh_shape(mesh.data, mesh.fsdp, mesh.tensor, num_devices)
    if shape[2] > 1:
        raise UserError("a plan for mesh.tensor > 1 is not possible: what it sends within layers is not counted")
    derived = resolve(config, device_count=num_devices, process_count=1)
    experiment = compose(config, derived, pipeline, Placement(_mesh(shape), rules_of(mesh.rules)))
    state, frozen = experiment.abstract_state(), experiment.frozen
    unets = [params for name, params in frozen.items() if name in ("reference", "base")]

    def gathered(params: Any) -> float:
        return sum(math.prod(x.shape) for x in jax.tree.leaves(params)) * pipeline.dtype.itemsize * (shape[1] > 1)

    return Holdings(
        mesh=dict(zip(AXES, shape, strict=True)),
        trained=held_bytes(state.params),
        optimizer=held_bytes(state.opt_state),
        ema=held_bytes(state.ema),
        frozen_unet=held_bytes(unets),
        encoders=held_bytes(frozen) - held_bytes(unets),
        batch=held_bytes(experiment.abstract_batch()),
        trained_elsewhere=missing_bytes(state.params),
        frozen_elsewhere=missing_bytes(frozen),
        gathered=gathered(frozen.get("base", state.params)),
        reference_gathered=gathered(frozen.get("reference", {})),
        scan=config.scan,
        compute_bytes=pipeline.dtype.itemsize,
        parameters=sum(_size(network.specs) for network in pipeline.components.values()),
        trained_parameters=_size(pipeline.trained_specs),
    )


def round_sizes(
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
    is_cut = device.kind == "tpu" and pairs < WHOLE_IMAGES
    flops = (work.flops + CUT_CONVOLUTIONS * work.convolution_flops * is_cut) * pairs * accumulation
    moved = 2 * (h.trained + h.optimizer + h.ema) + h.trained  # all read and written, gradients read
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
        work=work,
        collectives=predict_collectives(holdings, accumulation, topology),
        compute_seconds=flops / (device.tflops * 1e12 * utilisation),
        update_seconds=moved / (device.hbm_gb_s * 1e9),
    )


def memory_by_kind(
    holdings: Holdings, work: Work, device_kind: str, *, pairs: int, accumulation: int
) -> dict[str, float]:
    """Bytes that a device needs for so many pairs at a time."""
    h = holdings
    return {
        "trained weights, float32": h.trained,
        "optimizer state": h.optimizer,
        "moving average": h.ema,
        "gradients": h.trained * (2 if accumulation > 1 else 1),  # of one micro-batch, and the sum
        "trained weights, rounded": h.trained / 4 * h.compute_bytes,
        "weights gathered": h.gathered + (h.reference_gathered if h.scan and accumulation > 1 else 0),
        "reference and frozen UNet": h.frozen_unet,
        "VAE and text encoders": h.encoders,
        "batch": h.batch,
        "activations": work.activation_bytes * pairs,
        "program (from its size, assumed)": PROGRAM_BYTES * work.num_products if device_kind == "tpu" else 0,
    }


def predict_collectives(holdings: Holdings, accumulation: int, topology: Topology) -> list[Collective]:
    """What jit's partitioner sends for a mesh of data and fsdp."""
    h = holdings
    rounded = h.trained_elsewhere / 4 * h.compute_bytes
    copies = 1 - 1 / h.mesh["data"]
    rows = [
        ("weights gathered", "fsdp", rounded + h.frozen_elsewhere, 1 if h.scan else accumulation, not h.scan),
        ("gradients scattered", "fsdp", rounded, accumulation, True),
        ("gradients summed", "data", 2 * h.trained * copies, accumulation, True),
        ("new weights gathered", "data", h.trained * copies, 1, False),
    ]
    return [
        Collective(name, axis, received, times, can_hide, times * topology.gather_seconds(received, h.mesh[axis]))
        for name, axis, received, times, can_hide in rows
        if h.mesh[axis] > 1 and received
    ]


def held_bytes(tree: Any) -> float:
    """Bytes of a pytree of sharded shapes on one device."""
    return sum(math.prod(_local(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def missing_bytes(tree: Any) -> float:
    """Bytes of a pytree of sharded shapes that are on other devices only."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)) - held_bytes(tree)


def _mesh(shape: tuple[int, ...]) -> Mesh:
    """Names and sizes without devices, which is all that shapes and tracing ask of a mesh."""
    return cast(Mesh, AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES)))


def _local(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    return x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)


def _size(specs: Any) -> int:
    return sum(math.prod(spec.shape) for spec in specs.values())


def _trace_pair(config: ConfigDict, kind: str) -> tuple[Program, float]:
    """The gradient of one pair on one device, and its bytes of activations."""
    one = replaced(config, {"data.batch_size": 1, "data.micro_batch": 1})
    derived = resolve(one, device_count=1, process_count=1)
    experiment = compose(one, derived, open_structure(one), Placement(_mesh((1, 1, 1))))

    def loss(params: Any, frozen: Any, batch: Any, step: jax.Array) -> jax.Array:
        scores = experiment.score(params, frozen, batch, step, training=True)
        return experiment.objective.loss(scores, batch.preference_BK[:, : scores.error_BK.shape[1]]).sum()

    weights = experiment.abstract_state().params, experiment.frozen
    traced = jax.make_jaxpr(jax.grad(loss))(*weights, experiment.abstract_batch(), jax.ShapeDtypeStruct((), jnp.int32))
    program = Program(traced)
    num_weights = len(jax.tree.leaves(weights))
    return program, peak_bytes(program, program.inputs[:num_weights], by_library=kind == "gpu")
