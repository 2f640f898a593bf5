"""Keeps the batch of a step whose loss or gradient is not finite, and replays it to find the examples at fault."""

import io
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dpo_jax import files
from dpo_jax.batch import Cached, PreferenceBatch, Raw, Sampled, Transitions
from dpo_jax.cli import flatten, replaced
from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.sharding import batch_parts, replicated, to_devices
from dpo_jax.training.checkpoint import read_config, restore
from dpo_jax.training.config import check_same_experiment, default_config, resolve
from dpo_jax.training.experiment import Experiment, build
from dpo_jax.training.model import model_fingerprints, open_model
from dpo_jax.training.step import TrainState, current_means

MAX_BYTES = 2**30
"""Largest size in bytes of the arrays that are kept of one batch; of a larger batch the first examples are kept."""
MAX_SHOWN = 20
"""Number of examples that a replay lists."""
INPUTS: dict[str, Any] = {"Raw": Raw, "Cached": Cached, "Sampled": Sampled}


class Rereadable(Protocol):
    """Batches that can be read again."""

    def __next__(self) -> PreferenceBatch: ...

    def set_state(self, state: dict[str, int]) -> None: ...

    def describe(self, batch: PreferenceBatch) -> list[str]:
        """Return, for each example of a batch, its record and caption."""
        ...


def keep_batch(
    workdir: epath.Path, step: int, batches: Rereadable, position: dict[str, int], *, most: int | None = None
) -> str:
    """Write this process's share of a step's batch to WORKDIR/errors, and return a message about it.

    The batch is read again, so training need not keep the batches of earlier steps. The batches then continue after it.

    Args:
        workdir: of the run.
        step: the step that was trained on the batch.
        batches: the batches that the step was trained on; read again from `position`, their state before that step.
        position: see above.
        most: write no more than this many batches of a run; None for no limit.
    """
    try:
        batches.set_state(position)
        batch = next(batches)
        names = batches.describe(batch)
        more = f" and {len(names) - 1} more examples" if names[1:] else ""
        if most is not None and len(list((workdir / "errors").glob(f"step_*{_of_process()}.npz"))) >= most:
            return f"the batch of {names[0]}{more} is not kept: {workdir / 'errors'} has those of {most} steps"
        path = write_batch(workdir, step, batch, names)
    except (OSError, UserError) as error:
        return f"the batch cannot be kept ({error})"
    return f"the batch of {names[0]}{more} is kept in {path}"


def _of_process() -> str:
    return f"-process_{jax.process_index()}" if jax.process_count() > 1 else ""


