"""Runs an experiment: load, resume, loop. `rounds/` runs the same loop on images that the model samples itself.

A run starts or resumes in this order:
  1. The structure of the model is read from its folder, without its weights.
  2. `config.json` in the work directory, if there is one, must describe the same experiment on the same model.
  3. The frozen models (reference, VAE, text encoders) are always read from the model folder, so a resumed run never
     uses its own policy as the reference. A reference that moves is a part of the training state.
  4. The training state is read from the newest whole checkpoint or, in a new run, made of the model's weights.
  5. Validation and the image grid of that step are made if they are due and missing: at step 0 as the baseline, later
     because the run was killed before them.
  6. The data stream continues after the last example that the checkpoint has seen.
"""

import contextlib
import dataclasses
import errno
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dpo_jax import __version__, cluster
from dpo_jax.cli import flatten
from dpo_jax.data.load.inputs import Inputs
from dpo_jax.errors import EnvironmentFault, UserError
from dpo_jax.files import remove_partials
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.rewards import Judge
from dpo_jax.streams import warn
from dpo_jax.training.announce import announce_config, announce_experiment
from dpo_jax.training.checkpoint import Checkpoints, read_config, restore, write_config
from dpo_jax.training.config import check_same_experiment, default_config, resolve
from dpo_jax.training.data import check_data, data_fingerprints, make_inputs, open_training_batches, say_buckets
from dpo_jax.training.experiment import Experiment, build, compose
from dpo_jax.training.loggers import check_libraries
from dpo_jax.training.loop import Loop
from dpo_jax.training.metrics import MetricWriter, ProgressBar
from dpo_jax.training.model import make_placement, model_fingerprints, open_model
from dpo_jax.training.needs import check_grids, check_room
from dpo_jax.training.preemption import Notice
from dpo_jax.training.sample_grids import open_sample_judge
from dpo_jax.training.startup import StartupClock, keep_compiled_programs
from dpo_jax.training.step import TrainState


def train(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Train to `config.steps`, from where the work directory is.

    Raises:
        Preempted: SIGTERM came. The state is saved, and the same call continues.
    """
    workdir = epath.Path(workdir)
    clock = StartupClock()
    derived = resolve(config, device_count=jax.device_count(), process_count=jax.process_count())
    check_backend(config)
    check_libraries(config.logging.to)
    with Notice.awaited() as notice, cluster.locked(workdir, "python -m dpo_jax.train"):
        config = check_data(config)
        pipeline = open_model(config, workdir)
        check_grids(config, pipeline)
        judge = open_sample_judge(config)
        fields = begin(config, workdir, pipeline, default_config(), data_fingerprints(config))
        inputs = make_inputs(config, pipeline)
        say_buckets(config, inputs)
        composed = compose(config, derived, pipeline, make_placement(config))
        check_room(config, workdir, composed.abstract_state())
        experiment = build(config, derived, pipeline)
        batches = open_training_batches(config, derived, inputs)
        with running(experiment, workdir, fields, notice, clock, inputs, judge) as (loop, state, position):
            if position is not None:
                batches.set_state(position)
            with batches:
                if not loop.stop_reason(int(state.step)):
                    state = loop.run(state, batches)
                if cluster.is_first():
                    print(_ending(loop, int(state.step)), flush=True)


def _ending(loop: Loop, step: int) -> str:
    """Return the last line of a run: whether it is done, and how good its model is."""
    verdict = loop.watch.verdict(loop.writer.trained)
    if step < loop.config.steps:
        reason = loop.watch.stop_reason(step)
        return f"stopped early after step {step}: {reason}{f'. In the end, {verdict}' if verdict else ''}"
    return f"all {loop.config.steps} steps are done{f': {verdict}' if verdict else ''}"


def check_backend(config: ConfigDict) -> None:
    """Raise UserError for an attention kernel that these devices do not have; warn about bfloat16 on CPUs."""
    needed = {"cudnn": "gpu", "splash": "tpu"}.get(config.attention, jax.default_backend())
    if needed != jax.default_backend():
        raise UserError(
            f'config.attention="{config.attention}" needs a {needed.upper()}, not {jax.default_backend()}; set '
            "config.attention=xla"
        )
    if config.dtype == "bfloat16" and jax.default_backend() == "cpu" and cluster.is_first():
        warn(
            "config.dtype=bfloat16 is slow on CPUs, and XLA may round policy and reference differently there, so the "
            "loss may not begin at log 2; set --config.dtype=float32"
        )


def begin(
    config: ConfigDict, workdir: epath.Path, pipeline: Pipeline, defaults: ConfigDict, fingerprints: dict[str, str]
) -> dict[str, Any]:
    """Return the fields of the experiment for `config.json`; prints those that differ from `defaults`.

    Raises:
        UserError: the work directory holds the run of another experiment.
    """
    version = {"dpo_jax_version": __version__}
    fields = flatten(config) | model_fingerprints(config, pipeline) | fingerprints | version
    saved = read_config(workdir)
    if saved is not None:
        check_same_experiment(fields, saved, workdir, defaults)
        before = saved.get("dpo_jax_version", __version__)
        if before != __version__ and cluster.is_first():
            print(f"{workdir} was trained with dpo_jax {before}; it continues with {__version__}", flush=True)
    announce_config(config, defaults, workdir)
    keep_compiled_programs(workdir)
    return fields


@contextlib.contextmanager
def running(
    experiment: Experiment,
    workdir: epath.Path,
    fields: dict[str, Any],
    notice: Notice,
    clock: StartupClock,
    inputs: Inputs | None = None,
    judge: Judge | None = None,
) -> Iterator[tuple[Loop, TrainState, dict[str, int] | None]]:
    """Give the loop, the state to continue from, and its position in the data, which is None in a new run.

    `judge` scores the image grids.
    """
    clock.lap("load")
    restored = restore(workdir, experiment.abstract_state())
    state, position = restored or (experiment.initial_state(), None)
    clock.lap("restore" if restored else "load")
    start = int(state.step)
    derived = {f"derived.{name}": value for name, value in dataclasses.asdict(experiment.derived).items()}
    with _full_disk_told(workdir), contextlib.ExitStack() as stack:
        if cluster.is_first():
            for folder in (workdir, workdir / "samples"):
                remove_partials(folder)
        write_config(workdir, fields)  # not earlier: nothing is written before all files have been read
        kept = experiment.config.checkpoint
        checkpoints = Checkpoints(workdir, keep=kept.keep, keep_every=kept.keep_every, fields=fields)
        stack.callback(checkpoints.close)
        logging = experiment.config.logging
        writer = MetricWriter(
            workdir, start, logging.to, name=logging.name, project=logging.project, fields=fields | derived
        )
        stack.enter_context(writer)
        announce_experiment(experiment, workdir, start)
        bar = stack.enter_context(ProgressBar(experiment.config.steps, start))
        loop = Loop(experiment, inputs, workdir, checkpoints, writer, bar, notice, clock, judge)
        loop.catch_up(state)
        yield loop, state, position


@contextlib.contextmanager
def _full_disk_told(workdir: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise EnvironmentFault(f"the disk of {workdir} is full; make room, then run the same command again") from error
