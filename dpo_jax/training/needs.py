"""Checks, before anything is loaded, that later image grids can be drawn and that checkpoints have room on the disk."""

import math
import shutil
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dpo_jax import cluster
from dpo_jax.errors import EnvironmentFault, UserError
from dpo_jax.files import is_local, readable_bytes
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.sampling.generate import plan_sampling
from dpo_jax.streams import warn
from dpo_jax.training.model import sampling_of

LEAST_SHARE = 0.9
"""Smallest size of a checkpoint on disk as a share of the state's bytes: Orbax compresses it."""


def check_grids(config: ConfigDict, pipeline: Pipeline) -> None:
    """Raise UserError if the model cannot draw the image grids of the config."""
    if not config.sample.every:
        return
    try:
        plan_sampling(pipeline, sampling_of(config), config.data.resolution)
    except ValueError as error:
        raise UserError(
            f"the image grids of config.sample.every={config.sample.every} can't be drawn: {error}. Change "
            "config.data.resolution or config.sample, or set config.sample.every=0"
        ) from error


def check_room(config: ConfigDict, workdir: epath.PathLike, state: Any) -> None:
    """Warn where the checkpoints that are kept do not fit on the disk of `workdir`; object stores always have room.

    Args:
        config: of the experiment.
        workdir: of the run.
        state: shapes of the training state.

    Raises:
        EnvironmentFault: there is no room for one more checkpoint.
    """
    with cluster.together("to look for room for checkpoints"):
        if cluster.is_first() and is_local(workdir):
            _check_room(config, epath.Path(workdir), state)


def _check_room(config: ConfigDict, workdir: epath.Path, state: Any) -> None:
    folder = workdir / "checkpoints"
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    if max(steps, default=-1) >= config.steps:
        return  # no more checkpoints will be saved
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    # Files that a killed run left half-written are removed before the next checkpoint is written.
    leftovers = [file for file in Path(folder).glob("*.orbax-checkpoint-tmp*/**/*") if file.is_file()]
    free = shutil.disk_usage(folder if folder.exists() else workdir).free
    free += sum(file.stat().st_size for file in leftovers)
    if free < LEAST_SHARE * size:
        raise EnvironmentFault(
            f"a checkpoint takes {readable_bytes(size)}, and {readable_bytes(free)} are free in {workdir}; make room "
            "there, or choose a --workdir on a larger disk"
        )
    keep, keep_every, left = config.checkpoint.keep, config.checkpoint.keep_every, config.steps - max(steps, default=0)
    more = -(-left // config.checkpoint.every)
    if keep:  # the oldest is removed when the next one is whole
        newest = [step for step in steps if not keep_every or step % keep_every]
        also = (left // keep_every if keep_every else 0) + bool(config.checkpoint.best or "online" in config)
        more = min(max(keep + 1 - len(newest), 1) + also, more)
    if free < more * size:
        warn(
            f"{readable_bytes(free)} are free in {workdir}, but the run needs room for {more} more checkpoints of "
            f"{readable_bytes(size)}; make room, or keep fewer with config.checkpoint.keep={keep} and "
            f"keep_every={keep_every}"
        )
