"""Runs an experiment: load, resume, loop. `rounds/` runs the same loop on images that the model samples itself.

Order of a start or a resume:
  1. the model's structure is read from its folder, without memory;
  2. the work directory's `config.json`, if there is one, must describe the same experiment on the same model;
  3. the frozen models (reference, VAE, text encoders) are read from the model folder, at every start: a resumed run can
     never drift onto its own policy;
  4. the training state comes from the newest whole checkpoint, or else the policy's weights from the model folder;
  5. what was due at that step and is missing, as the run was killed before it, is done: validation, image grid;
  6. the data stream continues after the last sample that the checkpoint has seen.
"""

import contextlib
import dataclasses
import errno
import itertools
import math
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dpo_jax import cluster, interrupts
from dpo_jax.batch import PreferenceBatch
from dpo_jax.cli import flatten
from dpo_jax.data.image_grid import image_grid
from dpo_jax.data.load.inputs import Inputs
from dpo_jax.data.load.pipeline import BatchIterator
from dpo_jax.errors import EnvironmentFault, UserError
from dpo_jax.files import remove_partials, write_whole
from dpo_jax.models.pipeline import Pipeline
from dpo_jax.sampling.generate import Generator
from dpo_jax.sampling.grid import save_png
from dpo_jax.sharding import replicated, to_devices
from dpo_jax.training.checkpoint import Checkpoints, read_config, restore, write_config
from dpo_jax.training.config import check_same_experiment, default_config, describe_batch, resolve
from dpo_jax.training.data import (
    check_data,
    data_fingerprints,
    make_inputs,
    open_training_batches,
    open_validation_batches,
)
from dpo_jax.training.experiment import Experiment, build, compose
from dpo_jax.training.loggers import check_libraries
from dpo_jax.training.metrics import MetricWriter, ProgressBar
from dpo_jax.training.model import (
    for_sampling,
    load_encoders,
    make_generator,
    make_placement,
    model_fingerprints,
    open_model,
)
from dpo_jax.training.needs import check_grids, check_room
from dpo_jax.training.preemption import Notice, Preempted
from dpo_jax.training.startup import StartClock, keep_compiled_programs
from dpo_jax.training.step import Frozen, TrainState, make_eval_step, reference_params
from dpo_jax.weights.layout import Params

PREEMPTED = "preempted after step {}; run the same command again to go on from there"


