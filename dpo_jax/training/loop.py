"""The training loop: steps, metrics, validation, image grids and checkpoints."""

import contextlib
import math
import time
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dpo_jax import cluster, interrupts
from dpo_jax.batch import PreferenceBatch
from dpo_jax.data.load.inputs import Inputs
from dpo_jax.data.load.pipeline import BatchIterator
from dpo_jax.errors import UserError
from dpo_jax.methods import find_method
from dpo_jax.rewards import Judge
from dpo_jax.sampling.grid import save_png
from dpo_jax.sharding import replicated, to_devices
from dpo_jax.training.checkpoint import Checkpoints
from dpo_jax.training.data import open_validation_batches
from dpo_jax.training.experiment import Experiment
from dpo_jax.training.figures import figures_of, is_by_noise, mean_of, validation_figures
from dpo_jax.training.metrics import MetricWriter, ProgressBar
from dpo_jax.training.preemption import Notice, Preempted
from dpo_jax.training.replay import keep_batch
from dpo_jax.training.sample_grids import SampleGrids
from dpo_jax.training.startup import StartupClock
from dpo_jax.training.step import TrainState, make_eval_step
from dpo_jax.training.watch import JUDGE, Watch

MOST_KEPT = 10
"""Most batches of skipped steps that a run keeps on disk."""
PREEMPTED = "preempted after step {}; run the same command again to continue"


class Batches(Protocol):
    """An iterator of batches; each checkpoint holds its `get_state()`, the position in the data."""

    def __next__(self) -> PreferenceBatch: ...

    def get_state(self) -> dict[str, int]: ...

    def set_state(self, state: dict[str, int]) -> None: ...

    def describe(self, batch: PreferenceBatch) -> list[str]:
        """Return, for each example of a batch, its record and caption."""
        ...


