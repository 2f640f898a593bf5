"""What the compiler makes of the real training step, for devices that are not there.

XLA compiles for a described slice as for a real one: the compiler must be installed (`pip install "jax[tpu]"` or
`"jax[cuda12]"`), but no TPU or GPU has to be there.
"""

import importlib.util
import os
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dpo_jax.errors import UserError
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.planning.hlo import count_collectives, count_traffic, products
from dpo_jax.planning.products import Sums, sums_by_kind
from dpo_jax.planning.program import Program
from dpo_jax.planning.topology import GIB, Topology
from dpo_jax.sharding import Placement, make_mesh, rules_of
from dpo_jax.training.config import resolve
from dpo_jax.training.experiment import compose


class Compiled(NamedTuple):
    """XLA's own figures for one device."""

    hbm_bytes: float
    """Arguments, results that don't take an argument's place, temporaries and code."""
    argument_bytes: float
    temporary_bytes: float
    collectives: dict[str, dict[str, float]]
    """By kind: how many times one is done in an optimizer step, and the bytes of their results."""
    products: dict[str, Sums]
    """By kind (`products.KINDS`), of a device in an optimizer step."""
    traced_products: dict[str, Sums]
    """The same of the program that the compiler was given."""
    float32_flops: float
    """Of those products, what reads float32."""
    traffic: dict[str, float]
    """Bytes that a device reads and writes in an optimizer step, by what for (`hlo.count_traffic`)."""


def compile_step(config: ConfigDict, pipeline: Pipeline, topology: Topology) -> Compiled:
    """Compiles the step that `dpo_jax.train` would run. Tens of minutes for a whole model on a few cores.

    Raises ValueError where the compiler for that device is missing, or finds the memory too small (for TPUs; a
    compiler for GPUs doesn't look).
    """
    devices = described_devices(topology)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    derived = resolve(config, device_count=len(devices), process_count=1)
    experiment = compose(config, derived, pipeline, Placement(mesh, rules_of(config.mesh.rules)))
    arguments = experiment.abstract_state(), experiment.frozen, experiment.abstract_batch()
    step = experiment.train_step()
    options: dict[str, str | bool] = {}
    if topology.device.kind == "gpu":  # XLA's own kernels for products, chosen with no GPU to try, fail for some sizes
        options["xla_gpu_enable_triton_gemm"] = False
    try:
        compiled = step.lower(*arguments).compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("RESOURCE_EXHAUSTED: ")[2].partition("\n")[0]
        raise UserError(
            f"the step does not fit {topology.name}: {reason} Set a smaller data.micro_batch, another "
            "remat, or a larger mesh.fsdp; --fit finds what fits"
        ) from error
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None  # nor is the text, of such devices
    assert text is not None
    traced, found = Program(jax.make_jaxpr(step)(*arguments)), list(products(text))
    share = 1 / len(devices)  # the batch is divided over all
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
    """Devices to compile for. Raises ValueError where their compiler is missing."""
    from jax.experimental import topologies

    if topology.device.kind == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise UserError('--compile needs the TPU compiler, libtpu: pip install "jax[tpu]"; no TPU has to be there')
        # Off the cloud there is no metadata server to ask which TPU this is; and another process may have libtpu open.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise UserError('--compile needs the GPU compiler: pip install "jax[cuda12]"; no GPU has to be there')
    per_host, hosts = topology.shape
    return topologies.get_topology_desc(
        "", "cuda", target_config=hopper(topology), topology=f"1x{hosts}x{per_host}"
    ).devices


def hopper(topology: Topology) -> str:
    """The GPU as XLA describes one (its `GpuTargetConfigProto`). Both that can be planned for have the same chip."""
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
    """For the plan's JSON."""
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
