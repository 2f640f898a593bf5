"""Compiles the real training step for TPUs or GPUs that this machine does not have.

XLA compiles for a described topology as for a real one. It needs the compiler (`pip install "jax[tpu]"` or
`"jax[cuda12]"`), but no TPU or GPU.
"""

import importlib.util
import os
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dpo_jax.batch import PreferenceBatch
from dpo_jax.errors import UserError
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.planning.hlo import count_collectives, count_traffic, products
from dpo_jax.planning.products import Sums, sums_by_kind
from dpo_jax.planning.program import Program
from dpo_jax.planning.rounds import compose_planned, with_sizes
from dpo_jax.planning.topology import GIB, Topology
from dpo_jax.rounds.method import abstract_rows
from dpo_jax.sharding import Placement, batch_sharding, make_mesh, rules_of
from dpo_jax.training.config import resolve
from dpo_jax.training.experiment import Experiment, compose


class Compiled(NamedTuple):
    """XLA's own figures for one device."""

    hbm_bytes: float
    """Arguments, results that do not reuse an argument's memory, temporaries and code."""
    argument_bytes: float
    temporary_bytes: float
    collectives: dict[str, dict[str, float]]
    """Number ("times") and bytes of the results per optimizer step, by kind."""
    products: dict[str, Sums]
    """Products per device and optimizer step, by kind (`products.KINDS`)."""
    traced_products: dict[str, Sums]
    """The same for the program that the compiler received."""
    float32_flops: float
    """Operations of the products that read float32."""
    traffic: dict[str, float]
    """Bytes that a device reads and writes per optimizer step, by purpose (`hlo.count_traffic`)."""


def compile_step(config: ConfigDict, pipeline: Pipeline, topology: Topology) -> Compiled:
    """Compile the step that `dpo_jax.train` runs, which takes tens of minutes for a whole model on a few cores.

    Raises:
        UserError: the compiler for the device is missing, or the step does not fit its memory. Only the compiler for
            TPUs checks the memory.
    """
    placement = described_placement(config, topology)
    derived = resolve(config, device_count=placement.mesh.size, process_count=1)
    experiment = compose(config, derived, pipeline, placement)
    return compile_experiment(experiment, experiment.abstract_batch(), topology)


def compile_update(config: ConfigDict, pipeline: Pipeline, topology: Topology) -> Compiled:
    """Compile the update that `dpo_jax.online` makes; raises as `compile_step`."""
    placement = described_placement(config, topology)
    config, sizes = with_sizes(config, pipeline, placement.mesh.size)
    experiment = compose_planned(config, sizes, pipeline, placement)
    split = batch_sharding(placement.mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split),
        abstract_rows(config, pipeline, config.data.batch_size * sizes.timesteps),
    )
    return compile_experiment(experiment, batch, topology)


def described_placement(config: ConfigDict, topology: Topology) -> Placement:
    """Return the config's mesh of a topology's devices; UserError if their compiler is not installed."""
    devices = described_devices(topology)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    return Placement(mesh, rules_of(config.mesh.rules))


def compile_experiment(experiment: Experiment, batch: PreferenceBatch, topology: Topology) -> Compiled:
    """Compile an experiment's step for a batch of these shapes and shardings; see `compile_step`."""
    arguments = experiment.abstract_state(), experiment.frozen, batch
    step = experiment.train_step()
    options: dict[str, str | bool] = {}
    if topology.device.kind == "gpu":  # without a GPU to try, XLA's own kernels for products fail for some sizes
        options["xla_gpu_enable_triton_gemm"] = False
    try:
        compiled = step.lower(*arguments).compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("RESOURCE_EXHAUSTED: ")[2].partition("\n")[0]
        raise UserError(
            f"the step does not fit {topology.name}: {reason} Set a smaller data.micro_batch, another remat or a "
            "larger mesh.fsdp, or let --fit find settings that fit"
        ) from error
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None  # neither is None for described devices
    assert text is not None
    traced, found = Program(jax.make_jaxpr(step)(*arguments)), list(products(text))
    share = 1 / experiment.mesh.size  # of the batch on each device
    return Compiled(
        hbm_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        collectives=count_collectives(text),
        products=sums_by_kind(found),
        traced_products=sums_by_kind(traced.products(share)),
        float32_flops=sum(product.flops for product in found if "f32" in product.dtypes),
        traffic=count_traffic(text),
    )


def described_devices(topology: Topology) -> Any:
    """Return the devices of a topology, to compile for. Raises UserError if their compiler is not installed."""
    from jax.experimental import topologies

    if topology.device.kind == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise UserError('--compile needs the TPU compiler. Run pip install "jax[tpu]"; it needs no TPU')
        # Outside the cloud no metadata server says which TPU this is, and another process may have libtpu open.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise UserError('--compile needs the GPU compiler. Run pip install "jax[cuda12]"; it needs no GPU')
    if "h100" not in topology.name and "h200" not in topology.name:
        raise UserError(
            f"--compile knows the compiler's description of h100, h200 and TPUs, not of {topology.name}. Leave it out, "
            "or run it for h100"
        )
    per_host, hosts = topology.shape
    return topologies.get_topology_desc(
        "", "cuda", target_config=hopper(topology), topology=f"1x{hosts}x{per_host}"
    ).devices


def hopper(topology: Topology) -> str:
    """Return the GPU as XLA describes it (`GpuTargetConfigProto`). H100 and H200 have the same chip."""
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: 9 }}
          core_count: 132
          fpus_per_core: 128
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          registers_per_block_limit: 65536
          registers_per_core_limit: 65536
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: 232448
          shared_memory_per_core: 233472
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          clock_rate_ghz: 1.98
          l2_cache_size: 52428800
          memory_bandwidth: {topology.device.hbm_gb_s * 10**9:.0f}
          device_memory_size: {topology.device.hbm_gib * GIB:.0f}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        device_description_str: "NVIDIA {topology.name.partition(":")[0].upper()}"
    """


def summarize(compiled: Compiled) -> dict[str, Any]:
    """Return the figures for the plan's JSON."""
    return {
        "hbm_gib": compiled.hbm_bytes / GIB,
        "argument_gib": compiled.argument_bytes / GIB,
        "temporary_gib": compiled.temporary_bytes / GIB,
        "collectives": compiled.collectives,
        "products": {kind: sums._asdict() for kind, sums in compiled.products.items()},
        "traced_products": {kind: sums._asdict() for kind, sums in compiled.traced_products.items()},
        "float32_flops": compiled.float32_flops,
        "traffic_bytes": compiled.traffic,
    }