def train(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains to `config.steps`, continuing what the work directory holds.

    Raises:
        Preempted: SIGTERM came; the state is saved, and the same call continues.
    """
    workdir = epath.Path(workdir)
    clock = StartClock()
    derived = resolve(config, device_count=jax.device_count(), process_count=jax.process_count())
    check_backend(config)
    check_libraries(config.logging.to)
    with Notice.awaited() as notice, cluster.locked(workdir, "python -m dpo_jax.train"):
        config = check_data(config)
        pipeline = open_model(config, workdir)
        check_grids(config, pipeline)
        fields = begin(config, workdir, pipeline, default_config(), data_fingerprints(config))
        inputs = make_inputs(config, pipeline)
        composed = compose(config, derived, pipeline, make_placement(config))
        check_room(config, workdir, composed.abstract_state())
        experiment = build(config, derived, pipeline)
        batches = open_training_batches(config, derived, inputs)
        with running(experiment, workdir, fields, notice, clock, inputs) as (loop, state, position):
            if position is not None:
                batches.set_state(position)
            if int(state.step) >= config.steps and cluster.is_first():
                print(f"all {config.steps} steps are done", flush=True)
            with batches:
                loop.run(state, batches)


def check_backend(config: ConfigDict) -> None:
    """Refuses an attention kernel that is for other devices than those here; ValueError. Warns of bfloat16 on CPUs."""
    needed = {"cudnn": "gpu", "splash": "tpu"}.get(config.attention, jax.default_backend())
    if needed != jax.default_backend():
        raise UserError(
            f'config.attention="{config.attention}" needs a {needed.upper()}, not {jax.default_backend()}; set '
            "config.attention=xla"
        )
    if config.dtype == "bfloat16" and jax.default_backend() == "cpu" and cluster.is_first():
        print(
            "warning: config.dtype=bfloat16 on CPUs is slow, and XLA may round policy and reference differently there, "
            "so that the loss need not begin at log 2; set --config.dtype=float32",
            file=sys.stderr,
            flush=True,
        )


def begin(
    config: ConfigDict, workdir: epath.Path, pipeline: Pipeline, defaults: ConfigDict, fingerprints: dict[str, str]
) -> dict[str, Any]:
    """The fields of the experiment for `config.json`, after a look at those of the run that is to be continued."""
    fields = flatten(config) | model_fingerprints(config, pipeline) | fingerprints
    saved = read_config(workdir)
    if saved is not None:
        check_same_experiment(fields, saved, workdir, defaults)
    keep_compiled_programs(workdir)
    return fields


@contextlib.contextmanager
def running(
    experiment: Experiment,
    workdir: epath.Path,
    fields: dict[str, Any],
    notice: Notice,
    clock: StartClock,
    inputs: Inputs | None = None,
) -> Iterator[tuple["Loop", TrainState, dict[str, int] | None]]:
    """The loop, the state to go on from, and the data position that belongs to it, None at the beginning."""
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
        write_config(workdir, fields)  # all that is read has been read
        checkpoints = Checkpoints(workdir, keep=experiment.config.checkpoint.keep, fields=fields)
        stack.callback(checkpoints.close)
        logging = experiment.config.logging
        writer = MetricWriter(
            workdir, start, logging.to, name=logging.name, project=logging.project, fields=fields | derived
        )
        stack.enter_context(writer)
        _announce(experiment, workdir, start)
        bar = stack.enter_context(ProgressBar(experiment.config.steps, start))
        loop = Loop(experiment, inputs, workdir, checkpoints, writer, bar, notice, clock)
        loop.catch_up(state)
        yield loop, state, position


@contextlib.contextmanager
def _full_disk_told(workdir: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise EnvironmentFault(f"no room is left in {workdir}; make some, then run the same command again") from error


class Batches(Protocol):
    """What the loop trains on; `get_state` is kept with each checkpoint."""

    def __next__(self) -> PreferenceBatch: ...

    def get_state(self) -> dict[str, int]: ...


class Loop:
    """The loop itself: step, watch, log, and at intervals validate, sample and save."""

    def __init__(
        self,
        experiment: Experiment,
        inputs: Inputs | None,
        workdir: epath.Path,
        checkpoints: Checkpoints,
        writer: MetricWriter,
        bar: ProgressBar,
        notice: Notice,
        clock: StartClock,
    ):
        self.experiment, self.inputs, self.config, self.workdir = experiment, inputs, experiment.config, workdir
        self.checkpoints, self.writer, self.bar = checkpoints, writer, bar
        self.notice, self.clock = notice, clock
        self.train_step = experiment.train_step()
        self.place = to_devices(experiment.mesh)
        self._began: tuple[float, int] | None = None
        """When the first step of this process had been made, and which one it was."""
        self.eval_step = jax.jit(
            make_eval_step(experiment.score, experiment.objective), out_shardings=replicated(experiment.mesh)
        )
        self._generator: Generator | None = None
        self._reference_images: np.ndarray | None = None

    def catch_up(self, state: TrainState) -> None:
        """Does what was due at the step of a restored state, and is not there: a kill came after the checkpoint."""
        step, params = int(state.step), state.ema or state.params
        if not step:
            return
        if jax.process_count() == 1 and self.notice.received():
            raise Preempted(PREEMPTED.format(step))
        if self._validates_at(step) and cluster.says_first(step not in self.writer.validated):
            self._validate(step, params)
        if self._samples_at(step) and cluster.says_first(cluster.is_first() and not self._grid_file(step).exists()):
            self._sample(step, params)
        self.clock.lap("catch up")

    def run(self, state: TrainState, batches: Batches, end: int | None = None) -> TrainState:
        """Trains to step `end`, by default the last one, where it logs and saves whatever the intervals."""
        config, total = self.config, self.config.steps
        start, end = int(state.step), total if end is None else end
        window: list[dict[str, float]] = []
        pending: dict[str, jax.Array] | None = None
        timer, timed_from = time.monotonic(), start

        if start < end and self.notice.given(start):
            raise Preempted(PREEMPTED.format(start))
        for step in range(start + 1, end + 1):
            interrupts.check()
            batch = self.place(next(batches))
            # Compiling may take long, and not the same time everywhere: so the first step isn't watched.
            with cluster.watched(f"to begin step {step}") if self._began else contextlib.nullcontext():
                state, metrics = self.train_step(state, self.experiment.frozen, batch)
            if pending is not None:  # one step late, so that the host never waits for the device
                window.append(self._fetch(pending, step - 1))
            pending = metrics
            self.bar.advance(step)
            self.checkpoints.check()

            stops = self.notice.given(step) and step < total
            saves = step % config.checkpoint.every == 0 or step == end or stops
            logs = step % config.log_every == 0 or step == end or stops
            validates = self._validates_at(step)
            samples = self._samples_at(step)
            if self._began is None:
                cluster.wait("first step compiled")
                window.append(self._fetch(pending, step))
                pending = None
                if start == 0:
                    self._first_loss(window[-1]["train/loss"])
                self.clock.lap("first step")
                self.bar.say(f"start-up: {self.clock}")
                timer, timed_from = time.monotonic(), step  # compilation is not speed
                self._began = timer, step
            if not (saves or logs or validates or samples):
                continue
            if pending is not None:
                window.append(self._fetch(pending, step))
                pending = None
            if logs:
                elapsed = time.monotonic() - timer
                if isinstance(batches, BatchIterator):  # only told where there are some
                    damaged = cluster.total(len(batches.damaged))
                    window[-1] |= {"data/damaged_records": damaged} if damaged else {}
                self._log(step, window, elapsed / (step - timed_from) if step > timed_from else None)
                window, timer, timed_from = [], time.monotonic(), step
            paused = time.monotonic()
            if saves:
                with cluster.watched(f"to save step {step}"):
                    self.checkpoints.save(state, position=batches.get_state())
            if stops:
                self.checkpoints.close()
                raise Preempted(PREEMPTED.format(step))
            if validates:
                self._validate(step, state.ema or state.params)
            if samples:
                self._sample(step, state.ema or state.params)
            timer += time.monotonic() - paused
        return state

    def _fetch(self, metrics: Mapping[str, jax.Array], step: int) -> dict[str, float]:
        """Metrics as numbers; stops the run where the loss or the gradient is not finite."""
        with cluster.watched(f"to end step {step}"):
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        finite = ("train/loss", "train/gradient_norm", "train/update_norm")
        bad = [name for name in finite if not math.isfinite(values[name])]
        if bad:
            last = self.checkpoints.latest_step()
            kept = f"step {last} in {self.checkpoints.folder}" if last is not None else "none yet"
            raise UserError(
                f"{bad[0]} is {values[bad[0]]} at step {step}; last good checkpoint: {kept}. "
                "In a new --workdir, try a lower optimizer.learning_rate or loss.beta, or dtype=float32"
            )
        return values

    def _log(self, step: int, window: list[dict[str, float]], seconds_per_step: float | None) -> None:
        means = {name: float(np.mean([values[name] for values in window if name in values])) for name in window[-1]}
        means["train/learning_rate"] = float(self.experiment.learning_rate(step - 1))
        seconds_left = None
        if seconds_per_step is not None and self._began is not None:
            unit = "prompts" if self.inputs is None else "pairs"
            means[f"speed/{unit}_per_second"] = self.config.data.batch_size / seconds_per_step
            since, first = self._began  # with all that was done between steps, such as sampling rounds
            seconds_left = (self.config.steps - step) * (time.monotonic() - since) / (step - first)
        self.writer.scalars(step, means)
        self.bar.show(step, means, seconds_left)

    def _first_loss(self, loss: float) -> None:
        config = self.config
        same = not config.reference and (not config.lora.init or config.lora.init_reference)
        if config.loss.name == "dpo" and same:
            self.bar.say(f"loss before the first update {loss:.6f}; policy = reference makes log 2 = {math.log(2):.6f}")

    def _validates_at(self, step: int) -> bool:
        """Only a run on a data set has held-out pairs."""
        every = self.config.validation.every if self.inputs is not None else 0
        return bool(every) and (step % every == 0 or step == self.config.steps)

    def _samples_at(self, step: int) -> bool:
        every = self.config.sample.every
        return bool(every) and (step % every == 0 or step == self.config.steps)

    def _validate(self, step: int, params: Params) -> None:
        """Implicit accuracy and errors on held-out pairs, the same timesteps and noises every time."""
        assert self.inputs is not None, "only a run on a data set validates"
        experiment, validation = self.experiment, self.config.validation
        sums: dict[str, float] = {}
        weight = 0.0
        with open_validation_batches(self.config, experiment.derived, self.inputs) as batches:
            pairs_a_batch = experiment.derived.local_batch_size // experiment.derived.accumulation * jax.process_count()
            for batch in itertools.islice(batches, -(-validation.max_pairs // pairs_a_batch)):
                counted = batch.weight_B * (batch.index_B < validation.max_pairs)
                on_device = self.place(batch._replace(weight_B=counted.astype(np.float32)))
                for number in range(validation.draws):
                    values, w = jax.device_get(self.eval_step(params, experiment.frozen, on_device, jnp.int32(number)))
                    weight += float(w)
                    sums = {name: sums.get(name, 0.0) + float(value) for name, value in values.items()}
        if not weight:
            return
        means = {f"validation/{name.replace('/', '_')}": total / weight for name, total in sums.items()}
        self.writer.scalars(step, means)
        numbers = "  ".join(f"{name.removeprefix('validation/')} {value:.4g}" for name, value in means.items())
        self.bar.say(f"step {step} held-out pairs: {numbers}")

    def _sample(self, step: int, params: Params) -> None:
        """A PNG grid: one row a caption, policy beside reference from the same starting noise."""
        sample = self.config.sample
        captions = [caption for caption in sample.prompts for _ in range(sample.seeds)]
        seeds = list(range(len(captions)))
        if self._generator is None:
            e = self.experiment
            self._generator = make_generator(
                self.config, e.pipeline, self._encoders, e.placement, batch_size=len(captions), report=self.bar.say
            )
            if e.objective.needs_reference:
                self._reference_images = self._generator(reference_params(e.frozen), captions, seeds)
        policy = self.experiment.frozen.get("base", {}) | for_sampling(self.experiment.pipeline, params)
        images = self._generator(policy, captions, seeds)
        references = self._reference_images
        rows = []
        for p, caption in enumerate(sample.prompts):
            cells = range(p * sample.seeds, (p + 1) * sample.seeds)
            if references is None:
                rows.append((caption, [images[i] for i in cells]))
            else:
                rows.append((caption, [image for i in cells for image in (references[i], images[i])]))
        grid = image_grid(rows, (["policy"] if references is None else ["reference", "policy"]) * sample.seeds)
        self.writer.image(step, "samples", np.asarray(grid))
        if jax.process_index() == 0:
            save_png(self._grid_file(step), grid)
            self.bar.say(f"step {step} samples: {self._grid_file(step)}")

    def _grid_file(self, step: int) -> epath.Path:
        return self.workdir / "samples" / f"step_{step:06d}.png"

    def _encoders(self) -> Frozen:
        """VAE and text encoders; of a run that reads encodings only while images are sampled."""
        e = self.experiment
        return e.frozen if "vae" in e.frozen else load_encoders(self.config, e.pipeline, e.placement)


def _announce(experiment: Experiment, workdir: epath.Path, start: int) -> None:
    if jax.process_index():
        return
    derived = "  ".join(f"{name}={value:.6g}" for name, value in dataclasses.asdict(experiment.derived).items())
    trained = sum(math.prod(spec.shape) for spec in experiment.pipeline.trained_specs.values())
    print(experiment.config)
    print(f"derived: {derived}")
    print(f"batch:   {describe_batch(experiment.config, experiment.derived, jax.process_count())}")
    print(f"devices: {experiment.mesh.size} x {jax.devices()[0].device_kind}, mesh {dict(experiment.mesh.shape)}")
    print(f"model:   {experiment.config.model} ({experiment.pipeline.family.name}), {trained:,} trained parameters")
    table = experiment.placement.table(experiment.pipeline.trained_specs)
    write_whole(workdir / "sharding.txt", f"{table}\n")
    print(f"weights: {table.splitlines()[0]}, each in {workdir / 'sharding.txt'}")
    print(f"workdir: {workdir}, " + (f"continuing after step {start}" if start else "from the start"), flush=True)