def write_batch(workdir: epath.Path, step: int, batch: PreferenceBatch, names: list[str]) -> epath.Path:
    """Write a batch, cut to `MAX_BYTES`, and next to it a text file that names every example."""
    path = workdir / "errors" / f"step_{step:06d}{_of_process()}.npz"
    size = sum(array.nbytes for array in jax.tree.leaves(batch))
    kept = len(names) if size <= MAX_BYTES else max(1, len(names) * MAX_BYTES // size)
    arrays: dict[str, Any] = _arrays(jax.tree.map(lambda x: x[:kept], batch))
    about: dict[str, Any] = {
        "step": np.array(step),
        "kind": np.array(type(batch.inputs).__name__),
        "names": np.array(names[:kept]),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, **about)
    files.write_whole(path, buffer.getvalue())
    files.write_whole(path.with_suffix(".txt"), "".join(f"{name}\n" for name in names))
    return path


def read_batch(path: epath.PathLike) -> tuple[int, PreferenceBatch, list[str]]:
    """Return the step, the batch and the names of its examples from a file of `write_batch`; UserError for others."""
    data = files.read_bytes(path, 2 * MAX_BYTES)
    try:
        if not zipfile.is_zipfile(io.BytesIO(data)):  # np.load would return the array of a .npy file
            raise ValueError("it is not a .npz file")
        with np.load(io.BytesIO(data)) as found:
            arrays = dict(found)
        inputs = INPUTS[str(arrays["kind"])]
        old = arrays.get("inputs.token_ids_BMEL")  # of older runs: an axis for text encoders
        if old is not None:
            arrays["inputs.token_ids_BML"] = old.reshape(*old.shape[:2], -1)
        batch = _tuple(PreferenceBatch, arrays, "", {"inputs": inputs, "transitions": Transitions})
        return int(arrays["step"]), batch, [str(name) for name in arrays["names"]]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is not a batch that a run kept in WORKDIR/errors, or is damaged ({error})") from error


def _arrays(part: Any, prefix: str = "") -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name, value in part._asdict().items():
        if hasattr(value, "_asdict"):
            arrays |= _arrays(value, f"{prefix}{name}.")
        elif value is None:
            continue
        elif value.dtype == ml_dtypes.bfloat16:  # a .npz cannot hold bfloat16
            arrays[f"{prefix}{name}:bfloat16"] = value.view(np.uint16)
        else:
            arrays[f"{prefix}{name}"] = value
    return arrays


def _tuple(kind: Any, arrays: dict[str, np.ndarray], prefix: str, nested: dict[str, Any]) -> Any:
    def field(name: str) -> Any:
        path = f"{prefix}{name}"
        if name in nested:
            return _tuple(nested[name], arrays, f"{path}.", nested)
        if name in kind._field_defaults and path not in arrays:
            return kind._field_defaults[name]
        return arrays[path] if path in arrays else arrays[f"{path}:bfloat16"].view(ml_dtypes.bfloat16)

    return kind(*map(field, kind._fields))


def replay(
    config: ConfigDict,
    workdir: epath.PathLike,
    file: epath.PathLike,
    say: Callable[[str], None] = print,
) -> None:
    """Compute loss, errors and log-ratios of each example of a kept batch, and print which are not finite.

    The weights are those of the newest checkpoint, since no others are left; timesteps, noises and dropout are those of
    the step. If the batch is complete, the training step itself runs too. Everything is computed in the dtype of the
    config and, if that differs, in float32. Nothing is trained.
    """
    workdir = epath.Path(workdir)
    if jax.process_count() > 1:
        raise UserError("--replay takes one process: it replays the share of one; run it without the others")
    step, batch, names = read_batch(file)
    saved = read_config(workdir)
    if saved is None:
        raise MissingFileError(f"{workdir} has no config.json, so it is not the work directory of a run")
    derived = resolve(config, device_count=jax.device_count(), process_count=1)
    fields = flatten(config) | model_fingerprints(config, open_model(config, workdir))
    data = {name: value for name, value in saved.items() if name in ("fingerprints.data", "fingerprints.scores")}
    check_same_experiment(fields | data, saved, workdir, default_config())  # the data set is not read
    for dtypes in ({}, {"dtype": "float32", "vae_dtype": "float32"}):
        one = replaced(config, dtypes)
        if dtypes and flatten(one) == flatten(config):
            break
        experiment = build(one, derived, open_model(one, workdir))
        restored = restore(workdir, experiment.abstract_state())
        state = restored[0] if restored else experiment.initial_state()
        weights = f"the weights of step {int(state.step)}" if restored else "the initial weights (no checkpoint yet)"
        say(f"step {step} in {one.dtype}, with {weights}:")
        figures = figures_of(experiment, state, batch, step)
        for line in lines_about(figures, names):
            say(f"  {line}")
        if len(names) == config.data.batch_size:
            number = jax.device_put(np.int32(step - 1), replicated(experiment.mesh))
            place = to_devices(experiment.mesh)
            _, metrics = experiment.train_step()(state._replace(step=number), experiment.frozen, place(batch))
            shown = ("train/loss", "train/gradient_norm", "train/update_norm")
            say("  the whole step: " + "  ".join(f"{name} {float(metrics[name]):.6g}" for name in shown))
        else:
            say(f"  the step itself cannot run: {len(names)} of its {config.data.batch_size} examples are in the file")


def figures_of(experiment: Experiment, state: TrainState, batch: PreferenceBatch, step: int) -> dict[str, np.ndarray]:
    """Return loss, errors, accuracy and log-ratios, each [B], with the timesteps and noises of training step `step`."""
    objective, frozen = experiment.objective, experiment.frozen.with_reference(state.reference)

    def figures(params: Any, frozen: Any, batch: PreferenceBatch, number: jax.Array) -> dict[str, jax.Array]:
        found = experiment.compare(params, frozen, batch, number, training=True)
        found = found._replace(running=current_means(state.running))
        return {
            "loss": objective.loss(found),
            **objective.metrics(found),
            "log-ratio/winner": found.log_ratio_BK[:, 0],
            "log-ratio/loser": found.log_ratio_BK[:, -1],
        }

    compute = jax.jit(figures, out_shardings=replicated(experiment.mesh))
    place, count = to_devices(experiment.mesh), len(batch.index_B)
    at_once = experiment.derived.micro_batch_per_device * batch_parts(experiment.mesh)
    parts = []
    for start in range(0, count, at_once):
        rows = np.arange(start, start + at_once) % count  # other examples fill the last part
        part = place(jax.tree.map(lambda x, rows=rows: x[rows], batch))
        parts.append(jax.device_get(compute(state.params, frozen, part, jnp.int32(step - 1))))
    columns = sorted(parts[0], key=lambda name: (name != "loss", name))
    return {name: np.concatenate([part[name] for part in parts])[:count] for name in columns}


def lines_about(figures: dict[str, np.ndarray], names: list[str]) -> list[str]:
    """Return a table of the examples with figures that are not finite or, if there are none, with the largest loss."""
    bad_B = ~np.all([np.isfinite(value_B) for value_B in figures.values()], axis=0)
    chosen = np.flatnonzero(bad_B) if bad_B.any() else np.argsort(-figures["loss"], kind="stable")
    if bad_B.any():
        head = f"{bad_B.sum()} of {len(names)} examples are not finite:"
    else:
        head = (
            f"all figures of {len(names)} examples are finite; the weights have changed between the checkpoint and the "
            "step. The examples with the largest loss:"
        )
    lines = [head, "  ".join([*figures, "example"])]
    for b in chosen[:MAX_SHOWN]:
        numbers = [f"{value_B[b]:.4g}".rjust(len(name)) for name, value_B in figures.items()]
        lines.append("  ".join([*numbers, names[b]]))
    if len(chosen) > MAX_SHOWN:
        lines.append(f"and {len(chosen) - MAX_SHOWN} more")
    return lines
