"""Whether the environment says that this process is one of several; known before JAX is imported."""

import importlib.util
import os

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SCHEDULERS = {"SLURM": "SLURM_STEP_NUM_TASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}
"""What tells how many processes were started, where JAX finds the rest by itself."""


def may_have_peers() -> bool:
    """Whether other processes may belong to this run: `cluster.join` then asks JAX."""
    return (
        any(os.environ.get(name) for name in EXPLICIT)
        or any(int(os.environ.get(name, 1)) > 1 for name in SCHEDULERS.values())
        or _has_tpu()
    )


def _has_tpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS") or "tpu"
    return "tpu" in platforms and importlib.util.find_spec("libtpu") is not None