class Loop:
    """The training loop: it steps and logs, and at intervals validates, samples and saves."""

    def __init__(
        self,
        experiment: Experiment,
        inputs: Inputs | None,
        workdir: epath.Path,
        checkpoints: Checkpoints,
        writer: MetricWriter,
        bar: ProgressBar,
        notice: Notice,
        clock: StartupClock,
        judge: Judge | None = None,
    ):
        self.experiment, self.inputs, self.config, self.workdir = experiment, inputs, experiment.config, workdir
        unit = find_method(self.config.loss.name).unit
        self.unit = "pairs" if unit == "images" else unit
        """What an example is called in figures and lines."""
        self.checkpoints, self.writer, self.bar = checkpoints, writer, bar
        self.notice, self.clock = notice, clock
        self.train_step = experiment.train_step()
        self.place = to_devices(experiment.mesh)
        self._began: tuple[float, int] | None = None
        """Time at the end of this process's first step, and the number of that step; None before it."""
        self.eval_step = jax.jit(
            make_eval_step(experiment.compare, experiment.objective.held_out_metrics),
            out_shardings=replicated(experiment.mesh),
        )
        self._shapes: set[Any] = set()
        """The shapes of batches that the training step was compiled for."""
        self._batches: Batches | None = None
        self._positions: dict[int, dict[str, int]] = {}
        """States of the batches before the last two steps."""
        self._skipped_in_row = 0
        self._grids = SampleGrids(experiment, bar.say, judge)
        self.watch = Watch(self.config, writer.validations, bar.say, writer.samples)

    def catch_up(self, state: TrainState) -> None:
        """Validate and sample if that is due at the state's step and was not done.

        At step 0 that is the baseline of all curves; later, a kill came between the checkpoint and what was due.
        """
        step = int(state.step)
        if jax.process_count() == 1 and self.notice.received():
            raise Preempted(PREEMPTED.format(step))
        if self._validates_at(step) and cluster.says_first(step not in self.writer.validations):
            self._validate(step, state)
        if self._samples_at(step) and cluster.says_first(cluster.is_first() and not self._has_sampled(step)):
            self._sample(step, state)
        self._find_best()
        self.clock.lap("catch up" if step else "baseline")

    def run(self, state: TrainState, batches: Batches, end: int | None = None) -> TrainState:
        """Train to step `end`, by default the last one; it logs and saves there whatever the intervals are.

        It ends earlier where `stop_reason` says so.
        """
        config, total = self.config, self.config.steps
        start, end = int(state.step), total if end is None else end
        window: list[dict[str, Any]] = []
        pending: dict[str, jax.Array] | None = None
        timer, timed_from = time.monotonic(), start
        self._batches, self._positions = batches, {}

        if start < end and self.notice.given(start):
            raise Preempted(PREEMPTED.format(start))
        for step in range(start + 1, end + 1):
            interrupts.check()
            self._positions[step] = batches.get_state()
            self._positions.pop(step - 2, None)
            batch = self.place(next(batches))
            compiles, before = self._compiles(batch), time.monotonic()
            # A step that compiles is not watched: the time that it takes differs between processes.
            with contextlib.nullcontext() if compiles else cluster.watched(f"to begin step {step}"):
                state, metrics = self.train_step(state, self.experiment.frozen, batch)
            if pending is not None:  # one step later, so that the host never waits for the device
                window.append(self._fetch(pending, step - 1))
            pending = metrics
            self.bar.advance(step)
            self.checkpoints.check()

            stops = self.notice.given(step) and step < total
            saves = step % config.checkpoint.every == 0 or step == end or stops
            logs = step % config.log_every == 0 or step == end or stops
            validates = self._validates_at(step)
            samples = self._samples_at(step)
            if compiles:
                cluster.wait(f"step {step} compiled")
                window.append(self._fetch(pending, step))
                pending = None
                timer, timed_from = timer + time.monotonic() - before, timed_from + 1  # compilation is not speed
            if self._began is None:
                if start == 0 and "train/loss" in window[-1]:
                    self._first_loss(float(window[-1]["train/loss"]))
                self.clock.lap("first step")
                self.bar.say(f"startup: {self.clock}")
                timer, timed_from = time.monotonic(), step
                self._began = timer, step
            if not (saves or logs or validates or samples):
                continue
            if pending is not None:
                window.append(self._fetch(pending, step))
                pending = None
            if logs:
                elapsed = time.monotonic() - timer
                if isinstance(batches, BatchIterator):
                    damaged = cluster.total(len(batches.damaged))
                    window[-1] |= {"data/damaged_records": damaged} if damaged else {}
                self._log(step, window, elapsed / (step - timed_from) if step > timed_from else None)
                window, timer, timed_from = [], time.monotonic(), step
            paused = time.monotonic()
            if saves:
                self._save(step, state, batches)
            if stops:
                self.checkpoints.close()
                raise Preempted(PREEMPTED.format(step))
            if validates:
                self._validate(step, state)
            if samples:
                self._sample(step, state)
            looked_at = {"": False, JUDGE: samples}
            if looked_at.get(config.checkpoint.best, validates) and self._find_best(step) == step:
                self._save(step, state, batches)
            if looked_at.get(config.early_stop.metric, validates) and step < total and self.stop_reason(step):
                self._save(step, state, batches)
                if window:
                    self._log(step, window, None)
                break
            timer += time.monotonic() - paused
        return state

    def _compiles(self, batch: PreferenceBatch) -> bool:
        """Return whether the training step is compiled for this batch: the first one, or the first of a bucket."""
        shapes = tuple(x.shape for x in jax.tree.leaves(batch.inputs))
        is_new = shapes not in self._shapes
        self._shapes.add(shapes)
        if self._began is None:
            self.bar.say("compiling the training step (a minute or more for a full-size model's first start)")
        elif is_new and self.inputs is not None:
            self.bar.say(f"compiling the training step for bucket {len(self._shapes)} of {len(self.inputs.shapes)}")
        return self._began is None or (is_new and self.inputs is not None)

    def stop_reason(self, step: int) -> str:
        """Return why the run stops early after this step; empty if it does not."""
        reason = self.watch.stop_reason(step)
        if self.config.early_stop.metric and cluster.says_first(bool(reason)):
            return reason or "process 0 stops early"
        return ""

    def _save(self, step: int, state: TrainState, batches: Batches) -> None:
        with cluster.watched(f"to save step {step}"):
            self.checkpoints.save(state, position=batches.get_state())

    def _find_best(self, step: int = 0) -> int:
        """Tell the checkpoints which of them, or the one of this step, is the best; return its step, or -1."""
        metric = self.config.checkpoint.best
        if metric:
            best = self.watch.best(metric, [step, *self.checkpoints.steps()])
            self.checkpoints.best.step = int(cluster.says_first(np.array(best)))
        return self.checkpoints.best.step

    def _fetch(self, metrics: Mapping[str, jax.Array], step: int) -> dict[str, Any]:
        """Return metrics as numbers and arrays; of a skipped step, only that it was skipped.

        Raises:
            UserError: too many steps in a row were skipped, or an update is not finite.
        """
        with cluster.watched(f"to end step {step}"):
            values = {name: np.asarray(value, float) for name, value in jax.device_get(dict(metrics)).items()}
        is_skipped = bool(values.get("train/skipped", 0))
        self._skipped_in_row = self._skipped_in_row + 1 if is_skipped else 0
        watched = ("train/loss", "train/gradient_norm", "train/update_norm")
        bad = next((name for name in watched if not math.isfinite(values[name])), None)
        if bad is None and not is_skipped:
            return values
        assert self._batches is not None
        what = f"{bad} is {values[bad]}" if bad else f"train/gradient_norm rose to {values['train/gradient_norm']:.4g}"
        see = " (to see which examples are not finite, add --replay=FILE to the command)" if self.inputs and bad else ""
        if is_skipped and self._skipped_in_row <= self.config.optimizer.max_skips:
            position = self._batches.get_state()
            about = keep_batch(self.workdir, step, self._batches, self._positions[step], most=MOST_KEPT)
            self._batches.set_state(position)
            self.bar.say(f"warning: {what} at step {step}, which is skipped; {about}{see}")
            return {"train/skipped": values["train/skipped"]}
        last = self.checkpoints.latest_step()
        kept = f"step {last} in {self.checkpoints.folder}" if last is not None else "none yet"
        about = keep_batch(self.workdir, step, self._batches, self._positions[step])
        before = f", after {self._skipped_in_row - 1} skipped steps" if self._skipped_in_row > 1 else ""
        raise UserError(
            f"{what} at step {step}{before}; last good checkpoint: {kept}; {about}{see}. "
            "In a new --workdir, try a lower optimizer.learning_rate or loss.beta, or dtype=float32"
        )

    def _log(self, step: int, window: list[dict[str, Any]], seconds_per_step: float | None) -> None:
        means = figures_of(mean_of(window))
        if "train/skipped" in means:
            means["train/skipped"] *= len(window)  # their number
        means["train/learning_rate"] = float(self.experiment.learning_rate(step - 1))
        seconds_left = None
        if seconds_per_step is not None and self._began is not None:
            means[f"speed/{self.unit}_per_second"] = self.config.data.batch_size / seconds_per_step
            since, first = self._began  # includes the time between steps, such as that of sampling rounds
            seconds_left = (self.config.steps - step) * (time.monotonic() - since) / (step - first)
        self.writer.scalars(step, means)
        self.bar.show(step, means, seconds_left)
        self.watch.trained(step, means)

    def _first_loss(self, loss: float) -> None:
        config = self.config
        same = not config.reference and (not config.lora.init or config.lora.init_reference)
        expected = self.experiment.objective.loss_at_reference()
        if expected is not None and same:
            self.bar.say(f"loss before the first update {loss:.6f}; policy = reference makes {expected:.6f}")

    def _validates_at(self, step: int) -> bool:
        """Return whether to validate at this step; only runs on a data set have held-out pairs."""
        every = self.config.validation.every if self.inputs is not None else 0
        return bool(every) and (step % every == 0 or step == self.config.steps)

    def _samples_at(self, step: int) -> bool:
        every = self.config.sample.every
        return bool(every) and (step % every == 0 or step == self.config.steps)

    def _validate(self, step: int, state: TrainState) -> None:
        """Log implicit accuracy and errors on held-out pairs, with the same timesteps and noises every time."""
        assert self.inputs is not None, "only a run on a data set validates"
        experiment, validation = self.experiment, self.config.validation
        params, frozen = state.ema or state.params, experiment.frozen.with_reference(state.reference)
        sums: dict[str, Any] = {}
        weight = 0.0
        with open_validation_batches(self.config, experiment.derived, self.inputs) as batches:
            for batch in batches:
                on_device = self.place(batch)
                for number in range(validation.draws):
                    values, w = jax.device_get(self.eval_step(params, frozen, on_device, jnp.int32(number)))
                    weight += float(w)
                    sums = {name: sums.get(name, 0.0) + np.asarray(value, float) for name, value in values.items()}
        if not weight:
            return
        means = validation_figures({name: total / weight for name, total in sums.items()})
        means |= self.watch.since_start(means) | {f"validation/{self.unit}": weight / validation.draws}
        self.writer.scalars(step, means)
        shown = {name: value for name, value in means.items() if not is_by_noise(name) and "reference" not in name}
        numbers = "  ".join(f"{name.removeprefix('validation/')} {value:.4g}" for name, value in shown.items())
        self.bar.say(f"step {step} held-out {self.unit}: {numbers}")
        self.watch.validated(step)

    def _sample(self, step: int, state: TrainState) -> None:
        """Write the grid of `SampleGrids` as a PNG, and to the loggers; log its scores."""
        grid = self._grids.draw(state.ema or state.params)
        self.writer.image(step, "samples", np.asarray(grid.image))
        if jax.process_index() == 0:
            save_png(self._grid_file(step), grid.image)
        if grid.scores:
            self.writer.scalars(step, grid.scores)
        scores = self.watch.scores(step)
        told = f"; mean score by {self.config.sample.judge}: {scores}" if scores else ""
        self.bar.say(f"step {step} samples: {self._grid_file(step)}{told}")
        count = self.config.sample.seeds * len(self.config.sample.prompts)
        self.watch.sampled(step, grid.blank, count, self._grid_file(step))

    def _has_sampled(self, step: int) -> bool:
        is_scored = not self._grids.judge or bool(self.watch.scores(step))
        return is_scored and self._grid_file(step).exists()

    def _grid_file(self, step: int) -> epath.Path:
        return self.workdir / "samples" / f"step_{step:06d}.png"
