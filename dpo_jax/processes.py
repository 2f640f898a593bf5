"""Tells from the environment, before JAX is imported, whether this process may be one of several."""

import importlib.util
import os

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Variables that describe the processes of a run where no scheduler does."""
SCHEDULERS = {"SLURM": "SLURM_STEP_NUM_TASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}
"""Variables with the number of processes under schedulers where JAX finds the rest by itself."""


def may_have_peers() -> bool:
    """Whether other processes may belong to this run, in which case `cluster.join` asks JAX."""
    return (
        any(os.environ.get(name) for name in EXPLICIT)
        or any(int(os.environ.get(name, 1)) > 1 for name in SCHEDULERS.values())
        or _has_tpu()
    )


def _has_tpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS") or "tpu"
    return "tpu" in platforms and importlib.util.find_spec("libtpu") is not None
