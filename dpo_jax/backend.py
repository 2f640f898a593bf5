"""Settings of JAX's backends that dpo_jax needs, or that make it faster, each with its reason.

They are environment variables, which a backend reads when it starts, so importing dpo_jax sets them. What the user has
set stays as it is.
"""

import importlib.util
import os
import sys
import warnings

MEMORY_FRACTION = 0.92
"""Share of a GPU's memory that JAX takes at its start, whose own default is 0.75. The rest is for the CUDA context,
cuBLAS and cuDNN, which need about 2 GiB; of a card with 24 GiB this leaves as much."""

ROUND_EXACTLY = {"xla_allow_excess_precision": "false"}
"""Without it, beta = 5000 turns rounding into a first loss of 2.3 instead of log 2: XLA keeps bfloat16 intermediates in
float32 wherever a fusion can, so that the forward passes of policy and reference round differently although their
weights are equal. On CPUs the fusions of YNNPACK do the same in larger batches in any case; configs for CPUs use
float32."""

GPU_FLAGS = {
    # Queries, keys and values are three products: what XLA makes of them, one product, is cut up again by copies, since
    # attention reads whole arrays. As compiled for an H200, a transformer block of SDXL moves 5% less without it.
    "xla_gpu_dot_merger_threshold_mb": "0",
    # Collectives run beside the computation: FSDP gathers the next block's weights during this one. Not tried on GPUs.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
}

TPU_FLAGS = {
    # Collectives run in pieces beside the products that need them, as MaxText and MaxDiffusion set it. Compiled for
    # v5e and v5p, but not tried on them.
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}


def set_variables() -> None:
    """Set the variables; warns if a backend has started, since the flag that losses in bfloat16 need has no effect."""
    needed = not any(flag in os.environ.get("XLA_FLAGS", "") for flag in ROUND_EXACTLY)
    _add_flags("XLA_FLAGS", ROUND_EXACTLY)
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        _add_flags("XLA_FLAGS", GPU_FLAGS)
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    if importlib.util.find_spec("libtpu"):
        _add_flags("LIBTPU_INIT_ARGS", TPU_FLAGS)
    bridge = sys.modules.get("jax._src.xla_bridge")
    if needed and bridge is not None and getattr(bridge, "backends_are_initialized", bool)():
        flag = " ".join(f"--{name}={value}" for name, value in ROUND_EXACTLY.items())
        warnings.warn(
            "JAX was started before dpo_jax was imported, so the XLA flag that dpo_jax sets has no effect, and losses "
            f"in bfloat16 can be wrong. Import dpo_jax before JAX is used, or set XLA_FLAGS={flag}.",
            RuntimeWarning,
            stacklevel=4,
        )


def _add_flags(variable: str, flags: dict[str, str]) -> None:
    """Append to an environment variable the flags that it does not name."""
    given = os.environ.get(variable, "")
    added = [f"--{name}={value}" for name, value in flags.items() if name not in given]
    os.environ[variable] = " ".join([*given.split(), *added])
