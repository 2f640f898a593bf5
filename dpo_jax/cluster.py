"""Joins the processes of one run, by JAX's own distributed runtime."""

import importlib.util
import os

import jax
from jax.experimental import multihost_utils

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SCHEDULERS = {"SLURM": "SLURM_STEP_NUM_TASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}
"""What tells how many processes were started, where JAX finds the rest by itself."""


def join() -> None:
    """Connects to the other processes where there are any; call it before anything else of JAX.

    The environment says whether there are: the three variables of `EXPLICIT`, the same on all processes but for the
    last; a scheduler of `SCHEDULERS`; or a TPU, whose hosts know each other.

    Raises:
        ValueError: some of `EXPLICIT` are missing or no numbers.
    """
    given = {name: os.environ[name] for name in EXPLICIT if os.environ.get(name)}
    if given:
        _join_explicitly(given)
    elif any(int(os.environ.get(name, 1)) > 1 for name in SCHEDULERS.values()) or _has_tpu():
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this process does what one must do for all."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Until all processes have come to the point of this name."""
    multihost_utils.sync_global_devices(name)


def _join_explicitly(given: dict[str, str]) -> None:
    address, count, process = (given.get(name, "") for name in EXPLICIT)
    if len(given) < len(EXPLICIT) or not (count.isdigit() and process.isdigit() and int(process) < int(count)):
        said = ", ".join(f"{name}={given.get(name, '(not set)')}" for name in EXPLICIT)
        raise ValueError(
            f"{said}: to join several processes set all three, to host:port of the first process, their number, and "
            "the number of this one, from 0; or unset them for a run of one process"
        )
    jax.distributed.initialize(address, int(count), int(process))


def _has_tpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS") or "tpu"
    return "tpu" in platforms and importlib.util.find_spec("libtpu") is not None
