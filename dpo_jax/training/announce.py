"""Prints the lines at the start of a run: its config, data, devices, model and work directory."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dpo_jax import __version__, cluster
from dpo_jax.cli import flatten
from dpo_jax.files import write_whole
from dpo_jax.methods import find_method
from dpo_jax.streams import warn
from dpo_jax.training.config import describe_batch, peak_learning_rate
from dpo_jax.training.experiment import Experiment

MAX_EPOCHS = 20
"""A larger number of epochs gives a warning; published runs take fewer than 5."""
WIDEST = 60
"""Characters of a value in the table of the config."""
PRODIGY_RATES = (1e-2, 1e2)
"""Learning rates outside of this range give a warning with Prodigy, whose own is multiplied by them."""


def announce_config(config: ConfigDict, defaults: ConfigDict, workdir: epath.PathLike) -> None:
    """Print the fields of the config that differ from the defaults, by the first process, and warn of a wrong rate."""
    if not cluster.is_first():
        return
    print(f"dpo_jax {__version__}; config (all fields: {epath.Path(workdir) / 'config.json'}):")
    print(config_table(flatten(config), flatten(defaults)), flush=True)
    warn_of_rate(config)


def warn_of_rate(config: ConfigDict) -> None:
    """Warn of a learning rate that is far from 1 with Prodigy."""
    rate, (lowest, highest) = peak_learning_rate(config), PRODIGY_RATES
    if config.optimizer.name == "prodigy" and not lowest <= rate <= highest:
        warn(
            f"config.optimizer.learning_rate={config.optimizer.learning_rate:g} is {rate:.4g} after scale_by_batch, "
            "but prodigy multiplies it by a rate that it finds itself; set optimizer.learning_rate=1 and "
            "optimizer.scale_by_batch=False"
        )


def config_table(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Return a line for each field whose value is not its default: name, value, default."""
    changed = {name: value for name, value in fields.items() if name not in defaults or value != defaults[name]}
    if not changed:
        return "  all fields have their defaults"
    shown = {name: (_shown(value), _shown(defaults.get(name))) for name, value in changed.items()}
    names, values = max(map(len, shown)), max(len(value) for value, _ in shown.values())
    return "\n".join(f"  {name:{names}}  {value:{values}}  default {was}" for name, (value, was) in shown.items())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def announce_epochs(config: ConfigDict, examples: int) -> None:
    """Print how often the run will see each of its pairs, images or votes, and warn where that is too often."""
    if not cluster.is_first():
        return
    steps, batch = config.steps, config.data.batch_size
    unit = find_method(config.loss.name).unit
    epochs = steps * batch / examples
    product = f"{steps:,} steps x {batch:,} {unit} = {f'{epochs:.2g}' if epochs < 10 else f'{epochs:,.0f}'} epochs"
    print(f"data: {examples:,} training {unit}; {product}", flush=True)
    if epochs <= MAX_EPOCHS:
        return
    change = f"set config.steps={MAX_EPOCHS * examples // batch} or less ({MAX_EPOCHS} epochs)"
    if batch > examples:
        change = f"set config.data.batch_size far below {examples:,} and then fewer config.steps"
    warn(
        f"{product} over {examples:,} {unit}: the model will memorise them and get worse. Prepare more, or {change}; "
        "afterwards, --step=best takes the checkpoint that is best on held-out data"
    )


def announce_experiment(experiment: Experiment, workdir: epath.Path, start: int) -> None:
    """Print what the config means on this machine, and write `workdir/sharding.txt`, by the first process."""
    if not cluster.is_first():
        return
    derived = "  ".join(f"{name}={value:.6g}" for name, value in dataclasses.asdict(experiment.derived).items())
    factors = experiment.rate_factors
    trained = sum(math.prod(spec.shape) for name, spec in experiment.pipeline.trained_specs.items() if factors[name])
    print(f"derived: {derived}")
    print(f"batch:   {describe_batch(experiment.config, experiment.derived, jax.process_count())}")
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    memory = f", {limit / 2**30:.1f} GiB of each for JAX" if limit else ""
    print(
        f"devices: {experiment.mesh.size} x {jax.devices()[0].device_kind}, mesh {dict(experiment.mesh.shape)}{memory}"
    )
    model = f"{experiment.config.model} ({experiment.pipeline.family.name}), {trained:,} trained parameters"
    print(f"model:   {model}, attention by {experiment.pipeline.execution.attention}")
    table = experiment.placement.table(experiment.pipeline.trained_specs, experiment.config.memory.masters)
    write_whole(workdir / "sharding.txt", f"{table}\n")
    print(f"weights: {table.splitlines()[0]}, each in {workdir / 'sharding.txt'}")
    print(f"workdir: {workdir}, " + (f"continuing after step {start}" if start else "from the start"), flush=True)
