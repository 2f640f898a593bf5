"""Builds an experiment from its config and runs it: load, resume, loop.

Order of a start or a resume:
  1. the work directory's `config.json`, if there is one, must describe the same experiment;
  2. the model's structure is read from its folder, without memory;
  3. the frozen models (reference, VAE, text encoders) are read from the model folder, at every start: a resumed run can
     never drift onto its own policy;
  4. the training state comes from the newest checkpoint, or else the policy's weights from the model folder;
  5. the data stream continues after the last sample that the checkpoint has seen.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpo_jax.batch import PreferenceBatch
from dpo_jax.cli import flatten, unflatten
from dpo_jax.data.pipeline import BatchIterator, make_iterator, validation_batches
from dpo_jax.data.tokenizers import Tokenizers, load_tokenizers
from dpo_jax.encode.images import encode_images
from dpo_jax.encode.text import encode_text
from dpo_jax.evaluation.generate import Generator
from dpo_jax.evaluation.report import save_grid
from dpo_jax.models.pipeline import Pipeline, load_pipeline
from dpo_jax.models.random_model import write_random_model
from dpo_jax.objectives.losses import dpo, sft
from dpo_jax.sharding import make_mesh, param_sharding, placement, replicated, state_sharding, to_devices
from dpo_jax.training.checkpoint import Checkpoints, read_config, write_config
from dpo_jax.training.config import Derived, check_same_experiment, resolve
from dpo_jax.training.metrics import MetricWriter, ProgressBar
from dpo_jax.training.optim import learning_rate_schedule, make_optimizer
from dpo_jax.training.step import Frozen, Objective, Score, TrainState, make_eval_step, make_score, make_train_step
from dpo_jax.weights.layout import Params


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a config and a machine determine and training does not change."""

    config: ConfigDict
    derived: Derived
    mesh: Mesh
    pipeline: Pipeline
    tokenizers: Tokenizers
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    frozen: Frozen
    score: Score

    def abstract_state(self) -> Any:
        params = abstract_params(self.pipeline, self.mesh)
        state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(self.optimizer.init, params))
        shardings = state_sharding(self.mesh, self.pipeline.unet.specs, state)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)

    def initial_state(self) -> TrainState:
        """The model folder's UNet, in float32, with fresh optimizer state."""
        abstract = self.abstract_state()
        params = self.pipeline.load("unet", dtype=jnp.float32, sharding=placement(self.mesh))
        place = jax.tree.map(lambda x: x.sharding, abstract.opt_state)
        opt_state = jax.jit(self.optimizer.init, out_shardings=place)(params)
        return TrainState(jax.device_put(jnp.zeros((), jnp.int32), replicated(self.mesh)), params, opt_state)

    def generator(self, batch_size: int) -> Generator:
        sample = self.config.sample
        return Generator(
            self.pipeline,
            self.frozen,
            self.tokenizers,
            self.mesh,
            resolution=self.config.data.resolution,
            num_steps=sample.steps,
            guidance_scale=sample.guidance,
            batch_size=batch_size,
        )

    def for_sampling(self, params: Params) -> Params:
        """Trained weights as the frozen ones are kept, so that both run through one compiled sampler."""
        return {name: value.astype(self.pipeline.dtype) for name, value in params.items()}


def build(config: ConfigDict, workdir: epath.PathLike) -> Experiment:
    """Reads the model's structure and its frozen weights; raises ValueError for whatever the config has wrong."""
    derived = resolve(config, device_count=jax.device_count(), process_count=jax.process_count())
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    pipeline = open_model(config, workdir)
    objective = make_objective(config)
    frozen = {}
    for name in pipeline.components:
        dtype = jnp.dtype(config.vae_dtype if name == "vae" else config.dtype)
        if name != "unet":
            frozen[name] = pipeline.load(name, dtype=dtype, sharding=placement(mesh))
        elif objective.needs_reference:
            frozen["reference"] = pipeline.load(name, dtype=dtype, sharding=placement(mesh))
    o = config.optimizer
    learning_rate = learning_rate_schedule(
        o.schedule, derived.learning_rate, warmup_steps=o.warmup_steps, total_steps=config.steps
    )
    optimizer = make_optimizer(
        o.name,
        learning_rate,
        pipeline.unet.specs,
        beta1=o.beta1,
        beta2=o.beta2,
        epsilon=o.epsilon,
        weight_decay=o.weight_decay,
        clip_norm=o.clip_norm,
    )

    def encode(frozen: Frozen, batch: PreferenceBatch, keys_B: jax.Array) -> Any:
        latents_BKHWC = encode_images(pipeline.vae, frozen["vae"], batch.images_BKHWC, keys_B)
        size_cond_N6 = batch.size_cond_BK6.reshape(-1, 6)
        return latents_BKHWC, encode_text(pipeline, frozen, batch.token_ids_BEL, size_cond_N6)

    return Experiment(
        config=config,
        derived=derived,
        mesh=mesh,
        pipeline=pipeline,
        tokenizers=load_tokenizers(pipeline.folder, [encoder.tokenizer for encoder in pipeline.family.text_encoders]),
        objective=objective,
        optimizer=optimizer,
        learning_rate=learning_rate,
        frozen=frozen,
        score=make_score(encode, pipeline.denoise, pipeline.schedule, objective, config.seed),
    )


def open_model(config: ConfigDict, workdir: epath.PathLike) -> Pipeline:
    """The structure of `config.model`; "random:FAMILY" is first written to `workdir/model`, once."""
    folder = config.model
    if folder.startswith("random:"):
        folder = epath.Path(workdir) / "model"
        if not folder.exists() and jax.process_index() == 0:
            write_random_model(config.model.removeprefix("random:"), folder)
        multihost_utils.sync_global_devices("random model written")
    return load_pipeline(folder, dtype=jnp.dtype(config.dtype), vae_dtype=jnp.dtype(config.vae_dtype))


def make_objective(config: ConfigDict) -> Objective:
    """The loss that the config names, with its hyperparameters bound."""
    objectives = {
        "dpo": Objective(functools.partial(dpo, beta=config.loss.beta)),
        "sft": Objective(sft, needs_reference=False, num_candidates=1),
    }
    if config.loss.name not in objectives:
        raise ValueError(f"loss.name={config.loss.name!r}; the losses are {', '.join(objectives)}")
    return objectives[config.loss.name]


def train(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains to `config.steps`, continuing what the work directory holds."""
    workdir = epath.Path(workdir)
    saved = read_config(workdir)
    if saved is not None:
        check_same_experiment(config, saved, workdir)
    experiment = build(config, workdir)
    batches = _training_batches(experiment)
    write_config(workdir, flatten(config))
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
    writer = MetricWriter(workdir)
    try:
        restored = checkpoints.restore(experiment.abstract_state())
        state, position = restored or (experiment.initial_state(), batches.get_state())
        batches.set_state(position)
        start = int(state.step)
        _announce(experiment, workdir, start)
        with batches, ProgressBar(config.steps, start) as bar:
            Loop(experiment, workdir, checkpoints, writer, bar).run(state, batches, start)
    finally:
        checkpoints.close()
        writer.close()


def restore_policy(workdir: epath.PathLike) -> tuple[ConfigDict, Pipeline, Params, int]:
    """Config, model structure, newest trained weights (float32) and their step, of a work directory."""
    saved = read_config(workdir)
    if saved is None:
        raise FileNotFoundError(f"no training run at {workdir}: it has no config.json; train first, see dpo_jax.train")
    config = unflatten(saved)
    pipeline = open_model(config, workdir)
    mesh = make_mesh(fsdp=-1, data=1)
    params, step = Checkpoints(workdir).restore_params(abstract_params(pipeline, mesh))
    return config, pipeline, params, step


def abstract_params(pipeline: Pipeline, mesh: Mesh) -> Any:
    """Shapes and places of the trained weights: float32 masters."""
    return {
        name: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=param_sharding(mesh, spec.shape))
        for name, spec in pipeline.unet.specs.items()
    }


class Loop:
    """The loop itself: step, watch, log, and at intervals validate, sample and save."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: epath.Path,
        checkpoints: Checkpoints,
        writer: MetricWriter,
        bar: ProgressBar,
    ):
        self.experiment, self.config, self.workdir = experiment, experiment.config, workdir
        self.checkpoints, self.writer, self.bar = checkpoints, writer, bar
        step = make_train_step(
            experiment.score,
            experiment.objective,
            experiment.optimizer,
            accumulation=self.config.data.accumulation,
        )
        place = jax.tree.map(lambda x: x.sharding, experiment.abstract_state())
        self.train_step = jax.jit(step, donate_argnums=0, out_shardings=(place, replicated(experiment.mesh)))
        self.place = to_devices(experiment.mesh)
        self.eval_step = jax.jit(make_eval_step(experiment.score), out_shardings=replicated(experiment.mesh))
        self._generator: Generator | None = None
        self._reference_images: np.ndarray | None = None

    def run(self, state: TrainState, batches: BatchIterator, start: int) -> TrainState:
        config, total = self.config, self.config.steps
        window: list[dict[str, float]] = []
        pending: dict[str, jax.Array] | None = None
        timer, timed_from = time.monotonic(), start

        for step in range(start + 1, total + 1):
            state, metrics = self.train_step(state, self.experiment.frozen, self.place(next(batches)))
            if pending is not None:  # one step late, so that the host never waits for the device
                window.append(self._fetch(pending, step - 1))
            pending = metrics
            self.bar.advance(step)

            saves = step % config.checkpoint.every == 0 or step == total
            logs = step % config.log_every == 0 or step == total
            validates = bool(config.validation.every) and (step % config.validation.every == 0 or step == total)
            samples = bool(config.sample.every) and (step % config.sample.every == 0 or step == total)
            if step == start + 1:
                window.append(self._fetch(pending, step))
                pending = None
                if start == 0:
                    self._first_loss(window[-1]["train/loss"])
                timer, timed_from = time.monotonic(), step  # compilation is not speed
            if not (saves or logs or validates or samples):
                continue
            if pending is not None:
                window.append(self._fetch(pending, step))
                pending = None
            if logs:
                seconds_per_step = (time.monotonic() - timer) / max(step - timed_from, 1)
                self._log(step, window, seconds_per_step)
                window, timer, timed_from = [], time.monotonic(), step
            paused = time.monotonic()
            if saves:
                self.checkpoints.save(state, position=batches.get_state())
            if validates:
                self._validate(step, state.params)
            if samples:
                self._sample(step, state.params)
            timer += time.monotonic() - paused
        return state

    def _fetch(self, metrics: Mapping[str, jax.Array], step: int) -> dict[str, float]:
        """Metrics as numbers; stops the run where the loss or the gradient is not finite."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = [name for name in ("train/loss", "train/gradient_norm") if not math.isfinite(values[name])]
        if bad:
            last = self.checkpoints.latest_step()
            kept = f"step {last} in {self.checkpoints.folder}" if last is not None else "none yet"
            raise ValueError(
                f"{bad[0]} is {values[bad[0]]} at step {step}; last good checkpoint: {kept}. "
                "Try a lower optimizer.learning_rate or loss.beta, or dtype=float32"
            )
        return values

    def _log(self, step: int, window: list[dict[str, float]], seconds_per_step: float) -> None:
        means = {name: float(np.mean([values[name] for values in window])) for name in window[0]}
        means["train/learning_rate"] = float(self.experiment.learning_rate(step - 1))
        means["speed/pairs_per_second"] = self.config.data.batch_size / max(seconds_per_step, 1e-9)
        self.writer.scalars(step, means)
        self.bar.show(step, means, seconds_left=(self.config.steps - step) * seconds_per_step)

    def _first_loss(self, loss: float) -> None:
        if self.config.loss.name == "dpo":
            self.bar.say(f"loss before the first update {loss:.6f}; policy = reference makes log 2 = {math.log(2):.6f}")

    def _validate(self, step: int, params: Params) -> None:
        """Implicit accuracy and errors on held-out pairs, the same timesteps and noises every time."""
        experiment, validation = self.experiment, self.config.validation
        sums: dict[str, float] = {}
        weight = 0.0
        for batch in _validation_batches(experiment):
            on_device = self.place(batch)
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
            self._generator = self.experiment.generator(batch_size=len(captions))
            if "reference" in self.experiment.frozen:
                self._reference_images = self._generator(self.experiment.frozen["reference"], captions, seeds)
        images = self._generator(self.experiment.for_sampling(params), captions, seeds)
        if jax.process_index() == 0:
            columns = [title for _ in range(sample.seeds) for title in ("reference", "policy")]
            rows = []
            for p, caption in enumerate(sample.prompts):
                row = []
                for i in range(p * sample.seeds, (p + 1) * sample.seeds):
                    row += [images[i]] if self._reference_images is None else [self._reference_images[i], images[i]]
                rows.append((caption, row))
            path = self.workdir / "samples" / f"step_{step:06d}.png"
            save_grid(path, rows, columns if self._reference_images is not None else ["policy"] * sample.seeds)
            self.bar.say(f"step {step} samples: {path}")


def _training_batches(experiment: Experiment) -> BatchIterator:
    """This process's share of the endless training stream; reads nothing but the data set's index yet."""
    data = experiment.config.data
    return make_iterator(
        data.path,
        tokenizers=experiment.tokenizers,
        batch_size=experiment.derived.local_batch_size,
        seed=experiment.config.seed,
        caption_dropout=data.caption_dropout,
        random_crop=data.random_crop,
        random_flip=data.random_flip,
        relabel=data.relabel,
        num_workers=data.num_workers,
        **_data_options(experiment),
    )


def _validation_batches(experiment: Experiment) -> Iterator[PreferenceBatch]:
    config = experiment.config
    batch_size = experiment.derived.local_batch_size // config.data.accumulation
    batches = validation_batches(
        config.data.path, tokenizers=experiment.tokenizers, batch_size=batch_size, **_data_options(experiment)
    )
    return itertools.islice(batches, -(-config.validation.max_pairs // (batch_size * jax.process_count())))


def _data_options(experiment: Experiment) -> dict[str, Any]:
    """What training and validation share."""
    data = experiment.config.data
    return {
        "resolution": data.resolution,
        "size_conditioning": data.size_conditioning,
        "shard_index": jax.process_index(),
        "shard_count": jax.process_count(),
    }


def _announce(experiment: Experiment, workdir: epath.Path, start: int) -> None:
    if jax.process_index():
        return
    derived = "  ".join(f"{name}={value:.6g}" for name, value in dataclasses.asdict(experiment.derived).items())
    millions = sum(math.prod(spec.shape) for spec in experiment.pipeline.unet.specs.values()) / 1e6
    print(experiment.config)
    print(f"derived: {derived}")
    print(f"devices: {experiment.mesh.size} x {jax.devices()[0].device_kind}, mesh {dict(experiment.mesh.shape)}")
    print(f"model:   {experiment.config.model} ({experiment.pipeline.family.name}), {millions:.1f}M trained parameters")
    print(f"workdir: {workdir}, " + (f"continuing after step {start}" if start else "from the start"), flush=True)
